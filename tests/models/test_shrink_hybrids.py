"""Students of models whose blocks are of several kinds: they keep the kinds that the family cannot run without,
or are refused.
"""

import re

import pytest
import torch
import transformers as hf

from fakit import shrink
from fakit.models import find_blocks

_SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_SHARED = _SIZES | {
    "num_hidden_layers": 7,
    "head_dim": 8,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2 + ["full_attention"],
    "sliding_window": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 60,
    "num_kv_shared_layers": 3,
}
MAKE = {
    "gemma4": lambda: hf.Gemma4ForCausalLM(
        hf.Gemma4TextConfig(**_SHARED, global_head_dim=16, use_double_wide_mlp=True)
    ),
    "gemma3n": lambda: hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(
            **_SHARED, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.9] * 2 + [0.0] * 5
        )
    ),
    "jamba": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            **_SIZES,
            num_hidden_layers=6,
            num_experts=2,
            attn_layer_period=3,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=4,
            use_mamba_kernels=False,
        )
    ),
    "bamba": lambda: hf.BambaForCausalLM(
        hf.BambaConfig(**_SIZES, **_MAMBA2, num_hidden_layers=6, attn_layer_indices=[1, 4])
    ),
    "granite hybrid": lambda: hf.GraniteMoeHybridForCausalLM(
        hf.GraniteMoeHybridConfig(
            **_SIZES,
            **_MAMBA2,
            layer_types=["mamba", "attention", "mamba"] * 2,
            num_hidden_layers=6,
            shared_intermediate_size=16,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    ),
    "recurrent gemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(
            **_SIZES,
            num_hidden_layers=6,
            lru_width=32,
            attention_window_size=8,
            block_types=["recurrent", "attention", "recurrent"],
        )
    ),
    "lfm2": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(
            **_SIZES,
            num_hidden_layers=6,
            layer_types=["conv", "full_attention", "conv", "conv", "full_attention", "conv"],
            block_auto_adjust_ff_dim=False,
        )
    ),
}
# Depths, evenly spaced, that keep the kinds: of attention at least one block; of shared keys and values the ones they
# come from.
WORK = {
    "gemma4": [2, 4, 5, 6, 7],  # 3 would be blocks 2, 5 and 7: the last one shares what block 4 makes
    "gemma3n": [2, 4, 5, 6, 7],
    "jamba": [3, 4, 6],  # 5 would have blocks of experts in no rhythm that its configuration can say
    "bamba": [3, 4, 5, 6],
    "granite hybrid": [3, 4, 5, 6],
    "recurrent gemma": [3, 4, 5, 6],
    "lfm2": [3, 4, 5, 6],
}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


@pytest.mark.parametrize("family", MAKE)
def test_every_depth_runs_and_loads_again_or_is_refused_naming_those_that_do(family, tmp_path):
    torch.manual_seed(0)
    teacher = MAKE[family]().eval()
    depth, works = len(find_blocks(teacher)), []
    for layers in range(1, depth + 1):
        try:
            student = shrink(teacher, layers=layers).eval()
        except ValueError as error:
            named = re.search(
                r"Depths that work, evenly spaced: ([\d, ]+)\. Or choose layers=\[…\] by their kinds", str(error)
            )
            assert named and named[1].split(", ") == list(map(str, WORK[family])), error
            continue
        works.append(layers)
        student.save_pretrained(tmp_path / f"{layers}")
        again = type(student).from_pretrained(tmp_path / f"{layers}").eval()
        with torch.no_grad():
            logits = student(input_ids=IDS).logits
            assert torch.allclose(again(input_ids=IDS).logits, logits, atol=1e-5) and logits.isfinite().all()
            if layers == depth:
                assert torch.allclose(logits, teacher(input_ids=IDS).logits, atol=1e-5)
    assert works == WORK[family]


@pytest.mark.parametrize("family", ["gemma4", "gemma3n"])
def test_what_is_packed_by_layer_and_what_differs_by_layer_follow_the_blocks(family):
    torch.manual_seed(0)
    teacher = MAKE[family]().eval()
    kept = [1, 4, 6, 7]
    student = shrink(teacher, layers=kept)
    assert student.config.num_kv_shared_layers == 2
    assert student.config.layer_types == [teacher.config.layer_types[i - 1] for i in kept]
    for name, dim in (("embed_tokens_per_layer", 1), ("per_layer_model_projection", 0)):
        full, cut = (getattr(model.model, name).weight for model in (teacher, student))
        assert torch.equal(cut, torch.cat([full.split(8, dim)[i - 1] for i in kept], dim))
    for ours, number in zip(find_blocks(student), kept, strict=True):
        theirs = find_blocks(teacher)[number - 1].state_dict()
        assert ours.state_dict().keys() == theirs.keys()
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.state_dict().items())
    if family == "gemma4":  # global layers have wider heads
        assert [layer.head_dim for layer in student.config.per_layer_config] == [8, 16, 8, 16]


def test_blocks_chosen_by_their_kinds_take_a_rhythm_of_their_own():
    student = shrink(MAKE["jamba"](), layers=[2, 3, 5])
    assert student.config.layers_block_type == ["attention", "mamba", "attention"]
    assert [type(block.feed_forward).__name__ for block in find_blocks(student)][2] == "JambaMLP"
    with pytest.raises(ValueError, match=r"not all of one kind.*linear_attention with feed_forward\.experts: 4, 6"):
        shrink(MAKE["jamba"](), layers=[2, 4, 5, 6])


def test_a_student_that_would_come_back_as_another_is_refused():
    teacher = MAKE["gemma4"]()  # whose configuration makes the last block's attention full
    with pytest.raises(ValueError, match=r"another model after saving and loading: layer_types .*becomes"):
        shrink(teacher, layers=[1, 2, 3])


def test_numbers_of_blocks_of_a_kind_follow_the_blocks_that_stay():
    config = hf.models.mllama.MllamaTextConfig(**_SIZES, num_hidden_layers=5, cross_attention_layers=[1, 3])
    student = shrink(hf.MllamaForCausalLM(config), layers=[1, 4, 5])
    assert student.config.cross_attention_layers == [1]


def test_a_depth_that_a_family_cannot_be_made_with_is_refused():
    teacher = hf.RwkvForCausalLM(hf.RwkvConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"cannot be made with \[1\] layers .*ZeroDivisionError.*Take more layers"):
        shrink(teacher, layers=1)
