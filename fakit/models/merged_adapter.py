"""A PEFT adapter merged into its base model: the base it was trained on, all of its weights, none of them a pickle."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from fakit.models.pretrained import (
    check_nothing_random,
    first_sentence,
    read_config,
    read_json,
    read_model,
    without_load_report,
)

_PREFIX = "base_model.model."


def merge_adapter(
    source: str, asked: str, task: str, adapter: str | Path, dtype, device: torch.device, **kwargs
) -> PreTrainedModel:
    """The base model at `source` with the adapter's weights merged in.

    Args:
        source: the base model's folder or hub id.
        asked: as it was given; a hub id that a pip package carries is another name of its folder.
        adapter: the folder that PEFT saved.
        kwargs: for `read_model`.

    Raises:
        ValueError: no adapter there, or a pickle; one of another base model, of other shapes, or for modules that the
            base does not have; an adapter that cannot be merged; weights that neither brings.
    """
    from peft import PeftModel, get_peft_model_state_dict

    folder = Path(adapter).expanduser()
    settings = _settings(folder)
    _check_base(folder, settings.get("base_model_name_or_path"), source, asked, task)
    if (folder / "config.json").is_file():
        # the head's size and label names belong to the adapter, not to the base model
        kwargs["config"] = read_config(str(folder))
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            brought = set(weights.keys())
        with without_load_report(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Found missing adapter keys")  # refused below
            base, missing = read_model(source, task, dtype, device, **kwargs)
            check_nothing_random(base, "teacher", task, source, missing - {n.removeprefix(_PREFIX) for n in brought})
            model = PeftModel.from_pretrained(base, folder, use_safetensors=True)
    except (RuntimeError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        said = str(error) if isinstance(error, ValueError) else f"mismatch of its weights: {_size_mismatch(error)}"
        raise ValueError(f"the adapter at {folder} does not fit {source} loaded for {task}: {said}") from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    unused = brought - expected - set(model.state_dict())
    if lacking := sorted(expected - brought) or sorted(unused):
        side = "lacks weights for" if expected - brought else "has weights that this base has no module for:"
        raise ValueError(
            f"the adapter at {folder} does not fit {source} loaded for {task}: it {side} {', '.join(lacking[:3])} "
            f"({len(lacking)} in all); it was trained on another model "
            f"({settings.get('base_model_name_or_path') or 'not noted'}), or its files are not of one run."
        )
    return model.merge_and_unload()


def _settings(folder: Path) -> dict:
    """adapter_config.json of a folder that holds an adapter's weights, and no pickles in their place."""
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if missing:
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such directory"
        raise ValueError(
            f"no PEFT adapter at {folder}: {' and '.join(missing)} missing ({found}). Give the folder that PEFT saved; "
            "weights in a pickle (adapter_model.bin) are not loaded: where you trust them, load the adapter with PEFT "
            "and save it again."
        )
    from peft import PeftConfig

    settings = read_json(folder / "adapter_config.json")
    try:
        config = PeftConfig.from_pretrained(folder)
    except Exception as error:  # a file of somebody else's: whatever PEFT stumbles over stands in it
        raise ValueError(
            f"{folder / 'adapter_config.json'} is no configuration that PEFT reads ({type(error).__name__}: "
            f"{first_sentence(error)})"
        ) from error
    if config.is_prompt_learning:
        raise ValueError(
            f"the adapter at {folder} is of the kind {settings['peft_type']}, which adds tokens and cannot be merged "
            "into weights; give one that can be merged (LoRA and its kin), or merge nothing and train a teacher of "
            "its own."
        )
    return settings


def _check_base(folder: Path, trained_on: str | None, source: str, asked: str, task: str) -> None:
    """Refuse an adapter whose file names another base model; paths are compared by their last part,
    and folders that exist by their weights.
    """
    if not trained_on:
        return
    named = Path(trained_on)
    names = {name.lower() for given in (source, asked) for name in (given, Path(given).name)}
    if named.is_dir() and Path(source).is_dir():
        if named.resolve() == Path(source).resolve() or _same_weights(named, Path(source)):
            return
    elif trained_on.lower() in names or named.name.lower() in names:
        return
    raise ValueError(
        f"the adapter at {folder} does not fit {source} loaded for {task}: mismatch of base models, it was trained on "
        f"{trained_on!r} (adapter_config.json) and {asked!r} was given; give that model as the base. If the two are "
        "one model under two names, set base_model_name_or_path in adapter_config.json to the one that you use."
    )


def _same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same safetensors files, whatever their names."""
    mine, theirs = (sorted(_digest(path) for path in folder.glob("*.safetensors")) for folder in (one, other))
    return bool(mine) and mine == theirs


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size_mismatch(error: Exception) -> str:
    """PEFT's message without the lists: the first weight that does not fit."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if "size mismatch" in line]
    return f"{lines[0]} ({len(lines)} in all)" if lines else f"{type(error).__name__}: {first_sentence(error)}"
