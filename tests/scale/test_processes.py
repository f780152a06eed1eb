"""Two processes are one with the same global batch, in DDP and in FSDP: losses, weights, checkpoints, exports."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fakit.__main__ import main
from fakit.experiments import RunStore
from tests.scale.conftest import experiment
from tests.scale.ranks import RUNS

LOGGED = {  # in how many of three steps, where not in all
    "without heads": {"outputs": 1, "task": 1},
    "only features": {"attention": 1, "attention/S2_T3": 1, "outputs": 1, "task": 1},
    "rising": {"features": 2, "features/S1_T2": 2},
}


def seen(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"rank{rank}/seen.json").read_text())


def tensors(folder: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    """A saved state without the keys' biases: softmax does not see them, their gradient is rounding,
    and Adam makes steps of it.
    """
    state = load_file(folder / f"rank{rank}/{name}.safetensors")
    return {key: value for key, value in state.items() if not key.endswith("key.bias")}


@pytest.mark.parametrize("name", [name for name in RUNS if name != "bf16"])
def test_losses_and_weights_are_those_of_one_process(one, two, name):
    for term, alone in seen(one)[name].items():
        assert len(alone) == LOGGED.get(name, {}).get(term, 3)
        torch.testing.assert_close(
            seen(two)[name][term], alone, rtol=2e-5, atol=1e-7, msg=lambda m, t=term: f"{t}: {m}"
        )
    for key, alone in tensors(one, name).items():
        torch.testing.assert_close(
            tensors(two, name)[key], alone, rtol=1e-5, atol=2e-7, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_bf16_stays_near_one_process_in_bf16(one, two):
    torch.testing.assert_close(seen(two)["bf16"]["loss"], seen(one)["bf16"]["loss"], rtol=5e-3, atol=0)
    assert seen(one)["bf16"]["loss"] != seen(one)["classifier"]["loss"]  # it is another precision
    torch.testing.assert_close(seen(one)["bf16"]["loss"], seen(one)["classifier"]["loss"], rtol=2e-2, atol=0)


def test_projections_are_trained_and_alike_in_both_processes(one, two):
    first = tensors(two, "classifier")
    projections = [key for key in first if "projections" in key]
    assert len(projections) == 2
    for key, mine in first.items():
        assert torch.equal(mine, tensors(two, "classifier", rank=1)[key]), key
    for key in projections:  # features were off after the first step of "only features", and on in all of "classifier"
        assert not torch.equal(first[key], tensors(two, "bf16")[key])
        assert (first[key] - tensors(two, "unbroken")[key]).abs().max() > 1e-4


def test_both_processes_log_the_global_means(two):
    assert seen(two, 0)["classifier"] == seen(two, 1)["classifier"]


def test_what_wraps_the_distiller(ddp, fsdp):
    wrapper, modules = seen(ddp)["wrapped"]
    assert (wrapper, modules[0]) == ("DistributedDataParallel", "Distiller")
    wrapper, modules = seen(fsdp)["wrapped"]
    assert wrapper == "FSDPDistiller" and modules.count("FSDPBertLayer") == 2  # each block by itself


def test_adam_and_resumed_training_end_where_unbroken_training_ends(one, two):
    for key, alone in tensors(one, "unbroken").items():
        torch.testing.assert_close(
            tensors(two, "unbroken")[key], alone, rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
    for rank in (0, 1):
        unbroken = load_file(two / f"rank{rank}/unbroken.safetensors")
        resumed = load_file(two / f"rank{rank}/resumed.safetensors")
        assert all(torch.equal(value, resumed[key]) for key, value in unbroken.items())


def test_evaluation_and_export_of_a_wrapped_distiller(one, two):
    assert seen(two)["eval_loss"] == pytest.approx(seen(one)["eval_loss"], rel=1e-5)
    exported = load_file(two / "exported/model.safetensors")
    trained = load_file(two / "rank0/unbroken.safetensors")
    assert {f"student.{key}" for key in exported} <= set(trained) and len(exported) > 20
    for key, value in exported.items():
        assert torch.equal(value, trained[f"student.{key}"]), key
    for rank in (0, 1):
        whole = load_file(two / f"rank{rank}/whole.safetensors")
        assert all(torch.equal(value, exported[key]) for key, value in whole.items())


def test_fakit_distill_gives_the_run_of_one_process(two, world, tmp_path):
    experiment(world, tmp_path / "whole.yaml")
    assert main(["distill", str(tmp_path / "whole.yaml"), "--out", str(tmp_path / "runs")]) == 0
    assert_same_run(tmp_path / "runs", two / "runs")
    for rank in (0, 1):
        assert len(json.loads((two / f"rank{rank}/loaded.json").read_text())) == 1  # one teacher a process


def assert_same_run(alone: Path, shared: Path) -> None:
    """One record, one line a step, the same losses and the same exported student."""
    (a,), (b,) = RunStore(alone).records(), RunStore(shared).records()
    assert (a["steps"], a["labeled"], a["unlabeled"], a["flops"]) == (
        b["steps"],
        b["labeled"],
        b["unlabeled"],
        pytest.approx(b["flops"], rel=0.2),
    )
    steps, ours = RunStore(alone).steps(a["run_id"]), RunStore(shared).steps(b["run_id"])
    assert ours["step"].tolist() == steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    for term in ("loss", "grad_norm", "features", "attention", "outputs", "task", "features/S1_T2"):
        torch.testing.assert_close(
            ours[term].tolist(), steps[term].tolist(), rtol=1e-5, atol=0, msg=lambda m, t=term: f"{t}: {m}"
        )
    assert a["test"] == pytest.approx(b["test"], rel=1e-4)
    students = [
        AutoModelForSequenceClassification.from_pretrained(folder / record["run_id"]).state_dict()
        for folder, record in ((alone, a), (shared, b))
    ]
    for key, value in students[0].items():
        if not key.endswith("key.bias"):
            torch.testing.assert_close(students[1][key], value, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
