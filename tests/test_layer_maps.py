"""Layer maps: literal pairs of every strategy, similarity maps against brute force, the matrix of weights, refusals."""

import doctest
import itertools
import math

import numpy as np
import pytest
import torch

from fakit import LayerMap, layer_maps

# strategy: {(student layers, teacher layers): the teacher layer of student layers 1, 2, …}
TEACHERS = {
    "uniform": {
        (3, 6): [2, 4, 6],
        (4, 12): [3, 6, 9, 12],
        (2, 6): [3, 6],
        (6, 6): [1, 2, 3, 4, 5, 6],
        (5, 7): [1, 3, 4, 6, 7],
    },
    "last": {
        (3, 6): [4, 5, 6],
        (4, 12): [9, 10, 11, 12],
        (2, 6): [5, 6],
        (6, 6): [1, 2, 3, 4, 5, 6],
        (5, 7): [3, 4, 5, 6, 7],
    },
    "first": {
        (3, 6): [1, 2, 3],
        (4, 12): [1, 2, 3, 4],
        (2, 6): [1, 2],
        (6, 6): [1, 2, 3, 4, 5, 6],
        (5, 7): [1, 2, 3, 4, 5],
    },
    "skip": {(3, 6): [2, 4], (4, 12): [3, 6, 9], (2, 6): [3], (6, 6): [1, 2, 3, 4, 5], (5, 7): [1, 3, 4, 6]},
    "reverse": {
        (3, 6): [6, 4, 2],
        (4, 12): [12, 9, 6, 3],
        (2, 6): [6, 3],
        (6, 6): [6, 5, 4, 3, 2, 1],
        (5, 7): [7, 6, 4, 3, 1],
    },
    "all_to_one": {(3, 6): [6] * 3, (4, 12): [12] * 4, (2, 6): [6] * 2, (6, 6): [6] * 6, (5, 7): [7] * 5},
}


@pytest.mark.parametrize(
    ("strategy", "depths", "teachers"),
    [(strategy, depths, teachers) for strategy, cases in TEACHERS.items() for depths, teachers in cases.items()],
)
def test_pairs_of_every_strategy(strategy, depths, teachers):
    layer_map = getattr(LayerMap, strategy)(*depths)
    assert layer_map.pairs == list(enumerate(teachers, 1))
    assert layer_map.name == strategy
    layer_map.check(*depths)


def test_uniform_rounds_halves_up_and_reaches_every_depth():
    assert [t for _, t in LayerMap.uniform(4, 6)] == [2, 3, 5, 6]  # 1.5 -> 2, 4.5 -> 5; round() would say 2, 4
    for S, T in itertools.product(range(1, 13), repeat=2):
        teachers = [t for _, t in LayerMap.uniform(S, T)]
        assert teachers[-1] == T and teachers == sorted(teachers) and teachers[0] >= 1
        assert all(t == max(1, math.floor(j * T / S + 0.5)) for j, t in enumerate(teachers, 1))


def test_all_to_one_on_a_layer_of_choice():
    assert LayerMap.all_to_one(3, 6, teacher_layer=4).pairs == [(1, 4), (2, 4), (3, 4)]
    assert LayerMap.all_to_one(2, 6, teacher_layer=0).pairs == [(1, 0), (2, 0)]
    with pytest.raises(ValueError, match="teacher layer 7 asked of a 6-layer teacher"):
        LayerMap.all_to_one(3, 6, teacher_layer=7)


def test_none_has_no_pairs_whatever_the_depths():
    assert LayerMap.none().pairs == LayerMap.none(3, 6).pairs == []
    assert len(LayerMap.none()) == 0 and LayerMap.none().weights(2, 3).tolist() == [[0.0] * 4] * 3


# -- random -----------------------------------------------------------------------------------------------------------


def test_random_is_seeded_rising_and_redrawn_by_epoch():
    layer_map = LayerMap.random(3, 12, seed=4)
    assert layer_map == LayerMap.random(3, 12, seed=4)
    assert len({tuple(LayerMap.random(3, 12, seed=seed).pairs) for seed in range(20)}) > 10
    epochs = [layer_map.for_epoch(epoch) for epoch in range(20)]
    assert len({tuple(drawn.pairs) for drawn in epochs}) > 10
    for drawn in epochs:
        assert [s for s, _ in drawn] == [1, 2, 3]
        teachers = [t for _, t in drawn]
        assert teachers == sorted(set(teachers)) and teachers[0] >= 1 and teachers[-1] <= 12
    assert {t for drawn in epochs for _, t in drawn} == set(range(1, 13))  # no layer is left out in the long run


def test_an_epochs_draw_does_not_depend_on_the_one_before():
    layer_map = LayerMap.random(2, 9, seed=1)
    assert layer_map.for_epoch(0) == layer_map
    for epoch in range(5):
        assert layer_map.for_epoch(7).for_epoch(epoch) == layer_map.for_epoch(epoch)
    assert LayerMap.uniform(3, 6).for_epoch(5) == LayerMap.uniform(3, 6)


# -- from_similarity --------------------------------------------------------------------------------------------------


def summed(matrix: np.ndarray, teachers) -> float:
    return sum(matrix[s, t] for s, t in enumerate(teachers, 1))


@pytest.mark.parametrize("depths", [(3, 6), (4, 8), (2, 6), (6, 6), (5, 7), (1, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_monotone_is_the_best_of_all_rising_maps(depths, seed):
    S, T = depths
    matrix = np.random.default_rng(seed).normal(size=(S + 1, T + 1))
    found = LayerMap.from_similarity(matrix)
    best = max(itertools.combinations(range(1, T + 1), S), key=lambda teachers: summed(matrix, teachers))
    assert found.pairs == list(enumerate(best, 1))
    assert found.is_monotone()


@pytest.mark.parametrize("depths", [(3, 6), (2, 6), (5, 5), (4, 7)])
@pytest.mark.parametrize("seed", range(4))
def test_assignment_is_the_best_of_all_maps_that_use_a_teacher_layer_once(depths, seed):
    S, T = depths
    matrix = np.random.default_rng(seed).normal(size=(S + 1, T + 1))
    found = LayerMap.from_similarity(torch.tensor(matrix), method="assignment")
    best = max(itertools.permutations(range(1, T + 1), S), key=lambda teachers: summed(matrix, teachers))
    assert found.pairs == list(enumerate(best, 1))


def test_from_similarity_ignores_the_embeddings_and_takes_lists():
    matrix = [[9.0, 9.0, 9.0], [9.0, 0.1, 0.2]]
    assert LayerMap.from_similarity(matrix).pairs == [(1, 2)]
    matrix[0] = [math.nan] * 3
    assert LayerMap.from_similarity(matrix).pairs == [(1, 2)]


def test_monotone_keeps_the_order_that_assignment_gives_up():
    matrix = np.zeros((3, 4))
    matrix[1, 3] = matrix[2, 1] = 1.0
    assert LayerMap.from_similarity(matrix, "assignment").pairs == [(1, 3), (2, 1)]
    assert LayerMap.from_similarity(matrix, "monotone").is_monotone()


@pytest.mark.parametrize(
    ("matrix", "method", "message"),
    [
        (np.ones(4), "monotone", r"wants a matrix \(S\+1\) × \(T\+1\).*found \(4,\)"),
        (np.ones((1, 4)), "monotone", r"found \(1, 4\)"),
        (np.ones((5, 4)), "monotone", "each of 4 student layers its own teacher layer, and the teacher has 3"),
        (np.ones((5, 4)), "assignment", "each of 4 student layers its own teacher layer, and the teacher has 3"),
        ([[1, 1, 1], [1, math.nan, 1]], "monotone", r"NaN or inf at \(student, teacher\) \[\(1, 1\)\]"),
        (np.ones((3, 4)), "greedy", "method 'greedy' is not known; choose 'monotone' or 'assignment'"),
    ],
)
def test_similarities_without_a_map_are_refused(matrix, method, message):
    with pytest.raises(ValueError, match=message):
        LayerMap.from_similarity(matrix, method)


# -- pairs and weights ------------------------------------------------------------------------------------------------


def test_pairs_are_sorted_with_their_weights():
    layer_map = LayerMap([(3, 6), (1, 2), (1, 1)], weights=[3, 1, 0.5])
    assert layer_map.pairs == [(1, 1), (1, 2), (3, 6)] and layer_map.pair_weights == [0.5, 1.0, 3.0]
    assert layer_map.student_layers == [1, 3] and layer_map.teacher_layers == [1, 2, 6]
    assert list(layer_map) == layer_map.pairs and len(layer_map) == 3


def test_the_matrix_of_weights():
    weights = LayerMap([(1, 2), (2, 4)], weights=[0.5, 2]).weights
    assert weights.shape == (3, 5) and weights[1, 2] == 0.5 and weights[2, 4] == 2 and weights.sum() == 2.5
    full = weights(3, 6)
    assert full.shape == (4, 7) and full[1, 2] == 0.5 and full[2, 4] == 2 and full.sum() == 2.5
    with pytest.raises(ValueError, match="reaches student layer 2 and teacher layer 4; asked for models of 1 and 6"):
        weights(1, 6)


def test_whole_numbers_of_numpy_are_layers_too():
    layer_map = LayerMap(np.array([[1, 2], [2, 4]]))
    assert layer_map == LayerMap([(1, 2), (2, 4)]) and all(type(i) is int for pair in layer_map for i in pair)


def test_is_monotone():
    assert LayerMap.uniform(3, 6).is_monotone() and LayerMap.all_to_one(3, 6).is_monotone()
    assert not LayerMap.reverse(3, 6).is_monotone() and not LayerMap([(1, 2), (1, 6), (2, 3)]).is_monotone()


@pytest.mark.parametrize(
    ("pairs", "weights", "message"),
    [
        ([(1, 2, 3)], None, r"pairs \(student layer, teacher layer\).*found \(1, 2, 3\)"),
        ([(1, -1)], None, r"whole numbers ≥ 0; found \(1, -1\)"),
        ([(1.0, 2)], None, r"whole numbers ≥ 0; found \(1\.0, 2\)"),
        ([(True, 2)], None, r"found \(True, 2\)"),
        ([(1, 2), (1, 2)], None, r"pairs given twice: \[\(1, 2\)\]"),
        ([(1, 2)], [1, 1], "1 pairs but 2 weights"),
        ([(1, 2)], [-1], "finite and ≥ 0 with a sum above 0"),
        ([(1, 2)], [math.nan], "finite and ≥ 0"),
        ([(1, 2)], [math.inf], "finite and ≥ 0"),
        ([(1, 2), (2, 3)], [0, 0], "sum above 0"),
    ],
)
def test_what_is_no_map_is_refused(pairs, weights, message):
    with pytest.raises(ValueError, match=message):
        LayerMap(pairs, weights)


@pytest.mark.parametrize("strategy", ["last", "first", "random"])
def test_strategies_with_a_teacher_layer_each_need_a_deep_enough_teacher(strategy):
    with pytest.raises(ValueError, match=r"4 student layers.* the teacher has 3; use LayerMap\.uniform"):
        getattr(LayerMap, strategy)(4, 3)


@pytest.mark.parametrize("depths", [(0, 6), (3, 0), (3.0, 6)])
def test_depths_are_whole_numbers_above_0(depths):
    with pytest.raises(ValueError, match="depths are whole numbers ≥ 1"):
        LayerMap.uniform(*depths)


def test_skip_of_one_layer_leaves_nothing():
    with pytest.raises(ValueError, match="skip leaves the last of 1 student layers out"):
        LayerMap.skip(1, 6)


@pytest.mark.parametrize(
    ("pairs", "asked"),
    [([(1, 7)], "layer 7 asked of a 6-layer teacher"), ([(4, 6)], "layer 4 asked of a 3-layer student")],
)
def test_check_names_the_layer_both_depths_and_a_map_that_fits(pairs, asked):
    with pytest.raises(
        ValueError, match=rf"{asked}.*student has layers 0…3, the teacher 0…6\. LayerMap\.uniform\(3, 6\) fits"
    ):
        LayerMap(pairs).check(3, 6)


def test_equality_hash_and_how_a_map_shows_itself():
    layer_map = LayerMap([(1, 2), (2, 4)])
    assert layer_map == LayerMap([(2, 4), (1, 2)], name="other") and hash(layer_map) == hash(LayerMap([(2, 4), (1, 2)]))
    assert layer_map != LayerMap([(1, 2), (2, 4)], weights=[1, 2]) and layer_map != [(1, 2), (2, 4)]
    assert layer_map._repr_markdown_() == "**custom**: S1 ← T2, S2 ← T4"
    assert str(layer_map) == "S1 ← T2, S2 ← T4" and str(LayerMap.none()) == "no layer is matched"
    assert repr(LayerMap([(1, 2), (2, 4)], weights=[1, 2])) == (
        "LayerMap([(1, 2), (2, 4)], weights=[1.0, 2.0], name='custom')"
    )


def test_docstring_examples_run():
    result = doctest.testmod(layer_maps)
    assert result.failed == 0 and result.attempted >= 1


# -- encoder-decoders: each stack by itself ----------------------------------------------------------------------------

STACKED = {  # two encoder layers and one decoder layer from 6 and 4; two of each from 12 and 2
    "uniform": {((2, 1), (6, 4)): [3, 6, 10], ((2, 2), (12, 2)): [6, 12, 13, 14]},
    "last": {((2, 1), (6, 4)): [5, 6, 10], ((2, 2), (12, 2)): [11, 12, 13, 14]},
    "first": {((2, 1), (6, 4)): [1, 2, 7], ((2, 2), (12, 2)): [1, 2, 13, 14]},
    "skip": {((2, 1), (6, 4)): [3, 6], ((2, 2), (12, 2)): [6, 12, 13]},
    "reverse": {((2, 1), (6, 4)): [6, 3, 10], ((2, 2), (12, 2)): [12, 6, 14, 13]},
    "all_to_one": {((2, 1), (6, 4)): [6, 6, 10], ((2, 2), (12, 2)): [12, 12, 14, 14]},
}


@pytest.mark.parametrize(
    ("strategy", "depths", "teachers"),
    [(strategy, depths, teachers) for strategy, cases in STACKED.items() for depths, teachers in cases.items()],
)
def test_each_stack_is_mapped_by_itself(strategy, depths, teachers):
    layer_map = getattr(LayerMap, strategy)(*map(list, depths))
    assert layer_map.pairs == list(enumerate(teachers, 1))
    layer_map.check(*depths)


def test_a_list_of_one_depth_is_that_depth():
    for strategy in TEACHERS:
        assert getattr(LayerMap, strategy)([3], [6]) == getattr(LayerMap, strategy)(3, 6)
    assert LayerMap.random([3], [9], seed=2) == LayerMap.random(3, 9, seed=2)


def test_random_draws_within_each_stack():
    layer_map = LayerMap.random([2, 1], [4, 3], seed=5)
    possible = layer_map.possible_pairs()
    assert possible == [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (2, 4), (3, 5), (3, 6), (3, 7)]
    drawn = [layer_map.for_epoch(epoch) for epoch in range(60)]
    assert {pair for each in drawn for pair in each} == set(possible)
    for each in drawn:
        each.check([2, 1], [4, 3])


def test_pairs_of_an_encoders_and_a_decoders_layer_are_refused():
    with pytest.raises(
        ValueError, match=r"pair \(2, 7\) .*student's encoder with the teacher's decoder.*\[2, 2\], \[6, 6\]\) fits"
    ):
        LayerMap([(1, 3), (2, 7)]).check([2, 2], [6, 6])
    LayerMap.uniform(4, 12).check([2, 2], [6, 6])  # where the stacks keep their proportion, it is the same map
    with pytest.raises(ValueError, match="student's decoder with the teacher's encoder"):
        LayerMap.uniform(3, 14).check([1, 2], [12, 2])
    LayerMap([(0, 0), (0, 3)]).check([2, 2], [6, 6])
    with pytest.raises(ValueError, match="decoder with the teacher's encoder"):
        LayerMap([(3, 0)]).check([2, 2], [6, 6])
    with pytest.raises(ValueError, match=r"the student has 1 stacks of layers .*the teacher 2"):
        LayerMap.uniform(2, [6, 6])
    with pytest.raises(
        ValueError, match=r"layer 15 asked of a 14-layer teacher.*LayerMap.uniform\(\[2, 2\], \[12, 2\]\) fits"
    ):
        LayerMap([(4, 15)]).check([2, 2], [12, 2])
    with pytest.raises(ValueError, match="4 student layers its own teacher layer, and the teacher has 2"):
        LayerMap.last([2, 4], [12, 2])
    with pytest.raises(ValueError, match="teacher layer 6 is of one stack"):
        LayerMap.all_to_one([2, 2], [6, 6], teacher_layer=6)
