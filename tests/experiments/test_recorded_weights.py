"""The weight study that notebook 06 reads: complete, paired, one weight at a time, and what its script would run."""

import importlib.util
from pathlib import Path

import pytest

from fakit.experiments import ExperimentConfig, RunStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    found = importlib.util.spec_from_file_location("record_weights", ROOT / "scripts" / "record_weights.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def planned(script):
    start = ExperimentConfig.from_yaml(ROOT / "configs" / "distill_glosses.yaml")
    return script.runs(start.replace(**{"training.steps": script.STEPS}))


def test_each_run_moves_one_weight_and_nothing_else(script, planned):
    by_arm = {run.arm: run for run in planned if run.seed == 0}
    assert len(by_arm) == 1 + len(script.TERMS) * len(script.FACTORS)
    start = by_arm["default"]
    for term in script.TERMS:
        for factor in script.FACTORS:
            moved = by_arm[f"{term} × {factor:g}"]
            assert getattr(moved, term).weight == factor * getattr(start, term).weight
            assert moved.replace(**{f"{term}.weight": getattr(start, term).weight, "name": "default"}) == start
    assert {(run.arm, run.seed) for run in planned} == {(arm, seed) for arm in by_arm for seed in script.SEEDS}


def test_the_record_is_what_the_script_runs(planned):
    store = RunStore(ROOT / "data" / "recorded" / "weights")
    assert {record["run_id"] for record in store.records()} == {run.run_id for run in planned}
    runs = store.runs()
    assert (runs["steps"] == runs["config.training.steps"]).all() and runs["score"].between(0, 1).all()
    assert sum(path.stat().st_size for path in store.path.iterdir()) < 1_000_000
