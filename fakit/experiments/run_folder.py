"""Whose folder it is: a run writes to its own alone, and goes on only with what it left there itself."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from fakit.experiments.cache_config import without_place
from fakit.experiments.config import OLD_NAMES, ExperimentConfig, by_names
from fakit.experiments.store import RunStore
from fakit.files import check_room, claimed
from fakit.training.checkpoints import checkpoints, differences, flaw, last_whole_checkpoint, was_finished

RUN = "run.json"
logger = logging.getLogger(__name__)


@contextmanager
def alone_in_folder(config: ExperimentConfig, store: RunStore | None) -> Iterator[None]:
    """Hold the run's place in the store and its folder, so that a second run of them says so at once."""
    if os.environ.get("RANK", "0") != "0":  # of several processes the first holds them for all
        yield
        return
    with ExitStack() as held:
        if store is not None:
            check_room(store.path, 2**20, "the record of the run")
            held.enter_context(claimed(store.path / f".{config.run_id}.lock", f"{config.run_id} in {store.path}"))
        if config.out is not None:
            out = Path(config.out)
            if not out.exists():
                held.callback(_remove_if_empty, out)  # where the run was refused
            check_room(out, 0, "the student")
            held.enter_context(claimed(out / ".run.lock", str(out)))
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def finished_student(config: ExperimentConfig, out: Path, resume: bool) -> dict[str, Any] | None:
    """What run.json says of a student that is trained and not recorded; None where there is training to do.

    Raises:
        ValueError: what lies in the folder is not this run's, or is and `resume` is off.
    """
    student = [p.name for pattern in ("*.safetensors", "*.bin", "config.json") for p in out.glob(pattern)]
    saved = checkpoints(out / "checkpoints")
    path = out / RUN
    if not path.is_file():
        if student:
            raise ValueError(
                f"{out} holds a model already ({', '.join(sorted(student)[:3])}), which the student would overwrite; "
                "choose another folder for it (out), or remove that one."
            )
        if saved and not resume:
            raise ValueError(
                f"{out} holds checkpoints up to step {saved[-1][0]}; resume=True (--resume) goes on from them, or "
                "choose another `out`."
            )
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs, finished = found["config"], found["finished"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}); choose another folder (out), or remove {out} to train anew."
        ) from error
    if not (student or saved):
        return None  # a run that ended before it had anything to lose
    if other := differences({"config": binding(theirs)}, {"config": binding(config.to_dict())}):
        raise ValueError(refusal(out, other))
    if not resume:
        what = (
            "a finished student" if finished else f"an unfinished run, saved up to step {saved[-1][0] if saved else 0},"
        )
        raise ValueError(
            f"{out} holds {what} of this configuration already; resume=True (--resume) goes on with it. To train anew, "
            "choose another folder (out), or remove that one."
        )
    return found if finished else None


def refusal(out: Path, other: dict[str, tuple]) -> str:
    """What is said of a folder that belongs to another run: each difference, there and here."""
    lines = "\n".join(f"  {key}: {theirs} there, {ours} here" for key, (theirs, ours) in other.items())
    return (
        f"{out} belongs to another run:\n{lines}\n"
        "Choose another folder (out), remove that one, or resume with what it was started with."
    )


def binding(config: dict[str, Any]) -> dict[str, Any]:
    """What of a configuration a run's numbers follow from: all but its folders and how often it logs,
    evaluates and saves.
    """
    aside = ("log_every", "eval_every", "save_every")
    config = by_names(config, OLD_NAMES)
    training = {key: value for key, value in config["training"].items() if key not in aside}
    return without_place({key: value for key, value in config.items() if key != "out"}) | {"training": training}


def checkpoint_of(folder: Path, processes: int) -> Path | None:
    """Where a broken run goes on; None: at its start, with a warning where checkpoints were begun and none was
    finished.

    Raises:
        ValueError: there were finished checkpoints and none is whole:
            starting over would cost what may yet be restored.
    """
    found = last_whole_checkpoint(folder, processes)
    if found is None and (all_ := checkpoints(folder)):
        if lost := [path for _, path in all_ if was_finished(path)]:
            reasons = "; ".join(f"{path.name}: {flaw(path)}" for path in lost)
            raise ValueError(
                f"{folder} holds no whole checkpoint to go on from ({reasons}). Restore one, or remove the folder to "
                "train from the start."
            )
        logger.warning("%s holds no finished checkpoint: the run starts at step 0.", folder)
    return found
