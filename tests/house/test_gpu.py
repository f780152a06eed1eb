"""`make gpu`, on the CPU: every check runs and ends as one of three, what is broken fails, and what is lacking is said."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    check,
    costs,
    fused,
    kernels,
    losses,
    planned,
    report,
    steps,
    teachers,
)
from benchmarks.gpu.check import Bench, Check, Finding, NotRun, run_all, run_one
from fakit import recipes
from fakit.losses import attention, features, outputs, relational
from fakit.losses.fused import liger
from fakit.objective.feature_terms import KINDS

pytestmark = pytest.mark.timeout(2700)  # a minute and a half of CPU time, many times that on a busy machine
CPU = Bench(torch.device("cpu"), full=False, repeats=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(exit status, record, page) of the command as `make gpu ARGS="--device cpu"` runs it."""
    folder = tmp_path_factory.mktemp("gpu")
    status = command.main(["--device", "cpu", "--minutes", "40", "--out", str(folder)])
    (place,) = folder.iterdir()
    return status, json.loads((place / "record.json").read_text()), (place / "README.md").read_text()


def test_every_check_ends_and_none_fails_on_a_cpu(whole):
    status, record, _ = whole
    assert [c for c in record["checks"] if c["status"] == "failed"] == [] and status == 0
    names = [(c["group"], c["name"]) for c in record["checks"]]
    assert names == [(c.group, c.name) for c in command.all_checks()] and len(set(names)) == len(names)
    assert {c["status"] for c in record["checks"]} == {"passed", "not run"}
    assert sum(record["counts"].values()) == len(names)
    for found in record["checks"]:
        assert bool(found["reason"]) == (found["status"] == "not run")
        assert bool(found["numbers"]) == (found["status"] == "passed")
        assert None not in found["numbers"].values()  # what was nan or inf


def test_what_a_cpu_cannot_run_is_not_run_and_nothing_else(whole):
    lacking = {f"{c['group']}: {c['name']}" for c in whole[1]["checks"] if c["status"] == "not run"}
    flash = {f"attention: flash_attention_2 beside eager, half precision, {family}" for family in ("BERT", "Llama")}
    on_a_card = flash | {"distillation: SmolLM2"} | {f"planner: {name}" for name in planned.CASES if name != "small"}
    package = set() if liger.find_spec("liger_kernel") else {f"Liger: {name}" for name in liger.BETAS}
    assert lacking == on_a_card | package


def test_the_record_says_on_what_it_was_made(whole):
    _, record, page = whole
    assert record["card"].startswith("CPU") and record["versions"]["torch"] == torch.__version__ and not record["full"]
    assert record["commit"] is None or len(record["commit"]) == 40
    assert record["date"].startswith("20") and record["seconds"] > 0 and record["driver"] is None
    assert page.startswith(f"# {record['card']}\n") and report.summary(record) in page and "Small sizes" in page
    for found in record["checks"]:
        assert found["status"] != "not run" or f"* **{found['group']}: {found['name']}.**" in page
        assert found["status"] != "passed" or f"| {found['name']} | passed |" in page


# -- nothing of the kit's tables is missing ---------------------------------------------------------------------------


def test_losses_terms_and_recipes_are_those_of_the_kits_tables():
    functions = {loss for table in (features, relational, attention, outputs) for loss in table.LOSSES.values()}
    assert {loss for _, loss in losses.named_losses().values()} == functions
    assert {c.name for c in fused.checks() if c.group == "chunked outputs"} == set(outputs.PER_POSITION)
    made = {c.name for c in steps.checks()}
    assert {f"term {kind}" for kind in KINDS} | {f"recipe {name}" for name in recipes.RECIPES} <= made


def test_a_loss_that_is_added_is_checked_and_one_of_an_unknown_kind_fails(monkeypatch):
    monkeypatch.setitem(features.LOSSES, "mine", lambda student, teacher, mask: (student - teacher).square().mean())
    assert "features.mine" in {c.name for c in losses.checks()}
    monkeypatch.setattr("fakit.losses.reduce.LOSSES", {"strange": lambda *_: None}, raising=False)
    (strange,) = [c for c in losses.checks() if c.name == "reduce.strange"]
    found = run_one(strange, CPU)
    assert found.status == "failed" and "does not know what they take" in found.reason


# -- what is broken fails ---------------------------------------------------------------------------------------------


def off_in_float32(loss, by: float):
    """The loss, as a device might compute it whose float32 is wrong."""

    def broken(student, *rest, **given):
        value = loss(student, *rest, **given)
        return value * (1 + by) if student.dtype == torch.float32 else value

    return broken


def test_a_broken_loss_fails_the_command_and_both_numbers_are_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(features.LOSSES, "cosine", off_in_float32(features.cosine, 1e-4))
    status = command.main(["--device", "cpu", "--only", "losses", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    (place,) = tmp_path.iterdir()
    record = json.loads((place / "record.json").read_text())
    (failed,) = [c for c in record["checks"] if c["status"] == "failed"]
    assert status == 1 and failed["name"] == "features.cosine" and record["counts"]["failed"] == 1
    assert "value, float32 is 0.0001, which had to be at most 1e-05" in failed["reason"]
    assert failed["numbers"]["value, float32"] == pytest.approx(1e-4, rel=1e-2)
    assert "failed" in said and failed["reason"] in said
    page = (place / "README.md").read_text()
    assert "## Failed" in page and failed["reason"] in page and "| features.cosine | failed |" in page


def test_a_broken_gradient_fails(monkeypatch):
    def broken(student, teacher, mask):
        return features.mse(student, teacher, mask) + (1e-3 * (student - student.detach())).sum()

    found = losses.equal(
        "features", lambda s, *rest: (broken if s.dtype == torch.float32 else features.mse)(s, *rest), CPU
    )
    assert [said.partition(" is ")[0] for said in found.wrong] == ["gradient, float32"]


def test_nan_fails():
    assert check.within({"value": float("nan")}, {"value": 1.0}) == ("value is nan, which had to be at most 1",)
    assert check.within({"value": 1.0}, {"value": 1.0}) == ()


@pytest.mark.parametrize("part", ["chunked", "streamed", "step", "maps", "liger", "costs", "teacher"])
def test_what_is_broken_elsewhere_fails(monkeypatch, part):
    def times(by):
        return lambda function: lambda *args, **given: by * function(*args, **given)

    if part == "chunked":
        right = fused.fused_outputs
        monkeypatch.setattr(fused, "fused_outputs", lambda *a, **k: tuple(x and 1.001 * x for x in right(*a, **k)))
        found = fused.chunked_equal("jsd", CPU)
    elif part == "streamed":
        monkeypatch.setattr(fused, "streamed_loss", times(1.001)(fused.streamed_loss))
        found = fused.streamed_equal("kl", True, CPU)
    elif part == "step":
        right = steps.loss_of
        monkeypatch.setattr(
            steps, "loss_of", lambda made: right(made) * (1.001 if made[1].dtype == torch.float32 else 1)
        )
        found = steps.equal(steps.encoder, CPU)
    elif part == "maps":
        right = kernels.capture

        def skewed(model, *args, **given):
            trace = right(model, *args, **given)
            if model.dtype == torch.float32:
                trace.attention[1].scaling *= 1.01
            return trace

        monkeypatch.setattr(kernels, "capture", skewed)
        found = kernels.in_full("sdpa", steps.encoder, CPU)
    elif part == "liger":
        with_liger(monkeypatch, by=1.001)
        found = kernels.beside_liger("forward_kl", CPU)
    elif part == "costs":
        made = costs.WAYS["outputs"]["fakit"]

        def doubled(*args):
            way = made(*args)
            way.loss = times(2)(way.loss)
            return way

        monkeypatch.setitem(costs.WAYS["outputs"], "fakit", doubled)
        found = costs.beside_by_hand("outputs", CPU)
    else:
        monkeypatch.setitem(teachers.BARS["8bit"], "relative error, last layer", 1e-3)
        found = teachers.of_a_decoder("8bit", CPU)
    assert found.wrong


def with_liger(monkeypatch, by: float = 1.0) -> None:
    """A stand-in for the package: its loss by its definition, over whole logits."""

    class Loss:
        def __init__(self, weight_hard_loss, weight_soft_loss, beta, temperature, compiled):
            self.beta, self.factor, self.temperature = beta, weight_soft_loss, temperature

        def __call__(self, student, our_head, teacher, their_head, targets, our_bias, their_bias):
            kept = targets != -100
            q, p = (
                (h[kept] @ w.T / self.temperature).log_softmax(-1)
                for h, w in ((student, our_head), (teacher, their_head))
            )

            def kl(a, b):
                return F.kl_div(b, a, reduction="batchmean", log_target=True)

            if self.beta in (0.0, 1.0):
                return by * self.factor * (kl(p, q) if self.beta == 0.0 else kl(q, p))
            middle = ((p.exp() + q.exp()) / 2).log()
            return by * self.factor * (kl(p, middle) + kl(q, middle)) / 2

    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", SimpleNamespace(LigerFusedLinearJSDLoss=Loss))
    monkeypatch.setattr(kernels, "find_spec", lambda name: name)


@pytest.mark.parametrize("name", liger.BETAS)
def test_liger_where_it_is_installed(monkeypatch, name):
    with_liger(monkeypatch)
    found = kernels.beside_liger(name, CPU)
    assert found.wrong == () and found.numbers["our value"] > 0.1 and found.numbers["seconds, Liger's"] > 0


# -- how checks run ---------------------------------------------------------------------------------------------------


def checks_of(**functions) -> list[Check]:
    return [Check("group", name, run) for name, run in functions.items()]


def raising(error):
    def run(bench):
        raise error

    return run


def test_one_that_breaks_lacks_something_or_runs_out_of_memory_does_not_stop_the_next():
    made = checks_of(
        broken=raising(RuntimeError("kernel\nand more")),
        lacking=raising(NotRun("no such package")),
        large=raising(torch.OutOfMemoryError("Tried to allocate 20 GiB")),
        wrong=lambda bench: Finding({"x": 1.0}, ("x is 1, which had to be 0",)),
        right=lambda bench: Finding({"x": 0.0}),
    )
    found = {outcome.name: (outcome.status, outcome.reason) for outcome in run_all(made, CPU, minutes=1)}
    assert found == {
        "broken": ("failed", "RuntimeError: kernel"),
        "lacking": ("not run", "no such package"),
        "large": ("not run", "out of memory: Tried to allocate 20 GiB"),
        "wrong": ("failed", "x is 1, which had to be 0"),
        "right": ("passed", ""),
    }


def test_after_an_error_that_the_device_does_not_survive_nothing_is_run(monkeypatch):
    monkeypatch.setattr(check, "_answers", lambda device: False)
    made = checks_of(
        first=lambda b: Finding(), broken=raising(RuntimeError("illegal access")), last=lambda b: Finding()
    )
    found = list(run_all(made, CPU, minutes=1))
    assert [outcome.status for outcome in found] == ["passed", "failed", "not run"]
    assert "computes no more since the check 'broken'" in found[-1].reason


def test_when_the_minutes_are_over_no_check_is_begun():
    (found,) = run_all(checks_of(late=lambda b: Finding()), CPU, minutes=0)
    assert found.status == "not run" and "minutes" in found.reason


def test_checks_are_chosen_by_group_and_by_name():
    checks = command.all_checks()
    assert {c.group for c in command.chosen(checks, "losses,costs", None)} == {"losses", "costs"}
    assert [c.name for c in command.chosen(checks, "features.mse", None)] == ["features.mse"]
    assert "planner" not in {c.group for c in command.chosen(checks, None, "planner")}
    with pytest.raises(ValueError, match=r"--only loses is neither a group \(losses, chunked outputs, .* nor the name"):
        command.chosen(checks, "loses", None)
