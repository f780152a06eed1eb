"""What a terminal shows of a run: one line with steps, loss by term and time left; a log file gets plain lines."""

import io
import re

import pytest

from fakit.training.progress import ProgressBar
from tests.training.runs import At, data, make, parts


class Terminal(io.StringIO):
    def isatty(self):
        return True


def trained(folder, file, callbacks=(), **changes):
    """Two steps of a toy run and its bar, which writes to `file`."""
    made = parts()
    bar = ProgressBar(made[2].weights, file)
    trainer = make(folder, made=made, callbacks=[bar, *callbacks], max_steps=2, **changes)
    return bar, trainer


def test_on_a_terminal_it_is_one_line_that_ends_full(tmp_path):
    file = Terminal()
    _, trainer = trained(tmp_path, file)
    trainer.train()
    assert file.getvalue().count("\n") == 1  # the end of the line, when training ends
    last = file.getvalue().rstrip("\n").split("\r")[-1]
    (logged,) = [row for row in trainer.state.log_history if row["step"] == 2 and "loss" in row]
    terms = ", ".join(f"{name} {logged[name]:.3g}" for name in ("features", "attention", "outputs", "task"))
    assert re.search(r"^training 2/2 \|.*\| 00:00 left, ", last)
    assert last.rstrip().endswith(f"loss {logged['loss']:.3g} ({terms})")


def test_elsewhere_it_is_a_plain_line_a_log(tmp_path):
    file = io.StringIO()
    _, trainer = trained(tmp_path, file)
    trainer.train()
    lines = file.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in file.getvalue()
    assert re.match(r"step 1 of 2, \d\d:\d\d left, loss [\d.]+ \(features [\d.]+, attention ", lines[0])
    assert lines[1].startswith("step 2 of 2, 00:00 left, loss ")


def test_validation_is_named_and_a_stopped_run_ends_its_line(tmp_path):
    def stop(objective):
        raise KeyboardInterrupt

    made, file = parts(), Terminal()
    bar = ProgressBar(made[2].weights, file)
    trainer = make(
        tmp_path,
        made=made,
        callbacks=[bar, At(2, made[2], stop)],
        evaluated=data(False),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    bar.close()
    bar.close()  # twice does no harm
    assert file.getvalue().endswith("\n") and "evaluating 1/3" in file.getvalue()
    assert re.search(r"loss [\d.]+ \(.*\), validation loss [\d.]+", file.getvalue())
