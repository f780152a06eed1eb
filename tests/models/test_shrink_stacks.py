"""Students of encoder-decoders and of models whose layers share blocks; what is shared or stored beside the blocks."""

import pytest
import torch
import transformers as hf

from fakit import LayerMap, capture, shrink
from fakit.models import find_blocks
from fakit.models.blocks import find_stacks
from tests.families import SEQ2SEQ, VOCAB, batch_for, tiny


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_number_of_layers_is_that_of_each_stack(family):
    student = shrink(tiny(family), layers=2)
    assert [len(stack.blocks) for stack in find_stacks(student)] == [2, 2]
    spaced = [t for _, t in LayerMap.uniform(4, 6)]
    assert spaced == [2, 3, 5, 6]  # the uniform map of the joint counts pairs each block with the one it starts from
    theirs = find_blocks(tiny(family))
    for block, source in zip(find_blocks(student), (theirs[i - 1] for i in spaced), strict=True):
        expected = source.state_dict()
        shared = block.state_dict().keys() & expected.keys()
        assert len(shared) >= 8 and all(torch.equal(block.state_dict()[name], expected[name]) for name in shared)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_stacks_of_a_list_may_differ_in_depth(family, tmp_path):
    student = shrink(tiny(family), layers=[2, 4, 6]).eval()
    names = {"t5": ("num_layers", "num_decoder_layers"), "bart": ("encoder_layers", "decoder_layers")}[family]
    assert [getattr(student.config, name) for name in names] == [1, 2]
    student.save_pretrained(tmp_path)
    again = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(capture(again, batch_for(again)).logits, capture(student, batch_for(student)).logits)


def test_t5s_position_bias_comes_along_though_its_first_block_goes():
    teacher = tiny("t5")
    student = shrink(teacher, layers=[2, 3, 5, 6])
    for ours, theirs in zip(find_stacks(student), find_stacks(teacher), strict=True):
        bias = [stack.blocks[0].layer[0].SelfAttention.relative_attention_bias.weight for stack in (ours, theirs)]
        assert torch.equal(*bias)
        query = [ours.blocks[0].layer[0].SelfAttention.q.weight, theirs.blocks[1].layer[0].SelfAttention.q.weight]
        assert torch.equal(*query)


def test_heads_of_both_stacks_follow_the_width():
    config = shrink(tiny("bart"), layers=1, hidden_size=16).config
    assert (config.encoder_attention_heads, config.decoder_attention_heads) == (2, 2)
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (24, 24)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (4, "a student of 4 layers asked of a teacher of 3 encoder and 3 decoder layers; choose 1…3, as many of each"),
        ([1, 2], r"layers \[1, 2\] asked of a teacher whose encoder is 1…3 and whose decoder is 4…6: both stacks need"),
        ([4], "both stacks need a layer"),
        ([1, 7], r"layers \[1, 7\] asked of a 6-layer teacher"),
    ],
)
def test_students_without_one_of_the_stacks_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        shrink(tiny("t5"), layers=layers)


def test_albert_groups_that_other_layers_would_share_are_refused():
    teacher = hf.AlbertForMaskedLM._from_config(
        hf.AlbertConfig(**{**tiny("albert").config.to_dict(), "num_hidden_layers": 4, "num_hidden_groups": 2})
    )
    groups = teacher.albert.encoder.albert_layer_groups
    student = shrink(teacher, layers=[1, 2, 3, 4])
    assert [find_stacks(student)[0].blocks.index(b) for b in find_blocks(student)] == [0, 0, 2, 2]
    kept = shrink(teacher, layers=[2, 4]).albert.encoder.albert_layer_groups
    for ours, theirs in zip(kept, groups, strict=True):
        assert all(torch.equal(w, theirs.state_dict()[name]) for name, w in ours.state_dict().items())
    with pytest.raises(ValueError, match=r"serves several layers, and the teacher's blocks \[1, 3, 4\] are not shared"):
        shrink(teacher, layers=[1, 3, 4])


def test_stored_buffers_come_along():
    teacher = tiny("bart")
    teacher.final_logits_bias.copy_(torch.arange(float(VOCAB)))
    assert torch.equal(shrink(teacher, layers=1).final_logits_bias, teacher.final_logits_bias)
