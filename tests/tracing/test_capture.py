"""What `capture` keeps, against what the models say themselves; and that it leaves everything as it found it."""

from contextlib import contextmanager

import pytest
import torch
import transformers as hf
from torch import Tensor

from fakit import Trace, capture
from fakit.models import find_blocks
from fakit.tracing.capture import is_causal_lm
from tests.families import (
    DECODERS,
    EAGER_ONLY,
    ENCODERS,
    FAMILIES,
    LAYERS,
    VOCAB,
    WIDTH,
    batch,
    batch_for,
    tiny,
    with_sinks,
)

# The norm after the last block, for the families whose own last hidden state has gone through it.
FINAL_NORM = {
    "modernbert": "model.final_norm",
    "gpt2": "transformer.ln_f",
    "opt": "model.decoder.final_layer_norm",
    "gpt-neox": "gpt_neox.final_layer_norm",
    "llama": "model.norm",
    "mistral": "model.norm",
    "qwen2": "model.norm",
    "qwen3": "model.norm",
    "qwen3-moe": "model.norm",
    "gemma3": "model.norm",
    "falcon": "transformer.ln_f",
    "gemma2": "model.norm",
    "phi": "model.final_layernorm",
    "mixtral": "model.norm",
    "bloom": "transformer.ln_f",
}
WITHOUT_SDPA = (*EAGER_ONLY, "gemma2")  # transformers has no sdpa for these configurations
VARIANTS = [
    (family, implementation, side)
    for family in FAMILIES
    for implementation in ("sdpa", "eager")
    for side in ("right", "left")
    if not (family in WITHOUT_SDPA and implementation == "sdpa") and not (family in ENCODERS and side == "left")
]


@pytest.mark.parametrize(("family", "implementation", "side"), VARIANTS)
def test_maps_hidden_states_and_logits_are_the_models_own(family, implementation, side):
    model, inputs = tiny(family, implementation), batch(side=side)
    with torch.no_grad():
        trace = capture(model, inputs, range(LAYERS + 1), range(1, LAYERS + 1))
        if family == "gpt2" and side == "left":  # its table of positions counts tokens, not the padding before them
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        own = tiny(family, "eager")(**inputs, output_attentions=True, output_hidden_states=True)

        for i in range(1, LAYERS + 1):
            assert torch.allclose(trace.attention_maps(i), own.attentions[i - 1], rtol=0, atol=1e-5)
        assert own.attentions[1].max(-1).values.mean() > 0.2  # far from uniform, where anything would agree
        # a query before all tokens (left padding) may attend to nothing, of which sdpa and eager make different things
        valid = inputs["attention_mask"].bool()
        for i in range(LAYERS):
            assert torch.allclose(trace.hidden_states[i][valid], own.hidden_states[i][valid], rtol=0, atol=1e-5)
        last, own_last = trace.hidden_states[LAYERS][valid], own.hidden_states[LAYERS][valid]
        if family in FINAL_NORM:
            assert not torch.allclose(last, own_last, rtol=0, atol=1e-2)
            last = model.get_submodule(FINAL_NORM[family])(last)
        assert torch.allclose(last, own_last, rtol=0, atol=1e-5)
        counts = valid if own.logits.dim() == 3 else slice(None)
        assert torch.allclose(trace.logits[counts], own.logits[counts], rtol=0, atol=1e-5)
    assert torch.equal(trace.mask, inputs["attention_mask"].bool())
    assert trace.causal == (family in DECODERS) and trace.name == type(model).__name__


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "gemma2"])
def test_without_an_attention_mask_every_token_counts(family):
    implementation = "eager" if family == "gemma2" else "sdpa"
    inputs = {"input_ids": batch(padding=0)["input_ids"]}
    with torch.no_grad():
        trace = capture(tiny(family, implementation), inputs, attentions=[1, LAYERS])
        own = tiny(family, "eager")(**inputs, output_attentions=True).attentions
    assert trace.mask.all() and trace.mask.shape == inputs["input_ids"].shape
    for i in (1, LAYERS):
        assert torch.allclose(trace.attention_maps(i), own[i - 1], rtol=0, atol=1e-5)


def test_attention_sinks_take_their_share():
    model = with_sinks()
    with torch.no_grad():
        trace = capture(model, batch(), attentions=[1, 2])
        own = model(**batch(), output_attentions=True).attentions
    for i in (1, 2):
        assert torch.allclose(trace.attention_maps(i), own[i - 1], rtol=0, atol=1e-5)
    assert (trace.attention_maps(1).sum(-1) < 0.99).any()


def test_queries_keys_and_values_come_as_the_attention_function_gets_them():
    model, inputs = tiny("llama"), batch()
    trace = capture(model, inputs, attentions=[2])
    assert trace.queries[2].shape == (2, 4, 7, 8)
    assert trace.keys[2].shape == trace.values[2].shape == (2, 2, 7, 8)  # grouped heads, not repeated
    block = find_blocks(model)[1]
    hidden = block.input_layernorm(capture(model, inputs, [1]).hidden_states[1])
    values = block.self_attn.v_proj(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
    assert torch.allclose(trace.values[2], values, atol=1e-6)


def test_maps_are_those_before_dropout_in_training_too():
    model = tiny("bert", attention_probs_dropout_prob=0.5).train()
    maps = capture(model, batch(padding=0), attentions=[1]).attention_maps(1)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 4, 7), atol=1e-6) and (maps > 0).all()


def test_maps_of_half_precision_models_are_computed_in_float32():
    model = tiny("llama").to(torch.bfloat16)
    trace = capture(model, batch(), [1], [1])
    assert trace.hidden_states[1].dtype == trace.queries[1].dtype == torch.bfloat16
    assert trace.attention_maps(1).dtype == torch.float32
    assert torch.allclose(trace.attention_maps(1).sum(-1), torch.ones(2, 4, 7), atol=1e-6)


# -- only what was asked for ------------------------------------------------------------------------------------------


@contextmanager
def counted_blocks(model):
    """How often each block runs."""
    calls = [0] * len(find_blocks(model))

    def counter(i):
        def hook(*_):
            calls[i] += 1

        return hook

    handles = [block.register_forward_pre_hook(counter(i)) for i, block in enumerate(find_blocks(model))]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", ["bert", "llama", "bloom"])
def test_only_the_layers_asked_for_are_kept(family):
    trace = capture(tiny(family), batch(), hidden_states=(i for i in (3, 0, 3)), attentions={2})
    assert sorted(trace.hidden_states) == [0, 3]
    assert sorted({*trace.attention, *trace.maps}) == [2] and trace.logits is not None
    assert sorted(capture(tiny(family), batch()).hidden_states) == []
    with pytest.raises(ValueError, match=r"attention of layer 3 asked of .* holds attention of layers \[2\]; .*\[3\]"):
        trace.attention_maps(3)


@pytest.mark.parametrize(
    ("asked", "ran"),
    [
        ({"hidden_states": [0]}, [1, 0, 0]),  # the first block is entered, not run: hooks count the entering
        ({"hidden_states": [1]}, [1, 0, 0]),
        ({"attentions": [2]}, [1, 1, 0]),
        ({"hidden_states": [1], "attentions": [2]}, [1, 1, 0]),
        ({"hidden_states": [3]}, [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("family", ["distilbert", "gpt2"])
def test_without_logits_the_forward_pass_ends_after_the_last_layer_asked_for(family, asked, ran):
    model = tiny(family)
    full = capture(model, batch(), **asked)
    with counted_blocks(model) as calls:
        trace = capture(model, batch(), **asked, logits=False)
    assert calls == ran and trace.logits is None and full.logits is not None
    for i in asked.get("hidden_states", []):
        assert torch.equal(trace.hidden_states[i], full.hidden_states[i])
    for i in asked.get("attentions", []):
        assert torch.equal(trace.attention_maps(i), full.attention_maps(i))


@pytest.mark.parametrize(
    ("family", "after"),
    [("bert", "attention.self.value"), ("llama", "mlp"), ("falcon", "mlp"), ("t5", "layer.1")],
)
def test_where_attention_is_all_that_is_asked_for_the_rest_of_its_block_does_not_run(family, after):
    model, ran = tiny(family), []
    for i, block in enumerate(find_blocks(model)[:LAYERS], 1):
        block.get_submodule(after).register_forward_hook(lambda *_, i=i: ran.append(i))
    inputs = batch_for(model)
    full = capture(model, inputs, attentions=[2])
    assert ran == [1, 2, 3]
    ran.clear()
    trace = capture(model, inputs, attentions=[2], logits=False)
    assert ran == ([1, 2] if after.endswith("value") else [1])  # values are part of the attention's inputs
    assert torch.equal(trace.attention_maps(2), full.attention_maps(2))
    ran.clear()
    capture(model, inputs, [2], attentions=[2], logits=False)
    assert ran == [1, 2]


def test_logits_are_not_computed_after_an_early_end():
    model = tiny("gpt2")
    heads = []
    model.lm_head.register_forward_pre_hook(lambda *_: heads.append(1))
    capture(model, batch(), [2], logits=False)
    assert heads == []
    capture(model, batch(), [2])
    assert heads == [1]


def test_labels_stay_out_and_inputs_go_to_the_model():
    inputs = batch()
    trace = capture(tiny("gpt2"), {**inputs, "labels": torch.full((2, 7), 10**6)})  # as inputs these would crash
    assert trace.logits.shape == (2, 7, VOCAB)
    embedded = tiny("gpt2").transformer.wte(inputs["input_ids"]).detach()
    by_embedding = capture(
        tiny("gpt2"), {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}, hidden_states=[1]
    )
    assert torch.allclose(by_embedding.logits, trace.logits, atol=1e-6)


# -- gradients --------------------------------------------------------------------------------------------------------


def test_capture_follows_the_grad_mode():
    model = tiny("bert")
    for context, requires_grad in ((torch.enable_grad, True), (torch.no_grad, False), (torch.inference_mode, False)):
        with context():
            trace = capture(model, batch(), [2], [2])
        tensors = [trace.hidden_states[2], trace.queries[2], trace.keys[2], trace.values[2], trace.logits]
        assert [tensor.requires_grad for tensor in tensors] == [requires_grad] * 5


def test_detach_cuts_everything_from_the_graph():
    for family in ("bert", "deberta-v2"):
        trace = capture(tiny(family), batch(), [0, 2], [2])
        cut = trace.detach()
        tensors = [*cut.hidden_states.values(), cut.attention_maps(2), *cut.values.values(), cut.logits]
        assert not any(tensor.requires_grad for tensor in tensors) and trace.attention_maps(2).requires_grad
        assert torch.equal(cut.hidden_states[2], trace.hidden_states[2]) and cut.mask is trace.mask


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_gradients_through_queries_and_keys_are_those_of_the_eager_maps(family):
    target = torch.rand(2, 4, 7, 7)
    captured, eager = tiny(family, "sdpa"), tiny(family, "eager")
    (capture(captured, batch(), attentions=[3]).attention_maps(3) - target).square().sum().backward()
    (eager(**batch(), output_attentions=True).attentions[2] - target).square().sum().backward()
    found, expected = gradients(captured), gradients(eager)
    assert found.keys() == expected.keys() and len(found) > 10
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert scale > 1e-3
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-5 * scale.item()), name


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "falcon", "t5"])
def test_gradient_checkpointing_changes_nothing(family, logits):
    def run(checkpointing: bool) -> tuple[Trace, dict[str, Tensor]]:
        model = tiny(family).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        trace = capture(model, batch_for(model), [0, 1, 3], [2, 3], logits=logits)
        loss = sum(trace.hidden_states[i].square().mean() for i in (0, 1, 3))
        loss = loss + sum(trace.attention_maps(i).square().mean() for i in (2, 3))
        if logits:
            loss = loss + trace.logits.square().mean()
        loss.backward()
        return trace, gradients(model)

    (plain, expected), (trace, found) = run(False), run(True)
    assert torch.allclose(trace.hidden_states[3], plain.hidden_states[3], atol=1e-6)
    assert torch.allclose(trace.attention_maps(3), plain.attention_maps(3), atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


# -- what a trace says ------------------------------------------------------------------------------------------------


def test_a_subclass_of_a_causal_model_is_causal():
    class Mine(hf.GPT2LMHeadModel):
        pass

    assert is_causal_lm(Mine._from_config(tiny("gpt2").config))
    assert not is_causal_lm(tiny("bert")) and not is_causal_lm(tiny("gpt2").transformer)


def test_a_trace_prints_what_it_holds():
    text = repr(capture(tiny("bert"), batch(), [0, 2], [1]))
    assert text == "Trace(BertForSequenceClassification: hidden_states=[0, 2], attention=[1], logits=(2, 2))"


def test_a_bare_encoder_has_no_logits():
    trace = capture(tiny("bert").bert, batch(), [3])
    assert trace.logits is None and trace.hidden_states[3].shape == (2, 7, WIDTH)


def test_blocks_that_return_lists():
    model = hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(vocab_size=50, n_embd=32, n_layer=3, n_head=4)).eval()
    batch = {"input_ids": torch.ones(2, 7, dtype=torch.long)}
    states = model(**batch, output_hidden_states=True).hidden_states
    torch.testing.assert_close(capture(model, batch, [1, 3]).hidden_states[1], states[1])
