"""Packed rows, looked at before the first step: whether the models keep documents apart, and the terms do.

A model is asked by `fakit.tracing.inputs.refuse_mixing`. A term is asked here: its value over the first packed batch
must be its value over the same numbers with each document in a row of its own. Terms that take a row for one text, such
as the mean of its tokens, give other numbers, and are refused with both.
"""

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, PreTrainedModel, TrainingArguments

from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.models.random_state import random_state_kept
from fakit.objective.comparison import compare
from fakit.objective.needs import LAYERS, Needs
from fakit.objective.objective import Objective
from fakit.objective.term import Term
from fakit.objective.units import Units
from fakit.tracing.capture import capture
from fakit.tracing.inputs import evaluated, find_documents, refuse_mixing
from fakit.tracing.trace import BY_TOKEN, Trace
from fakit.training.teacher_cache import TeacherCache
from fakit.training.teacher_cache.training import ROW, CachedTeacher

_COLUMNS = ("input_ids", "attention_mask", "position_ids", "seq_idx", "labels", ROW)
_JOINED = 4  # rows that a flattening collator is given
_ROUNDING = 1e-4  # the same numbers, summed in another order


def check_packed(
    dataset,
    collator: Callable,
    objective: Objective,
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    args: TrainingArguments,
    cached: CachedTeacher | None = None,
) -> None:
    """Raise ValueError where training rows pack several documents and a model or a term mixes them.

    Args:
        dataset, collator: of the training rows. Streams are not looked at, since that would use them up.
        cached: reads the teacher, where it is a cache.
    """
    with random_state_kept(args.device):
        batch = _packed_batch(dataset, collator)
    if batch is None:
        return
    rows, joined = batch.pop(ROW, None), _joins(collator)
    # a teacher that is cached has been asked when it was read
    models = {"student": student} | ({"teacher": teacher} if teacher is not None and cached is None else {})
    check_models(batch if joined else dataset, 1 if joined else args.per_device_train_batch_size, **models)
    asked = {name: objective.needs_of(name, "teacher") for name in objective.terms}
    theirs = None
    if cached is not None:
        asked = {n: needs for n, needs in asked.items() if _holds(cached.cache, objective.terms[n], needs)}
        theirs = partial(cached.statistics, rows, args.device) if any(asked.values()) else None
    check_terms(objective, list(asked), student, models.get("teacher"), batch, theirs)


def _holds(cache: TeacherCache, term: Term, needs: Needs) -> bool:
    """Whether a cache can answer a term; one that it cannot is refused when its weight is set above 0."""
    content = cache.content
    lacking = needs.logits and any(content.missing_logits(term, cache.manifest.get("classes")))
    layers = all(getattr(needs, name) <= set(getattr(content, name)) for name in LAYERS)
    return layers and not lacking and not needs.lens


def _joins(collator: Callable) -> bool:
    return isinstance(getattr(collator, "collator", collator), DataCollatorWithFlattening)


def _packed_batch(dataset, collator: Callable) -> MutableMapping | None:
    """A batch that packs several documents into a row, as the collator makes it of the first rows that do; None where
    none does.
    """
    if not hasattr(type(dataset), "__len__") or len(dataset) == 0:
        return None
    names = getattr(dataset, "column_names", None) or _names(dataset[0])
    if "input_ids" not in names or not (_joins(collator) or {"position_ids", "seq_idx"} & set(names)):
        return None
    given = (dataset[i] for i in range(len(dataset)))
    rows = ({name: row[name] for name in _COLUMNS if name in row} for row in given)
    chosen = list(islice(rows, _JOINED)) if _joins(collator) else list(islice(filter(_is_packed, rows), 1))
    return collator(chosen) if chosen else None


def _names(row: Any) -> list[str]:
    return list(row) if isinstance(row, Mapping) else []


def _is_packed(row: Mapping) -> bool:
    given = {name: torch.as_tensor(row[name])[None] for name in ("input_ids", "position_ids", "seq_idx") if name in row}
    return find_documents(given) is not None


def check_models(rows: Mapping | Sequence, batch_size: int, **models: PreTrainedModel) -> None:
    """Raise ValueError for a model that mixes the documents of packed rows.

    Args:
        rows: all of them, or a batch.
        batch_size: rows that a model reads at once.
        models: by side.
    """
    for side, model in models.items():
        refuse_mixing(model, batch_size)
        if (chunk := getattr(model.config.get_text_config(), "attention_chunk_size", None)) is None:
            continue
        ids = rows["input_ids"] if isinstance(rows, Mapping) else (row["input_ids"] for row in rows)
        if (longest := max(map(len, ids))) > chunk:
            raise ValueError(
                f"rows are packed to {longest} tokens, and the {side} ({type(model).__name__}) attends in chunks of "
                f"{chunk}, which would begin in the middle of a document; cut the rows to {chunk} tokens "
                f"(training.max_length: {chunk}), or leave packing out."
            )


def check_terms(
    objective: Objective,
    names: Sequence[str],
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: Mapping[str, Tensor],
    theirs: Callable[[], Trace | None] | None = None,
) -> None:
    """Raise ValueError for a term whose value over a packed batch is not that over its documents in rows of their own.

    Nothing is changed: not the objective, the models' modes or the random numbers.

    Args:
        names: of the terms that are asked.
        batch: of packed rows.
        theirs: gives the teacher's trace of the batch where it comes from a cache.
    """
    made = copy.deepcopy(objective)
    unfitted = not all(made.standardizations.values())
    ours_needed, theirs_needed = Needs(), Needs()
    for name in names:
        term = made.terms[name]
        ours_needed = ours_needed | made.needs_of(name, "student")
        own = Needs.of(term.cached(), f"the {name} term's cached()") if unfitted else made.needs_of(name, "teacher")
        theirs_needed = theirs_needed | own
    device = next(student.parameters()).device
    with torch.no_grad(), random_state_kept(device), evaluated(student):
        ours = capture(student, batch, **ours_needed.asked())
        if theirs is not None:
            given = theirs()
        else:
            given = capture(teacher, batch, **theirs_needed.asked()) if teacher is not None and theirs_needed else None
        given = None if given is None else _moved(given, device)
        labels = batch.get("labels")
        labels = None if labels is None else labels.to(device)
        _make_ready(made.to(device), given, unfitted)
        found = _values(made, names, ours, given, labels)
        split = Split(ours)
        wanted = _values(
            made,
            names,
            split(ours),
            None if given is None else split(given),
            None if labels is None else split.labels(labels),
        )
    for name, value in wanted.items():
        if not torch.isclose(found[name], value, rtol=_ROUNDING, atol=1e-7):
            raise ValueError(
                f"the rows are packed, and the {name} term ({type(made.terms[name]).__name__}) takes a row for one "
                f"text: over {len(split.rows)} documents it is {found[name].item():.6g} packed, and {value.item():.6g} "
                "where each has a row of its own. Leave packing out, or this term."
            )


def _make_ready(made: Objective, teacher: Trace | None, unfitted: bool) -> None:
    """What is gathered before the first step, gathered of one batch, or of none: any will do."""
    if unfitted and teacher is not None:
        made.fit_standardization([teacher])
    for term in made.of_kind(Units).values():
        for scores in filter(None, map(term.scores, term.layers())):
            if not int(scores.tokens):
                scores.scores.copy_(torch.arange(len(scores.scores)))
                scores.tokens.fill_(1)


def _values(made: Objective, names: Sequence[str], ours: Trace, theirs: Trace | None, labels) -> dict[str, Tensor]:
    own = copy.deepcopy(made).terms  # what a term keeps from batch to batch is as it was
    labels = ours.own_labels(labels)
    terms = {
        name: term for name, term in own.items() if name in names and (labels is not None or not term.needs_labels)
    }
    return compare(terms, dict.fromkeys(terms, 1.0), ours, theirs, labels, {}).values


class Split:
    """From traces of packed rows to traces of the same numbers in which each document has a row of its own.

    Attributes:
        rows: (N,), the packed row of each of the N documents.
        places: (N, T'), where in it the document's tokens are; anywhere in padding.
        mask: bool (N, T').
    """

    def __init__(self, trace: Trace):
        documents, mask = trace.documents, trace.mask
        assert documents is not None and mask is not None, "of packed rows"
        found = [
            (row, ((documents[row] == number) & mask[row]).nonzero().squeeze(1))
            for row in range(len(documents))
            for number in documents[row].unique().tolist()
        ]
        found = [(row, places) for row, places in found if len(places)]
        pad = torch.nn.utils.rnn.pad_sequence
        self.rows = torch.tensor([row for row, _ in found], device=mask.device)
        self.places = pad([places for _, places in found], batch_first=True)
        self.mask = pad([torch.ones_like(places, dtype=torch.bool) for _, places in found], batch_first=True)

    def __call__(self, trace: Trace) -> Trace:
        """The documents of `trace` in rows of their own."""
        rows, places = self.rows, self.places
        by_token = trace.logits is not None and trace.logits.dim() == 3
        return replace(
            trace,
            **{name: {i: self.tokens(x) for i, x in getattr(trace, name).items()} for name in BY_TOKEN},
            attention={i: self._attention(inputs) for i, inputs in trace.attention.items()},
            maps={i: x[rows[:, None, None], :, places[:, :, None], places[:, None]] for i, x in trace.maps.items()},
            logits=self.tokens(trace.logits) if by_token else trace.logits,
            top_k=None if trace.top_k is None else trace.top_k.map(self.tokens),
            logits_known=None if trace.logits_known is None else self.tokens(trace.logits_known),
            head=None if trace.head is None else replace(trace.head, hidden=self.tokens(trace.head.hidden)),
            mask=self.mask,
            documents=None,
        )

    def tokens(self, x: Tensor) -> Tensor:
        """(B, T, …) -> (N, T', …)"""
        return x[self.rows[:, None], self.places]

    def labels(self, labels: Tensor) -> Tensor:
        """(B, T) -> (N, T'), -100 in padding."""
        return self.tokens(labels).masked_fill(~self.mask, -100)

    def _attention(self, inputs: AttentionInputs) -> AttentionInputs:
        def chosen(x: Tensor | None) -> Tensor | None:
            return x if x is None or len(x) == 1 else x[self.rows]

        names = ("query", "key", "value", "mask", "position_bias")
        own = {name: chosen(getattr(inputs, name)) for name in names}
        own |= {
            name: own[name].expand(len(self.rows), -1, -1, -1)
            for name in ("query", "key", "value")
            if own[name] is not None
        }
        if own["mask"] is not None and own["mask"].dim() == 2:
            own["mask"] = own["mask"].expand(len(self.rows), -1)
        return replace(inputs, **own, documents=None).at_places(self.places)


def _moved(x: Any, device: torch.device) -> Any:
    """A trace, or what is in one, on another device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {key: _moved(value, device) for key, value in x.items()}
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: _moved(getattr(x, f.name), device) for f in fields(x)})
    return x
