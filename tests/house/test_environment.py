"""One report of versions and machine, read alike by notebooks, pages and records."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from fakit.experiments.store import RunStore
from fakit.teaching import setup
from fakit.teaching.runner import machine
from fakit.training.environment import cores, environment, installed

ROOT = Path(__file__).parents[2]


def test_it_names_what_a_result_depends_on():
    found = json.loads(json.dumps(environment()))
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["processor"] and found["machine"]["system"]
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert (found["machine"]["gpu"] is not None) == torch.cuda.is_available()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert found["commit"] == (head.stdout.strip() if head.returncode == 0 else None)


def test_a_package_that_is_not_installed_has_no_version():
    assert installed("torch", "no-such-package") == {"torch": torch.__version__, "no-such-package": None}


def test_notebooks_pages_and_records_say_the_same(tmp_path):
    found = environment()
    manifest = RunStore.create(tmp_path / "runs").manifest
    assert {name: manifest[name] for name in found} == found
    facts, page = setup("quick").facts, machine()
    for name in ("torch", "transformers", "fakit"):
        assert facts[name] == page[name] == found["versions"][name]
    assert facts["threads"] == f"{torch.get_num_threads()} of {cores()} cores"
    assert f"{found['machine']['processor']}, {cores()} cores" in page["machine"]
    assert "GB free of" in facts["memory"]
