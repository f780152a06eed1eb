"""`TeacherCache`: build, open, and read as the traces that an objective takes."""

import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm.auto import tqdm

from fakit.files import check_room, locked
from fakit.models.blocks import check_model
from fakit.models.head_kinds import problem_type
from fakit.models.tables import check_data, tables
from fakit.objective.needs import LAYERS, Needs
from fakit.objective.objective import Objective
from fakit.tracing.trace import BY_TOKEN, Trace
from fakit.training.teacher_cache.build import KNOWN, counts_of, describe, make_shard
from fakit.training.teacher_cache.content import CacheContent
from fakit.training.teacher_cache.fingerprints import (
    combined,
    fingerprint,
    row_hashes,
    tokenizer_fingerprint,
)
from fakit.training.teacher_cache.manifest import (
    VERSION,
    append_shard,
    check_shards,
    columns_in,
    hashed_columns,
    is_finished,
    own_folder,
    read_manifest,
    refuse_foreign,
    refuse_missing,
)
from fakit.training.teacher_cache.packing import unpack, unpack_all, unpack_top_k
from fakit.training.teacher_cache.reading import Place, attention_of, check_lengths, documents_of
from fakit.training.teacher_cache.size import HASH, OFFSETS, PER_ROW, PlannedCache, planned_bytes, planned_cache

logger = logging.getLogger(__name__)

_SHARD_BYTES = 2**28  # what a shard may need in memory while it is made
_MANIFEST_BYTES = 2**14  # room for what the manifest says of one


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
        self._known: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        return (
            f"TeacherCache({len(self)} rows of {self.manifest['name']}, {self.bytes / 2**20:.1f} MiB, {self.content})"
        )

    @property
    def bytes(self) -> int:
        """Of its shards."""
        return sum(shard["bytes"] for shard in self.manifest["shards"])

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
        temperatures: Iterable[float] = (),
        tokens: str = "all",
    ) -> "TeacherCache":
        """Run the teacher over `dataset` and keep what is asked for; whole shards of an interrupted build are kept.

        Args:
            folder: made if missing. A finished cache of the same teacher and content that holds all of the rows is
                opened and returned; one that another process is building is waited for.
            teacher: frozen, in eval mode; it may be quantized.
            dataset: rows with input_ids (T,) and optionally what else the teacher's forward pass takes, an entry for
                each token (attention_mask, token_type_ids, position_ids, …); a `datasets.Dataset` or a list of dicts.
                Padding that a row carries is not stored. A row may pack several documents (position_ids that start
                again), if the teacher keeps them apart.
            objective: keep all that it may ask (`CacheContent.for_objective`), instead of naming layers.
            needs: the same for what an objective needs at this moment (`objective.needs("teacher")`).
            hidden_states, attentions, attention_outputs, inputs, logits: what to keep where there is neither: see
                `CacheContent`.
            top_k, dtype, temperatures, tokens: how to keep it: see `CacheContent`. With an objective, the temperatures
                are those of its output terms.
            tokenizer: recorded by its fingerprint, if given, and compared when the cache is opened with one.
            padding_side: "left" for a classifier that looks at the last place of a batch (XLNet); others say the same
                either way.
            batch_size: rows that the teacher reads at once.
            shard_rows: rows a file; as many as make 256 MiB unless given.

        Raises:
            ValueError: an empty data set, a stream, rows that are not tokenized, are empty or differ in their columns,
                a teacher whose attention a cache cannot hold (named), an objective that wants more than `top_k` and
                `tokens` keep, a folder that holds the cache of something else, whose finished shards are truncated or
                corrupt, or whose disk has no room for what is to be written.
        """
        taus, kept = tuple(temperatures), (tuple(hidden_states), tuple(attentions), tuple(inputs), logits, top_k, dtype)
        if objective is not None:
            content = CacheContent.for_objective(objective, top_k, dtype, tokens)
        elif needs is not None:
            needs = replace(needs, inputs=needs.inputs | set(inputs))
            content = CacheContent.for_needs(needs, top_k, dtype, taus, tokens)
        else:
            content = CacheContent(*kept, tuple(attention_outputs), temperatures=taus or (1.0,), tokens=tokens)
        work = cls._checked(
            folder, teacher, dataset, objective, content, tokenizer, batch_size, padding_side, shard_rows
        )
        folder = work[0]
        if (folder / "manifest.json").is_file() and not os.access(folder, os.W_OK):  # nothing to add to a finished one
            return cls._build(*work)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "build.lock"):  # of several processes one builds, the others wait and open what it built
            return cls._build(*work)

    @classmethod
    def plan(
        cls,
        folder: str | Path,
        teacher: nn.Module,
        dataset,
        objective: Objective,
        *,
        top_k: int | None = None,
        dtype: str = "bfloat16",
        tokenizer=None,
        shard_rows: int | None = None,
        tokens: str = "all",
    ) -> PlannedCache:
        """What `build` of the same would still write, to the byte. The teacher reads one row, the longest; nothing is
        written.

        Raises:
            ValueError: as `build`, but for a disk without room.
        """
        content = CacheContent.for_objective(objective, top_k, dtype, tokens)
        work = cls._checked(folder, teacher, dataset, objective, content, tokenizer, 32, "right", shard_rows)
        return cls._planned(*work)[0]

    @classmethod
    def _checked(cls, folder, teacher, dataset, objective, content, tokenizer, batch_size, padding_side, shard_rows):
        """The arguments of `_build`, after all that is refused before anything is written."""
        if hasattr(type(dataset), "__len__") and len(dataset) == 0:
            raise ValueError("the data set has no rows; nothing to cache.")
        check_model("the teacher", teacher)
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r}: rows are padded on the 'left' or on the 'right'.")
        for name, number in (("batch_size", batch_size), ("shard_rows", shard_rows)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}: the teacher reads at least 1 row at a time.")
        folder = own_folder(folder)
        started = (folder / "manifest.json").is_file()
        check_data(dataset, TeacherCache, {"teacher": tables(teacher)}, "the data set", task=False)
        described = {} if started else describe(teacher, dataset, content)  # refuses before anything is written
        if objective is not None and described and (missing := content.missing(objective, described["classes"])):
            raise ValueError(
                f"the objective {dict(objective.weights)} asks for what this cache would not hold: "
                f"{', '.join(missing)}. Keep all of the logits (top_k=None), or change the objective."
            )
        return folder, teacher, dataset, content, described, tokenizer, batch_size, padding_side, shard_rows

    @classmethod
    def _build(
        cls, folder: Path, teacher, dataset, content, described, tokenizer, batch_size, padding_side, shard_rows
    ):
        """The work of `build`, alone in the folder."""
        asked = (folder, teacher, dataset, content, described, tokenizer, batch_size, padding_side, shard_rows)
        planned, manifest, content, hashes, shard_rows = cls._planned(*asked)
        if manifest is None:  # of more rows, and finished
            return cls(folder, read_manifest(folder))
        if planned.rows and "layout" in manifest:
            check_room(folder, planned.bytes + _MANIFEST_BYTES * len(planned.files), "the teacher cache")
            logger.warning("%s", planned)
        columns = columns_in(manifest)
        for start in tqdm(range(planned.done, len(dataset), shard_rows), "teacher cache", unit="shard", disable=None):
            numbers = range(start, min(start + shard_rows, len(dataset)))
            shard = make_shard(teacher, [dataset[i] for i in numbers], content, columns, batch_size, padding_side)
            append_shard(folder, manifest, shard, [hashes[i] for i in numbers])
        return cls(folder, read_manifest(folder))

    @classmethod
    def _planned(
        cls, folder: Path, teacher, dataset, content, described, tokenizer, batch_size, padding_side, shard_rows
    ):
        """What is left to write, the manifest so far (None for a finished cache of more rows), the content, a hash of
        every row, and rows a file.
        """
        found = read_manifest(folder) if (folder / "manifest.json").is_file() else None
        if found is not None and (held := CacheContent(**found["content"])).serves(content):
            content = held
        of = described if found is None else found
        hashes = row_hashes(dataset, hashed_columns(of, content))
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
            refuse_foreign(folder, found, manifest | {key: found[key] for key in ("data", "rows")})
            if found["data"] != manifest["data"] and is_finished(found):
                check_shards(folder, found)
                cache = cls(folder, found)
                refuse_missing(folder, {*hashes}, {*cache.hashes()})
                return planned_cache(folder, [], [], False, len(cache)), None, content, hashes, shard_rows
            refuse_foreign(folder, found, manifest)
            manifest = found
            check_shards(folder, manifest)
        else:
            manifest |= described | {"shards": []}
        if shard_rows is None:
            shard_rows = max(1, _SHARD_BYTES // (sum(manifest["sizes"].values()) * manifest["longest"] or 1))
        done, labeled = sum(shard["rows"] for shard in manifest["shards"]), content.tokens != "all"
        counts = [] if is_finished(manifest) else counts_of(dataset, labeled)[done:]
        # of a cache from before there were layouts the bytes are not known
        sizes = planned_bytes(manifest["layout"], counts, shard_rows) if "layout" in manifest else []
        return planned_cache(folder, counts, sizes, labeled, done), manifest, content, hashes, shard_rows

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
            hashed = hashed_columns(manifest, CacheContent(**manifest["content"]))
            asked |= {"data": combined(row_hashes(dataset, hashed)), "rows": len(dataset)}
        refuse_foreign(folder, manifest, asked)
        if not is_finished(manifest):
            done = sum(shard["rows"] for shard in manifest["shards"])
            raise ValueError(
                f"the cache at {folder} is unfinished: {done} of {manifest['rows']} rows; TeacherCache.build(…) with "
                "the same arguments goes on where it stopped."
            )
        check_shards(folder, manifest, verify)
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
        by_row = f"{PER_ROW}logits" in (places[0].shard if places else ())
        check_lengths(self.manifest["name"], rows, [place.length for place in places], mask, by_row)
        # the batch's places that the stored tokens go to, (n,); None where there is no padding
        tokens = None if mask.all() else mask.flatten().nonzero().squeeze(1)
        known = None
        if KNOWN in places[0].shard:
            kept = torch.cat([place.shard[KNOWN][place.tokens] for place in places])  # bool (n,)
            known = torch.zeros_like(mask).masked_scatter_(mask, kept)  # (B, T)
        where = None if tokens is None else tokens.to(device, non_blocking=True)

        def packed(key: str) -> dict[str, Tensor]:
            found = {}
            for suffix in ("", ".scale", ".indices", ".logsumexp", ".rest"):
                name = f"{key}{suffix}"
                if name in places[0].shard:
                    parts = [place.shard[name][self._range(key, place)] for place in places]
                    found[suffix] = torch.cat(parts).to(device, non_blocking=True)
            return found

        def padded(values: Tensor, where: Tensor | None = where) -> Tensor:  # (n, …) → (B, T, …)
            if where is not None:
                values = values.new_zeros(mask.numel(), *values.shape[1:]).index_copy_(0, where, values)
            return values.unflatten(0, mask.shape)

        documents = documents_of(places, mask)
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
            settings = self.manifest["attention"][str(layer)]
            trace.attention[layer] = attention_of(settings, kept, trace.mask, trace.documents)
        if self.content.logits and (needs is None or needs.logits):
            stored, place = packed(f"{PER_ROW}logits" if by_row else "logits"), where
            if known is not None:
                place = known.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
                trace.logits_known = known.to(device)
            self._put_logits(trace, stored, (lambda x: x) if by_row else (lambda x: padded(x, place)))
        return trace

    def _put_logits(self, trace: Trace, stored: dict[str, Tensor], laid_out: Callable[[Tensor], Tensor]) -> None:
        classes = self.manifest["classes"]
        if self.content.top_k is None:
            trace.logits = laid_out(unpack(stored))
        elif self.content.top_k == classes:
            trace.logits = laid_out(unpack_all(stored, classes))
        else:
            trace.top_k = unpack_top_k(stored, classes, self.content.temperatures).map(laid_out)

    @staticmethod
    def _range(key: str, place: Place) -> slice:
        """Of a row's part of a tensor."""
        if key.startswith(PER_ROW):
            return slice(place.local, place.local + 1)
        return place.positions if key == "logits" else place.tokens

    def _place(self, row: int) -> Place:
        if not 0 <= row < len(self):
            raise ValueError(f"row {row} asked of a cache of {len(self)} rows.")
        index = bisect_right(self._starts, row) - 1
        shard, local = self._shard(index), row - self._starts[index]
        first, last = self._offsets[index][local : local + 2]
        known = self._known.get(index)
        positions = slice(first, last) if known is None else slice(known[first], known[last])
        return Place(shard, local, slice(first, last), positions)

    def _shard(self, index: int) -> dict[str, Tensor]:
        if index not in self._shards:
            # tensors of a mapped file: only what is looked at is read
            with safe_open(self.folder / self.manifest["shards"][index]["file"], framework="pt") as shard:
                self._shards[index] = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 (no dict)
            self._offsets[index] = self._shards[index][OFFSETS].tolist()
            if KNOWN in self._shards[index]:  # how many tokens with logits stand before each
                self._known[index] = pad(self._shards[index][KNOWN].long().cumsum(0), (1, 0)).tolist()
        return self._shards[index]

    # -- the rows of a data set -----------------------------------------------------------------------------------

    def hashes(self) -> list[int]:
        """Of every row, in order: `fingerprints.row_hashes`."""
        return torch.cat([self._shard(i)[HASH] for i in range(len(self.manifest["shards"]))]).tolist()

    def rows_of(self, dataset) -> list[int]:
        """The number in the cache of every row of `dataset`, found by what the model is given: order,
        subsets and repeats do not matter.

        Raises:
            ValueError: a row that is not among those of the cache.
        """
        numbers = {number: row for row, number in enumerate(self.hashes())}
        hashed = hashed_columns(self.manifest, self.content)
        found = [numbers.get(number) for number in row_hashes(dataset, hashed)]
        foreign = [i for i, row in enumerate(found) if row is None]
        if foreign:
            raise ValueError(
                f"{len(foreign)} of the data set's {len(found)} rows (the first is row {foreign[0]}) are not among the "
                f"{len(self)} rows of the cache at {self.folder}: another data set, tokenizer or truncation"
                f"{', or other labels' if self.content.tokens != 'all' else ''}. "
                "TeacherCache.build(folder, teacher, dataset) caches this one."
            )
        return found


def _problem_type(config: dict) -> str | None:
    return problem_type(
        SimpleNamespace(problem_type=config.get("problem_type"), num_labels=len(config.get("id2label") or ()))
    )
