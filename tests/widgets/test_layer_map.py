"""The layer-map chooser: what is chosen is what `.layer_map` is and what the figure shows."""

import numpy as np
import pytest

from fakit import LayerMap
from fakit.widgets import layer_map_chooser

# S1 is most like T2 and S2 like T1: the best assignment is not in the order of depth, the monotone map has to be
CKA = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.2, 0.9, 0.3], [0.0, 0.8, 0.1, 0.4]])


def test_it_starts_uniform():
    assert layer_map_chooser(3, 6).layer_map == LayerMap.uniform(3, 6)


@pytest.mark.parametrize("name", ["last", "first", "skip", "reverse", "random", "none"])
def test_the_list_chooses_the_map(name):
    chooser = layer_map_chooser(3, 6)
    chooser.chooser.value = name
    expected = getattr(LayerMap, name)(3, 6)
    assert chooser.layer_map == expected and chooser.layer_map.name == name
    listed = ", ".join(f"S{s}←T{t}" for s, t in expected.pairs)
    assert (listed or "No layer is mapped") in chooser.figure.summary
    assert f"‘{name}’" in chooser.figure.plotly.layout.title.text


def test_all_to_one_has_a_layer_to_choose():
    chooser = layer_map_chooser(2, 6)
    assert chooser.target.layout.display == "none"
    chooser.chooser.value = "all_to_one"
    assert chooser.target.layout.display is None
    chooser.target.value = 4
    assert chooser.layer_map.pairs == [(1, 4), (2, 4)]


def test_similarity_adds_its_two_maps_and_its_mean():
    chooser = layer_map_chooser(2, 3, CKA, strategy="similarity (assignment)")
    assert chooser.layer_map.pairs == [(1, 2), (2, 1)]
    assert "not in the order of depth; mean similarity of the pairs 0.85" in chooser.sentence
    chooser.chooser.value = "similarity (monotone)"
    assert chooser.layer_map.pairs == [(1, 2), (2, 3)]
    assert "mean similarity of the pairs 0.65" in chooser.sentence


def test_none_is_named_a_control():
    assert layer_map_chooser(2, 6, strategy="none").sentence.startswith("No layer is matched: the control")


def test_what_depths_do_not_allow_is_not_offered():
    assert "skip" not in layer_map_chooser(1, 6).chooser.options
    with pytest.raises(ValueError, match=r"'skip' is not offered; choose one of uniform.*skip leaves the last of 1"):
        layer_map_chooser(1, 6, strategy="skip")


def test_wrong_depths_and_shapes_are_named():
    with pytest.raises(ValueError, match="depths are whole numbers"):
        layer_map_chooser(0, 6)
    with pytest.raises(ValueError, match=r"shape \(3, 4\).*need \(4, 7\)"):
        layer_map_chooser(3, 6, CKA)
