"""What a comparison found, in a form that draws itself in a notebook and prints itself in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def _number(value: float, digits: int = 3) -> str:
    return "NaN" if math.isnan(value) else f"{value:.{digits}f}"


@dataclass(frozen=True)
class Similarity:
    """One similarity and what is needed to believe it.

    Attributes:
        value: the similarity.
        estimator: ``"debiased"`` or ``"biased"``, or the measure's own name where it has one form only.
        n: rows compared (a draw).
        clusters: sequences the rows come from; None where rows are independent examples.
        null: what chance reaches: the upper end of the null band (``level`` quantile under permuted sequences); None if
            not asked.
        interval: bootstrap interval over sequences at ``level``; None if not asked.
        level: of both.
        measure: what was measured.
        warnings: sentences to read before quoting the value.
    """

    value: float
    estimator: str
    n: int
    clusters: int | None = None
    null: float | None = None
    interval: tuple[float, float] | None = None
    level: float = 0.95
    measure: str = "CKA"
    warnings: tuple[str, ...] = ()

    def __float__(self) -> float:
        return float(self.value)

    @property
    def above_null(self) -> bool | None:
        """Whether the value lies above what chance reaches; None without a null."""
        return None if self.null is None else bool(self.value > self.null)

    def format(self, digits: int = 2) -> str:
        """ "0.83 [0.80, 0.86]", the interval where there is one; in parentheses where chance reaches as much."""
        text = _number(self.value, digits)
        if self.interval is not None:
            text += " [" + ", ".join(_number(end, digits) for end in self.interval) + "]"
        return f"({text})" if self.null is not None and self.value <= self.null else text

    def _facts(self) -> list[str]:
        facts = []
        if self.interval is not None:
            facts.append(f"{self.level:.0%} interval {_number(self.interval[0])} to {_number(self.interval[1])}")
        if self.null is not None:
            facts.append(f"chance reaches {_number(self.null)}")
        facts.append(f"{self.estimator}, n = {self.n}" + (f" in {self.clusters} sequences" if self.clusters else ""))
        return facts

    def __str__(self) -> str:
        return "\n".join([f"{self.measure} {_number(self.value)} ({'; '.join(self._facts())})", *self.warnings])

    def _repr_markdown_(self) -> str:
        lines = [f"**{self.measure} {_number(self.value)}** · " + " · ".join(self._facts())]
        return "\n\n".join(lines + [f"⚠ {warning}" for warning in self.warnings])


@dataclass(frozen=True)
class SimilarityMatrix:
    """CKA of S student layers (rows) with T teacher layers (columns). ``matrix[s, t]`` is one :class:`Similarity`,
    by layer number.

    Attributes:
        values: (S, T) float64 array.
        null: (S, T) upper end of the null band: the ``level`` quantile with whole sequences permuted; NaN if not asked.
        low, high: (S, T) bootstrap interval over whole sequences; NaN if not asked.
        estimator: ``"debiased"`` or ``"biased"``; values of two estimators or two n do not belong in one figure.
        n: rows of one draw (= sequences), or all pooled rows.
        clusters: sequences; None where each row is an example of its own.
        student_numbers, teacher_numbers: layer numbers of the rows and columns.
        draws, permutations, bootstrap, level, pooled, kernel: how it was made.
        warnings: sentences to read before quoting a value.
    """

    values: np.ndarray
    null: np.ndarray
    low: np.ndarray
    high: np.ndarray
    estimator: str
    n: int
    clusters: int | None
    student_numbers: Sequence[int]
    teacher_numbers: Sequence[int]
    draws: int = 1
    permutations: int = 0
    bootstrap: int = 0
    level: float = 0.95
    pooled: bool = False
    kernel: str = "linear"
    warnings: tuple[str, ...] = field(default=())

    @property
    def inside_null(self) -> np.ndarray:
        """(S, T) bool: chance alone reaches the value. NaN values count as inside; False everywhere without a null."""
        return ~(self.values > self.null) & (self.null == self.null)

    @property
    def best(self) -> dict[int, int]:
        """Student layer number → number of the teacher layer it resembles most;
        layers without any value are left out.
        """
        rows = zip(self.student_numbers, self.values, strict=True)
        finite = ((s, [v if v == v else -math.inf for v in row]) for s, row in rows if any(v == v for v in row))
        return {s: self.teacher_numbers[row.index(max(row))] for s, row in finite}

    def __getitem__(self, pair: tuple[int, int]) -> Similarity:
        s, t = pair
        if s not in self.student_numbers or t not in self.teacher_numbers:
            raise ValueError(
                f"pair (student {s}, teacher {t}) is not in this matrix: it has student layers "
                f"{list(self.student_numbers)} and teacher layers {list(self.teacher_numbers)}"
            )
        at = list(self.student_numbers).index(s), list(self.teacher_numbers).index(t)
        return Similarity(
            value=float(self.values[at]),
            estimator=self.estimator,
            n=self.n,
            clusters=self.clusters,
            null=float(self.null[at]) if self.permutations else None,
            interval=(float(self.low[at]), float(self.high[at])) if self.bootstrap else None,
            level=self.level,
            warnings=self.warnings,
        )

    def _caption(self) -> str:
        rows = f"{self.n} rows" if self.clusters is None else f"{self.clusters} sequences"
        if self.pooled:
            rows = f"{self.n} pooled tokens of {self.clusters} sequences"
        kernel = "" if self.kernel == "linear" else f" ({self.kernel.upper()} kernel)"
        parts = [f"CKA{kernel}, {self.estimator}, {rows}"]
        if self.clusters is not None and not self.pooled:
            parts.append(f"one token a sequence, mean of {self.draws} draws")
        if self.bootstrap:
            parts.append(f"[{self.level:.0%} interval, {self.bootstrap} bootstraps]")
        if self.permutations:
            parts.append(f"(in brackets: within what chance reaches, {self.permutations} permutations)")
        return "; ".join(parts)

    def __str__(self) -> str:
        cells = [["", *(f"T{t}" for t in self.teacher_numbers)]]
        for s in self.student_numbers:
            short = (replace(self[s, t], interval=None).format(3) for t in self.teacher_numbers)
            cells.append([f"S{s}", *short])
        width = max(len(cell) for row in cells for cell in row)
        table = ["  ".join(cell.rjust(width) for cell in row) for row in cells]
        return "\n".join([self._caption(), *table, *self.warnings])

    def _repr_markdown_(self) -> str:
        header = "| | " + " | ".join(f"T{t}" for t in self.teacher_numbers) + " |"
        lines = [header, "|---" * (len(self.teacher_numbers) + 1) + "|"]
        for s in self.student_numbers:
            row = " | ".join(self[s, t].format(3) for t in self.teacher_numbers)
            lines.append(f"| **S{s}** | {row} |")
        return "\n".join([*lines, "", self._caption(), *(f"\n⚠ {warning}" for warning in self.warnings)])
