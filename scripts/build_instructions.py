"""Build data/instructions.jsonl.gz: short instructions and answers, made of the other files in data/ by rule.

    python scripts/build_instructions.py

Six kinds, as many of each: say what is defined, say whether a writer is pleased, correct a scanned line, sort words,
count words, find a word. Every answer follows from its prompt by rule or from the file's own label; nobody wrote them,
and no model did.
"""

import gzip
import json
import random

from _build import DATA, register, write_rows

from fakit.tasks.embedded import EMBEDDED
from fakit.tasks.scans import add_scan_noise

SIZES = {"test": 50, "validation": 30, "train": 260}  # of each kind, filled in this order
LONGEST = 140  # characters of a text that a prompt is about


def texts(name: str) -> list[dict]:
    """Rows of a file in data/ that are short enough, in an order of chance."""
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if len(row["text"]) <= LONGEST]
    random.Random(f"instructions {name}").shuffle(rows)
    return rows


def kinds(draw: random.Random):
    """name → the pairs (prompt, answer) of that kind, more than are taken."""
    glosses, reviews, scans = texts("glosses"), texts("reviews"), texts("scans")
    names = EMBEDDED["glosses"].label_names
    vocabulary = sorted({word for row in glosses for word in row["text"].split() if word.isalpha() and len(word) > 3})

    def sorted_words():
        while True:
            words = draw.sample(vocabulary, draw.randint(3, 6))
            yield f"Put these words in alphabetical order: {', '.join(words)}.", f"{', '.join(sorted(words))}."

    plain = [row["text"] for row in glosses if row["text"].replace(" ", "").isalpha() and len(row["text"].split()) > 4]
    counted, found = plain[: len(plain) // 2], plain[len(plain) // 2 :]
    ordinals = {1: "first", 2: "second", 3: "third", 4: "fourth", 5: "fifth"}

    def found_words():
        for text in found:
            place = draw.randint(1, 5)
            yield (
                f"Which is the {ordinals[place]} word of this line?\n\n{text}",
                f'The {ordinals[place]} word is "{text.split()[place - 1]}".',
            )

    return {
        "define": (
            (
                f"What is defined here? Choose one of {', '.join(names)}.\n\n{row['text']}",
                f"It is {'an' if names[row['label']][0] in 'aeiou' else 'a'} {names[row['label']]}.",
            )
            for row in glosses
        ),
        "mood": (
            (
                f"Does the writer of this sentence like the film?\n\n{row['text']}",
                "Yes, the writer likes it." if row["label"] else "No, the writer does not like it.",
            )
            for row in reviews
            if abs(row["score"]) > 1
        ),
        "scan": (
            (f"Correct the scanning errors in this line.\n\n{add_scan_noise(row['text'])}", row["text"])
            for row in scans
        ),
        "sort": sorted_words(),
        "count": (
            (f"How many words does this line have?\n\n{text}", f"It has {len(text.split())} words.") for text in counted
        ),
        "find": found_words(),
    }


def main() -> None:
    draw = random.Random(0)
    rows = []
    for name, pairs in kinds(draw).items():
        for split, size in SIZES.items():
            for prompt, answer in (next(pairs) for _ in range(size)):
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                rows.append({"split": split, "kind": name, "messages": messages})
    draw.shuffle(rows)
    path = DATA / "instructions.jsonl.gz"
    write_rows(path, rows)
    register(
        path,
        source="made by rule of the texts of glosses, reviews and scans",
        license="WordNet 3.0, MIT, public domain: those of the three files",
        script="scripts/build_instructions.py",
    )


if __name__ == "__main__":
    main()
