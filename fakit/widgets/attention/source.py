"""One model's attention as the viewer asks for it: maps and visible cells of some sequences, and their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fakit.figures.theme import Role
from fakit.losses.attention import over_valid_keys
from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.similarity import attention_rollout
from fakit.tracing.trace import Trace

LEVELS, MASKED = 254, 255  # a byte's largest value, and the one that says "no data"
THUMB = 20  # a thumbnail has at most so many cells a side


def encode(maps: Tensor, visible: Tensor, fine: bool = True, levels: int = LEVELS) -> bytes:
    """A page: one float32 scale a head, then one byte a cell, round(254 · p / scale), 255 where masked.

    Args:
        maps: (H, T, T), values in [0, 1].
        visible: bool (T, T), True where the query may see the key.
        fine: scale each head by its largest value; else by 1, which is coarser and compresses better, as most cells
            of a row that sums to 1 are small.
        levels: so many steps from 0 to the scaling value, 254 at most; fewer compress better.
            A value is off by half a step.
    """
    values = torch.where(visible, maps.float(), 0.0).clamp(0, 1).numpy()  # (H, T, T)
    scale = np.maximum(values.max((1, 2)), 1e-6) if fine else np.ones(len(values), np.float32)
    cells = np.rint(values / scale[:, None, None] * levels).astype(np.uint8)
    cells[:, ~visible.numpy()] = MASKED
    return (scale * (LEVELS / levels)).astype("<f4").tobytes() + cells.tobytes()


def decode(page: bytes, heads: int) -> np.ndarray:
    """The maps of a page, float (H, T, T), NaN where masked; within 1/508 of what was encoded."""
    scale = np.frombuffer(page, "<f4", heads)
    cells = np.frombuffer(page, np.uint8, offset=4 * heads)
    length = round((len(cells) / heads) ** 0.5)
    cells = cells.reshape(heads, length, length)
    return np.where(cells == MASKED, np.nan, cells / LEVELS * scale[:, None, None])


@dataclass(frozen=True)
class Source:
    """One model's attention by layer number; a map is computed when it is asked for.

    Attributes:
        role: TEACHER or STUDENT.
        layers: {i: (B, H, T, T), or the `AttentionInputs` of a trace}.
        masks: {i: bool (B, T)}, True = a token.
        causal: whether queries see no later key, where a layer's own inputs do not say.
    """

    role: Role
    layers: dict[int, Tensor | AttentionInputs]
    masks: dict[int, Tensor]
    causal: bool = False
    _rolled: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """(B, T)."""
        first = next(iter(self.layers.values()))
        return _shape(first)[0], _shape(first)[2]

    def heads(self, layer: int) -> int:
        return _shape(self.layers[layer])[1]

    def key_heads(self, layer: int) -> int:
        """Heads of keys: fewer than `heads` under grouped-query attention."""
        inputs = self.layers[layer]
        return inputs.key.shape[1] if isinstance(inputs, AttentionInputs) else inputs.shape[1]

    def is_causal(self, layer: int, rows: slice) -> bool:
        """Whether no query of the layer sees a key after it."""
        return not self.visible(layer, rows).triu(1).any()

    def visible(self, layer: int, rows: slice) -> Tensor:
        """bool (b, T, T): the query may see the key, and both are tokens. CPU."""
        tokens = self.masks[layer][rows]  # (b, T)
        seen = tokens[:, :, None] & tokens[:, None]
        inputs = self.layers[layer]
        allowed = _rows(inputs, rows).allowed() if isinstance(inputs, AttentionInputs) else None
        if allowed is not None:  # (b or 1, H or 1, T or 1, T); what one head may see is shown for all
            seen = seen & allowed.any(1).cpu()
        return seen.tril() if self.causal else seen

    def maps(self, layer: int, rows: slice) -> Tensor:
        """Attention of some sequences. float32 (b, H, T, T) on the CPU, 0 where masked.

        Raises:
            ValueError: NaN, infinity, or values outside [0, 1] at cells that count; names the layer and the head.
        """
        inputs = self.layers[layer]
        maps = _rows(inputs, rows).maps() if isinstance(inputs, AttentionInputs) else inputs[rows]
        maps = maps.detach().float().cpu()
        maps = maps.masked_fill(~self.visible(layer, rows)[:, None], 0.0)
        wrong = ~((maps >= 0) & (maps <= 1 + 1e-3))  # NaN compares as False
        if wrong.any():
            sequence, head = wrong.nonzero()[0, :2].tolist()
            raise ValueError(
                f"the {self.role.name}'s layer {layer} holds {maps[wrong][0].item():.3g} in head {head} of sequence "
                f"{(rows.start or 0) + sequence}: attention after the softmax lies in [0, 1]. Scores before the "
                "softmax, or a model that overflowed?"
            )
        return maps

    def rollout(self, layer: int, sequence: int) -> Tensor:
        """What reaches each position through layers 1…layer (Abnar & Zuidema, 2020). (1, T, T)"""
        if (layer, sequence) not in self._rolled:
            rows = slice(sequence, sequence + 1)
            step = attention_rollout([self.maps(layer, rows)], self.masks[layer][rows])
            self._rolled[layer, sequence] = step if layer == 1 else step @ self.rollout(layer - 1, sequence).double()
        return self._rolled[layer, sequence].float()

    def no_rollout(self) -> str:
        """Why rollout cannot be shown; empty where it can."""
        missing = sorted(set(range(1, max(self.layers) + 1)) - set(self.layers))
        return f"rollout multiplies every layer from 1; the {self.role.name}'s {missing} are missing" if missing else ""

    def thumbs(self, sequence: int, window: slice) -> bytes:
        """Every layer's heads in small, layer after layer: bytes (H, m, m), m ≤ 20, of √p,
        the largest of each block.
        """
        rows, parts = slice(sequence, sequence + 1), []
        for layer in self.layers:
            maps = self.maps(layer, rows)[0, :, window, window].sqrt().numpy()
            cells = np.rint(maps.clip(0, 1) * LEVELS).astype(np.uint8)
            edges = np.linspace(0, cells.shape[-1], min(THUMB, cells.shape[-1]) + 1).astype(int)[:-1]
            small = np.maximum.reduceat(np.maximum.reduceat(cells, edges, 1), edges, 2)
            seen = self.visible(layer, rows)[0, window, window].numpy()
            seen = np.logical_or.reduceat(np.logical_or.reduceat(seen, edges, 0), edges, 1)
            small[:, ~seen] = MASKED
            parts.append(small.tobytes())
        return b"".join(parts)


def without(maps: Tensor, visible: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (H, T, T) over the keys that are no sinks (T,), rows renormalized;
    a row with nothing left is masked for all.
    """
    visible = visible & ~sinks[None]
    kept = over_valid_keys(maps, visible)
    visible = visible & (kept.sum(-1, keepdim=True).amin(0) > 0)
    return kept.masked_fill(~visible, 0.0), visible


def read(role: Role, attention: Any, mask: Any = None, causal: bool | None = None) -> Source:
    """A `Source` of a Trace, of {layer: (H, T, T) or (B, H, T, T)}, of an array (L, H, T, T),
    or of a model's `attentions`.

    Raises:
        ValueError: no attention at all (names the cure), other shapes, layers of different lengths,
            a mask of another shape.
    """
    layers, masks = _layers(role, attention)
    if not layers:
        raise ValueError(
            f"the {role.name}'s attention is empty: sdpa and flash attention return no maps. Pass a trace of "
            "capture(model, batch, attentions=[1, 2, …]), which computes them, or load the model with "
            "attn_implementation='eager'"
        )
    shapes = {i: _shape(found) for i, found in layers.items()}
    sizes = {(shape[0], *shape[2:]) for shape in shapes.values()}
    if len(sizes) > 1:
        raise ValueError(
            f"the {role.name}'s layers look at different sequences: shapes {shapes}. Pass layers of one stack (an "
            "encoder's or a decoder's) and of one batch"
        )
    batch, length, keys = sizes.pop()
    if length != keys:
        raise ValueError(
            f"the {role.name}'s maps are {length} queries × {keys} keys; the viewer shows self-attention, (H, T, T)"
        )
    if mask is not None:
        given = torch.as_tensor(mask).cpu().bool()
        given = given[None] if given.dim() == 1 else given
        if given.shape != (batch, length):
            raise ValueError(
                f"mask has shape {tuple(given.shape)}; the {role.name}'s maps need {(batch, length)}: True = a token"
            )
        masks = dict.fromkeys(layers, given)
    every = torch.ones(batch, length, dtype=torch.bool)
    found = {i: every if masks.get(i) is None else masks[i].detach().bool().cpu() for i in layers}
    if empty := [i for i in layers if not found[i].any(1).all()]:
        raise ValueError(
            f"a sequence of the {role.name}'s layer {empty[0]} has no token: True in the mask marks the tokens"
        )
    own = isinstance(attention, Trace) and attention.causal and bool(attention.maps)
    return Source(role, layers, found, own if causal is None else causal)


def _layers(role: Role, attention: Any) -> tuple[dict[int, Tensor | AttentionInputs], dict[int, Tensor | None]]:
    if isinstance(attention, Trace):
        numbers = sorted({*attention.maps, *attention.attention})
        found = {i: attention.maps[i] if i in attention.maps else attention.attention[i] for i in numbers}
        return found, {i: attention.layer_mask(i) for i in numbers}
    if isinstance(attention, Mapping):
        named = {int(i): attention[i] for i in sorted(attention)}
    elif isinstance(attention, (Sequence, Tensor, np.ndarray)) and not isinstance(attention, str):
        named = dict(enumerate(attention, 1))
    else:
        raise ValueError(
            f"the {role.name}'s attention is a {type(attention).__name__}; give a Trace, {{layer: (H, T, T)}}, or an "
            "array (layers, H, T, T)"
        )
    found = {}
    for layer, maps in named.items():
        if maps is None:
            raise ValueError(f"the {role.name}'s layer {layer} is None: this model returned no map for it; use capture")
        maps = maps if isinstance(maps, Tensor) else torch.as_tensor(np.asarray(maps))
        if maps.dim() not in (3, 4):
            raise ValueError(
                f"the {role.name}'s layer {layer} has shape {tuple(maps.shape)}; expected (H, T, T), or (B, H, T, T)"
            )
        found[layer] = maps[None] if maps.dim() == 3 else maps
    return found, {}


def _shape(found: Tensor | AttentionInputs) -> tuple[int, int, int, int]:
    """(B, H, T, T) of a layer, without computing its map."""
    if isinstance(found, Tensor):
        return tuple(found.shape)
    return (*found.query.shape[:3], found.key.shape[2])


def _rows(inputs: AttentionInputs, rows: slice) -> AttentionInputs:
    """The inputs of some sequences; what is shared by all (a first size of 1) stays."""

    def pick(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[0] == 1 else x[rows]

    return replace(
        inputs,
        query=inputs.query[rows],
        key=inputs.key[rows],
        value=None,
        mask=pick(inputs.mask),
        position_bias=pick(inputs.position_bias),
    )
