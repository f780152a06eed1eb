"""The rows: what is measured against what, and the ratio to reach. A ratio below 1 says that fakit costs less."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache

from benchmarks.measure import agree, fresh_memory, seconds
from benchmarks.models import FULL, QUICK, random_batch
from benchmarks.peers.environments import PEERS, measure_peer
from benchmarks.similarity import all_pairs_against_torch_cka, streaming_against_forward
from benchmarks.training import cache_against_live, trainer_against_loop
from benchmarks.ways import WAYS

BY_HAND = "hand-written loop with eager maps"


@dataclass(frozen=True)
class Result:
    """One row of the table: what both sides cost, in `unit`, their ratio, and whether it is at most `bar`."""

    name: str
    work: str
    against: str
    ours: float
    theirs: float
    unit: str
    bar: float

    @property
    def ratio(self) -> float:
        """ours / theirs"""
        return self.ours / self.theirs

    @property
    def reached(self) -> bool:
        """True when the ratio is at most the bar."""
        return self.ratio <= self.bar

    def as_dict(self) -> dict:
        """For JSON, ratio and verdict included."""
        return asdict(self) | {"ratio": self.ratio, "reached": self.reached}


def divided(costs: tuple[float, float]) -> float:
    """ours / theirs"""
    return costs[0] / costs[1]


class Table:
    """The rows at full size, or at a small one that shows nothing but that everything runs.

    Args:
        quick: small models and batches.
        repeats: turns of each way in the rows of seconds.
    """

    def __init__(self, quick: bool, repeats: int):
        self.quick, self.repeats = quick, repeats
        self.size = QUICK if quick else FULL
        self._seconds, self._memory = cache(self._measure_seconds), cache(self._measure_memory)

    def shape(self, rows: int, tokens: int) -> tuple[int, int]:
        """(B, T) of this run."""
        return (min(rows, 4), max(16, tokens // 32)) if self.quick else (rows, tokens)

    def run(self, names: Iterable[str] | None = None) -> Iterable[Result]:
        """The rows of these names, one after the other; all of them unless given.

        Raises:
            ValueError: a name that is no row; ways that do not compute the same.
        """
        names = list(ROWS) if names is None else list(names)
        unknown = [name for name in names if name not in ROWS]
        if unknown:
            raise ValueError(f"no row is called {', '.join(unknown)}; the rows are {', '.join(ROWS)}.")
        for name in names:
            work, against, unit, bar, measure = ROWS[name]
            ours, theirs = measure(self)
            yield Result(name, work, against, ours, theirs, unit, bar)

    # -- measuring, once for all rows that ask ---------------------------------------------------------------------

    def _measure_seconds(self, work: str, rows: int, tokens: int) -> dict[str, float]:
        ways = {name: make(self.size) for name, make in WAYS[work].items()}
        return seconds(
            ways, random_batch(self.size, *self.shape(rows, tokens)), self.repeats, same=("by hand", "fakit")
        )

    def _measure_memory(self, work: str, way: str, rows: int, tokens: int) -> dict[str, float]:
        return fresh_memory(work, way, *self.shape(rows, tokens), self.quick)

    def ratio_of_seconds(self, work: str, rows: int, tokens: int, against: str = "by hand") -> tuple[float, float]:
        """Seconds of a step: fakit's, the other's."""
        taken = self._seconds(work, rows, tokens)
        return taken["fakit"], taken[against]

    def ratio_of_memory(self, work: str, rows: int, tokens: int) -> tuple[float, float]:
        """Peak MiB of a step: fakit's, the hand-written loop's."""
        ours, theirs = (self._memory(work, way, rows, tokens) for way in ("fakit", "by hand"))
        agree({"by hand": theirs["loss"], "fakit": ours["loss"]})
        return ours["mebibytes"], theirs["mebibytes"]

    def beside_peers(self, names: Iterable[str]) -> Iterable[dict]:
        """Each peer's ratios to the hand-written loop, with fakit's to the same loop for the same work beside them."""
        for name in names:
            work = PEERS[name].work
            ours = {
                "fakit_seconds_ratio": divided(self.ratio_of_seconds(work, 16, 128)),
                "fakit_memory_ratio": divided(self.ratio_of_memory(work, 16, 128)),
            }
            yield (
                {"name": name, "package": PEERS[name].package, "work": work}
                | ours
                | measure_peer(name, self.shape(16, 128), self.quick, min(self.repeats, 3))
            )

    def ratio_of_lengths(self) -> tuple[float, float]:
        """Peak MiB of fakit's step: one row of 4,096 tokens, eight of 512."""
        long, short = (
            self._memory("features + attention", "fakit", rows, tokens) for rows, tokens in ((1, 4096), (8, 512))
        )
        return long["mebibytes"], short["mebibytes"]

    def ratio_of_epochs(self, head: str) -> tuple[float, float]:
        """Seconds of an epoch: from the cache, with the live teacher."""
        steps = 3 if self.quick else 8
        taken = cache_against_live(self.size.with_teacher(12), *self.shape(16, 128), steps, self.repeats, head)
        return taken["fakit"], taken["live teacher"]

    def ratio_of_loops(self) -> tuple[float, float]:
        """Seconds of a step: DistillationTrainer's, the bare loop's."""
        steps = 3 if self.quick else 6
        taken = trainer_against_loop(self.size, *self.shape(16, 128), steps, min(self.repeats, 3))
        return taken["fakit"], taken["by hand"]

    def ratio_of_stream(self) -> tuple[float, float]:
        """Seconds: streaming CKA over 100,000 tokens, the forward passes that give them."""
        batches = 2 if self.quick else 25
        return streaming_against_forward(self.size, *self.shape(32, 128), batches, min(self.repeats, 3))

    def ratio_of_pairs(self) -> tuple[float, float]:
        """Seconds of all layer pairs: fakit's, torch-cka's way."""
        n, width = (64, 32) if self.quick else (2048, 768)
        return all_pairs_against_torch_cka((13, 7), n, width, min(self.repeats, 3))


# name: (work, against, unit, bar, how)
ROWS: dict[str, tuple[str, str, str, float, Callable[[Table], tuple[float, float]]]] = {
    "seconds": (
        "all terms, B16 × T128: seconds",
        BY_HAND,
        "s",
        0.85,
        lambda table: table.ratio_of_seconds("all terms", 16, 128),
    ),
    "memory": (
        "all terms, B16 × T128: peak memory above the models",
        BY_HAND,
        "MiB",
        0.60,
        lambda table: table.ratio_of_memory("all terms", 16, 128),
    ),
    "floor": (
        "all terms, B16 × T128: seconds",
        "floor: teacher forward, student on labels, fused attention",
        "s",
        1.15,
        lambda table: table.ratio_of_seconds("all terms", 16, 128, "floor"),
    ),
    "long-seconds": (
        "features + attention, B1 × T2048: seconds",
        BY_HAND,
        "s",
        0.40,
        lambda table: table.ratio_of_seconds("features + attention", 1, 2048),
    ),
    "long-memory": (
        "features + attention, B1 × T2048: peak memory above the models",
        BY_HAND,
        "MiB",
        0.10,
        lambda table: table.ratio_of_memory("features + attention", 1, 2048),
    ),
    "length": (
        "features + attention, B1 × T4096: peak memory above the models",
        "the same at B8 × T512",
        "MiB",
        1.30,
        Table.ratio_of_lengths,
    ),
    "vocabulary": (
        "output loss, V = 151,936, 2,048 tokens: peak memory",
        "plain KL of whole logits",
        "MiB",
        0.15,
        lambda table: table.ratio_of_memory("output loss", 1, 2048),
    ),
    "cache": (
        "an epoch from TeacherCache, 12-layer teacher, all terms, 2 classes: seconds",
        "live teacher",
        "s",
        0.50,
        lambda table: table.ratio_of_epochs("classes"),
    ),
    "cache-vocabulary": (
        "the same with heads of 30,522, features, attention and masked tokens: seconds",
        "live teacher",
        "s",
        0.50,
        lambda table: table.ratio_of_epochs("vocabulary"),
    ),
    "trainer": (
        "DistillationTrainer, all terms, B16 × T128: seconds a step",
        "bare loop, same objective",
        "s",
        1.05,
        Table.ratio_of_loops,
    ),
    "streaming-cka": (
        "streaming CKA, 100,000 tokens, 7 × 4 layers of 384: seconds",
        "forward passes of both models",
        "s",
        0.15,
        Table.ratio_of_stream,
    ),
    "all-pairs-cka": (
        "CKA of all pairs of 13 × 7 layers, d = 768, n = 2,048: seconds",
        "torch-cka's way",
        "s",
        0.05,
        Table.ratio_of_pairs,
    ),
}
