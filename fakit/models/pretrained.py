"""The one way into transformers' `from_pretrained`: no code and no pickles of a model folder,
nothing left random, refusals in one sentence.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fakit.models.blocks import find_stacks

CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "encoder": "AutoModel",
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Files that may name code of their own, under "auto_map".
_NAMES_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
# Causal masks that old checkpoints hold as if they were weights: the modules of these names have no bias of their own.
_MASKS = re.compile(r"\.(attn|attention|self_attn)\.(bias|masked_bias)$|\.inv_freq$")


def read_config(source: str, what: str = "as a configuration", **kwargs) -> PreTrainedConfig:
    """The configuration of a model folder or hub id; transformers' own classes only,
    unless `trust_remote_code` is given.

    Raises:
        ValueError: no readable configuration, or one that needs code of its own.
    """
    kwargs.setdefault("trust_remote_code", False)
    if Path(source).is_dir():
        _check_code(Path(source), kwargs["trust_remote_code"])
    with in_one_sentence(source, what):
        return AutoConfig.from_pretrained(source, **kwargs)


def read_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id; transformers' own classes only.

    Raises:
        ValueError: no readable tokenizer, or one that needs code of its own.
    """
    if Path(source).is_dir():
        _check_code(Path(source), trusted=False)
    with in_one_sentence(source, "as a tokenizer"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def read_model(source: str, task: str, dtype, device: torch.device, **kwargs) -> tuple[PreTrainedModel, set[str]]:
    """A model, and the names of its weights that the checkpoint does not have:
    they are random (see `check_nothing_random`).

    Args:
        source: a folder, or a hub id.
        task: one of `CLASSES`.
        kwargs: for `from_pretrained`. A `quantization_config` puts the weights on `device` while they are loaded.

    Raises:
        ValueError: nothing to be loaded, weights in pickles or damaged, code that the folder brings along, weights of
            other shapes than the configuration says, or layers' weights that the configuration has no place for.
    """
    trusted = kwargs.setdefault("trust_remote_code", False)
    if "gguf_file" not in kwargs:
        kwargs["use_safetensors"] = True  # never a pickle
        if Path(source).is_dir():
            _check_code(Path(source), trusted)
            _check_weights(Path(source), task)
    # what does not fit is refused below, with both shapes, instead of after a table on the terminal
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": dtype}
    if kwargs.get("quantization_config") is not None:
        kwargs["device_map"] = {"": device}  # bitsandbytes quantizes on the device, while it loads
    with in_one_sentence(source, f"as a {task} model"), without_load_report():
        model, report = getattr(transformers, CLASSES[task]).from_pretrained(source, **kwargs)
    _check_shapes(source, model, report["mismatched_keys"])
    _check_unused(source, model, report["unexpected_keys"])
    return model if "device_map" in kwargs else model.to(device), set(report["missing_keys"])


def empty_model(source: str, task: str, **kwargs) -> PreTrainedModel:
    """The model that `read_model` would load, on the meta device: modules, shapes and ties, no weights.

    Raises:
        ValueError: no readable configuration, or none that the task has a class for.
    """
    what = f"as a {task} model"
    config, _ = read_config(source, what, return_unused_kwargs=True, **kwargs)
    with in_one_sentence(source, what), torch.device("meta"):
        return getattr(transformers, CLASSES[task]).from_config(
            config, trust_remote_code=kwargs.get("trust_remote_code", False)
        )


def check_nothing_random(model: PreTrainedModel, side: str, task: str, source: str, missing: Iterable[str]) -> None:
    """Refuse a model that would say noise. Tied weights are not missing; an encoder's pooler is not looked at.

    Raises:
        ValueError: naming the weights that the checkpoint lacks.
    """
    names = sorted(name for name in missing if not (task == "encoder" and "pooler" in name))
    if not names:
        return
    saved = ", ".join(model.config.architectures or ["an unnamed class"])
    raise ValueError(
        f"{source!r} was asked for as a {task} {side} ({type(model).__name__}); its checkpoint, saved from {saved}, "
        f"has no weights for {_some(names)}: they would be random, and so would what the {side} says. Load it for the "
        "task it was trained for (task='encoder' for its hidden states and attention alone), fine-tune the head "
        "first, or give the adapter=… that holds it; where layers are missing, config.json belongs to another model."
    )


@contextmanager
def without_load_report() -> Iterator[None]:
    """transformers' report of missing weights would alarm for nothing: what an adapter brings is not missing,
    and what is, is refused.

    Lowering that logger makes transformers check its tensor-parallel plan aloud,
    and peft asks by a name that transformers has retired.
    """
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_json(path: Path) -> dict:
    """A JSON file that holds a mapping.

    Raises:
        ValueError: it does not, or is no JSON; names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no readable JSON ({error}); copy or download it again.") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} holds a {type(found).__name__} where a mapping was expected; copy or download it again."
        )
    return found


def _check_code(folder: Path, trusted: bool) -> None:
    """Refuse what would run code: an architecture or tokenizer that stands in the folder alone, a generate()
    of its own, kernels of the hub.

    Where transformers has a class of the same name itself, that class is taken, with a warning:
    the folder's code is not run.
    """
    if trusted:
        return
    own = {}
    for name in _NAMES_CODE:
        named = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        if named:
            own[name] = named
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    known = str(config.get("model_type")) in transformers.CONFIG_MAPPING
    if "config.json" in own and not known:
        raise ValueError(
            f"{folder} brings Python code of its own (auto_map in config.json: {_classes(own['config.json'])}), and "
            f"transformers has no model type {config.get('model_type')!r}; fakit loads with trust_remote_code=False "
            "and runs no code of a model folder. Use a model that transformers has itself, or a checkpoint converted "
            "to one."
        )
    implementation = config.get("attn_implementation") or config.get("_attn_implementation")
    if "/" in str(implementation):
        raise ValueError(
            f"{folder / 'config.json'} asks for attention kernels of the hub (attn_implementation: "
            f"{implementation!r}), which are code, and fakit runs no code of a model folder; take that line out: "
            "transformers' own attention gives the same maps."
        )
    if (folder / "custom_generate").is_dir():
        own["custom_generate/"] = "generate.py"
    if own:
        named = "; ".join(f"{name}: {_classes(what)}" for name, what in own.items())
        warnings.warn(
            f"{folder} brings Python code of its own ({named}); it is not run: transformers' own classes are used. "
            "Where they compute something else than that code, this is another model.",
            stacklevel=4,
        )


def _classes(named) -> str:
    """What an auto_map names, in few words."""
    found = list(named.values()) if isinstance(named, dict) else named
    return f"{found!s:.120}" if isinstance(found, str) else ", ".join(map(str, found))[:120]


def _check_weights(folder: Path, task: str) -> None:
    """Refuse a folder whose weights are there as a pickle alone, an index that names one,
    and an adapter in a model's place.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    if "adapter_config.json" in names:
        raise ValueError(
            f"{folder} holds a PEFT adapter (adapter_config.json), which is half a model; give the model it was "
            "trained on, and this folder as its adapter (teacher.adapter, adapter=…), or merge the two with PEFT's "
            "merge_and_unload and save the result."
        )
    for index in sorted(name for name in names if name.endswith(".index.json") and "safetensors" in name):
        shards = read_json(folder / index).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(
                f"{folder / index} has no weight_map of weights and their files; copy or download it again."
            )
        for shard in sorted({str(name) for name in shards.values()}):
            if not shard.endswith(".safetensors") or "/" in shard or "\\" in shard:
                raise ValueError(
                    f"{folder / index} names {shard!r}; fakit reads .safetensors files of that folder alone, no "
                    "pickles and no files elsewhere. Convert the weights where you trust them, with save_pretrained."
                )
            if shard not in names:
                raise ValueError(f"{folder} lacks {shard}, which {index} names; copy or download it again.")
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = sorted(name for name in names if name.endswith(PICKLES) and name != "training_args.bin")
    if pickles:
        auto = CLASSES[task]
        raise ValueError(
            f"{str(folder)!r} could not be loaded as a {task} model: it holds its weights as a pickle "
            f"({_some(pickles)}) and no model.safetensors, and fakit loads no pickles, since opening one can run code. "
            "If you trust where it comes from, convert it: "
            f'python -c "from transformers import {auto} as M; '
            f'M.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"'
        )
    raise ValueError(
        f"{str(folder)!r} could not be loaded as a {task} model: it has no weights, neither model.safetensors nor its "
        f"index (it holds {_some(sorted(names)) or 'nothing'}); give the folder that save_pretrained wrote."
    )


def _check_shapes(source: str, model: PreTrainedModel, mismatched: Iterable[tuple]) -> None:
    found = sorted((name, tuple(theirs), tuple(ours)) for name, theirs, ours in mismatched)
    if found:
        listed = ", ".join(
            f"{name} {theirs} in the checkpoint, {ours} in the model" for name, theirs, ours in found[:3]
        )
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"the weights at {source!r} and the configuration of {type(model).__name__} mismatch in shape: "
            f"{listed}{more}. Give the config.json that was saved with these weights; of a head, the number of classes "
            "it was trained with."
        )


def _check_unused(source: str, model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """Refuse weights inside the stack of blocks that the model has no place for:
    a layer or a bias would be left out without a word.

    Heads and poolers of another task are no part of it.
    """
    try:
        stacks = find_stacks(model)
    except ValueError:  # a model whose layers nobody can count cannot be distilled, and says so where it is asked to
        return
    for stack in stacks:
        inside = re.compile(rf"(^|\.){re.escape(stack.name.split('.', 1)[-1])}\.(\d+)\.")
        left = sorted(name for name in unexpected if inside.search(name) and not _MASKS.search(name))
        if left:
            raise ValueError(
                f"the checkpoint at {source!r} has weights that {type(model).__name__} has no place for: "
                f"{_some(left)}; its configuration has {len(stack.blocks)} layers ({', '.join(stack.counts)}). They "
                "would be left out without a word, and the model would be another one: give the config.json that was "
                "saved with these weights."
            )


def _some(names: list[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


@contextmanager
def in_one_sentence(source: str, what: str) -> Iterator[None]:
    """A model folder is somebody's input, so whatever transformers raises while it reads one becomes a ValueError that
    names it.

    Messages are cut to their first sentence: what follows there is advice,
    some of it unsafe (run the folder's code, load its pickle).
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise ValueError(
            f"the weights at {source} are truncated or damaged ({error}); copy or download them again."
        ) from error
    except OSError as error:
        near = "" if Path(source).is_dir() else _OFFLINE
        raise ValueError(f"{source!r} could not be loaded {what}: {first_sentence(error)}{near}") from error
    except Exception as error:
        said = first_sentence(error)
        if isinstance(error, KeyError | AttributeError | TypeError | ZeroDivisionError | AssertionError | IndexError):
            said = f"its configuration does not make one ({type(error).__name__}: {said})"
        raise ValueError(f"{source!r} could not be loaded {what}: {said}") from error


_OFFLINE = (
    " Without a network, use a folder, or a model that a pip package carries (sentence-transformers/all-MiniLM-L6-v2, "
    "smollm2); with one, look at HF_HUB_OFFLINE and the proxy."
)


def first_sentence(error: BaseException) -> str:
    """What an error of a library says, up to the end of its first sentence and in one line,
    without what it advises to switch off.
    """
    lines = " ".join(str(error).split())
    sentence = re.split(r"(?<=[a-z)\]'`\"]{2}[.!]) (?=[A-Z`])", lines, maxsplit=1)[0]
    if re.search(r"trust_remote_code|weights_only|ignore_mismatched_sizes|allow_pickle", sentence):
        sentence = f"transformers refused it ({type(error).__name__})"
    return sentence[:400].rstrip(" :") + ("" if sentence.endswith((".", "!")) else ".")
