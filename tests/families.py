"""Tiny random models of many families, and a padded batch for them: what the tests of the core stand on."""

from collections.abc import Callable

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

VOCAB, WIDTH, LAYERS, HEADS = 50, 32, 3, 4
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCAB}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# name: (model class, configuration)
ENCODERS: dict[str, tuple[type, Callable]] = {
    "bert": (hf.BertForSequenceClassification, lambda: hf.BertConfig(**_SIZES)),
    "roberta": (hf.RobertaForMaskedLM, lambda: hf.RobertaConfig(**_SIZES)),
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        lambda: hf.DistilBertConfig(
            vocab_size=VOCAB, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=48, max_position_embeddings=64
        ),
    ),
    "electra": (hf.ElectraForSequenceClassification, lambda: hf.ElectraConfig(embedding_size=16, **_SIZES)),
    "modernbert": (
        hf.ModernBertForSequenceClassification,
        lambda: hf.ModernBertConfig(**_SIZES, local_attention=4, global_attn_every_n_layers=2, cls_token_id=1),
    ),
    "deberta-v2": (
        hf.DebertaV2ForSequenceClassification,
        lambda: hf.DebertaV2Config(
            **_SIZES,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            max_relative_positions=16,
        ),
    ),
}
DECODERS: dict[str, tuple[type, Callable]] = {
    "gpt2": (hf.GPT2LMHeadModel, lambda: hf.GPT2Config(**_GPT2)),
    "opt": (
        hf.OPTForCausalLM,
        lambda: hf.OPTConfig(
            **{k: v for k, v in _SIZES.items() if k != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=WIDTH
        ),
    ),
    "gpt-neox": (hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**_SIZES)),
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**_SIZES, num_key_value_heads=2)),
    "qwen3": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=8)),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        lambda: hf.Gemma2Config(
            **_SIZES,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=4,
            attn_logit_softcapping=0.5,
        ),
    ),
    "phi": (hf.PhiForCausalLM, lambda: hf.PhiConfig(**_SIZES)),
    "mixtral": (
        hf.MixtralForCausalLM,
        lambda: hf.MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2),
    ),
    "bloom": (
        hf.BloomForCausalLM,
        lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, pad_token_id=0),
    ),
}
FAMILIES = ENCODERS | DECODERS
# Families whose modelling code does not go through transformers' attention interface: only their own eager maps exist.
EAGER_ONLY = ("bloom", "deberta-v2")


def tiny(family: str, attention: str = "sdpa", seed: int = 0, **changes) -> PreTrainedModel:
    """A small random model without dropout, in eval mode, its weights scaled up so that attention is far from uniform.

    `changes` go into the configuration.
    """
    kind, configuration = FAMILIES[family]
    config = configuration()
    for name, value in vars(config).items():
        if isinstance(value, float) and ("drop" in name):
            setattr(config, name, 0.0)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = kind._from_config(config, attn_implementation="eager" if family in EAGER_ONLY else attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(8.0)
    return model.eval()


def batch(rows: int = 2, tokens: int = 7, padding: int = 2, side: str = "right", seed: int = 1) -> dict[str, Tensor]:
    """Random input_ids (rows, tokens) and attention_mask; the last row ends (or starts) with `padding` padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    if padding:
        where = slice(tokens - padding, None) if side == "right" else slice(0, padding)
        mask[-1, where] = 0
        ids[-1, where] = 0
    return {"input_ids": ids, "attention_mask": mask}


def tokenizer(words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words.split()])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]")
