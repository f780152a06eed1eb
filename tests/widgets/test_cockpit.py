"""The cockpit without a browser: buttons and sliders reach the session, news reach the page,
a failure shows and is raised.
"""

import asyncio
import re
import threading

import pytest
from transformers import TrainerCallback

from fakit import Schedule
from fakit.training.session.session import TrainSession
from fakit.widgets import Cockpit, cockpit
from tests.families import VOCAB, batch, tokenizer
from tests.training.runs import make, parts

WORDS = tokenizer(" ".join(f"w{i}" for i in range(1, VOCAB)))
WORDS.pad_token = "[UNK]"
WAIT = 60


class Gate(TrainerCallback):
    """Lets the thread into one step after another, when the test says so."""

    def __init__(self, fails_at: int = -1):
        self.open, self.fails_at = threading.Semaphore(0), fails_at

    def on_step_begin(self, args, state, control, **kwargs):
        assert self.open.acquire(timeout=WAIT)
        if state.global_step == self.fails_at:
            raise RuntimeError("the disk is <on> fire")


def made(tmp_path, gate: Gate | None = None, **changes) -> TrainSession:
    trainer = make(tmp_path, callbacks=[gate] if gate else [], **changes)
    return TrainSession(trainer, batch(rows=8, seed=9), ["w3 w4", "<w5> w6"], WORDS, ["no", "yes"], look_every=2)


def when(panel: Cockpit, what) -> None:
    """Look at the clock, as the kernel's event loop does, until it is so."""
    for _ in range(WAIT * 100):
        panel.flush()
        if what():
            return
        threading.Event().wait(0.01)
    raise AssertionError(panel.session.log)


def points(panel: Cockpit) -> int:
    found = re.search(r'data-line="features" data-points="(\d+)"', panel.svg)
    return int(found[1]) if found else 0


def words(widget) -> str:
    return re.sub(r"<[^>]+>", " ", widget.value)


def test_it_stands_ready_with_what_the_objective_has(tmp_path):
    session = made(tmp_path)
    panel = cockpit(session)
    assert {name: slider.value for name, slider in panel.sliders.items()} == dict(session.objective.weights)
    assert panel.temperature.value == 2.0 and panel.go.description == "Start"
    assert panel.stop.disabled and panel.save.disabled and not panel.step.disabled
    assert "no step yet" in panel.svg and "Ready: Start trains" in panel._status.value
    assert panel.sentence == "0 steps done."
    assert cockpit(made(tmp_path, max_steps=4)).sentence == "0 of 4 steps done."


def test_start_pause_step_resume_and_stop_by_their_buttons(tmp_path):
    gate = Gate()
    panel = cockpit(made(tmp_path, gate))
    panel.go.click()
    assert panel.go.description == "Pause" and not panel.stop.disabled
    panel.go.click()  # pause: holds after the step under way
    gate.open.release()
    when(panel, lambda: panel.session.state == "paused")
    assert panel.go.description == "Resume" and panel.session.progress[0] == 1
    panel.step.click()
    gate.open.release()
    when(panel, lambda: panel.session.progress[0] == 2 and panel.session.state == "paused")
    panel.go.click()
    panel.stop.click()
    gate.open.release()
    when(panel, lambda: panel.session.ended)
    assert panel.session.state == "stopped" and panel.session.progress[0] in (2, 3)
    assert panel.go.disabled and panel.step.disabled and panel.stop.disabled and not panel.save.disabled
    assert "Log" in words(panel._log) and "stopped" in words(panel._log)


def test_the_curve_grows_with_the_steps_and_the_rest_follows(tmp_path):
    gate = Gate()
    panel = cockpit(made(tmp_path, gate), start=True)
    for step in (1, 2, 3):
        gate.open.release()
        when(panel, lambda step=step: points(panel) == step)
    when(panel, lambda: "CKA at step 2" in panel.svg)
    table = words(panel._table)
    assert "What they say at step 2" in table and "&lt;w5&gt; w6" in table and re.search(r"(no|yes) \d\.\d\d", table)
    assert "step 3 of 6" in words(panel._where) and panel._bar.value == 3
    assert "S1·T2" in panel.sentence and panel.sentence.startswith("Step 3 of 6: features")
    gate.open.release(3)
    when(panel, lambda: panel.session.ended)
    panel.flush()
    assert points(panel) == 6 and panel._bar.bar_style == "success"


def test_a_schedule_moves_its_slider_and_a_hand_replaces_it(tmp_path):
    gate, models = Gate(), parts()
    models[2].weights["features"] = Schedule(0.0, 3.0)
    panel = cockpit(made(tmp_path, gate, made=models), start=True)
    slider = panel.sliders["features"]
    assert slider.value == 0.0 and words(panel.schedules).strip() == (
        "scheduled: features linear 0 → 3 from step 0 to the end"
    )
    for step in (1, 2):  # the slider stands at what the next step takes
        gate.open.release()
        when(panel, lambda step=step: slider.value == pytest.approx(0.5 * step))
    assert panel.session.events == []
    slider.value = 1.25
    gate.open.release()
    when(panel, lambda: panel.session.events)
    panel.flush()
    assert words(panel.schedules) == "" and slider.value == 1.25
    assert "features 1 (linear 0 → 3 from step 0 to the end) → 1.25" in words(panel._log)
    gate.open.release(3)
    when(panel, lambda: panel.session.ended)
    assert panel.session.objective.weights["features"] == 1.25


def test_a_slider_moved_mid_run_is_an_event(tmp_path):
    gate = Gate()
    panel = cockpit(made(tmp_path, gate), start=True)
    panel.sliders["features"].value = 1.25
    panel.temperature.value = 4.0
    gate.open.release(6)
    panel.session.result(WAIT)
    assert [(e["name"], e["new"]) for e in panel.session.events] == [("features", 1.25), ("temperature", 4.0)]
    assert "features 0.5 → 1.25" in panel.svg and "temperature 2 → 4" in words(panel._log)
    assert panel.sliders["features"].value == 1.25  # and no second request came of showing it
    assert len(panel.session.events) == 2


def test_a_change_by_other_hands_moves_the_slider(tmp_path):
    session = made(tmp_path)
    panel = cockpit(session)
    session.set_weight("task", 2.5)
    panel.flush()
    assert panel.sliders["task"].value == 2.5 and session.events[-1]["new"] == 2.5


def test_what_cannot_be_is_said_and_the_slider_goes_back(tmp_path):
    session = made(tmp_path)
    panel = cockpit(session)
    for name in ("features", "attention", "outputs"):
        panel.sliders[name].value = 0
    panel.sliders["task"].value = 0
    assert "nothing is left to learn from" in words(panel._status)
    assert panel.sliders["task"].value == session.objective.weights["task"] == 0.7


def test_the_picture_can_show_the_weighted_losses(tmp_path):
    session = made(tmp_path)
    session.run()
    panel = cockpit(session)
    raw = panel.sentence
    panel.view.value = "weighted loss"
    assert "weighted loss" in panel.svg and panel.sentence != raw
    assert f"features {session.curve[0]['weighted/features']:.3g} →" in panel.sentence


@pytest.mark.parametrize("how", ["thread", "here"])
def test_a_failure_stands_in_red_and_is_raised(how, tmp_path):
    gate = Gate(fails_at=2)
    session = made(tmp_path, gate)
    panel = cockpit(session, start=how == "thread")
    gate.open.release(3)
    with pytest.raises(RuntimeError, match="the disk is <on> fire"):
        session.result(WAIT) if how == "thread" else session.run()
    assert 'role="alert" class="failed"' in panel._failure.value
    assert "RuntimeError: the disk is &lt;on&gt; fire" in panel._failure.value
    assert panel._bar.bar_style == "danger" and panel.go.disabled and panel.save.disabled and points(panel) == 2


def test_without_a_front_end_the_same_run_leaves_the_same_picture(tmp_path):
    here, there = made(tmp_path), made(tmp_path)
    panels = cockpit(here), cockpit(there)
    here.run()
    there.start().result(WAIT)
    assert panels[0].svg == panels[1].svg and points(panels[0]) == 6
    assert panels[0]._table.value == panels[1]._table.value


def test_no_widget_is_touched_by_the_thread_that_trains(tmp_path):
    gate = Gate()
    panel = cockpit(made(tmp_path, gate))
    threads = set()
    for part in (panel._picture, panel._log, panel._table, panel._where):
        part.observe(lambda change: threads.add(threading.current_thread().name), "value")
    panel.go.click()
    gate.open.release(6)
    panel.session.result(WAIT)
    assert threads == {threading.main_thread().name}


def test_the_event_loop_looks_at_most_five_times_a_second_and_stops_at_the_end(tmp_path):
    gate = Gate()

    async def cell() -> tuple[int, Cockpit]:
        panel = cockpit(made(tmp_path, gate), start=True)
        looks = 0
        flush = panel.flush

        def counted():
            nonlocal looks
            looks += 1
            flush()

        panel.flush = counted
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(6):
            gate.open.release()
            await asyncio.sleep(0.05)  # other cells work
        await asyncio.wait_for(panel._following, WAIT)
        assert looks <= 1 + (loop.time() - began) / 0.2
        return looks, panel

    looks, panel = asyncio.run(cell())
    assert looks >= 1 and panel.session.state == "finished" and points(panel) == 6


def test_the_saved_page_has_the_picture_of_the_end(tmp_path, monkeypatch):
    shown = []

    class Handle:
        def update(self, bundle, raw):
            shown.append(("update", bundle))

    def display(bundle, raw, display_id):
        assert raw and display_id
        shown.append(("display", bundle))
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    session = made(tmp_path)
    panel = cockpit(session)
    panel._ipython_display_()
    session.start().result(WAIT)
    assert [what for what, _ in shown] == ["display", "update"]
    first, last = (bundle for _, bundle in shown)
    assert "no step yet" in first["image/svg+xml"] and 'data-points="6"' in last["image/svg+xml"]
    assert last["text/plain"] == panel.sentence and re.search(r"\d", first["text/plain"])
    assert last["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.model_id
