"""The attention viewer as one HTML file: the same ESM and CSS, the maps of one sequence, and no kernel."""

from __future__ import annotations

import base64
import zlib
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Protocol

from fakit.files import write_whole
from fakit.widgets.attention.source import LEVELS, encode
from fakit.widgets.panel import script_json

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
HOST = HERE / "page.js"  # answers in the page what Python answers in a notebook
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { margin: 16px auto; max-width: 1100px; padding: 0 12px; background: Canvas; color: CanvasText; }
$css</style>
</head>
<body>
<main id="viewer"><noscript>$sentence</noscript></main>
<script type="application/json" id="state">$state</script>
<script type="module">
$esm
$host</script>
</body>
</html>
""")
# How maps are written, from the best on: (a scale a head, sinks left out too, levels of a value). The coarsest is for
# noise: a row of attention sums to 1, and its cells hold few levels.
WAYS = ((True, True, LEVELS), (False, True, LEVELS), *((False, False, LEVELS >> k) for k in range(7)))
COPIED = ("spec", "shown", "sequence", "teacher_layer", "student_layer", "teacher_head", "student_head", "cursor")
COPIED += ("linked", "without_sinks", "view")


class Viewer(Protocol):
    """What is written: the traits of an `AttentionViewer` and the maps that can be chosen in it."""

    spec: dict[str, Any]
    shown: dict[str, Any]
    sequence: int
    student_layer: int | None
    teacher_layer: int | None
    without_sinks: bool
    sentence: str

    @property
    def sides(self) -> list[str]: ...

    def matched(self, student_layer: int, teacher_layer: int) -> list[tuple[int, int, float]]: ...

    def page(self, side: str, layer: int, view: str, without_sinks: bool) -> tuple[Tensor, Tensor]: ...


def write_page(viewer: Viewer, path: Path, limit: int) -> Path:
    """Write `viewer` to `path`; see `AttentionViewer.to_html`."""
    if path.suffix != ".html":
        raise ValueError(f"cannot save an attention viewer as {path.suffix or path.name!r}: use .html")
    state = {name: getattr(viewer, name) for name in COPIED}
    state["matches"] = {f"{s}/{t}": viewer.matched(s, t) for s, t in _pairs(viewer)}
    for side in viewer.sides:
        state[f"{side}_thumbs"] = _packed(getattr(viewer, f"{side}_thumbs"))
    maps, sizes = _maps(viewer), []
    for fine, both, levels in WAYS:
        pages = {
            f"{side}/{view}/{layer}/{left_out}".lower(): _packed(encode(*page, fine, levels))
            for (side, view, layer, left_out), page in maps.items()
            if both or left_out == viewer.without_sinks
        }
        html = _html(viewer, state | {"pages": pages, "rounded": 0 if fine else 0.5 / levels}).encode()
        if len(html) <= limit:
            write_whole(path, html)
            return path
        sizes.append(len(html))
    raise ValueError(
        f"the maps of sequence {viewer.sequence} ({len(viewer.shown['tokens'])} tokens) take {min(sizes):,} bytes, the "
        f"limit is {limit:,}: give the viewer fewer layers or a shorter sequence, or raise limit"
    )


def _pairs(viewer: Viewer) -> list[tuple[int, int]]:
    """The layer pairs whose matching the file holds: those of the map, and the one shown."""
    if viewer.student_layer is None:
        return []
    return sorted({*map(tuple, viewer.spec["pairs"]), (viewer.student_layer, viewer.teacher_layer)})


def _maps(viewer: Viewer) -> dict[tuple[str, str, int, bool], tuple[Tensor, Tensor]]:
    """(side, view, layer, sinks left out) → maps and visible cells: all that can be chosen in this sequence."""
    views = ["heads"] if viewer.spec["no_rollout"] else ["heads", "rollout"]
    return {
        (side, view, layer, left_out): viewer.page(side, layer, view, left_out)
        for side in viewer.sides
        for layer, _, _ in viewer.spec[side]["layers"]
        for view in views
        for left_out in (False, True)
    }


def _packed(data: bytes) -> str:
    """Deflated, in base 85: by runs, or by the frequency of bytes alone,
    which is shorter where a head looks everywhere.

    Both are many times as fast as the search for longer repeats, which attention maps hardly have.
    """
    ways = [zlib.compressobj(9, strategy=strategy) for strategy in (zlib.Z_RLE, zlib.Z_HUFFMAN_ONLY)]
    return base64.b85encode(min((way.compress(data) + way.flush() for way in ways), key=len)).decode()


def _html(viewer: Viewer, state: dict) -> str:
    title = "Attention of " + " and ".join(viewer.sides)
    return PAGE.substitute(
        title=escape(title),
        css=(HERE / "viewer.css").read_text(encoding="utf-8"),
        sentence=escape(f"{title}. {viewer.sentence}"),
        state=script_json(state),
        esm=(HERE / "viewer.js").read_text(encoding="utf-8"),
        host=HOST.read_text(encoding="utf-8"),
    )
