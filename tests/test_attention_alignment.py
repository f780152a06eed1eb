"""The attention term over every family: what is computed in blocks from queries and keys equals the loss of the maps in
full.
"""

import pytest
import torch

from fakit import Attention, LayerMap, Objective, capture
from fakit.losses.attention import map_kl, map_mse
from tests.families import EVERY, batch, tiny


def traces(family: str):
    changes = {"attention": "eager"} if family.startswith("gemma2") else {}  # its soft cap has no sdpa
    made = batch(rows=3, tokens=9)
    first = tiny(family, **changes)
    if first.config.is_encoder_decoder:
        made["decoder_input_ids"] = made["input_ids"].flip(1)
        made["decoder_attention_mask"] = made["attention_mask"].flip(1)
    for model in (first, tiny(family, seed=1, **changes)):
        yield capture(model, made, attentions=[1, 2], logits=False)


TEXT = [name for name, (kind, _) in EVERY.items() if kind.main_input_name == "input_ids"]


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_blocks_equal_maps_in_full(family, loss):
    student, teacher = traces(family)
    for pair in ((1, 1), (2, 1)):
        term = Objective(LayerMap([pair]), attention=Attention(loss))(student, teacher)
        maps = student.attention_maps(pair[0]), teacher.attention_maps(pair[1])
        mask = student.layer_mask(1)
        pairs = mask[:, None, :, None] & mask[:, None, None, :]
        seen = [
            side.attention[i].allowed() for side, i in zip((student, teacher), pair, strict=True) if i in side.attention
        ]
        if len(seen) == 2 and None not in seen:  # pairs that both sides mask
            pairs = pairs & (seen[0] | seen[1]).any(1, keepdim=True)
        elif student.causal:
            pairs = pairs & torch.ones(9, 9, dtype=torch.bool).tril()
        expected = {"kl": map_kl, "mse": map_mse}[loss](*maps, pairs)
        torch.testing.assert_close(term.total, expected, rtol=1e-5, atol=1e-7)  # float32 maps that hardly differ
        assert term.total > 0
    assert abs(Objective(LayerMap([(2, 2)]), attention=Attention(loss))(student, student).total.item()) < 1e-7


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "gemma2"])
def test_relations_and_matched_heads_train_students_of_other_head_counts(family):
    student, teacher = traces(family)
    for term in (Attention("relations"), Attention("kl", heads="best-match"), Attention("mse", heads="best-match")):
        found = Objective(LayerMap([(1, 1), (2, 2)]), attention=term)(student, teacher)
        assert found.total > 0 and torch.isfinite(found.total)
        if term.heads == "best-match":
            assert set(found.heads) == {(1, 1), (2, 2)}
            assert all(sorted(heads.tolist()) == list(range(len(heads))) for heads in found.heads.values())


def test_relations_of_a_family_that_gives_maps_alone_are_refused_by_name():
    student, teacher = traces("bloom")
    with pytest.raises(ValueError, match=r"BloomForCausalLM gives only its attention maps; use Attention\('kl'\)"):
        Objective(LayerMap([(1, 1)]), attention=Attention("relations"))(student, teacher)
