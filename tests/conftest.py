"""What holds for every test: no network, one thread, the same random numbers."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from pathlib import Path

# Before torch, transformers and datasets are imported, and handed on to every process that a test starts.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.slow import SLOW

torch.set_num_threads(1)
# The same examples in every run; and `seeded` below, which runs once a test, has nothing to do with them.
settings.register_profile(
    "fakit",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fakit")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.relative_to(HERE).as_posix().startswith(SLOW):
            item.add_marker(pytest.mark.slow)


def is_loopback(host: str) -> bool:
    """True for this machine's own addresses: `localhost`, 127.0.0.0/8, ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _guarded(connect):
    def guard(self: socket.socket, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(address[0]):
            # RuntimeError, not OSError: code that falls back quietly without a network must not hide the attempt.
            raise RuntimeError(f"A test asked for the network: {address}. Tests run offline; only loopback is allowed.")
        return connect(self, address)

    return guard


socket.socket.connect = _guarded(socket.socket.connect)
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same seeds, in whatever order and process it runs."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
