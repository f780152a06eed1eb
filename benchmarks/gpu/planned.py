"""What the planner says beside what torch's allocator measured at the peak of a training step."""

from __future__ import annotations

import gc
import sys
from functools import partial

import torch

from benchmarks.gpu.check import Bench, Check, Finding, NotRun, within
from benchmarks.gpu.meter import MIB, peak_bytes
from benchmarks.measure import run_json
from benchmarks.planner import CASES, Run, predict
from fakit.planner import Plan
from fakit.planner.planning import FIXED
from fakit.training.precision import bf16_is_fast

BARS = {"off": 0.1, "off, without weights and optimizer": 0.2}


def checks() -> list[Check]:
    """A check of each of the planner's own cases."""
    return [Check("planner", name, partial(measured, name)) for name in CASES]


def measured(name: str, bench: Bench) -> Finding:
    """Planned and measured bytes of a case, optimizer step included."""
    if bench.on_cpu:
        return _on_cpu(name)
    if CASES[name].options.get("dtype") == "bf16" and not bf16_is_fast(bench.device):
        raise NotRun(f"{torch.cuda.get_device_name(bench.device)} has no bf16 arithmetic")
    plan = predict(name, "gpu")
    free, total = torch.cuda.mem_get_info(bench.device)
    if plan.peak > free:
        raise NotRun(f"planned are {plan.peak / MIB:.0f} MiB, and {free / MIB:.0f} of {total / MIB:.0f} MiB are free")
    gc.collect()
    before = torch.cuda.memory_allocated(bench.device)
    run = Run(CASES[name], str(bench.device))
    run.step()  # what is made once is there
    found = peak_bytes(run.step, bench.device, before)
    numbers = _compared(plan, plan.peak - plan.memory["overhead"], found)
    # the assumed overhead beside what the allocator reserved, and what the whole card gave to all processes
    free, total = torch.cuda.mem_get_info(bench.device)
    numbers |= {"planned MiB, with overhead": plan.peak / MIB, "MiB in use on the card": (total - free) / MIB}
    numbers["reserved MiB at the peak"] = torch.cuda.max_memory_reserved(bench.device) / MIB
    return Finding(numbers, within({key: abs(numbers[key]) for key in BARS}, BARS))


def _on_cpu(name: str) -> Finding:
    if name != "small":
        raise NotRun("on a CPU, `python -m benchmarks.planner` measures all cases, each in a fresh process")
    plan = predict(name)
    found = run_json([sys.executable, "-m", "benchmarks.planner", "--case", name])
    numbers = _compared(plan, plan.peak, found["bytes"])
    return Finding(numbers, within({key: abs(numbers[key]) for key in BARS}, BARS))


def _compared(plan: Plan, planned: float, found: float) -> dict[str, float]:
    fixed = sum(plan.memory.get(part, 0) for part in FIXED)
    return {
        "planned MiB": planned / MIB,
        "measured MiB": found / MIB,
        "off": planned / found - 1,
        "off, without weights and optimizer": (planned - fixed) / (found - fixed) - 1,
    }
