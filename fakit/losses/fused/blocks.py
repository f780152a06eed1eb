"""Blocks: the pieces in which a fused loss does its work, how large they are, and who hands them out.

    block_size("attention", "cpu")               # asked: elements of one block on that kind of device
    with use_blocks(attention=2**18):            # set: for all losses inside
        total = objective(student, teacher).total
    with use_blocks(hand_out=lambda all: all[:1]):  # who hands them out: here the first block alone

The setting is a context variable: losses that another thread computes meanwhile keep theirs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fakit.losses.reduce import values_known

# Elements of one block, on a CPU and on an accelerator, which wants more at once.
# attention: scores over batch, heads, queries and keys; 4 MiB in float32 stays in a CPU's caches.
# outputs: logits over tokens and vocabulary; 16 MiB in float32 stays in a CPU's caches.
SIZES = {"attention": (2**20, 2**24), "outputs": (2**22, 2**25)}


class Block(NamedTuple):
    """Some rows of a matrix that is never there as a whole: queries × keys, or tokens × vocabulary."""

    start: int  # first row
    end: int  # last row + 1
    columns: int  # that any of its rows needs


@dataclass(frozen=True)
class _Setting:
    attention: int | None = None
    outputs: int | None = None
    accelerator: bool | None = None
    hand_out: Callable[[Sequence[Block]], Iterable[Block]] = iter


_DEFAULT = _Setting()
_setting: ContextVar[_Setting] = ContextVar("blocks of the fused losses", default=_DEFAULT)


def block_size(loss: str, device: str) -> int:
    """Elements of one block.

    Args:
        loss: "attention" (`fakit.losses.fused.streamed`) or "outputs" (`fakit.losses.fused.chunked`).
        device: its type: "cpu", "cuda" …

    Raises:
        ValueError: no loss with blocks.
    """
    if loss not in SIZES:
        raise ValueError(f"loss {loss!r} has no blocks; choose one of {', '.join(SIZES)}.")
    given = getattr(_current(), loss)
    return SIZES[loss][_is_accelerator(device)] if given is None else given


def _is_accelerator(device: str) -> bool:
    asked = _current().accelerator
    return device != "cpu" if asked is None else asked


def may_look(x: Tensor) -> bool:
    """Whether a loss may look at numbers to save work: where they are known (`values_known`) and lie on a CPU, or are
    to be taken as if they did not.
    """
    return not _is_accelerator(x.device.type) and values_known(x)


@contextmanager
def use_blocks(
    *,
    attention: int | None = None,
    outputs: int | None = None,
    accelerator: bool | None = None,
    hand_out: Callable[[Sequence[Block]], Iterable[Block]] | None = None,
) -> Iterator[None]:
    """Inside, fused losses work in other blocks; what is not given stays as it is.

    Args:
        attention: elements of one block of the streamed losses; a block has one query of every head at least.
        outputs: elements of one block of the chunked losses; a block has 256 tokens at least.
        accelerator: what is asked for the tensors' device is answered for an accelerator, or for a CPU.
        hand_out: given a loss's blocks, returns those that it goes through. A loss is the sum over them, so leaving
            some out is for those who look at something else than its value.

    Raises:
        ValueError: a size below 1.
    """
    for loss, size in (("attention", attention), ("outputs", outputs)):
        if size is not None and size < 1:
            raise ValueError(f"{loss}={size}: a block has at least one element.")
    before = _setting.get()
    made = _Setting(
        attention or before.attention,
        outputs or before.outputs,
        before.accelerator if accelerator is None else accelerator,
        hand_out or before.hand_out,
    )
    token = _setting.set(made)
    try:
        yield
    finally:
        _setting.reset(token)


def blocks(rows: int, at_a_time: int, columns: Callable[[int], int]) -> Iterator[Block]:
    """All rows, so many at a time.

    Args:
        columns: of a block, by its end.
    """
    ends = [min(start + at_a_time, rows) for start in range(0, rows, at_a_time)]
    made = [Block(start, end, columns(end)) for start, end in zip([0, *ends], ends, strict=False)]
    return iter(_current().hand_out(made))


def _current() -> _Setting:
    # torch.compile reads no context variables: compiled losses take all blocks, as large as suits the device
    return _DEFAULT if torch.compiler.is_compiling() else _setting.get()
