"""Write docs/losses.md, every loss, term and recipe, and docs/survey.html, their map; from the code itself.

python scripts/losses_page.py
"""

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from fakit import Attention, recipes
from fakit.experiments import RunStore
from fakit.experiments.statistics import paired_table
from fakit.layer_maps import STRATEGIES, LayerMap
from fakit.losses import attention, features, outputs
from fakit.objective import feature_terms
from fakit.objective.temperature import LearnedTemperature
from fakit.widgets import survey_map

ROOT = Path(__file__).parents[1]
PAGE, SURVEY = ROOT / "docs/losses.md", ROOT / "docs/survey.html"
RECORD = ROOT / "data/recorded/recipes"

HEAD = (
    "# Losses, terms, layer maps and recipes\n",
    "This page is made from the code by `python scripts/losses_page.py`; a test holds it to be up to date.",
    "Every loss is a mean over what counts, computed in float32 or better.",
    '`Features("cosine")`, `Outputs("jsd", beta=0.1)`, or the same name in YAML, chooses it.',
    "The [survey's map](survey.html) (open it in a browser) places each recipe by what it aligns; `survey_map()` of "
    "`fakit.widgets` is the same in a notebook.",
    "Student S, teacher T; hidden states s, t; attention maps A; distributions P (teacher) and Q (student); "
    "temperature τ.",
    "[Compared with released code](peers.md), loss by loss.\n",
    '**Start with** `Outputs("forward_kl", temperature=2.0)` beside the task.',
    "Add `Features` and `Attention` where the student could not inherit what it needs (random start, another width, "
    "another architecture), and measure them against outputs alone.",
)
SIDE_BY_SIDE = (
    "All recipes that the kit had on 29 November 2026, on one student at equal steps: 2 of MiniLM's 6 layers, copied, "
    "on `glosses` with 350 labels and 120 batches of 16, five paired seeds; `fakit study configs/recipes.yaml --out "
    "data/recorded/recipes`.",
    "In brackets: 95 % intervals over seeds; p is that of a paired t test after Holm's correction for all recipes of "
    "its column.",
    "What it cannot say: what a recipe is worth with its own data, length and student.",
    "`minilm` and `minilmv2` have neither the task nor outputs in them: the copied classifier then reads a body that "
    "was trained away from it, and a fine-tuning that this study leaves out belongs behind them.\n",
)
RELATIONS = (
    "KL of softmax(X Xᵀ/√d_r) for queries, keys and values, re-split into relation heads. MiniLMv2 (Wang et al. 2021); "
    "of values alone MiniLM (Wang et al. 2020)."
)
MINILM = "The KL of the maps plus that of the values' relations, of the last layers. MiniLM (Wang et al. 2020)."


def summary(made: Callable) -> str:
    """What a function or class does, in one line of a Markdown table: its docstring up to where a year says from where,
    the second paragraph at most, and an equation that stands by itself.
    """
    parts = re.split(r"\n\s*\n", inspect.getdoc(made) or "")
    equation = len(parts) > 1 and parts[1].startswith("    ")
    said = parts[: 1 + equation]
    if not re.search(r"(19|20)\d\d", " ".join(said)) and len(parts) > len(said) and _is_prose(parts[len(said)]):
        said.append(parts[len(said)])
    said = [f"`{' '.join(part.split())}`" if part.startswith("    ") else " ".join(part.split()) for part in said]
    return " ".join(said).replace("|", "\\|")


def _is_prose(paragraph: str) -> bool:
    return not paragraph.startswith((">>>", "Args:", "Raises:", "Returns:", "    "))


def own_parameters(function: Callable, given: tuple[str, ...]) -> str:
    """Names and defaults of what a loss takes beside the two sides."""
    found = inspect.signature(function).parameters.values()
    own = [p for p in found if p.name not in given and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return ", ".join(f"`{p.name}={p.default!r}`" for p in own) or "–"


def place(made: Callable) -> str:
    """A link to the file that a function or class stands in."""
    path = Path(inspect.getsourcefile(inspect.unwrap(made))).relative_to(ROOT)
    return f"[{path.relative_to('fakit')}](../{path})"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(head: tuple[str, ...], rows) -> str:
    return "\n".join(row(*cells) for cells in (head, ["---"] * len(head), *rows))


def used_by(kind: str, loss: str) -> str:
    """The recipes that use a loss in a term of a kind."""
    found = []
    for name, recipe in sorted(recipes.RECIPES.items()):
        settings = recipe().configuration
        own = [(key, settings[key]) for key in ("features", "attention", "outputs") if settings[key]]
        own += [(term["kind"], term) for term in settings["terms"].values()]
        over_states = ("features", *feature_terms.KINDS)
        if any((k == kind or (kind == "features" and k in over_states)) and t.get("loss") == loss for k, t in own):
            found.append(f"[{name}](#{name})")
    return ", ".join(found) or "–"


def losses(kind: str, known: Mapping[str, Callable], given: tuple[str, ...]) -> str:
    rows = [
        (f"`{name}`", summary(loss), own_parameters(loss, given), used_by(kind, name), place(loss))
        for name, loss in known.items()
    ]
    return table(("name", "what, and from where", "own parameters", "recipes", "code"), rows)


def recipe_section(name: str) -> str:
    recipe = recipes.RECIPES[name]()
    said = [f"### {name}", f"{recipe.title}.\n{recipe.source}.", f"$$ {' '.join(recipe.equation.split())} $$"]
    said.append(f"```yaml\n{recipe.to_yaml()}```")
    if recipe.published:
        said.append(
            "\n".join(["Published beside it, and not set:\n", *(f"* {k}: {v}" for k, v in recipe.published.items())])
        )
    if recipe.ours:
        said.append("\n".join(["Ours:\n", *(f"* {line}" for line in recipe.ours)]))
    if recipe.evidence:
        said.append(f"Evidence: {recipe.evidence}")
    return "\n\n".join(said)


def side_by_side() -> str:
    """Every recipe of data/recorded/recipes beside labels alone and soft labels, the best first."""
    runs = RunStore(RECORD).runs()
    runs = runs[runs["kind"] == "run"]
    none, soft = (paired_table(runs, "score", arm).set_index("arm") for arm in ("none", "distilbert"))
    agreement = runs.groupby("arm")["test.agreement"].mean()
    rows = []
    for arm in none.sort_values("mean", ascending=False).index:
        name = f"[{arm}](#{arm})" if arm in recipes.RECIPES else f"*{arm}*"
        cells = [name, _interval(none.loc[arm], "mean", "low", "high", "")]
        for of, baseline in ((none, "none"), (soft, "distilbert")):
            one = of.loc[arm]
            if arm == baseline:
                cells += ["–", "–"]
            else:
                p = one["p_holm"]
                cells += [_interval(one, "gain", "gain_low", "gain_high", "+"), "< 0.001" if p < 5e-4 else f"{p:.3f}"]
        rows.append((*cells, f"{100 * agreement[arm]:.1f} %"))
    over = ("gain over labels alone", "p (Holm)", "gain over distilbert", "p (Holm)")
    return table(("recipe", "test accuracy %", *over, "agreement"), rows)


def _interval(row, value: str, low: str, high: str, sign: str) -> str:
    return f"{100 * row[value]:{sign}.1f} [{100 * row[low]:{sign}.1f}, {100 * row[high]:{sign}.1f}]"


def page() -> str:
    sides = ("student", "teacher", "mask")
    maps = [(f"`{name}`", summary(getattr(LayerMap, name)), place(LayerMap)) for name in STRATEGIES]
    maps += [(f"`LayerMap.{n}`", summary(getattr(LayerMap, n)), place(LayerMap)) for n in ("from_similarity", "emd")]
    further = [(f"`{n}`", f"`{k.__name__}`", summary(k), place(k)) for n, k in feature_terms.KINDS.items()]
    cloning = feature_terms.activation_cloning
    further.append(("`features`, one for each `at`", f"`{cloning.__name__}()`", summary(cloning), place(cloning)))
    own = "`relations`, `relation_heads` of the term"
    relations = ("`relations`", RELATIONS, own, used_by("attention", "relations"), place(Attention))
    minilm = (
        "`minilm`",
        MINILM,
        "`relation_heads` of the term",
        used_by("attention", "minilm"),
        place(Attention),
    )
    parts = [
        "\n".join(HEAD),
        "## Hidden states: `Features(loss)`",
        losses("features", features.LOSSES, sides),
        "## Further terms over hidden states: `terms: {name: {kind: …}}`",
        table(("kind", "class", "what, and from where", "code"), further),
        "## Attention: `Attention(loss)`",
        losses("attention", attention.LOSSES, sides) + "\n".join(["", row(*relations), row(*minilm)]),
        "## Outputs: `Outputs(loss, temperature=τ)`",
        losses("outputs", outputs.LOSSES, (*sides, "temperature", "labels")),
        "### A learned temperature: `Outputs(loss, reversal=λ)`",
        table(("what, and from where", "code"), [(summary(LearnedTemperature), place(LearnedTemperature))]),
        "## Layer maps",
        table(("name", "what, and from where", "code"), maps),
        "## Recipes: `recipes.tinybert()`, or `recipe: tinybert`",
        "A recipe stands for settings; keys beside it change them, such as `features: {weight: 0.5}`.",
        "### Side by side",
        "\n".join(SIDE_BY_SIDE),
        side_by_side(),
        *(recipe_section(name) for name in sorted(recipes.RECIPES)),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    SURVEY.write_text(survey_map(selected="feature_alignment").html())
