"""Families that no code names: they work by the same rules,
or the error says what cannot be had and what to do instead.
"""

from collections.abc import Callable

import pytest
import torch
import transformers as hf

from fakit import Features, LayerMap, Objective, Outputs, capture, shrink
from fakit.models.blocks import find_stacks
from tests.families import EVERY, HEADS, IMAGES, LAYERS, SIZES, VOCAB, WIDTH, batch, batch_for, step

_GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "vocab_size": VOCAB, "pad_token_id": 0}
_BART = {k: v for k, v in EVERY["bart"][1]().to_dict().items() if k not in ("model_type", "architectures")}
OTHERS: dict[str, Callable] = {
    "codegen": lambda: hf.CodeGenForCausalLM(hf.CodeGenConfig(**_GPT, rotary_dim=4)),
    "gpt-j": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT, rotary_dim=4)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES, num_key_value_heads=2)),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**SIZES)),
    "xlm-roberta": lambda: hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(**SIZES)),
    "big-bird": lambda: hf.BigBirdForMaskedLM(hf.BigBirdConfig(**SIZES, attention_type="original_full")),
    "convbert": lambda: hf.ConvBertForMaskedLM(hf.ConvBertConfig(**SIZES, embedding_size=WIDTH)),
    "mbart": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**_BART)),
    "m2m-100": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**_BART)),
    "umt5": lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**EVERY["t5"][1]().to_dict())),
    "whisper's decoder": lambda: hf.WhisperForCausalLM(hf.WhisperConfig(**_BART, max_target_positions=20)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(
            **{
                k: v
                for k, v in IMAGES["vit"][1]().to_dict().items()
                if k in ("hidden_size", "image_size", "patch_size")
            },
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            mlp_ratio=2,
        )
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_families_that_no_code_names_work_by_the_same_rules(name, tmp_path):
    teacher = OTHERS[name]().eval().requires_grad_(False)
    inputs = batch_for(teacher)
    step(shrink(teacher, layers=2), teacher, inputs)
    student = shrink(teacher, layers=2).eval()
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path, attn_implementation=student.config._attn_implementation)
    with torch.no_grad():
        assert torch.equal(capture(student, inputs).logits, capture(again, inputs).logits)


def longformer() -> hf.PreTrainedModel:
    return hf.LongformerForMaskedLM(hf.LongformerConfig(**SIZES, attention_window=4))


def jamba() -> hf.PreTrainedModel:
    settings = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}
    return hf.JambaForCausalLM(hf.JambaConfig(**SIZES, num_key_value_heads=2, num_experts=2, **settings))


@pytest.mark.parametrize(
    ("model", "asked", "message"),
    [
        (
            lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2)),
            {"attentions": [1]},
            r"MambaForCausalLM, which gives no attention maps: its MambaBlock blocks .*attention=None.*hidden states and outputs",
        ),
        (
            lambda: hf.FNetForMaskedLM(hf.FNetConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2)),
            {"attentions": [2]},
            "FNetForMaskedLM, which gives no attention maps",
        ),
        (
            jamba,
            {"attentions": [1, 2]},
            r"attention of layers \[1\] asked of JambaForCausalLM, and nothing was seen there",
        ),
        (
            longformer,
            {"attentions": [1]},
            r"shape \(2, 4, 7, 5\), which is no map .* over 7 tokens: it looks through a window",
        ),
        (
            longformer,
            {"hidden_states": [1]},
            r"works on \(2, 8, 32\), and the batch is \(2, 7\).*multiple of the window",
        ),
        (
            lambda: hf.DogeForCausalLM(hf.DogeConfig(**SIZES, num_key_value_heads=2)),
            {"attentions": [1]},
            r"nothing was seen there: the blocks attend by code of their own",
        ),
        (
            lambda: hf.YosoForMaskedLM(hf.YosoConfig(**SIZES)),
            {"attentions": [1]},
            r"shape \(2, 7, 32\), which is no map .*states of their own",
        ),
    ],
    ids=["mamba", "fnet", "jamba", "longformer maps", "longformer hidden states", "doge", "yoso"],
)
def test_what_a_family_cannot_give_is_named_with_what_to_do_instead(model, asked, message):
    with pytest.raises(ValueError, match=message):
        capture(model().eval(), batch(), **asked)


@pytest.mark.parametrize("kind", [hf.MambaForCausalLM, hf.FNetForMaskedLM])
def test_models_without_attention_are_refused_before_they_run(kind):
    model = kind(kind.config_class(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2))
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run before the error was found"))
    with pytest.raises(ValueError, match="gives no attention maps"):
        capture(model, batch(), attentions=[1])


def test_families_without_attention_still_align_hidden_states_and_outputs():
    config = hf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=4, state_size=4, pad_token_id=0)
    teacher = hf.MambaForCausalLM(config).eval()
    student = shrink(teacher, layers=2)
    trace = capture(student, batch(), [0, 1, 2])
    with torch.no_grad():
        breakdown = Objective(LayerMap.uniform(2, 4), Features("mse"), outputs=Outputs("forward_kl"))(
            trace, capture(teacher, batch(), range(5))
        )
    assert breakdown.terms["features"] > 0 and breakdown.terms["outputs"] > 0


def test_shrinking_two_joined_models_says_how():
    bert = hf.BertConfig(**SIZES)
    decoder = hf.BertLMHeadModel(hf.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True))
    model = hf.EncoderDecoderModel(encoder=hf.BertModel(bert), decoder=decoder)
    assert [stack.name for stack in find_stacks(model)] == ["encoder.encoder.layer", "decoder.bert.encoder.layer"]
    with pytest.raises(ValueError, match=r"joins two models.*EncoderDecoderModel\(encoder=shrink\(teacher.get_encoder"):
        shrink(model, layers=2)
