"""The memory planner without a browser: controls plan anew, sliders follow the teacher,
what cannot be planned is said.
"""

import pytest
from transformers import BertConfig

from fakit.planner import plan
from fakit.widgets import memory_planner


@pytest.fixture
def planner():
    return memory_planner("gpt2", layers=2, batch=2, seq=32, memory="T4")


def test_it_starts_from_what_is_asked(planner):
    assert planner.teacher.value == "gpt2" and planner.layers.value == 2 and planner.card.value == "T4"
    expected = plan("gpt2", 2, 2, 32, memory="T4")
    assert planner.plan.peak == expected.peak and planner.sentence.startswith(expected.verdict)
    assert planner.sentence in planner._sentence.value.replace("&#x27;", "'")


@pytest.mark.parametrize(
    ("control", "value", "setting"),
    [
        ("batch", 8, {"batch": 8}),
        ("seq", 128, {"seq": 128}),
        ("layers", 3, {"layers": 3}),
        ("width", 384, {"width": 384}),
        ("form", "4-bit", {"quantize": "4bit"}),
        ("checkpointing", True, {"checkpointing": True}),
    ],
)
def test_each_control_plans_anew(planner, control, value, setting):
    before = planner.figure
    getattr(planner, control).value = value
    ((name, expected),) = setting.items()
    assert getattr(planner.plan.setup, name) == expected
    assert planner.figure is not before
    assert planner.plan.verdict in planner.sentence


def test_another_card_is_another_limit_and_no_new_step(planner):
    step = planner.plan.step
    planner.card.value = "A100 80GB"
    assert planner.plan.step is step and planner.plan.limit == 80e9
    assert "A100 80GB" in planner.sentence


def test_sliders_end_where_the_teacher_ends(planner):
    drawn = []
    planner._picture.observe(drawn.append, "outputs")
    planner.teacher.value = "all-MiniLM-L6-v2"
    assert planner.layers.max == 6 and [value for _, value in planner.width.options] == [96, 192, 288, 0]
    assert planner.plan.step.depths == {"teacher": 6, "student": 3}
    assert len(drawn) == 1  # the sliders that moved with it drew nothing


def test_what_would_save_memory_is_a_bar_each(planner):
    planner.changes.value = True
    names = [name for name, _ in planner.plan.changes]
    assert list(planner.figure.plotly.data[0].y) == [*names[::-1], "as asked"]
    assert f"Largest batch that fits at 32 tokens: {planner.plan.largest_batch}" in planner.sentence


def test_a_row_longer_than_the_positions_is_said_and_the_picture_stays(planner):
    before = planner.figure
    planner.seq.value = 4096
    assert planner.plan is None and planner.figure is before
    assert "No plan: 4096 tokens a row, and openai-community/gpt2 has 1024 positions" in planner.sentence
    planner.seq.value = 32
    assert planner.plan.fits


def test_a_failure_of_the_step_is_shown_not_swallowed(planner, monkeypatch):
    def broken(setup):
        raise RuntimeError("no meta kernel")

    monkeypatch.setattr("fakit.planner.planning.simulate", broken)
    planner.batch.value = 4
    assert planner.plan is None and "does not run: RuntimeError: no meta kernel" in planner.sentence


def test_a_configuration_of_ones_own():
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100
    )
    panel = memory_planner(config, batch=1, seq=32)
    assert panel.teacher.value == "Bert" and panel.plan.step.depths == {"teacher": 2, "student": 1}


def test_it_is_complete_by_keyboard_and_shows_itself_without_a_kernel(planner):
    for control in (
        planner.teacher,
        planner.form,
        planner.card,
        planner.layers,
        planner.width,
        planner.batch,
        planner.seq,
    ):
        assert control.description
    assert not any(c.continuous_update for c in (planner.layers, planner.width, planner.batch, planner.seq))
    bundle = planner._repr_mimebundle_()
    assert "<svg" in bundle["image/svg+xml"] and bundle["text/plain"].startswith("Memory at the peak")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(batch=3), "offers batch 1, 2, 4"),
        (dict(memory="abacus"), "offers memory RTX 3060"),
        (dict(quantize="2bit"), "offers quantize None, 8bit"),
        (dict(seq=1024 * 1024), "offers seq"),
        (dict(seq=4096), "has 1024 positions"),
    ],
)
def test_a_start_that_is_not_offered_is_refused(asked, said):
    with pytest.raises(ValueError, match=said):
        memory_planner("gpt2", layers=2, **asked)
