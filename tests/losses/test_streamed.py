"""The streamed attention loss equals the plain one over full maps, in value and in gradient, without storing a map."""

import pytest
import torch

from fakit.losses.attention import group_mean, map_kl, map_mse, score_mse
from fakit.losses.fused import streamed
from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.losses.fused.blocks import use_blocks
from fakit.losses.fused.streamed import streamed_loss, streamed_map_kl


def inputs(B=2, H=4, H_kv=4, T=13, d_student=5, d_teacher=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(heads, d):
        return torch.randn(B, heads, T, d, generator=generator, dtype=torch.float64).to(dtype)

    return draw(H, d_student), draw(H_kv, d_student), draw(H, d_teacher), draw(H, d_teacher)


def plain(sq, sk, tq, tk, mask, student_scale, teacher_scale, causal):
    maps = []
    for q, k, scale in ((sq, sk, student_scale), (tq, tk, teacher_scale)):
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-2, -1) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -1e30)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -1e30)
        maps.append(scores.softmax(-1))
    return map_kl(*maps, mask)


MASK = torch.ones(2, 13, dtype=torch.bool)
MASK[0, 9:] = False
MASK[1, :3] = False


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("block", [1, 500, 2**20])
def test_value_and_gradient_equal_the_plain_loss(dtype, tolerance, causal, mask, heads, block):
    sq, sk, tq, tk = inputs(H_kv=heads, dtype=dtype)
    values, gradients = [], []
    for function in (plain, streamed_map_kl):
        q, k = sq.clone().requires_grad_(), sk.clone().requires_grad_()
        with use_blocks(attention=block):
            loss = function(q, k, tq, tk, mask, 0.4, 0.3, causal)
        (3 * loss).backward()
        values.append(loss.detach())
        gradients += [q.grad, k.grad]
    torch.testing.assert_close(values[1], values[0], rtol=tolerance, atol=0)
    scale = gradients[0].abs().max().item()
    for found, expected in ((gradients[2], gradients[0]), (gradients[3], gradients[1])):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def test_zero_at_equality_and_gradcheck():
    sq, sk, _, _ = inputs()
    assert streamed_map_kl(sq, sk, sq, sk, MASK, 0.5, 0.5).item() == 0.0
    sq, sk, tq, tk = inputs(B=1, H=2, H_kv=1, T=4)
    tk = tk[:, :1]
    arguments = (sq.requires_grad_(), sk.requires_grad_(), tq, tk, MASK[:1, :4], 0.4, 0.3, True)
    assert torch.autograd.gradcheck(streamed_map_kl, arguments)


@pytest.mark.parametrize("heads", [None, 1], ids=["head by head", "group mean"])
@pytest.mark.parametrize("student, teacher", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("loss", ["kl", "score_mse"])
def test_where_one_side_masks_what_the_other_sees(loss, student, teacher, heads):
    """A causal or windowed student of a teacher that sees all:
    what the teacher gives to hidden keys pulls at nothing.
    """
    sq, sk, tq, tk = inputs(B=1, H=2, H_kv=2, T=5)

    def value(q, k):
        sides = AttentionInputs(q, k, None, None, 0.4, student), AttentionInputs(tq, tk, None, None, 0.3, teacher)
        return streamed_loss(loss, *sides, None, heads)

    assert torch.autograd.gradcheck(value, (sq.requires_grad_(), sk.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["kl", "mse", "score_mse"])
def test_autocast_does_not_reach_it(loss, dtype):
    sq, sk, tq, tk = (40 * x for x in inputs(dtype=torch.float32))
    sides = [AttentionInputs(q, k, None, None, 0.4, False) for q, k in ((sq.requires_grad_(), sk), (tq, tk))]
    expected = streamed_loss(loss, *sides, MASK)
    (slope,) = torch.autograd.grad(expected, sq)
    costs, maps = streamed.head_costs(loss, *sides, MASK), sides[0].maps()
    with torch.autocast("cpu", dtype=dtype):
        found = streamed_loss(loss, *sides, MASK)
        assert torch.equal(streamed.head_costs(loss, *sides, MASK), costs)
        assert torch.equal(sides[0].maps(), maps)
    assert torch.equal(found, expected) and torch.equal(torch.autograd.grad(found, sq)[0], slope)


def test_padding_has_no_effect_not_even_nan():
    sq, sk, tq, tk = inputs()
    expected = streamed_map_kl(sq, sk, tq, tk, MASK)
    noise = ~MASK[:, None, :, None]
    found = streamed_map_kl(*(x.masked_fill(noise, float("nan")) for x in (sq, sk, tq, tk)), MASK)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_half_precision_inputs_are_compared_in_float32():
    arguments = [x.to(torch.bfloat16) for x in inputs()]
    found = streamed_map_kl(*arguments, MASK)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, streamed_map_kl(*(x.float() for x in arguments), MASK), rtol=1e-6, atol=0)


def test_shapes_that_do_not_fit_are_refused_with_both_sides():
    sq, sk, tq, tk = inputs()
    with pytest.raises(ValueError, match=r"student has \(2, 4, 13, 5\).*teacher \(2, 3, 13, 7\).*group-mean"):
        streamed_map_kl(sq, sk, tq[:, :3], tk[:, :3])
    with pytest.raises(ValueError, match="no valid position"):
        streamed_map_kl(sq, sk, tq, tk, torch.zeros(2, 13, dtype=torch.bool))


# -- everything a layer may do to its scores --------------------------------------------------------------------------

T = 13
WINDOW = (torch.arange(T)[:, None] - torch.arange(T)).abs() < 4
PAST = torch.ones(T, T, dtype=torch.bool).tril()


def layer(heads=4, kv_heads=None, d=5, seed=0, dtype=torch.float64, **settings) -> AttentionInputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    made = {name: draw(*shape) for name, shape in settings.items() if isinstance(shape, tuple)}
    plain_settings = {name: value for name, value in settings.items() if name not in made}
    query, key, value = draw(2, heads, T, d), draw(2, kv_heads or heads, T, d), draw(2, kv_heads or heads, T, d)
    return AttentionInputs(
        query, key, value, **({"mask": None, "scaling": 0.4, "causal": False} | made | plain_settings)
    )


SETTINGS = {
    "plain": {},
    "causal": {"causal": True},
    "grouped keys": {"kv_heads": 2},
    "soft cap": {"softcap": 1.5},
    "position bias": {"position_bias": (1, 4, T, T)},
    "bias in the mask": {"mask": (2, 4, T, T)},
    "bool window": {"mask": WINDOW[None, None]},
    "float window": {
        "mask": torch.zeros(T, T).masked_fill(~(WINDOW & PAST), torch.finfo(torch.float32).min)[None, None]
    },
    "padding as flash has it": {"mask": MASK},
    "padding, causal, capped": {"mask": MASK, "causal": True, "softcap": 2.0, "position_bias": (2, 4, T, T)},
    "sinks": {"sinks": (4,), "causal": True},
}


def plain_loss(loss, student, teacher, mask, heads):
    """The same over maps in full: padding out of the softmax, pairs that both sides mask out of the mean; of scores
    those that either masks.
    """
    tokens = torch.ones(2, T, dtype=torch.bool) if mask is None else mask
    if loss == "score_mse":
        scores = [side.scores().clamp_min(-1e30) for side in (student, teacher)]
        pairs = tokens[:, None, :, None] & tokens[:, None, None, :]
        for side in (student, teacher):
            pairs = pairs if side.allowed() is None else pairs & side.allowed().any(1, keepdim=True)
        return score_mse(*(scores if heads is None else [group_mean(s, heads) for s in scores]), pairs)
    maps = []
    for side in (student, teacher):
        scores = side.scores().masked_fill(~tokens[:, None, None, :], torch.finfo(side.query.dtype).min)
        if loss == "mse" and side.sinks is not None:
            sinks = side.sinks[:, None, None].expand(*scores.shape[:3], 1)
            maps.append(torch.cat([scores, sinks], -1).softmax(-1)[..., :-1])
        else:
            maps.append(scores.softmax(-1))
    if heads is not None:
        maps = [group_mean(m, heads) for m in maps]
    pairs = tokens[:, None, :, None] & tokens[:, None, None, :]
    allowed = [side.allowed() for side in (student, teacher)]
    if loss == "mse" and None not in allowed:
        pairs = pairs & (allowed[0] | allowed[1]).any(1, keepdim=True)
    return {"kl": map_kl, "mse": map_mse}[loss](*maps, pairs)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("loss", ["kl", "mse", "score_mse"])
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("block", [300, 2**20])
def test_what_a_layer_does_to_its_scores_is_honored(name, loss, heads, mask, block):
    if name.startswith("padding") and mask is None:
        mask = MASK
    student, teacher = layer(**SETTINGS[name]), layer(seed=1, d=7, **SETTINGS[name])
    learned = [
        x for x in vars(student).values() if isinstance(x, torch.Tensor) and x.requires_grad and x is not student.value
    ]
    with use_blocks(attention=block):
        found = streamed_loss(loss, student, teacher, mask, heads)
        same = streamed_loss(loss, student, student, mask, heads)
    expected = plain_loss(loss, student, teacher.detach(), mask, heads)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(2 * x, learned, allow_unused=True) for x in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        if ours is None:  # sinks take no part in the KL over keys, nor in scores
            assert theirs is None or theirs.abs().max() < 1e-12
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * theirs.abs().max().item())
    assert all(x.grad is None for x in vars(teacher).values() if isinstance(x, torch.Tensor) and x.is_leaf)
    assert same.item() == pytest.approx(0.0, abs=1e-15)


def test_float32_equals_the_plain_loss_to_its_precision():
    student, teacher = layer(dtype=torch.float32, softcap=1.5), layer(seed=1, dtype=torch.float32)
    for loss in ("kl", "mse", "score_mse"):
        found, expected = (
            streamed_loss(loss, student, teacher, MASK),
            plain_loss(loss, student, teacher.detach(), MASK, None),
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        for ours, theirs in zip(
            *(torch.autograd.grad(x, [student.query, student.key]) for x in (found, expected)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_heads_that_no_group_mean_can_make_equal_are_refused_with_both_counts():
    with pytest.raises(ValueError, match=r"2 divides not both 4 \(student\) and 3 \(teacher\)"):
        streamed_loss("kl", layer(4), layer(3), heads=2)
    with pytest.raises(ValueError, match="one B, H and T on both sides"):
        streamed_loss("kl", layer(4), layer(2))


# -- which head with which --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["kl", "mse", "score_mse"])
def test_head_costs_are_the_losses_of_single_heads(loss):
    student, teacher = layer(4, kv_heads=2), layer(3, seed=1)
    costs = streamed.head_costs(loss, student, teacher, MASK)
    for h in range(4):
        for g in range(3):
            one = [side.select_heads(torch.tensor([i])) for side, i in ((student, h), (teacher, g))]
            expected = streamed_loss(loss, *one, MASK)
            if loss != "kl":  # the cost counts queries, the loss pairs
                expected = expected * (MASK.sum(1).square().sum().double() / MASK.sum())
            torch.testing.assert_close(costs[h, g], expected.detach(), rtol=1e-9, atol=0)


def test_matching_finds_heads_in_another_order_and_uses_each_teacher_head_before_any_twice():
    teacher = layer(4, kv_heads=2)
    order = torch.tensor([2, 0, 3, 1])
    student = teacher.select_heads(order)
    assert streamed.match_heads(streamed.head_costs("kl", student, teacher)).tolist() == order.tolist()
    assert streamed.match_heads(torch.tensor([[0.1, 0.2, 5.0], [0.0, 0.3, 4.0]])).tolist() == [1, 0]
    crowded = streamed.match_heads(torch.rand(5, 2, generator=torch.Generator().manual_seed(0)))
    assert sorted(crowded.bincount(minlength=2).tolist()) == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_scores_are_compared_to_their_last_digit(dtype):
    """1e4 on both sides, and different by 3: a sum of squares apart from a product would have lost it."""
    query, key = torch.full((1, 2, 4, 1), 100.0, dtype=dtype), torch.full((1, 2, 4, 1), 100.0, dtype=dtype)
    student, teacher = (AttentionInputs(query.clone(), key, None, None, s, True) for s in (1.0, 1.0003))
    student.query.requires_grad_()
    found = streamed_loss("score_mse", student, teacher)
    found.backward()
    assert found.dtype == torch.float32 and found.item() == pytest.approx(9, rel=1e-3)
    assert student.query.grad.isfinite().all() and (student.query.grad != 0).all()
    costs = streamed.head_costs("score_mse", student, teacher)  # a query's, whose keys are 1, 2, 3 and 4
    torch.testing.assert_close(costs, torch.full((2, 2), 9 * 2.5), rtol=1e-3, atol=0)


# -- relations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["queries", "keys", "values"])
@pytest.mark.parametrize("causal", [False, True])
def test_relations_are_minilmv2s_over_heads_split_anew(which, causal):
    student, teacher = layer(4, d=6, causal=causal), layer(2, d=9, seed=1, mask=MASK, causal=causal)
    heads = streamed.relation_heads(student, teacher, [which])
    assert heads == 3  # 24 and 18 wide: the largest divisor of both up to the student's 4 heads
    sides = [streamed.relation_inputs(side, which, heads) for side in (student, teacher)]
    maps = []
    for side in (student, teacher):
        x = {"queries": side.query, "keys": side.key, "values": side.value}[which].detach()
        x = x.transpose(1, 2).reshape(2, T, -1)  # (B, T, H d)
        x = torch.stack(x.chunk(heads, dim=-1), dim=1)  # (B, R, T, d_r)
        scores = x @ x.mT / x.shape[-1] ** 0.5
        maps.append(scores.masked_fill(~PAST, -1e30).softmax(-1) if causal else scores.softmax(-1))
    torch.testing.assert_close(streamed_loss("kl", *sides, MASK).detach(), map_kl(*maps, MASK), rtol=1e-9, atol=0)


def test_relation_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"5 relation heads asked of queries that are 24 wide \(4 heads × 6\)"):
        streamed.relation_inputs(layer(4, d=6), "queries", 5)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -torch.inf], ids=["lowest float", "-inf"])
def test_a_query_that_an_additive_mask_shuts_out_of_everything(lowest):
    """Left padding under an additive mask: the padded queries see no key at all, and are no part of the loss."""
    sq, sk, tq, tk = inputs(dtype=torch.float32)
    seen = MASK[:, None, None, :] & torch.ones(13, 13, dtype=torch.bool).tril()  # (B, 1, T, T)
    additive = torch.zeros(seen.shape).masked_fill(~seen, lowest)
    q = sq.clone().requires_grad_()
    ours, theirs = (
        AttentionInputs(q, sk, None, additive, 0.4, False),
        AttentionInputs(tq, tk, None, additive, 0.3, False),
    )
    loss = streamed_loss("kl", ours, theirs, MASK)
    loss.backward()
    torch.testing.assert_close(loss.detach(), plain(sq, sk, tq, tk, MASK, 0.4, 0.3, True), rtol=1e-5, atol=0)
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("student, teacher", [(torch.float32, torch.float64), (torch.bfloat16, torch.float64)])
@pytest.mark.parametrize("swap", [False, True], ids=["", "the other way round"])
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("loss", ["kl", "mse", "score_mse"])
def test_two_dtypes_are_compared_in_the_finer_one(loss, heads, swap, student, teacher):
    student, teacher = (teacher, student) if swap else (student, teacher)
    ours, theirs = layer(dtype=student), layer(seed=1, d=7, dtype=teacher)
    found = streamed_loss(loss, ours, theirs, MASK, heads)
    found.backward()
    assert found.dtype == torch.float64 and ours.query.grad.dtype == student
    in_full = [layer(dtype=torch.float64), layer(seed=1, d=7, dtype=torch.float64)]
    with torch.no_grad():
        for coarse, fine in zip((ours, theirs), in_full, strict=True):
            fine.query.copy_(coarse.query), fine.key.copy_(coarse.key)
    exact = streamed_loss(loss, *in_full, MASK, heads)
    exact.backward()
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.query.grad, in_full[0].query.grad.to(student), rtol=1e-2, atol=1e-9)
    assert streamed.head_costs(loss, ours, theirs, MASK).dtype == torch.float64
