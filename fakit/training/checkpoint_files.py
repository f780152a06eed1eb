"""The files of a checkpoint: the student, as it is exported, and beside it projections and settings."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fakit.models.kinds import ties
from fakit.models.low_rank_linear import FILE, pairs, save_pairs
from fakit.models.peft_students import ADAPTER, is_adapted, load_adapter
from fakit.objective.objective import Objective
from fakit.objective.schedules import Schedule
from fakit.training.distiller import Distiller
from fakit.training.ownership import setting_facts

PROJECTIONS, OBJECTIVE = "projections.safetensors", "objective.json"


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What of a state lies below a prefix, named without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def write_student(folder: Path, student: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """A student alone, of its distiller's `state`: as transformers writes it, or in pairs of thin matrices."""
    own = part(state, "student.")
    if pairs(student):
        tied = ties(student)
        save_pairs(student, {name: x for name, x in own.items() if name not in tied}, folder)
    else:
        student.save_pretrained(folder, state_dict=own)


def write_objective(folder: Path, objective: Objective, state: dict[str, Tensor]) -> None:
    """What is trained beside the student, of the distiller's `state`, and what may be set while training."""
    rest = {k: v.contiguous() for k, v in part(state, "objective.").items()}
    save_file(rest, folder / PROJECTIONS)
    (folder / OBJECTIVE).write_text(json.dumps(setting_facts(objective), indent=2))


def read_state(folder: Path, distiller: Distiller) -> dict[str, Tensor]:
    """What `distiller.load_state_dict` takes. An adapter is read into the student at once, and is not in it.

    Raises:
        ValueError: a folder that is no checkpoint, or one of other projections.
    """
    adapted, in_pairs = is_adapted(distiller.student), bool(pairs(distiller.student))
    own = ADAPTER if adapted else FILE if in_pairs else "config.json"
    missing = [name for name in (own, PROJECTIONS, OBJECTIVE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is no checkpoint of a DistillationTrainer: {', '.join(missing)} missing. Give a "
            "checkpoint-N folder of this trainer's output_dir; an exported student starts a new run instead."
        )
    projections = load_file(folder / PROJECTIONS)
    ours = distiller.objective.state_dict()
    if {k: v.shape for k, v in projections.items()} != {k: v.shape for k, v in ours.items()}:
        raise ValueError(
            f"{folder} holds projections {sorted(projections)}, this objective has {sorted(ours)}: resume with the "
            "layer map and the widths that the run was started with."
        )
    state = {f"objective.{name}": value for name, value in projections.items()}
    if adapted:
        load_adapter(distiller.student, folder)
    elif in_pairs:
        found = load_file(folder / FILE)
        found |= {name: found[first] for name, first in ties(distiller.student).items()}
        state |= {f"student.{name}": value for name, value in found.items()}
    else:
        student = type(distiller.student).from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        state |= {f"student.{name}": value for name, value in student.state_dict().items()}
    return state


def read_settings(folder: Path, objective: Objective) -> None:
    """Set weights and temperatures as they were."""
    settings = json.loads((folder / OBJECTIVE).read_text())
    objective.settings = {
        name: {key: Schedule.from_dict(value) if isinstance(value, dict) else value for key, value in own.items()}
        for name, own in settings.items()
    }
