"""What checks found, on paper: record.json and README.md in a folder of the card's name."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import FAILED, NOT_RUN, PASSED, Number, Outcome
from fakit.experiments.store import strict_json
from fakit.files import write_whole

RECORD, PAGE = "record.json", "README.md"
VERSION = 1


def folder_name(card: str) -> str:
    """ "NVIDIA GeForce RTX 4090" → "nvidia-geforce-rtx-4090" """
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def record_of(machine: Mapping[str, Any], outcomes: Sequence[Outcome], full: bool, seconds: float) -> dict[str, Any]:
    """All of a run, for JSON.

    Args:
        machine: `benchmarks.gpu.machine.describe`.
        full: sizes of real work.
        seconds: of the whole run.
    """
    counts = Counter(outcome.status for outcome in outcomes)
    return {
        "version": VERSION,
        **machine,
        "full": full,
        "seconds": round(seconds, 1),
        "counts": {status: counts[status] for status in (PASSED, FAILED, NOT_RUN)},
        "checks": [outcome.as_dict() for outcome in outcomes],
    }


def summary(record: Mapping[str, Any]) -> str:
    """ "NVIDIA T4: 98 checks passed, 0 failed, 7 not run; 30 November 2026, commit 0123456" """
    counts = record["counts"]
    commit = "no commit" if record["commit"] is None else f"commit {record['commit'][:9]}"
    changed = " with changes" if record["changed"] else ""
    return (
        f"{record['card']}: {counts[PASSED]} checks passed, {counts[FAILED]} failed, {counts[NOT_RUN]} not run; "
        f"{record['date'][:10]}, {commit}{changed}"
    )


def write(folder: Path, record: Mapping[str, Any]) -> list[Path]:
    """Write both files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / RECORD, folder / PAGE]
    write_whole(paths[0], json.dumps(strict_json(record), indent=1, ensure_ascii=False) + "\n")
    write_whole(paths[1], page(record))
    return paths


def page(record: Mapping[str, Any]) -> str:
    """The record as Markdown: the machine, what failed, what was not run and why, and all numbers by group."""
    checks = record["checks"]
    lines = [f"# {record['card']}", "", f"{summary(record)}.", "", *_machine(record)]
    if not record["full"]:
        lines += ["", "Small sizes: they show that checks run and numbers are right, and no cost."]
    for status, title in ((FAILED, "Failed"), (NOT_RUN, "Not run")):
        found = [check for check in checks if check["status"] == status]
        if found:
            lines += ["", f"## {title}", ""]
            lines += [f"* **{check['group']}: {check['name']}.** {_cell(check['reason'])}" for check in found]
    for group in dict.fromkeys(check["group"] for check in checks):
        rows = [check for check in checks if check["group"] == group and check["numbers"]]
        if rows:
            lines += ["", f"## {group[0].upper()}{group[1:]}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _machine(record: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    lacking = ", ".join(name for name, version in record["versions"].items() if not version)
    memory = f", {record['memory_bytes'] / 2**30:.1f} GiB" if "memory_bytes" in record else ""
    capability = f", compute capability {record['compute_capability']}" if "compute_capability" in record else ""
    machine = record["machine"]
    return [
        f"* Card: {record['card']}{memory}{capability}; driver {record['driver'] or 'none'}, "
        f"CUDA {record['cuda'] or 'none'}",
        f"* Machine: {machine['processor']}, {machine['cores']} cores; {machine['system']}",
        f"* Packages: {versions}" + (f"; not installed: {lacking}" if lacking else ""),
        f"* The run: {record['date']}, {record['seconds']:.0f} s, commit {record['commit'] or 'unknown'}"
        + (", with changes that are not committed" if record["changed"] else ""),
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row["numbers"]))
    lines = [f"| check | | {' | '.join(names)} |", f"|---|---|{'---:|' * len(names)}"]
    for row in rows:
        cells = [_number(row["numbers"].get(name)) for name in names]
        lines.append(f"| {row['name']} | {row['status']} | {' | '.join(cells)} |")
    return lines


def _number(value: Number | None) -> str:
    if value is None:
        return "–"
    return _cell(value) if isinstance(value, str) else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
