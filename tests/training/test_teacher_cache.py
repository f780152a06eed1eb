"""A cached teacher equals the live one, and a cache that is not this run's is refused."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, TeacherCache, capture, shrink
from fakit.training.teacher_cache import CacheContent, data_fingerprint, fingerprint
from tests.families import tokenizer

KW = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=100)


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**KW, num_labels=3)).eval().requires_grad_(False)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**KW, num_key_value_heads=2)).eval().requires_grad_(False)


@pytest.fixture
def dataset():
    return rows_of_lengths()


def rows_of_lengths():
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


_A_BUILD = """
    import sys
    from fakit import TeacherCache
    from fakit.training.teacher_cache import cache
    from tests.training.test_teacher_cache import bert, rows_of_lengths

    make = cache.make_shard
    def counted(*args):
        print("a shard", flush=True)
        sys.stdin.readline()  # the parent says when it goes on
        return make(*args)
    cache.make_shard = counted
    TeacherCache.build(sys.argv[1], bert(), rows_of_lengths(), hidden_states=[2], shard_rows=4)
"""


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(_A_BUILD), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parents[2]}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline() == "a shard\n"
        with subprocess.Popen(command, **pipes) as second:
            first.communicate("\n" * 2)
            said, _ = second.communicate("\n" * 2)
    assert (first.returncode, second.returncode, said) == (0, 0, "")  # the second made no shard
    assert len(TeacherCache.open(tmp_path)) == 7


_HALF_A_BUILD = """
    import sys, time
    from fakit import TeacherCache
    from fakit.training.teacher_cache import manifest
    from tests.training.test_teacher_cache import bert, rows_of_lengths

    write = manifest.write_manifest
    def write_and_wait(folder, what):
        write(folder, what)
        print("a shard is there", flush=True)
        time.sleep(60)  # the parent kills here
    manifest.write_manifest = write_and_wait
    TeacherCache.build(sys.argv[1], bert(), rows_of_lengths(), hidden_states=[2], attentions=[2], shard_rows=2, top_k=2)
"""


def test_a_build_killed_with_signal_9_goes_on_and_gives_the_same_bytes(dataset, tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(_HALF_A_BUILD), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    with process:
        assert process.stdout.readline() == "a shard is there\n"
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    # a build that dies in writing leaves this
    (tmp_path / "killed" / "shard-00001.safetensors.partial").write_bytes(b"half of a shar")
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) == 1
    for name in ("killed", "whole"):
        what = {"hidden_states": [2], "attentions": [2], "shard_rows": 2, "top_k": 2}
        TeacherCache.build(tmp_path / name, bert(), dataset, **what)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("killed", "whole")]
    assert names[0] == names[1] and len(names[0]) == 5  # four shards and the manifest
    for name in names[0]:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_foreign_truncated_and_corrupt_caches_are_refused(dataset, tmp_path):
    teacher = bert()
    TeacherCache.build(tmp_path, teacher, dataset, hidden_states=[2])
    assert len(TeacherCache.open(tmp_path, teacher, dataset)) == 7
    with pytest.raises(ValueError, match="another tokenized data"):
        TeacherCache.open(tmp_path, teacher, [*dataset[1:], dataset[0]])
    other = bert()
    other.classifier.bias.data += 1
    with pytest.raises(ValueError, match="another teacher weights"):
        TeacherCache.open(tmp_path, other, dataset)
    heads = bert()  # the same weights, read otherwise
    heads.config.num_attention_heads = 2
    with pytest.raises(ValueError, match="another teacher weights"):
        TeacherCache.open(tmp_path, heads, dataset)
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


# -- precisions and sizes ---------------------------------------------------------------------------------------------


def test_int8_errs_by_half_a_step_of_each_vectors_scale(dataset, tmp_path):
    teacher = llama()
    what = {"hidden_states": [0, 4], "attentions": [2], "inputs": ("queries", "keys", "values")}
    full, small = (TeacherCache.build(tmp_path / d, teacher, dataset, dtype=d, **what) for d in ("float32", "int8"))
    mask = batch_of(dataset, [0, 1, 2])["attention_mask"]
    a, b = (cache.trace([0, 1, 2], mask) for cache in (full, small))
    pairs = [(a.hidden_states[i], b.hidden_states[i]) for i in (0, 4)] + [(a.logits, b.logits)]
    pairs += [(getattr(a, name)[2], getattr(b, name)[2]) for name in what["inputs"]]
    for exact, near in pairs:
        step = exact.abs().amax(-1, keepdim=True) / 127
        assert ((exact - near).abs() <= 0.504 * step).all() and not torch.equal(exact, near)


@pytest.mark.parametrize(("dtype", "each", "scale"), [("float32", 4, 0), ("bfloat16", 2, 0), ("int8", 1, 2)])
def test_bytes_of_a_token(dtype, each, scale, dataset, tmp_path):
    """Width 32, 4 heads of 8 with 2 of keys, 100 classes: numbers, and scales one a vector."""
    cache = TeacherCache.build(tmp_path, llama(), dataset, hidden_states=[2], attentions=[3], dtype=dtype)
    assert cache.manifest["sizes"] | {} == {
        name: bytes_
        for name, bytes_ in {
            "hidden_states.2": 32 * each,
            "hidden_states.2.scale": scale,
            "queries.3": 32 * each,
            "queries.3.scale": 4 * scale,
            "keys.3": 16 * each,
            "keys.3.scale": 2 * scale,
            "logits": 100 * each,
            "logits.scale": scale,
        }.items()
        if bytes_
    }
    assert sum(shard["bytes"] for shard in cache.manifest["shards"]) < 42 * sum(cache.manifest["sizes"].values()) + 2500


def test_a_dtype_too_narrow_for_the_teacher_is_refused(dataset, tmp_path):
    teacher = bert()
    teacher.bert.embeddings.LayerNorm.weight.fill_(1e5)
    with pytest.raises(
        ValueError, match=r"numbers up to .*e\+05, and float16 cannot hold them all; use dtype='bfloat16'"
    ):
        TeacherCache.build(tmp_path, teacher, dataset, hidden_states=[0], dtype="float16")
    assert not (tmp_path / "manifest.json").exists()
    teacher.bert.embeddings.LayerNorm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="look at the teacher's weights"):
        TeacherCache.build(tmp_path, teacher, dataset, hidden_states=[0], dtype="float32")


def test_only_the_rows_asked_for_are_read(dataset, tmp_path):
    TeacherCache.build(tmp_path, bert(), dataset, hidden_states=[2], shard_rows=2)
    cache = TeacherCache.open(tmp_path, verify=False)
    cache.trace([2, 3], batch_of(dataset, [2, 3])["attention_mask"])
    assert list(cache._shards) == [1]


# -- the k largest logits ---------------------------------------------------------------------------------------------


def logits_of(cache, dataset, rows):
    mask = batch_of(dataset, rows)["attention_mask"]
    return cache.trace(rows, mask).logits[mask.bool()].double()


def test_top_k_keeps_the_largest_probabilities_and_the_mass_of_the_rest(dataset, tmp_path):
    teacher = llama()
    teacher.lm_head.weight.mul_(20)
    how = {"dtype": "float32", "temperatures": [1.0, 2.5]}
    full, top = (TeacherCache.build(tmp_path / str(k), teacher, dataset, top_k=k, **how) for k in (None, 10))
    exact = logits_of(full, dataset, [0, 1, 5])  # (tokens, V)
    mask = batch_of(dataset, [0, 1, 5])["attention_mask"]
    trace = top.trace([0, 1, 5], mask)
    assert trace.logits is None and trace.top_k.classes == 100
    near = trace.top_k.map(lambda x: x[mask.bool()].double())
    p = exact.softmax(-1)
    values, indices = p.topk(10)
    assert torch.equal(near.indices.long(), indices)
    torch.testing.assert_close(near.values.exp(), values, rtol=1e-5, atol=1e-7)
    rest = torch.ones_like(p).scatter(-1, indices, 0).bool()
    mass = (p * rest).sum(-1)
    assert (mass > 1e-3).all() and (mass < 0.9).all()
    torch.testing.assert_close(near.rest_at(1.0).exp(), mass, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(near.rest_at(2.5).exp(), (p ** (1 / 2.5) * rest).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [bert, llama])
def test_all_of_the_logits_are_the_full_logits(make, dataset, tmp_path):
    teacher = make()
    classes = 3 if make is bert else 100
    caches = [
        TeacherCache.build(tmp_path / str(k), teacher, dataset, top_k=k, dtype="float32") for k in (None, classes)
    ]
    mask = batch_of(dataset, [4, 2])["attention_mask"]
    full, top = (cache.trace([4, 2], mask).logits for cache in caches)
    torch.testing.assert_close(top, full, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=f"top_k=101 of .* which has {classes} classes"):
        TeacherCache.build(tmp_path / "more", teacher, dataset, top_k=101)


def test_top_k_in_small_types_stays_close(dataset, tmp_path):
    teacher = llama()
    exact = logits_of(TeacherCache.build(tmp_path / "full", teacher, dataset, dtype="float32"), dataset, [1])
    for dtype in ("bfloat16", "int8"):
        cache = TeacherCache.build(tmp_path / dtype, teacher, dataset, top_k=20, dtype=dtype)
        assert cache.manifest["sizes"]["logits.indices"] == 40
        near = cache.trace([1], batch_of(dataset, [1])["attention_mask"]).top_k
        values, indices = exact.log_softmax(-1).topk(20)
        assert torch.equal(near.indices[0], indices) and (near.values[0] - values).abs().max() < 0.03


# -- content ----------------------------------------------------------------------------------------------------------


def test_an_objective_says_what_to_keep():
    objective = Objective(LayerMap([(0, 0), (1, 2), (2, 4)]), Features(weight=0), Attention(), task=Task())
    assert CacheContent.for_objective(objective) == CacheContent((0, 2, 4), (2, 4), logits=False)
    objective = Objective(
        LayerMap.none(), attention=Attention("relations", relations=("values",), layer_map=LayerMap([(1, 3)]))
    )
    assert CacheContent.for_objective(objective, dtype="int8") == CacheContent(
        (), (3,), ("values",), False, dtype="int8"
    )
    for random in (LayerMap.random(2, 4), LayerMap.random(2, 4).for_epoch(3)):
        assert CacheContent.for_objective(Objective(random, Features())).hidden_states == (1, 2, 3, 4)
    objective = Objective(outputs=Outputs())
    assert CacheContent.for_objective(objective, top_k=8) == CacheContent(top_k=8, temperatures=(2.0,))


def test_unknown_contents_are_refused():
    with pytest.raises(ValueError, match="dtype='int4' is not known; a cache stores float32, bfloat16, float16, int8"):
        CacheContent(dtype="int4")
    with pytest.raises(ValueError, match="queries, keys, values"):
        CacheContent(inputs=("maps",))
    with pytest.raises(ValueError, match="top_k=0"):
        CacheContent(top_k=0)


def test_rows_are_found_by_what_the_model_is_given(dataset, tmp_path):
    cache = TeacherCache.build(tmp_path, bert(), dataset, hidden_states=[2], shard_rows=3)
    again = [{"input_ids": torch.tensor(dataset[i]["input_ids"]), "labels": 1, "text": "x"} for i in (5, 2, 2, 6)]
    assert cache.rows_of(again) == [5, 2, 2, 6]
    again[1]["attention_mask"] = [1, 1, 0]
    with pytest.raises(ValueError, match=r"1 of the data set's 4 rows \(the first is row 1\)"):
        cache.rows_of(again)
    with pytest.raises(ValueError, match=r"holds \['text'\].*tokenize the data set first"):
        cache.rows_of([{"text": "words"}])


def test_another_tokenizer_is_refused(dataset, tmp_path):
    TeacherCache.build(tmp_path, bert(), dataset, hidden_states=[2], tokenizer=tokenizer("a b"))
    TeacherCache.open(tmp_path, tokenizer=tokenizer("a b"))
    TeacherCache.open(tmp_path)
    with pytest.raises(ValueError, match=r"another tokenizer: it has \w+…, this run has \w+…"):
        TeacherCache.open(tmp_path, tokenizer=tokenizer("b a"))


def test_a_damaged_manifest_and_a_missing_shard_are_refused(dataset, tmp_path):
    teacher = bert()
    TeacherCache.build(tmp_path, teacher, dataset, hidden_states=[2], shard_rows=4)
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="is no manifest of a teacher cache"):
        TeacherCache.open(tmp_path)
    manifest.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "sizes"}))
    with pytest.raises(ValueError, match="lacks sizes"):
        TeacherCache.open(tmp_path)
    manifest.write_text(text)
    (tmp_path / "shard-00001.safetensors").unlink()
    for again in (
        lambda: TeacherCache.open(tmp_path),
        lambda: TeacherCache.build(tmp_path, teacher, dataset, hidden_states=[2]),
    ):
        with pytest.raises(ValueError, match="missing from its cache, whose manifest lists it with"):
            again()


def test_fingerprints_look_at_what_shapes_the_answer():
    teacher, dataset = bert(), rows_of_lengths()
    before = fingerprint(teacher)
    teacher.config.id2label = {0: "a", 1: "b", 2: "c"}
    teacher.config._name_or_path = "elsewhere"
    assert fingerprint(teacher) == before == fingerprint(bert())
    teacher.config.layer_norm_eps = 1e-3
    assert fingerprint(teacher) != before
    without = [{"input_ids": row["input_ids"], "labels": 0} for row in dataset]
    assert data_fingerprint(without) == data_fingerprint(dataset)
    assert data_fingerprint(dataset[::-1]) != data_fingerprint(dataset)
    assert data_fingerprint([row | {"token_type_ids": row["attention_mask"]} for row in dataset]) != data_fingerprint(
        dataset
    )


def test_a_folder_of_something_else_is_not_to_be_deleted(dataset, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "what": "distillation runs"}))
    with pytest.raises(ValueError, match=r"something else's.*folder of its own") as refused:
        TeacherCache.build(tmp_path, bert(), dataset)
    assert "delete" not in str(refused.value)


def test_a_cache_is_built_in_a_folder_of_its_own(dataset, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/shard-00000.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"holds shard-00000\.safetensors, and no cache"):
        TeacherCache.build(tmp_path / "mine", bert(), dataset)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, and a cache is a folder"):
        TeacherCache.build(tmp_path / "file", bert(), dataset)
    with pytest.raises(ValueError, match="empty name"):
        TeacherCache.build("", bert(), dataset)
    assert (tmp_path / "mine/shard-00000.safetensors").read_text() == "mine"


def test_the_side_of_the_padding_is_part_of_a_cache(dataset, tmp_path):
    with pytest.raises(ValueError, match="padding_side='rigth'"):
        TeacherCache.build(tmp_path / "c", llama(), dataset, padding_side="rigth")
    TeacherCache.build(tmp_path / "c", llama(), dataset, padding_side="left")
    with pytest.raises(ValueError, match="another side of the padding: it has left, this run has right"):
        TeacherCache.build(tmp_path / "c", llama(), dataset)
    assert len(TeacherCache.open(tmp_path / "c", llama(), dataset)) == 7
