"""`make_student`: who learns in a run. The teacher shrunk, a model that was saved, or the teacher compressed first."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fakit.experiments.build import Prepared, build_objective, pad_as
from fakit.experiments.config import ExperimentConfig
from fakit.experiments.smaller import Made, kept, make_smaller
from fakit.layer_maps import LayerMap
from fakit.models.blocks import without_adapter
from fakit.models.load import full_precision_state, is_quantized
from fakit.models.peft_students import LORA, TASK_TYPES

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fakit.tasks import TextTask


def make_student(
    config: ExperimentConfig, prepared: Prepared, folder: Path | None = None, resume: bool = False
) -> Made:
    """The trainable student of a run. Draws from torch's generators, which a compression sets by the run's seed anew.

    Its configuration names the task's classes, so the exported student answers with them. Runs after each other that
    ask for the same compression share it (`prepared` holds the last one), so arms of a study start from one student.

    Args:
        folder: where a compression that is stopped leaves what it has finished; None: nowhere.
        resume: go on from what is there.

    Raises:
        ValueError: before any work, what the parts refuse.
    """
    from transformers import set_seed

    from fakit.models.class_names import adopt_classes
    from fakit.models.untrained import untrained

    asked, task = config.student, prepared.task
    if asked.compression is not None:
        if prepared.compressed is None or prepared.compressed[0] != asked.compression:
            _check_alone(config)
            _rehearse(config, prepared)
            prepared.compressed = None  # two at once would fill the memory
            length = config.training.max_length
            resume = resume and folder is not None
            made = make_smaller(asked.compression, prepared, length, config.seed, folder, resume, scored=False)
            prepared.compressed = asked.compression, made
        held = prepared.compressed[1]
        made = Made(copy.deepcopy(held.model).requires_grad_(True), held.kept, held.facts)
        set_seed(config.seed)
    elif asked.untrained is not None:
        made = Made(untrained(asked.untrained, prepared.teacher, task.model_task), None)
        pad_as(made.model, prepared.teacher)
    elif asked.path is not None:
        made = Made(_saved(config, prepared), None)
    else:
        made = _shrunk(config, prepared)
    made.model.get_input_embeddings().requires_grad_(not asked.freeze_embeddings)
    if task.label_names:
        adopt_classes(made.model, task.label_names)
    return made if asked.lora is None else replace(made, model=adapted_student(made.model, asked.lora, task))


def adapted_student(model: PreTrainedModel, lora: Mapping[str, Any], task: TextTask) -> PeftModel:
    """The model with an adapter, and nothing but that to train; a classifier's head is trained whole beside it."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    settings = {**LORA, **lora, "task_type": TASK_TYPES[task.model_task]}
    names: dict[int, list[str]] = {}  # of each weight; a tied one has several
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    try:
        adapted = get_peft_model(model, LoraConfig(**settings))
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"student.lora: {dict(lora)} does not fit {type(model).__name__}: {error}") from error
    for name, layer in adapted.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, ModulesToSaveWrapper):
            tied = names.get(id(getattr(layer.get_base_layer(), "weight", None)), [])
            if len(tied) > 1:
                raise ValueError(
                    f"student.lora.target_modules: {name.rpartition('.')[2]} was to have an adapter, and its weight is "
                    f"tied: it is {' and '.join(tied)}. Merged, the adapter would change both. Take it out of "
                    "target_modules, or train the weight whole: modules_to_save."
                )
    return adapted


def exported(student: nn.Module, keep: bool = True) -> PreTrainedModel:
    """What is saved and evaluated of a trained student: an adapter merged into its model; else itself.

    Args:
        keep: merge into a copy, and leave the student as it is; without it, the memory of a copy is spared.
    """
    base = without_adapter(student)
    if base is student:
        return student
    if is_quantized(base):
        return _merged_in_full_precision(student, base)
    return (copy.deepcopy(student) if keep else student).merge_and_unload(safe_merge=True)


def _merged_in_full_precision(student: nn.Module, base: PreTrainedModel) -> PreTrainedModel:
    """The adapter merged, by PEFT, into the weights that it was trained beside, turned back from few bits."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(base.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    bare = full_precision_state(copy.deepcopy(student).unload())
    lacking = plain.load_state_dict({name: x.float() for name, x in bare.items()}, strict=False)
    derived = plain.all_tied_weights_keys.keys() | {name for name, _ in plain.named_buffers()}
    if lost := [*lacking.unexpected_keys, *(name for name in lacking.missing_keys if name not in derived)]:
        raise ValueError(f"{type(base).__name__} could not be turned back from few bits: {', '.join(lost[:3])}.")
    adapted = get_peft_model(plain, copy.deepcopy(student.peft_config[student.active_adapter]))
    set_peft_model_state_dict(adapted, get_peft_model_state_dict(student))
    return adapted.merge_and_unload(safe_merge=True).to(base.device)


def _check_alone(config: ExperimentConfig) -> None:
    """Raise ValueError where several processes would each compress, and not alike."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        made = "layerwise" if config.student.layerwise is not None else "low_rank"
        raise ValueError(
            f"student.{made}: compresses the teacher in one process, and {processes} were started; start the run with "
            "one, or compress first (`fakit compress`) and give the plain model as student.path."
        )


def _rehearse(config: ExperimentConfig, prepared: Prepared) -> None:
    """Build objective and adapter on a stand-in of the student's shape: what does not fit is said before the work."""
    from fakit.models.blocks import depth
    from fakit.models.random_state import random_state_kept
    from fakit.models.shrink import shrink

    teacher, asked = prepared.teacher, config.student
    layers = depth(teacher)
    if asked.layerwise is not None and asked.layerwise.layers is None:
        return  # how deep it ends, rounds decide
    wanted = layers if asked.layerwise is None else asked.layerwise.layers
    if wanted > layers:
        return  # refused by `prune`, which says it better
    with random_state_kept(teacher.device):
        stand_in = shrink(teacher, wanted)
        build_objective(config, stand_in, teacher, kept(range(1, wanted + 1), layers))
        if asked.lora is not None:
            adapted_student(stand_in, asked.lora, prepared.task)


def _shrunk(config: ExperimentConfig, prepared: Prepared) -> Made:
    from fakit.models.blocks import stack_depths
    from fakit.models.shrink import shrink

    asked = config.student
    layers = asked.layers if isinstance(asked.layers, int) else list(asked.layers)
    model = shrink(prepared.teacher, layers, hidden_size=asked.hidden_size, heads=asked.heads, init=asked.init)
    depths = stack_depths(model), stack_depths(prepared.teacher)
    if isinstance(layers, list) and len(depths[1]) == 1:
        return Made(model, kept(layers, *depths[1]))
    return Made(model, tuple(LayerMap.named("uniform", *depths).pairs))


def _saved(config: ExperimentConfig, prepared: Prepared) -> PreTrainedModel:
    from fakit.models.load import load_student, load_teacher

    task, teacher = prepared.task, prepared.teacher
    pads = teacher.config.pad_token_id if prepared.teacher_tokenizer is None else prepared.tokenizer.pad_token_id
    if config.student.quantize is not None:
        if task.model_task != "causal-lm":
            raise ValueError(
                f"student.quantize: {config.student.quantize} was asked for {task.name}, a {task.kind} task; the kit "
                "turns language models back from few bits. Leave it out."
            )
        options = {"quantize": config.student.quantize, "device": teacher.device}
        model = load_teacher(config.student.path, task.model_task, **options)
        pad_as(model, pads)
        return model
    classes = task.num_labels if task.model_task == "sequence-classification" else None
    model = load_student(config.student.path, task.model_task, num_labels=classes, device=teacher.device)
    pad_as(model, pads)
    return model
