"""The mapping board without a browser: what it holds, what it says, and what it refuses."""

import doctest
from xml.etree import ElementTree

import numpy as np
import pytest

from fakit import LayerMap
from fakit.widgets import mapping_board, strategies
from fakit.widgets.mapping import cost as mapping_cost
from fakit.widgets.mapping import notes as mapping_notes
from fakit.widgets.mapping.notes import map_notes
from fakit.widgets.panel import WIDGET

# S1 is most like T2 and S2 like T1: the best assignment is not in the order of depth, the monotone map has to be
CKA = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.2, 0.9, 0.3], [0.0, 0.8, 0.1, 0.4]])
UNIFORM = LayerMap.uniform(3, 6)


def ask(board, what, **arguments):
    """What the page sends when a person does something."""
    board._handle_custom_msg({"ask": what, **arguments}, [])


# --- the map
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_a_preset_is_the_strategy_of_that_name(name):
    board = mapping_board(3, 6, start=name)
    assert board.layer_map == getattr(LayerMap, name)(3, 6) and board.layer_map.name == name
    assert board.pairs == board.layer_map.pairs and board.view["preset"] == name
    other = mapping_board(3, 6)
    ask(other, "choose", preset=name)
    assert other.layer_map == board.layer_map and other.layer_map.is_random == (name == "random")


def test_similarity_adds_its_two_maps():
    board = mapping_board(2, 3, CKA, start="similarity (assignment)")
    assert board.layer_map.pairs == [(1, 2), (2, 1)]
    assert "mean similarity 0.85" in board.view["sentence"]
    ask(board, "choose", preset="similarity (monotone)")
    assert board.layer_map.pairs == [(1, 2), (2, 3)]
    assert "mean similarity 0.65" in board.view["sentence"]
    assert board.setup["similarity"] == CKA.tolist()


def test_a_layer_that_was_not_measured_takes_no_part_in_the_mean_and_makes_no_map():
    matrix = CKA.copy()
    matrix[1, 3] = np.nan
    board = mapping_board(2, 3, matrix, start=LayerMap([(1, 2), (1, 3), (2, 1)]))
    assert "mean similarity 0.85" in board.view["sentence"]
    assert board.setup["similarity"][1][3] is None  # JSON has no NaN
    assert "similarity (monotone)" not in board.setup["presets"]
    assert "holds NaN" in board.setup["refused"]


def test_a_negative_similarity_is_a_measured_one():
    matrix = CKA - 0.5  # debiased CKA may fall below 0
    board = mapping_board(2, 3, matrix, start=LayerMap([(1, 1), (2, 2)]))
    assert board.setup["similarity"] == matrix.round(3).tolist()
    assert "mean similarity -0.35" in board.view["sentence"]
    assert "-0.40" in board.figure.svg()


def test_pairs_of_which_none_was_measured_have_no_mean(recwarn):
    board = mapping_board(2, 3, np.full((3, 4), np.nan))
    assert board.view["sentence"].endswith("; similarity not measured.")
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_all_to_one_has_a_layer_to_choose():
    board = mapping_board(3, 6)
    ask(board, "choose", preset="all_to_one", teacher_layer=4)
    assert board.pairs == [(1, 4), (2, 4), (3, 4)] and board.view["preset"] == "all_to_one"
    ask(board, "choose", preset="all_to_one")
    assert board.pairs == [(1, 6), (2, 6), (3, 6)]


def test_toggling_connects_and_disconnects_and_a_preset_is_recognized():
    board = mapping_board(3, 6)
    ask(board, "toggle", student_layer=2, teacher_layer=5)
    assert board.pairs == [(1, 2), (2, 4), (2, 5), (3, 6)] and board.view["preset"] == ""
    assert board.layer_map.name == "custom"
    ask(board, "toggle", student_layer=2, teacher_layer=5)
    assert board.layer_map == UNIFORM and board.layer_map.name == "uniform" and board.view["preset"] == "uniform"


def test_unlinking_takes_a_layers_pairs_or_one_pair():
    board = mapping_board(3, 6, start="all_to_one")
    ask(board, "unlink", student_layer=1, teacher_layer=6)
    assert board.pairs == [(2, 6), (3, 6)]
    ask(board, "unlink", student_layer=2)
    assert board.pairs == [(3, 6)]
    ask(board, "unlink", teacher_layer=5)
    assert board.pairs == [(3, 6)]
    ask(board, "unlink", teacher_layer=6)
    assert board.pairs == [] and board.layer_map.name == "none"


def test_undo_goes_back_change_by_change_and_no_further():
    board = mapping_board(3, 6)
    assert not board.view["undo"]
    ask(board, "undo")
    ask(board, "toggle", student_layer=1, teacher_layer=1)
    ask(board, "unlink", student_layer=3)
    ask(board, "unlink", student_layer=3)  # nothing there: nothing to undo
    board.pairs = [(1, 3)]
    ask(board, "choose", preset="last")
    seen = []
    while board.view["undo"]:
        ask(board, "undo")
        seen.append(board.pairs)
    assert seen == [[(1, 3)], [(1, 1), (1, 2), (2, 4)], [(1, 1), (1, 2), (2, 4), (3, 6)], UNIFORM.pairs]


def test_the_map_is_set_from_python_with_its_name_and_its_weights():
    board = mapping_board(3, 6)
    board.layer_map = LayerMap([(1, 2), (3, 6)], weights=[1, 3], name="mine")
    assert board.pairs == [(1, 2), (3, 6)] and board.layer_map.name == "mine" and "mine: " in board.view["sentence"]
    board.toggle(2, 4)
    assert board.layer_map == LayerMap([(1, 2), (2, 4), (3, 6)], weights=[1, 1, 3])


def test_observers_of_pairs_see_the_map_that_is_shown():
    board, seen = mapping_board(3, 6), []
    board.observe(lambda change: seen.append((change["new"], board.layer_map.pairs, board.view["preset"])), "pairs")
    ask(board, "choose", preset="first")
    board.layer_map = LayerMap([(1, 6)])
    board.pairs = [[2, 2], [1, 1]]
    first = [(1, 1), (2, 2), (3, 3)]
    assert seen == [(first, first, "first"), ([(1, 6)], [(1, 6)], ""), ([(1, 1), (2, 2)], [(1, 1), (2, 2)], "")]


def test_a_page_gets_pairs_and_what_follows_from_them_in_one_message():
    board, sent = mapping_board(3, 6), []
    board._send = lambda message, buffers=None: sent.append(message)
    ask(board, "choose", preset="last")
    (update,) = [message["state"] for message in sent if message["method"] == "update"]
    assert update["pairs"] == [(1, 4), (2, 5), (3, 6)] and update["view"]["preset"] == "last"


def set_and_keep(board):
    mine = LayerMap.uniform(3, 6)
    board.layer_map = mine
    return mine.pairs


LISTS = {  # ways to get at a list of the board's, or at one that was given to it
    "pairs": lambda board: board.pairs,
    "layer map": lambda board: board.layer_map.pairs,
    "weights": lambda board: board.layer_map.pair_weights,
    "preset": lambda board: board.maps["uniform"].pairs,
    "a map that was set": set_and_keep,
}


@pytest.mark.parametrize("of", LISTS.values(), ids=LISTS)
def test_editing_a_list_in_place_changes_nothing_on_the_board(of):
    board = mapping_board(3, 6)
    of(board).append((3, 1))
    assert board.pairs == board.layer_map.pairs == board.maps["uniform"].pairs == UNIFORM.pairs
    ask(board, "toggle", student_layer=2, teacher_layer=5)
    assert board.pairs == [(1, 2), (2, 4), (2, 5), (3, 6)] and not board.view["refusal"]
    ask(board, "choose", preset="uniform")
    assert board.layer_map == UNIFORM and board.view["preset"] == "uniform"


def test_the_map_that_a_board_starts_with_and_the_list_an_observer_gets_are_theirs():
    mine, matrix = LayerMap([(1, 2), (3, 6)]), np.full((4, 7), 0.5)
    board = mapping_board(3, 6, matrix, start=mine)
    mine.pairs.pop()
    matrix[:] = 0
    assert board.pairs == [(1, 2), (3, 6)] and "mean similarity 0.50" in board.sentence
    board.observe(lambda change: change["new"].clear(), "pairs")
    board.toggle(2, 4)
    assert board.pairs == board.layer_map.pairs == UNIFORM.pairs and board.view["preset"] == "uniform"
    board.undo()
    assert board.pairs == [(1, 2), (3, 6)]


# --- what is refused
# ---------------------------------------------------------------------------------------------------

WRONG = [
    ([[1, 9]], "layer 9 asked of a 6-layer teacher"),
    ([[4, 1]], "layer 4 asked of a 3-layer student"),
    ([[1, 2], [1, 2]], "pairs given twice"),
    ([[1, -2]], "whole numbers ≥ 0"),
    ([[1, 2.5]], "whole numbers ≥ 0"),
    ([["1", 2]], "whole numbers ≥ 0"),
    ([[1]], "pairs (student layer, teacher layer)"),
    ([1, 2], "pairs are a list of"),
    (None, "pairs are a list of"),
]


@pytest.mark.parametrize(("pairs", "reason"), WRONG, ids=repr)
def test_wrong_pairs_of_a_page_are_refused_with_the_reason_and_nothing_changes(pairs, reason):
    board, seen, sent = mapping_board(3, 6), [], []
    board.observe(seen.append, "pairs")
    board.send_state = lambda key=None: sent.append(key)
    board.set_state({"pairs": pairs})
    assert board.layer_map == UNIFORM and board.pairs == UNIFORM.pairs and not seen
    assert board.view["refusal"].startswith("Refused: ") and reason in board.view["refusal"]
    assert "pairs" in sent  # the page gets the old ones back
    board.toggle(1, 1)
    assert board.view["refusal"] == ""


def test_right_pairs_of_a_page_are_taken():
    board = mapping_board(3, 6)
    board.set_state({"pairs": [[3, 6], [1, 1]]})
    assert board.layer_map.pairs == [(1, 1), (3, 6)] and not board.view["refusal"]


@pytest.mark.parametrize(
    ("what", "arguments", "reason"),
    [
        ("toggle", {"student_layer": 1, "teacher_layer": 7}, "layer 7 asked of a 6-layer teacher"),
        ("toggle", {"student_layer": 1}, "missing 1 required positional argument"),
        ("choose", {"preset": "best"}, "preset 'best' is not offered"),
        ("choose", {"preset": "all_to_one", "teacher_layer": 7}, "teacher layer 7 asked of a 6-layer teacher"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_and_nothing_changes(what, arguments, reason):
    board = mapping_board(3, 6)
    ask(board, what, **arguments)
    assert board.layer_map == UNIFORM and reason in board.view["refusal"] and not board.view["undo"]


def test_taking_away_the_only_pair_that_weighs_anything_is_refused():
    board = mapping_board(3, 6, start=LayerMap([(1, 2), (3, 6)], weights=[0, 1]))
    ask(board, "unlink", student_layer=3)
    assert "a sum above 0" in board.view["refusal"] and board.pairs == [(1, 2), (3, 6)]


def test_other_messages_are_not_requests():
    board = mapping_board(3, 6)
    for message in ({"ask": "delete_everything"}, {"kind": "anywidget-command"}, "undo", None):
        board._handle_custom_msg(message, [])
    assert board.layer_map == UNIFORM and not board.view["refusal"]


def test_wrong_maps_from_python_raise_and_nothing_changes():
    board = mapping_board(3, 6)
    with pytest.raises(ValueError, match="layer 10 asked of a 6-layer teacher"):
        board.layer_map = LayerMap.last(3, 12)
    with pytest.raises(ValueError, match="layer 4 asked of a 3-layer student"):
        board.pairs = [(4, 1)]
    assert board.layer_map == UNIFORM and board.pairs == UNIFORM.pairs and not board.view["undo"]


def test_what_depths_do_not_allow_is_not_offered_and_the_board_says_why():
    board = mapping_board(3, 2)
    assert board.setup["presets"] == ["uniform", "skip", "reverse", "all_to_one", "none"]
    assert board.setup["refused"] == (
        "Not offered here: last, first, random. random gives each of 3 student layers its own teacher layer, and the "
        "teacher has 2; use LayerMap.uniform, which may use a layer twice."
    )
    with pytest.raises(ValueError, match=r"'skip' is not offered; choose one of uniform.*skip leaves the last of 1"):
        mapping_board(1, 6, start="skip")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"student_layers": 0, "teacher_layers": 6}, "depths are whole numbers"),
        ({"student_layers": 3, "teacher_layers": 6, "similarity": CKA}, r"shape \(3, 4\).*need \(4, 7\)"),
        ({"student_layers": 3, "teacher_layers": 6, "start": LayerMap([(1, 7)])}, "layer 7 asked of a 6-layer teacher"),
        ({"student_layers": 3, "teacher_layers": 6, "widths": (384,)}, r"widths are two whole numbers.*found \(384,\)"),
        ({"student_layers": 3, "teacher_layers": 6, "heads": (0, 12)}, r"heads are two whole numbers.*found \(0, 12\)"),
    ],
)
def test_wrong_settings_are_named(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        mapping_board(**arguments)


# --- what is said
# ------------------------------------------------------------------------------------------------------


def said(pairs, S=3, T=6, **more):
    return [(level, text) for level, text in map_notes(LayerMap(pairs), S, T, **more)]


def test_good_maps_are_called_good():
    for layer_map in (UNIFORM, LayerMap.last(3, 6), LayerMap([(1, 1), (2, 5), (3, 6)])):
        ((level, text),) = map_notes(layer_map, 3, 6)
        assert level == "good" and "the last on the last" in text


@pytest.mark.parametrize(
    ("pairs", "level", "text"),
    [
        ([], "hint", "no layer is matched: the control"),
        ([(0, 0), (1, 2), (2, 4)], "warning", "off by one? S0 takes part and S3 does not"),
        ([(1, 1), (2, 3), (3, 5)], "warning", "off by one? every teacher layer one deeper ends on T6"),
        ([(1, 2), (2, 4)], "hint", "S3 is left to the outputs, as Patient KD does"),
        ([(1, 1), (2, 2)], "warning", "the last student layer, S3, has no teacher"),
        ([(2, 4), (3, 6)], "warning", "without a teacher: S1"),
        ([(1, 6), (2, 4), (3, 2)], "warning", "not in the order of depth: S2 learns from T4, S1 from T6"),
        ([(1, 1), (2, 2), (3, 3)], "hint", "T6, which the teacher answers from, teaches nobody"),
        ([(0, 0), (1, 2), (2, 4), (3, 6)], "hint", "S0 ← T0: embeddings, which a student that starts as a copy has"),
        ([(1, 0), (2, 4), (3, 6)], "hint", "S1 ← T0: 0 is the embeddings; they do not attend"),
        ([(1, 2), (2, 4), (3, 5), (3, 6)], "hint", "S3 learns from T5 and T6: no state equals both"),
        ([(1, 6), (2, 6), (3, 6)], "hint", "T6 teaches S1 and S2 and S3: these layers are asked to be alike"),
    ],
)
def test_each_slip_is_named(pairs, level, text):
    assert any(found == level and text in words for found, words in said(pairs)), said(pairs)


def test_warnings_come_first_and_what_is_right_is_not_said():
    notes = said([(0, 0), (1, 2), (2, 4)])
    assert [level for level, _ in notes] == sorted((level for level, _ in notes), reverse=True)
    assert not any("order of depth" in text for _, text in notes)
    assert not any("off by one" in text for _, text in said([(1, 1), (2, 2), (3, 3)]))


def test_a_random_map_says_that_it_is_drawn_anew():
    assert any("drawn anew each epoch" in text for _, text in map_notes(LayerMap.random(3, 6), 3, 6))


def test_unequal_widths_and_heads_are_explained():
    assert len(said(UNIFORM.pairs, widths=(384, 384), heads=(12, 12))) == 1
    _, (level, text) = said(UNIFORM.pairs, widths=(192, 384))
    assert level == "hint" and "each of 3 pairs learns a projection 192 → 384" in text
    (level, text), _ = said(UNIFORM.pairs, heads=(6, 12))
    assert level == "warning" and "6 and 12" in text and "group-mean" in text and "best-match" in text
    (_, text), _ = said(UNIFORM.pairs, heads=(5, 12))
    assert "group-mean" not in text and "relations" in text
    assert not any("heads differ" in text for _, text in said([(3, 0)], heads=(6, 12)))  # embeddings do not attend


def test_costs_are_told_with_units():
    board = mapping_board(3, 6, widths=(192, 384), heads=(6, 12), batch=8, tokens=64)
    told = " | ".join(board.view["cost"])
    assert "6 of 6 blocks" in told and "3 hidden states, attention inputs of 3 layers: 9.44 MB" in told
    assert "features: 590 k elements" in told and "attention: 590 k elements" in told
    assert "projections: 221 k more parameters" in told and "FLOP a step" in told
    assert "8 sequences × 64 tokens" in board.setup["step"]
    ask(board, "choose", preset="first")
    assert "3 of 6 blocks must run for this map (all of them where outputs are matched too)" in board.view["cost"][0]
    ask(board, "choose", preset="none")
    assert board.view["cost"] == ["nothing extra: no layer is kept or compared"]


def test_without_widths_costs_are_told_in_symbols():
    told = " | ".join(mapping_board(3, 6).view["cost"])
    assert "3 · B·T·d elements" in told and "3 · B·H·T² elements" in told and "give widths=" in told


# --- display
# -----------------------------------------------------------------------------------------------------------


def test_the_bundle_carries_view_picture_and_sentence_and_follows():
    board = mapping_board(3, 6)
    data, _ = board._repr_mimebundle_()
    assert set(data) == {WIDGET, "image/svg+xml", "text/plain"}
    assert data[WIDGET]["model_id"] == board.model_id
    assert ElementTree.fromstring(data["image/svg+xml"]).tag.endswith("svg")
    assert data["text/plain"] == (
        "Mapping board of 3 student and 6 teacher layers. uniform: S1 ← T2, S2 ← T4, S3 ← T6."
    )
    board.choose("none")
    later, _ = board._repr_mimebundle_()
    assert "none: no layer is matched." in later["text/plain"]
    assert later["image/svg+xml"] != data["image/svg+xml"]


def test_a_deep_pair_of_models_has_a_picture_too():
    board = mapping_board(12, 48, np.full((13, 49), 0.5), start="uniform")
    assert "S12" in board.figure.svg() and board.pairs[-1] == (12, 48)


def test_the_page_has_its_own_files_and_imports_nothing():
    board = mapping_board(2, 4)
    assert (
        "export default" in board._esm
        and "import " not in board._esm
        and "http" not in board._esm.replace("http://www.w3.org/2000/svg", "")
    )
    assert ".fakit-mapping-board" in board._css and "url(" not in board._css


def test_the_examples_of_the_docstrings_run():
    import sys

    board_module = sys.modules["fakit.widgets.mapping.board"]
    for module in (board_module, mapping_cost, mapping_notes, strategies):
        assert doctest.testmod(module).failed == 0 and doctest.testmod(module).attempted > 0
