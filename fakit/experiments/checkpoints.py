"""Which checkpoint a broken run goes on from: the last whole one, whatever a crash left behind it."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)


def last_whole_checkpoint(folder: str | Path, processes: int = 1) -> Path | None:
    """The newest checkpoint-N of a trainer's folder that is whole; a broken one is passed over with a warning that says why.

    A trainer writes a checkpoint file by file and its trainer_state.json last, so a process killed in between leaves a folder without
    it. Nothing is unpickled here.

    Args:
        folder: the trainer's output_dir; None of it need exist.
        processes: how many processes train. Each keeps its own random state, and they share the order of the texts.

    Raises:
        ValueError: the last whole checkpoint was written by another number of processes.
    """
    found = [(int(match[1]), path) for path in Path(folder).glob("checkpoint-*") if (match := _name(path))]
    for _, checkpoint in sorted(found, reverse=True):
        flaw = _flaw(checkpoint)
        if flaw is None:
            _check_processes(checkpoint, processes)
            return checkpoint
        logger.warning("%s is not whole (%s) and is passed over.", checkpoint, flaw)
    return None


def _name(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if path.is_dir() else None


def _flaw(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a file that is missing or does not end where it says it ends."""
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return "trainer_state.json, which is written last, is missing"
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
    return None


def _check_processes(checkpoint: Path, processes: int) -> None:
    written = len(list(checkpoint.glob("rng_state*.pth")))
    if written != processes:
        raise ValueError(
            f"{checkpoint} holds the random states of {written} processes, and {processes} were started: the batches would not be the same. "
            f"Resume with {written} (accelerate launch --num_processes {written}), or start a new run in another folder (--out)."
        )
