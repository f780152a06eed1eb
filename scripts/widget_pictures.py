"""Shoot the widgets in JupyterLab, light and dark → docs/pictures/NAME_light.png and NAME_dark.png.

    .venv/bin/python -m scripts.widget_pictures                  every widget
    .venv/bin/python -m scripts.widget_pictures mapping_board    one

A widget is one entry of `CELLS`: its name → the code of a notebook cell whose last line is the widget. Where the
picture should show more than the first sight, `ACTIONS` names what a person does before,
with the page and the output's locator.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

from tests.browser import find
from tests.browser.pages import Lab, running_lab

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
LARGEST = 200_000  # bytes
WIDGET = ".jp-Cell-outputArea > .jp-OutputArea-child > .jp-OutputArea-output"

CELLS: dict[str, str] = {
    "mapping_board": """
import numpy as np
from fakit.widgets import mapping_board

student, teacher = np.arange(4) / 3, np.arange(7) / 6  # relative depths; a made-up likeness that falls with their distance
similarity = 0.98 - 0.75 * abs(student[:, None] - teacher)
mapping_board(3, 6, similarity, start="last", widths=(192, 384), heads=(12, 12), batch=32, tokens=64)
""",
    "attention_viewer": """
import torch
from fakit import LayerMap, capture, shrink
from fakit.tasks import embedded_teacher
from fakit.teaching import setup
from fakit.widgets import attention_viewer

setup()
teacher, tokenizer = embedded_teacher("glosses")
student = shrink(teacher, layers=3).eval()
batch = tokenizer(["a small bird that sings at night", "the plot was thin , and still we stayed to the end"], padding=True, return_tensors="pt")
with torch.no_grad():
    seen = [capture(model, batch, attentions=range(1, layers + 1)) for model, layers in ((teacher, 6), (student, 3))]
tokens = [tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"].tolist()]
viewer = attention_viewer(*seen, tokens, layer_map=LayerMap.uniform(3, 6), special=batch["input_ids"] == tokenizer.sep_token_id)
viewer.teacher_layer, viewer.teacher_head, viewer.cursor = 4, 8, (5, 3)
viewer
""",
    "planner": """
from fakit.teaching import setup
from fakit.widgets import memory_planner

setup()
planner = memory_planner("Llama-3.1-8B", layers=8, batch=16, seq=512, memory="A100 40GB", quantize="8bit")
planner.width.value = 2048
planner.changes.value = True
planner
""",
}
CELLS["cockpit"] = """
import tempfile
from fakit import Attention, DistillationTrainer, Features, LayerMap, Objective, Outputs, Task, shrink
from fakit.training.session import TrainSession
from fakit.tasks import embedded_teacher, load_task
from fakit.teaching import setup
from fakit.widgets import cockpit
from transformers import TrainingArguments

setup()
task = load_task("glosses")
teacher, tokenizer = embedded_teacher("glosses")
student = shrink(teacher, layers=2)
student.get_input_embeddings().requires_grad_(False)
objective = Objective(LayerMap.uniform(2, 6), Features("mse"), Attention("kl"), Outputs("forward_kl", temperature=2.0), Task())
arguments = TrainingArguments(
    tempfile.mkdtemp(), max_steps=60, per_device_train_batch_size=16, learning_rate=3e-4, logging_steps=2, use_cpu=True,
    report_to="none", save_strategy="no", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
)
trainer = DistillationTrainer(
    teacher, student, objective, args=arguments, train_dataset=task.encode("train", tokenizer, 48), data_collator=task.collator(tokenizer)
)
session = TrainSession(
    trainer, tokenizer(task.validation["text"][:32], padding=True, truncation=True, max_length=48, return_tensors="pt"),
    sorted(task.validation["text"][:60], key=len)[20:23], tokenizer, task.label_names, look_every=5,
)
cockpit(session)
"""
CELLS["loss_laboratory"] = """
from torch.utils.data import DataLoader
from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, shrink
from fakit.tasks import embedded_teacher, load_task
from fakit.teaching import setup
from fakit.widgets import loss_laboratory

setup()
task = load_task("glosses")
teacher, tokenizer = embedded_teacher("glosses")
student = shrink(teacher, layers=3)
student.get_input_embeddings().requires_grad_(False)
rows = DataLoader(task.encode("train", tokenizer, 48).select(range(16)), 16, collate_fn=task.collator(tokenizer))
objective = Objective(LayerMap.uniform(3, 6), Features("mse"), Attention("kl"), Outputs("forward_kl", temperature=2.0), Task())
loss_laboratory(objective, teacher, student, list(rows))
"""
CELLS["run_browser"] = """
from fakit.tasks import data_dir
from fakit.widgets import run_browser

browser = run_browser(data_dir() / "recorded" / "study", task="glosses")
browser.selected = browser.frame().query("arm in ('all', 'none')")["run_id"].tolist()
browser
"""


def _fly(page: Page, output: Locator) -> None:
    """Train half of the way, turn two knobs, and hold."""
    output.get_by_role("button", name="Start").click()
    output.get_by_text(re.compile("step 2[0-9] of 60")).wait_for(timeout=120_000)
    handle = output.locator(".noUi-handle").first
    handle.focus()
    for _ in range(4):
        page.keyboard.press("PageDown")
    output.get_by_text(re.compile("step 4[0-9] of 60")).wait_for(timeout=120_000)
    output.get_by_role("button", name="Pause").click()
    output.get_by_role("button", name="Resume").wait_for()
    page.wait_for_timeout(1000)


def _balance(page: Page, output: Locator) -> None:
    """All four panels and the table, and the balance with its formula."""
    page.set_viewport_size({"width": 1440, "height": 1500})
    output.get_by_role("button", name="balance").click()
    output.get_by_text("w_features = ").wait_for()
    page.wait_for_timeout(1000)


_LAYERS = """
import torch
from fakit import LayerMap, capture, shrink
from fakit.similarity import compare_estimators, scrub_rogue
from fakit.tasks import embedded_teacher, load_task
from fakit.teaching import setup
from fakit.widgets import estimator_switch, rogue_scrubber

setup()
teacher, tokenizer = embedded_teacher("glosses")
student = shrink(teacher, layers=3, init={init!r}).eval()
batch = tokenizer(load_task("glosses").validation["text"][:96], padding=True, truncation=True, max_length=48, return_tensors="pt")
with torch.no_grad():
    traces = [capture(model, batch, hidden_states=range(depth + 1)) for model, depth in ((student, 3), (teacher, 6))]
students, teachers = ([trace.hidden_states[i] for i in sorted(trace.hidden_states)] for trace in traces)
mask, pairs = traces[1].mask, LayerMap.uniform(3, 6).pairs
"""
CELLS["estimator_switch"] = (
    _LAYERS.format(init="random")
    + """
switch = estimator_switch(compare_estimators(students, teachers, mask, permutations=60, bootstrap=60), pairs)
switch.buttons.value = "biased"
switch
"""
)
CELLS["rogue_scrubber"] = (
    _LAYERS.format(init="copy")
    + """
scrubber = rogue_scrubber(scrub_rogue(students, teachers, mask, pairs))
scrubber.slider.value = 3
scrubber
"""
)
ACTIONS: dict[str, Callable[[Page, Locator], None]] = {
    "cockpit": _fly,
    "loss_laboratory": _balance,
    "run_browser": lambda page, output: page.set_viewport_size({"width": 1440, "height": 1200}),
    "planner": lambda page, output: page.set_viewport_size({"width": 1280, "height": 1200}),  # all of it
    "mapping_board": lambda page, output: output.get_by_role("button", name="student layer 2").click(),
}


def shoot(names: list[str], folder: Path = PICTURES) -> list[Path]:
    """Take both pictures of each widget named; returns their paths.

    Raises:
        RuntimeError: a cell failed or wrote to stderr, or a picture is larger than 200 kB.
    """
    pictures = []
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        notebooks = Path(scratch, "notebooks")
        notebooks.mkdir()
        browser = playwright.chromium.launch(executable_path=find.ensure(), args=find.ARGS)
        with running_lab(notebooks, Path(scratch, "jupyter")) as (url, settings):
            lab = Lab(url, notebooks, settings, browser)
            for name in names:
                with lab.open(lab.write(f"{name}.ipynb", CELLS[name])) as opened:
                    opened.run_all()
                    output = opened.page.locator(WIDGET).last  # after what encoding reports
                    output.wait_for()
                    if name in ACTIONS:
                        ACTIONS[name](opened.page, output)
                    for theme in ("light", "dark"):
                        opened.use_theme(theme)
                        opened.page.wait_for_timeout(500)  # colors fade from one theme to the other
                        pictures.append(_shrunk(output, folder / f"{name}_{theme}.png"))
                    opened.assert_clean()
        browser.close()
    return pictures


def _shrunk(output: Locator, path: Path) -> Path:
    """The output's picture, with a palette of 256 colors where it would be too large without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    output.screenshot(path=path, animations="disabled")
    if path.stat().st_size > LARGEST:
        Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > LARGEST:
        raise RuntimeError(
            f"{path} has {path.stat().st_size} bytes; a picture has at most {LARGEST}: show less of the widget"
        )
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CELLS)}; all unless given")
    names = parser.parse_args(arguments).names or list(CELLS)
    if unknown := sorted(set(names) - set(CELLS)):
        sys.exit(f"no widget {', '.join(unknown)}; there are {', '.join(CELLS)}. Add a cell to CELLS in {__file__}")
    for path in shoot(names):
        print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
