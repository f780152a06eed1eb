"""Recipes: every one trains a student of a real family, says what it is, and is the same in Python and in a file."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional as F

from fakit import LayerMap, capture, recipes, shrink
from fakit.experiments import Study
from fakit.experiments.build import build_objective
from fakit.experiments.config import ExperimentConfig
from fakit.recipes.recipe import KEYS, Recipe
from tests import families
from tests.families import SIZES, tiny

NAMES = sorted(recipes.RECIPES)
BATCH = families.batch(rows=3)
each = pytest.mark.parametrize("name", NAMES)
LABELS = torch.tensor([0, 2, 1])
S, T = 2, 3
POOLED = {"kind": "pooled", "loss": "mse", "layer_map": "top"}


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=3)).double().eval()


@pytest.fixture
def student(teacher):
    """Two of the teacher's three layers, moved a little, so that nothing is 0."""
    torch.manual_seed(1)
    model = shrink(teacher, layers=S).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def compared(objective, student, teacher, step: int = 0):
    objective.set_step(step, of=10)
    rows = BATCH
    traces = [
        capture(
            model,
            rows,
            needs.hidden_states,
            needs.attentions,
            attention_outputs=needs.attention_outputs,
            logits=needs.logits,
        )
        for model, needs in ((student, objective.needs("student")), (teacher, objective.needs("teacher")))
    ]
    return objective(*traces, labels=LABELS)


@each
def test_a_step_moves_the_student(name, student, teacher):
    recipe = recipes.RECIPES[name]()
    assert isinstance(recipe, Recipe) and recipe.name == name
    objective = recipe.objective(student, teacher)
    found = compared(objective, student, teacher)
    assert found.total.isfinite() and found.total > 0
    found.total.backward()
    pulls = [p.grad for p in student.bert.encoder.parameters() if p.grad is not None]
    assert pulls and all(pull.isfinite().all() for pull in pulls) and any(pull.abs().max() > 0 for pull in pulls)


@each
def test_a_file_and_python_say_the_same(name, student, teacher):
    recipe = recipes.RECIPES[name]()
    ours = recipe.objective(student, teacher)
    config = ExperimentConfig(recipe=name)
    theirs = build_objective(config, student, teacher)
    assert dict(ours.weights) == dict(theirs.weights) and ours.temperature == theirs.temperature
    assert {n: t.describe() for n, t in ours.terms.items()} == {n: t.describe() for n, t in theirs.terms.items()}
    assert {n: ours.map_of(n) for n in ours.terms} == {n: theirs.map_of(n) for n in theirs.terms}
    assert config.arm == name
    assert ExperimentConfig.from_dict(config.to_dict()) == config


@each
def test_it_prints_its_equation_settings_and_what_is_ours(name):
    recipe = recipes.RECIPES[name]()
    for text in (str(recipe), recipe._repr_markdown_()):
        assert recipe.title in text and recipe.source in text and " ".join(recipe.equation.split()) in text
        assert recipe.to_yaml().splitlines()[0] == f"recipe: {name}"
        assert all(line in text for line in recipe.ours) and all(said in text for said in recipe.published.values())
    assert set(recipe.settings) <= set(KEYS)


@each
def test_its_equation_is_drawn_on_a_page(name):
    from fakit.teaching.pages import formula

    assert "<math" in formula(" ".join(recipes.RECIPES[name]().equation.split()))


@each
def test_the_file_is_readable_on_one_screen(name):
    import inspect

    source = inspect.getsource(recipes.RECIPES[name])
    assert len(source.splitlines()) <= 50


# -- against the formulas, written out ---------------------------------------------------------------------------------


def hidden(model, layer: int) -> Tensor:
    """Of the valid tokens, by transformers itself. (n, d)"""
    states = model(**BATCH, output_hidden_states=True).hidden_states[layer]
    return states[BATCH["attention_mask"].bool()]


def logits(model) -> Tensor:
    return model(**BATCH).logits


def soft_labels(student, teacher, temperature: float) -> Tensor:
    P, Q = (logits(model) / temperature for model in (teacher, student))
    return temperature**2 * F.kl_div(Q.log_softmax(-1), P.log_softmax(-1), reduction="batchmean", log_target=True)


def test_distilbert_by_hand(student, teacher):
    direction = 1 - F.cosine_similarity(hidden(student, S), hidden(teacher, T)).mean()
    by_hand = 5 * soft_labels(student, teacher, 2) + 2 * F.cross_entropy(logits(student), LABELS) + direction
    found = compared(recipes.distilbert().objective(student, teacher), student, teacher).total
    torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=1e-9)


def test_pkd_by_hand(student, teacher):
    def first(model, layer: int) -> Tensor:
        return F.normalize(model(**BATCH, output_hidden_states=True).hidden_states[layer][:, 0], dim=-1)

    (ours, theirs), *others = LayerMap.skip(S, T).pairs
    assert not others
    patient = F.mse_loss(first(student, ours), first(teacher, theirs))
    by_hand = 0.3 * F.cross_entropy(logits(student), LABELS) + 0.7 * soft_labels(student, teacher, 10) + 500 * patient
    found = compared(recipes.pkd().objective(student, teacher), student, teacher).total
    torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=1e-9)


def test_layer_reduction_by_hand(student, teacher):
    def texts(model, layer: int) -> Tensor:
        mask = BATCH["attention_mask"].unsqueeze(-1)
        states = model(**BATCH, output_hidden_states=True).hidden_states[layer]
        return (states * mask).sum(1) / mask.sum(1)

    by_hand = F.mse_loss(texts(student, S), texts(teacher, T))
    found = compared(recipes.layer_reduction().objective(student, teacher), student, teacher).total
    torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=1e-9)


def test_minilm_by_hand(student, teacher):
    heads = teacher.config.num_attention_heads

    def maps_and_values(model, layer: int):
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        own = eager.bert.encoder.layer[layer - 1].attention.self
        kept = {}
        hook = own.value.register_forward_hook(lambda _, __, out: kept.update(values=out))
        A = eager(**BATCH, output_attentions=True).attentions[layer - 1]
        hook.remove()
        return A, kept["values"].unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, T, d)

    mask = BATCH["attention_mask"].bool()

    def of_values(V: Tensor) -> Tensor:
        scores = V @ V.mT / V.shape[-1] ** 0.5
        return scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(-1)

    def kl(P: Tensor, Q: Tensor) -> Tensor:
        each_query = torch.where(P > 0, P * (P.clamp_min(1e-300).log() - Q.clamp_min(1e-300).log()), 0.0).sum(-1)
        return each_query.transpose(1, 2)[mask].mean()

    (A, V), (A_teacher, V_teacher) = maps_and_values(student, S), maps_and_values(teacher, T)
    by_hand = kl(A_teacher, A) + kl(of_values(V_teacher), of_values(V))
    found = compared(recipes.minilm().objective(student, teacher), student, teacher).total
    torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=1e-9)


def test_tinybert_s_two_stages_and_what_each_asks_for(student, teacher):
    objective = recipes.tinybert().objective(student, teacher)
    layers = compared(objective, student, teacher, step=4)
    assert set(layers.weighted) == {"features", "attention", "embeddings"}
    assert not objective.needs("teacher").logits
    predicted = compared(objective, student, teacher, step=5)
    assert set(predicted.weighted) == {"outputs"} and not objective.needs("teacher").hidden_states
    P, Q = logits(teacher).log_softmax(-1), logits(student).log_softmax(-1)
    torch.testing.assert_close(predicted.total, (P.exp() * (P - Q)).sum(-1).mean(), rtol=1e-6, atol=1e-9)


def test_maxtext_gives_way_to_the_task(student, teacher):
    objective = recipes.maxtext().objective(student, teacher)
    ends = []
    for step in (0, 10):
        objective.set_step(step, of=10)
        ends.append((dict(objective.weights), objective.temperature))
    assert ends == [
        ({"features": 1.0, "outputs": 0.9, "task": 0.1}, 2.0),
        ({"features": 0.1, "outputs": 0.5, "task": 0.5}, 1.0),
    ]


# -- options, and keys beside it ---------------------------------------------------------------------------------------


def test_options_reach_the_loss():
    assert recipes.gkd(beta=0.1).settings["outputs"]["beta"] == 0.1
    assert recipes.rlkd(dynamic=True).settings["outputs"]["dynamic"] is True
    assert "divergence" not in recipes.rlkd(divergence=None).settings["outputs"]
    config = ExperimentConfig(recipe={"name": "gkd", "beta": 0.1})
    assert config.outputs.parameters == {"beta": 0.1}


def test_keys_beside_a_recipe_change_it_one_by_one(tmp_path):
    (tmp_path / "run.yaml").write_text("recipe: distilbert\nfeatures: {weight: 0.5}\noutputs: null\n")
    config = ExperimentConfig.from_yaml(tmp_path / "run.yaml")
    assert (config.features.loss, config.features.weight, config.outputs) == ("cosine", 0.5, None)
    assert config.task_weight == 2.0 and config.layer_map == "top" and config.arm == "distilbert"


def test_another_loss_is_another_term_and_null_leaves_one_out():
    config = ExperimentConfig(
        recipe="fdd", outputs={"loss": "forward_kl", "temperature": 3.0}, terms={"dynamics": None, "more": POOLED}
    )
    assert (config.outputs.loss, config.outputs.parameters, config.outputs.temperature) == ("forward_kl", {}, 3.0)
    assert config.terms == {"more": POOLED} and config.features.loss == "cosine"
    assert ExperimentConfig.from_dict(config.to_dict()) == config


def test_the_studies_of_recipes_can_be_run():
    configs = Path(__file__).parents[2] / "configs"
    everything = Study.from_yaml(configs / "recipes.yaml")
    assert set(everything.vary) == {"none", *NAMES} and len(everything.seeds) >= 5
    assert all(config.arm == arm for config, arm in zip(everything.runs(), everything.vary, strict=False))
    cells = Study.from_yaml(configs / "skew_and_dynamics.yaml").runs()[:4]
    assert [(c.outputs.loss, "dynamics" in c.terms) for c in cells] == [
        ("forward_kl", False),
        ("skew_forward_kl", False),
        ("forward_kl", True),
        ("skew_forward_kl", True),
    ]
    assert all(c.features.loss == "cosine" and c.outputs.weight == 1.0 for c in cells)


def test_a_study_may_vary_recipes():
    base = ExperimentConfig(name="base")
    changed = base.replace(recipe="jasper", **{"terms.texts.weight": 3.0, "training.steps": 5})
    assert changed.terms["texts"] == {**recipes.jasper().settings["terms"]["texts"], "weight": 3.0}
    assert changed.features is None and changed.training.steps == 5 and changed.arm == "jasper"
    assert len({base.replace(recipe=name).run_id for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": "distilbret"}, "Did you mean 'distilbert'?"),
        ({"recipe": {"beta": 0.1}}, "a mapping with its name"),
        ({"recipe": ["gkd"]}, "is not known"),
        ({"recipe": {"name": "gkd", "alpha": 1}}, "recipe.alpha: gkd has no such option; it takes beta."),
        ({"recipe": {"name": "gkd", "beta": 2}}, "0 < beta < 1"),
        ({"recipe": "gkd", "features.weight": 1.0}, "the recipe gkd has no features"),
        ({"recipes": "gkd"}, "Did you mean 'recipe'?"),
    ],
)
def test_what_no_recipe_has_is_refused(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        ExperimentConfig().replace(**given)


def test_depths_that_a_map_does_not_fit(teacher):
    with pytest.raises(ValueError, match="skip leaves the last of 1 student layers out"):
        recipes.pkd().objective(shrink(teacher, layers=1), teacher)


def test_of_an_encoder_decoder_and_of_another_width():
    torch.manual_seed(0)
    teacher = tiny("bart")
    narrow = shrink(teacher, layers=2, hidden_size=16, heads=2)
    objective = recipes.distilbert().objective(narrow, teacher)
    assert objective.map_of("features").pairs == [(2, 3), (4, 6)]
    assert set(objective.projection_parameters.values()) == {16 * 32}


def test_a_model_of_one_s_own_loads_as_any(teacher):
    """The recipe asks models for depth and width alone."""
    decoder = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, vocab_size=50)).eval()
    objective = recipes.fdd().objective(shrink(decoder, layers=2), decoder)
    assert objective.map_of("dynamics").pairs == [(1, 2), (2, 4)]
