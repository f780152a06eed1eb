"""Configurations of common models, recorded, so that a plan for them needs no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from fakit.models import pretrained
from fakit.models.load import resolve_model


def _decoder(
    kind: str, width: int, inner: int, depth: int, heads: int, groups: int, vocabulary: int, **rest: Any
) -> dict:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": False,
    } | rest


def _gpt2(width: int, depth: int, heads: int) -> dict:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": depth, "n_head": heads}


def _encoder(kind: str, width: int, depth: int, heads: int, **rest: Any) -> dict:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    } | rest


_TIED = {"tie_word_embeddings": True}
_ROBERTA = {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1}

# The numbers of each model's config.json on the hub that decide about shapes.
PRESETS: dict[str, dict[str, Any]] = {
    "sentence-transformers/all-MiniLM-L6-v2": _encoder("bert", 384, 6, 12),
    "distilbert/distilbert-base-uncased": {"model_type": "distilbert"},
    "google-bert/bert-base-uncased": _encoder("bert", 768, 12, 12),
    "google-bert/bert-large-uncased": _encoder("bert", 1024, 24, 16),
    "FacebookAI/roberta-base": _encoder("roberta", 768, 12, 12, **_ROBERTA),
    "FacebookAI/roberta-large": _encoder("roberta", 1024, 24, 16, **_ROBERTA),
    "openai-community/gpt2": _gpt2(768, 12, 12),
    "openai-community/gpt2-medium": _gpt2(1024, 24, 16),
    "openai-community/gpt2-large": _gpt2(1280, 36, 20),
    "openai-community/gpt2-xl": _gpt2(1600, 48, 25),
    "Qwen/Qwen2.5-0.5B": _decoder("qwen2", 896, 4864, 24, 14, 2, 151_936, **_TIED),
    "Qwen/Qwen2.5-1.5B": _decoder("qwen2", 1536, 8960, 28, 12, 2, 151_936, **_TIED),
    "Qwen/Qwen2.5-7B": _decoder("qwen2", 3584, 18_944, 28, 28, 4, 152_064),
    "Qwen/Qwen3-0.6B": _decoder("qwen3", 1024, 3072, 28, 16, 8, 151_936, head_dim=128, **_TIED),
    "Qwen/Qwen3-4B": _decoder("qwen3", 2560, 9728, 36, 32, 8, 151_936, head_dim=128, **_TIED),
    "Qwen/Qwen3-8B": _decoder("qwen3", 4096, 12_288, 36, 32, 8, 151_936, head_dim=128),
    "mistralai/Mistral-7B-v0.3": _decoder("mistral", 4096, 14_336, 32, 32, 8, 32_768, sliding_window=None),
    "HuggingFaceTB/SmolLM2-135M": _decoder("llama", 576, 1536, 30, 9, 3, 49_152, **_TIED),
    "meta-llama/Llama-3.2-1B": _decoder("llama", 2048, 8192, 16, 32, 8, 128_256, head_dim=64, **_TIED),
    "meta-llama/Llama-3.2-3B": _decoder("llama", 3072, 8192, 28, 24, 8, 128_256, head_dim=128, **_TIED),
    "meta-llama/Llama-3.1-8B": _decoder("llama", 4096, 14_336, 32, 32, 8, 128_256),
    "meta-llama/Llama-3.1-70B": _decoder("llama", 8192, 28_672, 80, 64, 8, 128_256),
}

# Models of the same shapes: what was trained further on instructions.
VARIANTS: dict[str, str] = {
    "Qwen/Qwen2.5-0.5B-Instruct": "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-1.5B-Instruct": "Qwen/Qwen2.5-1.5B",
    "Qwen/Qwen2.5-7B-Instruct": "Qwen/Qwen2.5-7B",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-v0.3",
    "meta-llama/Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B-Instruct": "meta-llama/Llama-3.2-3B",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M",
}


def recorded(name: str) -> tuple[str, dict[str, Any]] | None:
    """(hub id, numbers) of a recorded model or of a variant of one, by its id or what stands after the slash."""
    for full in (*PRESETS, *VARIANTS):
        if name.lower() in (full.lower(), full.split("/")[1].lower()):
            return full, PRESETS[VARIANTS.get(full, full)]
    return None


def read_config(teacher: str | Path | PreTrainedConfig | PreTrainedModel) -> tuple[str, PreTrainedConfig]:
    """(name, configuration) of a recorded model (by its hub id, or what stands after the slash), a folder, a hub id,
    or a model itself.

    Raises:
        ValueError: nothing to be read there.
    """
    if isinstance(teacher, PreTrainedModel):
        return teacher.name_or_path or type(teacher).__name__, teacher.config
    if isinstance(teacher, PreTrainedConfig):
        return teacher.name_or_path or type(teacher).__name__.removesuffix("Config"), teacher
    name = str(teacher)
    if (known := recorded(name)) is not None:
        full, values = known[0], dict(known[1])
        return full, AutoConfig.for_model(values.pop("model_type"), name_or_path=full, **values)
    source = resolve_model(name)
    try:
        return name, pretrained.read_config(source)
    except ValueError as error:
        if Path(source).is_dir():  # the folder is there, and what is wrong with it has been said
            raise
        short = ", ".join(preset.split("/")[1] for preset in PRESETS)
        raise ValueError(
            f"no configuration of {name!r} on this machine or within reach: {error} Give a folder that holds a "
            f"config.json, or one of the recorded models: {short}, and the instruct variants of these."
        ) from error


def guess_task(config: PreTrainedConfig) -> str:
    """The task of the class that the configuration was saved from; else the one that its family is known for.

    ForConditionalGeneration is the name of encoder-decoders and of decoders that also see or hear:
    the configuration says which.
    """
    architectures = " ".join(config.architectures or [])
    writes = "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"
    for words, task in (
        ("ForSequenceClassification", "sequence-classification"),
        ("ForCausalLM", "causal-lm"),
        ("LMHead", writes),
        ("ForMaskedLM", "masked-lm"),
        ("ForConditionalGeneration", writes),
    ):
        if words in architectures:
            return task
    known = {
        "masked-lm": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "seq2seq-lm": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "causal-lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    found = [task for task, names in known.items() if config.model_type in names]
    return "causal-lm" if "causal-lm" in found and _sees(config) else next(iter(found), "encoder")


def _sees(config: PreTrainedConfig) -> bool:
    """A decoder of text inside a larger configuration (with images, sounds)."""
    return not config.is_encoder_decoder and config.get_text_config() is not config


def config_text(config: PreTrainedConfig) -> str:
    """A configuration as JSON, with its model type."""
    values = config.to_dict() | {"model_type": config.model_type}
    for name in ("quantization_config", "architectures", "_name_or_path", "transformers_version"):
        values.pop(name, None)
    return json.dumps(values, sort_keys=True, default=str)
