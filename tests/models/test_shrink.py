"""Students cut from teachers: which blocks, which units of a weight, which settings follow;
quantized teachers; refusals.
"""

import copy

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fakit import LayerMap, capture, load_teacher, shrink
from fakit.models import find_blocks
from tests.families import DECODERS, EAGER_ONLY, EVERY, SEQ2SEQ, VOCAB, WIDTH, batch, batch_for, tiny

EAGER = (*EAGER_ONLY, "gemma2")


def teacher_of(family: str, **changes):
    return tiny(family, "eager" if family in EAGER else "sdpa", **changes)


@pytest.mark.parametrize("family", EVERY)
def test_depth_cut_copies_exactly_the_teachers_blocks_and_everything_around_them(family):
    teacher = teacher_of(family)
    layers = [1, 3, 4, 6] if family in SEQ2SEQ else [1, 3]
    student = shrink(teacher, layers=layers)
    theirs, ours = find_blocks(teacher), find_blocks(student)
    assert len(ours) == len(layers) and student.config.num_hidden_layers == 2
    for block, source in zip(ours, [theirs[i - 1] for i in layers], strict=True):
        expected = source.state_dict()
        assert block.state_dict().keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in block.state_dict().items())
    blocks = {id(p) for block in [*theirs, *ours] for p in block.parameters()}
    rest = {name: p for name, p in teacher.named_parameters() if id(p) not in blocks}
    kept = {name: p for name, p in student.named_parameters() if id(p) not in blocks}
    assert rest.keys() == kept.keys() and all(torch.equal(kept[name], p) for name, p in rest.items())


@pytest.mark.parametrize("family", EVERY)
def test_a_student_of_the_teachers_depth_says_what_the_teacher_says(family):
    teacher = teacher_of(family)
    student = shrink(teacher, layers=3).eval()
    inputs = batch_for(teacher)
    with torch.no_grad():
        assert torch.equal(capture(student, inputs).logits, capture(teacher, inputs).logits)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("how", [{"layers": 1}, {"layers": 2, "hidden_size": 16}])
def test_students_run_and_load_again_as_plain_transformers_models(family, how, tmp_path):
    student = shrink(teacher_of(family), **how).eval()
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path, attn_implementation=student.config._attn_implementation)
    with torch.no_grad():
        logits = capture(student, batch_for(student)).logits
        assert torch.equal(capture(again, batch_for(again)).logits, logits) and logits.isfinite().all()


def test_even_spacing_is_the_uniform_map():
    teacher = teacher_of("bert", num_hidden_layers=6)
    for layers in (1, 2, 3, 4, 6):
        student = shrink(teacher, layers=layers)
        for s, t in LayerMap.uniform(layers, 6):
            ours, theirs = find_blocks(student)[s - 1].state_dict(), find_blocks(teacher)[t - 1].state_dict()
            assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_1_3_5():
    teacher = teacher_of("gpt2", n_layer=6)
    student = shrink(teacher, layers=[1, 3, 5])
    for ours, source in zip(student.transformer.h, (0, 2, 4), strict=True):
        assert torch.equal(ours.attn.c_attn.weight, teacher.transformer.h[source].attn.c_attn.weight)


def test_the_student_is_trainable_and_the_teacher_untouched():
    teacher = teacher_of("llama").requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    student = shrink(teacher, layers=2, hidden_size=16)
    assert student.training and all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.fill_(7.0)
    assert all(torch.equal(weight, before[0][name]) for name, weight in teacher.state_dict().items())
    assert teacher.config.to_dict() == before[1] and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_tied_embeddings_stay_tied():
    student = shrink(teacher_of("gpt2"), layers=2, hidden_size=16)
    assert student.lm_head.weight is student.transformer.wte.weight
    assert student.lm_head.weight.shape == (VOCAB, 16)


def test_generation_settings_come_along():
    teacher = teacher_of("gpt2")
    teacher.generation_config.max_new_tokens = 17
    assert shrink(teacher, layers=1).generation_config.max_new_tokens == 17


# -- width ------------------------------------------------------------------------------------------------------------


def test_width_cut_shapes_and_leading_units():
    teacher = teacher_of("bert")
    student = shrink(teacher, layers=[2], hidden_size=16)
    assert (student.config.hidden_size, student.config.num_attention_heads, student.config.intermediate_size) == (
        16,
        2,
        24,
    )
    ours, theirs = find_blocks(student)[0], find_blocks(teacher)[1]
    pairs = [
        (ours.attention.self.query, theirs.attention.self.query, (16, 16)),
        (ours.attention.output.dense, theirs.attention.output.dense, (16, 16)),
        (ours.intermediate.dense, theirs.intermediate.dense, (24, 16)),
        (ours.output.dense, theirs.output.dense, (16, 24)),
    ]
    for cut, full, (rows, columns) in pairs:
        assert torch.equal(cut.weight, full.weight[:rows, :columns]) and torch.equal(cut.bias, full.bias[:rows])
    assert torch.equal(
        student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight[:, :16]
    )
    assert torch.equal(student.classifier.weight, teacher.classifier.weight[:, :16])


def test_heads_of_choice():
    student = shrink(teacher_of("bert"), layers=2, hidden_size=24, heads=6)
    assert (student.config.hidden_size, student.config.num_attention_heads) == (24, 6)
    student = shrink(teacher_of("bert"), layers=2, heads=2)
    assert (student.config.hidden_size, student.config.num_attention_heads) == (WIDTH, 2)


def test_grouped_heads_keep_their_groups():
    teacher = teacher_of("llama")  # 4 heads, 2 groups
    assert shrink(teacher, layers=2, hidden_size=16).config.num_key_value_heads == 1
    narrow = shrink(teacher, layers=[3], hidden_size=16)
    assert narrow.config.num_attention_heads == 2 and narrow.config.head_dim == 8
    ours, theirs = find_blocks(narrow)[0].self_attn, find_blocks(teacher)[2].self_attn
    assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight[:16, :16])
    assert torch.equal(ours.k_proj.weight, theirs.k_proj.weight[:8, :16])


def test_fused_weights_are_cut_inside_each_of_their_matrices():
    gpt2, narrow = teacher_of("gpt2"), shrink(teacher_of("gpt2"), layers=3, hidden_size=16)
    full, cut = gpt2.transformer.h[0].attn.c_attn, narrow.transformer.h[0].attn.c_attn  # (in, 3 · out)
    for k in range(3):
        assert torch.equal(cut.weight[:, 16 * k : 16 * (k + 1)], full.weight[:16, WIDTH * k : WIDTH * k + 16])
        assert torch.equal(cut.bias[16 * k : 16 * (k + 1)], full.bias[WIDTH * k : WIDTH * k + 16])

    modernbert = teacher_of("modernbert")
    narrow = shrink(modernbert, layers=3, hidden_size=16)
    full, cut = modernbert.model.layers[0].attn.Wqkv.weight, narrow.model.layers[0].attn.Wqkv.weight  # (3 · out, in)
    for k in range(3):
        assert torch.equal(cut[16 * k : 16 * (k + 1)], full[WIDTH * k : WIDTH * k + 16, :16])
    full, cut = modernbert.model.layers[0].mlp.Wi.weight, narrow.model.layers[0].mlp.Wi.weight  # (2 · inner, in)
    for k in range(2):
        assert torch.equal(cut[24 * k : 24 * (k + 1)], full[48 * k : 48 * k + 24, :16])


def test_fused_weights_of_unequal_parts_and_of_experts():
    config = hf.Phi3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        pad_token_id=0,
    )
    teacher = hf.Phi3ForCausalLM._from_config(config)
    student = shrink(teacher, layers=1, hidden_size=16)
    full = teacher.model.layers[0].self_attn.qkv_proj.weight  # 4 · 8 queries, 2 · 8 keys, 2 · 8 values
    cut = student.model.layers[0].self_attn.qkv_proj.weight  # 2 · 8, 8, 8
    assert torch.equal(cut, torch.cat([full[:16, :16], full[32:40, :16], full[48:56, :16]]))

    mixtral = teacher_of("mixtral")
    full = mixtral.model.layers[0].mlp.experts.gate_up_proj  # (experts, 2 · inner, in)
    cut = shrink(mixtral, layers=3, hidden_size=16).model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(cut, torch.cat([full[:, :24, :16], full[:, 48:72, :16]], dim=1))


def test_heads_fused_one_by_one_keep_whole_heads():
    teacher, student = teacher_of("gpt-neox"), shrink(teacher_of("gpt-neox"), layers=3, hidden_size=16)
    full = teacher.gpt_neox.layers[0].attention.query_key_value.weight.unflatten(0, (4, 3, 8))  # head, q k v, unit
    cut = student.gpt_neox.layers[0].attention.query_key_value.weight.unflatten(0, (2, 3, 8))
    assert torch.equal(cut, full[:2, ..., :16])


# -- what is written down once a block ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "modernbert", "qwen3"])
def test_layer_types_follow_their_blocks(family):
    teacher = teacher_of(family)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    teacher.config.layer_types = kinds
    assert shrink(teacher, layers=[1, 3]).config.layer_types == ["full_attention"] * 2
    assert shrink(teacher, layers=[2, 3]).config.layer_types == ["sliding_attention", "full_attention"]
    assert teacher.config.layer_types == kinds


def test_other_lists_stay_though_they_are_as_long_as_the_model_is_deep():
    teacher = teacher_of("deberta-v2", num_hidden_layers=2)
    teacher.config.eos_token_id = [1, 2]
    student = shrink(teacher, layers=1)
    assert student.config.pos_att_type == ["p2c", "c2p"] and student.config.eos_token_id == [1, 2]


def test_gpt_neo_kinds_of_attention_survive_saving(tmp_path):
    config = hf.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=3,
        max_position_embeddings=64,
    )
    student = shrink(hf.GPTNeoForCausalLM._from_config(config), layers=[2, 3, 4]).eval()
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.attention_layers == ["local", "global", "local"]
    assert torch.equal(again(**batch()).logits, student(**batch()).logits)


# -- random, quantized, refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_random_takes_no_weight_and_follows_the_seed(family):
    teacher = teacher_of(family)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(shrink(teacher, layers=2, init="random").state_dict())
    theirs = teacher.state_dict()
    matrices = [name for name, weight in draws[0].items() if weight.dim() > 1]
    assert all(torch.equal(weight, draws[1][name]) for name, weight in draws[0].items())
    assert not any(torch.equal(draws[0][name], draws[2][name]) for name in matrices)
    assert not any(torch.equal(draws[0][name], theirs[name]) for name in matrices)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after a forward pass"])
@pytest.mark.parametrize(("quantize", "error"), [("8bit", 0.01), ("4bit", 0.12)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_students_of_quantized_teachers_start_near_the_full_weights(family, quantize, error, used, tmp_path):
    sizes = {"gpt2": {"n_embd": 64}, "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}}[family]
    full = tiny(family, **sizes)
    full.save_pretrained(tmp_path)
    if used:  # as transformers loads it; the forward pass then packs 4-bit weights anew on some CPUs
        setting = BitsAndBytesConfig(**{f"load_in_{quantize}": True, "bnb_4bit_quant_type": "nf4"})
        teacher = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=setting, dtype=torch.float32
        ).eval()
        with torch.no_grad():
            first = teacher(**batch()).logits
    else:
        teacher = load_teacher(tmp_path, quantize=quantize)
    student = shrink(teacher, layers=[1, 3])
    expected = dict(shrink(full, layers=[1, 3]).named_parameters())
    rounded = 0
    for name, weight in student.named_parameters():
        distance = ((weight - expected[name]).norm() / expected[name].norm().clamp_min(1e-9)).item()
        assert distance < error, name
        rounded += distance > error / 100
    assert rounded >= 6  # it really was quantized
    assert not hasattr(student.config, "quantization_config") and student.dtype == torch.float32
    if used:  # and the teacher still says what it said
        with torch.no_grad():
            assert torch.allclose(teacher(**batch()).logits, first, atol=0.02 * first.abs().max().item())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"layers": 4}, "a student of 4 layers asked of a teacher of 3; choose 1…3"),
        ({"layers": 0}, "a student of 0 layers"),
        ({"layers": [1, 4]}, r"layers \[1, 4\] asked of a 3-layer teacher; .*1…3 in rising order"),
        ({"layers": [3, 1]}, "in rising order"),
        ({"layers": [1, 1]}, "each once"),
        ({"layers": []}, r"layers \[\] asked"),
        ({"layers": 2, "hidden_size": 48}, "hidden_size 48 asked of a teacher of width 32; choose at most 32"),
        ({"layers": 2, "hidden_size": 0}, "hidden_size 0 asked"),
        ({"layers": 2, "heads": 5}, r"width of 32 cannot be split into 5 heads \(the teacher: 32 in 4\).*\[1, 2, 4"),
        ({"layers": 2, "init": "zeros"}, "init is 'zeros'; a student starts from 'copy'.*or 'random'"),
    ],
)
def test_students_that_cannot_be_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        shrink(teacher_of("bert"), **how)


def test_blocks_of_different_kinds_are_not_copied_into_each_other():
    config = hf.DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        v_head_dim=8,
        qk_nope_head_dim=4,
    )
    teacher = hf.DeepseekV3ForCausalLM._from_config(config)  # a plain block, then two of experts
    assert (
        find_blocks(shrink(teacher, layers=[1, 3]))[1].state_dict().keys()
        == find_blocks(teacher)[2].state_dict().keys()
    )
    with pytest.raises(
        ValueError, match=r"layers.0.*would start from .*layers.1.*not all of one kind.*layers.1., .*layers.2."
    ):
        shrink(teacher, layers=[2, 3])


def test_every_decoder_can_still_generate():
    for family in DECODERS:
        student = shrink(teacher_of(family), layers=2).eval()
        inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        assert student.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None).shape == (1, 5), family


def test_lists_of_block_numbers_follow_the_blocks_that_stay():
    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    teacher = hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **sizes,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            mlp_only_layers=[0, 1, 2],
        )
    )
    for init in ("copy", "random"):
        student = shrink(teacher, layers=2, init=init)
        assert student.config.mlp_only_layers == [0, 1]
        assert {type(block.mlp).__name__ for block in student.model.layers} == {"Qwen3MoeMLP"}
    assert shrink(teacher, layers=[2, 3]).config.mlp_only_layers == [0, 1]


@pytest.mark.parametrize(
    "make",
    [lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, state_size=4))],
)
def test_a_model_without_heads_cannot_be_narrowed(make):
    with pytest.raises(ValueError, match=r"in None heads: narrowing needs one width .* by depth alone"):
        shrink(make(), layers=2, hidden_size=8)
