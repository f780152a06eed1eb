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


@pytest.mark.parametrize("loss", ["relations", "minilm", "score_mse"])
def test_what_maps_are_made_of_is_refused_by_name_of_a_family_that_gives_them_alone(loss):
    student, teacher = traces("bloom")
    with pytest.raises(ValueError, match=r"BloomForCausalLM gives only its attention maps; use Attention\('kl'\)"):
        Objective(LayerMap([(1, 1)]), attention=Attention(loss))(student, teacher)


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "t5"])
def test_tinybert_compares_what_the_softmax_is_given(family):
    """Of the model's own eager maps, whose logarithms are its scores up to a number a row."""
    student, teacher = traces(family)
    found = Objective(LayerMap([(2, 1)]), attention=Attention("score_mse"))(student, teacher).total.item()
    scores = [side.attention[i].scores().double() for side, i in ((student, 2), (teacher, 1))]  # (B, H, T, T)
    for side, i, score in ((student, 2, scores[0]), (teacher, 1, scores[1])):
        rows = side.attention_maps(i).double()
        offset = (score - rows.clamp_min(1e-30).log()).masked_fill(rows < 1e-20, torch.nan)
        assert (offset.nanmean(-1, keepdim=True) - offset).nan_to_num().abs().max() < 1e-4
    squares = []
    for b, tokens in enumerate(student.mask):
        places = tokens.nonzero().flatten().tolist()
        for q in places:
            keys = [k for k in places if k <= q] if student.causal else places
            squares += [(scores[0][b, :, q, k] - scores[1][b, :, q, k]).square().mean().item() for k in keys]
    assert found == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    same = Objective(LayerMap([(2, 2)]), attention=Attention("score_mse"))(student, student)
    assert same.total.item() == 0.0 and found > 0


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_minilm_is_the_kl_of_maps_and_of_the_values_relations(family):
    student, teacher = traces(family)
    found = Objective(LayerMap([(2, 2)]), attention=Attention("minilm"))(student, teacher).total.item()
    tokens, sides = student.mask, []
    for side in (student, teacher):
        values = side.values[2].double()  # (B, H, T, d)
        relations = values @ values.mT / values.shape[-1] ** 0.5
        sides.append((side.attention[2].scores().double(), relations))
    means = []
    for ours, theirs in zip(*sides, strict=True):
        rows = []
        for b in range(len(tokens)):
            n = tokens[b].nonzero().flatten()
            for place, q in enumerate(n.tolist()):
                keys = n[: place + 1] if student.causal else n
                p, q_ = (scores[b, :, q, keys].log_softmax(-1) for scores in (theirs, ours))
                rows += (p.exp() * (p - q_)).sum(-1).tolist()
        means.append(sum(rows) / len(rows))
    assert found == pytest.approx(sum(means), rel=1e-4) and min(means) > 0  # float32 maps that hardly differ
    same = Objective(LayerMap([(2, 2)]), attention=Attention("minilm"))(student, student)
    assert same.total.item() == pytest.approx(0.0, abs=1e-7)


def test_minilm_of_matched_heads_needs_values_and_says_what_a_cache_keeps():
    made = Objective(LayerMap([(2, 2)]), attention=Attention("minilm"))
    assert made.needs("teacher").inputs == {"queries", "keys", "values"}
    student, teacher = traces("llama")  # whose keys and values serve several heads
    relations = []
    for heads in ("one-to-one", "best-match"):
        both, maps = (
            Objective(LayerMap([(2, 2)]), attention=Attention(loss, heads=heads))(student, teacher).total.item()
            for loss in ("minilm", "kl")
        )
        relations.append(both - maps)
    assert relations[0] == pytest.approx(relations[1], abs=1e-6) and relations[0] > 1e-3  # those of values are as ever
