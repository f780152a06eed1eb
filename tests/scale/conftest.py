"""The same runs in one process, in two with DDP, and in two with FSDP: started once, looked at by many tests."""

# ruff: noqa: F811  (an argument that asks for a fixture has the fixture's name)
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fakit.experiments import ExperimentConfig
from tests.experiments.conftest import config, world  # noqa: F401 (fixtures: a toy teacher and texts on disk)
from tests.scale import ranks

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]


def launch(*command: str | Path) -> subprocess.CompletedProcess:
    """Run a command of this environment from the top of the repository; it must succeed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([BIN / command[0], *command[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return done


def experiment(world, path: Path, dropout: float = 0.0, **changes) -> ExperimentConfig:
    """Write an experiment on the toy world to `path`: all terms, a narrower student with projections.

    No dropout unless asked for: two processes do not draw what one would.
    """
    teacher = path.parent / "teacher"
    shutil.copytree(world / "teacher", teacher, dirs_exist_ok=True)
    settings = json.loads((teacher / "config.json").read_text())
    settings |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    (teacher / "config.json").write_text(json.dumps(settings))
    settings = {
        "task": {
            "name": str(world / "animals.jsonl"),
            "labels": 30,
            "options": {"validation": 40, "test": 60, "pool": 150},
        },
        "teacher": {"id": str(teacher)},
        "student": {"layers": 2, "hidden_size": 8},
        "attention": {"heads": "group-mean"},
        "training": {
            "steps": 6,
            "batch_size": 8,
            "log_every": 1,
            "eval_every": 3,
            "max_length": 16,
            "learning_rate": 1e-3,
            "bf16": False,  # the same on every processor
        },
        "device": "cpu",
    }
    made = ExperimentConfig.from_dict(settings).replace(**changes)
    made.to_yaml(path)
    return made


@pytest.fixture(scope="session")
def halves(world, tmp_path_factory) -> Path:
    """An experiment for two processes, each of which takes half of a global batch of eight."""
    path = tmp_path_factory.mktemp("halves") / "experiment.yaml"
    experiment(world, path, **{"training.batch_size": 4})
    return path


@pytest.fixture(scope="session")
def one(tmp_path_factory) -> Path:
    """What one process saw."""
    folder = tmp_path_factory.mktemp("one")
    ranks.main(folder)
    return folder


@pytest.fixture(scope="session")
def ddp(halves, tmp_path_factory) -> Path:
    """What two processes with DDP saw."""
    folder = tmp_path_factory.mktemp("ddp")
    launch("torchrun", "--standalone", "--nproc_per_node", "2", "tests/scale/ranks.py", folder, halves)
    return folder


@pytest.fixture(scope="session")
def fsdp(halves, tmp_path_factory) -> Path:
    """What two processes with FSDP2 saw."""
    folder = tmp_path_factory.mktemp("fsdp")
    launch(
        "accelerate",
        "launch",
        *FSDP,
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "tests/scale/ranks.py",
        folder,
        halves,
    )
    return folder


@pytest.fixture(params=["ddp", "fsdp"])
def two(request) -> Path:
    """What two processes saw, one way and the other."""
    return request.getfixturevalue(request.param)
