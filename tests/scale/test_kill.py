"""kill -9 through the command line, between checkpoints and while one is written:
--resume ends in the weights of an unbroken run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fakit.__main__ import main
from fakit.experiments import ExperimentConfig, RunStore
from fakit.training.checkpoints import last_whole_checkpoint
from tests.scale.conftest import ROOT, experiment

STEPS, EVERY = 200, 20

# `fakit distill` that is killed where the second checkpoint after its start is half written: weights and optimizer,
# nothing more
KILLED_WHILE_WRITING = """
import os, signal, sys
from transformers import Trainer
write, seen = Trainer._save_rng_state, []
def killed(trainer, folder):
    seen.append(folder)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(trainer, folder)
Trainer._save_rng_state = killed
from fakit.__main__ import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory) -> tuple[ExperimentConfig, Path]:
    """An experiment with dropout, and the folder where it ran to its end."""
    folder = tmp_path_factory.mktemp("unbroken")
    settings = {
        "training.steps": STEPS,
        "training.save_every": EVERY,
        "training.log_every": EVERY,
        "training.eval_every": None,
    }
    config = experiment(world, folder / "run.yaml", dropout=0.1, **settings, out=str(folder / "student"))
    assert main(["distill", str(folder / "run.yaml"), "--out", str(folder / "runs")]) == 0
    return config, folder


def checkpoints(folder: Path) -> list[int]:
    """The steps whose checkpoint was written to its end, which is the list of its files:
    it is there whole or not at all.
    """
    lists = folder.glob("student/checkpoints/checkpoint-*/checkpoint.json")
    return sorted(int(path.parent.name.split("-")[1]) for path in lists if json.loads(path.read_text())["files"])


def test_killed_twice_and_resumed_it_ends_in_the_same_weights(unbroken, tmp_path, caplog):
    config, whole = unbroken
    config.replace(out=str(tmp_path / "student")).to_yaml(tmp_path / "run.yaml")
    command = ["distill", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "runs")]

    process = subprocess.Popen([sys.executable, "-m", "fakit", *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not checkpoints(tmp_path) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < max(checkpoints(tmp_path)) < STEPS - 2 * EVERY
    assert len(RunStore.open(tmp_path / "runs")) == 0

    resume = [*command, "--resume"]
    first = max(checkpoints(tmp_path))
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *resume], cwd=ROOT, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    half = tmp_path / f"student/checkpoints/checkpoint-{first + 2 * EVERY}"
    assert (half / "model.safetensors").is_file() and (half / "optimizer.pt").is_file()
    assert max(checkpoints(tmp_path)) == first + EVERY

    assert main(resume) == 0
    (passed_over,) = [record.getMessage() for record in caplog.records if record.name == "fakit.training.checkpoints"]
    assert (
        passed_over
        == f"{half} is not whole (trainer_state.json, which is written last, is missing) and is passed over."
    )
    ours, theirs = (load_file(folder / "student/model.safetensors") for folder in (tmp_path, whole))
    assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in ours)
    (a,), (b,) = RunStore(tmp_path / "runs").records(), RunStore(whole / "runs").records()
    assert (a["run_id"], a["steps"], a["test"], a["validation"]) == (
        b["run_id"],
        b["steps"],
        b["test"],
        b["validation"],
    )
    steps = [RunStore(folder / "runs").steps(a["run_id"]).to_dict("records") for folder in (tmp_path, whole)]
    assert steps[0] == steps[1] and len(steps[0]) == STEPS // EVERY


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "projections.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "objective.json",
    ],
)
def test_a_truncated_file_makes_a_checkpoint_one_that_is_passed_over(unbroken, name, tmp_path, caplog):
    folder = shutil.copytree(unbroken[1] / "student/checkpoints", tmp_path / "checkpoints")
    newest, before = folder / f"checkpoint-{STEPS}", folder / f"checkpoint-{STEPS - EVERY}"
    assert last_whole_checkpoint(folder) == newest and not caplog.records
    os.truncate(newest / name, (newest / name).stat().st_size * 2 // 3)
    assert last_whole_checkpoint(folder) == before
    assert f"{newest} is not whole ({name} is cut off or damaged" in caplog.text
    os.truncate(before / name, 0)
    assert last_whole_checkpoint(folder) is None


def test_no_folder_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) is None and last_whole_checkpoint(tmp_path / "none") is None


def test_another_number_of_processes_is_refused(unbroken):
    with pytest.raises(
        ValueError,
        match=r"checkpoint-200 holds the random states of 1 processes, and 2 were started.*--num_processes 1",
    ):
        last_whole_checkpoint(unbroken[1] / "student/checkpoints", processes=2)
