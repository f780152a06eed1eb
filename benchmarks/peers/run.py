"""What the scripts of the peers share: seconds of the peer's step and of the hand-written loop in turns,
or peak memory of one of them.

Imports torch and transformers alone: fakit is not installed in a peer's environment.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from benchmarks import hand_written
from benchmarks.measure import Way, peak_mebibytes, seconds
from benchmarks.models import FULL, QUICK, Batch, Size, random_batch


def run(
    peer: Callable[[Size], Way],
    by_hand: Callable[..., Tensor],
    attention: str,
    notes: Callable[[Size], str] | None = None,
) -> None:
    """Print {"peer", "by hand", "loss", "note"}: seconds of each, and the peer's loss; or {"mebibytes"} of one of them.

    Args:
        peer: makes the peer's way.
        by_hand: the loss of `hand_written` that is the yardstick, under this `attention`.
        notes: looks at something that the step does not show.

    Raises:
        ValueError: the peer's loss is 0 or not finite, or none of the student's parameters gets a gradient.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("seconds", "peer", "by hand"), help="seconds of both, or memory of one")
    parser.add_argument("rows", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    batch, warm_up = (random_batch(size, args.rows, tokens) for tokens in (args.tokens, 16))

    hand = partial(hand_written.by_hand, by_hand, attention, size)

    if args.what == "seconds":
        ways = {"by hand": hand(), "peer": peer(size)}
        loss = trained_loss(ways["peer"], batch)
        costs = seconds(ways, batch, args.repeats, same=("peer",))
        print(json.dumps(costs | {"loss": loss, "note": notes(size) if notes is not None else ""}))
    else:
        mebibytes, _ = peak_mebibytes(peer(size) if args.what == "peer" else hand(), batch, warm_up)
        print(json.dumps({"mebibytes": mebibytes}))


def trained_loss(way: Way, batch: Batch) -> float:
    """The loss of a step.

    Raises:
        ValueError: it is 0 or not finite, or no parameter gets a gradient.
    """
    loss = way.step(batch)
    trained = sum(p.grad is not None and bool(p.grad.any()) for p in way.parameters)
    way.forget()
    if not math.isfinite(loss) or loss == 0 or not trained:
        raise ValueError(
            f"the loss is {loss}, and {trained} of the student's {len(way.parameters)} parameters get a gradient"
        )
    return loss
