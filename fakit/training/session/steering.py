"""The side of a training session that trains: what happens between two steps, in the thread that owns the models."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fakit.objective.schedules import Schedule, at_step
from fakit.training.checkpoints import add_file
from fakit.training.probes import LayerProbe, SampleProbe
from fakit.training.session.record import FILE, Record, Setting
from fakit.training.trainer import DistillationTrainer

READY, RUNNING, PAUSED, FINISHED, STOPPED, FAILED = "ready", "running", "paused", "finished", "stopped", "failed"
TEMPERATURE = "temperature"


class Loop(TrainerCallback):
    """The session in the trainer's loop: logs, looks, holds, and carries out what other threads ask.

    Requests are carried out right after the log of a step: each point of the curve is of one set of weights, and a
    checkpoint of that step holds the new ones.

    Attributes:
        changed: guards `state`, `allowed`, `stopping` and `requests`.
        allowed: steps until a pause.
        requests: ("set", name, value) or ("checkpoint", Future, None), in the order they came.
        after_step: called between two steps, where the run keeps the calling thread; None elsewhere.
    """

    def __init__(
        self,
        trainer: DistillationTrainer,
        record: Record,
        layers: LayerProbe | None,
        examples: SampleProbe | None,
        look_every: int,
    ) -> None:
        self.trainer, self.objective, self.record = trainer, trainer.objective, record
        self.layers, self.examples, self.look_every = layers, examples, look_every
        self.changed = threading.Condition(threading.RLock())
        self.state = READY
        self.thread: threading.Thread | None = None  # that trains
        self.allowed: float = math.inf
        self.stopping = False
        self.requests: deque[tuple[str, Any, Any]] = deque()
        self.after_step: Callable[[], None] | None = None
        self.seconds = 0.0  # of all steps, looks included, pauses left out
        self.first_step = 0
        self._settings = self.settings_now()
        self._resumed: Path | None = None
        self._since = 0.0

    @property
    def steps(self) -> int:
        """Done so far."""
        return self.trainer.state.global_step

    def train(self, resume_from: Path | None) -> Any:
        """All of the run. Leaves `state` at its end, and raises what it raised."""
        self._resumed, self.thread = resume_from, threading.current_thread()
        try:
            output = self.trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        except BaseException as error:  # also an interrupt: the run is over
            self._end(FAILED, f"{type(error).__name__}: {error}")
            raise
        finally:
            self.thread = None
            self.trainer.remove_callback(
                self
            )  # whoever trains on with this trainer is not held by a session that is over
        self.trainer.student.eval()
        with self.changed:
            self.carry_out()  # what was asked during the last step
            self._end(*(STOPPED, STOPPED) if self.stopping else (FINISHED, FINISHED))
        return output

    def settings(self) -> dict[str, float]:
        """Weights and temperature as they will be once everything that was asked is carried out."""
        return at_step(self.written(), self.steps, self.trainer.state.max_steps or None)

    def written(self) -> dict[str, float | Schedule]:
        """The same, as they were set."""
        now = {name: setting.written for name, setting in self.settings_now().items()}
        return now | {name: value for kind, name, value in self.requests if kind == "set"}

    def enter(self, state: str) -> None:
        """Be in another state, and tell."""
        self.state = state
        self.record.tell("state", self.steps, state)

    def carry_out(self) -> None:
        """Everything that was asked, in order."""
        with self.changed:
            while self.requests:
                kind, name, value = self.requests.popleft()
                if kind == "set":
                    self._change(name, value)
                else:
                    self._save(name)

    # -- the trainer's calls --------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        """The first look."""
        self._settings, self.first_step = self.settings_now(), self.steps
        self._note("started" if self._resumed is None else f"resumed from {self._resumed.name}")
        self.carry_out()  # what was asked before the checkpoint came with its settings
        self._look()
        self._since = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        """Record what other hands changed: a callback, a cell that writes objective.weights."""
        for name, new in (now := self.settings_now()).items():
            if new.written != self._settings[name].written:
                self.record.change(self.steps, name, self._settings[name], new)
        self._settings = now

    def on_step_end(self, args, state, control, **kwargs):
        """Look, when it is time; ask for a log where something is to be done after it."""
        with self.changed:
            self.allowed -= 1
            if self.requests or self.allowed <= 0 or self.stopping:
                control.should_log = True
        if self.steps % self.look_every == 0 or control.should_training_stop:
            self._look()
        self.seconds, self._since = self.seconds + time.perf_counter() - self._since, time.perf_counter()
        if self.after_step is not None:
            self.after_step()

    def on_log(self, args, state, control, logs, **kwargs):
        """The point of the curve, then whatever was asked."""
        if "loss" not in logs:  # the summary at the end
            return
        # a callback may have set others by now
        used = {name: self._settings[name].number for name in self.objective.weights}
        self.record.point(self.steps, logs, used)
        self.carry_out()
        with self.changed:
            if self.allowed <= 0 and not self.stopping and not control.should_training_stop:
                self._hold()
            if self.stopping:
                control.should_training_stop = True
        if self.stopping:
            self._look()

    def on_save(self, args, state, control, **kwargs):
        """The trainer's own checkpoints carry the record, too."""
        self._write(Path(args.output_dir) / f"checkpoint-{self.steps}")

    # -- between two steps ----------------------------------------------------------------------------------------

    def _hold(self) -> None:
        """Wait, paused, until steps are allowed again; carry out what is asked meanwhile. The lock is held,
        or waited on.
        """
        self._note(PAUSED)
        self.enter(PAUSED)
        while self.allowed <= 0 and not self.stopping:
            self.changed.wait()
            self.carry_out()
        self._since = time.perf_counter()

    def _change(self, name: str, value: float | Schedule) -> None:
        old = self.settings_now()[name]
        if name == TEMPERATURE:
            self.objective.temperature = value
        else:
            self.objective.weights[name] = value
        self._settings[name] = new = self.settings_now()[name]
        if new.written != old.written:
            self.record.change(self.steps, name, old, new)

    def _save(self, written: Future[Path]) -> None:
        folder = Path(self.trainer.args.output_dir) / f"checkpoint-{self.steps}"
        try:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            self._note(f"checkpoint in {folder.name}")
            self._write(folder)
        except Exception as error:  # a full disk is told to whoever asked, and ends no run
            self._note(f"no checkpoint: {type(error).__name__}: {error}")
            written.set_exception(error)
        else:
            written.set_result(folder)

    def _write(self, checkpoint: Path) -> None:
        """The record beside a checkpoint, and in the list of its files."""
        self.record.write(checkpoint)
        add_file(checkpoint, FILE)

    def _look(self) -> None:
        """Both probes, once a step."""
        if self.layers is not None and self.steps not in self.record.similarity:
            self.record.look(self.steps, self.layers())
        if self.examples is not None and self.steps not in self.record.samples:
            self.record.answers(self.steps, self.examples())

    def _end(self, state: str, text: str) -> None:
        with self.changed:
            for kind, written, _ in self.requests:
                if kind == "checkpoint":
                    written.set_exception(RuntimeError(f"no checkpoint: the session ended ({text})"))
            self.requests.clear()
            self._note(text)
            self.enter(state)

    def settings_now(self) -> dict[str, Setting]:
        """Weights and temperature of this step."""
        weights, written = self.objective.weights, self.objective.settings
        found = {name: Setting(weights[name], own["weight"]) for name, own in written.items()}
        if (name := next(iter(self.objective.softened), None)) is not None:
            found[TEMPERATURE] = Setting(self.objective.temperature, written[name]["temperature"])
        return found

    def _note(self, text: str) -> None:
        self.record.note(self.steps, text)
