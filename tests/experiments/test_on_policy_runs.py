"""On-policy distillation from a configuration: the key, what is refused, the record, a run that goes on."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from fakit.experiments.build import prepare
from fakit.experiments.config import ExperimentConfig
from fakit.experiments.result import RunResult
from fakit.experiments.run import run_experiment
from fakit.experiments.store import RunStore
from fakit.experiments.vary import arms
from fakit.objective.schedules import Schedule


@pytest.fixture
def pairs(world) -> ExperimentConfig:
    """Six steps of four rows, some of them a prompt alone; without attention, whose maps the tiny models share."""
    return ExperimentConfig.from_dict(
        {
            "task": {
                "name": str(world / "pairs.jsonl"),
                "labels": 30,
                "options": {"validation": 4, "test": 6, "pool": 60},
            },
            "teacher": {"id": str(world / "causal")},
            "student": {"layers": 1},
            "features": {"loss": "mse", "tokens": "labeled"},
            "attention": None,
            "outputs": {"loss": "jsd", "beta": 0.5, "temperature": 1.0},
            "training": {"steps": 6, "batch_size": 4, "log_every": 1, "max_length": 140, "learning_rate": 1e-3}
            | {"bf16": False},
            "device": "cpu",
            "on_policy": {"share": 0.5, "max_new_tokens": 8},
        }
    )


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_the_key_in_a_file(pairs, tmp_path):
    assert pairs.to_dict()["on_policy"] == {"share": 0.5, "max_new_tokens": 8}
    assert ExperimentConfig.from_yaml(pairs.to_yaml(tmp_path / "run.yaml") and tmp_path / "run.yaml") == pairs
    without = pairs.replace(on_policy=None)
    assert "on_policy" not in without.to_dict() and without.run_id != pairs.run_id
    assert pairs.replace(**{"on_policy.share": 1.0}).on_policy.share == 1.0
    rising = pairs.replace(**{"on_policy.share": {"from": 0.0, "to": 1.0}})
    assert isinstance(rising.on_policy.build(_Ends, _Ends).share, Schedule)
    assert [config.on_policy is None for config in (pairs.with_arm(arm) for arm in ("none", "outputs"))] == [
        True,
        False,
    ]
    assert set(arms()) == {"none", "outputs", "features", "attention", "all"}


class _Ends:
    eos_token_id = 4
    generation_config = type("Ends", (), {"eos_token_id": [4, 7]})


def test_answers_end_as_tokenizer_and_student_say(pairs):
    assert pairs.on_policy.build(_Ends, _Ends).eos_token_id == (4, 7)
    assert pairs.replace(**{"on_policy.eos_token_id": 9}).on_policy.build(_Ends, _Ends).eos_token_id == (9,)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"on_policy.share": 1.5}, r"on_policy\.share: found 1\.5, expected a share of the steps"),
        ({"on_policy.share": {"from": 0.0, "to": 3.0}}, r"on_policy\.share: found 3, expected"),
        ({"on_policy.share": {"from": 0.0, "to": 1.0, "start": 9}}, r"on_policy\.share: .*starts at step 9"),
        ({"on_policy.max_new_tokens": 0}, r"on_policy\.max_new_tokens: found 0, expected a value at least 1"),
        ({"on_policy.top_p": 0}, r"on_policy\.top_p: found 0.*above 0"),
        ({"on_policy": {"shares": 0.5}}, r"on_policy\.shares: unknown key .*Did you mean 'share'"),
        ({"features": None, "outputs": None}, "on_policy: what the student writes is scored by the teacher, and no"),
    ],
)
def test_keys_out_of_range(pairs, changes, message):
    with pytest.raises(ValueError, match=message):
        pairs.replace(**changes)


def test_what_has_no_prompts_is_refused_before_a_teacher_is_loaded(pairs, world, tmp_path):
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"text": f"the cat no {i}"}) + "\n" for i in range(40)))
    talks = [
        {"messages": [{"role": "user", "content": f"no {i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(40)
    ]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    nobody = {"id": str(tmp_path / "nobody")}
    options = {"validation": 4, "test": 4}
    for task, found in (
        ({"name": str(world / "animals.jsonl"), "options": options}, "a sequence-classification task"),
        ({"name": str(tmp_path / "plain.jsonl"), "options": {"kind": "causal-lm", **options}}, "texts without prompts"),
        (
            {"name": str(tmp_path / "talks.jsonl"), "options": {"tokens": "all", **options}},
            "instruction data with labels on all",
        ),
        ({"name": str(tmp_path / "talks.jsonl"), "options": {"packing": True, **options}}, "packed: a sequence holds"),
    ):
        with pytest.raises(ValueError, match=f"on_policy: the student writes answers to prompts, and .* is {found}"):
            prepare(pairs.replace(task=task, teacher=nobody))
    with pytest.raises(ValueError, match=r"a teacher cache was asked for in .*on_policy has the student write"):
        run_experiment(pairs, teacher_cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"max_new_tokens is 150, and the student .* has 160 positions"):
        run_experiment(pairs.replace(**{"on_policy.max_new_tokens": 150}), progress=False)


def test_a_run_is_recorded_with_what_was_written(pairs, tmp_path):
    store = RunStore.open(tmp_path / "runs")
    result = run_experiment(pairs.replace(out=str(tmp_path / "student")), store, progress=False)
    written = [row for row in result.history if row.get("on_policy/share")]
    assert 0 < len(written) < 6 and result.on_policy["share"] == len(written) / 6
    assert all("task" not in row and 1 <= row["on_policy/tokens"] <= 8 for row in written)
    assert all("task" in row for row in result.history if row not in written)
    assert result.on_policy["tokens"] == pytest.approx(sum(row["on_policy/tokens"] for row in written) / len(written))
    assert 0 <= result.on_policy["ended"] <= 1 and result.on_policy["tokens_per_second"] > 0
    assert result.flops is None and not any("per_second" in name for row in result.history for name in row)
    again = RunResult.from_store(store, pairs.run_id)
    assert again.on_policy == result.on_policy and again == RunResult(**{**vars(result), "history": again.history})
    assert "on_policy:\n  share: 0.5" in (tmp_path / "student" / "README.md").read_text()


def test_a_run_that_was_cut_off_goes_on_as_it_would_have(pairs, tmp_path):
    saved = {"training.save_every": 2, "training.accumulation": 2}
    whole, broken = (pairs.replace(out=str(tmp_path / name), **saved) for name in ("whole", "broken"))
    run_experiment(whole, progress=False)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(broken, callbacks=[StopAt(5)], progress=False)
    run_experiment(broken, resume=True, progress=False)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "broken"))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_an_adapter_writes_too(pairs, tmp_path):
    pairs = pairs.replace(**{"student.lora": {"r": 2}, "training.steps": 3, "on_policy.share": 1.0})
    result = run_experiment(pairs.replace(out=str(tmp_path / "student")), progress=False)
    assert result.on_policy["share"] == 1.0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert exported.generation_config.max_new_tokens is None  # of the writing, and not the student's
