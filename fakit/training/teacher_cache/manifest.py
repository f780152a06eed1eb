"""The manifest of a cache and the checks that stand on it: whose it is, whether it is whole."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fakit.files import sha256, whole, write_whole
from fakit.training.teacher_cache.content import CacheContent
from fakit.training.teacher_cache.fingerprints import MODEL_INPUTS
from fakit.training.teacher_cache.size import HASH

VERSION = 2
# What stands for the fingerprint of a teacher whose answers came as files begins so.
PUBLISHED = "published:"
_KEYS = ("version", "teacher", "tokenizer", "data", "rows", "content", "name", "config", "causal", "sizes", "shards")


def read_manifest(folder: Path) -> dict:
    """The manifest of the cache in `folder`, or a ValueError that says why there is none."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"no teacher cache at {folder}: manifest.json is missing; TeacherCache.build(folder, teacher, dataset) "
            "makes one."
        )
    try:
        manifest = json.loads(path.read_text())
        if "teacher" not in manifest:
            raise ValueError(f"it holds {', '.join(list(manifest)[:6])}")
        version = manifest["version"]
        missing = [key for key in _KEYS if key not in manifest] if version == VERSION else []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no manifest of a teacher cache ({error!r}): the folder is something else's, or damaged. Give a "
            "folder of its own."
        ) from error
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; delete the folder and build it again.")
    return manifest


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write it whole or not at all."""
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1))


def append_shard(folder: Path, manifest: dict, shard: dict[str, Tensor], hashes: Sequence[int]) -> None:
    """Write a shard, whole or not at all, and what the manifest says of it. `hashes`: of its rows."""
    path = folder / f"shard-{len(manifest['shards']):05d}.safetensors"
    with whole(path) as partial:
        save_file(shard | {HASH: torch.tensor(hashes)}, partial)
    manifest["shards"].append(
        {"file": path.name, "rows": len(hashes), "bytes": path.stat().st_size, "sha256": sha256(path)}
    )
    write_manifest(folder, manifest)


def refuse_foreign(folder: Path, found: dict, asked: dict) -> None:
    """Raise ValueError when the cache that was found is not the one that is asked for: what both are, and the fix."""
    names = {
        "version": "format version",
        "teacher": "teacher weights",
        "tokenizer": "tokenizer",
        "data": "tokenized data",
        "rows": "number of rows",
        "content": "content",
        "padding_side": "side of the padding",
    }
    for key, name in names.items():
        default = "right" if key == "padding_side" else None  # caches made before it was written down
        ours, theirs = (
            json.loads(json.dumps(side.get(key, default))) for side in (asked, found)
        )  # a file has no tuples
        if key == "teacher" and PUBLISHED in (str(ours)[: len(PUBLISHED)], str(theirs)[: len(PUBLISHED)]):
            continue  # nobody knows its weights
        if key == "tokenizer" and None in (ours, theirs):  # not given on one side; token ids are in `data`
            continue
        if theirs != ours:
            raise ValueError(
                f"the cache at {folder} was made with another {name}: it has {_brief(theirs)}, this run has "
                f"{_brief(ours)}. Build into another folder, or delete this one."
            )


def refuse_missing(folder: Path, asked: set[int], held: set[int]) -> None:
    """Raise ValueError when texts are asked for, by their hashes, that a finished cache does not hold."""
    if lacking := len(asked - held):
        raise ValueError(
            f"the cache at {folder} was made with another tokenized data set: {lacking} of the {len(asked)} texts "
            f"asked for are not among its {len(held)}. Build into another folder, or delete this one; runs of one task "
            "that see different texts of it (other seeds or steps) may share a cache of all (--cache-rows all)."
        )


def _check_shard(path: Path, shard: dict, verify: bool) -> None:
    again = "delete the folder and build it again."
    if not path.is_file():
        raise ValueError(
            f"{path} is missing from its cache, whose manifest lists it with {shard['bytes']} bytes; {again}"
        )
    if path.stat().st_size != shard["bytes"]:
        raise ValueError(
            f"{path} is truncated or was changed: {path.stat().st_size} bytes, the manifest says {shard['bytes']}; "
            f"{again}"
        )
    if verify and (found := sha256(path)) != shard["sha256"]:
        raise ValueError(
            f"{path} is corrupt: its sha256 is {_brief(found)}, the manifest says {_brief(shard['sha256'])}; {again}"
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            tensors.get_slice("offsets")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); {again}") from error


def check_shards(folder: Path, manifest: dict, verify: bool = True) -> None:
    """Raise ValueError when a shard is not the file that the manifest describes;
    `verify` reads each whole for its sha256.
    """
    for shard in manifest["shards"]:
        _check_shard(folder / shard["file"], shard, verify)


def is_finished(manifest: dict) -> bool:
    """True where all rows are in shards."""
    return sum(shard["rows"] for shard in manifest["shards"]) == manifest["rows"]


def columns_in(manifest: dict) -> Sequence[str]:
    """What the teacher was given of a row."""
    return manifest.get("columns", MODEL_INPUTS)  # caches made before it was written down


def hashed_columns(manifest: dict, content: CacheContent) -> list[str]:
    """What rows are told apart by: what the teacher was given, and labels where they say what is kept."""
    return [*columns_in(manifest), *(["labels"] if content.tokens != "all" else [])]


def own_folder(folder: str | Path) -> Path:
    """The folder of a cache, which may be missing.

    Raises:
        ValueError: an empty name, a file, or a folder that holds other files and no cache.
    """
    if not str(folder):
        raise ValueError("a cache needs a folder; found an empty name.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a cache is a folder; choose another name.")
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # what is of a cache that is being built
    others = sorted(name for name in found if name != "build.lock" and not name.endswith(".partial"))
    if others and "manifest.json" not in found:
        raise ValueError(
            f"{folder} holds {', '.join(others[:3])}{' …' if others[3:] else ''}, and no cache; give a new cache a "
            "folder of its own."
        )
    return folder


def _brief(value) -> str:
    text = str(value)
    return f"{text[:16]}…" if isinstance(value, str) and len(text) == 64 else text
