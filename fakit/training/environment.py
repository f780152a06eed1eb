"""What a result was made with: versions, machine and commit. One report, for records, notebooks,
pages and benchmarks.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("fakit", "torch", "transformers", "datasets", "peft", "bitsandbytes")


def environment(device: str | None = None) -> dict[str, Any]:
    """Versions, machine and commit.

    Args:
        device: the GPU to name, "cuda:1"; torch's current one by default.

    Returns:
        `versions`: python and each of `PACKAGES`, None where it is not installed. `machine`: system, processor, cores
            (that this
        process may use), threads (of torch), gpu (its name, or None). `commit`:
        of the checkout that fakit runs from, or None.
    """
    import torch

    return {
        "versions": {"python": platform.python_version()} | installed(*PACKAGES),
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if torch.cuda.is_available() else None,
        },
        "commit": _commit(),
    }


def installed(*packages: str) -> dict[str, str | None]:
    """Each package's version, None where it is not installed; nothing is imported."""
    return {package: _version(package) for package in packages}


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name: Linux keeps it in /proc/cpuinfo, where platform.processor() is empty."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that fakit runs from; None for an installed package or where git is missing."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
