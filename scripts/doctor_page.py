"""Write docs/doctor.md, the rules of the doctor of finished runs and what they say of the recorded ones; from the code.

python scripts/doctor_page.py
"""

from pathlib import Path

from fakit.experiments import diagnose
from fakit.experiments.doctor import RULES

ROOT = Path(__file__).parents[1]
PAGE, RECORDED = ROOT / "docs/doctor.md", ROOT / "data/recorded"

HEAD = (
    "# A doctor of finished runs\n",
    "This page is made from the code by `python scripts/doctor_page.py`; a test holds it to be up to date.",
    "`fakit report RUNS_DIR` ends with what the doctor found; in Python, `diagnose(RUNS_DIR)` of `fakit.experiments`.",
    "Every finding gives the numbers that were seen, what they mean and what to try.",
    "What a rule needs and a record lacks is said once, under *Not looked at*, and never guessed.",
    "What can be known before the first step is refused there: `preflight`, and the errors of `run_experiment`.\n",
    "An **error** is no result, a **warning** is likely a fault, a **note** limits what may be claimed.",
    "A control that was meant (a reversed map in a study of maps) is found like a fault: the record does not say what "
    "was meant.\n",
)
FACTS = (
    "## What is recorded for it\n",
    "Runs record, beside settings, scores and steps:\n",
    "* `texts`: the share of padding in the planned batches, how many texts of each split were cut, the sizes of "
    "validation and test, and the share of the largest class.",
    "* `softness`: of each outputs term, the exponential of the mean entropy of the teacher's outputs at the last τ, "
    "on the test texts (of a language model at the labels of the first rows).",
    "* `teacher`: of a classifier, the teacher's own scores. `layers`: the depths of both models.",
    "* `made_on`: processor, GPU and commit.\n",
    "Records from before are read as they are; rules that need more say so.\n",
)


def rules() -> list[str]:
    """The table of rules."""
    lines = ["| rule | | speaks when | why this bound | what it means | what to try |", "|---|---|---|---|---|---|"]
    for rule in RULES:
        cells = (rule.name, rule.status, rule.bound, rule.why, rule.means, rule.fix)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def recorded() -> list[str]:
    """What the rules say of the studies in data/recorded."""
    lines = [
        "## What it says of the recorded studies\n",
        "| data/recorded/ | rule | findings | the first |",
        "|---|---|---|---|",
    ]
    for folder in sorted(path.parent for path in RECORDED.glob("*/runs.jsonl")):
        found = diagnose(folder)
        for rule in RULES:
            if of_rule := found.of(rule.name):
                first = of_rule[0]
                arm = f", {first.arms[0]}" if len(first.arms) == 1 else ""
                lines.append(f"| {folder.name} | {rule.name} | {len(of_rule)} | {first.task}{arm}: {first.seen} |")
        if not found.findings:
            lines.append(f"| {folder.name} | – | 0 | |")
    return lines


def page() -> str:
    """The whole page."""
    return "\n".join([*HEAD, "## Rules\n", *rules(), "", *FACTS, *recorded()]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)} is written.")
