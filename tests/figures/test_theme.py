"""The visual language holds in both themes, and does not lean on color alone."""

import plotly.io as pio
import pytest

from fakit.figures import theme


@pytest.mark.parametrize("role", [*theme.ROLES, *theme.ARMS.values()], ids=lambda role: role.name)
@pytest.mark.parametrize("page", ["#FFFFFF", "#111111"])
def test_role_colors_show_on_light_and_dark(role, page):
    assert theme.contrast(role.color, page) >= 3


@pytest.mark.parametrize("page", ["#FFFFFF", "#111111"])
def test_text_reads_on_light_and_dark(page):
    assert theme.contrast(theme.TEXT, page) >= 4


def test_contrast_is_the_wcag_ratio():
    assert theme.contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert theme.contrast("#777777", "#FFFFFF") == pytest.approx(4.478, abs=1e-3)


def test_roles_differ_without_color():
    for attribute in ("dash", "symbol", "letter"):
        assert len({getattr(role, attribute) for role in theme.ROLES}) == len(theme.ROLES), attribute
    assert len({role.pattern for role in theme.ROLES}) == len(theme.ROLES)
    assert (theme.TEACHER.color, theme.STUDENT.color) == ("#1F83C4", "#D55E00")


def test_names_find_their_role():
    assert theme.arm("none") is theme.BASELINE and theme.arm("all, equal compute") is theme.ARMS["all"]
    assert theme.model_role("T3") is theme.TEACHER and theme.model_role("student, S1") is theme.STUDENT
    assert theme.model_role("8bit") is theme.EXTRA
    assert theme.layer_names("T", 3) == ["T0", "T1", "T2"]


def test_scales_run_from_zero_to_one_and_differences_are_neutral_in_the_middle():
    for scale in (theme.SIMILARITY, theme.DISTANCE, theme.DIFFERENCE, theme.ramp(theme.TEACHER)):
        stops = [stop for stop, _ in scale]
        assert stops[0] == 0 and stops[-1] == 1 and stops == sorted(stops)
    assert dict(map(tuple, theme.DIFFERENCE))[0.5] == "#F2F2F2"
    assert theme.DISTANCE[0][1] == theme.SIMILARITY[-1][1]


def test_template_is_registered_and_transparent():
    layout = pio.templates["fakit"].layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert layout.font.color == theme.TEXT and layout.font.size >= 12
