"""The peers: what to install for each, the environment made for it, and what its script says."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks.measure import ROOT, run_json

FOLDER = ROOT / ".bench"


@dataclass(frozen=True)
class Peer:
    """A library, and the work of its script, `benchmarks/peers/with_NAME.py`.

    Attributes:
        package: installed without its dependencies, some of which would bring another torch, or torchvision.
        needs: what of them its script needs.
        work: the piece of work of `benchmarks.ways` that is fakit's side.
    """

    package: str
    needs: tuple[str, ...]
    work: str


PEERS = {
    "textbrewer": Peer("textbrewer==0.2.1.post1", ("tensorboard", "tqdm"), "all terms"),
    "silverspoon": Peer(
        "silverspoon-kd==0.1.0", ("accelerate", "datasets", "peft", "tqdm"), "hidden states, outputs, labels"
    ),
    "trl": Peer("trl==1.16.0", ("accelerate", "datasets", "jinja2", "pandas", "psutil"), "outputs"),
    "modelopt": Peer(
        "nvidia-modelopt==0.47.0",
        (
            "ninja",
            "nvidia-ml-py",
            "omegaconf",
            "pulp<4",
            "pydantic",
            "requests",
            "rich",
            "scipy",
            "setuptools>=80",
            "tqdm",
        ),
        "hidden states, outputs, labels",
    ),
}


def environment(name: str) -> Path:
    """The Python of a peer's environment in .bench/NAME; made first,
    where there is none or it was made for something else.

    Raises:
        ValueError: the installation failed; with the end of its message. Or torchvision came along, which breaks
            transformers beside a torch for CPUs.
    """
    peer, folder = PEERS[name], FOLDER / name
    python, stamp = folder / "bin" / "python", folder / ".installed"
    base = [f"torch=={torch.__version__.split('+')[0]}", f"transformers=={transformers.__version__}"]
    asked = hashlib.sha256(repr((base, peer, str(folder), sys.version)).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == asked:
        return python
    print(f"making an environment for {peer.package} in {folder}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    (FOLDER / ".gitignore").write_text("*\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for wanted in ([*base, *peer.needs], ["--no-deps", peer.package]):
        done = subprocess.run(pip + wanted, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(
                f"pip install {' '.join(wanted)} failed: {' | '.join(done.stderr.strip().splitlines()[-3:])}"
            )
    if any(folder.glob("lib/python*/site-packages/torchvision")):
        raise ValueError(f"{peer.package} brought torchvision into {folder}; none of {peer.needs} may depend on it.")
    stamp.write_text(asked)
    return python


def measure_peer(name: str, shape: tuple[int, int], quick: bool, repeats: int, python: Path | None = None) -> dict:
    """Seconds and peak MiB of a peer, of the hand-written loop in the same environment, and their ratios.

    A peer that cannot be installed or does not run, or whose loss trains nothing, is a finding: {"error": why}.
    """
    try:
        python = environment(name) if python is None else python
        script = [str(python), "-m", f"benchmarks.peers.with_{name}"]
        sizes = [*map(str, shape), "--repeats", str(repeats), *(["--quick"] if quick else [])]
        seconds = run_json([*script, "seconds", *sizes], malloc=False)
        memory = {way: run_json([*script, way, *sizes])["mebibytes"] for way in ("peer", "by hand")}
    except ValueError as error:
        return {"error": str(error)}
    return {
        "seconds": seconds["peer"],
        "seconds_by_hand": seconds["by hand"],
        "seconds_ratio": seconds["peer"] / seconds["by hand"],
        "memory": memory["peer"],
        "memory_by_hand": memory["by hand"],
        "memory_ratio": memory["peer"] / memory["by hand"],
        "loss": seconds["loss"],
        "note": seconds["note"],
    }
