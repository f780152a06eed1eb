"""Which texts each step sees: every batch holds the same share of labeled rows, in an order the seed alone decides.

With few labels and a large pool, shuffling both together would leave many batches without a label, and repeating the
labeled rows only makes that rarer. So the order is laid out beforehand, one row of indices a batch, and the trainer
walks through it. Arms of one seed see the labeled texts in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fakit import renamed

WINDOW = 8
"""Batches between which rows are exchanged, so that those of a batch are of like length."""


@renamed(labelled="labeled", labelled_fraction="labeled_fraction")
def batch_plan(
    labeled: int,
    pool: int,
    batches: int,
    batch_size: int,
    labeled_fraction: float = 0.5,
    seed: int = 0,
    lengths: Sequence[int] | None = None,
) -> np.ndarray:
    """Row numbers for every batch: 0 … labeled − 1 are labeled rows, labeled … labeled + pool − 1 the pool's.

    Each batch takes round(labeled_fraction · batch_size) labeled rows (at least one), the rest from the pool; either
    part is walked through in shuffled rounds, so that no row comes a second time before all of its part came once.
    Without a pool, all rows are labeled.

    Args:
        lengths: tokens of every row, labeled ones first. Batches then hold rows of like length, so that little of them
            is padding: each `WINDOW` batches in turn exchange rows among themselves, and come in shuffled order.

    Returns:
        int64 (batches, batch_size); the labeled rows of a batch come first.

    Example:
        >>> batch_plan(labeled=2, pool=100, batches=2, batch_size=4, labeled_fraction=0.5).shape
        (2, 4)
    """
    if labeled < 1:
        raise ValueError(f"a training set needs labeled rows; found {labeled} labeled and {pool} unlabeled ones.")
    each = batch_size if pool == 0 else labeled_rows(batch_size, labeled_fraction)
    # two generators: how many pool rows are drawn must not move the order of the labeled ones
    labeled_rng, pool_rng = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    plan = np.empty((batches, batch_size), dtype=np.int64)
    plan[:, :each] = _rounds(labeled, batches * each, labeled_rng).reshape(batches, each)
    if each < batch_size:
        plan[:, each:] = labeled + _rounds(pool, batches * (batch_size - each), pool_rng).reshape(batches, -1)
    if lengths is not None:
        if len(lengths) != labeled + pool:
            raise ValueError(
                f"{len(lengths)} lengths were given for {labeled} labeled and {pool} unlabeled rows; give one for "
                "every row."
            )
        _group_by_length(plan, each, np.asarray(lengths), np.random.default_rng([seed, 2]))
    return plan


def labeled_rows(batch_size: int, labeled_fraction: float) -> int:
    """How many rows of a batch carry a label, at least one, where there is a pool to take the others from."""
    return min(batch_size, max(1, round(labeled_fraction * batch_size)))


def _group_by_length(plan: np.ndarray, each: int, lengths: np.ndarray, rng: np.random.Generator) -> None:
    """Exchange rows between the batches of a window, in place: labeled rows (the first `each` columns)
    for labeled ones.
    """
    for start in range(0, len(plan), WINDOW):
        window = plan[start : start + WINDOW]
        for part in (window[:, :each], window[:, each:]):
            rows = part.ravel()
            part[:] = rows[np.argsort(lengths[rows], kind="stable")].reshape(part.shape)
        window[:] = rng.permutation(window)  # else every window would go from short to long


def _rounds(rows: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the numbers 0 … rows − 1, one shuffled round after the other."""
    rounds = [rng.permutation(rows) for _ in range(-(-count // rows))]
    return np.concatenate(rounds)[:count] if rounds else np.empty(0, dtype=np.int64)
