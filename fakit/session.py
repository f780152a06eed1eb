"""`TrainSession`: a training run that one holds by the reins. Start, pause, step, stop; weights and temperature while it trains.

    session = TrainSession(trainer, held_out=batch, samples=texts, tokenizer=tokenizer)
    session.start()                       # in a thread of its own; session.run() does the same in this one
    session.set_weight("features", 0.3)   # between two steps; recorded in session.events
    session.result()                      # waits; raises what the run raised

It steers `trainer.train()` through its callbacks, between steps; the step is the trainer's own. A run that nobody touches is therefore,
to the last bit, the run of `trainer.train()`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fakit.breakdown import Weights
from fakit.probes import LayerProbe, SampleProbe
from fakit.session_record import News, Record
from fakit.trainer import DistillationTrainer

READY, RUNNING, PAUSED, FINISHED, STOPPED, FAILED = "ready", "running", "paused", "finished", "stopped", "failed"
TEMPERATURE = "temperature"
EVERY = 0.2  # s between two looks of a listener: 5 Hz at most


class TrainSession:
    """A run of a `DistillationTrainer` that can be watched and steered.

    Requests (pause, step, stop, weights, checkpoint) come from any thread and are carried out between two steps by the thread that
    trains, which owns the models: leave them alone until the run has ended or is paused. A step at which a request is carried out is logged,
    whatever `logging_steps` says, so that each point of the curve was made with one set of weights.

    Args:
        trainer: not trained yet. Its printing and progress callbacks are taken out: they would write into whichever cell runs.
        held_out: a batch (input_ids, attention_mask, (B, T)) to measure CKA to the teacher on.
        samples: a few texts, to see what teacher and student say.
        tokenizer: for the samples; by default the trainer's `processing_class`.
        label_names: for the samples.
        look_every: steps between two looks at held_out and samples; also before the first step and after the last one.
        resume_from: a checkpoint folder (of `checkpoint()`, or the Trainer's own) to go on from.
        capacity: news kept for a slow reader; when full the oldest goes. Nothing is lost: the records below are complete.

    Attributes:
        state: "ready", "running", "paused", "finished", "stopped" or "failed".
        error: what the run raised, else None.
        curve: a row a log, as the trainer logs it: step, loss, a column a term (before weighting), and "weighted/<term>".
        events: changes while it ran, {step, name, old, new}; `step` = steps done before. Also those made by other hands.
        similarity: {step: (S + 1, T + 1) CKA}.
        samples: {step: [Sample, …]}.
        log: (step, text): what was done, in words.
        listeners: called without arguments about 5 times a second while `result()` or `run()` keeps the calling thread.

    Raises:
        ValueError: samples without tokenizer, a held-out batch without teacher, look_every below 1, a trainer already under a session or of several processes.
    """

    def __init__(
        self,
        trainer: DistillationTrainer,
        held_out: Mapping[str, Tensor] | None = None,
        samples: Sequence[str] | None = None,
        tokenizer=None,
        label_names: Sequence[str] | None = None,
        look_every: int = 10,
        resume_from: str | Path | None = None,
        capacity: int = 256,
    ) -> None:
        tokenizer = trainer.processing_class if tokenizer is None else tokenizer
        if samples is not None and tokenizer is None:
            raise ValueError(f"{len(samples)} sample texts and no tokenizer; pass tokenizer=…")
        if held_out is not None and trainer.teacher is None:
            raise ValueError(
                "CKA to the teacher needs the teacher, and this trainer has a cache in its place; drop held_out"
            )
        if look_every < 1:
            raise ValueError(f"look_every = {look_every}: steps between two looks, at least 1")
        if trainer.args.world_size > 1:
            raise ValueError(
                f"{trainer.args.world_size} processes train together, and a session steers one; use trainer.train() there"
            )
        if any(isinstance(callback, _Reins) for callback in trainer.callback_handler.callbacks):
            raise ValueError("this trainer is already under a session; make a new trainer for a new session")
        self.trainer, self.objective = trainer, trainer.objective
        self.look_every, self.resume_from = look_every, None if resume_from is None else Path(resume_from)
        self.state, self.error = READY, None
        self._record = record = Record(capacity)
        self.curve, self.events, self.log = record.curve, record.events, record.log
        self.similarity, self.samples = record.similarity, record.samples
        self.listeners: list[Callable[[], None]] = []
        teacher, student = trainer.teacher, trainer.student
        self._layers = None if held_out is None else LayerProbe(teacher, student, held_out)
        self._examples = None if samples is None else SampleProbe(teacher, student, samples, tokenizer, label_names)
        for noisy in (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK):
            trainer.remove_callback(noisy)
        trainer.add_callback(_Reins(self))
        self._changed = threading.Condition(threading.RLock())  # guards the three below
        self._allowed = math.inf  # steps until a pause
        self._stopping = False
        self._requests: deque[tuple[str, Any, Any]] = deque()
        self._settings = self._now()
        self._thread: threading.Thread | None = None
        self._output = None
        self._done = threading.Event()
        self._clock, self._paused_for, self._first_step, self._listened = None, 0.0, 0, 0.0

    # -- the reins, for any thread --------------------------------------------------------------------------------

    def start(self) -> TrainSession:
        """Train in a thread of its own; go on, if paused. Returns at once."""
        with self._changed:
            if self.state == PAUSED:
                return self.resume()
            self._begin()
            self._allowed = math.inf
            self._launch()
        return self

    def run(self) -> Any:
        """Train in the calling thread and return what `trainer.train()` returns: the same path, for where nobody watches.

        Raises:
            Exception: what training raised.
        """
        self._begin()
        self._work()
        return self.result()

    def pause(self) -> None:
        """Hold after the step under way."""
        self._steer(0)

    def resume(self) -> TrainSession:
        """Go on after a pause."""
        self._steer(math.inf)
        return self

    def step(self, n: int = 1) -> None:
        """Train n more steps, then hold; starts the session if need be. Returns at once."""
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"step({n!r}): a whole number of steps, at least 1")
        with self._changed:
            if self.state == READY:
                self._begin()
                self._allowed = n
                self._launch()
            else:
                self._steer(n)

    def stop(self) -> None:
        """End after the step under way; the student stays as it is then, ready for use. Returns at once; `result()` waits."""
        with self._changed:
            self._check_alive("stop")
            self._stopping = True
            self._changed.notify_all()

    def set_weight(self, term: str, value: float) -> None:
        """A term's weight from the next step on.

        Raises:
            ValueError: a term that the objective lacks, a weight that is negative or not finite, or nothing left to learn from.
        """
        with self._changed:
            coming = Weights(dict(self.objective.weights))  # refuses what the objective's own would refuse
            coming.update({name: new for _, name, new in self._requests if name in coming})
            coming[term] = value
            if not any(coming.values()):
                raise ValueError(
                    f"with {term} at 0 every weight is 0: nothing is left to learn from; raise another first"
                )
            self._ask("set", term, float(value))

    def set_temperature(self, value: float) -> None:
        """τ of the outputs from the next step on.

        Raises:
            ValueError: a temperature that is not above 0 or not finite, or an objective without outputs.
        """
        if self.objective.outputs is None:
            raise ValueError("this objective matches no outputs, so it has no temperature; give it Outputs(…)")
        if not 0 < value < math.inf:
            raise ValueError(f"temperature {value!r}: a temperature is finite and above 0")
        self._ask("set", TEMPERATURE, float(value))

    def checkpoint(self, wait: bool = True) -> Path | None:
        """Save student, projections, optimiser, random state and this session's records, to resume from exactly.

        Args:
            wait: until it is written (one step at most); else return None at once: `log` says when it is there.

        Returns:
            The folder, `checkpoint-<step>` in the trainer's output_dir.
        """
        if self.state == READY:
            raise ValueError("nothing to save yet: the session has not started; the student is as it was made")
        written: Future[Path] = Future()
        self._ask("checkpoint", written, None)
        return written.result() if wait else None

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end; what `trainer.train()` returned.

        Raises:
            Exception: what the run raised, whatever it was.
            TimeoutError: it still runs after `timeout` seconds.
            ValueError: the session was never started, or stands paused, so that waiting would have no end.
        """
        if self.state == READY:
            raise ValueError("the session has not started: session.start(), or session.run() to train here and now")
        if self.state == PAUSED and timeout is None:
            raise ValueError(
                f"the session is paused at step {self.trainer.state.global_step}: resume() or stop() it first"
            )
        end = None if timeout is None else time.monotonic() + timeout
        while not self._done.wait(EVERY if end is None else max(0.0, min(EVERY, end - time.monotonic()))):
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"still {self.state} at step {self.progress[0]} after {timeout:g} s")
            self._listen()
        self._listen(force=True)
        if self.error is not None:
            raise self.error
        return self._output

    # -- what a reader sees ---------------------------------------------------------------------------------------

    def poll(self) -> list[News]:
        """What is new since the last call; never waits. One reader: what it has seen, another does not."""
        return self._record.poll()

    @property
    def ended(self) -> bool:
        """Finished, stopped or failed."""
        return self.state in (FINISHED, STOPPED, FAILED)

    @property
    def progress(self) -> tuple[int, int]:
        """(steps done, steps in all); (0, 0) before the start."""
        return self.trainer.state.global_step, self.trainer.state.max_steps

    @property
    def seconds_per_step(self) -> float | None:
        """Mean so far, looks included, pauses left out; None before the first step."""
        done = self.trainer.state.global_step - self._first_step
        return None if self._clock is None or done < 1 else (self._clock[1] - self._clock[0]) / done

    def history(self, weighted: bool = False) -> list[dict[str, float]]:
        """The curve as `figures.loss_curves` takes it: step and a column a term, before weighting or weighted."""
        return self._record.history(list(self.objective.weights), weighted)

    # -- the thread that trains -----------------------------------------------------------------------------------

    def _launch(self) -> None:
        self._thread = threading.Thread(target=self._work, name="fakit-training", daemon=True)
        self._thread.start()

    def _begin(self) -> None:
        with self._changed:
            if self.state != READY:
                raise ValueError(
                    f"this session is {self.state}: a session runs once. Go on from a checkpoint with "
                    "TrainSession(new_trainer, resume_from=folder)."
                )
            self._set_state(RUNNING)

    def _work(self) -> None:
        """All of the run; never raises: `result` does."""
        try:
            folder = None if self.resume_from is None else str(self.resume_from)
            self._output = self.trainer.train(resume_from_checkpoint=folder)
            self.trainer.student.eval()
            self._carry_out()  # what was asked during the last step
            ended, text = (STOPPED, "stopped") if self._stopping else (FINISHED, "finished")
        except BaseException as error:  # also an interrupt: the run is over, and result() has to say so
            self.error = error
            ended, text = FAILED, f"{type(error).__name__}: {error}"
        with self._changed:
            for kind, written, _ in self._requests:
                if kind == "checkpoint":
                    written.set_exception(RuntimeError(f"no checkpoint: the session {text}"))
            self._requests.clear()
            self._note(text)
            self._set_state(ended)
        self._done.set()

    def _train_begins(self) -> None:
        if self.resume_from is not None:
            self._record.read(self.resume_from)
        self._settings = self._now()
        self._first_step = self.trainer.state.global_step
        self._note("started" if self.resume_from is None else f"resumed from {self.resume_from.name}")
        self._look()
        self._clock = (time.perf_counter(), time.perf_counter())

    def _step_begins(self) -> None:
        """Record what other hands changed (a callback, a cell that writes objective.weights)."""
        for name, new in (now := self._now()).items():
            if new != self._settings[name]:
                self._record.change(self.trainer.state.global_step, name, self._settings[name], new)
        self._settings = now

    def _step_ends(self, control) -> None:
        with self._changed:
            self._allowed -= 1
            if self._requests or self._allowed <= 0 or self._stopping:
                control.should_log = True  # the point before a change, and where one looks
        self._clock = (self._clock[0], time.perf_counter() - self._paused_for)
        if self.trainer.state.global_step % self.look_every == 0 or control.should_training_stop:
            self._look()
        if self._thread is None:
            self._listen()

    def _logged(self, control, logs: dict[str, float]) -> None:
        """After the log of a step: the point of the curve, then whatever was asked."""
        used = {name: self._settings[name] for name in self.objective.weights}  # a callback may have set others by now
        self._record.point(self.trainer.state.global_step, logs, used)
        self._carry_out()
        with self._changed:
            if self._allowed <= 0 and not self._stopping and not control.should_training_stop:
                self._hold()
            if self._stopping:
                control.should_training_stop = True
        if self._stopping:
            self._look()

    def _hold(self) -> None:
        """Wait, paused, until steps are allowed again; carry out what is asked meanwhile. Holds the lock."""
        since = time.perf_counter()
        self._note("paused")
        self._set_state(PAUSED)
        while self._allowed <= 0 and not self._stopping:
            self._changed.wait()
            self._carry_out()
        self._paused_for += time.perf_counter() - since
        self._set_state(RUNNING)

    def _carry_out(self) -> None:
        with self._changed:
            while self._requests:
                kind, name, value = self._requests.popleft()
                if kind == "set":
                    self._change(name, value)
                else:
                    self._save(name)

    def _change(self, name: str, new: float) -> None:
        old = self._now()[name]
        if name == TEMPERATURE:
            self.objective.outputs.temperature = new
        else:
            self.objective.weights[name] = new
        self._settings[name] = new
        if new != old:
            self._record.change(self.trainer.state.global_step, name, old, new)

    def _save(self, written: Future[Path]) -> None:
        trainer = self.trainer
        folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        try:
            trainer._save_checkpoint(trainer.model, trial=None)
            self._note(f"checkpoint in {folder.name}")
            self._record.write(folder)
        except Exception as error:  # a full disk is told to whoever asked, and ends no run
            self._note(f"no checkpoint: {type(error).__name__}: {error}")
            written.set_exception(error)
        else:
            written.set_result(folder)

    def _look(self) -> None:
        """Both probes, once a step."""
        step = self.trainer.state.global_step
        if self._layers is not None and step not in self.similarity:
            self._record.look(step, self._layers())
        if self._examples is not None and step not in self.samples:
            self._record.answers(step, self._examples())

    # -- small things ---------------------------------------------------------------------------------------------

    def _now(self) -> dict[str, float]:
        outputs = self.objective.outputs
        return dict(self.objective.weights) | ({} if outputs is None else {TEMPERATURE: outputs.temperature})

    def _check_alive(self, what: str) -> None:
        if self.state not in (RUNNING, PAUSED):
            raise ValueError(f"{what}: the session is {self.state}, and only one that runs or is paused can be steered")

    def _steer(self, allowed: float) -> None:
        with self._changed:
            self._check_alive("step" if 0 < allowed < math.inf else "resume" if allowed else "pause")
            self._allowed = allowed
            self._changed.notify_all()

    def _ask(self, kind: str, name: Any, value: Any) -> None:
        """Put a request before the thread that trains; where none trains, carry it out here."""
        with self._changed:
            self._requests.append((kind, name, value))
            if self.state in (RUNNING, PAUSED):
                self._changed.notify_all()
            else:
                self._carry_out()

    def _note(self, text: str) -> None:
        self._record.note(self.trainer.state.global_step, text)

    def _set_state(self, state: str) -> None:
        self.state = state
        self._record.tell("state", self.trainer.state.global_step, state)

    def _listen(self, force: bool = False) -> None:
        if force or time.monotonic() - self._listened >= EVERY:
            self._listened = time.monotonic()
            for listener in list(self.listeners):
                listener()


class _Reins(TrainerCallback):
    """The session in the trainer's loop."""

    def __init__(self, session: TrainSession) -> None:
        self.session = session

    def on_train_begin(self, args, state, control, **kwargs):
        self.session._train_begins()

    def on_step_begin(self, args, state, control, **kwargs):
        self.session._step_begins()

    def on_step_end(self, args, state, control, **kwargs):
        self.session._step_ends(control)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:  # not the summary at the end
            self.session._logged(control, logs)

    def on_save(self, args, state, control, **kwargs):
        self.session._record.write(Path(args.output_dir) / f"checkpoint-{state.global_step}")
