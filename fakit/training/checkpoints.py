"""Checkpoints that are whole and know whose they are: a list of their files with checksums, written last,
and what they are bound to.

    checkpoint-40/
      …                  what the Trainer writes, the student, projections.safetensors, objective.json
      checkpoint.json    "files": bytes and sha256 of each; "whose": versions, configuration, student, teacher,
      data, objective, arguments

`checkpoint.json` is begun without files and replaced when everything else is on the disk, so a folder whose list is not
there was never finished. What may differ between a checkpoint and the run that goes on from it: the output folder, how
often the run logs, evaluates and saves (the Trainer keeps the intervals of the checkpoint), and, with a trainer of
one's own, the number of steps or epochs (the schedule is then that of the new number).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fakit.files import sha256, sync, write_whole
from fakit.training.environment import installed

SEAL = "checkpoint.json"
VERSION = 1
OPTIONAL = {"session.json"}  # the curve before the checkpoint: who deletes it goes on without
logger = logging.getLogger(__name__)


def versions() -> dict[str, str | None]:
    """Of what a run's numbers depend on."""
    return installed("fakit", "torch", "transformers")


# -- writing ----------------------------------------------------------------------------------------------------------


def begin(checkpoint: Path) -> None:
    """An empty folder for a checkpoint, marked as unfinished; one that is there already steps aside until `seal`."""
    if checkpoint.is_dir():
        shutil.rmtree(_aside(checkpoint), ignore_errors=True)
        checkpoint.rename(_aside(checkpoint))
    checkpoint.mkdir(parents=True)
    _write_seal(checkpoint, {"version": VERSION, "files": None})


def seal(checkpoint: Path, whose: Mapping[str, Any]) -> None:
    """Have all files reach the disk, then list them: from now on the checkpoint is whole."""
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL):
        sync(path)
        files[path.relative_to(checkpoint).as_posix()] = _facts(path)
    for folder in (path for path in checkpoint.rglob("*") if path.is_dir()):
        sync(folder)
    _write_seal(checkpoint, {"version": VERSION, "whose": whose, "files": files})
    sync(checkpoint.parent)
    shutil.rmtree(_aside(checkpoint), ignore_errors=True)


def add_file(checkpoint: Path, name: str) -> None:
    """List a file that was written after the others; where the checkpoint has no list, nothing is done."""
    found = _read_seal(checkpoint)
    if found is not None and found.get("files") is not None:
        _write_seal(checkpoint, found | {"files": found["files"] | {name: _facts(checkpoint / name)}})


def give_up(checkpoint: Path, error: Exception) -> Exception:
    """Take back a checkpoint that could not be written; returns what to raise: an OSError where it was the disk."""
    full = checkpoint.is_dir() and shutil.disk_usage(checkpoint).free < 2**20
    shutil.rmtree(checkpoint, ignore_errors=True)
    if _aside(checkpoint).exists():
        _aside(checkpoint).rename(checkpoint)
    torch_writer = isinstance(error, RuntimeError) and (
        "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
    )
    if not (full or torch_writer or isinstance(error, OSError | SafetensorError)):
        return error
    reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
    return OSError(
        getattr(error, "errno", None) or errno.ENOSPC,
        f"{checkpoint.name} could not be written ({reason}) and was taken back; the checkpoints before it are whole: "
        "make room and resume",
        str(checkpoint.parent),
    )


def rotate(folder: Path, step: int, limit: int | None, best: str | None) -> None:
    """Of the checkpoints up to `step`, keep the last `limit` whole ones and the best; the clock has no say."""
    if not limit or limit < 1:
        return
    here = [(number, path) for number, path in checkpoints(folder) if number <= step]
    finished = [path for _, path in here if (_read_seal(path) or {}).get("files") is not None]
    kept = {*finished[-1:], *([Path(best)] if best else [])}
    for path in reversed(finished):  # the best and the last are two of the limit
        if len(kept) < limit:
            kept.add(path)
    for _, path in here:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


# -- reading ----------------------------------------------------------------------------------------------------------


def checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint-N in a folder, by step."""
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(folder).glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def last_whole_checkpoint(folder: str | Path, processes: int = 1) -> Path | None:
    """The newest checkpoint-N of a trainer's folder that is whole;
    a broken one is passed over with a warning that says why.

    Every file is compared with its checksum. Nothing is unpickled here.

    Args:
        folder: the trainer's output_dir; None of it need exist.
        processes: how many processes train. Each keeps its own random state, and they share the order of the texts.

    Raises:
        ValueError: the last whole checkpoint was written by another number of processes.
    """
    for _, checkpoint in reversed(checkpoints(folder)):
        found = flaw(checkpoint)
        if found is None:
            _check_processes(checkpoint, processes)
            return checkpoint
        logger.warning("%s is not whole (%s) and is passed over.", checkpoint, found)
    return None


def began_in_bf16(checkpoint: Path) -> bool | None:
    """Whether a checkpoint's run computes in bf16; None where it does not say. A run goes on as it began,
    on whichever machine.
    """
    whose = (_read_seal(checkpoint) or {}).get("whose", {})
    return whose.get("arguments", {}).get("bf16")


def was_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was once written to its end, whatever became of it since."""
    found = _read_seal(checkpoint)
    begun = found is not None and not found.get("damaged") and found["files"] is None
    return (checkpoint / "trainer_state.json").is_file() and not begun


def flaw(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: unfinished, a file missing, cut off or changed,
    or no optimizer to go on with; None: nothing.
    """
    found = _read_seal(checkpoint)
    if found is None or found.get("files") is None:
        if not (checkpoint / "trainer_state.json").is_file():
            return "trainer_state.json, which is written last, is missing"
        if found is None:
            return f"{SEAL}, the list of its files, is missing; a fakit that kept none may have written it"
        return f"{SEAL}, the list of its files, is damaged" if found.get("damaged") else "it was not written to its end"
    for name, facts in found["files"].items():
        path = checkpoint / name
        if not path.is_file():
            if name not in OPTIONAL:
                return f"{name} is missing"
        elif path.stat().st_size != facts["bytes"]:
            return f"{name} is cut off or damaged: {path.stat().st_size} bytes instead of {facts['bytes']}"
        elif sha256(path) != facts["sha256"]:
            return f"{name} is cut off or damaged: its sha256 is not the one that was written"
    return _lacks(found["files"])


def check(checkpoint: str | Path, whose: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint that is damaged, or that another run wrote.

    One of a fakit that kept no list of files is looked at as far as it can be: files that end where they say,
    the student's configuration.

    Raises:
        ValueError: what is damaged; or each key that differs, with both values.
    """
    checkpoint = Path(checkpoint)
    found = _read_seal(checkpoint)
    if found is None:
        if not (checkpoint / "trainer_state.json").is_file():
            return  # no checkpoint at all: whoever loads it says so
        broken, theirs = _flaw_without_list(checkpoint), {}
        config = checkpoint / "config.json"
        if broken is None and config.is_file():
            ours = whose.get("student", {})
            written = json.loads(config.read_text(encoding="utf-8"))
            theirs = {"student": {key: written[key] for key in ours if key in written}}
            whose = {"student": {key: ours[key] for key in theirs["student"]}}
        logger.warning(
            "%s has no %s: whose it is, and whether it is whole, can only be checked in part.", checkpoint, SEAL
        )
    else:
        broken, theirs = flaw(checkpoint), found.get("whose", {})
    if broken is not None:
        raise ValueError(
            f"{checkpoint} is not whole: {broken}. Resume from the checkpoint before it; resume_from_checkpoint=True "
            "(--resume) finds it."
        )
    differing = differences(theirs, whose, _settings(checkpoint))
    if differing:
        lines = "\n".join(
            f"  {key}: {theirs} in the checkpoint, {ours} here" for key, (theirs, ours) in differing.items()
        )
        raise ValueError(
            f"{checkpoint} belongs to another run, and would be trained on and recorded as this one:\n{lines}\n"
            "Resume with the settings, data and versions it was started with, or start a new run in another folder."
        )


def differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], live: Mapping[str, Any] | None = None
) -> dict[str, tuple]:
    """{dotted key: (theirs, ours)} where two descriptions differ;
    a configuration that differs stands for what follows from it.

    `live`: weights and temperature at the checkpoint. They are restored from it,
    so an objective that has them already is its own.
    """
    a, b = flat(json.loads(json.dumps(theirs))), flat(json.loads(json.dumps(ours)))
    found = {key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)}
    for key, value in (live or {}).items():
        if key in found and found[key][1] == value:
            del found[key]
    from_config = {key: both for key, both in found.items() if key.startswith(("config.", "versions."))}
    return from_config if any(key.startswith("config.") for key in from_config) else found


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {path: value} if path else {}
    return {
        k: v for name, item in value.items() for k, v in flat(item, f"{path}.{name}" if path else str(name)).items()
    }


# -- small things -----------------------------------------------------------------------------------------------------


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _write_seal(checkpoint: Path, content: dict[str, Any]) -> None:
    content = {key: value for key, value in content.items() if key != "sha256"}
    write_whole(checkpoint / SEAL, json.dumps({"sha256": _digest(content), **content}, indent=1))


def _read_seal(checkpoint: Path) -> dict[str, Any] | None:
    """None where there is none; {"damaged": True} where it is not as it was written."""
    path = checkpoint / SEAL
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = found.pop("sha256") == _digest(found)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        whole = False
    return found if whole else {"damaged": True}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()


def _aside(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.aside")


def _lacks(files: Mapping[str, Any]) -> str | None:
    """A checkpoint of save_only_model, from which the Trainer would go on with a fresh optimizer."""
    if not any(name.startswith("optimizer") for name in files) or "scheduler.pt" not in files:
        return "it was written without optimizer and scheduler (save_only_model)"
    return None


def _settings(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "objective.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    weights = {name: own["weight"] for name, own in settings.items()}
    others = {name: {key: v for key, v in own.items() if key != "weight"} for name, own in settings.items()}
    return flat({"objective": {"weights": weights, **others}})


def _flaw_without_list(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint of before: a file that is missing or does not end where it says it ends."""
    if not list(checkpoint.glob("*.safetensors")) or not list(checkpoint.glob("rng_state*.pth")):
        return "weights or random states are missing"
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # compares the size of the file with what its header promises
                    pass
            elif path.suffix in (".pt", ".pth"):
                zipfile.ZipFile(path).close()  # torch's format, whose table of contents stands at the end
        except (ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name} is cut off or damaged: {error}"
    for sharded in (path for path in checkpoint.iterdir() if path.is_dir()):
        if not (sharded / ".metadata").is_file():
            return f"{sharded.name} has no .metadata, which is written last"
    return _lacks({path.name: None for path in checkpoint.iterdir()})


def _check_processes(checkpoint: Path, processes: int) -> None:
    written = len(list(checkpoint.glob("rng_state*.pth")))
    if written != processes:
        raise ValueError(
            f"{checkpoint} holds the random states of {written} processes, and {processes} were started: the batches "
            f"would not be the same. Resume with {written} (accelerate launch --num_processes {written}), or start a "
            "new run in another folder (--out)."
        )
