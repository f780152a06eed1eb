"""Whose a checkpoint and a folder are, whether they are whole,
and that what was trained is never lost to what comes after.
"""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback

from fakit.experiments import run as run_module
from fakit.experiments.build import check_tokenizer
from fakit.experiments.result import RunResult
from fakit.experiments.run import run_experiment
from fakit.experiments.store import RunStore
from fakit.training import environment
from fakit.training.checkpoints import last_whole_checkpoint

ROOT = Path(__file__).parents[2]


class _StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def broken(world, tmp_path_factory):
    """A run of six steps, cut off after five, with checkpoints at 2 and 4; its folder is copied before use."""
    folder = tmp_path_factory.mktemp("broken")
    config = _config(world, folder / "student")
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, callbacks=[_StopAt(5)], progress=False, count_flops=False)
    return folder / "student"


def _config(world, out):
    from fakit.experiments.config import ExperimentConfig

    return ExperimentConfig.from_dict(
        {
            "task": {
                "name": str(world / "animals.jsonl"),
                "labels": 30,
                "options": {"validation": 40, "test": 60, "pool": 60},
            },
            "teacher": {"id": str(world / "teacher")},
            "student": {"layers": 2},
            "training": {
                "steps": 6,
                "batch_size": 4,
                "save_every": 2,
                "log_every": 2,
                "max_length": 16,
                "learning_rate": 1e-3,
            },
            "device": "cpu",
            "out": str(out),
        }
    )


@pytest.fixture
def mine(broken, world, tmp_path):
    """A copy of the broken run, and its configuration there."""
    shutil.copytree(broken, tmp_path / "student")
    return _config(world, tmp_path / "student")


FILES = [
    "checkpoint.json",
    "model.safetensors",
    "config.json",
    "projections.safetensors",
    "objective.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
]


@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(broken, name, harm, tmp_path, caplog):
    folder = shutil.copytree(broken / "checkpoints", tmp_path / "checkpoints")
    assert {path.name for path in (folder / "checkpoint-4").iterdir()} == set(FILES)  # no file is left out here
    path = folder / "checkpoint-4" / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    assert last_whole_checkpoint(folder) == folder / "checkpoint-2"
    (said,) = [record.getMessage() for record in caplog.records if record.name == "fakit.training.checkpoints"]
    assert f"checkpoint-4 is not whole ({name}" in said and "passed over" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training.learning_rate": 0.002}, "config.training.learning_rate: 0.001 there, 0.002 here"),
        ({"features.weight": 0.5}, "config.features.weight: 1.0 there, 0.5 here"),
        ({"outputs.temperature": 4.0}, "config.outputs.temperature: 2.0 there, 4.0 here"),
        ({"seed": 1}, "config.seed: 0 there, 1 here"),
        ({"student.heads": 1}, "config.student.heads: None there, 1 here"),
        ({"student.layers": 3}, "config.student.layers: 2 there, 3 here"),
        ({"training.steps": 12}, "config.training.steps: 6 there, 12 here"),
        (
            {"layer_map": "last", "task_weight": 0.5},
            "config.layer_map: uniform there, last here\n  config.task_weight: 1.0 there, 0.5 here",
        ),
    ],
)
def test_another_configuration_does_not_resume(mine, changes, said, tmp_path):
    with pytest.raises(ValueError, match="belongs to another run") as error:
        run_experiment(mine.replace(**changes), tmp_path / "runs", resume=True, progress=False)
    assert said in str(error.value)
    assert len(RunStore(tmp_path / "runs")) == 0


def test_how_often_a_run_logs_and_saves_and_where_may_change(mine, tmp_path):
    shutil.move(mine.out, tmp_path / "moved")
    other = mine.replace(
        out=str(tmp_path / "moved"), **{"training.log_every": 1, "training.save_every": 3, "training.eval_every": 3}
    )
    resumed = run_experiment(other, resume=True, progress=False)
    assert [row["step"] for row in resumed.history] == [2, 4, 6]  # the intervals stay those of the checkpoint


def test_other_data_another_teacher_or_versions_do_not_resume(mine, monkeypatch):
    seal = Path(mine.out) / "checkpoints/checkpoint-4"
    whose = json.loads((seal / "checkpoint.json").read_text())["whose"]
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "prepare", _with_other_labels(run_module.prepare))
        with pytest.raises(ValueError, match=rf"data: {whose['data']} in the checkpoint, [0-9a-f]{{64}} here"):
            run_experiment(mine, resume=True, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "prepare", _with_another_teacher(run_module.prepare))
        with pytest.raises(ValueError, match=rf"teacher: {whose['teacher']} in the checkpoint"):
            run_experiment(mine, resume=True, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(environment, "version", lambda package: "9.9")
        with pytest.raises(
            ValueError, match=rf"versions.torch: {torch.__version__.replace('+', '.')} in the checkpoint, 9.9 here"
        ):
            run_experiment(mine, resume=True, progress=False)


def _with_other_labels(prepare):
    def changed(*args):
        prepared = prepare(*args)
        labels = list(prepared.task.train["label"])
        train = prepared.task.train.remove_columns("label").add_column("label", [(label + 1) % 3 for label in labels])
        object.__setattr__(prepared.task, "train", train)
        return prepared

    return changed


def _with_another_teacher(prepare):
    def changed(*args):
        prepared = prepare(*args)
        next(prepared.teacher.parameters()).data[0, 0] += 1e-3
        return prepared

    return changed


def test_where_no_checkpoint_is_whole_nothing_starts_over_without_a_word(mine, caplog):
    folder = Path(mine.out) / "checkpoints"
    for step in (2, 4):
        (folder / f"checkpoint-{step}/optimizer.pt").unlink()
    with pytest.raises(
        ValueError,
        match=r"holds no whole checkpoint to go on from \(checkpoint-2: optimizer.pt is missing; checkpoint-4: opt",
    ):
        run_experiment(mine, resume=True, progress=False)
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "checkpoint-4/trainer_state.json").unlink()  # as a kill in the middle of the first checkpoint leaves it
    assert run_experiment(mine, resume=True, progress=False).steps == 6
    assert "holds no finished checkpoint: the run starts at step 0" in caplog.text


def test_an_unfinished_run_is_not_begun_anew_over_its_checkpoints(mine):
    with pytest.raises(
        ValueError, match=r"holds an unfinished run, saved up to step 4, of this configuration already; resume=True"
    ):
        run_experiment(mine, progress=False)


def test_a_finished_student_is_not_overwritten(config, tmp_path, world):
    config = config.replace(out=str(tmp_path / "student"), **{"training.steps": 2})
    run_experiment(config, progress=False, count_flops=False)
    before = (tmp_path / "student/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a finished student of this configuration already"):
        run_experiment(config, progress=False)
    with pytest.raises(ValueError, match=r"config\.seed: 0 there, 5 here"):
        run_experiment(config.replace(seed=5), progress=False)
    shutil.copytree(world / "teacher", tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"holds a model already \(config.json, model.safetensors\), which the student would overwrite"
    ):
        run_experiment(config.replace(out=str(tmp_path / "model")), resume=True, progress=False)
    assert (tmp_path / "student/model.safetensors").read_bytes() == before


def test_a_failed_evaluation_costs_no_training(config, tmp_path, monkeypatch):
    config = config.replace(out=str(tmp_path / "student"))
    evaluate, calls = run_module.scores_of, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 3:  # the first after training; two were rehearsed
            raise RuntimeError("out of memory")
        return evaluate(*args)

    monkeypatch.setattr(run_module, "scores_of", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_experiment(config, tmp_path / "runs", progress=False)
    weights = (tmp_path / "student/model.safetensors").read_bytes()
    monkeypatch.setattr(
        "fakit.training.trainer.DistillationTrainer.train", lambda *_, **__: pytest.fail("trained again")
    )
    again = run_experiment(config, tmp_path / "runs", resume=True, progress=False)
    assert (tmp_path / "student/model.safetensors").read_bytes() == weights
    monkeypatch.undo()
    whole = run_experiment(config.replace(out=None), progress=False)
    assert (again.test, again.history, again.steps, again.flops) == (whole.test, whole.history, 6, whole.flops)
    assert RunStore(tmp_path / "runs").record(config.run_id)["steps"] == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metrics": ["rouge"]}, "the headline metric of .* is rouge; evaluate gave accuracy"),
        ({"metrics": ["cer"]}, "is cer"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_before_training(config, options, said):
    class Never(TrainerCallback):
        def on_train_begin(self, *_, **__):
            pytest.fail("training began")

    options = {**config.task.options, **options}
    with pytest.raises(ValueError, match=said):
        run_experiment(config.replace(**{"task.options": options}), callbacks=[Never()], progress=False)


def test_a_teacher_without_tokenizer_is_refused(config, world, tmp_path):
    shutil.copytree(
        world / "teacher", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "special*", "vocab*")
    )
    with pytest.raises(
        ValueError, match=r"bare has no tokenizer: transformers made a \w+ of 5 special tokens and no words"
    ):
        run_experiment(config.replace(**{"teacher.id": str(tmp_path / "bare")}), progress=False)


@pytest.mark.parametrize(("model_type", "works"), [("gpt2", False), ("t5", False), ("albert", False), ("canine", True)])
def test_what_counts_as_a_tokenizer(model_type, works, tmp_path):
    from transformers import CONFIG_MAPPING

    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if works:
        check_tokenizer(tokenizer, "it")
    else:
        with pytest.raises(ValueError, match="it has no tokenizer"):
            check_tokenizer(tokenizer, "it")


def test_a_full_disk_during_a_checkpoint_leaves_the_one_before_whole(config, tmp_path, monkeypatch):
    import transformers

    config = config.replace(out=str(tmp_path / "student"), **{"training.save_every": 2})
    write, seen = transformers.Trainer._save_optimizer_and_scheduler, []

    def full(trainer, folder):
        write(trainer, folder)
        seen.append(folder)
        if len(seen) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)

    with monkeypatch.context() as patched:
        patched.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(
            OSError,
            match=r"checkpoint-4 could not be written \(No space left on device\) and was taken back; the checkpoints before",
        ):
            run_experiment(config, progress=False)
    folder = tmp_path / "student/checkpoints"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert last_whole_checkpoint(folder) == folder / "checkpoint-2"
    resumed = run_experiment(config, resume=True, progress=False)
    assert (
        resumed.test == run_experiment(config.replace(out=None, **{"training.save_every": None}), progress=False).test
    )


def test_no_room_is_said_before_training(config, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("fakit.files.shutil.disk_usage", lambda _: usage(10**9, 10**9, 2**21))
    config = config.replace(out=str(tmp_path / "student"), **{"student.init": "random", "training.save_every": 2})
    run_module_bytes = "fakit.training.trainer.bytes_of_checkpoint"
    monkeypatch.setattr(run_module_bytes, lambda *_: 10**8)
    with pytest.raises(
        ValueError, match=r"where checkpoints would go, has 2\.1 MB free on its disk, and about 300\.0 MB are needed"
    ):
        run_experiment(config, progress=False)


_ANOTHER = """
import sys
from fakit.experiments import ExperimentConfig, run_experiment
from transformers import TrainerCallback
import time
class Wait(TrainerCallback):
    def on_step_end(self, *_, **__):
        print("training", flush=True)
        time.sleep(600)
run_experiment(ExperimentConfig.from_yaml(sys.argv[1]), sys.argv[2], callbacks=[Wait()], progress=False)
"""


def test_a_second_run_at_once_says_so_and_a_killed_one_lets_go(config, tmp_path):
    config = config.replace(out=str(tmp_path / "student"), **{"training.steps": 2})
    config.to_yaml(tmp_path / "run.yaml")
    command = [sys.executable, "-c", _ANOTHER, str(tmp_path / "run.yaml"), str(tmp_path / "runs")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert first.stdout.readline() == "training\n"
    for store, out in ((tmp_path / "runs", None), (None, config.out)):
        with pytest.raises(ValueError, match="is being written by another run at this moment"):
            run_experiment(config.replace(out=out), store, progress=False)
    first.kill()
    first.wait()
    first.stdout.close()
    assert run_experiment(config, tmp_path / "runs", progress=False).steps == 2


_PARENT = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from fakit.experiments.study import _start_worker
def work(_):
    print(os.getpid(), flush=True)
    time.sleep(600)
if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn, _start_worker, (os.getcwd(), False)) as pool:
        list(pool.map(work, range(2)))
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "parent.py").write_text(_PARENT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, env=environment
    )
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(600):
        if not any(_runs(worker) for worker in workers):
            break
        time.sleep(0.1)
    assert [_runs(worker) for worker in workers] == [False, False]


def _runs(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_checkpoints_are_rotated_by_step_and_not_by_the_clock(config, tmp_path):
    class OldClock(TrainerCallback):
        """Each checkpoint looks an hour older than the one before."""

        def on_save(self, args, state, control, **kwargs):
            past = time.time() - 3600 * state.global_step
            os.utime(Path(args.output_dir) / f"checkpoint-{state.global_step}", (past, past))

    config = config.replace(out=str(tmp_path / "student"), **{"training.save_every": 1})
    run_experiment(config, callbacks=[OldClock()], progress=False, count_flops=False)
    assert sorted(path.name for path in (tmp_path / "student/checkpoints").iterdir()) == [
        "checkpoint-5",
        "checkpoint-6",
    ]


def test_a_student_of_nan_has_no_accuracy(config, tmp_path):
    class Break(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            next(model.student.classifier.parameters()).data[:] = math.nan

    store = RunStore.open(tmp_path / "runs")
    result = run_experiment(config, store, callbacks=[Break()], progress=False)
    assert math.isnan(result.score) and all(
        math.isnan(value) for value in (*result.test.values(), *result.validation.values())
    )
    line = (tmp_path / "runs/runs.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["test"]["accuracy"] is None
    again = RunResult.from_store(store, config.run_id)
    assert (
        math.isnan(again.score) and "accuracy nan" in str(again) and "| accuracy | – | – |" in again._repr_markdown_()
    )


def test_a_random_layer_map_is_drawn_anew_with_every_pass_over_the_labels(config):
    seen = {}

    class Look(TrainerCallback):
        def __init__(self):
            self.objective = None

        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = model.objective.layer_map.pairs

    config = config.replace(layer_map="random", **{"task.labels": 12, "training.steps": 12})
    run_experiment(config, callbacks=[Look()], progress=False, count_flops=False)
    drawn = [seen[step] for step in (1, 4, 7, 10)]  # 4 labeled texts a step of 12: three steps a pass
    assert all(seen[step] == drawn[(step - 1) // 3] for step in seen)
    assert len({str(pairs) for pairs in drawn}) > 1
