"""`TeacherCache`: build, open, and read as the traces that an objective takes."""

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm.auto import tqdm

from fakit.files import locked, sha256, whole
from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.models.blocks import check_model
from fakit.models.head_kinds import problem_type
from fakit.models.tables import check_data, tables
from fakit.objective.needs import LAYERS, Needs
from fakit.objective.objective import Objective
from fakit.tracing.trace import BY_TOKEN, Trace
from fakit.training.teacher_cache.build import DOCUMENTS, PER_ROW, describe, make_shard
from fakit.training.teacher_cache.content import CacheContent
from fakit.training.teacher_cache.fingerprints import (
    MODEL_INPUTS,
    combined,
    fingerprint,
    row_hashes,
    tokenizer_fingerprint,
)
from fakit.training.teacher_cache.manifest import VERSION, check_shard, read_manifest, refuse_foreign, write_manifest
from fakit.training.teacher_cache.packing import unpack, unpack_top_k

_SHARD_BYTES = 2**28  # what a shard may need in memory while it is made


class TeacherCache:
    """Teacher traces of a tokenized data set. Make one with `build`, reopen it with `open`, read it with `trace`.

    >>> cache = TeacherCache.build("cache/", teacher, dataset, objective)  # doctest: +SKIP
    >>> trainer = DistillationTrainer(  # doctest: +SKIP
    ...     None, student, objective, args, train_dataset=dataset, teacher_cache=cache
    ... )

    or in a loop of one's own, whose batches know their rows:

    >>> theirs = cache.trace(rows=[4, 1], attention_mask=batch["attention_mask"])  # doctest: +SKIP
    >>> objective(ours, theirs, labels)  # doctest: +SKIP
    """

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest = folder, manifest
        self.content = CacheContent(**manifest["content"])
        self._starts = list(accumulate((shard["rows"] for shard in manifest["shards"]), initial=0))
        self._shards: dict[int, dict[str, Tensor]] = {}  # memory-mapped when first read
        self._offsets: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        size = sum(shard["bytes"] for shard in self.manifest["shards"]) / 2**20
        return f"TeacherCache({len(self)} rows of {self.manifest['name']}, {size:.1f} MiB, {self.content})"

    # -- writing --------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        folder: str | Path,
        teacher: nn.Module,
        dataset,
        objective: Objective | None = None,
        *,
        needs: Needs | None = None,
        hidden_states: Iterable[int] = (),
        attentions: Iterable[int] = (),
        inputs: Iterable[str] = ("queries", "keys"),
        logits: bool = True,
        top_k: int | None = None,
        dtype: str = "bfloat16",
        tokenizer=None,
        batch_size: int = 32,
        padding_side: str = "right",
        shard_rows: int | None = None,
        attention_outputs: Iterable[int] = (),
    ) -> "TeacherCache":
        """Run the teacher over `dataset` and keep what is asked for; whole shards of an interrupted build are kept.

        Args:
            folder: made if missing. A finished cache of the same teacher, data and content is opened and returned; one
                that another process is building is waited for.
            teacher: frozen, in eval mode; it may be quantized.
            dataset: rows with input_ids (T,) and optionally what else the teacher's forward pass takes, an entry for
                each token (attention_mask, token_type_ids, position_ids, …); a `datasets.Dataset` or a list of dicts.
                Padding that a row carries is not stored. A row may pack several documents (position_ids that start
                again), if the teacher keeps them apart.
            objective: keep all that it may ask (`CacheContent.for_objective`), instead of naming layers.
            needs: the same for what an objective needs at this moment (`objective.needs("teacher")`).
            hidden_states, attentions, attention_outputs, inputs, logits: what to keep where there is neither: see
                `CacheContent`.
            top_k, dtype: how to keep it: see `CacheContent`.
            tokenizer: recorded by its fingerprint, if given, and compared when the cache is opened with one.
            padding_side: "left" for a classifier that looks at the last place of a batch (XLNet); others say the same
                either way.
            batch_size: rows that the teacher reads at once.
            shard_rows: rows a file; as many as make 256 MiB unless given.

        Raises:
            ValueError: an empty data set, a stream, rows that are not tokenized, are empty or differ in their columns,
                a teacher whose attention a cache cannot hold (named), a folder that holds the cache of something else,
                or whose finished shards are truncated or corrupt.
        """
        if hasattr(type(dataset), "__len__") and len(dataset) == 0:
            raise ValueError("the data set has no rows; nothing to cache.")
        check_model("the teacher", teacher)
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r}: rows are padded on the 'left' or on the 'right'.")
        for name, number in (("batch_size", batch_size), ("shard_rows", shard_rows)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}: the teacher reads at least 1 row at a time.")
        if objective is not None:
            content = CacheContent.for_objective(objective, top_k, dtype)
        elif needs is not None:
            content = CacheContent.for_needs(replace(needs, inputs=needs.inputs | set(inputs)), top_k, dtype)
        else:
            kept = (tuple(hidden_states), tuple(attentions), tuple(inputs), logits, top_k, dtype)
            content = CacheContent(*kept, tuple(attention_outputs))
        if not str(folder):
            raise ValueError("a cache needs a folder; found an empty name.")
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, and a cache is a folder; choose another name.")
        if not (folder / "manifest.json").is_file() and (others := _other_files(folder)):
            raise ValueError(
                f"{folder} holds {', '.join(others[:3])}{' …' if others[3:] else ''}, and no cache; give a new cache a "
                "folder of its own."
            )
        started = (folder / "manifest.json").is_file()
        check_data(dataset, TeacherCache, {"teacher": tables(teacher)}, "the data set", task=False)
        described = {} if started else describe(teacher, dataset, content)  # refuses before anything is written
        work = (folder, teacher, dataset, content, described, tokenizer, batch_size, padding_side, shard_rows)
        if started and not os.access(folder, os.W_OK):  # nothing to add to a finished one
            return cls._build(*work)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "build.lock"):  # of several processes one builds, the others wait and open what it built
            return cls._build(*work)

    @classmethod
    def _build(
        cls, folder: Path, teacher, dataset, content, described, tokenizer, batch_size, padding_side, shard_rows
    ):
        """The work of `build`, alone in the folder."""
        found = read_manifest(folder) if (folder / "manifest.json").is_file() else None
        columns = _columns(described if found is None else found)
        hashes = row_hashes(dataset, columns)
        manifest = {
            "version": VERSION,
            "teacher": fingerprint(teacher),
            "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
            "data": combined(hashes),
            "content": content.written(),
            "rows": len(dataset),
            "padding_side": padding_side,
        }
        if found is not None:
            refuse_foreign(folder, found, manifest)
            manifest = found
            _check_shards(folder, manifest)
        else:
            manifest |= described | {"shards": []}
        if shard_rows is None:
            shard_rows = max(1, _SHARD_BYTES // (sum(manifest["sizes"].values()) * manifest["longest"] or 1))
        done = sum(shard["rows"] for shard in manifest["shards"])
        for start in tqdm(range(done, len(dataset), shard_rows), "teacher cache", unit="shard", disable=None):
            numbers = range(start, min(start + shard_rows, len(dataset)))
            shard = make_shard(teacher, [dataset[i] for i in numbers], content, columns, batch_size, padding_side)
            shard[f"{PER_ROW}hash"] = torch.tensor([hashes[i] for i in numbers])
            path = folder / f"shard-{len(manifest['shards']):05d}.safetensors"
            with whole(path) as partial:
                save_file(shard, partial)
            manifest["shards"].append(
                {"file": path.name, "rows": len(numbers), "bytes": path.stat().st_size, "sha256": sha256(path)}
            )
            write_manifest(folder, manifest)
        return cls(folder, read_manifest(folder))

    # -- opening --------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls, folder: str | Path, teacher: nn.Module | None = None, dataset=None, tokenizer=None, verify: bool = True
    ) -> "TeacherCache":
        """Open a finished cache; with `teacher`, `dataset` and `tokenizer`, make sure that it is theirs.

        Args:
            verify: read every file whole, to compare its sha256; False looks at sizes alone.

        Raises:
            ValueError: no cache there, an unfinished one, one of another version, teacher, data set or tokenizer, a
                truncated or corrupt shard.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        asked = {**manifest, "version": VERSION}
        if teacher is not None:
            asked["teacher"] = fingerprint(teacher)
        if tokenizer is not None:
            asked["tokenizer"] = tokenizer_fingerprint(tokenizer)
        if dataset is not None:
            asked |= {"data": combined(row_hashes(dataset, _columns(manifest))), "rows": len(dataset)}
        refuse_foreign(folder, manifest, asked)
        done = sum(shard["rows"] for shard in manifest["shards"])
        if done != manifest["rows"]:
            raise ValueError(
                f"the cache at {folder} is unfinished: {done} of {manifest['rows']} rows; TeacherCache.build(…) with "
                "the same arguments goes on where it stopped."
            )
        _check_shards(folder, manifest, verify)
        return cls(folder, manifest)

    # -- reading --------------------------------------------------------------------------------------------------

    def trace(
        self,
        rows: Iterable[int],
        attention_mask: Tensor,
        needs: Needs | None = None,
        device: torch.device | None = None,
    ) -> Trace:
        """The teacher's trace of these rows, padded as the batch is, in float32.

        Args:
            rows: B row numbers of the data set the cache was built from, in the batch's order; more than B where the
                batch packs several of them into each of its rows, one after another.
            attention_mask: (B, T) of the batch, padded on either side. On a CPU, nothing waits for an accelerator.
            needs: read only this; all that the cache holds unless given.
            device: where the trace goes; the mask's unless given.

        Raises:
            ValueError: a row that the cache does not have, or whose length is not the batch's (truncated differently,
                or another data set).
        """
        device = attention_mask.device if device is None else device
        mask = attention_mask.cpu().bool()
        rows = [int(row) for row in rows]
        places = [self._place(row) for row in rows]
        self._check_lengths(rows, places, mask)
        # the batch's places that the stored tokens go to, (n,); None where there is no padding
        where = None if mask.all() else mask.flatten().nonzero().squeeze(1).to(device, non_blocking=True)

        def packed(key: str) -> dict[str, Tensor]:
            found = {}
            for suffix in ("", ".scale", ".indices", ".logsumexp", ".rest"):
                name = f"{key}{suffix}"
                if name in places[0][0]:
                    parts = [
                        shard[name][local : local + 1] if key.startswith(PER_ROW) else shard[name][first:last]
                        for shard, local, first, last in places
                    ]
                    found[suffix] = torch.cat(parts).to(device, non_blocking=True)
            return found

        def padded(values: Tensor) -> Tensor:  # (n, …) → (B, T, …)
            if where is not None:
                values = values.new_zeros(mask.numel(), *values.shape[1:]).index_copy_(0, where, values)
            return values.unflatten(0, mask.shape)

        def logits(key: str) -> Tensor:
            stored = packed(key)
            return unpack(stored) if self.content.top_k is None else unpack_top_k(stored, self.manifest["classes"])

        documents = _documents(places, mask)
        trace = Trace(
            mask=mask.to(device),
            documents=None if documents is None else documents.to(device),
            causal=self.manifest["causal"],
            problem_type=_problem_type(self.manifest["config"]),
            name=self.manifest["name"],
        )
        layers = {name: {*getattr(self.content, name)} for name in LAYERS}
        if needs is not None:
            layers = {name: kept & getattr(needs, name) for name, kept in layers.items()}
        for name in BY_TOKEN:
            for layer in sorted(layers[name]):
                getattr(trace, name)[layer] = padded(unpack(packed(f"{name}.{layer}")))
        for layer in sorted(layers["attentions"]):
            kept = {i: padded(unpack(packed(f"{i}.{layer}"))).transpose(1, 2) for i in self.content.inputs}
            trace.attention[layer] = self._attention(layer, kept, trace.mask, trace.documents)
        if self.content.logits and (needs is None or needs.logits):
            per_row = f"{PER_ROW}logits"
            trace.logits = logits(per_row) if per_row in places[0][0] else padded(logits("logits"))
        return trace

    def _attention(
        self, layer: int, kept: dict[str, Tensor], mask: Tensor, documents: Tensor | None
    ) -> AttentionInputs:
        """Attention inputs of a layer: queries (B, H, T, d_head), keys and values (B, H_kv, T, d_head); mask,
        documents (B, T).
        """
        settings = self.manifest["attention"][str(layer)]
        back, ahead = settings["back"], settings["ahead"]
        causal, allowed = ahead == 0, mask
        if back is not None or ahead not in (None, 0):  # a window
            near = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device)  # (T, T)
            near = near if back is None else near.triu(-back)
            near = near if ahead is None else near.tril(ahead)
            allowed = near & mask[:, None, None, :]  # (B, 1, T, T)
        sinks = settings["sinks"]
        return AttentionInputs(
            kept["queries"],
            kept["keys"],
            kept.get("values"),
            mask=allowed,
            scaling=settings["scaling"],
            causal=causal,
            softcap=settings["softcap"],
            sinks=None if sinks is None else torch.tensor(sinks, device=mask.device),
            documents=documents,
        )

    def _check_lengths(self, rows: list[int], places: list[tuple], mask: Tensor) -> None:
        lengths, wanted = [last - first for *_, first, last in places], mask.sum(1).tolist()
        if rows and len(rows) > len(mask):  # packed: some of them after one another make a row of the batch
            if PER_ROW + "logits" in places[0][0]:
                raise ValueError(
                    f"{len(rows)} rows of the cache asked for a batch of {len(mask)}: {self.manifest['name']} gives "
                    "one prediction a row, so its rows cannot be packed."
                )
            if {*accumulate(wanted)} <= {0, *accumulate(lengths)} and sum(wanted) == sum(lengths):
                return
            raise ValueError(
                f"{len(rows)} rows of the cache, of {lengths[:8]}{' …' if lengths[8:] else ''} tokens, asked for a "
                f"batch whose rows have {wanted[:8]}: they do not fill them one after another. Pack whole rows, or "
                "give one number a row."
            )
        if len(rows) != len(mask) or not rows:
            raise ValueError(f"{len(rows)} rows of the cache asked for a batch of {len(mask)}; give one number a row.")
        for row, found, length in zip(rows, lengths, wanted, strict=True):
            if found != length:
                raise ValueError(
                    f"row {row} of the cache has {found} tokens, the batch has {length}: the batch was tokenized or "
                    "truncated differently, or its rows are numbered differently, from the data set that the cache "
                    "was built from."
                )

    def _place(self, row: int) -> tuple[dict[str, Tensor], int, int, int]:
        """The shard of a row, its number there, and the range of its tokens."""
        if not 0 <= row < len(self):
            raise ValueError(f"row {row} asked of a cache of {len(self)} rows.")
        index = bisect_right(self._starts, row) - 1
        shard, local = self._shard(index), row - self._starts[index]
        first, last = self._offsets[index][local : local + 2]
        return shard, local, first, last

    def _shard(self, index: int) -> dict[str, Tensor]:
        if index not in self._shards:
            # tensors of a mapped file: only what is looked at is read
            with safe_open(self.folder / self.manifest["shards"][index]["file"], framework="pt") as shard:
                self._shards[index] = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 (no dict)
            self._offsets[index] = self._shards[index]["offsets"].tolist()
        return self._shards[index]

    # -- the rows of a data set -----------------------------------------------------------------------------------

    def rows_of(self, dataset) -> list[int]:
        """The number in the cache of every row of `dataset`, found by what the model is given: order,
        subsets and repeats do not matter.

        Raises:
            ValueError: a row that is not among those of the cache.
        """
        stored = torch.cat([self._shard(i)[f"{PER_ROW}hash"] for i in range(len(self.manifest["shards"]))])
        numbers = {number: row for row, number in enumerate(stored.tolist())}
        found = [numbers.get(number) for number in row_hashes(dataset, _columns(self.manifest))]
        foreign = [i for i, row in enumerate(found) if row is None]
        if foreign:
            raise ValueError(
                f"{len(foreign)} of the data set's {len(found)} rows (the first is row {foreign[0]}) are not among the "
                f"{len(self)} rows of the cache at {self.folder}: another data set, tokenizer or truncation. "
                "TeacherCache.build(folder, teacher, dataset) caches this one."
            )
        return found


def _documents(places: list[tuple], mask: Tensor) -> Tensor | None:
    """The number of each token's document in its row of the batch, int64 (B, T),
    each place of padding one of its own; None for one a row.
    """
    if len(places) == len(mask) and DOCUMENTS not in places[0][0]:
        return None
    numbers, after = [], 0
    for shard, _, first, last in places:
        own = shard[DOCUMENTS][first:last].long() if DOCUMENTS in shard else torch.zeros(last - first, dtype=torch.long)
        numbers.append(own + after)
        after = int(numbers[-1][-1]) + 1
    table = torch.full(mask.shape, -1).masked_scatter_(mask, torch.cat(numbers))  # (B, T)
    both = mask[:, 1:] & mask[:, :-1]
    begins = table.diff(dim=1) != 0
    if not (begins & both).any():
        return None
    return pad((begins | ~both).long().cumsum(1), (1, 0))


def _columns(manifest: dict) -> list[str]:
    """What the teacher is given of a row."""
    return manifest.get("columns", MODEL_INPUTS)  # caches made before it was written down


def _other_files(folder: Path) -> list[str]:
    """What lies in a folder and is not of a cache that is being built."""
    found = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(name for name in found if name != "build.lock" and not name.endswith(".partial"))


def _check_shards(folder: Path, manifest: dict, verify: bool = True) -> None:
    for shard in manifest["shards"]:
        check_shard(folder / shard["file"], shard, verify)


def _problem_type(config: dict) -> str | None:
    return problem_type(
        SimpleNamespace(problem_type=config.get("problem_type"), num_labels=len(config.get("id2label") or ()))
    )
