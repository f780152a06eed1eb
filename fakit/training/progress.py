"""Where a run stands, for whoever waits at a terminal: steps, the loss by term, the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from typing import TextIO

from tqdm import tqdm
from transformers import TrainerCallback

_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"


class ProgressBar(TrainerCallback):
    """One line that stays in its place on a terminal; elsewhere (a log file) a plain line whenever the Trainer logs.

    It stands in for the Trainer's own callbacks, which print a dictionary at every log.

    Args:
        terms: names of the objective's terms, shown as they are logged: means since the last log, before weighting.
        file: a text stream; standard error by default.
    """

    def __init__(self, terms: Iterable[str], file: TextIO | None = None):
        self._terms, self._file = list(terms), file
        self._bar: tqdm | None = None
        self._loss = self._validation = ""

    def close(self) -> None:
        """End the line, wherever training stopped."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._file = self._file or sys.stderr
        self._first, self._began = state.global_step, time.monotonic()
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            file=self._file,
            disable=None,  # where `file` is no terminal
            dynamic_ncols=True,
            bar_format=_FORMAT,
        )

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.set_description_str("evaluating")

    def on_evaluate(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.set_description_str("training")

    def on_log(self, args, state, control, logs: Mapping[str, float], **kwargs):
        if self._bar is None or not {"loss", "eval_loss"} & set(logs):
            return
        if "loss" in logs:
            terms = ", ".join(f"{name} {logs[name]:.3g}" for name in self._terms if name in logs)
            self._loss = f"loss {logs['loss']:.3g}" + (f" ({terms})" if terms else "")
        if "eval_loss" in logs:
            self._validation = f"validation loss {logs['eval_loss']:.3g}"
        said = ", ".join(filter(None, [self._loss, self._validation]))
        if not self._bar.disable:
            self._bar.set_postfix_str(said)
        elif "loss" in logs:
            done, left = state.global_step - self._first, state.max_steps - state.global_step
            seconds = (time.monotonic() - self._began) / max(1, done) * left
            print(
                f"step {state.global_step} of {state.max_steps}, {tqdm.format_interval(seconds)} left, {said}",
                file=self._file,
                flush=True,
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.close()
