"""What the kit's step costs beside a hand-written one that computes the same number: seconds, and peak memory."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu.check import Bench, Check, Finding, hold
from benchmarks.gpu.meter import MIB, peak_bytes, seconds
from benchmarks.models import FULL, QUICK, random_batch
from benchmarks.ways import WAYS

# work → rows, tokens, and whether the kit promises less memory than the hand-written way
WORK = {
    "all terms": (16, 128, False),
    "features + attention": (1, 2048, True),
    "hidden states, outputs, labels": (16, 128, False),
    "outputs": (16, 128, False),
    "output loss": (1, 2048, True),
}


def checks() -> list[Check]:
    """A check of each piece of work of `make bench`."""
    return [Check("costs", work, partial(beside_by_hand, work)) for work in WAYS]


def beside_by_hand(work: str, bench: Bench) -> Finding:
    """Forward and backward by hand and by the kit, over BERT with random weights in float32."""
    rows, tokens, less_memory = WORK.get(work, (16, 128, False))
    size = FULL if bench.full else QUICK
    if not bench.full:
        rows, tokens = min(rows, 4), max(16, tokens // 32)
    batch = {name: value.to(bench.device) for name, value in random_batch(size, rows, tokens).items()}
    ways = {name: make(size, bench.device) for name, make in WAYS[work].items()}
    losses = {name: ways[name].step(batch) for name in ("by hand", "fakit")}
    off = abs(losses["fakit"] / losses["by hand"] - 1)
    wrong = hold(same=(off <= 1e-3, f"the two ways do not compute one number: {losses}"))
    numbers: dict[str, float | str] = {f"loss, {name}": loss for name, loss in losses.items()}
    for name, taken in seconds({name: partial(way.step, batch) for name, way in ways.items()}, bench).items():
        numbers[f"seconds, {name}"] = taken
        ways[name].forget()
    if bench.on_cpu:
        return Finding(numbers | {"peak MiB": "not measured here: `make bench` does, in fresh processes"}, wrong)
    peaks = {}
    for name, way in ways.items():
        way.step(batch)  # gradients are there, as in any step but the first
        peaks[name] = peak_bytes(partial(way.step, batch), bench.device) / MIB
        way.forget()
    if less_memory and bench.full:
        said = f"the kit's peak is {peaks['fakit']:.0f} MiB, and had to be below {peaks['by hand']:.0f} MiB, by hand"
        wrong += hold(memory=(peaks["fakit"] < peaks["by hand"], said))
    return Finding(numbers | {f"peak MiB, {name}": peak for name, peak in peaks.items()}, wrong)
