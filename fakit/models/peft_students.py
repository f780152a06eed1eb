"""Students that are PEFT models: what of them is trained, what a checkpoint holds, and how it comes back."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from fakit.models.blocks import without_adapter

ADAPTER = "adapter_config.json"
LORA = {"target_modules": "all-linear"}
"""What an adapter is unless its keys say otherwise."""
TASK_TYPES = {"sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}  # PEFT's words for ours


def is_adapted(model: nn.Module) -> bool:
    """True for a PEFT model: transformers' own model stays as it is inside, and an adapter is trained."""
    return without_adapter(model) is not model


def check_adapter(student: nn.Module) -> None:
    """Raise ValueError where an adapted student trains what PEFT does not save: a checkpoint would silently lack it."""
    from peft import get_peft_model_state_dict

    kept = {tensor.data_ptr() for tensor in get_peft_model_state_dict(student).values()}
    lost = [name for name, p in student.named_parameters() if p.requires_grad and p.data_ptr() not in kept]
    if lost:
        raise ValueError(
            f"the student trains {len(lost)} parameters outside of its adapter "
            f"({', '.join(lost[:3])}{' …' if lost[3:] else ''}), and PEFT saves the adapter alone: they would be lost. "
            "Name their modules in modules_to_save of the adapter's configuration, or freeze them."
        )


def load_adapter(student: nn.Module, folder: Path) -> None:
    """The adapter's weights of a checkpoint, and those of modules_to_save, into the student in place.

    Raises:
        ValueError: an adapter of another kind or size: what is missing, and what has no place.
    """
    from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    name = student.active_adapter
    folder = folder if name == "default" else folder / name  # as PEFT saves it
    saved, own = load_peft_weights(str(folder), device="cpu"), get_peft_model_state_dict(student, adapter_name=name)
    shapes = [{key: tuple(x.shape) for key, x in state.items()} for state in (saved, own)]
    if shapes[0] != shapes[1]:
        differing = sorted(
            key for key in shapes[0].keys() | shapes[1].keys() if shapes[0].get(key) != shapes[1].get(key)
        )
        key = differing[0]
        raise ValueError(
            f"{folder} holds another adapter than the student's: {len(differing)} tensors differ, the first is {key}, "
            f"saved {shapes[0].get(key, 'not at all')}, the student's {shapes[1].get(key, 'not there')}. Resume with "
            "the adapter's configuration that the run was started with."
        )
    set_peft_model_state_dict(student, saved, adapter_name=name)


def base_fingerprint(student: nn.Module) -> str:
    """sha256 over what an adapter stands on: the names and bytes of the frozen floating-point parameters."""
    digest = hashlib.sha256()
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
