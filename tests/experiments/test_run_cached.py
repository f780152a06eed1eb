"""Runs of a chat model from a cache: the largest logits, at answers alone, of the texts that the plan uses."""

import json

import pytest

from fakit.experiments import ExperimentConfig, run_experiment
from fakit.experiments.build import build_training_rows, prepare
from fakit.experiments.cache_config import TeacherCacheConfig, cache_of
from fakit.experiments.run_folder import binding
from fakit.training.teacher_cache import TeacherCache
from tests.families import tiny
from tests.tasks.test_instructions import LLAMA3, letters, messages


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> ExperimentConfig:
    folder = tmp_path_factory.mktemp("chat")
    rows = [
        {"messages": messages(("user", f"Add {n} and 1." + "?" * (n % 5)), ("assistant", f"It is {n + 1}."))}
        for n in range(60)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = letters(LLAMA3)
    tiny("llama", vocab_size=len(words), max_position_embeddings=512).save_pretrained(folder / "teacher")
    words.save_pretrained(folder / "teacher")
    written = {
        "task": {"name": str(folder / "chats.jsonl")},
        "teacher": {"id": str(folder / "teacher")},
        "layer_map": "uniform",
        "features": {"loss": "cosine"},
        "attention": None,
        "outputs": {"loss": "forward_kl", "temperature": 2.0},
        "training": {"steps": 4, "batch_size": 3, "max_length": 256, "log_every": 1, "bf16": False},
        "device": "cpu",
    }
    return ExperimentConfig.from_dict(written)


def run(config, **more):
    return run_experiment(config, progress=False, count_flops=False, **more)


def test_all_logits_of_the_planned_texts_at_their_answers_are_the_live_teacher(chat, tmp_path):
    live = run(chat)
    cached = run(chat, teacher_cache=tmp_path / "c", cache_dtype="float32")
    for ours, theirs in zip(cached.history, live.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    parts = prepare(chat)
    rows = build_training_rows(chat, parts.task, parts.tokenizer)
    cache = TeacherCache.open(tmp_path / "c", parts.teacher, rows.rows.select(sorted({*rows.plan.ravel().tolist()})))
    assert len(cache) == 12 < len(rows.rows) and cache.content.tokens == "labeled"
    answers = sum(sum(label != -100 for label in rows.rows[i]["labels"]) for i in {*rows.plan.ravel().tolist()})
    shards = [cache._shard(i) for i in range(len(cache.manifest["shards"]))]
    assert sum(len(shard["logits"]) for shard in shards) == answers
    assert sum(len(shard["hidden_states.3"]) for shard in shards) > 3 * answers


def test_the_whole_vocabulary_by_top_k_is_the_live_teacher_too(chat, tmp_path):
    classes = prepare(chat).teacher.config.vocab_size
    how = {"folder": str(tmp_path / "c"), "top_k": classes, "dtype": "float32"}
    cached, live = run(chat.replace(teacher_cache=how)), run(chat)
    for ours, theirs in zip(cached.history, live.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert cached.teacher_cache == f"float32, top {classes}"


def test_runs_of_other_plans_share_a_cache_of_all_rows(chat, tmp_path):
    how = {"cache_top_k": 8, "cache_dtype": "float16"}
    first = run(chat, teacher_cache=tmp_path / "planned", **how)
    assert first.teacher_cache == "float16, top 8"
    with pytest.raises(ValueError, match=r"texts asked for are not among its 12\. .* \(--cache-rows all\)"):
        run(chat.replace(seed=1), teacher_cache=tmp_path / "planned", **how)
    again = run(chat, teacher_cache=tmp_path / "all", cache_rows="all", **how)
    for ours, theirs in zip(again.history, first.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    manifest = (tmp_path / "all/manifest.json").read_text()
    run(chat.replace(seed=1), teacher_cache=tmp_path / "all", **how)
    assert (tmp_path / "all/manifest.json").read_text() == manifest


def test_what_the_largest_do_not_serve_is_refused_before_training(chat, tmp_path):
    with pytest.raises(ValueError, match="'taid' compares all"):
        run(chat.replace(**{"outputs.loss": "taid"}), teacher_cache=tmp_path / "c", cache_top_k=8)
    assert not (tmp_path / "c").exists()


def test_the_section_decides_the_run_but_for_where_it_lies(chat):
    somewhere, elsewhere = (chat.replace(teacher_cache={"folder": place}) for place in ("a", "b"))
    assert somewhere.run_id == elsewhere.run_id == chat.run_id
    assert somewhere.replace(**{"teacher_cache.rows": "all"}).run_id == chat.run_id
    assert binding(somewhere.to_dict()) == binding(elsewhere.to_dict()) == binding(chat.to_dict())
    fewer = somewhere.replace(**{"teacher_cache.top_k": 8})
    assert fewer.run_id != chat.run_id and binding(fewer.to_dict()) != binding(chat.to_dict())
    assert fewer.to_dict()["teacher_cache"] == {"folder": "a", "top_k": 8}
    assert ExperimentConfig.from_dict(fewer.to_dict()) == fewer and "teacher_cache" not in chat.to_dict()
    assert fewer.with_arm("none").teacher_cache is None and fewer.with_arm("outputs").teacher_cache is not None


def test_the_command_goes_before_the_file():
    filed = TeacherCacheConfig(folder="a", top_k=8, dtype="float16")
    assert cache_of(filed, folder=None, dtype=None, top_k=None) == filed
    assert cache_of(filed, folder="b", top_k=4) == TeacherCacheConfig(folder="b", top_k=4, dtype="float16")
    assert cache_of(None, folder=None, dtype=None) is None and cache_of(None, dtype="int8") is None
    with pytest.raises(ValueError, match=r"\(top_k 4\) and no folder for it"):
        cache_of(None, top_k=4)
    with pytest.raises(ValueError, match=r"teacher_cache\.top_k: found 0"):
        cache_of(filed, top_k=0)
