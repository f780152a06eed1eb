"""A cached teacher equals the live one, and a cache that is not this run's is refused."""

import json

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fakit import Attention, Features, LayerMap, Objective, Outputs, TeacherCache, capture, shrink

KW = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=100)


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**KW, num_labels=3)).eval().requires_grad_(False)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**KW, num_key_value_heads=2)).eval().requires_grad_(False)


@pytest.fixture
def dataset():
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (5, 9, 3, 7, 8, 4, 6):
        ids = torch.randint(3, 100, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length})
    return rows


def batch_of(dataset, rows, padding_side="right"):
    longest = max(len(dataset[i]["input_ids"]) for i in rows)

    def pad(values):
        padding = [0] * (longest - len(values))
        return values + padding if padding_side == "right" else padding + values

    return {name: torch.tensor([pad(dataset[i][name]) for i in rows]) for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("make", [bert, llama])
def test_the_loss_from_a_cache_equals_the_loss_from_the_live_teacher(make, dataset, tmp_path):
    teacher = make()
    student = shrink(teacher, layers=2, init="random").eval()
    terms = dict(features=Features(), attention=Attention(), outputs=Outputs(), task=None)
    objective = Objective(LayerMap.uniform(2, 4), **terms)
    needs, ours = objective.needs("teacher"), objective.needs("student")
    cache = TeacherCache.build(tmp_path, teacher, dataset, needs=needs, dtype="float32", shard_rows=3, batch_size=2)
    assert len(cache) == len(dataset) and len(list(tmp_path.glob("*.safetensors"))) == 3
    for rows in ([6, 0, 3], [1], [4, 2]):
        batch = batch_of(dataset, rows)
        live = capture(teacher, batch, needs.hidden_states, needs.attentions)
        student_trace = capture(student, batch, ours.hidden_states, ours.attentions)
        expected = objective(student_trace, live)
        found = objective(student_trace, cache.trace(rows, batch["attention_mask"]))
        for name in ("features", "attention", "outputs"):
            torch.testing.assert_close(found.terms[name], expected.terms[name], rtol=1e-5, atol=1e-7)


def test_bfloat16_halves_the_file_and_keeps_its_precision(dataset, tmp_path):
    teacher = bert()
    full = TeacherCache.build(tmp_path / "full", teacher, dataset, hidden_states=[4], dtype="float32")
    half = TeacherCache.build(tmp_path / "half", teacher, dataset, hidden_states=[4], dtype="bfloat16")
    mask = batch_of(dataset, [1])["attention_mask"]
    a, b = (cache.trace([1], mask).hidden_states[4] for cache in (full, half))
    assert not torch.equal(a, b)
    assert ((a - b).abs() <= a.abs() * 2**-8).all()
    sizes = [sum(p.stat().st_size for p in (tmp_path / name).glob("*.safetensors")) for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_killed_build_goes_on_and_gives_the_same_files(dataset, tmp_path):
    teacher = bert()
    whole = TeacherCache.build(tmp_path / "whole", teacher, dataset, hidden_states=[2], shard_rows=2)
    calls = 0

    def die(*_):
        nonlocal calls
        calls += 1
        if calls == 4:  # one look at the longest row, two shards, and here the third
            raise KeyboardInterrupt

    handle = teacher.register_forward_pre_hook(die)
    with pytest.raises(KeyboardInterrupt):
        TeacherCache.build(tmp_path / "killed", teacher, dataset, hidden_states=[2], shard_rows=2)
    handle.remove()
    with pytest.raises(ValueError, match="unfinished: 4 of 7 rows"):
        TeacherCache.open(tmp_path / "killed")
    resumed = TeacherCache.build(tmp_path / "killed", teacher, dataset, hidden_states=[2], shard_rows=2)
    assert resumed.manifest["shards"] == whole.manifest["shards"]  # sha256 included


def test_foreign_truncated_and_corrupt_caches_are_refused(dataset, tmp_path):
    teacher = bert()
    TeacherCache.build(tmp_path, teacher, dataset, hidden_states=[2])
    assert len(TeacherCache.open(tmp_path, teacher, dataset)) == 7
    with pytest.raises(ValueError, match="another tokenised data"):
        TeacherCache.open(tmp_path, teacher, [*dataset[1:], dataset[0]])
    other = bert()
    other.classifier.bias.data += 1
    with pytest.raises(ValueError, match="another teacher weights"):
        TeacherCache.open(tmp_path, other, dataset)
    with pytest.raises(ValueError, match=r"another content.*hidden_states"):
        TeacherCache.build(tmp_path, teacher, dataset, hidden_states=[3])
    with pytest.raises(ValueError, match="no teacher cache"):
        TeacherCache.open(tmp_path / "nowhere")

    shard = next(tmp_path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 255
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="corrupt"):
        TeacherCache.open(tmp_path, teacher, dataset)
    shard.write_bytes(content[:-64])
    with pytest.raises(ValueError, match="truncated"):
        TeacherCache.open(tmp_path, teacher, dataset)

    manifest = json.loads((tmp_path / "manifest.json").read_text()) | {"version": 99}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"another format version: it has 99"):
        TeacherCache.open(tmp_path)


def test_rows_and_lengths_are_checked(dataset, tmp_path):
    cache = TeacherCache.build(tmp_path, bert(), dataset, hidden_states=[2])
    with pytest.raises(ValueError, match="row 7 asked of a cache of 7 rows"):
        cache.trace([7], torch.ones(1, 5))
    with pytest.raises(ValueError, match="row 0 of the cache has 5 tokens, the batch has 4"):
        cache.trace([0], torch.ones(1, 4))


def test_left_padding_puts_the_teacher_where_the_tokens_are(dataset, tmp_path):
    cache = TeacherCache.build(tmp_path, llama(), dataset, hidden_states=[2], dtype="float32")
    right, left = (batch_of(dataset, [0, 1], side)["attention_mask"] for side in ("right", "left"))
    a, b = (cache.trace([0, 1], mask).hidden_states[2][mask.bool()] for mask in (right, left))
    torch.testing.assert_close(a, b)
