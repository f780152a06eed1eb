"""Training from a cache: every row of the data set carries its number in the cache through sampler and collator to the
step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import Dataset
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

from fakit.models.kinds import remember_causal
from fakit.objective.objective import Objective
from fakit.objective.positions import predicting_positions
from fakit.tracing.inputs import find_documents
from fakit.tracing.trace import Trace
from fakit.training.teacher_cache.build import predicting_tokens
from fakit.training.teacher_cache.cache import TeacherCache
from fakit.training.teacher_cache.fingerprints import config_values, fingerprint, tokenizer_fingerprint
from fakit.training.teacher_cache.manifest import refuse_foreign

# The column that says which row of the cache a row of the data set is; in a batch, what the collator made of it.
ROW = "cache_row"


@dataclass
class CachedRows:
    """Which rows of the cache a batch is made of, and where its tokens are. Stays on the CPU,
    so that reading waits for no accelerator.
    """

    rows: list[int]
    mask: Tensor  # bool (B, T)


class CachedRowsCollator:
    """Takes the row numbers off before a collator of any kind, and puts them on its batch as `CachedRows`.

    Args:
        collator: makes the batches.
        labeled: the cache holds logits only where the next token has a label in the rows.

    Raises:
        ValueError: a collator that changes tokens, leaves some out or mixes rows:
            the cached teacher read the rows as they are. With `labeled`, one that puts labels where the rows have none.
    """

    def __init__(self, collator: Callable, labeled: bool = False):
        self.collator, self.labeled = collator, labeled

    def __call__(self, features: Sequence[Mapping]) -> Mapping:
        if ROW not in features[0]:  # of evaluation
            return self.collator(features)
        batch = self.collator([{k: v for k, v in feature.items() if k != ROW} for feature in features])
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()  # (B, T)
        given = torch.cat([_tokens(feature) for feature in features])  # (tokens of all rows,)
        if not torch.equal(ids[mask], given.to(ids.dtype)):
            raise ValueError(
                f"{type(self.collator).__name__} made a batch {tuple(ids.shape)} whose {int(mask.sum())} tokens are "
                f"not the {len(given)} tokens of its {len(features)} rows: it masks, cuts or reorders them, and the "
                "cached teacher read the rows as they are. Change the tokens before the data set is cached, or train "
                "with the live teacher."
            )
        ours = _lengths(mask, find_documents(batch))
        theirs = [length for feature in features for length in _lengths(*_one_row(feature))]
        if ours != theirs:
            raise ValueError(
                f"{type(self.collator).__name__} made a batch {tuple(ids.shape)} of {len(features)} rows whose "
                f"documents have {_brief(theirs)} tokens, and the batch's have {_brief(ours)}: it joins rows without "
                "position_ids that start again, or starts them elsewhere, and the cached teacher read the rows as "
                "they are. Use DataCollatorWithFlattening, or one row a text."
            )
        if self.labeled:
            self._check_labels(batch, mask, features)
        batch[ROW] = CachedRows([int(feature[ROW]) for feature in features], mask)
        return batch

    def _check_labels(self, batch: Mapping, mask: Tensor, features: Sequence[Mapping]) -> None:
        documents = find_documents(batch)
        labels = Trace(mask=mask, documents=documents, causal=True).own_labels(batch.get("labels"))
        asked = pad(predicting_positions(mask, labels, True, documents), (0, 1))  # (B, T)
        known = torch.cat([predicting_tokens(feature, number) for number, feature in enumerate(features)])
        beyond = int((asked[mask] & ~known).sum())
        if beyond:
            raise ValueError(
                f"{type(self.collator).__name__} made a batch {tuple(mask.shape)} that compares outputs at {beyond} "
                "tokens whose next token has no label in the rows, and the cache holds the teacher's logits at labels "
                "alone. Put the labels into the rows before the data set is cached, or build the cache with "
                "tokens='all'."
            )


def _tokens(feature: Mapping) -> Tensor:
    ids = torch.as_tensor(feature["input_ids"])
    mask = feature.get("attention_mask")
    return ids if mask is None else ids[torch.as_tensor(mask).bool()]


def _one_row(feature: Mapping) -> tuple[Tensor, Tensor | None]:
    """The mask (1, T) of a row, and the numbers of its documents."""
    names = ("input_ids", "attention_mask", "position_ids", "seq_idx")
    row = {name: torch.as_tensor(feature[name])[None] for name in names if feature.get(name) is not None}
    return row.get("attention_mask", torch.ones_like(row["input_ids"])).bool(), find_documents(row)


def _lengths(mask: Tensor, documents: Tensor | None) -> list[int]:
    """Tokens of every document of a batch, in order."""
    if documents is None:
        return mask.sum(1).tolist()
    numbers = documents + torch.arange(len(mask), device=mask.device)[:, None] * mask.shape[1]
    return numbers[mask].unique_consecutive(return_counts=True)[1].tolist()


def _brief(lengths: list[int]) -> str:
    return f"{lengths[:6]}{' …' if lengths[6:] else ''}"


class _Numbered(Dataset):
    def __init__(self, dataset, rows: list[int]):
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return {**self.dataset[i], ROW: self.rows[i]}


def with_rows(cache: TeacherCache, dataset):
    """`dataset` with its rows' numbers in the cache, as the column "cache_row". A `datasets.Dataset` stays one.

    Raises:
        ValueError: a row that is not in the cache, or a data set without length, whose rows have no numbers.
    """
    import datasets

    if not hasattr(type(dataset), "__len__"):
        raise ValueError(
            f"{type(dataset).__name__} is a stream: it has no length and its rows have no numbers, so the cached "
            "teacher's answers cannot be found. Give a data set with rows (datasets.Dataset, a list), or train with "
            "the live teacher."
        )
    rows = cache.rows_of(dataset)
    if not isinstance(dataset, datasets.Dataset):
        return _Numbered(dataset, rows)
    kind, options = dataset.format["type"], dataset.format["format_kwargs"]
    columns = dataset.format["columns"]
    return dataset.with_format(None).add_column(ROW, rows).with_format(kind, columns=[*columns, ROW], **options)


class CachedTeacher:
    """The teacher's answers in training. Made before any work, so that a cache that does not fit is refused then.

    Args:
        cache: of the training data.
        objective: what it asks is compared with what the cache holds, now and in every step.
        teacher: if there is one, the cache must be its.
        tokenizer: the same.
    """

    def __init__(self, cache: TeacherCache, objective: Objective, teacher: nn.Module | None = None, tokenizer=None):
        asked = dict(cache.manifest)
        if teacher is not None:
            asked["teacher"] = fingerprint(teacher)
        if isinstance(tokenizer, PreTrainedTokenizerBase):  # a processor of images has no vocabulary
            asked["tokenizer"] = tokenizer_fingerprint(tokenizer)
        refuse_foreign(cache.folder, cache.manifest, asked)
        self.cache, self.objective = cache, objective
        self._check()

    def statistics(self, batch: CachedRows, device: torch.device) -> Trace:
        """All that the cache holds of the layers that the objective may ask for."""
        self._check()
        return self.cache.trace(batch.rows, batch.mask, device=device)

    def trace(self, batch: CachedRows, device: torch.device) -> Trace | None:
        """What the objective asks of the teacher at this moment; None where it asks nothing."""
        if not self.objective.needs_teacher():
            return None
        self._check()
        return self.cache.trace(batch.rows, batch.mask, self.objective.needs("teacher"), device)

    def _check(self) -> None:
        missing = self.cache.content.missing(self.objective, self.cache.manifest.get("classes"))
        if missing:
            raise ValueError(
                f"the objective {dict(self.objective.weights)} asks for what the cache at {self.cache.folder} does not "
                f"hold: {', '.join(missing)}. It holds {self.cache.content}. Build one with TeacherCache.build(folder, "
                "teacher, dataset, objective), or change weights and layer map."
            )


def recorded_teacher(cache: TeacherCache) -> nn.Module:
    """The teacher as the manifest describes it, on torch's meta device: class, configuration and shapes, no weights.

    Raises:
        ValueError: a class that transformers does not have.
    """
    manifest = cache.manifest
    if not hasattr(transformers, manifest["name"]):
        raise ValueError(
            f"the cache at {cache.folder} is of a {manifest['name']}, which is no class of transformers, so that "
            "nothing but its answers is known here; give the trainer the teacher, too: it will not be run."
        )
    values = config_values(manifest["config"])
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    with torch.device("meta"):
        teacher = getattr(transformers, manifest["name"])._from_config(config)
    remember_causal(teacher, manifest["causal"])
    return teacher.to(getattr(torch, manifest["precision"])).eval().requires_grad_(False)
