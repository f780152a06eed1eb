"""The gallery of layer maps: every pair is a link between the right two points."""

import pytest

from fakit.figures import layer_map_gallery

MAPS = {"uniform": [(1, 2), (2, 4), (3, 6)], "none": [], "reverse": [(3, 2), (1, 6)]}


def test_each_link_joins_its_two_layers():
    figure = layer_map_gallery(MAPS, 3, 6).plotly
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert (len(lines), len(points)) == (2, 6)  # `none` has no link
    for line, (name, teacher, student) in zip(
        lines, [("uniform", *points[0:2]), ("reverse", *points[4:6])], strict=True
    ):
        found = []
        for i in range(0, len(line.x), 3):
            assert (line.y[i], line.y[i + 1]) == (student.y[0], teacher.y[0]) and line.x[i + 2] is None
            found.append((student.x.index(line.x[i]), teacher.x.index(line.x[i + 1])))
        assert found == MAPS[name]


def test_the_sentence_lists_every_map():
    assert layer_map_gallery(MAPS, 3, 6).summary == (
        "3 maps of 3 student on 6 teacher layers. uniform: S1←T2, S2←T4, S3←T6; none: no layer is mapped; reverse: "
        "S3←T2, S1←T6."
    )


def test_a_second_row_is_as_high_as_the_first():
    one, two = (layer_map_gallery({key: [(1, 1)] for key in "abcdefgh"[:n]}, 1, 2).plotly.layout for n in (4, 5))
    assert two.height - one.height == 150
    assert (two.yaxis.range[1] - two.yaxis.range[0]) - (one.yaxis.range[1] - one.yaxis.range[0]) == pytest.approx(1)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"map 'mine': pair \(S1, T7\) does not exist"):
        layer_map_gallery({"mine": [(1, 7)]}, 3, 6)
    with pytest.raises(ValueError, match="layer_map_gallery"):
        layer_map_gallery({}, 3, 6)


def test_layers_are_numbered_as_far_as_there_is_room():
    def numbers(letter, *depths):
        notes = layer_map_gallery({"a": [(1, 1)]}, *depths).plotly.layout.annotations
        return [note.text for note in notes if note.text[:1] == letter]

    assert numbers("S", 2, 6) == ["S0", "S1", "S2"] and len(numbers("T", 2, 6)) == 7
    assert numbers("T", 12, 24) == ["T0", "T5", "T10", "T15", "T20"]
