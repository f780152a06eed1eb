"""How large a cache becomes, to the byte, before it is made: its shards are safetensors files of known tensors."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

# What safetensors calls them; it writes tensors in this order, and those of one type by name.
_TYPES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
# Tensors of a shard that are one a row, not one a token, begin so; two of them every shard has.
PER_ROW = "row."
HASH, OFFSETS = f"{PER_ROW}hash", "offsets"
_ORDER = list(_TYPES.values())
_WIDTHS = {name: dtype.itemsize for dtype, name in _TYPES.items()}

Layout = Mapping[str, tuple[str, Sequence[int], str]]
"""Of every tensor by name: its type, its shape behind the first dimension, and what that one counts: "token",
"position" (a token whose logits are kept) or "row"."""


def layout_of(tensors: Mapping[str, Tensor], per: Mapping[str, str]) -> dict[str, tuple[str, list[int], str]]:
    """The layout of what one row keeps. `per`: of tensors that do not count tokens."""
    return {key: (_TYPES[x.dtype], list(x.shape[1:]), per.get(key, "token")) for key, x in tensors.items()}


def bytes_of_one(layout: Layout) -> dict[str, int]:
    """Bytes of one token, position or row, by tensor."""
    return {key: _WIDTHS[dtype] * prod(tail) for key, (dtype, tail, _) in layout.items()}


def shard_bytes(layout: Layout, rows: int, tokens: int, positions: int) -> int:
    """Of the file of a shard: 8 bytes, a header of JSON filled up to a multiple of 8, and the tensors."""
    counts = {"token": tokens, "position": positions, "row": rows}
    shapes = {key: (dtype, [counts[per], *tail]) for key, (dtype, tail, per) in layout.items()}
    shapes |= {HASH: ("I64", [rows]), OFFSETS: ("I64", [rows + 1])}
    header, end = {}, 0
    for key in sorted(shapes, key=lambda key: (_ORDER.index(shapes[key][0]), key)):
        dtype, shape = shapes[key]
        start, end = end, end + _WIDTHS[dtype] * prod(shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + end


def planned_bytes(layout: Layout, counts: Sequence[tuple[int, int]], shard_rows: int) -> list[int]:
    """Of each shard of so many rows. `counts`: (tokens, positions) of every row, in order."""
    shards = [counts[start : start + shard_rows] for start in range(0, len(counts), shard_rows)]
    return [shard_bytes(layout, len(rows), *(sum(numbers) for numbers in zip(*rows, strict=True))) for rows in shards]


@dataclass(frozen=True)
class PlannedCache:
    """What `TeacherCache.build` would write.

    Attributes:
        folder: of the cache.
        rows, tokens, positions: that are not there yet; positions are those whose logits are kept.
        files: bytes of each file that is not there yet.
        labeled: logits are kept at labels alone.
        done: rows that are there already.
    """

    folder: Path
    rows: int
    tokens: int
    positions: int
    files: tuple[int, ...]
    labeled: bool
    done: int

    @property
    def bytes(self) -> int:
        """Of all files that are not there yet."""
        return sum(self.files)

    def __str__(self) -> str:
        """A line for the log, before anything is written."""
        if not self.rows:
            return f"teacher cache {self.folder}: finished, all of its {self.done:,} rows are there."
        at = f", logits at {self.positions:,} of them" if self.labeled else ""
        each = self.bytes / max(self.positions if self.labeled else self.tokens, 1)
        there = f" {self.done:,} rows are there already." if self.done else ""
        return (
            f"teacher cache {self.folder}: {self.rows:,} rows of {self.tokens:,} tokens{at}, will take "
            f"{self.bytes:,} bytes in {len(self.files):,} file{'s' * (len(self.files) > 1)}, {each:,.0f} a token."
            f"{there}"
        )


def planned_cache(
    folder: Path, counts: Sequence[tuple[int, int]], sizes: Sequence[int], labeled: bool, done: int = 0
) -> PlannedCache:
    """Of rows of so many (tokens, positions), in files of these sizes."""
    tokens, positions = (sum(numbers) for numbers in zip(*counts, strict=True)) if counts else (0, 0)
    return PlannedCache(folder, len(counts), tokens, positions, tuple(sizes), labeled, done)
