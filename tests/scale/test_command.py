"""`accelerate launch --cpu --num_processes 2 -m fakit distill …`, as one types it."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from fakit.__main__ import main
from fakit.experiments import RunStore
from fakit.training.distributed import check_sharding, start_all_processes
from tests.scale.conftest import experiment, launch
from tests.scale.test_processes import assert_same_run
from tests.training.runs import arguments, make


def test_two_processes_on_cpus(halves, world, tmp_path):
    command = ["accelerate", "launch", "--num_processes", "2", "--cpu", "-m", "fakit", "distill"]
    done = launch(*command, str(halves), "--out", str(tmp_path / "two"))
    assert done.stdout.count("The student is in") == 1  # one process speaks
    assert done.stderr.count("step 6 of 6") == 1  # one process tells the progress
    experiment(world, tmp_path / "whole.yaml")
    assert main(["distill", str(tmp_path / "whole.yaml"), "--out", str(tmp_path / "one")]) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert sorted(path.suffix or path.name for path in (tmp_path / "two").iterdir() if path.is_file()) == sorted(
        path.suffix or path.name for path in (tmp_path / "one").iterdir() if path.is_file()
    )


def test_two_processes_share_a_cache(halves, world, tmp_path):
    """One builds, the other waits; the losses are those of one process that asks the live teacher."""
    command = ["accelerate", "launch", "--num_processes", "2", "--cpu", "-m", "fakit", "distill", str(halves)]
    cache = ["--teacher-cache", str(tmp_path / "cache"), "--cache-dtype", "float32"]
    launch(*command, *cache, "--out", str(tmp_path / "two"))
    experiment(world, tmp_path / "whole.yaml")
    assert main(["distill", str(tmp_path / "whole.yaml"), "--out", str(tmp_path / "one")]) == 0
    losses = []
    for name in ("two", "one"):
        (record,) = RunStore(tmp_path / name).records()
        losses.append(RunStore(tmp_path / name).steps(record["run_id"])[["loss", "features", "attention", "outputs"]])
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.fixture
def launched(monkeypatch):
    """The surroundings that `accelerate launch --cpu` makes for its one process,
    and the command that would replace it.
    """
    for name in ("WORLD_SIZE", "RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command[1:]))
    monkeypatch.setattr("sys.argv", ["fakit", "distill", "a.yaml"])

    def by(*command: str) -> list[str]:
        monkeypatch.setattr("psutil.Process.cmdline", lambda self: list(command))
        start_all_processes()
        return started

    by.started = started
    return by


def test_the_number_of_processes_is_read_from_the_launcher(launched):
    by = launched(
        "python", "/env/bin/accelerate", "launch", "--cpu", "--num_processes", "3", "-m", "fakit", "distill", "a.yaml"
    )
    assert by == [
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", "-m", "fakit", "distill", "a.yaml"]
    ]


@pytest.mark.parametrize(
    "program", [["accelerate-launch"], ["python", "-m", "accelerate.commands.launch"], ["python", "x/launch.py"]]
)
def test_other_ways_to_start_the_launcher(launched, program):
    (command,) = launched(*program, "--cpu", "--num_processes=2", "--main_process_port", "123", "-m", "fakit")
    assert command[2:6] == ["--master_port", "123", "--nproc_per_node", "2"]


@pytest.mark.parametrize("command", [("accelerate", "launch", "--cpu", "-m", "fakit"), ("make",)])
def test_a_number_that_cannot_be_found_is_asked_for(launched, command):
    with pytest.raises(ValueError, match=r"one process of several.*--num_processes N"):
        launched(*command)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_know_their_number_are_left_alone(launched, monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    assert launched("accelerate", "launch", "--num_processes", "2") == []


def test_a_single_process_is_left_alone(launched, monkeypatch):
    monkeypatch.delenv("MASTER_PORT")
    assert launched("accelerate", "launch", "--cpu", "-m", "fakit") == []


# --- what is not done, by name
# -----------------------------------------------------------------------------------------


def test_fsdp1_is_refused():
    def accelerator(plugin):
        return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))

    with pytest.raises(ValueError, match=r"FSDP1 was asked for.*--fsdp_version 2"):
        check_sharding(accelerator(SimpleNamespace(fsdp_version=1)))
    check_sharding(accelerator(SimpleNamespace(fsdp_version=2)))
    check_sharding(accelerator(None))


def test_one_process_takes_one_of_several_gpus(tmp_path, monkeypatch, caplog):
    """DataParallel would wrap replicas, whose breakdown is lost with them."""
    several = arguments(tmp_path)
    several._n_gpu = 2  # what TrainingArguments says on a machine with two GPUs
    monkeypatch.setattr("tests.training.runs.arguments", lambda *_, **__: several)
    trainer = make(tmp_path)
    assert trainer.args.n_gpu == 1 and trainer._train_batch_size == 4
    assert "Training on one of 2 GPUs; `accelerate launch`" in caplog.text
    trainer.train()
    assert trainer.state.global_step == 6
