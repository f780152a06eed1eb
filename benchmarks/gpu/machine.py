"""The card that checks run on: which it is, and, where there is none, why torch sees none and what to do."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import torch

from fakit.training.environment import environment, installed

# beside what `environment` names: what a check may want
PACKAGES = ("accelerate", "liger-kernel", "flash-attn", "triton", "kernels")


def find_device(asked: str) -> torch.device:
    """The device asked for: "auto" (the first GPU), "cuda", "cuda:1" or "cpu".

    Raises:
        ValueError: torch sees no such GPU; with the reason, as far as it can be known, and the way out.
    """
    if asked == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda" if asked == "auto" else asked)
    if device.type != "cuda":
        raise ValueError(f"device {asked!r} is not one of auto, cpu, cuda, cuda:0, cuda:1 …")
    found = torch.cuda.device_count()
    index = device.index or 0
    if index >= found:
        raise ValueError(f"{_why_none() if not found else f'torch sees {found} GPUs, numbered from 0.'} {_WITHOUT}")
    capability = "{}{}".format(*torch.cuda.get_device_capability(index))
    if not _built_for(capability):
        raise ValueError(
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[:-1]}.{capability[-1]}, and torch "
            f"{torch.__version__} was built for {', '.join(torch.cuda.get_arch_list())}. Install a build of an older "
            f"CUDA: {_pip('cu126')}. {_WITHOUT}"
        )
    return torch.device("cuda", index)


_WITHOUT = "What a CPU can run of it: make gpu ARGS='--device cpu'."


def _built_for(capability: str) -> bool:
    """Whether torch has kernels for a card, or code that its driver compiles for it (kernels run on later cards of the
    same generation, which the first digit names).
    """
    if torch.version.hip is not None:
        return True
    built = [arch.partition("_") for arch in torch.cuda.get_arch_list()]
    numbers = [(kind, number.rstrip("af")) for kind, _, number in built]
    return any(
        (kind == "sm" and number[:-1] == capability[:-1] and number <= capability)
        or (kind == "compute" and int(number) <= int(capability))
        for kind, number in numbers
    )


def _why_none() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        card = "" if shutil.which("nvidia-smi") is None else ", although the machine has nvidia-smi"
        return (
            f"torch {torch.__version__} is a build for CPUs{card}. pip took it from where its settings point (pip "
            f"config list); a build for CUDA: {_pip('cu130')} (pytorch.org/get-started names the builds; CUDA 13.0 "
            "wants a driver of 580 or newer)."
        )
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, and sees no GPU: nvidia-smi has to list "
        f"one, CUDA_VISIBLE_DEVICES must not hide it, and its driver must be as new as that CUDA (found: "
        f"{driver() or 'no driver'}; 13.0 wants 580). For an older driver: {_pip('cu126')}."
    )


def _pip(build: str) -> str:
    version = torch.__version__.partition("+")[0]
    url = f"https://download.pytorch.org/whl/{build}"
    return f"{sys.executable} -m pip install --force-reinstall torch=={version} --index-url {url}"


def driver() -> str | None:
    """The NVIDIA driver's version, by nvidia-smi; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def describe(device: torch.device) -> dict[str, Any]:
    """What a record says of the machine: card, driver, versions, commit, date."""
    found = environment(None if device.type == "cpu" else str(device))
    described = {
        "card": _card(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        described["memory_bytes"] = card.total_memory
        described["compute_capability"] = f"{card.major}.{card.minor}"
    return described | found | {"versions": found["versions"] | installed(*PACKAGES), "changed": changed()}


def _card(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}"


def changed() -> bool | None:
    """Whether files of the checkout differ from its commit; None outside of one."""
    try:
        done = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return bool(done.stdout.strip()) if done.returncode == 0 else None
