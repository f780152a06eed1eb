"""The loss laboratory in JupyterLab: a drag is one callback, the keyboard reaches everything,
Python holds what the page shows.
"""

from __future__ import annotations

from tests.browser.pages import assert_figures_visible

MODELS = """
import torch
from transformers import BertConfig, BertForSequenceClassification
from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, shrink
from fakit.widgets import loss_laboratory

torch.manual_seed(0)
sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, num_labels=3, initializer_range=0.3)
teacher = BertForSequenceClassification(BertConfig(**sizes)).eval()
student = shrink(teacher, layers=2)
batch = {"input_ids": torch.randint(1, 40, (6, 8)), "attention_mask": torch.ones(6, 8, dtype=torch.long), "labels": torch.arange(6) % 3}
objective = Objective(LayerMap.uniform(2, 4), Features("mse"), Attention("kl"), Outputs(temperature=2.0), Task())
lab = loss_laboratory(objective, teacher, student, batch)
lab
"""
# what Python holds, written by Python at every callback of the laboratory, and how many there were
ECHO = """
import ipywidgets
echo, told = ipywidgets.HTML(), []
draw = lab.draw
def counted():
    told.append(lab.weights)
    result = draw()
    pulls = [row["pull"] for row in lab.rows()]
    echo.value = (f"draws {len(told)}; features {lab.weights['features']:.2f}; tau {lab.temperature.value:g}; total {lab.total:.6f}; "
                  f"spread {max(pulls) / min(pulls):.3f}; objective {objective.weights['features']:.2f} tau {objective.outputs.temperature:g}")
    return result
lab.draw = counted
lab.refresh()
echo
"""
BREAK = 'student.bert.encoder.layer[1].output.dense.weight.data.fill_(float("nan"));'


def test_sliders_buttons_and_failure_from_the_page(lab):
    lab.write("laboratory.ipynb", MODELS, ECHO, "")
    with lab.open("laboratory.ipynb") as opened:
        opened.run_all()
        page = opened.page
        page.get_by_text("draws 1;").wait_for()
        handles = page.locator(".noUi-handle")
        assert handles.count() == 5  # four weights and τ

        # a drag over many positions is one callback
        box = handles.first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        for step in range(1, 13):
            page.mouse.move(x + 5 * step, y)
        page.mouse.up()
        page.get_by_text("draws 2;").wait_for()
        page.wait_for_timeout(400)
        said = page.get_by_text("draws 2;").inner_text()
        weight = float(said.split("features ")[1].split(";")[0])
        assert 1.0 < weight <= 5.0 and "objective 1.00" in said
        page.get_by_text("Not applied").wait_for()

        # the keyboard: a step of a weight, a step of τ, another layer, and the buttons
        handles.first.focus()
        page.keyboard.press("ArrowLeft")
        page.get_by_text(f"draws 3; features {weight - 0.05:.2f};").wait_for()
        handles.nth(4).focus()
        page.keyboard.press("ArrowRight")
        page.get_by_text("tau 3; total").wait_for()
        page.get_by_role("button", name="S1", exact=True).focus()
        page.keyboard.press("Space")
        page.get_by_text("cosine of gradients, S1").first.wait_for()
        page.get_by_role("button", name="balance").focus()
        page.keyboard.press("Enter")
        page.get_by_text("spread 1.000").wait_for()  # every term pulls as hard as the task
        assert "Chen et al. 2018" in page.locator("pre[role=status]").inner_text()
        draws = int(page.get_by_text("spread 1.000").inner_text().split("draws ")[1].split(";")[0])
        page.wait_for_timeout(400)  # the page sends nothing back: sliders round what they show, not what Python holds
        assert page.get_by_text(f"draws {draws};").count() == 1 and draws == 6
        page.get_by_role("button", name="apply").focus()
        page.keyboard.press("Enter")
        page.get_by_text("The objective holds these weights").wait_for()
        page.get_by_text("objective 1.00 tau 2").wait_for(state="detached")

        opened.use_theme("dark")
        assert_figures_visible(page, at_least=1)
        cell = page.locator(".jp-OutputArea-output table td").first
        assert cell.evaluate("e => getComputedStyle(e).color") != "rgb(0, 0, 0)"  # follows the theme
        saved = opened.save()
        assert "widgets" not in saved["metadata"]
        assert "image/svg+xml" in saved["cells"][0]["outputs"][0]["data"]
        opened.assert_clean()

        page.locator(".jp-CodeCell .cm-content").nth(2).click()
        page.keyboard.insert_text(BREAK)
        page.keyboard.press("Control+Enter")
        page.locator(".jp-CodeCell").nth(2).get_by_text("[3]:").wait_for()
        page.get_by_role("button", name="measure again").click()
        alert = page.get_by_role("alert").filter(has_text="Not measured")
        alert.wait_for()
        assert "the features term is nan at S2←T4" in alert.inner_text()
        opened.assert_clean()
