"""Seconds and peak memory of a piece of work on the device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.gpu.check import Bench

MIB = 2**20
Work = Callable[[], object]


def seconds(ways: Mapping[str, Work], bench: Bench) -> dict[str, float]:
    """Median seconds of each way, between two CUDA events on a GPU. The ways take turns; the first two are not counted:
    kernels are chosen and compiled in them.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-2, bench.repeats):
        gc.collect()
        for name, work in ways.items():
            passed = _by_clock(work) if bench.on_cpu else _by_events(work)
            if turn >= 0:
                taken[name].append(passed)
    return {name: statistics.median(values) for name, values in taken.items()}


def _by_clock(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _by_events(work: Work) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000  # given in milliseconds


def peak_bytes(work: Work, device: torch.device, before: int | None = None) -> int:
    """What torch's allocator has handed out at the highest moment of a piece of work, above `before`: what it has
    handed out when the work begins, unless given.
    """
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if before is None else before
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
