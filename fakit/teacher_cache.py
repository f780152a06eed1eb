"""What a frozen teacher says about a data set, on disk: computed once, read in every epoch and every run.

A cache is a folder: `manifest.json` says what it holds and whose it is, `shard-00000.safetensors` … hold rows in order, without padding.
Shards are written to a temporary name and renamed, so a killed build leaves only whole shards and goes on from there.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from fakit.capture import capture, is_causal_lm
from fakit.losses.attention_inputs import AttentionInputs
from fakit.trace import Trace

_VERSION = 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class CacheContent:
    """What one row keeps: layers of hidden states, layers of attention inputs, logits or not, and the stored precision."""

    hidden_states: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()
    logits: bool = True
    dtype: str = "bfloat16"


class TeacherCache:
    """Teacher traces of a tokenised data set. Make one with `build`, reopen it with `open`, read it with `trace`.

    >>> cache = TeacherCache.build("cache/", teacher, dataset, needs=objective.needs("teacher"))  # doctest: +SKIP
    >>> theirs = cache.trace(rows=[4, 1], attention_mask=batch["attention_mask"])  # doctest: +SKIP
    >>> objective(ours, theirs, labels)  # doctest: +SKIP
    """

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest = folder, manifest
        self.content = CacheContent(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in manifest["content"].items()}
        )
        self._starts = list(accumulate((shard["rows"] for shard in manifest["shards"]), initial=0))
        self._files = ExitStack()
        self._shards: dict[int, object] = {}  # opened when first read, memory-mapped

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        size = sum(shard["bytes"] for shard in self.manifest["shards"]) / 2**20
        return f"TeacherCache({len(self)} rows, {size:.1f} MiB, {self.content})"

    # -- writing --------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        folder: str | Path,
        teacher: nn.Module,
        dataset,
        needs=None,
        hidden_states: Iterable[int] = (),
        attentions: Iterable[int] = (),
        logits: bool = True,
        dtype: str = "bfloat16",
        batch_size: int = 32,
        shard_rows: int = 1024,
    ) -> "TeacherCache":
        """Run the teacher over `dataset` and keep what is asked for; whole shards of an interrupted build are kept.

        Args:
            folder: made if missing. A finished cache of the same teacher, data and content is opened and returned.
            teacher: frozen, in eval mode.
            dataset: rows with input_ids (T,) and optionally attention_mask, token_type_ids; a `datasets.Dataset` or a list of dicts.
            needs: what an objective needs (`objective.needs("teacher")`), instead of the next three.
            hidden_states, attentions, logits: what to keep, as in `capture`.
            dtype: "float32", "bfloat16" or "float16", of everything stored.

        Raises:
            ValueError: an empty data set, an unknown dtype, or a folder that holds the cache of something else.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} is not known; a cache stores {', '.join(_DTYPES)}.")
        if len(dataset) == 0:
            raise ValueError("the data set has no rows; nothing to cache.")
        if needs is not None:
            hidden_states, attentions, logits = needs.hidden_states, needs.attentions, needs.logits
        content = CacheContent(tuple(sorted(hidden_states)), tuple(sorted(attentions)), logits, dtype)
        folder = Path(folder)
        manifest = {
            "version": _VERSION,
            "teacher": fingerprint(teacher),
            "data": data_fingerprint(dataset),
            "content": asdict(content),
            "rows": len(dataset),
            "causal": is_causal_lm(teacher),
            "name": type(teacher).__name__,
            "shards": [],
        }
        if (folder / "manifest.json").is_file():
            found = _read_manifest(folder)
            _refuse_foreign(folder, found, manifest)
            manifest = found
        folder.mkdir(parents=True, exist_ok=True)
        for start in tqdm(
            range(sum(s["rows"] for s in manifest["shards"]), len(dataset), shard_rows), "teacher cache", unit="shard"
        ):
            rows = [dataset[i] for i in range(start, min(start + shard_rows, len(dataset)))]
            path = folder / f"shard-{len(manifest['shards']):05d}.safetensors"
            partial = path.with_suffix(".partial")
            save_file(_run(teacher, rows, content, batch_size, manifest), partial)
            partial.replace(path)
            manifest["shards"].append(
                {"file": path.name, "rows": len(rows), "bytes": path.stat().st_size, "sha256": _sha256(path)}
            )
            _write_manifest(folder, manifest)
        return cls(folder, manifest)

    # -- reading --------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls, folder: str | Path, teacher: nn.Module | None = None, dataset=None, verify: bool = True
    ) -> "TeacherCache":
        """Open a finished cache; with `teacher` and `dataset`, make sure that it is theirs.

        Raises:
            ValueError: no cache there, an unfinished one, one of another version, teacher or data set, a truncated or corrupt shard.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        asked = {**manifest, "version": _VERSION}
        if teacher is not None:
            asked["teacher"] = fingerprint(teacher)
        if dataset is not None:
            asked |= {"data": data_fingerprint(dataset), "rows": len(dataset)}
        _refuse_foreign(folder, manifest, asked)
        done = sum(shard["rows"] for shard in manifest["shards"])
        if done != manifest["rows"]:
            raise ValueError(
                f"the cache at {folder} is unfinished: {done} of {manifest['rows']} rows; TeacherCache.build(…) with the same "
                "arguments goes on where it stopped."
            )
        for shard in manifest["shards"]:
            _check_shard(folder / shard["file"], shard, verify)
        return cls(folder, manifest)

    def trace(self, rows: Iterable[int], attention_mask: Tensor) -> Trace:
        """The teacher's trace of these rows, padded as the batch is, in float32.

        Args:
            rows: B row numbers of the data set the cache was built from, in the batch's order.
            attention_mask: (B, T) of the batch.

        Raises:
            ValueError: a row that the cache does not have, or whose length is not the batch's (truncated differently, or another data set).
        """
        rows = [int(row) for row in rows]
        mask = attention_mask.bool()
        stored = [self._row(row) for row in rows]
        for row, tensors, length in zip(rows, stored, mask.sum(1).tolist(), strict=True):
            if tensors["length"] != length:
                raise ValueError(
                    f"row {row} of the cache has {tensors['length']} tokens, the batch has {length}: the batch was tokenised or truncated "
                    "differently, or its rows are numbered differently, from the data set that the cache was built from."
                )
        trace = Trace(mask=mask, causal=self.manifest["causal"], name=self.manifest["name"])

        def padded(key: str) -> Tensor:  # (B, T, …) float32, at the places of the batch's tokens, on its device
            values = [tensors[key].float() for tensors in stored]
            full = torch.zeros(*mask.shape, *values[0].shape[1:], device=mask.device)
            full[mask] = torch.cat(values).to(mask.device)
            return full

        for layer in self.content.hidden_states:
            trace.hidden_states[layer] = padded(f"hidden_states.{layer}")
        for layer in self.content.attentions:
            query, key, value = (padded(f"{name}.{layer}").transpose(1, 2) for name in ("queries", "keys", "values"))
            settings = self.manifest["attention"][str(layer)]
            trace.attention[layer] = AttentionInputs(query, key, value, mask=mask[:, None, None, :], **settings)
        if self.content.logits:
            if stored[0]["logits"].dim() == 2:
                trace.logits = padded("logits")
            else:
                trace.logits = torch.stack([tensors["logits"].float() for tensors in stored]).to(mask.device)
        return trace

    def _row(self, row: int) -> dict[str, Tensor | int]:
        if not 0 <= row < len(self):
            raise ValueError(f"row {row} asked of a cache of {len(self)} rows.")
        index = bisect_right(self._starts, row) - 1
        if index not in self._shards:
            path = self.folder / self.manifest["shards"][index]["file"]
            shard = self._files.enter_context(safe_open(path, framework="pt"))
            self._shards[index] = (shard, shard.get_tensor("offsets").tolist())
        shard, offsets = self._shards[index]
        local = row - self._starts[index]
        first, last = offsets[local], offsets[local + 1]
        tensors: dict[str, Tensor | int] = {"length": last - first}
        for key in shard.keys():  # noqa: SIM118 (a safetensors file, not a dict)
            if key == "logits.sequence":
                tensors["logits"] = shard.get_slice(key)[local : local + 1][0]
            elif key != "offsets":
                tensors[key] = shard.get_slice(key)[first:last]
        return tensors


# -- fingerprints and files -------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> str:
    """sha256 over the names, shapes, dtypes and bytes of all weights, and the configuration that shapes the forward pass."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def data_fingerprint(dataset) -> str:
    """sha256 over input_ids, attention_mask and token_type_ids of every row: tokeniser, truncation and order are all in it."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(
            json.dumps([_list(row.get(k)) for k in ("input_ids", "attention_mask", "token_type_ids")]).encode()
        )
    return digest.hexdigest()


def _list(values):
    return values.tolist() if isinstance(values, Tensor) else values


def _run(
    teacher: nn.Module, rows: list[Mapping], content: CacheContent, batch_size: int, manifest: dict
) -> dict[str, Tensor]:
    """One shard: {key: (sum of lengths, …)}, rows one after another."""
    dtype = _DTYPES[content.dtype]
    lengths = [len(row["input_ids"]) for row in rows]
    kept: list[dict[str, Tensor] | None] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: lengths[i])  # neighbours of one length need little padding
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = _pad([rows[i] for i in indices])
        with torch.no_grad():
            trace = capture(teacher, batch, content.hidden_states, content.attentions, content.logits)
        manifest["attention"] = {str(i): _settings(a) for i, a in trace.attention.items()}
        for b, i in enumerate(indices):
            n = lengths[i]
            tensors = {f"hidden_states.{k}": h[b, :n] for k, h in trace.hidden_states.items()}
            for name in ("queries", "keys", "values"):
                tensors |= {f"{name}.{k}": x[b, :, :n].transpose(0, 1) for k, x in getattr(trace, name).items()}
            if content.logits:
                per_token = trace.logits.dim() == 3
                tensors["logits" if per_token else "logits.sequence"] = (
                    trace.logits[b, :n] if per_token else trace.logits[b : b + 1]
                )
            kept[i] = {key: value.to("cpu", dtype) for key, value in tensors.items()}
    shard = {key: torch.cat([tensors[key] for tensors in kept]).contiguous() for key in kept[0]}
    shard["offsets"] = torch.tensor([0, *accumulate(lengths)])
    return shard


def _settings(attention: AttentionInputs) -> dict:
    if attention.position_bias is not None:
        raise ValueError(
            "this teacher adds a position bias to its attention scores, which a cache of queries and keys does not hold; "
            "cache hidden states and logits, and align attention with the live teacher."
        )
    # a causal layer's mask comes with the batch there and by this flag here
    causal = attention.causal or _is_causal_mask(attention.mask)
    return {"scaling": float(attention.scaling), "causal": causal, "softcap": attention.softcap}


def _is_causal_mask(mask: Tensor | None) -> bool:
    if mask is None or mask.dim() != 4 or mask.shape[-2] == 1:
        return False
    allowed = mask if mask.dtype == torch.bool else mask >= 0  # (B, 1, T, T)
    causal = not allowed.triu(1).any()
    if causal and not torch.equal(allowed.any(1).any(0), torch.ones_like(allowed[0, 0]).tril()):
        raise ValueError(
            "this teacher's attention is narrower than causal (a sliding window), which a cache does not hold; cache hidden "
            "states and logits, and align attention with the live teacher."
        )
    return causal


def _pad(rows: list[Mapping]) -> dict[str, Tensor]:
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in rows[0]]
    batch = {name: pad_sequence([torch.as_tensor(row[name]) for row in rows], batch_first=True) for name in names}
    if "attention_mask" not in batch:
        ones = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
        batch["attention_mask"] = pad_sequence(ones, batch_first=True)
    return batch


def _read_manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(
            f"no teacher cache at {folder}: manifest.json is missing; TeacherCache.build(folder, teacher, dataset) makes one."
        )
    try:
        manifest = json.loads(path.read_text())
        manifest["version"], manifest["content"], manifest["shards"]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is no manifest of a teacher cache ({error!r}); delete the folder and build it again."
        ) from error
    return manifest


def _write_manifest(folder: Path, manifest: dict) -> None:
    partial = folder / "manifest.partial"
    partial.write_text(json.dumps(manifest, indent=1))
    partial.replace(folder / "manifest.json")


def _refuse_foreign(folder: Path, found: dict, asked: dict) -> None:
    names = {
        "version": "format version",
        "teacher": "teacher weights",
        "data": "tokenised data",
        "rows": "number of rows",
        "content": "content",
    }
    for key, name in names.items():
        ours = json.loads(json.dumps(asked[key]))  # tuples become lists, as in the file
        if found[key] != ours:
            raise ValueError(
                f"the cache at {folder} was made with another {name}: it has {_brief(found[key])}, this run has {_brief(ours)}. "
                "Build into another folder, or delete this one."
            )


def _check_shard(path: Path, shard: dict, verify: bool) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing from its cache; delete the folder and build it again.")
    if path.stat().st_size != shard["bytes"]:
        raise ValueError(
            f"{path} is truncated or was changed: {path.stat().st_size} bytes, the manifest says {shard['bytes']}; delete the folder and "
            "build it again."
        )
    if verify and _sha256(path) != shard["sha256"]:
        raise ValueError(f"{path} is corrupt: its sha256 is not the manifest's; delete the folder and build it again.")
    try:
        with safe_open(path, framework="pt") as tensors:
            tensors.get_slice("offsets")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); delete the folder and build it again.") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _brief(value) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:16] + "…"
