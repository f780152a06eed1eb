"""Seconds, of ways that take turns in one process, and peak memory, of a way in a fresh process."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.models import Batch

ROOT = Path(__file__).parents[1]
# Every tensor above 64 KiB is mapped by itself and given back when it is freed, so that resident memory is memory in
# use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass
class Way:
    """One way to do a piece of work: from a batch to a loss,
    and the parameters that its backward pass gives gradients to.
    """

    loss: Callable[[Batch], Tensor]
    parameters: list[nn.Parameter]

    def step(self, batch: Batch) -> float:
        """Forward and backward; the loss. Neither way takes an optimizer step."""
        loss = self.loss(batch)
        loss.backward()
        return loss.item()

    def forget(self) -> None:
        """Drop the gradients, as `zero_grad` does."""
        for parameter in self.parameters:
            parameter.grad = None


def agree(losses: Mapping[str, float], rtol: float = 1e-3) -> None:
    """Raise ValueError unless every way computes the same number: otherwise their costs could not be compared."""
    (first, expected), *others = losses.items()
    for name, found in others:
        if not abs(found - expected) <= rtol * abs(expected):
            raise ValueError(f"the ways do not compute the same: {first!r} gives {expected:.6g}, {name!r} {found:.6g}.")


def seconds(ways: Mapping[str, Way], batch: Batch, repeats: int, same: tuple[str, ...]) -> dict[str, float]:
    """Median seconds of a step. The ways take turns, so that a busy moment of the machine meets all of them.

    Args:
        same: the ways whose losses must be equal, which the first, unmeasured step checks.
    """
    first = {}
    for name, way in ways.items():
        first[name] = way.step(batch)
        way.forget()
    agree({name: first[name] for name in same})
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            gc.collect()
            start = time.perf_counter()
            way.step(batch)
            taken[name].append(time.perf_counter() - start)
            way.forget()
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_mebibytes(way: Way, batch: Batch, warm_up: Batch) -> tuple[float, float]:
    """Peak resident memory of one step above what models, gradients and batch take, in MiB, and the loss.
    In a fresh process.

    A step on the small batch comes first: libraries are loaded and gradients allocated before anything is measured.

    Raises:
        ValueError: not Linux, whose /proc tells the peak.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError(
            "peak memory is read from Linux's /proc/self, which this machine does not have; time alone: --rows."
        )
    way.step(warm_up)
    for parameter in way.parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = _resident("VmRSS")
    loss = way.step(batch)
    return (_resident("VmHWM") - before) / 1024, loss


def _resident(field: str) -> int:
    """KiB"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def fresh_memory(work: str, way: str, rows: int, tokens: int, quick: bool) -> dict[str, float]:
    """{"mebibytes", "loss"} of a way of `benchmarks.ways`, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ways", work, way, str(rows), str(tokens)]
    return run_json(command + (["--quick"] if quick else []))


def run_json(command: list[str], malloc: bool = True) -> dict:
    """Run a command in the kit's folder, with as many threads as here; what its last line says.

    Args:
        malloc: give freed memory back at once (`MALLOC`), for memory; seconds are measured without.

    Raises:
        ValueError: it failed; with the end of its error message.
    """
    threads = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | threads | (MALLOC if malloc else {}), capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"{' '.join(command[1:])} failed: {' | '.join(done.stderr.strip().splitlines()[-3:])}")
    return json.loads(done.stdout.strip().splitlines()[-1])
