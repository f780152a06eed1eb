"""bf16 or float32: one decision, right on processors and GPUs of both kinds, the same for every process,
and on record.
"""

import os
import platform
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import default_data_collator

from fakit import DistillationTrainer
from fakit.training import precision
from fakit.training.precision import autocast, bf16_cost, bf16_is_fast, settle, use_bf16
from tests.training.runs import arguments, data, logged, make, parts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def processor(monkeypatch):
    """Stand in for a processor: its instructions, and what a linear layer costs it in bf16 over float32."""

    def become(*instructions: str, cost: float) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True) | {"avx2": True})
        monkeypatch.setattr(precision, "bf16_cost", lambda: cost)
        bf16_is_fast.cache_clear()

    yield become
    bf16_is_fast.cache_clear()


@pytest.mark.parametrize(
    ("instructions", "cost", "fast"),
    [
        (["avx512_bf16"], 0.6, True),
        (["amx_bf16", "avx512_bf16"], 0.2, True),
        (["bf16"], 0.7, True),  # Arm
        (["avx512_bf16"], 7.5, False),  # there, and kept from being used
        (["avx512_f"], 0.9, False),  # luck of a measurement: nothing could make it faster
        ([], 15.0, False),
    ],
)
def test_a_processor_needs_the_instructions_and_their_speed(processor, instructions, cost, fast):
    processor(*instructions, cost=cost)
    assert use_bf16("auto", "cpu") is use_bf16(device="cpu") is fast
    with autocast("cpu"):
        product = torch.nn.Linear(2, 2)(torch.ones(1, 2))
    assert product.dtype == (torch.bfloat16 if fast else torch.float32)


def test_a_processor_that_cannot_is_not_even_measured(processor, monkeypatch):
    processor("avx512_f", cost=1.0)
    monkeypatch.setattr(precision, "bf16_cost", lambda: pytest.fail("measured without need"))
    assert not use_bf16("auto", "cpu")


@pytest.mark.parametrize(("own", "fast"), [(True, True), (False, False)])
def test_a_gpu_says_whether_bf16_is_its_own_or_emulated(monkeypatch, own, fast):
    asked = []

    def supported(including_emulation=True):
        return asked.append(including_emulation) or own

    gpu = SimpleNamespace(device=nullcontext, is_bf16_supported=supported)
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpu)
    bf16_is_fast.cache_clear()
    assert bf16_is_fast(torch.device("cuda", 1)) is fast and asked == [False]
    bf16_is_fast.cache_clear()


def test_here_the_decision_is_what_the_instructions_and_the_measurement_say():
    can = any(torch.cpu.get_capabilities().get(name) for name in precision._INSTRUCTIONS)
    assert use_bf16("auto", "cpu") == (can and bf16_cost() < 1)
    assert can or bf16_cost() > 1.5


def test_measuring_leaves_no_trace():
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        bf16_cost.__wrapped__()
    assert torch.equal(state, torch.random.get_rng_state()) and torch.get_num_threads() == threads


SAY = "from fakit.training.precision import *; print(use_bf16('auto', 'cpu'), bf16_cost())"


def test_a_limit_set_in_the_environment_counts():
    settings = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", SAY], env=os.environ | settings, capture_output=True, text=True, check=True
    )
    decided, cost = done.stdout.split()
    if platform.machine() in ("x86_64", "AMD64"):
        assert decided == "False" and float(cost) > 1.5
    else:
        assert decided == str(use_bf16("auto", "cpu"))  # the variables speak of x86


def test_an_explicit_true_is_obeyed_with_its_cost(processor):
    processor(cost=7.4)
    with pytest.warns(UserWarning, match=r"bf16 was requested, and this cpu takes 7.4 times as long .* 'auto' takes"):
        assert use_bf16(True, "cpu") is True
    with pytest.warns(UserWarning, match="7.4 times"), autocast("cpu", bf16=True):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    processor("avx512_bf16", cost=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_bf16(True, "cpu") is True and use_bf16(False, "cpu") is False


@pytest.mark.parametrize("asked", ["yes", "bf16", 1, None])
def test_nothing_else_is_guessed_at(asked):
    with pytest.raises(ValueError, match=r"bf16 is .*; choose 'auto', True or False"):
        use_bf16(asked, "cpu")


RANK = """
import sys, torch
from fakit.training import precision
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
for fast in ("00", "10", "11"):
    precision.bf16_is_fast = lambda device: fast[rank] == "1"
    print(precision.use_bf16("auto", "cpu"))
torch.distributed.destroy_process_group()
"""


def test_all_processes_take_what_is_fast_for_each(tmp_path):
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].split() for rank in ranks] == [["False", "False", "True"]] * 2


@pytest.mark.parametrize(("cost", "name"), [(0.5, "bf16"), (7.0, "float32")])
def test_a_trainer_settles_auto_and_says_what_it_took(processor, tmp_path, cost, name):
    processor("avx512_bf16", cost=cost)
    trainer = make(tmp_path, bf16="auto", max_steps=1)
    assert (trainer.precision, trainer.args.bf16) == (name, name == "bf16")
    seen = []
    trainer.student.base_model.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    trainer.train()
    assert set(seen) == {torch.bfloat16 if name == "bf16" else torch.float32}


def test_a_trainer_obeys_an_explicit_true_with_a_warning(processor, tmp_path):
    processor(cost=9.0)
    with pytest.warns(UserWarning, match="9 times as long"):
        assert make(tmp_path, bf16=True).precision == "bf16"


def test_the_launchers_precision_counts_only_where_the_run_has_none(monkeypatch, processor, tmp_path):
    processor(cost=9.0)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for asked, expected in (("auto", "no"), (False, "bf16")):
        args = arguments(tmp_path, bf16=asked)
        settle(args)
        assert (args.bf16, args.mixed_precision) == (False, expected)


def test_a_checkpoint_of_the_other_precision_is_refused(processor, tmp_path):
    processor("avx512_bf16", cost=0.5)
    make(tmp_path, bf16="auto", max_steps=2, save_strategy="steps", save_steps=1).train()
    processor("avx512_bf16", cost=7.0)
    message = r"belongs to another run(.|\n)*arguments.bf16: True in the checkpoint, False here"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, bf16="auto", max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_no_notebook_script_or_configuration_decides_by_itself():
    files = [path for folder in ("notebooks", "scripts", "configs") for path in sorted((ROOT / folder).iterdir())]
    read = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".ipynb", ".py", ".yaml")}
    assert len(read) > 15
    for path, text in read.items():
        assert not re.search(r"torch\.autocast|bf16=True|bf16: (true|yes|on)\b", text), path


@pytest.mark.parametrize("asked", [False, True])
def test_a_trainer_keeps_its_precision_beside_one_of_the_other(processor, tmp_path, asked):
    """Accelerate holds one precision a process, and the newest arguments empty it."""
    processor("avx512_bf16", cost=0.5)
    alone = make(tmp_path, bf16=asked, max_steps=2)
    alone.train()
    first = make(tmp_path, bf16=asked, max_steps=2, evaluated=data())
    later = make(tmp_path, bf16=not asked, max_steps=2)
    assert (first.precision, later.precision) == (("bf16", "float32") if asked else ("float32", "bf16"))
    before = later.evaluate(data())["eval_loss"]
    first.train()
    assert logged(first) == logged(alone)
    assert later.evaluate(data())["eval_loss"] == before
    later.train()
    assert later.precision != first.precision and logged(later) != logged(alone)


def test_a_trainer_within_the_making_of_another_leaves_that_its_precision(processor, tmp_path):
    """As in a run whose student is healed layer by layer, in bf16, before the run itself begins, in float32."""
    processor("avx512_bf16", cost=0.5)
    made, asked = parts(), arguments(tmp_path, bf16=False, max_steps=1)
    make(tmp_path, bf16=True, max_steps=1).train()
    trainer = DistillationTrainer(
        *made, args=asked, train_dataset=data(), data_collator=default_data_collator, callbacks=[]
    )
    seen = []
    trainer.student.base_model.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    trainer.train()
    assert trainer.precision == "float32" and set(seen) == {torch.float32}
