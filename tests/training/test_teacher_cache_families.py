"""A cache of every family that has one: hidden states, maps and logits of the live teacher;
the others are refused by name, before any work.
"""

import pytest
import torch
from torch import Tensor

from fakit import TeacherCache, capture
from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.training.teacher_cache import fingerprint
from fakit.training.teacher_cache.build import _settings
from tests.families import EAGER_ONLY, FAMILIES, LAYERS, SEQ2SEQ, VOCAB, tiny, with_sinks

ALL = range(LAYERS + 1)
LENGTHS = (5, 9, 3, 7)


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCAB, (length,), generator=generator)} for length in LENGTHS]


def batch_of(dataset: list[dict], numbers: list[int], side: str = "right") -> dict[str, Tensor]:
    ids = [dataset[i]["input_ids"] for i in numbers]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, True, padding_side=side),
        "attention_mask": pad([torch.ones_like(x) for x in ids], True, padding_side=side),
    }


def model(family: str):
    return tiny(family, "eager" if family in (*EAGER_ONLY, "gemma2") else "sdpa")


def same(teacher, folder, side="right", layers=ALL, attentions=range(1, LAYERS + 1)) -> TeacherCache:
    """Build a cache, compare a padded batch of it with the live teacher, return it."""
    dataset = rows()
    cache = TeacherCache.build(
        folder,
        teacher,
        dataset,
        hidden_states=layers,
        attentions=attentions,
        dtype="float32",
        padding_side=side,
        shard_rows=3,
    )
    numbers = [3, 1, 2]
    batch = batch_of(dataset, numbers, side)
    with torch.no_grad():
        live = capture(teacher, batch, layers, attentions)
    found = cache.trace(numbers, batch["attention_mask"])
    tokens = batch["attention_mask"].bool()
    looked_at = (tokens[:, None, :, None] & tokens[:, None, None, :]).expand(-1, 4, -1, -1)
    for i in layers:
        torch.testing.assert_close(found.hidden_states[i][tokens], live.hidden_states[i][tokens], rtol=1e-5, atol=1e-5)
    for i in attentions:
        ours, theirs = found.attention_maps(i)[looked_at], live.attention_maps(i)[looked_at]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert found.values == {} and set(found.queries) == set(attentions)  # a third less to store
    pick = tokens if found.logits.dim() == 3 else slice(None)
    torch.testing.assert_close(found.logits[pick], live.logits[pick], rtol=1e-5, atol=1e-5)
    return cache


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in EAGER_ONLY])
def test_a_cache_gives_what_the_live_teacher_gives(family, tmp_path):
    same(model(family), tmp_path)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen3"])
def test_relative_positions_do_not_mind_left_padding(family, tmp_path):
    same(model(family), tmp_path, side="left")


def test_windows_and_soft_caps_are_recorded(tmp_path):
    def recorded(family: str) -> list[tuple]:
        cache = same(model(family), tmp_path / family)
        return [(layer["back"], layer["ahead"], layer["softcap"]) for layer in cache.manifest["attention"].values()]

    assert recorded("modernbert")[1] == (2, 2, None)
    assert recorded("mistral") == [(3, 0, None)] * 3  # a window of 4 holds the token itself
    assert recorded("gemma2") == [(3, 0, 0.5), (None, 0, 0.5), (3, 0, 0.5)]
    assert recorded("bert") == [(None, None, None)] * 3
    assert recorded("llama") == [(None, 0, None)] * 3


def test_attention_sinks_are_kept(tmp_path):
    teacher = with_sinks()
    cache = same(teacher, tmp_path, layers=[1, 2], attentions=[1, 2])
    assert cache.manifest["attention"]["1"]["sinks"] == [0.0, 1.0, 2.0, 3.0]


# -- refused by name, before any work ---------------------------------------------------------------------------------


def refused(message: str):
    return pytest.raises(ValueError, match=message)


@pytest.mark.parametrize("family", EAGER_ONLY)
def test_maps_without_queries_are_refused_and_the_rest_is_kept(family, tmp_path):
    teacher = model(family)
    with refused(f"{type(teacher).__name__} shows its attention only as maps"):
        TeacherCache.build(tmp_path, teacher, rows(), attentions=[2])
    assert not list(tmp_path.iterdir())
    same(teacher, tmp_path, attentions=[], side="left" if family == "xlnet" else "right")


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_encoder_decoders_are_refused(family, tmp_path):
    with refused("is an encoder-decoder"):
        TeacherCache.build(tmp_path, tiny(family), rows(), hidden_states=[1])


def test_images_heads_and_dropout_are_refused(tmp_path):
    with refused("ViTForImageClassification reads pixel_values"):
        TeacherCache.build(tmp_path, tiny("vit"), rows(), hidden_states=[1])
    with refused("BertModel has no output head"):
        TeacherCache.build(tmp_path, tiny("bert").bert, rows())
    with refused("is in train mode"):
        TeacherCache.build(tmp_path, tiny("bert").train(), rows())
    with refused("has no rows"):
        TeacherCache.build(tmp_path, tiny("bert"), [])


def scored(tokens: int = 6, **changes) -> AttentionInputs:
    x = torch.zeros(1, 2, tokens, 4)
    settings = {"mask": None, "scaling": 0.5, "causal": False} | changes
    return AttentionInputs(x, x, x, **settings)


def test_a_position_bias_is_refused_and_a_mask_of_floats_is_none():
    lowest = torch.finfo(torch.float32).min
    future = torch.full((6, 6), lowest).triu(1)[None, None]
    assert _settings("M", 1, scored(mask=future))["ahead"] == 0
    slopes = future + torch.arange(6.0).neg()  # ALiBi
    for biased in (scored(mask=slopes), scored(position_bias=torch.randn(1, 2, 6, 6))):
        with refused("layer 1 of M adds a position bias"):
            _settings("M", 1, biased)


def test_other_patterns_than_windows_are_refused():
    chunks = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool()[None, None]
    a_pattern_a_head = torch.ones(1, 2, 6, 6, dtype=torch.bool)
    a_pattern_a_head[:, 1].tril_()
    for mask in (chunks, a_pattern_a_head):
        with refused("layer 3 of M attends in a pattern that is neither full, causal nor a sliding window"):
            _settings("M", 3, scored(mask=mask))


# -- quantized --------------------------------------------------------------------------------------------------------


def test_a_quantized_teacher_has_a_cache_of_its_own(tmp_path):
    from fakit import load_teacher

    tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "llama")
    teachers = [load_teacher(tmp_path / "llama", quantize=quantize) for quantize in (None, "8bit", "4bit")]
    assert len({fingerprint(teacher) for teacher in teachers}) == 3
    what = {"hidden_states": [1, 3], "attentions": [2], "dtype": "float32", "batch_size": 1}
    cache = TeacherCache.build(tmp_path / "8bit", teachers[1], rows(), **what)
    # a row at a time on both sides: in 8 bits, which activations are outliers depends on the whole batch
    batch = batch_of(rows(), [1])
    live, found = capture(teachers[1], batch, [1, 3], [2]), cache.trace([1], batch["attention_mask"])
    torch.testing.assert_close(found.hidden_states, live.hidden_states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.attention_maps(2), live.attention_maps(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, live.logits, rtol=1e-5, atol=1e-5)
    assert TeacherCache.build(tmp_path / "8bit", teachers[1], rows(), **what).manifest == cache.manifest
    with refused("another teacher weights"):
        TeacherCache.open(tmp_path / "8bit", teachers[0])
