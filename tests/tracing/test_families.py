"""Every family as teacher and as student: one step of all terms, export and reload; pairs across families;
what each one's ways ask for.
"""

import sys

import peft
import pytest
import torch
import transformers as hf

from fakit import capture, shrink
from fakit.models import find_blocks
from fakit.models.blocks import depth
from fakit.tracing.capture import is_causal_lm
from tests.families import (
    DECODERS,
    EAGER_ONLY,
    EVERY,
    HEADS,
    LAYERS,
    SEQ2SEQ,
    VOCAB,
    WIDTH,
    batch,
    batch_for,
    step,
    tiny,
)

EAGER = (*EAGER_ONLY, "gemma2")


def implementation(family: str) -> str:
    return "eager" if family in EAGER else "sdpa"


def auto_class(model) -> type:
    for ending, kind in (
        ("ImageClassification", hf.AutoModelForImageClassification),
        ("SequenceClassification", hf.AutoModelForSequenceClassification),
        ("MaskedLM", hf.AutoModelForMaskedLM),
        ("ConditionalGeneration", hf.AutoModelForSeq2SeqLM),
    ):
        if type(model).__name__.endswith(ending):
            return kind
    return hf.AutoModelForCausalLM


@pytest.mark.parametrize("family", EVERY)
def test_one_step_of_all_terms(family):
    teacher = tiny(family, implementation(family)).requires_grad_(False)
    step(shrink(teacher, layers=2), teacher, batch_for(teacher))


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("init", ["copy", "random"])
def test_students_load_again_by_the_plain_auto_class(family, init, tmp_path):
    student = shrink(tiny(family, implementation(family)), layers=2, init=init).eval()
    student.save_pretrained(tmp_path)
    again = auto_class(student).from_pretrained(tmp_path, attn_implementation=implementation(family))
    assert type(again) is type(student) and depth(again) == (4 if family in SEQ2SEQ else 2)
    with torch.no_grad():
        logits = capture(student, batch_for(student)).logits
        assert torch.equal(capture(again, batch_for(again)).logits, logits) and logits.isfinite().all()


# -- across families --------------------------------------------------------------------------------------------------


def longer_t5() -> hf.PreTrainedModel:
    config = tiny("t5").config
    config.num_layers, config.num_decoder_layers = 6, 4
    return hf.T5ForConditionalGeneration._from_config(config).eval()


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (lambda: tiny("bert", num_hidden_layers=6), lambda: tiny("distilbert", seed=1)),
        (lambda: tiny("llama", num_hidden_layers=6), lambda: tiny("gpt2", n_embd=16, seed=1)),
        (longer_t5, lambda: shrink(tiny("t5", seed=1), layers=[1, 3, 4, 6], hidden_size=16, heads=4, init="random")),
        (lambda: tiny("deberta-v3"), lambda: tiny("albert", seed=1)),
        (lambda: tiny("bart"), lambda: shrink(tiny("t5", seed=1), layers=2, init="random")),
    ],
    ids=["bert-distilbert", "llama-gpt2", "t5-t5", "deberta-albert", "bart-t5"],
)
def test_pairs_across_families(teacher, student):
    teacher, student = teacher().requires_grad_(False), student().train()
    if is_causal_lm(teacher):
        assert is_causal_lm(student)
    inputs = batch_for(teacher)
    if teacher.config.is_encoder_decoder:  # both must read the same decoder tokens, which start with each one's own
        inputs["decoder_input_ids"] = teacher.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    step(student, teacher, inputs)


# -- encoder-decoders and images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("family", SEQ2SEQ)
def test_both_stacks_are_captured_under_one_count(family, how):
    model, inputs = tiny(family, how), batch_for(tiny(family))
    decoder = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    with torch.no_grad():
        trace = capture(model, inputs, range(2 * LAYERS + 1), range(1, 2 * LAYERS + 1))
        plain = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        own = tiny(family, "eager")(
            **plain, decoder_input_ids=decoder, output_attentions=True, output_hidden_states=True
        )
    for i in range(1, LAYERS + 1):
        assert torch.allclose(trace.attention_maps(i), own.encoder_attentions[i - 1], rtol=0, atol=1e-5)
        assert torch.allclose(trace.attention_maps(LAYERS + i), own.decoder_attentions[i - 1], rtol=0, atol=1e-5)
    assert own.encoder_attentions[1].max(-1).values.mean() > 0.2
    valid = trace.mask
    assert torch.equal(valid, inputs["attention_mask"].bool()) and valid.sum() == 12
    for i in range(LAYERS):
        assert torch.allclose(trace.hidden_states[i][valid], own.encoder_hidden_states[i][valid], rtol=0, atol=1e-5)
    for i in range(1, LAYERS):  # the last one has gone through T5's final norm
        found, expected = trace.hidden_states[LAYERS + i], own.decoder_hidden_states[i]
        assert found.shape == (2, 5, WIDTH) and torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert torch.allclose(trace.logits, own.logits, rtol=0, atol=1e-5)
    assert trace.encoder_layers == LAYERS and not trace.causal


def test_t5s_shared_position_bias_is_in_every_layers_maps():
    model = tiny("t5")
    trace = capture(model, batch_for(model), attentions=[2, 5])
    for layer in (2, 5):
        inputs = trace.attention[layer]
        assert inputs.position_bias is not None and inputs.position_bias.abs().max() > 0.1
        without = (inputs.query @ inputs.key.transpose(-2, -1)).masked_fill(inputs.scores() < -1e30, -1e38).softmax(-1)
        assert not torch.allclose(trace.attention_maps(layer), without, atol=1e-3)


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_images_have_layers_and_no_padding(how):
    model, inputs = tiny("vit", how), batch_for(tiny("vit"))
    with torch.no_grad():
        trace = capture(model, inputs, range(LAYERS + 1), range(1, LAYERS + 1))
        own = tiny("vit", "eager")(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    for i in range(1, LAYERS + 1):
        assert torch.allclose(trace.attention_maps(i), own.attentions[i - 1], rtol=0, atol=1e-5)
    for i in range(LAYERS):
        assert torch.allclose(trace.hidden_states[i], own.hidden_states[i], rtol=0, atol=1e-5)
    assert trace.mask is None and trace.hidden_states[0].shape == (2, 5, WIDTH)
    assert torch.allclose(trace.logits, own.logits, atol=1e-5)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_decoder_inputs_come_from_labels_as_the_model_makes_them(family):
    model, inputs = tiny(family), batch_for(tiny(family))
    given = {
        **inputs,
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"]),
    }
    trace, same = capture(model, inputs, [4]), capture(model, given, [4])
    assert torch.equal(trace.logits, same.logits) and torch.equal(trace.hidden_states[4], same.hidden_states[4])
    assert torch.equal(trace.logits, model(**inputs).logits)
    assert trace.decoder_mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    # without labels: all but padding, and the start token even where it is the padding token
    ids = torch.tensor([[model.config.decoder_start_token_id, 5, 6], [model.config.decoder_start_token_id, 7, 0]])
    unlabeled = {name: x for name, x in inputs.items() if name != "labels"} | {"decoder_input_ids": ids}
    assert capture(model, unlabeled).decoder_mask.tolist() == [[True] * 3, [True, True, False]]
    masked = capture(model, unlabeled | {"decoder_attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0]])})
    assert masked.decoder_mask.tolist() == [[True, False, False], [True, True, False]]


def test_a_decoder_that_gets_nothing_is_named():
    with pytest.raises(
        ValueError, match=r"T5ForConditionalGeneration has a decoder.*no decoder_input_ids, and no labels"
    ):
        capture(tiny("t5"), batch(), [4])
    assert capture(tiny("t5"), batch(), [3], logits=False).hidden_states[3].shape == (2, 7, WIDTH)  # not needed there


# -- blocks that work on (T, B, d), blocks that serve all layers
# --------------------------------------------------------


def fsmt() -> hf.PreTrainedModel:
    config = hf.FSMTConfig(
        src_vocab_size=VOCAB,
        tgt_vocab_size=VOCAB,
        langs=["en", "de"],
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return hf.FSMTForConditionalGeneration._from_config(config).eval()


@pytest.mark.parametrize("rows", [2, 6, 7, 1])
def test_tokens_first_blocks_give_rows_first_hidden_states(rows, monkeypatch):
    monkeypatch.setattr(sys.modules[capture.__module__], "_tokens_first", {})  # as in a fresh process
    model, inputs = tiny("xlnet", "eager"), batch(rows=rows, tokens=7, padding=0)
    with torch.no_grad():
        trace, own = capture(model, inputs, range(LAYERS + 1)), model(**inputs, output_hidden_states=True)
        for i in range(LAYERS + 1):
            assert torch.allclose(trace.hidden_states[i], own.hidden_states[i], rtol=0, atol=1e-5)

    model, inputs = fsmt(), inputs | {"decoder_input_ids": torch.randint(3, VOCAB, (rows, 6))}
    with torch.no_grad():
        trace = capture(model, inputs, range(5))
        # with a cache FSMT leaves out its causal mask, and the decoder sees what it is to say
        own = model(**inputs, output_hidden_states=True, use_cache=False)
        for i in range(3):
            assert torch.allclose(trace.hidden_states[i], own.encoder_hidden_states[i], rtol=0, atol=1e-5)
        for i in (1, 2):
            assert torch.allclose(trace.hidden_states[2 + i], own.decoder_hidden_states[i], rtol=0, atol=1e-5)


def test_square_batches_of_other_families_are_not_turned_and_draw_no_random_numbers(monkeypatch):
    monkeypatch.setattr(sys.modules[capture.__module__], "_tokens_first", {})
    model, inputs = tiny("bert").train(), batch(rows=7, tokens=7, padding=0)
    torch.manual_seed(3)
    trace, after = capture(model, inputs, range(LAYERS + 1)), torch.rand(1)
    torch.manual_seed(3)
    own = model(**inputs, output_hidden_states=True)
    assert torch.equal(after, torch.rand(1))
    for i in range(LAYERS + 1):
        assert torch.equal(trace.hidden_states[i], own.hidden_states[i])


def test_a_shorter_albert_repeats_its_block_less_often():
    teacher = tiny("albert")
    student = shrink(teacher, layers=2).eval()
    assert student.config.num_hidden_layers == 2 and student.state_dict().keys() == teacher.state_dict().keys()
    assert all(torch.equal(w, teacher.state_dict()[name]) for name, w in student.state_dict().items())
    ours, theirs = (
        capture(model, batch(), [0, 1, 2, *([3] if model is teacher else [])]) for model in (student, teacher)
    )
    for i in (0, 1, 2):  # its block is the teacher's, so it says what the teacher says two layers deep
        assert torch.equal(ours.hidden_states[i], theirs.hidden_states[i])


# -- attention that the model computes with torch's own function
# ---------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"alibi": True, "multi_query": False}], ids=["rotary", "alibi"])
def test_falcons_sdpa_maps_are_the_ones_its_blocks_attend_by(settings):
    model = tiny("falcon", "sdpa", **settings)
    mixed = []
    block = find_blocks(model)[1]
    handle = block.self_attention.dense.register_forward_pre_hook(lambda module, args: mixed.append(args[0]))
    trace = capture(model, batch(), attentions=[2])
    handle.remove()
    values = trace.values[2].expand(-1, HEADS, -1, -1)  # one head of values serves all queries under multi_query
    by_maps = (trace.attention_maps(2) @ values).transpose(1, 2).flatten(2)
    assert torch.allclose(mixed[0], by_maps, atol=1e-5) and trace.queries[2].shape == (2, HEADS, 7, 8)


# -- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_models_with_an_adapter_are_seen_through(family):
    base = tiny(family)
    target = {"llama": ["q_proj"], "bert": ["query"]}[family]
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=target, r=2, init_lora_weights=False)).eval()
    assert is_causal_lm(wrapped) == (family in DECODERS) and depth(wrapped) == LAYERS
    trace = capture(wrapped, batch(), [1, 3], [2])
    assert sorted(trace.hidden_states) == [1, 3] and trace.causal == (family in DECODERS)
    before = {name: p.clone() for name, p in wrapped.state_dict().items()}
    student = shrink(wrapped, layers=LAYERS).eval()  # the adapter merged, in a copy
    assert type(student) is type(base) and not any("lora" in name for name, _ in student.named_parameters())
    assert torch.allclose(student(**batch()).logits, wrapped(**batch()).logits, atol=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in wrapped.state_dict().items())
