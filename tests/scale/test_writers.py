"""Two processes that each write for half of a step's rows train as one that writes for all of them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.scale import writers
from tests.scale.conftest import launch


def test_two_processes_write_as_one(tmp_path):
    writers.main(tmp_path / "one")
    launch("torchrun", "--standalone", "--nproc_per_node", "2", "tests/scale/writers.py", tmp_path / "two")
    ones, first, second = (
        json.loads((tmp_path / place / "seen.json").read_text()) for place in ("one/rank0", "two/rank0", "two/rank1")
    )
    assert first["summary"] == second["summary"]
    for name in writers.LOGGED:
        assert first[name] == pytest.approx(ones[name], rel=1e-4), name
    assert first["summary"] == pytest.approx(ones["summary"])
    assert 0 < ones["summary"]["share"] < 1 and len(set(ones["on_policy/tokens"])) > 1
    expected = load_file(tmp_path / "one/rank0/student.safetensors")
    for place in ("two/rank0", "two/rank1"):
        for name, p in load_file(tmp_path / place / "student.safetensors").items():
            assert torch.allclose(p, expected[name], atol=1e-5), name
