"""Tiny random models of many families, and a padded batch for them: what the tests of the core stand on."""

from collections.abc import Callable

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, capture
from fakit.models import find_blocks
from fakit.models.blocks import depth

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

VOCAB, WIDTH, LAYERS, HEADS = 50, 32, 3, 4
SIZES = {
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
_BART = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": HEADS}
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0}
_FALCON = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
_GROUPED = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_WINDOW = {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}

# name: (model class, configuration)
ENCODERS: dict[str, tuple[type, Callable]] = {
    "bert": (hf.BertForSequenceClassification, lambda: hf.BertConfig(**SIZES)),
    "roberta": (hf.RobertaForMaskedLM, lambda: hf.RobertaConfig(**SIZES)),
    "distilbert": (
        hf.DistilBertForSequenceClassification,
        lambda: hf.DistilBertConfig(
            vocab_size=VOCAB, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=48, max_position_embeddings=64
        ),
    ),
    "albert": (hf.AlbertForMaskedLM, lambda: hf.AlbertConfig(embedding_size=16, **SIZES)),
    "electra": (hf.ElectraForSequenceClassification, lambda: hf.ElectraConfig(embedding_size=16, **SIZES)),
    "mpnet": (hf.MPNetForMaskedLM, lambda: hf.MPNetConfig(**SIZES)),
    "modernbert": (
        hf.ModernBertForSequenceClassification,
        lambda: hf.ModernBertConfig(**SIZES, local_attention=4, global_attn_every_n_layers=2, cls_token_id=1),
    ),
    "deberta-v2": (
        hf.DebertaV2ForSequenceClassification,
        lambda: hf.DebertaV2Config(
            **SIZES,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            max_relative_positions=16,
        ),
    ),
    "deberta-v3": (  # the same code with the settings of deberta-v3-base
        hf.DebertaV2ForMaskedLM,
        lambda: hf.DebertaV2Config(
            **SIZES,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            max_relative_positions=-1,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
        ),
    ),
    "xlnet": (
        hf.XLNetForSequenceClassification,
        lambda: hf.XLNetConfig(
            vocab_size=VOCAB, d_model=WIDTH, n_layer=LAYERS, n_head=HEADS, d_inner=48, pad_token_id=0
        ),
    ),
}
DECODERS: dict[str, tuple[type, Callable]] = {
    "gpt2": (hf.GPT2LMHeadModel, lambda: hf.GPT2Config(**_GPT2)),
    "opt": (
        hf.OPTForCausalLM,
        lambda: hf.OPTConfig(
            **{k: v for k, v in SIZES.items() if k != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=WIDTH
        ),
    ),
    "gpt-neox": (hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**SIZES)),
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**SIZES, **_GROUPED)),
    "mistral": (hf.MistralForCausalLM, lambda: hf.MistralConfig(**SIZES, **_GROUPED, sliding_window=4)),
    "qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**SIZES, **_GROUPED)),
    "qwen3": (hf.Qwen3ForCausalLM, lambda: hf.Qwen3Config(**SIZES, **_GROUPED, head_dim=8)),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        lambda: hf.Gemma2Config(**SIZES, **_WINDOW, attn_logit_softcapping=0.5),
    ),
    "gemma3": (hf.Gemma3ForCausalLM, lambda: hf.Gemma3TextConfig(**SIZES, **_WINDOW, sliding_window_pattern=2)),
    "phi": (hf.PhiForCausalLM, lambda: hf.PhiConfig(**SIZES)),
    "mixtral": (
        hf.MixtralForCausalLM,
        lambda: hf.MixtralConfig(**SIZES, **_GROUPED, num_local_experts=3, num_experts_per_tok=2),
    ),
    "qwen3-moe": (hf.Qwen3MoeForCausalLM, lambda: hf.Qwen3MoeConfig(**SIZES, **_GROUPED, head_dim=8, **_EXPERTS)),
    "bloom": (
        hf.BloomForCausalLM,
        lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, pad_token_id=0),
    ),
    "falcon": (hf.FalconForCausalLM, lambda: hf.FalconConfig(**_FALCON)),
}
SEQ2SEQ: dict[str, tuple[type, Callable]] = {
    "t5": (hf.T5ForConditionalGeneration, lambda: hf.T5Config(**_T5)),
    "bart": (hf.BartForConditionalGeneration, lambda: hf.BartConfig(**_BART)),
}
IMAGES: dict[str, tuple[type, Callable]] = {
    "vit": (
        hf.ViTForImageClassification,
        lambda: hf.ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=48,
            image_size=8,
            patch_size=4,
            num_labels=2,
        ),
    ),
}
FAMILIES = ENCODERS | DECODERS  # models of one stack that read text
EVERY = FAMILIES | SEQ2SEQ | IMAGES
# Families whose modeling code does not go through transformers' attention interface: only their own eager maps exist.
EAGER_ONLY = ("bloom", "deberta-v2", "deberta-v3", "mpnet", "xlnet")


def tiny(family: str, attention: str = "sdpa", seed: int = 0, **changes) -> PreTrainedModel:
    """A small random model without dropout, in eval mode, its weights scaled up so that attention is far from uniform.

    `changes` go into the configuration.
    """
    kind, configuration = EVERY[family]
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
                parameter.mul_(
                    1.5 if family == "t5" else 8.0
                )  # T5 does not scale its scores, and starts with larger weights
    return model.eval()


def with_sinks(seed: int = 0) -> PreTrainedModel:
    """A small random GPT-OSS, whose heads have attention sinks: 0, 1, 2 and 3."""
    config = hf.GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        num_local_experts=3,
        num_experts_per_tok=2,
        sliding_window=4,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = hf.GptOssForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    return model


def batch(rows: int = 2, tokens: int = 7, padding: int = 2, side: str = "right", seed: int = 1) -> dict[str, Tensor]:
    """Random input_ids (rows, tokens) and attention_mask; the last row ends (or starts)
    with `padding` padding tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    if padding:
        where = slice(tokens - padding, None) if side == "right" else slice(0, padding)
        mask[-1, where] = 0
        ids[-1, where] = 0
    return {"input_ids": ids, "attention_mask": mask}


def batch_for(model: PreTrainedModel, rows: int = 2, tokens: int = 7, padding: int = 2) -> dict[str, Tensor]:
    """`batch` with labels, as a collator would make it for the model: classes, next or same tokens, a target text;
    or images.
    """
    generator = torch.Generator().manual_seed(5)
    classes = torch.arange(rows) % 2
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator), "labels": classes}
    inputs = batch(rows, tokens, padding)
    if "Classification" in type(model).__name__:
        return inputs | {"labels": classes}
    if model.config.is_encoder_decoder:
        targets = torch.randint(3, VOCAB, (rows, tokens - 2), generator=generator)
        targets[-1, -1] = -100
        return inputs | {"labels": targets}
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def objective_for(student, teacher) -> Objective:
    layer_map = LayerMap.uniform(depth(student), depth(teacher))
    objective = Objective(layer_map, Features("mse"), Attention("kl"), Outputs("forward_kl", temperature=2.0), Task())
    return objective.prepare(student.config.hidden_size, teacher.config.hidden_size)


def step(student, teacher, inputs) -> None:
    """One step of all four terms: each finite and above 0, and each stack of the student and its projections are
    reached.
    """
    objective = objective_for(student, teacher)
    needs = {side: objective.needs(side) for side in ("student", "teacher")}
    with torch.no_grad():
        theirs = capture(teacher, inputs, needs["teacher"].hidden_states, needs["teacher"].attentions)
    ours = capture(student, inputs, needs["student"].hidden_states, needs["student"].attentions)
    breakdown = objective(ours, theirs, labels=inputs["labels"])
    breakdown.total.backward()
    assert sorted(breakdown.terms) == ["attention", "features", "outputs", "task"]
    for name, value in breakdown.terms.items():
        assert value.isfinite() and value > 0, name
    for block in [*find_blocks(student), *objective.projections.values()]:
        gradients = [p.grad for p in block.parameters() if p.grad is not None]
        assert gradients and all(g.isfinite().all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)
    assert not any(p.grad is not None for p in teacher.parameters())


def tokenizer(words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *words.split()])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]")
