"""Terms of texts, of what blocks add, of two layers together, of several teacher layers; and what projects them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fakit import Features, LayerMap, Objective, Trace, capture
from fakit.experiments.terms import build_further_term
from fakit.losses.features import LOSSES
from fakit.objective.earth_mover import EarthMover
from fakit.objective.feature_terms import KINDS, Dynamics, Flow, LayerAttention, Pooled, pooled
from fakit.objective.projections import MLP
from fakit.objective.units import Units
from fakit.training.token_counts import counts, shares
from tests.families import tiny
from tests.objective.states import EVERY, MASK, OURS, THEIRS, trace
from tests.scale.ranks import uneven
from tests.training.runs import cache_of, logged, make, parts

MAP = LayerMap([(0, 0), (1, 2), (2, 3)])


def value(term, layer_map: LayerMap | None = MAP, ours: Trace = OURS, theirs: Trace = THEIRS) -> dict:
    found = Objective(layer_map, terms={"it": term}).double()(ours, theirs)
    return {pair: number.item() for pair, number in found.per_layer["it"].items()}


# -- texts ------------------------------------------------------------------------------------------------------------


def vectors(side: Trace, layer: int, pool: str) -> Tensor:
    found = []
    for text, valid in zip(side.hidden_states[layer], MASK, strict=True):
        tokens = text[valid]
        found.append({"mean": sum(tokens) / len(tokens), "first": tokens[0], "last": tokens[-1]}[pool])
    return torch.stack(found)  # (B, d)


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
@pytest.mark.parametrize("loss", LOSSES)
def test_pooled_is_the_loss_of_one_vector_a_text(loss, pool):
    for (s, t), found in value(Pooled(loss, pool=pool)).items():
        ours, theirs = vectors(OURS, s, pool), vectors(THEIRS, t, pool)
        by_text = loss == "codir" or (loss not in ("nst", "similarity", "margin_ranking") and "rkd" not in loss)
        by_text = by_text and loss not in ("gram", "procrustes", "cka_loss")
        where = 1 if by_text else 0  # each by itself; or the texts as the tokens of one
        assert found == pytest.approx(LOSSES[loss](ours.unsqueeze(where), theirs.unsqueeze(where)).item(), rel=1e-12)


def test_prefixes_are_the_students_alone_for_relations_and_of_both_for_states():
    ours, theirs = vectors(OURS, 1, "mean"), vectors(THEIRS, 2, "mean")

    def cosines(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(x, dim=-1).T

    expected = [(cosines(ours[:, :p]) - cosines(theirs)).square().mean().item() for p in (2, 4, 6)]
    found = value(Pooled("similarity", prefixes=(2, 4, 6)), LayerMap([(1, 2)]))[1, 2]
    assert found == pytest.approx(sum(expected) / 3, rel=1e-12)
    expected = [1 - torch.cosine_similarity(ours[:, :p], theirs[:, :p]).mean().item() for p in (2, 5)]
    assert value(Pooled(prefixes=(2, 5)), LayerMap([(1, 2)]))[1, 2] == pytest.approx(sum(expected) / 2, rel=1e-12)
    with pytest.raises(ValueError, match=r"vectors have 6 dimensions, the teacher's 6; leave out prefixes above 6"):
        value(Pooled(prefixes=(2, 8)))
    for wrong in ({"prefixes": (0,)}, {"pool": "cls"}):
        with pytest.raises(ValueError, match=r"Pooled\((prefixes|pool)="):
            Pooled(**wrong)


def test_a_text_without_tokens_is_no_text():
    hidden, mask = torch.ones(2, 3, 4), torch.tensor([[True, True, False], [False, False, False]])
    for pool in ("mean", "first", "last"):
        assert pooled(hidden, mask, pool).tolist() == [[1.0] * 4, [0.0] * 4]
    ours, theirs = (Trace(hidden_states={1: x}, mask=mask) for x in (hidden, -hidden))
    assert value(Pooled("cosine"), LayerMap([(1, 1)]), ours, theirs)[1, 1] == pytest.approx(2.0)


# -- two layers, and several ------------------------------------------------------------------------------------------


def test_dynamics_compare_what_is_added_between_neighbors():
    found = value(Dynamics("cosine"))
    assert set(found) == {(1, 2), (2, 3)}  # each at its upper pair
    for (s, t), (below_s, below_t) in {(1, 2): (0, 0), (2, 3): (1, 2)}.items():
        ours = (OURS.hidden_states[s] - OURS.hidden_states[below_s])[MASK]
        theirs = (THEIRS.hidden_states[t] - THEIRS.hidden_states[below_t])[MASK]
        expected = 1 - torch.cosine_similarity(ours, theirs).mean().item()
        assert found[s, t] == pytest.approx(expected, rel=1e-12)
    for term in (Dynamics(), Flow()):
        with pytest.raises(
            ValueError, match=r"neighboring layers of the map, and .* has one pair: map two layers or more"
        ):
            value(term, LayerMap([(1, 1)]))


def test_neighbors_do_not_cross_from_encoder_to_decoder():
    ours, theirs = trace(6, 2, seed=1), trace(6, 3, seed=2)
    for side, encoder in ((ours, 1), (theirs, 2)):
        side.encoder_layers, side.decoder_mask = encoder, MASK
    with pytest.raises(ValueError, match="layers 1 and 2 of model are an encoder's and a decoder's"):
        value(Dynamics(), LayerMap([(1, 2), (2, 3)]), ours, theirs)


def test_flow_equals_textbrewer():
    """`fsp_loss([S, S.flip(-1)], [T, T.flip(1)], mask)` of TextBrewer 0.2.1.post1 (PyPI), run on these numbers."""

    def numbers(shift: int) -> Tensor:
        return ((7 * torch.arange(48, dtype=torch.float64) + shift) % 11 - 5).view(2, 4, 6) / 4

    mask, (ours, theirs) = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool(), (numbers(1), numbers(5))
    sides = Trace({0: ours, 1: ours.flip(-1)}, mask=mask), Trace({0: theirs, 2: theirs.flip(1)}, mask=mask)
    assert value(Flow(), LayerMap([(0, 0), (1, 2)]), *sides)[1, 2] == pytest.approx(0.36139292775848764, rel=1e-12)


def test_layer_attention_is_a_softmax_over_the_teachers_layers():
    found = value(LayerAttention(scale=0.3), EVERY)
    assert set(found) == {(1, 3), (2, 3)}  # each at its deepest teacher layer
    for s in (1, 2):
        errors = []
        for b, t in MASK.nonzero().tolist():
            state = OURS.hidden_states[s][b, t].numpy()
            layers = [THEIRS.hidden_states[i][b, t].numpy() for i in (1, 2, 3)]
            weights = [math.exp(0.3 * float(state @ layer)) for layer in layers]
            mixed = sum(w * layer for w, layer in zip(weights, layers, strict=True)) / sum(weights)
            errors.append(((state - mixed) ** 2).mean())
        assert found[s, 3] == pytest.approx(float(np.mean(errors)), rel=1e-12)
    one = value(LayerAttention(), LayerMap([(1, 2)]))
    assert one == value(Features("mse"), LayerMap([(1, 2)]))  # a single layer has all of the attention
    with pytest.raises(ValueError, match="need one width"):
        LayerAttention("gram")


# -- everywhere -------------------------------------------------------------------------------------------------------

TERMS = {
    "pooled": lambda: Pooled("cosine", prefixes=(8, 16), layer_map=MAP),
    "relations of texts": lambda: Pooled("similarity", pool="first", layer_map=MAP),
    "dynamics": lambda: Dynamics(layer_map=MAP),
    "flow": lambda: Flow(layer_map=MAP),
    "layer attention": lambda: LayerAttention(layer_map=EVERY),
    "mlp": lambda: Features("mse", projection="mlp", shared=True, layer_map=MAP),
    "orthogonal": lambda: Features("cosine", projection="orthogonal", layer_map=MAP),
}


@pytest.mark.parametrize("name", TERMS)
def test_it_trains_the_same_live_and_from_a_cache(name, tmp_path):
    runs = {}
    for how in ("live", "cached"):
        teacher, student, _ = parts()
        torch.manual_seed(0)
        made, more = Objective(terms={"it": TERMS[name]()}), {}
        if how == "cached":
            cache = cache_of(tmp_path / "cache", teacher, made)
            more = {"teacher_cache": cache}
        trainer = make(tmp_path / how, made=(teacher, student, made), extra=more)
        trainer.train()
        runs[how] = logged(trainer, "it")
    assert runs["cached"] == pytest.approx(runs["live"], rel=1e-4)
    assert len(runs["live"]) == 6 and runs["live"][-1] < runs["live"][0]


@pytest.mark.parametrize("name", ["pooled", "dynamics", "flow", "layer attention"])
def test_parts_of_a_batch_make_the_whole(name):
    torch.manual_seed(0)
    rows, made = uneven(causal=False, rows=8), Objective(terms={"it": TERMS[name]()}).prepare(16, 32).double()
    student, teacher = tiny("bert", seed=1, hidden_size=16, intermediate_size=24).double(), tiny("bert").double()

    def loss(part, share=None):
        batch = {key: torch.stack([row[key] for row in part]) for key in part[0]}
        sides = capture(student, batch, [0, 1, 2]), capture(teacher, batch, [0, 1, 2, 3])
        return made(*sides, None, share).terms["it"].item(), batch

    whole, _ = loss(rows)
    pieces = [rows[:3], rows[3:6], rows[6:]]
    found = shares([counts(made, loss(p)[1], causal=False, token_logits=False) for p in pieces], gather=lambda x: x)
    together = sum(loss(p, s)[0] for p, s in zip(pieces, found, strict=True)) / 3
    assert together == pytest.approx(whole, rel=1e-6)
    assert sum(loss(p)[0] for p in pieces) / 3 != pytest.approx(whole, rel=1e-5)


SHAPES = {
    "pooled": lambda pairs: Pooled("cosine", layer_map=pairs),
    "last of each text": lambda pairs: Pooled("rkd_distance", pool="last", layer_map=pairs),
    "dynamics": lambda pairs: Dynamics(layer_map=pairs),
    "flow": lambda pairs: Flow(layer_map=pairs),
    "layer attention": lambda pairs: LayerAttention(layer_map=pairs),
    "earth mover": lambda pairs: EarthMover(layer_map=pairs, cost_attention=False),
    "units": lambda pairs: Units(layer_map=pairs),
}


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    width=st.integers(2, 8),
    teacher_width=st.integers(8, 11),
    seed=st.integers(0, 2**31),
)
def test_any_shape_is_what_it_is_without_its_padding(name, lengths, width, teacher_width, seed):
    """A text of one token among them; what stands in padding is NaN."""
    generator = torch.Generator().manual_seed(seed)
    every = LayerMap.every(2, 2) if name in ("layer attention", "earth mover") else LayerMap([(1, 1), (2, 2)])

    def objective() -> Objective:
        torch.manual_seed(seed)
        made = Objective(terms={"it": SHAPES[name](every)}).prepare(width, teacher_width).double()
        for layer in (1, 2) if name == "units" else ():
            made.projections[f"units_T{layer}"].scores.copy_(torch.linspace(1, 2, teacher_width).roll(3 * layer))
            made.projections[f"units_T{layer}"].tokens.fill_(1)
        return made

    def side(d: int) -> list[Tensor]:
        return [torch.randn(2, n, d, generator=generator, dtype=torch.float64) for n in lengths]  # (layers, n, d)

    def loss(sides: list[list[Tensor]], longest: int) -> tuple[float, Tensor]:
        mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
        leaf = sides[0][-1].clone().requires_grad_()
        rows = [
            [torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1]), value=torch.nan) for x in own]
            for own in ([*sides[0][:-1], leaf], sides[1])
        ]
        states = [torch.stack(own, 1) for own in rows]  # (layers, B, T, d)
        traces = [Trace(hidden_states=dict(enumerate(of, 1)), mask=mask) for of in states]
        found = objective()(*traces).total
        (gradient,) = torch.autograd.grad(found, leaf)
        return found.item(), gradient

    sides = [side(width), side(teacher_width)]
    tight, wide = loss(sides, max(lengths)), loss(sides, max(lengths) + 4)
    assert math.isfinite(tight[0]) and tight[1].isfinite().all()
    assert wide[0] == pytest.approx(tight[0], rel=1e-10, abs=1e-14)
    torch.testing.assert_close(wide[1], tight[1], rtol=1e-8, atol=1e-12)


def test_a_file_names_them():
    def build(**given):
        return build_further_term("it", given, lambda pairs: LayerMap(pairs))

    assert set(KINDS) == {"pooled", "dynamics", "flow", "layer_attention", "earth_mover", "lens", "units"}
    term = build(kind="pooled", loss="margin_ranking", margin=0.1, prefixes=[8, 16], pool="last", weight=20.0)
    assert isinstance(term, Pooled) and term.prefixes == (8, 16) and term.parameters == {"margin": 0.1}
    assert build(kind="dynamics", layer_map=[[0, 0], [1, 2]]).layer_map == LayerMap([(0, 0), (1, 2)])
    assert isinstance(build(kind="flow"), Flow) and build(kind="layer_attention", scale=0.5).scale == 0.5
    features = build(kind="features", projection="orthogonal", shared=True, at_equal_width=True)
    assert (features.projection, features.shared, features.at_equal_width) == ("orthogonal", True, True)
    with pytest.raises(ValueError, match="is not one of features, attention, outputs, pooled, dynamics"):
        build(kind="poled")
    with pytest.raises(ValueError, match=r"terms\.it: .*no parameter 'colour'"):
        build(kind="flow", colour=1)


# -- projections ------------------------------------------------------------------------------------------------------


def narrow() -> Trace:
    return trace(4, 2, seed=1)


def plain(side: Trace) -> Trace:
    return Trace({i: x.nan_to_num(nan=7.0) for i, x in side.hidden_states.items()}, mask=side.mask)


def test_kinds_of_projections_and_their_parameters():
    def sizes(*widths: int, **settings) -> dict[str, int]:
        return Objective(MAP, Features("mse", **settings)).prepare(*widths).projection_parameters

    assert sizes(4, 6) == dict.fromkeys(["S0_T0", "S1_T2", "S2_T3"], 24)
    assert sizes(4, 6, shared=True) == {"features_all": 24}
    assert sizes(4, 6, shared=True, projection="mlp") == {"features_all": 24 + 6 + 36 + 6}
    assert sizes(6, 6) == {} and sizes(6, 6, at_equal_width=True, shared=True) == {"features_all": 36}
    with pytest.raises(ValueError, match="never has a projection"):
        Features("gram", at_equal_width=True)
    with pytest.raises(ValueError, match="choose one of 'linear', 'orthogonal', 'mlp', or None"):
        Features("mse", projection="quadratic")


@pytest.mark.parametrize(("widths"), [(4, 6), (6, 4), (5, 5)])
def test_an_orthogonal_projection_stays_orthonormal_while_it_trains(widths):
    torch.manual_seed(0)
    made = Objective(LayerMap([(1, 1)]), Features("mse", projection="orthogonal", at_equal_width=True)).prepare(*widths)
    projection, optimizer = made.projections["S1_T1"], torch.optim.Adam(made.parameters(), lr=0.1)
    ours, theirs = (Trace({1: torch.randn(3, 4, width)}, mask=MASK) for width in widths)
    losses = []
    for _ in range(20):
        loss = made(ours, theirs).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = projection.weight  # (d_T, d_S)
    small = weight.T @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.T
    torch.testing.assert_close(small, torch.eye(min(widths)), atol=1e-5, rtol=0)
    assert losses[-1] < losses[0]


def test_projections_start_at_least_squares():
    ours, theirs = plain(narrow()), plain(THEIRS)
    made = Objective(MAP, Features("mse"), terms={"turned": Features("mse", projection="orthogonal")}).prepare(4, 6)
    made = made.double()
    halves = [
        (Trace({i: x[rows] for i, x in side.hidden_states.items()}, mask=MASK[rows]))
        for side in (ours, theirs)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    rest = made.fit_projections(halves[:2], halves[2:])
    for s, t in MAP.pairs:
        x, y = ours.hidden_states[s][MASK].numpy(), theirs.hidden_states[t][MASK].numpy()
        best, *_ = np.linalg.lstsq(x, y, rcond=None)
        np.testing.assert_allclose(
            made.projections[f"S{s}_T{t}"].weight.detach().numpy().T, best, rtol=1e-8, atol=1e-10
        )
        left, _, right = np.linalg.svd(x.T @ y, full_matrices=False)
        turned = made.projections[f"turned_S{s}_T{t}"].weight.detach().numpy().T
        np.testing.assert_allclose(turned, left @ right, rtol=1e-6, atol=1e-8)
        for name, solution in ((f"S{s}_T{t}", best), (f"turned_S{s}_T{t}", left @ right)):
            expected = float(((x @ solution - y) ** 2).sum() / (y**2).sum())
            assert rest[name] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    loss = made(ours, theirs).total
    loss.backward()
    assert made.projections["S1_T2"].weight.grad.abs().max() < 1e-10  # it is the minimum
    again = Objective(MAP, Features("mse"), terms={"turned": Features("mse", projection="orthogonal")}).prepare(4, 6)
    again = again.double()
    again.load_state_dict(made.state_dict())
    assert again(ours, theirs).total.item() == pytest.approx(loss.item(), rel=1e-9)


def test_what_has_no_least_squares_solution_says_so():
    ours, theirs = plain(narrow()), plain(THEIRS)
    made = Objective(MAP, Features("mse", projection="mlp")).prepare(4, 6).double()
    assert isinstance(made.projections["S0_T0"], MLP)
    with pytest.raises(ValueError, match="projection S0_T0 is a MLP, which has no least-squares solution"):
        made.fit_projections([ours], [theirs])
    with pytest.raises(ValueError, match="no projections to fit"):
        Objective(MAP, Features("gram")).fit_projections([ours], [theirs])


@pytest.mark.parametrize("name", TERMS)
def test_nan_in_padding_reaches_no_gradient(name):
    """The hidden states here are NaN there."""
    made = Objective(terms={"it": TERMS[name]()}).prepare(16, 32).double()
    ours, theirs = trace(16, 2, seed=1), trace(32, 3, seed=2)
    for hidden in ours.hidden_states.values():
        hidden.requires_grad_()
    made(ours, theirs).total.backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())
    gradients = [hidden.grad for hidden in ours.hidden_states.values() if hidden.grad is not None]
    assert len(gradients) >= 2 and all(g.isfinite().all() and (g[~MASK] == 0).all() for g in gradients)
