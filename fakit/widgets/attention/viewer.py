"""Attention viewer: where teacher and student look, head by head, linked, with what differs between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import torch
import traitlets
from torch import Tensor

from fakit.figures import Figure, attention_pair
from fakit.figures.drawing import HATCH_INK
from fakit.figures.theme import DIFFERENCE, STUDENT, TEACHER, ramp
from fakit.layer_maps import LayerMap
from fakit.similarity import HeadMatching, head_distance, match_heads
from fakit.widgets.attention.choice import Refused, one_of
from fakit.widgets.attention.page import write_page
from fakit.widgets.attention.source import Source, encode, read, without
from fakit.widgets.panel import with_still

MATCHED_ON = 16  # sequences, at most, whose maps decide which heads are alike
SELECTION = ("sequence", "teacher_layer", "student_layer", "teacher_head", "student_head", "linked")
SELECTION += ("without_sinks", "view", "cursor")


class AttentionViewer(anywidget.AnyWidget):
    """See `attention_viewer`. Every choice is a trait: set it from Python, or observe what the page chose.

    Attributes:
        sequence: number of the sequence shown, from 0.
        teacher_layer, student_layer: layer numbers; the student's is None where there is no student.
        teacher_head, student_head: from 0; None is the mean over heads.
        cursor: (query, key), positions in the sequence's tokens.
        linked: whether a teacher layer chooses the student layer that the map gives it, and a teacher head its best
            match.
        without_sinks: whether keys that are sinks are left out and rows renormalized.
        view: "heads", or "rollout" through layers 1 … the chosen ones.
        error: why the page shows no map; empty where all is well.
    """

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")

    spec = traitlets.Dict().tag(sync=True)
    sequence = traitlets.Int(0).tag(sync=True)
    teacher_layer = traitlets.Int(0).tag(sync=True)
    student_layer = traitlets.Int(None, allow_none=True).tag(sync=True)
    teacher_head = traitlets.Int(0, allow_none=True).tag(sync=True)
    student_head = traitlets.Int(0, allow_none=True).tag(sync=True)
    cursor = traitlets.Tuple(traitlets.Int(), traitlets.Int(), default_value=(0, 0)).tag(sync=True)
    linked = traitlets.Bool(True).tag(sync=True)
    without_sinks = traitlets.Bool(False).tag(sync=True)
    view = traitlets.Enum(["heads", "rollout"], "heads").tag(sync=True)
    shown = traitlets.Dict().tag(sync=True)
    teacher_page = traitlets.Bytes().tag(sync=True)
    student_page = traitlets.Bytes().tag(sync=True)
    teacher_thumbs = traitlets.Bytes().tag(sync=True)
    student_thumbs = traitlets.Bytes().tag(sync=True)
    error = traitlets.Unicode().tag(sync=True)

    def __init__(
        self, teacher: Source, student: Source | None, tokens: list[list[str]], special: Tensor, pairs, padding: int
    ):
        self._sources = {"teacher": teacher} | ({} if student is None else {"student": student})
        self._tokens, self._special, self._pairs, self._padding = tokens, special, pairs, padding
        self._matches: dict[tuple[int, int], HeadMatching] = {}
        self._thumbs_of: int | None = None
        self._following = True  # until the state is whole
        super().__init__()
        self.spec = {
            **{name: self._describe(source) for name, source in self._sources.items()},
            "pairs": pairs,
            "sequences": len(tokens),
            "no_rollout": next((why for s in self._sources.values() if (why := s.no_rollout())), ""),
            "difference": DIFFERENCE,
            "hatch": HATCH_INK,
        }
        self.student_layer, self.teacher_layer = pairs[-1] if pairs else (None, max(teacher.layers))
        if student is not None and not pairs:
            self.student_layer = max(student.layers)
        self._following = False
        self._follow({"name": "linked"})
        self.cursor = self._loudest()

    @staticmethod
    def _describe(source: Source) -> dict[str, Any]:
        return {
            "letter": source.role.letter,
            "layers": [[i, source.heads(i), source.key_heads(i)] for i in source.layers],
            "ramp": ramp(source.role),
        }

    # --- what is chosen, checked ---

    @traitlets.validate("sequence")
    def _is_sequence(self, proposal: dict) -> int:
        return one_of("sequence", proposal["value"], range(len(self._tokens)))

    @traitlets.validate("teacher_layer", "student_layer")
    def _is_layer(self, proposal: dict) -> int | None:
        name = proposal["trait"].name
        source = self._sources.get(name.removesuffix("_layer"))
        if source is None:
            if proposal["value"] is not None:
                raise Refused(f"{name} = {proposal['value']}: this viewer shows no student")
            return None
        return one_of(name, proposal["value"], source.layers)

    @traitlets.validate("teacher_head", "student_head")
    def _is_head(self, proposal: dict) -> int | None:
        name = proposal["trait"].name
        side = name.removesuffix("_head")
        if proposal["value"] is None or side not in self._sources:
            return proposal["value"]
        layer = getattr(self, f"{side}_layer")
        return one_of(f"{name} of layer {layer}", proposal["value"], range(self._sources[side].heads(layer)))

    @traitlets.validate("cursor")
    def _is_cell(self, proposal: dict) -> tuple[int, int]:
        window = self._window()
        return tuple(one_of("a cursor's position", i, range(window.start, window.stop)) for i in proposal["value"])

    @traitlets.validate("view")
    def _is_view(self, proposal: dict) -> str:
        if proposal["value"] == "rollout" and self.spec["no_rollout"]:
            raise Refused(f"{self.spec['no_rollout']}; capture(model, batch, attentions=range(1, depth + 1))")
        return proposal["value"]

    # --- what follows from a choice ---

    @traitlets.observe(*SELECTION)
    def _follow(self, change: dict) -> None:
        """Choose what is linked, then send the pages now looked at, all in one message."""
        if self._following:
            return
        self._following = True
        try:
            with self.hold_sync():
                self._clamp()
                if self.linked and self.student_layer is not None:
                    self._link(change["name"])
                if change["name"] not in ("cursor", "teacher_head", "student_head"):
                    self._show()
                if change["name"] == "sequence":
                    self.cursor = self._loudest()  # a position in another text means nothing
        except Exception as failure:
            self.teacher_page = self.student_page = self.teacher_thumbs = self.student_thumbs = b""
            self._thumbs_of = None
            self.error = str(failure)  # the page says it too: an error in a callback would reach the log alone
            raise
        finally:
            self._following = False

    def _clamp(self) -> None:
        for side, source in self._sources.items():
            head, heads = getattr(self, f"{side}_head"), source.heads(getattr(self, f"{side}_layer"))
            if head is not None and head >= heads:
                setattr(self, f"{side}_head", heads - 1)
        window = self._window()
        self.cursor = tuple(min(max(i, window.start), window.stop - 1) for i in self.cursor)

    def _link(self, changed: str) -> None:
        if changed == "teacher_layer":
            self.student_layer = next((s for s, t in self._pairs if t == self.teacher_layer), self.student_layer)
        if changed in ("teacher_layer", "student_layer", "teacher_head", "linked"):
            matched = {t: s for s, t in self.matching.pairs} | {None: None}
            self.student_head = matched.get(self.teacher_head, self.student_head)

    def _show(self) -> None:
        window, sinks = self._window(), self._sinks()
        self.shown = {
            "sequence": self.sequence,
            "start": window.start,
            "tokens": self._tokens[self.sequence][window],
            "sinks": sinks.nonzero()[:, 0].tolist(),
            "view": self.view,
            "without_sinks": self.without_sinks,
            "layers": [self.teacher_layer, self.student_layer],
            "match": [] if self.student_layer is None else self.matched(self.student_layer, self.teacher_layer),
            "matched_on": min(MATCHED_ON, len(self._tokens)),
        }
        for side, source in self._sources.items():
            page = self.page(side, getattr(self, f"{side}_layer"), self.view, self.without_sinks)
            setattr(self, f"{side}_page", encode(*page))
            if self._thumbs_of != self.sequence:
                setattr(self, f"{side}_thumbs", source.thumbs(self.sequence, window))
        self._thumbs_of = self.sequence
        self.error = ""

    def page(self, side: str, layer: int, view: str, without_sinks: bool) -> tuple[Tensor, Tensor]:
        """Maps (H, t, t) and visible cells (t, t) of the shown window; rollout counts as one head."""
        source, rows, window = self._sources[side], slice(self.sequence, self.sequence + 1), self._window()
        maps = source.rollout(layer, self.sequence) if view == "rollout" else source.maps(layer, rows)[0]
        visible = source.visible(layer, rows)[0]
        if without_sinks:
            maps, visible = without(maps, visible, self._sinks())
        return maps[:, window, window], visible[window, window]

    def _window(self) -> slice:
        """The positions shown: the tokens, and a little of the padding beside them."""
        mask = self._mask()
        places = mask.nonzero()[:, 0]
        first, last = int(places[0]), int(places[-1])
        return slice(max(0, first - self._padding), min(len(mask), last + 1 + self._padding))

    def _mask(self) -> Tensor:
        """bool (T,): the tokens of the sequence shown; all layers have the same."""
        return next(iter(self._sources["teacher"].masks.values()))[self.sequence]

    def _sinks(self) -> Tensor:
        """bool (T,): the first token and the special ones."""
        mask = self._mask()
        return mask & ((mask.cumsum(0) == 1) | self._special[self.sequence])

    def _loudest(self) -> tuple[int, int]:
        """The visible cell where the two differ most, or where the teacher looks most."""
        maps = list(self.maps.values())
        gap = np.abs(maps[-1] - maps[0]) if len(maps) > 1 else maps[0]
        if np.isnan(gap).all():
            return (int(self._mask().nonzero()[0, 0]),) * 2
        start = self._window().start
        return tuple(int(i) + start for i in np.unravel_index(np.nanargmax(gap), gap.shape))

    def _nothing_left(self) -> str:
        """Why a side has no cell to show; empty where both have. The page says it in the same words."""
        if not any(np.isnan(found).all() for found in self.maps.values()):
            return ""
        sinks = " ".join(self._tokens[self.sequence][i] for i in self._sinks().nonzero()[:, 0])
        return f"Without its sinks ({sinks}) nothing is left of this sequence: no token looks at any other."

    # --- what Python asks ---

    @property
    def matching(self) -> HeadMatching:
        """Which student head is most like which teacher head in the chosen layers, over the first 16 sequences."""
        return self.match(self.student_layer, self.teacher_layer)

    def match(self, student_layer: int, teacher_layer: int) -> HeadMatching:
        """The same for any two layers; each pair is computed once."""
        if (student_layer, teacher_layer) not in self._matches:
            rows = slice(0, MATCHED_ON)
            student, teacher = self._sources["student"], self._sources["teacher"]
            distance = head_distance(
                student.maps(student_layer, rows),
                teacher.maps(teacher_layer, rows),
                teacher.masks[teacher_layer][rows],
                teacher.is_causal(teacher_layer, rows),
            )
            self._matches[student_layer, teacher_layer] = match_heads(distance)
        return self._matches[student_layer, teacher_layer]

    def matched(self, student_layer: int, teacher_layer: int) -> list[tuple[int, int, float]]:
        """`match` as (student head, teacher head, distance)."""
        found = self.match(student_layer, teacher_layer)
        return [(s, t, distance) for (s, t), distance in zip(found.pairs, found.distances, strict=True)]

    @property
    def sides(self) -> list[str]:
        """["teacher", "student"], or the teacher alone."""
        return list(self._sources)

    @property
    def maps(self) -> dict[str, np.ndarray]:
        """What is shown, exactly: {"teacher": (t, t), "student": (t, t)} of the chosen heads, NaN where masked."""
        found = {}
        for side in self._sources:
            maps, visible = self.page(side, getattr(self, f"{side}_layer"), self.view, self.without_sinks)
            head = getattr(self, f"{side}_head")
            one = maps[0] if self.view == "rollout" else maps.mean(0) if head is None else maps[head]
            found[side] = np.where(visible.numpy(), one.numpy(), np.nan)
        return found

    @property
    def sentence(self) -> str:
        """The cell under the cursor, with its exact values."""
        if nothing := self._nothing_left():
            return nothing
        start = self._window().start
        query, key = self.cursor
        words = [self._tokens[self.sequence][i] for i in (query, key)]
        values = {side: float(found[query - start, key - start]) for side, found in self.maps.items()}
        if np.isnan(list(values.values())).all():
            return f"{words[0]} → {words[1]}: masked, no data."
        parts = [f"{side} {value:.3f}" for side, value in values.items()]
        if len(values) > 1:
            parts.append(f"difference {values['student'] - values['teacher']:+.3f}")
        return f"{words[0]} → {words[1]}: {', '.join(parts)}."

    @property
    def figure(self) -> Figure | None:
        """A still of what is shown, for a page without a kernel; None where leaving sinks out leaves nothing."""
        if self._nothing_left():
            return None
        found, window = self.maps, self._window()
        names = [self.name(side) for side in found]
        seen = ~np.isnan(np.stack(list(found.values()))).all(0)
        drawn = [np.nan_to_num(maps) for maps in found.values()]
        return attention_pair(
            drawn[0],
            drawn[1] if len(drawn) > 1 else None,
            self._tokens[self.sequence][window],
            mask=seen,
            title="Rollout" if self.view == "rollout" else "Attention",
            teacher_name=names[0],
            student_name=names[-1],
        )

    def name(self, side: str) -> str:
        """What is shown of "teacher" or "student", e.g. "teacher, T6 head 3"."""
        head, layer = getattr(self, f"{side}_head"), getattr(self, f"{side}_layer")
        letter = self._sources[side].role.letter
        if self.view == "rollout":
            return f"{side}, through {letter}{layer}"
        return f"{side}, {letter}{layer} " + ("mean over heads" if head is None else f"head {head}")

    def to_html(self, path: str | Path, limit: int = 2_200_000) -> Path:
        """Write the viewer of this sequence as one file that needs no kernel and no network; returns its path.

        Args:
            path: ends in .html.
            limit: bytes. Maps are first written with a scale a head; over the limit, with one scale for all (±1/508),
                then without the maps that leave sinks out, then with half of the levels (±1/254), and so on to ±1/6.
                The page says how its values are rounded. As given, 12 layers × 12 heads × 128 tokens of two models fit,
                whatever maps whose rows sum to 1.

        Raises:
            ValueError: another suffix, or a sequence whose maps do not fit the limit in any of these ways.
        """
        return write_page(self, Path(path), limit)

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        figure = self.figure
        text = self.sentence if figure is None else f"{figure.summary} {self.sentence}"
        return with_still(super()._repr_mimebundle_(**kwargs), figure, text)


def attention_viewer(
    teacher: Any,
    student: Any = None,
    tokens: Sequence[str] | Sequence[Sequence[str]] = (),
    *,
    layer_map: LayerMap | None = None,
    mask: Any = None,
    causal: bool | None = None,
    special: Any = None,
    padding: int = 2,
) -> AttentionViewer:
    """Teacher, student and difference as linked maps, with every head to choose from.

    Args:
        teacher: a `Trace` whose attention was captured; or {layer: (H, T, T) or (B, H, T, T)}; or an array (layers, H,
            T, T).
        student: the same for the student, of the same sequences; None shows the teacher alone.
        tokens: T strings, or for B sequences B lists of T strings, padding included.
        layer_map: which student layer belongs to which teacher layer; without it no layer follows another.
        mask: bool (T,) or (B, T), True = a token; a trace has its own.
        causal: True where a query sees no later key; a trace says so itself.
        special: bool (T,) or (B, T), special tokens ([CLS], [SEP], …): sinks, beside each sequence's first token.
        padding: so many cells of padding are shown beside the tokens, hatched.

    Raises:
        ValueError: empty attention (names the cure), teacher and student of different sequences, tokens, masks or
            special marks that do not fit, mapped layers that are not there, values that are no attention.

    >>> maps = torch.full((2, 3, 4, 4), 0.25)  # 2 layers, 3 heads, 4 tokens
    >>> viewer = attention_viewer(maps, maps, ["the", "film", "was", "fine"])
    >>> viewer.cursor = (1, 3)
    >>> viewer.sentence
    'film → fine: teacher 0.250, student 0.250, difference +0.000.'
    """
    sources = [read(TEACHER, teacher, mask, causal)]
    if student is not None:
        sources.append(read(STUDENT, student, mask, causal))
    batch, length = sources[0].size
    if student is not None and sources[1].size != (batch, length):
        raise ValueError(
            f"the teacher looked at {batch} sequences of {length} tokens, the student at {sources[1].size[0]} of "
            f"{sources[1].size[1]}: give both models the same batch, tokenized alike"
        )
    rows = [list(tokens)] if all(isinstance(token, str) for token in tokens) else [list(row) for row in tokens]
    if [len(row) for row in rows] != [length] * batch:
        raise ValueError(
            f"the maps are of {batch} sequences of {length} tokens; found tokens for {len(rows)} of "
            f"{sorted({len(row) for row in rows})}: one string a position, padding included "
            "(tokenizer.convert_ids_to_tokens)"
        )
    marks = torch.zeros(batch, length) if special is None else torch.as_tensor(special).cpu()
    marks = marks[None].bool() if marks.dim() == 1 else marks.bool()
    if marks.shape != (batch, length):
        raise ValueError(f"special has shape {tuple(marks.shape)}; the tokens need {(batch, length)}")
    pairs = [] if layer_map is None or student is None else list(layer_map.pairs)
    for held, numbers in zip(sources[::-1], zip(*pairs, strict=True), strict=False):
        if missing := sorted(set(numbers) - set(held.layers)):
            raise ValueError(
                f"the layer map names {held.role.name} layers {missing}; the attention given is of layers "
                f"{sorted(held.layers)}"
            )
    rows = [[token.replace("\n", "⏎") for token in row] for row in rows]
    return AttentionViewer(sources[0], sources[1] if student is not None else None, rows, marks, pairs, padding)
