"""What similarity costs: a streaming pass beside the forward passes that feed it,
and all layer pairs beside torch-cka's way.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import agree
from benchmarks.models import Size, models, random_batch
from fakit import capture
from fakit.similarity import StreamingCKA, cka_matrix


def streaming_against_forward(size: Size, rows: int, tokens: int, batches: int, repeats: int) -> tuple[float, float]:
    """Seconds of StreamingCKA over all hidden states of both models, and of the forward passes that give them.

    Batch by batch, so that a busy moment of the machine meets both; of `repeats` passes the one with the median ratio.
    """
    teacher, student = models(size)
    depths = student.config.num_hidden_layers, teacher.config.num_hidden_layers

    def states(batch: dict[str, Tensor]) -> list[list[Tensor]]:
        with torch.no_grad():
            traces = [
                capture(model, batch, hidden_states=range(depth + 1), logits=False)
                for model, depth in zip((student, teacher), depths, strict=True)
            ]
        return [list(trace.hidden_states.values()) for trace in traces]

    given = [random_batch(size, rows, tokens, seed) for seed in range(batches)]
    first, mask = states(given[0]), given[0]["attention_mask"].bool()
    streams = {"float64": StreamingCKA(dtype=torch.float64), "fakit": StreamingCKA()}
    agree({name: s.update(*first, mask).matrix().sum().item() for name, s in streams.items()}, rtol=1e-4)

    passes = []
    for _ in range(repeats):
        stream, ours, theirs = StreamingCKA(), 0.0, 0.0
        for batch in given:
            start = time.perf_counter()
            layers = states(batch)
            theirs += time.perf_counter() - start
            start = time.perf_counter()
            stream.update(*layers, batch["attention_mask"].bool())
            ours += time.perf_counter() - start
        start = time.perf_counter()
        stream.matrix()
        passes.append((ours + time.perf_counter() - start, theirs))
    return sorted(passes, key=lambda costs: costs[0] / costs[1])[len(passes) // 2]


def all_pairs_against_torch_cka(layers: tuple[int, int], n: int, width: int, repeats: int) -> tuple[float, float]:
    """Median seconds of `cka_matrix` and of torch-cka's loop over all pairs of (teacher, student) layers (n, width)."""
    random = torch.Generator().manual_seed(0)
    shared = torch.randn(n, width, generator=random)
    teachers, students = ([shared + torch.randn(n, width, generator=random) for _ in range(k)] for k in layers)
    ways: dict[str, Callable[[], Tensor]] = {
        "torch-cka's way": lambda: torch_cka(students, teachers),
        "fakit": lambda: cka_matrix(students, teachers),
    }
    agree({name: way().sum().item() for name, way in ways.items()})
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            taken[name].append(time.perf_counter() - start)
    return statistics.median(taken["fakit"]), statistics.median(taken["torch-cka's way"])


def torch_cka(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """What torch-cka 0.21 does for one batch: Gram matrices and HSIC₁ anew for every pair, trace(K @ L)
    as a full product.
    """

    def gram(x: Tensor) -> Tensor:
        return (x @ x.T).fill_diagonal_(0.0)

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        n, ones = len(k), k.new_ones(len(k), 1)
        spread = (k @ m).trace()
        spread += (ones.T @ k @ ones @ ones.T @ m @ ones).item() / ((n - 1) * (n - 2))
        spread -= (ones.T @ k @ m @ ones).item() * 2 / (n - 2)
        return spread / (n * (n - 3))

    sums = torch.zeros(len(students), len(teachers), 3)
    for i, x in enumerate(students):
        k = gram(x)
        sums[i, :, 0] = hsic(k, k)
        for j, y in enumerate(teachers):
            m = gram(y)
            sums[i, j, 1] = hsic(k, m)
            sums[i, j, 2] = hsic(m, m)
    return sums[:, :, 1] / (sums[:, :, 0].sqrt() * sums[:, :, 2].sqrt())
