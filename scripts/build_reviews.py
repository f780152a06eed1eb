"""Build data/reviews.jsonl.gz: sentences of film reviews with the mean sentiment that human raters gave them.

    python scripts/build_reviews.py

Source: the data of Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text" (ICWSM 2014), as shipped in the sdist of vaderSentiment 3.3.2. Sentences whose mean score lies within (-0.5, 0.5)
are left out: raters disagree on them.
"""

import io
import tarfile
import tempfile
from pathlib import Path

from _build import DATA, download, normalized, register, split_by_label, write_rows

REQUIREMENT = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SENTENCES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CLEAR = 0.5  # least |mean score| on the raters' scale of -4 … 4
SIZES = {"test": 1570, "validation": 500, "pool": 3500, "teacher_train": 10_000}  # the last takes the rest, about 4,500


def read_rows(sdist: Path) -> list[dict]:
    with tarfile.open(sdist) as outer, tarfile.open(fileobj=io.BytesIO(outer.extractfile(INNER).read())) as inner:
        lines = inner.extractfile(SENTENCES).read().decode("utf-8").splitlines()
    rows, seen = [], set()
    for line in lines:
        _, score, text = line.split("\t")
        text = " ".join(text.replace("''", '"').split())
        if abs(float(score)) >= CLEAR and normalized(text) not in seen:
            seen.add(normalized(text))
            rows.append({"text": text, "label": int(float(score) > 0), "score": round(float(score), 4)})
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = read_rows(download(REQUIREMENT, SHA256, Path(folder), "--no-binary", ":all:"))
    path = DATA / "reviews.jsonl.gz"
    write_rows(path, split_by_label(rows, SIZES))
    source = f"PyPI {REQUIREMENT} (sdist), {SENTENCES}; cite Hutto & Gilbert, ICWSM 2014"
    register(path, source=source, license="MIT", script="scripts/build_reviews.py")


if __name__ == "__main__":
    main()
