"""The static twin draws what the plotly figure says: places, lengths, ranges, colors; and refuses the rest by name."""

import io

import matplotlib.image
import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.colors import to_hex

from fakit.figures import Figure
from fakit.figures.drawing import canvas, hatch
from fakit.figures.static import axes as static
from fakit.figures.static.traces import plain, rgba


def twin(*traces, **layout):
    return static.Twin(canvas("A title", **layout).add_traces(traces), np.zeros(4))


def only_axes(drawn):
    (axes,) = drawn.axes.values()
    return axes


def test_lines_markers_and_gaps_are_where_the_data_is():
    axes = only_axes(
        twin(go.Scatter(x=[1, 2, None, 4], y=[3.0, 1.0, None, 2.0], mode="lines+markers", line={"color": "#1F83C4"}))
    )
    line = axes.lines[0]
    np.testing.assert_array_equal(line.get_xydata(), [[1, 3], [2, 1], [np.nan, np.nan], [4, 2]])
    assert to_hex(line.get_color()).upper() == "#1F83C4"
    points = axes.collections[0].get_offsets()
    np.testing.assert_array_equal(points.data[[0, 1, 3]], [[1, 3], [2, 1], [4, 2]])


def test_error_bars_span_the_interval():
    errors = {"array": [0.5, 1.0], "arrayminus": [0.25, 2.0]}
    axes = only_axes(twin(go.Scatter(x=[0, 1], y=[1, 5], mode="markers", error_y=errors)))
    segments = next(c for c in axes.collections if hasattr(c, "get_segments")).get_segments()
    np.testing.assert_allclose(segments, [[[0, 0.75], [0, 1.5]], [[1, 3.0], [1, 6.0]]])


def test_grouped_and_stacked_bars():
    bars = [
        go.Bar(x=["a", "b"], y=[1, 2], name="one"),
        go.Bar(x=["a", "b"], y=[3, 4], name="two", marker={"pattern": {"shape": "/"}}),
    ]
    grouped = only_axes(twin(*bars, barmode="group", bargap=0.2))
    drawn = [p for p in grouped.patches if p.get_hatch() is None]
    assert [p.get_height() for p in drawn] == [1, 2, 3, 4]
    centers = [p.get_x() + p.get_width() / 2 for p in drawn]
    np.testing.assert_allclose(centers, [-0.2, 0.8, 0.2, 1.2])
    stacked = only_axes(twin(*bars, barmode="stack"))
    assert [(p.get_y(), p.get_height()) for p in stacked.patches if p.get_hatch() is None] == [
        (0, 1),
        (0, 2),
        (1, 3),
        (2, 4),
    ]
    assert sum(p.get_hatch() is not None for p in stacked.patches) == 2
    assert [label.get_text() for label in stacked.get_xticklabels()] == ["a", "b"]


def test_axes_ranges_logarithms_and_panels():
    traces = [
        go.Scatter(x=[1, 10], y=[0, 1], mode="lines"),
        go.Scatter(x=[1, 2], y=[5, 6], mode="lines", xaxis="x2", yaxis="y2"),
    ]
    layout = {
        "xaxis": {"type": "log", "range": (0, 2), "domain": (0, 0.4)},
        "xaxis2": {"domain": (0.6, 1), "range": (3, 1)},
        "yaxis2": {"anchor": "x2", "range": (0, 10)},
        "margin": {"l": 70, "r": 50, "t": 80, "b": 60},
        "size": (720, 360),
    }
    drawn = twin(*traces, **layout)
    first, second = drawn.axes["x", "y"], drawn.axes["x2", "y2"]
    assert first.get_xlim() == pytest.approx((1, 100)) and first.get_xscale() == "log"
    assert second.get_xlim() == (3, 1) and second.get_ylim() == (0, 10)
    box = second.get_position()
    assert box.x0 * 720 == pytest.approx(70 + 0.6 * 600) and box.y0 * 360 == pytest.approx(60)
    assert box.width * 720 == pytest.approx(240) and box.height * 360 == pytest.approx(220)


def test_heatmap_cells_have_their_color_and_nan_is_transparent():
    z = [[0.0, 1.0], [0.5, None]]
    scale = [[0, "#000000"], [1, "#FFFFFF"]]
    trace = go.Heatmap(
        z=z, zmin=0, zmax=1, colorscale=scale, showscale=False, text=[["a", "b"], ["c", "d"]], texttemplate="%{text}"
    )
    axes = only_axes(twin(trace))
    image = axes.images[0]
    colors = image.to_rgba(image.get_array())
    np.testing.assert_allclose(colors[0, 0], [0, 0, 0, 1])
    np.testing.assert_allclose(colors[0, 1], [1, 1, 1, 1])
    np.testing.assert_allclose(colors[1, 0, :3], 0.5, atol=0.01)
    assert colors[1, 1, 3] == 0
    ink = {text.get_text(): to_hex(text.get_color()) for text in axes.texts}
    assert ink["a"] == "#ffffff" and ink["b"] == "#000000"
    assert image.get_extent() == [-0.5, 1.5, -0.5, 1.5]


def test_a_margin_grows_where_a_label_would_be_cut():
    figure = canvas("T", margin={"l": 20}).add_bar(y=["a label of quite some length"], x=[1], orientation="h")
    assert static.Twin(figure, np.zeros(4)).overflow()[0] > 50
    drawn = static._draw(figure)
    assert drawn.get_tightbbox(drawn.canvas.get_renderer()).x0 * 96 >= -1


def test_shapes_and_annotations_stand_at_their_coordinates():
    figure = canvas("T").add_scatter(x=[0, 10], y=[0, 10], mode="lines")
    figure.update_xaxes(range=(0, 10)).update_yaxes(range=(0, 10))
    figure.add_shape(type="rect", x0=2, x1=4, y0=0, y1=1, yref="y domain", line={"width": 2})
    figure.add_annotation(text="<b>here</b>", x=5, y=5, showarrow=False, xshift=30, yshift=-12)
    drawn = static.Twin(figure, np.zeros(4))
    axes = only_axes(drawn)
    rectangle = drawn.canvas.patches[-1] if len(drawn.canvas.patches) else drawn.canvas.artists[-1]
    corners = rectangle.get_window_extent().extents
    np.testing.assert_allclose(corners[[0, 2]], axes.transData.transform([[2, 0], [4, 0]])[:, 0])
    np.testing.assert_allclose(corners[[1, 3]], axes.get_window_extent().extents[[1, 3]])
    text = next(text for text in drawn.canvas.texts if text.get_text() == "here")
    place = text.get_transform().transform(text.get_position())
    np.testing.assert_allclose(place, axes.transData.transform([5, 5]) + np.array([30, -12]))
    assert text.get_weight() == "bold"


def test_hatching_covers_the_cells_and_nothing_else():
    rng = np.random.default_rng(0)
    for shape in ((3, 7), (5, 2), (40, 40)):
        cells = rng.random(shape) < 0.4
        strokes = hatch(cells)
        points = np.array([[np.nan if v is None else v for v in axis] for axis in (strokes.x, strokes.y)], float).T
        starts, ends = points[0::3], points[1::3]
        covered = np.zeros(shape, bool)
        for t in np.linspace(0.001, 0.999, 400):
            place = np.floor(starts + t * (ends - starts) + 0.5).astype(int)
            inside = cells[place[:, 1], place[:, 0]]
            assert inside.all()
            covered[place[:, 1], place[:, 0]] = True
        if max(shape) < 24:
            np.testing.assert_array_equal(covered, cells)
    assert hatch(np.zeros((2, 2), bool)) is None


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        (go.Figure(go.Pie(values=[1, 2], name="shares")), "found 'pie' .trace shares."),
        (go.Figure(go.Scatter(x=[0], y=[0], fill="tozeroy", name="area")), "'area' has 'tozeroy'"),
        (go.Figure(go.Heatmap(z=[[1]])), "leaves them to plotly"),
        (go.Figure(go.Scatter(x=[0], y=[0], yaxis="y2"), {"yaxis2": {"overlaying": "y"}}), "no overlaying axes"),
        (go.Figure(go.Scatter(x=[0], y=[0])).add_annotation(text="look", x=0, y=0), "no arrows"),
        (go.Figure(go.Scatter(x=[0], y=[0])).add_shape(type="circle", x0=0, x1=1, y0=0, y1=1), "found 'circle'"),
    ],
)
def test_what_the_twin_cannot_draw_is_named(figure, message):
    with pytest.raises(ValueError, match=message):
        static.to_svg(figure)


def test_saving_in_each_format(tmp_path):
    figure = Figure(
        canvas("Saved").add_scatter(x=[0, 1], y=[0, 1], mode="lines"), "A line from 0 to 1.", "A caption below."
    )
    assert figure.save(tmp_path / "a.svg").read_text().startswith("<svg")
    png = matplotlib.image.imread(io.BytesIO(figure.save(tmp_path / "a.png").read_bytes()))
    assert png.shape == (2 * figure.plotly.layout.height, 2 * 720, 4) and png[0, 0, 3] == 0
    page = figure.save(tmp_path / "a.html").read_text()
    assert "Plotly.newPlot" in page and '<script src="http' not in page.replace("'", '"')
    with pytest.raises(ValueError, match=r"'\.pdf': use \.svg"):
        figure.save(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match="needs a summary"):
        Figure(go.Figure(), " ")


def test_a_caption_makes_room_for_itself():
    words = "A caption that is long enough to need more than a single line below the picture it belongs to. " * 2
    figure = Figure(canvas("T").add_scatter(x=[0, 1], y=[0, 1], mode="lines"), "1.", words)
    assert figure.plotly.layout.height == 360 + figure.plotly.layout.margin.b - 56
    note = figure.plotly.layout.annotations[-1]
    assert note.text.replace("<br>", " ") == words.strip() and "<br>" in note.text


def test_text_and_colors_of_plotly_are_understood():
    assert plain("<b>a</b> &lt; b<br>c") == "a < b\nc"
    assert (
        rgba("rgba(255, 0, 0, 0.5)") == (1, 0, 0, 0.5)
        and rgba("#00FF00") == (0, 1, 0, 1)
        and rgba("rgb(0,0,255)") == (0, 0, 1, 1)
    )
