"""The survey's map as a page from the disk: a press on a method or a place, by mouse or keyboard, says what stands there."""

from __future__ import annotations

from fakit.widgets import survey_map


def test_methods_and_places_are_read_by_mouse_and_keyboard(watch, tmp_path):
    page = watch.page
    page.goto(survey_map(selected="pkd").to_html(tmp_path / "map.html").as_uri())
    read = page.get_by_role("status")
    read.get_by_role("heading", name="Patient Knowledge Distillation").wait_for()
    assert read.locator("math").count() == 1

    page.get_by_role("button", name="tinybert").click()
    read.get_by_role("heading", name="TinyBERT").wait_for()
    assert "77.0 of 79.5" in read.inner_text()
    assert page.locator('button[aria-pressed="true"]').all_inner_texts() == ["tinybert 2020"]
    read.get_by_text("Its settings").click()
    read.get_by_text("recipe: tinybert").wait_for()

    page.get_by_role("button", name="texts", exact=True).focus()
    page.keyboard.press("Tab")  # the next place
    page.keyboard.press("Enter")
    read.get_by_text("minilmv2 (2021): relations").wait_for()
    column = page.locator("td.column").all_inner_texts()
    assert "minilm" in column and "relations" in column and "forward_kl" not in column
    texts = page.locator(".fakit-survey").locator("th, td, button, p, li, small").all()
    assert min(float(text.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")) for text in texts[::9]) >= 12
    watch.assert_clean()
