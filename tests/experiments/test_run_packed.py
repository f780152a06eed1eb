"""A run over packed rows: what it counts is texts, a cache gives what the live teacher gives, and what would mix texts
is refused before any training.
"""

import json

import pytest

from fakit.experiments import ExperimentConfig, run_experiment
from tests.families import tiny
from tests.tasks.test_instructions import LLAMA3, letters, messages


def config(folder, family: str = "llama", **changes) -> ExperimentConfig:
    rows = [
        {"messages": messages(("user", f"Add {n} and 1." + "?" * (n % 5)), ("assistant", f"It is {n + 1}."))}
        for n in range(40)
    ]
    rows += [{"messages": messages(("user", f"And {n}?"))} for n in range(5)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = letters(LLAMA3)
    tiny(family, vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    written = {
        "task": {"name": str(folder / "chats.jsonl"), "options": {"packing": True}},
        "teacher": {"id": str(folder / "teacher")},
        "layer_map": "uniform",
        "training": {"steps": 3, "batch_size": 2, "max_length": 256, "log_every": 1, "bf16": False},
        "device": "cpu",
    }
    return ExperimentConfig.from_dict(written).replace(**changes)


def test_a_cache_gives_what_the_live_teacher_gives_and_texts_are_counted(tmp_path):
    results = [
        run_experiment(config(tmp_path), progress=False, count_flops=False, **cache)
        for cache in ({}, {"teacher_cache": tmp_path / "cache", "cache_dtype": "float32"})  # which has logits at labels
    ]
    assert [(result.labeled, result.unlabeled) for result in results] == [(32, 5)] * 2
    names = {"features", "attention", "outputs", "task", "loss"}
    for live, cached in zip(*(result.history for result in results), strict=True):
        assert names <= live.keys() and {n: live[n] for n in names} == pytest.approx(
            {n: cached[n] for n in names}, 1e-4
        )
    assert results[0].score == pytest.approx(results[1].score, rel=1e-4)


def test_the_largest_logits_of_packed_rows(tmp_path):
    """Before the first step they are compared with those of rows of their own, also where some rows have no label."""
    how = {"progress": False, "count_flops": False, "teacher_cache": tmp_path / "cache", "cache_dtype": "float32"}
    result = run_experiment(config(tmp_path), cache_top_k=8, **how)
    live = run_experiment(config(tmp_path), progress=False, count_flops=False)
    assert result.teacher_cache == "float32, top 8"
    assert 0 < result.history[0]["outputs"] <= live.history[0]["outputs"] * 1.0001  # a lower bound, of the same student


def test_what_mixes_texts_is_refused_before_the_teacher_is_cached(tmp_path):
    pooled = {"terms": {"pooled": {"kind": "pooled"}}}
    with pytest.raises(ValueError, match=r"the pooled term \(Pooled\) takes a row for one text: over"):
        run_experiment(config(tmp_path, **pooled), progress=False, count_flops=False, teacher_cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="OPTForCausalLM cannot keep them apart: a later document sees"):
        run_experiment(config(tmp_path, "opt"), progress=False, count_flops=False)
