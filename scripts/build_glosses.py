"""Build data/glosses.jsonl.gz: definitions of WordNet 3.0 nouns,
labeled with the noun's supersense (its lexicographer file).

apt-get install wordnet-base        # Debian, Ubuntu; or take dict/data.noun from the WordNet 3.0 archive
python scripts/build_glosses.py [--nouns /usr/share/wordnet/data.noun]
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

from _build import DATA, checked, normalized, register, split_by_label, write_rows

SHA256 = "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"
# Lexicographer files (lexnames(5WN)) with at least 2,000 distinct definitions; the label is the position in this list.
CLASSES = {
    4: "act", 5: "animal", 6: "artifact", 7: "attribute", 8: "body", 9: "cognition", 10: "communication",
    13: "food", 14: "group", 15: "location", 18: "person", 20: "plant", 26: "state", 27: "substance",
}  # fmt: skip
PER_CLASS = 900
LEAST_WORDS = 3
SIZES = {"test": 2100, "validation": 700, "pool": 4200, "teacher_train": 5600}


def read_definitions(nouns: Path) -> dict[str, tuple[str, set[int]]]:
    """Map the normalized definition to (definition, numbers of the lexicographer files it occurs in)."""
    definitions = {}
    for line in nouns.read_text(encoding="ascii").splitlines():
        if line.startswith("  "):  # the license, at the head of the file
            continue
        fields, gloss = line.split(" | ", 1)
        definition = re.split(r';?\s*"', gloss)[0].strip(" ;")  # the examples follow in quotation marks
        if len(definition.split()) >= LEAST_WORDS:
            _, files = definitions.setdefault(normalized(definition), (definition, set()))
            files.add(int(fields.split()[1]))
    return definitions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nouns", type=Path, default=Path("/usr/share/wordnet/data.noun"))
    nouns = checked(parser.parse_args().nouns, SHA256)
    labels = {number: label for label, number in enumerate(CLASSES)}
    by_label = defaultdict(list)
    for definition, files in read_definitions(nouns).values():
        if len(files) == 1 and files <= CLASSES.keys():  # a definition shared by two classes has no right answer
            label = labels[min(files)]
            by_label[label].append({"text": definition, "label": label})
    rows = [row for label in sorted(by_label) for row in spread(by_label[label], PER_CLASS)]
    path = DATA / "glosses.jsonl.gz"
    write_rows(path, split_by_label(rows, SIZES))
    license = "WordNet 3.0 license (any purpose, keep the notice): data/LICENSE.WordNet.txt"
    register(
        path,
        source="WordNet 3.0 data.noun (Debian wordnet-base 1:3.0-37)",
        license=license,
        script="scripts/build_glosses.py",
    )


def spread(rows: list[dict], count: int) -> list[dict]:
    """Take `count` rows at equal distances: neighbors in WordNet's file are relatives,
    with near-identical definitions.
    """
    return [rows[i * len(rows) // count] for i in range(count)]


if __name__ == "__main__":
    main()
