"""What the two head-to-head studies say, as the tables of README.md and docs/compression.md.

python -m scripts.head_to_head_tables
"""

from __future__ import annotations

from pathlib import Path

from fakit.experiments import RunStore
from fakit.experiments.cells import gains_in_cells
from fakit.experiments.statistics import Interval, crossed, main_effects, mean_interval

RECORDED = Path(__file__).resolve().parents[1] / "data/recorded"
STUDIES = {"head_to_head_glosses": ("accuracy", 1), "head_to_head_scans": ("CER", -1)}
TERMS = ("soft labels", "soft labels and alignment")


def recorded() -> list[str]:
    """The studies that are there."""
    return [name for name in STUDIES if (RECORDED / name / "runs.jsonl").is_file()]


def effects(name: str) -> list[str]:
    """One line a main effect, in points; positive is better."""
    store = RunStore(RECORDED / name)
    runs = store.runs()
    runs = runs[runs["kind"] == "run"]
    cells = crossed(store.manifest["arms"])
    lines = []
    for row in main_effects(runs, "score", cells).to_dict("records"):
        if "×" in row["factor"]:
            continue
        gain = Interval(row["gain"], row["gain_low"], row["gain_high"], row["n"]).format(100, 2, sign=True)
        sure = "**" if row["p_holm"] < 0.05 else ""
        task = runs["task"].iloc[0]
        lines.append(f"| {task} | {row['level']} against {row['against']} | {sure}{gain}{sure} | {row['p_holm']:.3f} |")
    return lines


def scores(name: str) -> list[str]:
    """One line a way and ranking: the mean score in % with soft labels alone, with alignment, and what that adds."""
    store = RunStore(RECORDED / name)
    runs = store.runs()
    runs, lines = runs[runs["kind"] == "run"], []
    gains = gains_in_cells(runs, "score", TERMS[0], store.manifest["arms"]).set_index("cell")
    for way in dict.fromkeys(arm.split(", ")[0] for arm in store.manifest["arms"]):
        for ranking in ("without ranking", "with ranking"):
            told = [
                mean_interval(runs[runs["arm"] == f"{way}, {terms}, {ranking}"]["score"]).format(100, 1)
                for terms in TERMS
            ]
            row = gains.loc[[(way, ranking)]].iloc[0]
            gain = Interval(row["gain"], row["gain_low"], row["gain_high"], row["n"]).format(100, 1, sign=True)
            sure = "" if row["verdict"] == "not sure" else "**"
            lines.append(f"| {way}, {ranking} | {' | '.join(told)} | {sure}{gain}{sure} |")
    return lines


def readme() -> str:
    """The table of README.md."""
    head = ["| task | what against what | gain, points (better is positive) | p (Holm) |", "|---|---|---|---|"]
    return "\n".join(head + [line for name in recorded() for line in effects(name)])


def page(name: str) -> str:
    """The table of a study in docs/compression.md."""
    metric = STUDIES[name][0]
    head = [f"| test {metric} % | {TERMS[0]} | {TERMS[1]} | gain by alignment, points |", "|---|---|---|---|"]
    return "\n".join(head + scores(name))


if __name__ == "__main__":
    print(readme())
    for study in recorded():
        print(f"\n{page(study)}")
