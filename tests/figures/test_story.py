"""The story picture: a term looks as it does in every other figure."""

from fakit.figures import distillation_story, loss_curves
from fakit.figures.story import TERMS


def test_a_term_has_the_color_and_dash_of_its_curve():
    links = {
        (s.line.color, s.line.dash) for s in distillation_story([(1, 3)], 1, 3).plotly.layout.shapes if s.type == "line"
    }
    curves = loss_curves([{"step": step, **dict.fromkeys(TERMS, 1.0)} for step in (1, 2)]).plotly.data
    assert {trace.name for trace in curves} == set(TERMS)
    assert {(trace.line.color, trace.line.dash) for trace in curves} <= links


def test_two_terms_of_one_pair_do_not_hide_each_other():
    def links(terms):
        shapes = distillation_story([(1, 2), (2, 4)], 2, 4, dict.fromkeys(terms, "states")).plotly.layout.shapes
        return [(s.x0, s.x1) for s in shapes if s.type == "line" and s.y0 != s.y1]

    assert len(set(links(["features", "attention"]))) == 4 and len(set(links(["features"]))) == 2
