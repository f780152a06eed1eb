"""The cockpit: a training session's reins and instruments in one box, live while another cell works."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from html import escape

import ipywidgets as widgets

from fakit.figures.live import training_now
from fakit.training.session.session import EVERY, FAILED, PAUSED, READY, RUNNING, TEMPERATURE, TrainSession
from fakit.widgets.panel import FOCUS, LABEL, WIDE, WIDGET, spoken, style
from fakit.widgets.weights import weight_slider

LINES = 8  # of the log that are shown
_STYLE = """
.fakit-cockpit table { border-collapse: collapse; font-size: 13px; }
.fakit-cockpit th, .fakit-cockpit td {
  text-align: left; padding: 2px 12px 2px 0; vertical-align: top; line-height: 1.4;
}
.fakit-cockpit td:first-child { max-width: 280px; }
.fakit-cockpit ol { margin: 0; padding: 0; list-style: none; font-size: 13px; line-height: 1.5; }
.fakit-cockpit .failed {
  color: var(--jp-error-color1, #d32f2f); border-left: 4px solid currentColor; padding-left: 8px;
}
"""


class Cockpit(widgets.VBox):
    """See `cockpit`.

    Attributes:
        session: what it steers.
        go, step, stop, save: the buttons; `go` starts, pauses and resumes.
        sliders: term → slider of its weight.
        temperature: slider of τ, None without an output term.
        view: "loss before weighting" or "weighted loss".
        schedules: what moves the sliders by itself, in words; a slider that is moved by hand replaces its schedule.
        sentence: what the picture shows, in words.
        svg: the picture.
    """

    def __init__(self, session: TrainSession, start: bool = False) -> None:
        self.session = session
        self.go, self.step, self.stop, self.save = (
            _button(text, icon, does)
            for text, icon, does in (
                ("Start", "play", self._go),
                ("Step", "step-forward", self._one_step),
                ("Stop", "stop", session.stop),
                ("Checkpoint", "save", self._save),
            )
        )
        for button in (self.go, self.step, self.stop, self.save):
            button.on_click(self._clicked)
        settings = session.settings
        highest = max(2.0, *(2 * settings[name] for name in session.objective.weights))
        narrow = "400px"  # two of them side by side
        self.sliders = {
            name: weight_slider(f"weight: {name}", settings[name], highest, width=narrow)
            for name in session.objective.weights
        }
        self.temperature = (
            weight_slider("temperature τ", settings[TEMPERATURE], 10.0, 0.25, narrow)
            if TEMPERATURE in settings
            else None
        )
        self.view = widgets.ToggleButtons(
            options=["loss before weighting", "weighted loss"], style={"button_width": "190px"}
        )
        self._bar = widgets.IntProgress(description="progress", style=LABEL, layout={"width": WIDE})
        self._where, self._status, self._failure = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.schedules = widgets.HTML()
        self._picture, self._table, self._log = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._drawing = threading.RLock()  # a click may come on another thread than the look at the clock
        self._moving = False  # sliders moved by the session, not by a hand
        self._seen_end = False
        self._handle = None
        self.sentence = self.svg = ""
        for name, slider in self._controls().items():
            slider.observe(self._moved(name), "value")
        self.view.observe(lambda change: self._draw({"curve"}), "value")
        below = widgets.HBox([self._table, self._log], layout={"flex_flow": "row wrap", "grid_gap": "12px 28px"})
        super().__init__(
            [
                style(FOCUS + _STYLE),
                widgets.HBox([self.go, self.step, self.stop, self.save, self._where]),
                self._bar,
                widgets.HBox(list(self._controls().values()), layout={"flex_flow": "row wrap"}),
                self.schedules,
                self.view,
                self._status,
                self._failure,
                self._picture,
                below,
            ]
        )
        self.add_class("fakit-cockpit")
        self.add_class("fakit-focus")
        self._draw({"curve", "samples", "log", "state"})
        session.listeners.append(self.flush)  # while a cell waits in session.result()
        self._following = self._follow()
        if start and session.state == READY:
            session.start()
            self.flush()

    # -- to the session -------------------------------------------------------------------------------------------

    def _controls(self) -> dict[str, widgets.FloatSlider]:
        return self.sliders | ({} if self.temperature is None else {TEMPERATURE: self.temperature})

    def _clicked(self, button: widgets.Button) -> None:
        self._try(button.does)

    def _go(self) -> None:
        if self.session.state == RUNNING:
            self.session.pause()
        else:
            self.session.start()

    def _one_step(self) -> None:
        self.session.step()

    def _save(self) -> None:
        self.session.checkpoint(wait=False)  # the log says when it is there

    def _moved(self, name: str) -> Callable[[dict], None]:
        def ask(change: dict) -> None:
            if self._moving:
                return
            if name == TEMPERATURE:
                self._try(lambda: self.session.set_temperature(change["new"]))
            else:
                self._try(lambda: self.session.set_weight(name, change["new"]))

        return ask

    def _try(self, does: Callable[[], object]) -> None:
        try:
            does()
        except ValueError as error:  # asked for what cannot be: say so, and put the sliders back
            self._say(str(error))
            self._place_sliders()
        self.flush()

    # -- from the session -----------------------------------------------------------------------------------------

    def _follow(self) -> asyncio.Task | None:
        """Look at the clock in the kernel's event loop, until the end. Without a loop, whoever waits calls `flush`."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return None

        async def follow() -> None:
            while not self._seen_end:
                self.flush()
                await asyncio.sleep(EVERY)
            self._leave_picture()

        return loop.create_task(follow())

    def flush(self) -> None:
        """Show what is new since the last time. Cheap where nothing is."""
        with self._drawing:
            kinds = {item.kind for item in self.session.poll()}
            if self.session.ended and not self._seen_end:
                self._seen_end = True
                kinds |= {"curve", "samples", "log", "state"}
            if kinds:
                self._draw(kinds)
            if self._seen_end and threading.current_thread() is threading.main_thread():
                self._leave_picture()

    def _leave_picture(self) -> None:
        """Put the picture of the end where the first one was: the one that is saved."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.update(self._bundle(), raw=True)

    def _draw(self, kinds: set[str]) -> None:
        with self._drawing:
            if kinds & {"curve", "similarity", "log"}:
                self._draw_curves()
            if "samples" in kinds:
                self._table.value = self._samples()
            if kinds & {"curve", "log"}:
                self._place_sliders()
            if "log" in kinds:
                self._log.value = self._lines()
            if kinds & {"state", "curve"}:
                self._draw_state()
            if kinds & {"state", "log"}:
                self._say(self._announcement())

    def _draw_curves(self) -> None:
        session = self.session
        weighted = self.view.value == "weighted loss"
        self.svg, self.sentence = training_now(
            session.history(weighted),
            list(session.objective.weights),
            dict(session.similarity),
            list(session.objective.layer_map.pairs),
            list(session.events),
            session.progress[1] or max(session.trainer.args.max_steps, 0),
            weighted,
        )
        self._picture.value = self.svg

    def _draw_state(self) -> None:
        session, state = self.session, self.session.state
        done, steps = session.progress
        self._bar.max, self._bar.value = max(steps, 1), done
        self._bar.bar_style = "danger" if state == FAILED else "success" if session.ended else ""
        pace = session.seconds_per_step
        text = f"step {done} of {steps}" if steps else "not started"
        if pace is not None:
            text += f" · {pace:.2f} s a step"
            text += "" if session.ended else f" · {pace * (steps - done):.0f} s to go"
        self._where.value = f"<span style='padding-left:12px'>{text}</span>"
        self.go.description = {RUNNING: "Pause", PAUSED: "Resume"}.get(state, "Start")
        self.go.icon = "pause" if state == RUNNING else "play"
        self.go.disabled = self.step.disabled = session.ended
        self.stop.disabled = state not in (RUNNING, PAUSED)
        self.save.disabled = state in (READY, FAILED)
        if session.error is not None:
            said = f"{type(session.error).__name__}: {session.error}"
            self._failure.value = (
                f'<div role="alert" class="failed"><b>The run failed.</b> {escape(said)}<br>'
                "<code>session.result()</code> raises it.</div>"
            )

    def _place_sliders(self) -> None:
        running = self.session.schedules
        lines = ", ".join(f"{name} {schedule}" for name, schedule in running.items())
        self.schedules.value = f"<span style='padding-left:12px'>scheduled: {escape(lines)}</span>" if lines else ""
        self._moving = True
        try:
            for name, value in self.session.settings.items():
                slider = self._controls()[name]
                slider.max = max(slider.max, value)
                slider.value = value
        finally:
            self._moving = False

    def _say(self, sentence: str) -> None:
        self._status.value = spoken(sentence)

    def _announcement(self) -> str:
        """For a screen reader: what was done last, not every step."""
        steps = self.session.progress[1]
        if not self.session.log:
            return "Ready: Start trains, Step trains one step and holds."
        step, text = self.session.log[-1]
        return f"Step {step} of {steps}: {text}."

    def _samples(self) -> str:
        if not self.session.samples:
            return ""
        step, samples = list(self.session.samples.items())[-1]

        def answer(said: tuple[str, float | None] | None) -> str:
            if said is None:
                return "–"
            text, chance = said
            return escape(text) if chance is None else f"{escape(text)} {chance:.2f}"

        marks = {True: "✓ same", False: "✗ differs", None: ""}
        rows = "".join(
            f"<tr><td>{escape(sample.text)}</td><td>{answer(sample.teacher)}</td><td>{answer(sample.student)}</td>"
            f"<td>{marks[sample.agree]}</td></tr>"
            for sample in samples
        )
        heads = "".join(f"<th scope='col'>{head}</th>" for head in ("text", "teacher (T)", "student (S)", ""))
        return (
            f"<table><caption style='text-align:left'><b>What they say at step {step}</b></caption>"
            f"<tr>{heads}</tr>{rows}</table>"
        )

    def _lines(self) -> str:
        lines = list(self.session.log)[-LINES:][::-1]
        return "<b>Log</b><ol>" + "".join(f"<li>step {step}: {escape(text)}</li>" for step, text in lines) + "</ol>"

    # -- the display ----------------------------------------------------------------------------------------------

    def _bundle(self) -> dict[str, object]:
        view = {WIDGET: {"version_major": 2, "version_minor": 0, "model_id": self.model_id}}
        return {**view, "image/svg+xml": self.svg, "text/plain": self.sentence}

    def _ipython_display_(self) -> None:
        from IPython.display import display

        handle = display(self._bundle(), raw=True, display_id=True)
        self._handle = None if self._seen_end else handle


def _button(text: str, icon: str, does: Callable[[], object]) -> widgets.Button:
    button = widgets.Button(description=text, icon=icon, layout={"width": "120px"})
    button.does = does
    return button


def cockpit(session: TrainSession, start: bool = False) -> Cockpit:
    """A running distillation in the hand: start, pause, step, stop; weights and temperature mid-run; curves,
    CKA, samples, log.

    Other cells work while it trains. What is shown follows from the kernel's event loop, or from a cell that waits in
    `session.result()`; the thread that trains never touches a widget. Buttons are heard between cells: while a cell
    waits, they wait with it, and interrupting it (■) ends the waiting, not the run. A failure stands in red, and
    `session.result()` raises it. A page without a kernel shows the picture of the end.

    Args:
        session: of this run.
        start: start it at once, so that Run All trains without a click.

    >>> cockpit(session)  # doctest: +SKIP
    """
    return Cockpit(session, start)
