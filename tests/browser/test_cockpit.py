"""The cockpit in JupyterLab: it lives while other cells work, answers to the keyboard,
shows a failure and leaves a clean file.
"""

from __future__ import annotations

import re

MODELS = """
import tempfile, threading, time
import torch, transformers as hf
from fakit import DistillationTrainer, Features, LayerMap, Objective, Outputs, Task, shrink
from fakit.training.session import TrainSession
from fakit.widgets import cockpit

hf.logging.set_verbosity_error()
sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, pad_token_id=0)
torch.manual_seed(0)
teacher = hf.BertForSequenceClassification(hf.BertConfig(**sizes)).eval()
ids = torch.randint(3, 50, (64, 9))
rows = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i[0] % 2} for i in ids]

class Slow(hf.TrainerCallback):
    fails_at = None

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(0.05)  # a step that takes its time
        if state.global_step == self.fails_at:
            raise RuntimeError("the disk is on fire")

def make(steps):
    slow = Slow()
    objective = Objective(LayerMap.uniform(2, 4), Features("mse"), outputs=Outputs("forward_kl", temperature=2.0), task=Task())
    args = hf.TrainingArguments(tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=8, logging_steps=1, use_cpu=True,
                                report_to="none", save_strategy="no", disable_tqdm=True)
    trainer = DistillationTrainer(teacher, shrink(teacher, layers=2), objective, args=args, train_dataset=rows, callbacks=[slow])
    return TrainSession(trainer, held_out={"input_ids": ids[:16], "attention_mask": torch.ones_like(ids[:16])}, look_every=5), slow
"""
LIVE = """
session, slow = make(100_000)
cockpit(session)
"""
FAILS = """
broken, slow = make(60)
slow.fails_at = 3
cockpit(broken, start=True)
"""
# the session is over or not when the other cell answers: the order of things, not a time
OTHER = 'print("answered", sum(range(10)), "while", session.state)'
TOLD = 'print("events", session.events, session.state)'
RESULT = """
try:
    broken.result()
except RuntimeError as error:
    print("raised:", error)
"""


AGAIN = """
session, slow = make(100_000)
cockpit(session, start=True)
"""
WAITS = 'session.result()\nprint("went on after", session.state)'
CELLS = (MODELS, LIVE, OTHER, TOLD, FAILS, RESULT, AGAIN, WAITS)


def run(page, number: int) -> None:
    """Click into code cell `number` and run it."""
    page.locator(".jp-CodeCell .cm-content").nth(number).click()
    page.keyboard.press("Control+Enter")


def grown(page, beyond: int) -> int:
    """Wait until the curve of the last cockpit's features has more points than `beyond`; how many."""
    js = """beyond => {
        const line = [...document.querySelectorAll('.fakit-cockpit [data-line="features"]')].at(-1);
        return line && Number(line.dataset.points) > beyond ? Number(line.dataset.points) : 0;
    }"""
    return int(page.wait_for_function(js, arg=beyond, timeout=60_000).json_value())


def test_it_lives_while_other_cells_work(lab):
    lab.write("cockpit.ipynb", *CELLS)
    with lab.open("cockpit.ipynb") as opened:
        page = opened.page
        page.set_default_timeout(120_000)  # on a busy machine a cell may take its time
        opened.wait_idle()
        run(page, 0)
        run(page, 1)
        panel = page.locator(".fakit-cockpit").first
        start = panel.get_by_role("button", name="Start")
        start.wait_for(timeout=120_000)
        page.get_by_text("Ready: Start trains").wait_for()
        start.focus()
        page.keyboard.press("Enter")
        panel.get_by_role("button", name="Pause").wait_for()
        first = grown(page, 2)

        run(page, 2)  # another cell, while it trains
        page.get_by_text("answered 45 while running").wait_for()
        second = grown(page, first)
        assert second > first

        handle = page.locator(".fakit-cockpit .noUi-handle").first
        handle.focus()
        page.keyboard.press("ArrowRight")
        page.locator(".fakit-cockpit ol").get_by_text("features 1 → 1.05").wait_for()
        page.locator(".fakit-cockpit svg text").get_by_text("features 1 → 1.05").wait_for()

        pause = panel.get_by_role("button", name="Pause")
        pause.focus()
        page.keyboard.press("Space")
        panel.get_by_role("button", name="Resume").wait_for()
        assert page.evaluate("document.activeElement.textContent").strip() == "Resume"  # the focus stays
        panel.get_by_role("button", name="Step").focus()
        page.keyboard.press("Enter")
        page.locator('[role="status"]').get_by_text(re.compile(r"Step \d+ of 100000: paused")).wait_for()
        panel.get_by_role("button", name="Stop").focus()
        page.keyboard.press("Enter")
        page.locator('[role="status"]').get_by_text("stopped").wait_for()
        run(page, 3)
        told = page.locator(".jp-OutputArea-output", has_text="events [").inner_text()
        assert "'name': 'features', 'old': 1.0, 'new': 1.05" in told and told.strip().endswith("stopped")

        run(page, 4)  # fails in its fourth step
        alert = page.get_by_role("alert").filter(has_text="the disk is on fire")
        alert.wait_for()
        red, green, blue = map(int, re.findall(r"\d+", alert.evaluate("e => getComputedStyle(e).color"))[:3])
        assert red > 150 > max(green, blue)
        run(page, 5)
        page.get_by_text("raised: the disk is on fire").wait_for()

        opened.wait_idle()
        saved = opened.save()
        assert "widgets" not in saved["metadata"]
        pictures = [
            out["data"] for cell in saved["cells"] for out in cell["outputs"] if "image/svg+xml" in out.get("data", {})
        ]
        assert len(pictures) == 2
        for data in pictures:  # the pictures of the end, not of the start
            assert 'data-line="features"' in "".join(data["image/svg+xml"]) and "features" in "".join(
                data["text/plain"]
            )
        opened.assert_clean()

        # the next cell waits in result(), as in Run All: the picture grows meanwhile, here in the dark
        opened.use_theme("dark")
        run(page, 6)
        run(page, 7)
        panel = page.locator(".fakit-cockpit").last
        first = grown(page, 3)
        grown(page, first)
        paper = page.evaluate("getComputedStyle(document.querySelector('.jp-Notebook')).backgroundColor")
        ink = panel.locator("button:not([disabled])").first.evaluate("e => getComputedStyle(e).color")
        dark, light = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in (paper, ink))
        assert dark < 3 * 60 and light > 3 * 150
        # interrupting that cell ends the waiting, not the run, and the buttons are heard again
        page.get_by_role("button", name="Interrupt the kernel").click()
        page.locator(".jp-OutputArea-output", has_text="KeyboardInterrupt").first.wait_for()
        grown(page, grown(page, first))
        panel.get_by_role("button", name="Stop").click()
        panel.locator('[role="status"]').get_by_text("stopped").wait_for()
        run(page, 7)
        page.get_by_text("went on after stopped").wait_for()
        opened.watch.assert_clean()
