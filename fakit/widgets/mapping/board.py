"""Mapping board: connect student layers with teacher layers by hand; what the map means and costs is said at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

from fakit.figures import Figure
from fakit.figures import layer_map as draw_layer_map
from fakit.figures.theme import SIMILARITY
from fakit.layer_maps import LayerMap
from fakit.widgets.mapping.cost import MapCost, map_cost
from fakit.widgets.mapping.notes import Note, map_notes
from fakit.widgets.panel import with_still
from fakit.widgets.strategies import offered

HERE = Path(__file__).parent


class Pairs(traitlets.List):
    """A list that is given out as a copy: editing it in place changes nothing on the board."""

    def get(self, obj: traitlets.HasTraits, cls: type | None = None) -> list[tuple[int, int]]:
        return list(super().get(obj, cls))


class MappingBoard(anywidget.AnyWidget):
    """See `mapping_board`.

    The page only asks (link, choose, undo); Python decides, and answers with the traits `pairs` and `view`. A request
    that cannot be met changes nothing, and the board shows why. What the board gives out (pairs, maps) are copies: set
    `pairs` or `layer_map` to change it.

    Attributes:
        pairs: (student layer, teacher layer), sorted; a traitlet: `board.observe(redraw, "pairs")`. Setting it sets the
            map.
        layer_map: the map of now, a `LayerMap`; set it to show another.
        maps: the presets by name; those that these depths do not allow are in `refused`, with the reason.
        notes: what there is to say about the map; `cost`: what it costs a step.
    """

    _esm = HERE / "board.js"
    _css = HERE / "board.css"
    pairs = Pairs(help="(student layer, teacher layer)").tag(sync=True)
    setup = traitlets.Dict(help="what stays: depths, similarity, presets, colors").tag(sync=True)
    view = traitlets.Dict(help="what follows from the pairs: preset, sentence, notes, cost, refusal").tag(sync=True)

    def __init__(
        self,
        student_layers: int,
        teacher_layers: int,
        similarity: Any = None,
        start: str | LayerMap = "uniform",
        widths: tuple[int, int] | None = None,
        heads: tuple[int, int] | None = None,
        batch: int = 32,
        tokens: int = 128,
    ):
        self._depths = (student_layers, teacher_layers)
        self.similarity = None if similarity is None else np.array(similarity, dtype=float)
        self._maps, self.refused = offered(student_layers, teacher_layers)  # before the shape: depths may be wrong
        self._check_similarity()
        if self.similarity is not None:
            self._maps, self.refused = offered(student_layers, teacher_layers, self.similarity)
        self._shapes = {"widths": _two("widths", widths), "heads": _two("heads", heads)}
        self._sizes = {"batch": batch, "tokens": tokens}
        self._layer_map = deepcopy(start) if isinstance(start, LayerMap) else self._preset(start)
        self._layer_map.check(*self._depths)
        self._before: list[LayerMap] = []
        self._refusal = ""
        super().__init__(pairs=list(self._layer_map.pairs), setup=self._setup())
        self._refresh()
        self.on_msg(self._on_request)

    # -- the map ------------------------------------------------------------------------------------------------------

    @property
    def layer_map(self) -> LayerMap:
        """The map of now. Setting one that names a layer the models do not have raises ValueError and changes
        nothing.
        """
        return deepcopy(self._layer_map)

    @layer_map.setter
    def layer_map(self, layer_map: LayerMap) -> None:
        layer_map.check(*self._depths)
        self._before.append(self._layer_map)
        self._show(deepcopy(layer_map))

    @property
    def maps(self) -> dict[str, LayerMap]:
        """The presets that these depths allow, by name."""
        return deepcopy(self._maps)

    def choose(self, preset: str, teacher_layer: int | None = None) -> None:
        """Show a preset of `maps`; `teacher_layer` is the target of "all_to_one", the last unless given."""
        one = preset == "all_to_one" and teacher_layer is not None
        self.layer_map = LayerMap.all_to_one(*self._depths, teacher_layer) if one else self._preset(preset)

    def toggle(self, student_layer: int, teacher_layer: int) -> None:
        """Connect two layers, or disconnect them where they are connected. Other pairs keep their weights."""
        pair = (student_layer, teacher_layer)
        self._set_pairs([p for p in self.pairs if p != pair] if pair in self.pairs else [*self.pairs, pair])

    def unlink(self, *, student_layer: int | None = None, teacher_layer: int | None = None) -> None:
        """Take all pairs of a student layer, of a teacher layer, or one pair away."""
        self._set_pairs(
            [(s, t) for s, t in self.pairs if student_layer not in (None, s) or teacher_layer not in (None, t)]
        )

    def undo(self) -> None:
        """Back to the map before the last change; nothing where there was none."""
        if self._before:
            self._show(self._before.pop())

    def _set_pairs(self, pairs: Iterable[Sequence[int]]) -> None:
        if (layer_map := self._as_map(pairs)) != self._layer_map:
            self.layer_map = layer_map

    def _as_map(self, pairs: Iterable[Sequence[int]]) -> LayerMap:
        """The map of these pairs: a preset where one has them, else of its own; weights of pairs that stay are kept."""
        try:
            found = LayerMap(pairs)
        except TypeError as error:
            raise ValueError(f"pairs are a list of (student layer, teacher layer); found {pairs!r}") from error
        found.check(*self._depths)
        known = dict(zip(self._layer_map.pairs, self._layer_map.pair_weights, strict=True))
        found = LayerMap(found.pairs, [known.get(pair, 1.0) for pair in found.pairs])
        named = (preset for preset in self._maps.values() if preset == found and not preset.is_random)
        return next(named, found)

    def _preset(self, name: str) -> LayerMap:
        if name not in self._maps:
            reason = f" {self.refused[name]}" if name in self.refused else ""
            raise ValueError(f"preset {name!r} is not offered; choose one of {', '.join(self._maps)}.{reason}")
        return deepcopy(self._maps[name])

    # -- what is shown ------------------------------------------------------------------------------------------------

    @property
    def notes(self) -> list[Note]:
        """What there is to say about the map; see `map_notes`."""
        return map_notes(self._layer_map, *self._depths, **self._shapes)

    @property
    def cost(self) -> MapCost:
        """What the map costs a training step; see `MapCost`."""
        return map_cost(self._layer_map, self._depths[1], **self._shapes, **self._sizes)

    @property
    def sentence(self) -> str:
        """The map in one sentence, with the mean similarity of its pairs."""
        layer_map = self._layer_map
        return f"{layer_map.name}: {layer_map}{self._alike(layer_map.pairs)}."

    def _alike(self, pairs: list[tuple[int, int]]) -> str:
        if self.similarity is None or not pairs:
            return ""
        measured = [value for pair in pairs if not np.isnan(value := self.similarity[pair])]
        return f"; mean similarity {np.mean(measured):.2f}" if measured else "; similarity not measured"

    @property
    def figure(self) -> Figure:
        """The map of now as a figure: the still picture of a page without a kernel."""
        return draw_layer_map(
            self.pairs, *self._depths, self.similarity, title=f"Mapping board: ‘{self._layer_map.name}’"
        )

    def _show(self, layer_map: LayerMap) -> None:
        self._layer_map, self._refusal = layer_map, ""
        with self.hold_sync():  # one message: the page never sees new pairs with old notes
            self._refresh()
            self.pairs = list(layer_map.pairs)

    def _refresh(self) -> None:
        name = self._layer_map.name
        self.view = {
            "preset": name if self._maps.get(name) == self._layer_map or name == "all_to_one" else "",
            "sentence": self.sentence,
            "notes": [note._asdict() for note in self.notes],
            "cost": self.cost.lines(),
            "refusal": self._refusal,
            "undo": bool(self._before),
        }

    def _setup(self) -> dict[str, Any]:
        S, T = self._depths
        values = self.similarity
        if values is not None:  # JSON has no NaN, and every number may have been measured: debiased CKA falls below 0
            values = np.where(np.isnan(values), None, values.round(3)).tolist()
        B, tokens = self._sizes["batch"], self._sizes["tokens"]
        # several strategies are refused for one reason: it is said once
        reasons = {reason.removeprefix(name): reason for name, reason in self.refused.items()}.values()
        return {
            "student_layers": S,
            "teacher_layers": T,
            "similarity": values,
            "scale": [color for _, color in SIMILARITY],
            "presets": list(self._maps),
            "refused": f"Not offered here: {', '.join(self.refused)}. {' '.join(reasons)}" if self.refused else "",
            "step": f"Cost of a step of {B} sequences × {tokens} tokens, float32",
        }

    def _check_similarity(self) -> None:
        S, T = self._depths
        if self.similarity is not None and self.similarity.shape != (S + 1, T + 1):
            raise ValueError(
                f"similarity has shape {self.similarity.shape}; a student of {S} and a teacher of {T} layers need "
                f"{(S + 1, T + 1)}: embeddings are layer 0"
            )

    # -- what comes from outside
    # ----------------------------------------------------------------------------------------

    @traitlets.validate("pairs")
    def _check_pairs(self, proposal: dict) -> list[tuple[int, int]]:
        return list(self._as_map(proposal["value"]).pairs)

    def notify_change(self, change: dict) -> None:
        """Observers get a list of their own too."""
        if change["name"] == "pairs":
            change = traitlets.Bunch(change, new=list(change["new"]))
        super().notify_change(change)

    @traitlets.observe("pairs")
    def _follow_pairs(self, change: dict) -> None:
        """`board.pairs = [...]`, from Python or from a page: the map follows, before any observer looks at it."""
        if change["new"] != self._layer_map.pairs:
            self.layer_map = self._as_map(change["new"])

    def set_state(self, sync_data: dict) -> None:
        """What a page sets. Pairs that make no map are refused: the board shows why,
        and the page gets the old ones back.
        """
        if "pairs" in sync_data:
            try:
                self._as_map(sync_data["pairs"])
            except ValueError as error:
                sync_data = {key: value for key, value in sync_data.items() if key != "pairs"}
                self._refuse(error)
        super().set_state(sync_data)

    def _on_request(self, _, request: Any, buffers: list) -> None:
        """One request of the page: {"ask": "toggle" | "unlink" | "choose" | "undo", …arguments}."""
        asks = {"toggle": self.toggle, "unlink": self.unlink, "choose": self.choose, "undo": self.undo}
        if not isinstance(request, dict) or request.get("ask") not in asks:
            return  # anywidget's own messages
        arguments = {key: value for key, value in request.items() if key != "ask"}
        try:
            asks[request["ask"]](**arguments)
        except (ValueError, TypeError) as error:
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        self._refusal = f"Refused: {error}"
        self._refresh()
        self.send_state("pairs")

    # -- display
    # --------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"Mapping board of {self._depths[0]} student and {self._depths[1]} teacher layers. {self.sentence}"

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        return with_still(super()._repr_mimebundle_(**kwargs), self.figure, repr(self))


def _two(what: str, numbers: tuple[int, int] | None) -> tuple[int, int] | None:
    if numbers is None:
        return None
    found = tuple(numbers)
    if len(found) != 2 or not all(isinstance(n, int) and n > 0 for n in found):
        raise ValueError(f"{what} are two whole numbers above 0, (student, teacher); found {numbers!r}")
    return found


def mapping_board(
    student_layers: int,
    teacher_layers: int,
    similarity: Any = None,
    start: str | LayerMap = "uniform",
    widths: tuple[int, int] | None = None,
    heads: tuple[int, int] | None = None,
    batch: int = 32,
    tokens: int = 128,
) -> MappingBoard:
    """A board on which student and teacher layers are connected by mouse or keyboard;
    `.layer_map` is the map that it shows.

    Click a student layer, then a teacher layer (or drag from one to the other): connected; once more: disconnected. A
    click on a link takes it away. By keyboard: arrows move, Enter or Space picks and connects, Escape lets go, Delete
    takes the links of a layer away, Ctrl+Z undoes.

    Args:
        student_layers: depth S of the student, embeddings not counted.
        teacher_layers: depth T of the teacher.
        similarity: (S + 1, T + 1) by layer number, as CKA gives it, up to 1; colors the links, is written beside the
            layers, and adds the two presets made from it. Debiased CKA may fall below 0, and is drawn as 0;
            NaN is "not measured".
        start: a preset's name, or a `LayerMap`.
        widths: (d_S, d_T), for the cost in numbers and for what unequal widths mean.
        heads: (H_S, H_T), likewise.
        batch, tokens: the step whose cost is shown, B sequences of T tokens.

    Raises:
        ValueError: depths below 1, a similarity of another shape, a preset that these depths do not allow, a map that
            names a layer which is not there, widths or heads that are not two numbers.

    >>> board = mapping_board(2, 6)
    >>> board.toggle(2, 6)
    >>> board.toggle(2, 5)
    >>> board.layer_map
    LayerMap([(1, 3), (2, 5)], name='custom')
    """
    return MappingBoard(student_layers, teacher_layers, similarity, start, widths, heads, batch, tokens)
