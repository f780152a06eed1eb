"""Attention heads: distances, matching and the scores that name what a head does (fakit.similarity.attention)."""

import math

import pytest
import torch

from fakit.similarity import (
    attention_entropy,
    attention_rollout,
    attention_similarity,
    head_distance,
    induction_score,
    match_heads,
    previous_token_score,
    sink_share,
)


def maps_of(seed, batch=2, heads=3, tokens=5, mask=None, causal=False, sharpness=2.0):
    scores = sharpness * torch.randn(batch, heads, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return scores.softmax(-1)


def test_distance_equals_scipy_row_by_row():
    import numpy as np
    from scipy.spatial.distance import jensenshannon

    student, teacher = maps_of(0, heads=2), maps_of(1, heads=3)
    expected = np.zeros((2, 3))
    for s in range(2):
        for t in range(3):
            rows = zip(student[:, s].flatten(0, 1).double(), teacher[:, t].flatten(0, 1).double(), strict=True)
            expected[s, t] = math.sqrt(np.mean([jensenshannon(p, q, base=2) ** 2 for p, q in rows]))
    np.testing.assert_allclose(head_distance(student, teacher), expected, rtol=1e-6)


def test_distance_limits_and_symmetry():
    a, b = maps_of(0), maps_of(1, heads=4)
    assert head_distance(a, a).diagonal().abs().max() < 1e-7
    torch.testing.assert_close(head_distance(a, b), head_distance(b, a).T)
    first, last = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    first[..., 0], last[..., 2] = 1, 1
    assert head_distance(first, last).item() == pytest.approx(1)


def test_padding_changes_nothing():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    student, teacher = maps_of(0, mask=mask), maps_of(1, mask=mask)
    junk = [torch.where(mask[:, None, :, None], maps, torch.nan) for maps in (student, teacher)]  # rows of padding
    torch.testing.assert_close(head_distance(*junk, mask), head_distance(student, teacher, mask))
    wide = [torch.nn.functional.pad(maps, (0, 2, 0, 2), value=0.3) for maps in (student, teacher)]
    wide_mask = torch.nn.functional.pad(mask, (0, 2))
    torch.testing.assert_close(head_distance(*wide, wide_mask), head_distance(student, teacher, mask))
    for score in (attention_entropy, sink_share, previous_token_score):
        torch.testing.assert_close(score(wide[0], wide_mask), score(student, mask))


def test_causal_rows_with_one_key_do_not_count():
    student, teacher = maps_of(0, causal=True), maps_of(1, causal=True)
    counted = head_distance(student, teacher, causal=True).square()
    # all rows count without `causal`; the first of five adds a divergence of exactly 0
    diluted = head_distance(student, teacher, torch.ones(2, 5).bool()).square()
    torch.testing.assert_close(diluted, counted * 4 / 5)


def test_matching_finds_a_permutation_of_heads():
    teacher = maps_of(3, heads=6)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    matching = match_heads(head_distance(teacher[:, order], teacher))
    assert matching.pairs == tuple(enumerate(order.tolist()))
    assert matching.mean_distance < 1e-6
    assert "S0–T4" in str(matching) and "| 0 | 4 | 0.000 |" in matching._repr_markdown_()


def test_matching_is_optimal_where_greedy_is_not_and_takes_unequal_heads():
    distance = torch.tensor([[0.1, 0.2, 0.9], [0.15, 0.9, 0.8]])  # greedy: .1 + .8
    matching = match_heads(distance)
    assert matching.pairs == ((0, 1), (1, 0))
    assert matching.distances == pytest.approx((0.2, 0.15))
    greedy = match_heads(distance, "greedy")
    assert greedy.pairs == ((0, 0), (1, 2)) and greedy.mean_distance == pytest.approx(0.45)
    assert greedy.mean_distance > matching.mean_distance


def test_greedy_matching_is_the_one_that_best_match_trains_with():
    from fakit.losses.fused import streamed

    distance = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    greedy = match_heads(distance, "greedy")  # more student heads than teacher heads: teacher heads serve several
    assert greedy.pairs == tuple(enumerate(streamed.match_heads(distance).tolist()))
    assert len(match_heads(distance).pairs) == 2


def test_entropy():
    uniform = torch.full((1, 1, 4, 4), 0.25)
    assert attention_entropy(uniform).item() == pytest.approx(math.log(4))
    assert attention_entropy(uniform, normalized=True).item() == pytest.approx(1)
    assert attention_entropy(torch.eye(4)[None, None]).item() == 0
    causal = torch.tril(torch.ones(4, 4)) / torch.arange(1, 5)[:, None]
    expected = sum(math.log(k) for k in (2, 3, 4)) / 3
    assert attention_entropy(causal[None, None], causal=True).item() == pytest.approx(expected)
    assert attention_entropy(causal[None, None], causal=True, normalized=True).item() == pytest.approx(1)


def test_uniform_attention_is_uniform_to_the_last_digit():
    seventh = torch.full((1, 1, 7, 7), 1 / 7, dtype=torch.float64)
    assert attention_entropy(seventh, normalized=True).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    a, b = maps_of(0).to(dtype), maps_of(1).to(dtype)
    torch.testing.assert_close(head_distance(a, b), head_distance(a.double(), b.double()), atol=0, rtol=0)
    for score in (attention_entropy, sink_share, previous_token_score):
        torch.testing.assert_close(score(a), score(a.double()), atol=0, rtol=0)


def test_sink_share_counts_the_first_valid_token_and_special_positions():
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 0, :, 1], maps[0, 0, :, 2] = 0.7, 0.3
    maps[0, 1, :, 3] = 1.0
    mask = torch.tensor([[False, True, True, True]])  # padded on the left: the first valid token is 1
    torch.testing.assert_close(sink_share(maps, mask), torch.tensor([0.7, 0.0]).double())
    special = torch.tensor([[False, False, False, True]])
    torch.testing.assert_close(sink_share(maps, mask, special), torch.tensor([0.7, 1.0]).double())


def test_previous_token_score():
    shift = torch.zeros(5, 5)
    shift[0, 0] = 1
    shift[torch.arange(1, 5), torch.arange(4)] = 1
    maps = torch.stack([shift, torch.full((5, 5), 0.2)])[None]
    torch.testing.assert_close(previous_token_score(maps), torch.tensor([1.0, 0.2]).double())
    mask = torch.tensor([[False, False, True, True, True]])  # the first valid token has none before it
    torch.testing.assert_close(previous_token_score(maps[:, 1:], mask), torch.tensor([1 / 3]).double())


def test_induction_score():
    ids = torch.tensor([[7, 8, 9, 7, 8, 9]])
    maps = torch.zeros(1, 2, 6, 6)
    maps[0, :, torch.arange(6), 0] = 1  # everyone at the first token, but …
    maps[0, 0, 3:] = 0
    maps[0, 0, torch.arange(3, 6), torch.arange(1, 4)] = 1  # … head 0 looks at what followed last time
    torch.testing.assert_close(induction_score(maps, ids), torch.tensor([1.0, 0.0]).double())
    with pytest.raises(ValueError, match="no token occurs twice"):
        induction_score(maps, torch.arange(6)[None])


def test_rollout():
    layers = [maps_of(0), maps_of(1), maps_of(2)]
    rollout = attention_rollout(layers)
    by_hand = torch.eye(5).double().expand(2, 5, 5)
    for layer in layers:
        by_hand = (0.5 * layer.double().mean(1) + 0.5 * torch.eye(5)) @ by_hand
    torch.testing.assert_close(rollout, by_hand, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rollout.sum(-1), torch.ones(2, 5).double())
    identity = torch.eye(5).expand(2, 3, 5, 5)
    torch.testing.assert_close(attention_rollout([identity] * 4), torch.eye(5).double().expand(2, 5, 5))


def test_rollout_takes_layers_in_one_tensor():
    layers = [maps_of(0), maps_of(1)]
    torch.testing.assert_close(attention_rollout(torch.stack(layers)), attention_rollout(layers))


def test_rollout_keeps_padding_out():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    rollout = attention_rollout([maps_of(0, mask=mask), maps_of(1, mask=mask)], mask)
    torch.testing.assert_close(rollout.sum(-1), mask.double())
    assert rollout[0, :, 3:].abs().max() == 0
    short = attention_rollout([maps_of(s, mask=mask)[:1, :, :3, :3] for s in (0, 1)])
    torch.testing.assert_close(rollout[:1, :3, :3], short)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: head_distance(maps_of(0), maps_of(0, tokens=6)), r"\(2, 3, 5, 5\).*\(2, 3, 6, 6\)"),
        (lambda: head_distance(maps_of(0), maps_of(1), torch.ones(2, 4)), r"mask has shape \(2, 4\)"),
        (lambda: head_distance(maps_of(0), maps_of(1), torch.zeros(2, 5)), "no valid token"),
        (lambda: head_distance(maps_of(0), -maps_of(1)), "negative numbers"),
        (lambda: attention_entropy(torch.ones(2, 5, 5)), r"expected \(B, H, T, T\)"),
        (lambda: sink_share(torch.zeros(1, 1, 3, 3)), "attends to no valid key"),
        (lambda: sink_share(maps_of(0), special=torch.ones(5)), r"special has shape \(5,\)"),
        (lambda: induction_score(maps_of(0), torch.ones(2, 6)), r"input_ids have shape \(2, 6\)"),
        (
            lambda: previous_token_score(maps_of(0, 1, tokens=4), torch.tensor([[1, 0, 1, 0]])),
            "no valid token stands right after",
        ),
        (lambda: head_distance(maps_of(0), maps_of(1).to("meta")), "student maps are on cpu, teacher maps on meta"),
        (
            lambda: attention_similarity([maps_of(0)], [maps_of(1).to("meta")]),
            "student maps are on cpu, teacher maps on meta",
        ),
        (lambda: attention_rollout([]), "no layers"),
        (lambda: attention_rollout(torch.ones(0, 2, 3, 5, 5)), "no layers"),
        (lambda: attention_rollout([maps_of(0)], residual=1), "residual is 1"),
        (lambda: attention_rollout([maps_of(0), maps_of(1, tokens=6)]), "different sequences"),
        (lambda: match_heads(torch.full((2, 2), torch.nan)), "finite matrix"),
        (lambda: match_heads(torch.zeros(2, 2), "best"), "'best' is unknown: choose 'optimal' or 'greedy'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
