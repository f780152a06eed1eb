"""Layer map: choose a strategy, see which teacher layer would teach which student layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import numpy as np

from fakit.figures import Figure
from fakit.figures import layer_map as draw_layer_map
from fakit.layer_maps import LayerMap
from fakit.widgets.panel import LABEL, WIDE, Panel

STRATEGIES: dict[str, Callable[[int, int], LayerMap]] = {
    "uniform": LayerMap.uniform,
    "last": LayerMap.last,
    "first": LayerMap.first,
    "skip": LayerMap.skip,
    "reverse": LayerMap.reverse,
    "all_to_one": LayerMap.all_to_one,
    "random": LayerMap.random,
    "none": LayerMap.none,
}


class LayerMapChooser(Panel):
    """See `layer_map_chooser`.

    Attributes:
        layer_map: the chosen `LayerMap`.
        chooser: the strategy; `chooser.chooser.value = "reverse"` chooses from code.
        target: the one teacher layer of `all_to_one`.
    """

    def __init__(self, student_layers: int, teacher_layers: int, similarity: Any = None, strategy: str = "uniform"):
        self._depths = (student_layers, teacher_layers)
        self._similarity = None if similarity is None else np.asarray(similarity, dtype=float)
        maps: dict[str, LayerMap] = {}
        refused: dict[str, str] = {}
        for name, build in STRATEGIES.items():
            try:
                maps[name] = build(student_layers, teacher_layers)
            except ValueError as error:  # `skip` for one layer, `last` for a student deeper than its teacher
                refused[name] = str(error)
        if "uniform" not in maps:
            raise ValueError(refused["uniform"])
        if self._similarity is not None:
            expected = (student_layers + 1, teacher_layers + 1)
            if self._similarity.shape != expected:
                raise ValueError(
                    f"similarity has shape {self._similarity.shape}; a student of {student_layers} and a teacher of "
                    f"{teacher_layers} layers need {expected}: embeddings are layer 0"
                )
            for method in ("monotone", "assignment"):
                found = LayerMap.from_similarity(self._similarity, method)
                maps[found.name] = found
        if strategy not in maps:
            raise ValueError(
                f"strategy {strategy!r} is not offered; choose one of {', '.join(maps)}."
                + (f" {refused[strategy]}" if strategy in refused else "")
            )
        self._maps = maps
        # buttons, not a drop-down list: JupyterLab keeps the arrow keys of a list for itself; these take Tab and Space
        self.chooser = widgets.ToggleButtons(
            options=list(maps),
            value=strategy,
            description="strategy",
            style={"description_width": "70px", "button_width": "auto"},
        )
        self.target = widgets.IntSlider(
            value=teacher_layers,
            min=0,
            max=teacher_layers,
            description="teacher layer",
            continuous_update=False,
            style=LABEL,
            layout={"width": WIDE},
        )
        super().__init__([self.chooser, self.target])
        self.chooser.observe(self.refresh, "value")
        self.target.observe(self.refresh, "value")

    def draw(self) -> tuple[Figure, str]:
        """The chosen map; sets `layer_map`."""
        name = self.chooser.value
        one = name == "all_to_one"
        self.target.layout.display = None if one else "none"
        self.layer_map = LayerMap.all_to_one(*self._depths, self.target.value) if one else self._maps[name]
        pairs = self.layer_map.pairs
        figure = draw_layer_map(pairs, *self._depths, self._similarity, title=f"Layer map ‘{name}’")
        if not pairs:
            return figure, "No layer is matched: the control for everything the other maps gain."
        parts = [f"{len(pairs)} pairs: " + ", ".join(f"S{s} ← T{t}" for s, t in pairs)]
        parts.append(
            "deeper layers learn from deeper ones" if self.layer_map.is_monotone() else "not in the order of depth"
        )
        if self._similarity is not None:
            mean = np.mean([self._similarity[s, t] for s, t in pairs])
            parts.append(f"mean similarity of the pairs {mean:.2f}")
        return figure, "; ".join(parts) + "."


def layer_map_chooser(
    student_layers: int, teacher_layers: int, similarity: Any = None, strategy: str = "uniform"
) -> LayerMapChooser:
    """Strategies to choose from, and the map that the chosen one makes; `.layer_map` is that map.

    Args:
        student_layers: depth of the student, embeddings not counted.
        teacher_layers: depth of the teacher.
        similarity: (S + 1, T + 1) by layer number, as CKA gives it; adds the two maps made from it, and is written on the links.
        strategy: chosen at the start.

    Raises:
        ValueError: depths below 1, a similarity of another shape, a strategy that these depths do not allow.

    >>> chooser = layer_map_chooser(2, 6)
    >>> chooser.chooser.value = "reverse"
    >>> chooser.layer_map
    LayerMap([(1, 6), (2, 3)], name='reverse')
    """
    return LayerMapChooser(student_layers, teacher_layers, similarity, strategy)
