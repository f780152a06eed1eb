"""Which cards have run `make gpu`, as README.md and docs/gpu.md say it: from data/recorded/gpu, between two comments.

python -m benchmarks.gpu.pages
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.gpu.report import PAGE, RECORD, summary
from benchmarks.measure import ROOT
from fakit.files import write_whole

RECORDED = ROOT / "data/recorded/gpu"
PAGES = ("README.md", "docs/gpu.md")
START, END = "<!-- cards: python -m benchmarks.gpu.pages -->", "<!-- /cards -->"


def cards(recorded: Path = RECORDED) -> list[tuple[str, str]]:
    """(folder, summary) of each card that is recorded, by folder."""
    return [
        (path.parent.name, summary(json.loads(path.read_text(encoding="utf-8"))))
        for path in sorted(recorded.glob(f"*/{RECORD}"))
    ]


def sentences(found: list[tuple[str, str]], up: str = "") -> str:
    """The lines between the comments.

    Args:
        up: the way from the page to the top of the clone: "" or "../".
    """
    if not found:
        return "**No card has run `make gpu` yet.**"
    lines = [f"* [{said}]({up}data/recorded/gpu/{folder}/{PAGE})" for folder, said in found]
    return "\n".join(["`make gpu` has run on:", "", *lines])


def with_cards(text: str, said: str) -> str:
    """A page with what it says of the cards made anew.

    Raises:
        ValueError: the comments are not there, once each.
    """
    pattern = re.compile(f"{re.escape(START)}\n.*?{re.escape(END)}", re.S)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"a page that says which cards ran holds {START!r} and {END!r} once each.")
    return pattern.sub(lambda _: f"{START}\n{said}\n{END}", text)


def write(root: Path = ROOT) -> list[Path]:
    """Make the pages of a clone anew; returns their paths."""
    found, paths = cards(root / "data/recorded/gpu"), [root / name for name in PAGES]
    for path, name in zip(paths, PAGES, strict=True):
        said = sentences(found, "../" * name.count("/"))
        write_whole(path, with_cards(path.read_text(encoding="utf-8"), said))
    return paths


if __name__ == "__main__":
    for written in write():
        print(written)
