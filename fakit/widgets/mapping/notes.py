"""What there is to say about a layer map: slips that raise no error, and what unequal widths and heads mean."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from fakit.layer_maps import LayerMap

GOOD, HINT, WARNING = "good", "hint", "warning"


class Note(NamedTuple):
    """One remark: `level` is "good", "hint" (may be meant) or "warning" (mostly a slip)."""

    level: str
    text: str


def map_notes(
    layer_map: LayerMap,
    student_layers: int,
    teacher_layers: int,
    widths: tuple[int, int] | None = None,
    heads: tuple[int, int] | None = None,
) -> list[Note]:
    """Remarks on a map that is possible, warnings first; a map without any gets one that says so.

    Args:
        layer_map: the map, whose layers exist (see `LayerMap.check`).
        student_layers, teacher_layers: depths S and T, embeddings not counted.
        widths: (d_S, d_T), to say what unequal ones mean.
        heads: (H_S, H_T), likewise.

    >>> for note in map_notes(LayerMap([(0, 0), (1, 3)]), 2, 6):
    ...     print(note.level, "·", note.text)
    warning · off by one? S0 takes part and S2 does not: 0 is the embeddings, the last block is S2
    warning · the last student layer, S2, has no teacher
    hint · T6, which the teacher answers from, teaches nobody
    hint · S0 ← T0: embeddings, which a student that starts as a copy has already; they do not attend
    """
    S, T, pairs = student_layers, teacher_layers, layer_map.pairs
    if not pairs:
        return [Note(HINT, "no layer is matched: the control for everything that other maps gain")]
    students, teachers = layer_map.student_layers, layer_map.teacher_layers
    notes = _numbering(layer_map, S, T)
    if S not in students:
        skipped = layer_map == LayerMap.skip(S, T) if S > 1 else False
        notes.append(
            Note(HINT, f"S{S} is left to the outputs, as Patient KD does: match outputs too")
            if skipped
            else Note(WARNING, f"the last student layer, S{S}, has no teacher")
        )
    without = [f"S{s}" for s in range(1, S) if s not in students]
    if without:
        notes.append(Note(WARNING, f"without a teacher: {', '.join(without)}"))
    if not layer_map.is_monotone():
        notes.append(Note(WARNING, f"not in the order of depth: {_crossing(pairs)}"))
    if T not in teachers:
        notes.append(Note(HINT, f"T{T}, which the teacher answers from, teaches nobody"))
    if embedded := [f"S{s} ← T{t}" for s, t in pairs if min(s, t) == 0]:
        copied = all(s == t == 0 for s, t in pairs if min(s, t) == 0)
        told = "embeddings, which a student that starts as a copy has already" if copied else "0 is the embeddings"
        notes.append(Note(HINT, f"{', '.join(embedded)}: {told}; they do not attend"))
    notes += _repeated(pairs)
    if layer_map.is_random:
        notes.append(Note(HINT, "drawn anew each epoch: this is the first epoch's draw"))
    if not notes:
        notes.append(Note(GOOD, "every student layer has a teacher, in the order of depth, the last on the last"))
    return sorted(notes + _shapes(pairs, widths, heads), key=lambda note: note.level != WARNING)


def _numbering(layer_map: LayerMap, S: int, T: int) -> list[Note]:
    """Counting from 0: `range(S)` where 1…S was meant, on the student's side, the teacher's or both."""
    students, teachers = layer_map.student_layers, layer_map.teacher_layers
    if 0 in students and S not in students:
        return [
            Note(WARNING, f"off by one? S0 takes part and S{S} does not: 0 is the embeddings, the last block is S{S}")
        ]
    if S in students and T not in teachers and T > S:
        shifted = [(s, t + 1) for s, t in layer_map.pairs]
        if shifted in (LayerMap.uniform(S, T).pairs, LayerMap.last(S, T).pairs):
            return [
                Note(
                    WARNING,
                    f"off by one? every teacher layer one deeper ends on T{T}: T0 is the embeddings, T1 the first "
                    "block",
                )
            ]
    return []


def _crossing(pairs: list[tuple[int, int]]) -> str:
    """The first two pairs of which the deeper student layer learns from the shallower teacher layer."""
    (s, t), (u, v) = next((a, b) for a, b in pairwise(pairs) if b[1] < a[1])
    return f"S{u} learns from T{v}, S{s} from T{t}"


def _repeated(pairs: list[tuple[int, int]]) -> list[Note]:
    notes = []
    for s in sorted({s for s, _ in pairs}):
        several = [f"T{t}" for u, t in pairs if u == s]
        if len(several) > 1:
            notes.append(
                Note(HINT, f"S{s} learns from {' and '.join(several)}: no state equals both, it is drawn between them")
            )
    for t in sorted({t for _, t in pairs}):
        several = [f"S{s}" for s, u in pairs if u == t]
        if len(several) > 1:
            notes.append(Note(HINT, f"T{t} teaches {' and '.join(several)}: these layers are asked to be alike"))
    return notes


def _shapes(pairs: list[tuple[int, int]], widths: tuple[int, int] | None, heads: tuple[int, int] | None) -> list[Note]:
    notes = []
    if widths is not None and widths[0] != widths[1]:
        notes.append(
            Note(
                HINT,
                f"widths differ, {widths[0]} and {widths[1]}: each of {len(pairs)} pairs learns a projection "
                f"{widths[0]} → {widths[1]} (Features(projection='linear')), which the exported student leaves behind",
            )
        )
    if heads is not None and heads[0] != heads[1] and any(min(pair) > 0 for pair in pairs):
        grouped = max(heads) % min(heads) == 0
        ways = (
            "Attention(heads='group-mean'), " if grouped else ""
        ) + "Attention(heads='best-match') or Attention('relations')"
        notes.append(
            Note(WARNING, f"heads differ, {heads[0]} and {heads[1]}: maps cannot be compared head by head; use {ways}")
        )
    return notes
