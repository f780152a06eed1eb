"""Output matching: the two models' distributions compared, softened by a temperature (arXiv 2412.19449)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from fakit.layer_maps import LayerMap
from fakit.losses import outputs as output_losses
from fakit.losses.logits import ANY_VOCABULARIES, asked_of, check_vocabularies
from fakit.losses.reduce import check_mask, values_known
from fakit.losses.shared_tokens import over_shared
from fakit.losses.task import REGRESSION, SEVERAL_LABELS
from fakit.losses.top_k import SERVED, buckets
from fakit.objective.loss_parameters import checked, ends
from fakit.objective.needs import CountedBatch, Needs
from fakit.objective.positions import aligned, corresponding, predicting
from fakit.objective.schedules import Schedule
from fakit.objective.temperature import LearnedTemperature, Softened
from fakit.tracing.trace import Trace

Alignment = Literal["order", "text"]
ALIGNMENTS: tuple[str, ...] = get_args(Alignment)


@dataclass(init=False)
class Outputs(Softened):
    """Output-distribution matching.

    Args:
        loss: a name of `fakit.losses.outputs.LOSSES` ("forward_kl", "jsd", "dkd" …, with a table of what each is for),
            or any function (student logits, teacher logits, mask, temperature). A function that names `labels` is given
            each position's, shifted already in causal models, and the term is off without labels, as "dkd" is.
        temperature: τ > 0, a number or a `Schedule`; `objective.temperature` may be set at any time.
        weight: γ.
        vocab_size: cut both vocabularies to their first `vocab_size` entries, for families that pad the head
            differently.
        align: of a teacher with a tokenizer of its own (`fakit.tasks.two_tokenizers`), which positions are compared:
            "order", the k-th labeled token of an answer with its k-th, for "uld" alone, which takes it unless told
            otherwise; or "text", where both have read the same of the answer. "uld" then compares sorted probabilities,
            the losses of `fakit.losses.shared_tokens.SERVED` those of the tokens that both have. None asks for one
            tokenizer; where there is one, `align` changes nothing.
        chunked: over a large vocabulary, make and compare logits a chunk of tokens at a time, where both models have a
            plain linear head and the loss is one of the named; the same number with a fraction of the memory.
            False always makes them whole.
        parameters: the loss's own, by name, as further keywords: `Outputs("jsd", beta=0.1)`. In chunks, too. Each may
            be a `Schedule`: `Outputs("taid", t=Schedule(0.4, 1.0))`.
        reversal: λ, a number or a `Schedule`: learn τ against the student, between `temperature` and `temperature +
            temperature_range` (CTKD: `fakit.objective.temperature`). Its paper: temperature 1, range 20 and
            `Schedule(0.0, 1.0, "cosine")`, there over 10 of 240 epochs. None: τ is what was set.
        temperature_range: how far above `temperature` a learned τ may go; 20 unless given.
        temperature_rate: the learning rate of a learned τ's θ, a group of its own in the trainer's optimizer, without
            weight decay; 0.01 unless given. In a loop of your own, give `objective.parameters()` to the optimizer.
    """

    loss: str | Callable = "forward_kl"
    temperature: float | Schedule = 2.0
    weight: float | Schedule = 1.0
    vocab_size: int | None = None
    chunked: bool = True
    parameters: dict[str, Any] = field(default_factory=dict)
    reversal: float | Schedule | None = None
    temperature_range: float | None = None
    temperature_rate: float | None = None
    align: Alignment | None = None

    def __init__(
        self,
        loss: str | Callable = "forward_kl",
        temperature: float | Schedule = 2.0,
        weight: float | Schedule = 1.0,
        vocab_size: int | None = None,
        chunked: bool = True,
        parameters: Mapping[str, Any] | None = None,
        reversal: float | Schedule | None = None,
        temperature_range: float | None = None,
        temperature_rate: float | None = None,
        align: Alignment | None = None,
        **more: Any,
    ):
        self.loss, self.temperature, self.weight = loss, temperature, weight
        self.vocab_size, self.chunked, self.align = vocab_size, chunked, align
        self.reversal, self.temperature_range, self.temperature_rate = reversal, temperature_range, temperature_rate
        self._check_reversal()
        self.parameters = dict(parameters or {}) | more
        self._bare = checked(Outputs, loss, output_losses.LOSSES, self.parameters)
        self.needs_labels = "labels" in asked_of(self._bare)  # those of each position, as "dkd" does
        for given in ends(self.parameters):
            if not callable(loss):  # what it refuses of its parameters (beta = 2), it refuses now
                output_losses.try_out(partial(self._bare, **given))
        if vocab_size is not None and loss in ANY_VOCABULARIES:
            raise ValueError(
                f"Outputs({loss!r}, vocab_size={vocab_size}): {loss} compares vocabularies of any two sizes by their "
                "sorted probabilities, and a cut would drop some; leave vocab_size out."
            )
        self._check_alignment()
        self.same_tokens = align is None and loss not in ANY_VOCABULARIES
        self._made = True

    def _check_alignment(self) -> None:
        if self.align is None:
            return
        if self.align not in ALIGNMENTS:
            raise ValueError(
                f"Outputs(align={self.align!r}) is not known; choose one of {', '.join(map(repr, ALIGNMENTS))}, None."
            )
        named = getattr(self.loss, "__name__", self.loss)
        if self.loss in ANY_VOCABULARIES:
            return
        if self.align == "order":
            raise ValueError(
                f"Outputs({named!r}, align='order'): the k-th tokens of two tokenizers stand for different text, whose "
                "probabilities can be compared by their size alone: Outputs('uld'), or align='text'."
            )
        if self.loss not in SERVED or self.learns_temperature:
            what = f"a learned temperature of {named}" if self.loss in SERVED else named
            raise ValueError(
                f"Outputs({named!r}, align='text'): over the tokens that two vocabularies share, and one class for all "
                f"others, {what} is not defined; take uld, or {', '.join(SERVED)} with a temperature that is set."
            )
        if self.vocab_size is not None:
            raise ValueError(
                f"Outputs({named!r}, align='text', vocab_size={self.vocab_size}): the tokens that both have are "
                "compared, wherever in a vocabulary they stand; leave vocab_size out."
            )

    def alignment(self, teacher: Trace) -> Alignment | None:
        """How the teacher's positions are found; None where it was given the student's tokens.

        Raises:
            ValueError: it has tokens of its own, and the term compares token by token.
        """
        if teacher.same is None:
            return None
        if self.same_tokens:
            raise ValueError(
                f"the teacher was given the texts in tokens of its own, and Outputs({self.loss!r}) compares token by "
                "token: Outputs('uld') takes the tokens of an answer in their order, and Outputs(…, align='text') "
                "those behind which both have read the same."
            )
        return self.align or "order"

    @property
    def function(self) -> Callable:
        """The loss with its own parameters set, as they are in this step."""
        return partial(self._bare, **self.parameters) if self.parameters else self._bare

    @property
    def learns_temperature(self) -> bool:
        """True where τ is learned."""
        return self.reversal is not None

    @property
    def learning_rate(self) -> float:
        """Of a learned τ."""
        return 0.01 if self.temperature_rate is None else self.temperature_rate

    @property
    def tau(self) -> float | Tensor:
        """τ of this step; a learned one () with graph."""
        if not self.learns_temperature:
            return super().tau
        span = 20.0 if self.temperature_range is None else self.temperature_range
        return self.place.modules[self._temperature_name(self.place.name)](self.temperature, span, self.reversal)

    @staticmethod
    def _temperature_name(name: str) -> str:
        return f"{name}_temperature"

    def placed(self, name: str, layer_map: LayerMap, modules: nn.ModuleDict) -> Self:
        if self.learns_temperature:
            modules[self._temperature_name(name)] = LearnedTemperature()
        return super().placed(name, layer_map, modules)

    def _check_reversal(self) -> None:
        own = {"temperature_range": self.temperature_range, "temperature_rate": self.temperature_rate}
        for name, value in own.items():
            if value is not None and not self.learns_temperature:
                raise ValueError(
                    f"Outputs({name}={value!r}): it is of a learned temperature, and this one is not learned; "
                    "reversal=Schedule(0.0, 1.0, 'cosine') learns it."
                )
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Outputs({name}={value!r}): a finite number above 0.")
        if self.reversal is None:
            return
        if not isinstance(self.reversal, Schedule) and not 0 <= self.reversal < math.inf:
            raise ValueError(f"Outputs(reversal={self.reversal!r}): a finite number of at least 0, or a Schedule.")
        if self.loss == "logit_mse":
            raise ValueError(
                f"Outputs('logit_mse', reversal={self.reversal}): no temperature changes this loss, so that there is "
                "nothing to learn; leave reversal out, or take a divergence such as 'forward_kl'."
            )

    @property
    def in_chunks(self) -> bool:
        """True where the loss can be made a chunk of tokens at a time."""
        return self.chunked and not callable(self.loss)

    def needs(self, side: str) -> Needs:
        return Needs(logits=True, in_chunks=self.in_chunks)

    def count(self, batch: CountedBatch) -> Tensor:
        corresponding = batch.corresponding(self.align or "order")
        if corresponding is not None:
            return corresponding
        return batch.labeled_positions if self.needs_labels else batch.positions

    def by_rows(self, teacher: Trace) -> bool:
        """Whether `compare` makes the student's logits of its head, at the compared positions alone: beside a teacher
        whose logits are there already (a cache's), or whose tokens are others.
        """
        if not self.in_chunks:
            return False
        if self.alignment(teacher) is not None:
            return self.loss not in ANY_VOCABULARIES or teacher.head is None
        return teacher.head is None and self.loss not in ANY_VOCABULARIES

    def compare(self, student: Trace, teacher: Trace, labels: Tensor | None) -> Tensor:
        if self.alignment(teacher) is not None or (student.logits is None and student.head is not None):
            return self._compare_rows(student, teacher, labels)
        ours, theirs = self._logits(student, teacher)  # (B, C) or (B, T, V)
        mask = None
        problem = problem_type(student, teacher, ours, labels)
        if not callable(self.loss) and self.loss != "logit_mse":
            check_distribution(self.loss, problem, ours.shape[-1])
            if problem == SEVERAL_LABELS:
                ours, theirs = output_losses.bernoulli(ours), output_losses.bernoulli(theirs)  # (B, C, 2)
                return self.function(ours, theirs, None, temperature=self.tau)
        if ours.dim() == 3 and self.loss in ANY_VOCABULARIES:
            ours, theirs, mask = aligned(student, teacher, labels, ours, theirs)
        elif ours.dim() == 3:
            mask = predicting(student, teacher, labels, ours)
            if student.causal:
                ours, theirs = ours[:, :-1], theirs[:, :-1]
                labels = None if labels is None else labels[:, 1:]
        given = {"labels": labels} if self.needs_labels else {}
        loss = self.function(ours, theirs, mask, temperature=self.tau, **given)
        if teacher.logits_known is None or mask is None:
            return loss
        return _where_known(loss, mask, teacher.logits_known, self.loss)

    def _compare_rows(self, student: Trace, teacher: Trace, labels: Tensor | None) -> Tensor:
        """The loss from logits at the compared positions alone, (N, V)."""
        how = self.alignment(teacher)
        like = _by_token(student, "student")  # (B, T, …)
        if how is not None:
            assert teacher.same is not None, "of an alignment"
            same = teacher.same[how].to(like.device)
            mask = corresponding(student, labels, same)
        else:
            mask = predicting(student, teacher, labels, like)
        if how is not None and not mask.any():  # of these rows no position corresponds, as their share of the step says
            valid = torch.ones_like(mask) if student.logits_mask is None else student.logits_mask
            return _logits_at(student, *(x[:1] for x in valid.nonzero(as_tuple=True))).sum() * 0.0
        check_mask(str(self.loss), mask, mask.shape)
        row, place = mask.nonzero(as_tuple=True)  # (N,)
        at = place if how is None else same[row, place]
        ours, theirs = _logits_at(student, row, place), None
        if teacher.top_k is None:
            theirs = _logits_at(teacher, row, at).to(ours.device)
        top = None if teacher.top_k is None else teacher.top_k.map(lambda x: x[row.to(x.device), at.to(x.device)])
        if how is not None and self.loss not in ANY_VOCABULARIES:
            if theirs is None or teacher.shared_tokens is None:
                raise ValueError(
                    "the teacher was given the texts in tokens of its own, and its trace holds "
                    f"{'the largest logits alone' if theirs is None else 'no shared_tokens'}; give all logits, and "
                    "fakit.tasks.two_tokenizers.shared_tokens of the tokenizers."
                )
            ours, theirs = over_shared(ours, theirs, teacher.shared_tokens, self.tau)
        else:
            found = Trace(logits=ours), Trace(logits=theirs, top_k=top)
            ours, theirs = self._logits(*found)
        given = {}
        if self.needs_labels:
            assert labels is not None, "without labels the term is off"
            given["labels"] = (labels[:, 1:] if student.causal else labels).to(row.device)[row, place]
        loss = self.function(ours, theirs, None, temperature=self.tau, **given)
        if teacher.logits_known is None:
            return loss
        return _where_known(loss, mask, teacher.logits_known, self.loss)

    def _logits(self, student: Trace, teacher: Trace) -> tuple[Tensor, Tensor]:
        """Both sides' logits; over k + 1 classes where of the teacher's the k largest are known
        (`fakit.losses.top_k`).
        """
        ours, theirs, top = student.logits, teacher.logits, teacher.top_k
        if ours is None or (theirs is None and top is None):
            side = "student" if ours is None else "teacher"
            raise ValueError(
                f"output matching needs logits, and the {side}'s trace has none; capture(..., logits=True)."
            )
        if theirs is not None:
            check_vocabularies(ours.shape[-1], theirs.shape[-1], self.vocab_size, self.loss)
            return ours[..., : self.vocab_size], theirs[..., : self.vocab_size]
        assert top is not None, "asked above"
        if instead := self.whole_logits(top.classes):
            raise ValueError(
                f"the teacher's trace holds its {top.k} largest logits, and {instead}; keep all of them (top_k=None)."
            )
        if ours.dim() == 3 and student.logits_mask is not None:  # what stands in padding may be no number
            ours = ours.masked_fill(~student.logits_mask.unsqueeze(-1).to(ours.device), 0.0)
        return buckets(ours, top, cast(float, self.tau))  # one that is learned was refused

    def whole_logits(self, classes: int) -> str | None:
        """Why the term wants all of the teacher's logits over so many classes; None where the largest will do."""
        if callable(self.loss) or self.loss not in SERVED:
            return f"{getattr(self.loss, '__name__', self.loss)!r} compares all ({', '.join(SERVED)} do not)"
        if self.vocab_size not in (None, classes):
            return f"vocab_size={self.vocab_size} cuts its {classes} classes, whose rest is known as a whole"
        if self.learns_temperature or isinstance(self.written("temperature"), Schedule):
            return "its temperature changes, and the mass of the rest with it"
        return None


def _by_token(trace: Trace, side: str) -> Tensor:
    """What logits are made of at each token: the head's input, or they themselves. (B, T, …)"""
    found = trace.logits if trace.head is None else trace.head.hidden
    if found is None or found.dim() != 3:
        shape = None if found is None else tuple(found.shape)
        raise ValueError(
            f"output matching at single positions needs logits (B, T, V), and the {side}'s trace has {shape}; "
            "capture(..., logits=True)."
        )
    return found


def _logits_at(trace: Trace, row: Tensor, place: Tensor) -> Tensor:
    """(N, V)"""
    every = _by_token(trace, "teacher")
    chosen = every[row.to(every.device), place.to(every.device)]
    return chosen if trace.head is None else replace(trace.head, hidden=chosen).logits()


def _where_known(loss: Tensor, mask: Tensor, known: Tensor, kind: str | Callable) -> Tensor:
    """The loss; of a teacher whose logits are not known at all that is compared, an error, or on an accelerator NaN."""
    if kind in ANY_VOCABULARIES:
        raise ValueError(
            f"{kind} compares a text's tokens by their order, and the teacher's logits are known at those alone whose "
            "next token had a label when its cache was built; build it with tokens='all'."
        )
    unknown = mask & ~known[:, : mask.shape[1]].to(mask.device)
    if values_known(unknown) and unknown.any():
        raise ValueError(
            f"the teacher's logits are known at {int(known.sum())} tokens of this batch, those whose next token had a "
            f"label when its cache was built, and {int(unknown.sum())} others are compared: give the labels that the "
            "rows had then, or build the cache with tokens='all'."
        )
    return loss.masked_fill(unknown.any(), float("nan"))


def problem_type(student: Trace, teacher: Trace, logits: Tensor, labels: Tensor | None) -> str | None:
    """What logits mean: as the models' configurations say; where they do not,
    as their labels do (the rule of transformers).

    Raises:
        ValueError: the two models' logits mean different things.
    """
    if logits.dim() != 2:
        return None
    stated = {trace.problem_type for trace in (student, teacher)} - {None}
    if len(stated) == 2:
        raise ValueError(
            f"the student's problem_type is {student.problem_type}, the teacher's {teacher.problem_type}: their logits "
            "mean different things and cannot be compared. Give both configurations one problem_type, or leave the "
            "output term out (outputs=None)."
        )
    if stated:
        return stated.pop()
    several = labels is not None and labels.is_floating_point() and labels.shape == logits.shape and labels.shape[1] > 1
    return SEVERAL_LABELS if several else None


def check_distribution(loss: str, problem: str | None, classes: int) -> None:
    """Raise ValueError where a divergence of distributions is asked of numbers that are none."""
    if problem == SEVERAL_LABELS:
        if loss in output_losses.ONE_OF_MANY:
            raise ValueError(
                f"{loss} looks at which of many classes is meant, and with several labels a text each label is yes or "
                "no by itself; use Outputs('forward_kl')."
            )
        return
    if classes == 1:
        raise ValueError(
            f"{loss} over a single output is 0 whatever the models say (softmax of one number is 1); "
            "for regression use Outputs('logit_mse')."
        )
    if problem == REGRESSION:
        raise ValueError(
            f"{loss} compares distributions, and {classes} outputs of a regression (problem_type) are none; use "
            "Outputs('logit_mse')."
        )
