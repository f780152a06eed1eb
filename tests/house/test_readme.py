"""What the README says works as it says: commands, code blocks, pictures, and the study's table."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fakit.experiments import RunStore, Study, study_table
from fakit.experiments.table import to_markdown
from tests.house.readme import README, blocks, lay_out

ROOT = Path(__file__).parents[2]


def between(mark: str) -> str:
    return re.search(rf"<!-- {mark}[^>]*-->\n(.*?)<!-- /{mark} -->", README, re.S).group(1).strip()


def test_the_code_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    first, second, third = blocks()
    state: dict = {}
    exec(compile(first, "README.md", "exec"), state)
    assert state["trainer"].state.global_step > 0
    assert AutoModelForSequenceClassification.from_pretrained("my-student").config.num_hidden_layers == 2
    before = [p.detach().clone() for p in state["student"].parameters()]
    exec(compile(second, "README.md", "exec"), state)
    assert state["objective"].weights["features"] == 0.3
    assert set(state["breakdown"].terms) == {"features", "attention", "outputs", "task"}
    assert any(not torch.equal(a, b) for a, b in zip(before, state["student"].parameters(), strict=True))
    loop = second[second.index("for batch in") :].strip().splitlines()
    assert len(loop) <= 10
    exec(compile(third, "README.md", "exec"), state)
    assert state["trainer"].teacher is None and len(state["cache"]) == len(state["rows"]) > 0
    state["trainer"].train()
    assert {"features", "attention", "outputs", "task"} <= set(state["trainer"].distiller.breakdown.terms)


def test_the_table_is_the_recorded_study():
    expected = to_markdown(study_table(RunStore.open(ROOT / "data/recorded/study")))
    assert between("study").splitlines() == expected.strip().splitlines()


@pytest.mark.parametrize("study, store", [("study.yaml", "study"), ("study_glosses_1400.yaml", "glosses_1400_labels")])
def test_the_record_is_complete(study, store):
    config = Study.from_yaml(ROOT / "configs" / study)
    recorded = RunStore.open(ROOT / "data/recorded" / store)
    missing = [run.run_id for run in config.runs() if not recorded.has(run.run_id)]
    missing += [run.run_id for run in config.equal_compute_runs(recorded) if not recorded.has(run.run_id)]
    assert missing == []


def test_findings_quote_the_table():
    """Each gain in the findings stands, with its interval, in the record."""
    quoted = re.findall(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]", between("findings"))
    assert len(quoted) >= 3
    tables = [
        to_markdown(study_table(RunStore.open(path)))
        for path in sorted((ROOT / "data/recorded").iterdir())
        if path.name != "gpu"
    ]
    for mean, low, high in quoted:
        cell = f"{mean} [{low}, {high}]"
        assert any(cell in table for table in tables), f"{cell} is in no recorded table"


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target} is not in the Makefile"
    for command in set(re.findall(r"`(fakit [^`]+)`", README)):
        name, *arguments = shlex.split(command)[1:]
        for argument in arguments:
            if "/" in argument and not argument.startswith("runs"):
                assert (ROOT / argument).exists(), f"{command}: {argument} does not exist"
        helped = subprocess.run(
            [sys.executable, "-m", "fakit", name, "--help"], capture_output=True, text=True, cwd=ROOT
        )
        assert helped.returncode == 0, helped.stderr
        for flag in re.findall(r"--[a-z]+", command):
            assert flag in helped.stdout, f"{command}: {flag} is unknown"


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).is_file(), f"README points to {target}, which is not there"


def test_the_code_of_extending_runs():
    state: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), re.S):
        exec(compile(block, "extending.md", "exec"), state)
    student, teacher = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    teacher[0, 1] = 9.0
    assert state["l1"](student, teacher, torch.tensor([[True, False]])).item() == 1.0
    assert state["objective"].pairs("features") == {(1, 2): 0.5, (2, 4): 0.5}
    assert state["mine"].weights[2, 4].item() == 3.0
    assert [run.arm for run in state["runs"]] == ["as it is", "low"] * 5
