"""The manifest of a cache and the checks that stand on it: whose it is, whether it is whole."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fakit.files import sha256, write_whole

VERSION = 2
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
        if key == "tokenizer" and None in (ours, theirs):  # not given on one side; token ids are in `data`
            continue
        if theirs != ours:
            raise ValueError(
                f"the cache at {folder} was made with another {name}: it has {_brief(theirs)}, this run has "
                f"{_brief(ours)}. Build into another folder, or delete this one."
            )


def check_shard(path: Path, shard: dict, verify: bool) -> None:
    """Raise ValueError when a shard is not the file that the manifest describes;
    `verify` reads it whole for its sha256.
    """
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


def _brief(value) -> str:
    text = str(value)
    return f"{text[:16]}…" if isinstance(value, str) and len(text) == 64 else text
