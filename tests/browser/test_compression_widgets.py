"""Budget of ranks and layer remover in JupyterLab: what mouse and keyboard set, Python holds and the page says."""

from __future__ import annotations

from tests.browser.pages import assert_figures_visible

BUDGET = """
import ipywidgets, torch
from transformers import BertConfig, BertForSequenceClassification
from fakit.compression import low_rank
from fakit.widgets import layer_remover, rank_budget

torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
model = BertForSequenceClassification(BertConfig(vocab_size=50, initializer_range=0.3, **sizes)).eval()
budget, plans = rank_budget(low_rank.spectra(model), keep=0.9), ipywidgets.HTML()
taken = []


def tell(change):
    taken.append(budget.plan)
    plan = budget.plan
    pairs = sum(row.rank is not None for row in plan.rows)
    plans.value = f"Python: plan {len(taken)}, {plan.method}, {plan.after:,} left, {pairs} pairs"


budget._sentence.observe(tell, "value")
display(plans)
budget
"""
REMOVER = """
ids = torch.randint(5, 50, (8, 6), generator=torch.Generator().manual_seed(1)).tolist()
rows = [{"input_ids": row, "attention_mask": [1] * 6} for row in ids]
collate = lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
remover, said = layer_remover(model, rows, collate), ipywidgets.HTML()


def tell_cost(change):
    cost = "nothing" if remover.together is None else f"{remover.together:.3g} nats"
    said.value = f"Python: {remover.gone} out, {cost}"


remover._sentence.observe(tell_cost, "value")
display(said)
remover
"""


def number_after(text: str, before: str) -> str:
    """The word that follows `before` in a text."""
    return text.split(before, 1)[1].split()[0].rstrip(".,;")


def test_a_budget_and_layers_by_mouse_and_keyboard(lab):
    lab.write("compression.ipynb", BUDGET, REMOVER)
    with lab.open("compression.ipynb") as opened:
        opened.run_all()
        page = opened.page
        status = page.get_by_role("status")
        budget = status.filter(has_text="become pairs of thin matrices")
        before = number_after(budget.inner_text(), "→ ")

        # the budget: a key moves the slider by one percent, a drag is one plan, a button another rule
        handle = page.locator(".widget-slider", has_text="parameters kept").locator(".noUi-handle")
        handle.focus()
        page.keyboard.press("ArrowLeft")
        plan = page.get_by_text("Python: plan 1, bottom, ")
        plan.wait_for()
        assert handle.get_attribute("aria-valuetext") == "89"
        after = number_after(plan.inner_text(), "bottom, ")
        assert int(after.replace(",", "")) < int(before.replace(",", ""))
        page.get_by_text(f"→ {after} parameters").wait_for()

        track = page.locator(".noUi-base").first.bounding_box()
        box = handle.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        for share in (0.7, 0.6, 0.5):
            page.mouse.move(track["x"] + share * track["width"], track["y"] + track["height"] / 2)
        page.mouse.up()
        page.get_by_text("Python: plan 2, bottom, ").wait_for()
        least = number_after(page.get_by_text("Python: plan 2").inner_text(), "bottom, ")
        assert int(least.replace(",", "")) < int(after.replace(",", ""))
        page.get_by_text(f"→ {least} parameters").wait_for()

        page.get_by_role("button", name="uniform", exact=True).focus()
        page.keyboard.press("Space")
        page.get_by_text("Python: plan 3, uniform, ").wait_for()
        pairs = page.get_by_text("Python: plan 3").inner_text().split()[-2]
        page.get_by_text(f"; {pairs} of ").wait_for()

        # the layers: a press takes one out, another puts it back
        page.get_by_text("All 3 layers are in.").wait_for()
        page.get_by_role("button", name="layer 2", exact=True).click()
        page.get_by_text("Python: (2,) out, ").wait_for()
        cost = number_after(page.get_by_text("Python: (2,) out").inner_text(), "out, ")
        page.get_by_text(f"Without 1 of 3 layers (2) the KL to the whole model is {cost} nats").wait_for()
        page.get_by_role("button", name="layer 3", exact=True).focus()
        page.keyboard.press("Space")
        page.get_by_text("Python: (2, 3) out, ").wait_for()
        cost = number_after(page.get_by_text("Python: (2, 3) out").inner_text(), "out, ")
        page.get_by_text(f"Without 2 of 3 layers (2, 3) the KL to the whole model is {cost} nats").wait_for()
        pressed = page.locator(".jp-OutputArea button.mod-active", has_text="layer ")
        assert pressed.all_inner_texts() == ["layer 2", "layer 3"]
        for layer in (2, 3):
            page.get_by_role("button", name=f"layer {layer}", exact=True).click()
        page.get_by_text("Python: () out, nothing").wait_for()

        for theme in ("light", "dark"):
            opened.use_theme(theme)
            assert len(assert_figures_visible(page, at_least=2)) == 2
        saved = opened.save()
        assert "widgets" not in saved["metadata"]
        pictures = [out["data"] for cell in saved["cells"] for out in cell["outputs"] if "image/svg+xml" in out["data"]]
        assert len(pictures) == 2
        opened.assert_clean()
