"""Whose a checkpoint is: the settings, models and data that a run's numbers follow from,
as plain values that can be compared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from fakit.layer_maps import LayerMap
from fakit.objective.objective import Objective
from fakit.objective.schedules import Schedule
from fakit.training.teacher_cache.fingerprints import shaping_facts

# What of TrainingArguments decides about the steps. Folders, logging, evaluation, saving and speed do not.
ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "bf16",
    "fp16",
    "neftune_noise_alpha",
)


def argument_facts(args) -> dict[str, Any]:
    """The training arguments that decide about the steps."""
    return {name: _plain(getattr(args, name, None)) for name in ARGUMENTS}


def objective_facts(objective: Objective) -> dict[str, Any]:
    """Terms, weights and layer maps."""
    described = {
        name: {setting: _plain(value) for setting, value in term.describe().items() if value != {}}
        for name, term in objective.terms.items()
    }
    weights = {name: _plain(term.written("weight")) for name, term in objective.terms.items()}
    balancing = {} if objective.balancing is None else {"balancing": objective.balancing.describe()}
    return {"weights": weights, "layer_map": _plain(objective.layer_map), **balancing, **described}


def setting_facts(objective: Objective) -> dict[str, Any]:
    """`Objective.settings` as JSON has them."""
    return _plain(objective.settings)


def student_facts(student: nn.Module) -> dict[str, Any]:
    """What its configuration says of its shape, and how much of it is trained."""
    parameters = list(student.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return shaping_facts(student.config) | {
        "parameters": sum(p.numel() for p in parameters),
        "parameters trained": trained,
    }


def data_fingerprint(dataset) -> str | None:
    """sha256 over the rows, labels included, in their order; None for a data set that is no table and no list,
    which may draw its rows.
    """
    from datasets import Dataset

    digest = hashlib.sha256()
    if isinstance(dataset, Dataset):
        import pyarrow as pa

        for table in dataset.with_format("arrow").iter(1000):
            table = table.combine_chunks().replace_schema_metadata(None)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            digest.update(sink.getvalue())
    elif isinstance(dataset, list):
        for row in dataset:
            digest.update(json.dumps(_plain(row), sort_keys=True).encode())
    else:
        return None
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """As JSON has it: a layer map by its pairs, a function by its name."""
    if isinstance(value, LayerMap):
        if value.is_random:
            return {"random": value.possible_pairs(), "first": value.for_epoch(0).pairs}
        return [[*pair, weight] for pair, weight in zip(value.pairs, value.pair_weights, strict=True)]
    if isinstance(value, Schedule):
        return value.to_dict()
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def bytes_of_checkpoint(student: nn.Module, objective: nn.Module, optimizer: str) -> int:
    """About how many bytes a checkpoint takes: weights, and twice those that are trained where the optimizer is of
    Adam's kind.
    """
    modules = [p for module in (student, objective) for p in module.parameters()]
    weights = sum(p.numel() * p.element_size() for p in modules)
    trained = sum(p.numel() * p.element_size() for p in modules if p.requires_grad)
    full = "adam" in str(optimizer) and not any(small in str(optimizer) for small in ("8bit", "4bit", "fp8", "mini"))
    return weights + 2 * trained * full
