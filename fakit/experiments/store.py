"""Runs on disk: a manifest and JSON lines, append-only, that any pandas reads.

    runs/
      manifest.json   what this is, when and by which versions and machine it was made, the format's version
      runs.jsonl      one line a finished run: run_id, task, arm, seed, config, metrics, cost
      steps.jsonl     one line a logged step: run_id, step, the loss terms

A record is written under a lock and synced; one that a full disk cuts short is taken back, so only a kill in the middle
of the very last line leaves a part of it. Such a rest is never taken for data and never thrown away: the next writer
moves it to `runs.jsonl.rest`, with a warning.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from fakit.experiments.config import OLD_NAMES, by_names
from fakit.files import append_whole, locked, write_whole
from fakit.training.environment import environment

FORMAT = "fakit-runs"
VERSION = 1
LOCK = ".lock"  # there while a record is written


class RunStore:
    """An existing runs directory.

    Args:
        path: the directory; `RunStore.create` makes one, `RunStore.open` opens or creates.

    Raises:
        ValueError: when the directory holds no runs, or runs of another format version; says what was found.

    Example:
        >>> store = RunStore.open("runs", what="my first study")
        >>> store.append_run({"run_id": "a", "task": "glosses", "arm": "none", "seed": 0, "test": {"accuracy": 0.8}})
        >>> store.runs()["test.accuracy"].mean()
        0.8
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = self._read_manifest()

    @classmethod
    def create(cls, path: str | Path, what: str = "distillation runs") -> RunStore:
        """Make a new runs directory. Raises ValueError when one is there already, or the folder holds other files."""
        path = Path(path)
        if not _is_free(path):
            raise ValueError(
                f"{path}: asked for a new runs directory, found {_listing(path)}. "
                f"Open it with RunStore({str(path)!r}) if it holds runs, or choose an empty folder."
            )
        return cls.open(path, what)

    @classmethod
    def open(
        cls,
        path: str | Path,
        what: str = "distillation runs",
        arms: Iterable[str] = (),
        against: str | None = None,
    ) -> RunStore:
        """Open a runs directory, or create it where the folder is missing or empty.

        Args:
            what: what is recorded, for its manifest. arms: in the order that a study names them, likewise. against: the
                level that a study compares with in every cell, likewise.
        """
        path = Path(path)
        if _is_free(path):
            path.mkdir(parents=True, exist_ok=True)
            with locked(path / LOCK):
                if _is_free(path):  # another process may have been first
                    write_whole(path / "manifest.json", json.dumps(_manifest(what, arms, against), indent=2) + "\n")
        return cls(path)

    def append_run(self, record: Mapping[str, Any]) -> None:
        """Write one finished run. Raises ValueError without a run_id, or when that run is recorded already."""
        if not record.get("run_id"):
            raise ValueError(f"a run needs a run_id; found the keys {', '.join(record) or 'none'}.")
        with self._writing():
            if self.has(record["run_id"]):
                raise ValueError(f"{record['run_id']} is recorded in {self.path} already; runs are append-only.")
            self._append("runs.jsonl", [record])

    def append_steps(self, run_id: str, steps: Iterable[Mapping[str, Any]]) -> None:
        """Write the logged steps of a run, one mapping with a "step" each."""
        with self._writing():
            self._append("steps.jsonl", [{"run_id": run_id, **step} for step in steps])

    def has(self, run_id: str) -> bool:
        """Whether this run is finished and recorded."""
        return any(record["run_id"] == run_id for record in self.records())

    def records(self) -> list[dict[str, Any]]:
        """The finished runs as they were written, in that order; what has been renamed since, by its new name."""
        return [_by_current_names(record) for record in self._read("runs.jsonl")]

    def record(self, run_id: str) -> dict[str, Any]:
        """One finished run. Raises ValueError naming the nearest of the recorded ones."""
        records = {record["run_id"]: record for record in self.records()}
        if run_id not in records:
            raise ValueError(f"{run_id} is not recorded in {self.path}, which holds {', '.join(records) or 'no run'}.")
        return records[run_id]

    def runs(self) -> pd.DataFrame:
        """One row a finished run; nested keys are dotted columns: "test.accuracy", "config.training.steps".

        Records of before, which do not say with which versions they were made, get those of the directory's manifest.
        """
        made = {name: self.manifest.get("versions", {}).get(name) for name in ("fakit", "torch", "transformers")}
        records = [{**record, "versions": record.get("versions") or made} for record in self.records()]
        return pd.json_normalize(records) if records else pd.DataFrame(columns=["run_id"])

    def steps(self, run_id: str | None = None) -> pd.DataFrame:
        """One row a logged step, of one run or of all; of a run begun twice, the later writing of a step holds."""
        rows = [row for row in self._read("steps.jsonl") if run_id is None or row["run_id"] == run_id]
        frame = pd.DataFrame(rows, columns=None if rows else ["run_id", "step"])
        return frame.drop_duplicates(["run_id", "step"], keep="last").reset_index(drop=True)

    def __len__(self) -> int:
        return len(self.records())

    def __repr__(self) -> str:
        return (
            f"RunStore({str(self.path)!r}): {self.manifest['what']}, {len(self)} runs, made {self.manifest['created']}"
        )

    def _read_manifest(self) -> dict[str, Any]:
        path = self.path / "manifest.json"
        if not path.is_file():
            raise ValueError(
                f"{self.path} is no runs directory: looked for manifest.json, found {_listing(self.path)}. "
                "Name the folder that `fakit distill` or `fakit study` wrote, or make one with RunStore.create."
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found, found_version = manifest["format"], manifest["version"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path} is corrupt or another program\'s: expected JSON with "format" and "version" ({error!r}). '
                "Restore it from where the runs came from; the lines in runs.jsonl are untouched."
            ) from error
        if (found, found_version) != (FORMAT, VERSION):
            raise ValueError(
                f"{self.path} holds {found} of version {found_version}, "
                f"this fakit reads {FORMAT} of version {VERSION}. "
                f"Read it with the fakit that wrote it ({manifest.get('versions', {}).get('fakit', 'not noted')}), "
                "or write new runs to another folder."
            )
        return manifest

    def _read(self, name: str) -> list[dict[str, Any]]:
        """Whole lines of a file. A cut last line is warned about and left out; any other bad line is a ValueError."""
        path = self.path / name
        if not path.is_file():
            return []
        *lines, rest = path.read_bytes().split(b"\n")
        if rest:
            warnings.warn(
                f"{path}: the last line is cut short ({len(rest)} bytes, line {len(lines) + 1}), as by a kill while "
                f"writing; it is left out, and the next write moves it to {name}.rest.",
                stacklevel=3,
            )
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                record["run_id"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: line {number} is corrupt: expected a JSON object with a run_id, "
                    f"found {line[:60]!r} ({error!r}). Take the line out (keep a copy) or restore the file."
                ) from error
            records.append(record)
        return records

    @contextmanager
    def _writing(self):
        """Hold the directory for one write, as two studies may share it, and start from whole lines."""
        with locked(self.path / LOCK):
            for name in ("runs.jsonl", "steps.jsonl"):
                self._set_rest_aside(self.path / name)
            yield

    def _append(self, name: str, records: list[Mapping[str, Any]]) -> None:
        lines = "".join(
            json.dumps(strict_json(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records
        )
        append_whole(self.path / name, lines)

    def _set_rest_aside(self, path: Path) -> None:
        """Move what follows the last newline to `<name>.rest`: first kept, then cut off."""
        if not path.is_file() or not (content := path.read_bytes()) or content.endswith(b"\n"):
            return
        whole = content.rfind(b"\n") + 1
        append_whole(path.with_name(path.name + ".rest"), content[whole:] + b"\n")
        os.truncate(path, whole)
        warnings.warn(
            f"{path}: a last line of {len(content) - whole} bytes, cut short by a kill, was moved to {path.name}.rest.",
            stacklevel=5,
        )


def _by_current_names(record: dict[str, Any]) -> dict[str, Any]:
    renamed = {"labelled": "labeled", "unlabelled": "unlabeled"}
    record = {renamed.get(key, key): value for key, value in record.items()}
    return record | {"config": by_names(record["config"], OLD_NAMES)} if "config" in record else record


def _is_free(path: Path) -> bool:
    """Missing, or a folder with nothing in it but what an interrupted creation leaves."""
    if not path.exists():
        return True
    return path.is_dir() and {item.name for item in path.iterdir()} <= {"manifest.json.partial", LOCK}


def strict_json(value: Any) -> Any:
    """Strict JSON has no nan or inf: null, so that every reader takes the line; numpy and torch scalars as numbers."""
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _manifest(what: str, arms: Iterable[str], against: str | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "what": what,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"arms": named} if (named := list(arms)) else {}),
        **({"against": against} if against is not None else {}),
    } | environment()


def _listing(path: Path) -> str:
    if not path.exists():
        return "no such folder"
    if not path.is_dir():
        return "a file of that name"
    names = sorted(item.name for item in path.iterdir())
    return (", ".join(names[:8]) + (" …" if len(names) > 8 else "")) or "an empty folder"


def now() -> str:
    """The time of a record: UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
