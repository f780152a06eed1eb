"""Texts beside each other, and a draft's passes: what is marked, counted and refused."""

import pytest

from fakit import figures as draw
from fakit.evaluation import aligned

REFERENCE = "the house"


def marks(figure) -> dict[str, list[tuple[float, float]]]:
    """kind → where it is marked."""
    found = {trace.name: zip(trace.x, trace.y, strict=True) for trace in figure.plotly.data if trace.mode == "markers"}
    return {name: [place for place in places if place[0] is not None] for name, places in found.items()}


def test_what_differs_is_marked_in_its_row():
    figure = draw.texts_beside(
        REFERENCE, {"teacher": aligned("the house", REFERENCE), "student": aligned("tbe hhose", REFERENCE)}
    )
    assert marks(figure) == {"changed": [(1, -2)], "added": [(5, -2)], "missing": [(7, -2)]}
    assert figure.plotly.layout.yaxis.ticktext == ("reference", "teacher", "student")
    assert figure.summary == (
        "Beside ‘the house’: teacher has 0 differences; student has 1 changed, 1 added, 1 missing."
    )


def test_a_long_text_goes_on_below():
    text = "a" * 70
    figure = draw.texts_beside(text, {"student": aligned(text[:-1] + "b", text)}, {"student": "CER 1%"})
    assert marks(figure)["changed"] == [(5, -4)]  # two rows, an empty one, the reference's second line
    assert figure.plotly.layout.yaxis.ticktext == ("reference", "reference", "student CER 1%", "student")


def test_a_text_beside_another_reference_is_refused():
    with pytest.raises(ValueError, match="student stands beside 'a house'"):
        draw.texts_beside(REFERENCE, {"student": aligned("the house", "a house")})
    with pytest.raises(ValueError, match="texts_beside"):
        draw.texts_beside(REFERENCE, {})


def bars(figure) -> dict[str, list[int]]:
    return {trace.name: [x for x in trace.x if x is not None] for trace in figure.plotly.data if trace.type == "bar"}


def test_who_writes_which_token():
    tokens, proposed = list("abcdef"), list("abxdef")
    figure = draw.draft_passes(tokens, proposed, [0.5] * 6, [3, 3], 2, cost=0.5)  # γ = 2: two and the teacher's own
    assert bars(figure) == {"the draft's, kept": [0, 1, 3, 4], "the teacher's own": [2, 5]}
    assert all(trace.width < 1 for trace in figure.plotly.data if trace.type == "bar")  # no bar covers its neighbors
    assert "6 tokens in 2 passes, 3.00 a pass; 4 are the draft's" in figure.summary
    assert "costs 0.50 of a teacher's: 1.50 times as fast" in figure.summary  # 3 ÷ (1 + 2 · 0.5)
    # γ = 4: a text that ends with what the draft proposed needs no token of the teacher's there
    figure = draw.draft_passes(tokens, proposed, [0.5] * 6, [3, 3], 4)
    assert bars(figure) == {"the draft's, kept": [0, 1, 3, 4, 5], "the teacher's own": [2]}
    assert [trace.text for trace in figure.plotly.data if trace.type == "scatter"] == [("x",)]
    assert [shape.x0 for shape in figure.plotly.layout.shapes] == [2.5]


@pytest.mark.parametrize(
    ("proposed", "passes", "ahead", "message"),
    [
        ("ab", [3], 2, "3 tokens, 2 proposed"),
        ("abc", [2], 2, "passes that give 2"),
        ("abc", [3], 1, "a pass gives 1 to 2 tokens"),
        ("abc", [0, 3], 2, "a pass gives 1 to 3 tokens"),
    ],
)
def test_passes_that_fit_no_text_are_refused(proposed, passes, ahead, message):
    with pytest.raises(ValueError, match=message):
        draw.draft_passes(list("abc"), list(proposed), [0.5] * 3, passes, ahead)


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        draw.draft_passes([], [], [], [], 2)
