"""`TrainSession`: a training run that one holds by the reins. Start, pause, step, stop;
weights and temperature while it trains.

    session = TrainSession(trainer, held_out=batch, samples=texts, tokenizer=tokenizer)
    session.start()                       # in a thread of its own; session.run() does the same in this one
    session.set_weight("features", 0.3)   # between two steps; recorded in session.events
    session.result()                      # waits; raises what the run raised

It steers `trainer.train()` through its callbacks, between steps; the step is the trainer's own. A run that nobody
touches is therefore, to the last bit, the run of `trainer.train()`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fakit.objective.schedules import Schedule, all_off
from fakit.objective.weights import check_weight
from fakit.training.probes import LayerProbe, SampleProbe
from fakit.training.session.record import News, Record
from fakit.training.session.steering import FAILED, FINISHED, PAUSED, READY, RUNNING, STOPPED, TEMPERATURE, Loop
from fakit.training.trainer import DistillationTrainer

EVERY = 0.2  # s between two looks of a listener: 5 Hz at most


class TrainSession:
    """A run of a `DistillationTrainer` that can be watched and steered.

    Requests (pause, step, stop, weights, checkpoint) come from any thread and are carried out between two steps by the
    thread that trains, which owns the models: leave them alone until the run has ended or is paused. A step at which a
    request is carried out is logged, whatever `logging_steps` says,
    so that each point of the curve was made with one set of weights.

    Args:
        trainer: not trained yet. Its printing and progress callbacks are taken out: they would write into whichever
            cell runs.
        held_out: a batch (input_ids, attention_mask, (B, T)) to measure CKA to the teacher on.
        samples: a few texts, to see what teacher and student say.
        tokenizer: for the samples; by default the trainer's `processing_class`.
        label_names: for the samples.
        look_every: steps between two looks at held_out and samples; also before the first step and after the last one.
        resume_from: a checkpoint folder (of `checkpoint()`, or the Trainer's own) to go on from.
        capacity: news kept for a slow reader; when full the oldest goes. Nothing is lost:
            the records below are complete.

    Attributes:
        error: what the run raised, else None.
        curve: a row a log, as the trainer logs it: step, loss, a column a term (before weighting), and
            "weighted/<term>".
        events: changes while it ran, {step, name, old, new}; `step` = steps done before. Also those made by other
            hands.
        similarity: {step: (S + 1, T + 1) CKA}.
        samples: {step: [Sample, …]}.
        log: (step, text): what was done, in words.
        listeners: called without arguments about 5 times a second while `result()` or `run()` keeps the calling thread.

    Raises:
        ValueError: samples without tokenizer, a held-out batch without teacher, look_every below 1, a folder that is no
            checkpoint or whose record is damaged, a trainer already under a session or of several processes.
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
        if resume_from is not None and not Path(resume_from, "trainer_state.json").is_file():
            raise ValueError(
                f"{resume_from} is no checkpoint: it has no trainer_state.json; give a checkpoint-N folder"
            )
        if trainer.args.world_size > 1:
            raise ValueError(
                f"{trainer.args.world_size} processes train together, and a session steers one; use trainer.train() "
                "there"
            )
        if any(isinstance(callback, Loop) for callback in trainer.callback_handler.callbacks):
            raise ValueError("this trainer is already under a session; make a new trainer for a new session")
        self.trainer, self.objective = trainer, trainer.objective
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.error: BaseException | None = None
        self.listeners: list[Callable[[], None]] = []
        self._record = record = Record(capacity)
        if resume_from is not None:
            record.read(Path(resume_from))
        self.curve, self.events, self.log = record.curve, record.events, record.log
        self.similarity, self.samples = record.similarity, record.samples
        teacher, student = trainer.teacher, trainer.student
        layers = None if held_out is None else LayerProbe(teacher, student, held_out)
        examples = None if samples is None else SampleProbe(teacher, student, samples, tokenizer, label_names)
        self._loop = Loop(trainer, record, layers, examples, look_every)
        self._changed = self._loop.changed
        for noisy in (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK):
            trainer.remove_callback(noisy)
        trainer.add_callback(self._loop)
        self._output: Any = None
        self._done = threading.Event()
        self._listened = 0.0

    # -- the reins, for any thread --------------------------------------------------------------------------------

    def start(self) -> TrainSession:
        """Train in a thread of its own; go on, if paused. Returns at once."""
        with self._changed:
            if self.state == PAUSED:
                return self.resume()
            self._begin()
            self._launch()
        return self

    def run(self) -> Any:
        """Train in the calling thread and return what `trainer.train()` returns: the same path,
        for where nobody watches.

        Raises:
            Exception: what training raised.
        """
        with self._changed:
            self._begin()
        self._loop.after_step = self._listen
        self._work()
        return self.result()

    def pause(self) -> None:
        """Hold after the step under way."""
        self._steer("pause", 0)

    def resume(self) -> TrainSession:
        """Go on after a pause."""
        self._steer("resume", math.inf)
        return self

    def step(self, n: int = 1, wait: bool = False) -> None:
        """Train n more steps, then hold; starts the session if need be.

        Args:
            wait: until they are done (or the run has ended); else return at once.

        Raises:
            Exception: with `wait`, what the run raised.
        """
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"step({n!r}): a whole number of steps, at least 1")
        if wait:
            self._refuse_own_thread("step(wait=True)")
        with self._changed:
            if self.state == READY:
                self._begin()
                self._loop.allowed = n
                self._launch()
            else:
                self._steer("step", n)
        while wait and self.state == RUNNING:
            self._done.wait(EVERY / 4)
            self._listen()
        if wait and self.state != PAUSED:
            self.result()

    def stop(self) -> None:
        """End after the step under way; the student stays as it is then, ready for use. Returns at once;
        `result()` waits.
        """
        self._steer("stop", math.inf, stopping=True)

    def set_weight(self, term: str, value: float | Schedule) -> None:
        """A term's weight from the next step on. It replaces a schedule that runs.

        Raises:
            ValueError: a term that the objective lacks, a weight that is negative or not finite,
                or nothing left to learn from.
        """
        with self._changed:
            coming = {name: self._loop.written()[name] for name in self.objective.weights}
            if term not in coming:
                raise ValueError(
                    f"no term {term!r} in this objective, so it has no weight; terms: {list(self.objective.weights)}."
                )
            coming[term] = value = check_weight(term, value)
            done, steps = self.progress
            if (off := all_off(coming, steps or None, done)) is not None:
                asked = value if isinstance(value, Schedule) else f"{value:g}"
                raise ValueError(
                    f"with {term} at {asked} every weight is 0 when {off} steps are done: nothing is left to learn "
                    "from; raise another first"
                )
            self._ask("set", term, value)

    def set_temperature(self, value: float | Schedule) -> None:
        """τ of the outputs from the next step on. It replaces a schedule that runs.

        Raises:
            ValueError: a temperature that is not above 0 or not finite, or an objective without outputs.
        """
        if self.objective.temperature is None:
            raise ValueError("this objective matches no outputs, so it has no temperature; give it Outputs(…)")
        lowest = value.lowest if isinstance(value, Schedule) else value
        if not isinstance(lowest, Real) or not 0 < lowest < math.inf:
            raise ValueError(f"temperature {value!r}: a temperature is finite and above 0")
        self._ask("set", TEMPERATURE, value if isinstance(value, Schedule) else float(value))

    def checkpoint(self, wait: bool = True) -> Path | None:
        """Save student, projections, optimizer, random state and this session's records, to resume from exactly.

        Args:
            wait: until it is written (one step at most); else return None at once: `log` says when it is there.

        Returns:
            The folder, `checkpoint-<step>` in the trainer's output_dir.
        """
        if self.state == READY:
            raise ValueError("nothing to save yet: the session has not started; the student is as it was made")
        if wait:
            self._refuse_own_thread("checkpoint()")
        written: Future[Path] = Future()
        self._ask("checkpoint", written)
        return written.result() if wait else None

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the end; what `trainer.train()` returned. An interrupt (Ctrl-C, ■) ends the waiting, not the run.

        Raises:
            Exception: what the run raised, whatever it was.
            TimeoutError: it still runs after `timeout` seconds.
            ValueError: the session was never started, or stands paused (or comes to, without `timeout`):
                waiting would have no end.
        """
        if self.state == READY:
            raise ValueError("the session has not started: session.start(), or session.run() to train here and now")
        self._refuse_own_thread("result()")
        end = None if timeout is None else time.monotonic() + timeout
        while not self._done.is_set():
            if end is None and self.state == PAUSED:  # also one that came, or was taken, while this waited
                self._listen(force=True)
                raise ValueError(f"the session is paused at step {self.progress[0]}: resume() or stop() it first")
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"still {self.state} at step {self.progress[0]} after {timeout:g} s")
            self._done.wait(EVERY if end is None else max(0.0, min(EVERY, end - time.monotonic())))
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
    def state(self) -> str:
        """ "ready", "running", "paused", "finished", "stopped" or "failed"."""
        return self._loop.state

    @property
    def ended(self) -> bool:
        """Finished, stopped or failed."""
        return self.state in (FINISHED, STOPPED, FAILED)

    @property
    def settings(self) -> dict[str, float]:
        """Weights by term, and the temperature where there is one: as they will be from the next step on."""
        with self._changed:
            return self._loop.settings()

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Those that run, by term, and "temperature": what `settings` follows."""
        with self._changed:
            return {name: value for name, value in self._loop.written().items() if isinstance(value, Schedule)}

    @property
    def progress(self) -> tuple[int, int]:
        """(steps done, steps in all); (0, 0) before the start."""
        return self.trainer.state.global_step, self.trainer.state.max_steps

    @property
    def seconds_per_step(self) -> float | None:
        """Mean so far, looks included, pauses left out; None before the first step."""
        done = self.progress[0] - self._loop.first_step
        return self._loop.seconds / done if done else None

    def history(self, weighted: bool = False) -> list[dict[str, float]]:
        """The curve as `figures.loss_curves` takes it: step and a column a term, before weighting or weighted."""
        return self._record.history(list(self.objective.weights), weighted)

    # -- small things ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self.state != READY:
            raise ValueError(
                f"this session is {self.state}: a session runs once. Go on from a checkpoint with "
                "TrainSession(new_trainer, resume_from=folder)."
            )
        self._loop.enter(RUNNING)

    def _launch(self) -> None:
        threading.Thread(target=self._work, name="fakit-training", daemon=True).start()

    def _work(self) -> None:
        """The run; never raises: `result` does."""
        try:
            self._output = self._loop.train(self.resume_from)
        except BaseException as error:
            self.error = error
        self._done.set()

    def _refuse_own_thread(self, what: str) -> None:
        """A callback or a listener that waits for the run in the run's own thread would wait for ever."""
        if threading.current_thread() is self._loop.thread:
            raise ValueError(
                f"{what} was called from the thread that trains (a callback, a listener of run()), which would wait "
                "for itself; use wait=False there: it is done right after this step's log."
            )

    def _steer(self, what: str, allowed: float, stopping: bool = False) -> None:
        with self._changed:
            if self.state not in (RUNNING, PAUSED):
                raise ValueError(
                    f"{what}: the session is {self.state}, and only one that runs or is paused can be steered"
                )
            self._loop.allowed, self._loop.stopping = allowed, self._loop.stopping or stopping
            if self.state == PAUSED and allowed:  # at once, so that whoever waits next does not take it for paused
                self._loop.enter(RUNNING)
            self._changed.notify_all()

    def _ask(self, kind: str, name: Any, value: Any = None) -> None:
        """Put a request before the thread that trains; where none trains, carry it out here."""
        with self._changed:
            self._loop.requests.append((kind, name, value))
            if self.state in (RUNNING, PAUSED):
                self._changed.notify_all()
            elif (
                self.state != READY or self.resume_from is None
            ):  # a checkpoint brings its own settings: what was asked comes after them
                self._loop.carry_out()

    def _listen(self, force: bool = False) -> None:
        if force or time.monotonic() - self._listened >= EVERY:
            self._listened = time.monotonic()
            for listener in list(self.listeners):
                listener()
