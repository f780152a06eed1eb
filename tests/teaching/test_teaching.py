"""Setup and exercises: seeds, choices by profile, and answers that are empty, wrong or right."""

import doctest
import random
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import plotly.io as pio
import pytest
import torch

import fakit.teaching.exercises
from fakit.teaching import Exercise, Session, is_empty, predict, say, setup


def test_setup_seeds_everything_and_sets_the_template():
    def draws():
        setup(seed=7, device="cpu")
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    before = pio.templates.default
    try:
        first, second = draws(), draws()
        assert first == second
        setup(seed=8, device="cpu")
        assert torch.rand(3).tolist() != first[2]
        assert pio.templates.default == "fakit"
    finally:
        pio.templates.default = before


def test_setup_quiets_the_libraries_and_not_their_errors():
    code = """
import warnings
from fakit.teaching import setup
setup(device="cpu")
import datasets, transformers
print(transformers.logging.get_verbosity() == transformers.logging.ERROR, datasets.are_progress_bars_disabled())
model = transformers.BertModel(transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9))
model.is_gradient_checkpointing
warnings.warn("something else", FutureWarning)
"""
    # a process of its own: what it changes is global
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
    assert "something else" in done.stderr and "deprecated" not in done.stderr


def test_session_shows_what_it_runs_on():
    session = setup("workshop", seed=3, device="cpu", model="some/model")
    assert (session.device, session.profile, session.seed, session.model) == ("cpu", "workshop", 3, "some/model")
    html = session._repr_html_()
    for text in (torch.__version__, "workshop", "some/model", "transformers", "threads", "GB"):
        assert text in html and text in str(session)


@pytest.mark.parametrize(
    ("profile", "values", "expected"),
    [
        ("quick", {"quick": 1, "workshop": 2, "full": 3}, 1),
        ("workshop", {"quick": 1, "workshop": 2, "full": 3}, 2),
        ("full", {"quick": 1, "workshop": 2, "full": 3}, 3),
        ("full", {"quick": 1, "workshop": 2}, 2),
        ("full", {"quick": 1}, 1),
        ("workshop", {"quick": 1, "full": 3}, 1),
        ("workshop", {"quick": 5, "workshop": 0}, 0),
    ],
)
def test_pick_takes_the_profile_or_the_next_smaller(profile, values, expected):
    assert Session(profile, 0, "cpu", None, {}).pick(**values) == expected


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"profile": "fast"}, "'fast' is not known: use one of quick, workshop, full"),
        ({"seed": -1}, "SEED = -1"),
        ({"seed": 1.5}, r"SEED = 1\.5"),
        ({"device": "gpu"}, "'gpu' is no device"),
        ({"device": f"cuda:{torch.cuda.device_count() + 3}"}, "this machine has"),
    ],
)
def test_setup_refuses_what_it_cannot_do(ask, message):
    with pytest.raises(ValueError, match=message):
        setup(**ask)


def stub_ellipsis(x): ...


def stub_docstring(x):
    """Return the square of x."""


def stub_pass(x):
    pass


def stub_none(x):
    """Return the square of x."""
    return None


def stub_raises(x):
    raise NotImplementedError("write me")


def square(x):
    """Return the square of x."""
    return x * x


def twice(x):
    return 2 * x


def _check(function):
    if function(3) == 6:
        return "your value at x = 3 is twice x: multiply x by itself"
    return function(3) == 9


def test_stubs_are_told_from_answers():
    for stub in (None, ..., "", "  ", [None, ...], stub_ellipsis, stub_docstring, stub_pass, stub_none, stub_raises):
        assert is_empty(stub), stub
    for answer in (0, False, "a", [0], [], square, twice, len, torch.zeros(2), lambda x: x):
        assert not is_empty(answer), answer


def test_exercise_answers_specifically():
    exercise = Exercise("Square x.", _check, hints=["multiply", "x times x", "`x * x`"])
    for stub in (None, ..., stub_ellipsis, stub_none, stub_raises):
        result = exercise.check(stub)
        assert result.status == "not done yet" and not result
    wrong = exercise.check(twice)
    assert wrong.status == "not right" and not wrong and "twice x" in wrong.message
    assert "first hint" in exercise.check(lambda x: 0).message
    right = exercise.check(square)
    assert right and right.status == "passes"
    assert (
        "✓ passes" in right._repr_markdown_()
        and "twice x" in wrong._repr_markdown_()
        and "not done yet" in repr(exercise.check())
    )


def test_a_check_that_raises_is_shown_and_not_thrown():
    exercise = Exercise("Square x.", _check)
    result = exercise.check(lambda x: 1 / 0)
    assert result.status == "not right" and "ZeroDivisionError" in result.message
    with pytest.raises(TypeError, match="returned int"):
        Exercise("?", lambda answer: 3).check("a")


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))


def test_hints_are_collapsed_and_in_order():
    assert Exercise("What?", bool, number="02.3")._repr_markdown_() == "**Exercise 02.3.** What?"
    assert repr(Exercise("What?", bool)) == "Exercise: What?"
    timed = Exercise("What?", bool, number="02.3", difficulty=2, minutes=10)._repr_markdown_()
    assert timed == "**Exercise 02.3.** <span title='difficulty'>●●○</span> · 10 minutes<br> What?"
    with pytest.raises(ValueError, match="difficulty = 4: 1, 2 or 3"):
        Exercise("?", bool, difficulty=4)
    text = Exercise("?", bool, hints=["one", "two", "three"]).hints()._repr_markdown_()
    tags = _Tags()
    tags.feed(text)
    details = [attributes for tag, attributes in tags.seen if tag == "details"]
    assert len(details) == 3 and all("open" not in attributes for attributes in details)
    assert text.index("one") < text.index("two") < text.index("three") and "The solution" in text
    with pytest.raises(ValueError, match="up to three hints"):
        Exercise("?", bool, hints=["1", "2", "3", "4"])


def test_prediction_is_revealed_with_what_the_reader_said():
    guess = predict("Which is larger?", ["the teacher", "the student"])
    assert "a) the teacher" in guess._repr_markdown_() and "Predict first" in guess._repr_markdown_()
    assert "You said b) the student." in repr(guess.reveal("a", mine="b"))
    assert repr(guess.reveal("a", because="it has more layers", mine="a")).endswith("it has more layers. As you said.")
    assert "said" not in repr(guess.reveal("a", mine=None))
    with pytest.raises(ValueError, match="the options are a, b"):
        guess.reveal("c")
    with pytest.raises(ValueError, match="at least two"):
        predict("?", ["only"])


def test_docstring_examples_run():
    outcome = doctest.testmod(fakit.teaching.exercises)
    assert outcome.failed == 0 and outcome.attempted >= 4


def test_a_computed_sentence(capsys):
    say(
        """
        {names} gain **{gain:+.1f}**;
        {others} do not.
    """,
        names=("a", "b", "c"),
        gain=1.26,
        others=[],
    )
    assert capsys.readouterr().out == "a, b and c gain **+1.3**;\nnone do not.\n"
    with pytest.raises(KeyError, match="gain"):
        say("{gain}", loss=1)


def test_a_session_loads_task_teacher_and_tokenizer(tmp_path):
    session = setup(seed=3, model="embedded")
    task, teacher, tokenizer = session.load("scans", labels=20)
    assert len(task.train) == 20 and not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    teacher.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = replace(session, model=str(tmp_path)).load("scans", labels=20)
    assert again.task.train[:] == task.train[:]
    assert torch.equal(again.teacher.lm_head.weight, teacher.lm_head.weight)
    assert again.tokenizer("abc")["input_ids"] == tokenizer("abc")["input_ids"]
