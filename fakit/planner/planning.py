"""`plan`: will this teacher with this student, batch and length fit,
and how long will it take? From configurations alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch._subclasses import fake_tensor
from transformers import PreTrainedConfig, PreTrainedModel

from fakit import renamed
from fakit.layer_maps import LayerMap
from fakit.models.kinds import untied
from fakit.models.load import check_stored_precision, resolve_model, stored_precision
from fakit.models.pretrained import CLASSES, in_one_sentence
from fakit.planner.cards import CARDS, GB, Card, find_card
from fakit.planner.presets import config_text, guess_task, read_config, recorded
from fakit.planner.step import OPTIMIZERS, TERMS, Setup, Step, built, position_limit, simulate
from fakit.planner.students import Student, check_vocabularies, is_model, parse_student, whole
from fakit.training.precision import bf16_is_fast

if TYPE_CHECKING:
    from fakit.figures import Figure

# What torch raises where a program asks for the values of tensors that have none.
_NEEDS_DATA = (
    NotImplementedError,
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)

# What a GPU holds beside tensors: the driver's context, cuBLAS' workspaces and loaded kernels; and the share of what
# comes and goes in a step that the caching allocator cannot use, for its blocks do not fit together. Both are
# assumptions, which `make gpu` measures.
CONTEXT = 0.7 * GB
FRAGMENTS = 0.05
TOP = 64  # logits of a small cache
# There before and after every step.
FIXED = ("teacher weights", "student weights", "optimizer state")
# Share of a card's memory bandwidth that eager kernels reach.
BANDWIDTH = 0.8


@dataclass(frozen=True)
class Plan:
    """What a training step would take; it draws itself in a notebook and prints itself in a terminal.

    Attributes:
        teacher: name of the teacher.
        setup: everything that was asked.
        step: memory by part and FLOPs of a step, from the step run without data.
        limit_name, limit: the card or amount asked about, and its bytes.
        card: its arithmetic, where a card was named.
        utilization: share of a card's FLOP/s that a step is taken to reach.
        steps: number of steps of the whole training, if its tokens were given.
        assumed_dtype: nobody asked for the precision (dtype="auto").
    """

    teacher: str
    setup: Setup
    step: Step
    limit_name: str
    limit: float
    card: Card | None
    utilization: float
    steps: int | None = None
    assumed_dtype: bool = False

    @property
    def precision(self) -> str:
        """In which precision the step is taken to compute, and why where nobody asked for one."""
        name = "bf16 autocast" if self.setup.dtype == "bf16" else "float32"
        device = "a GPU" if self.setup.accelerator else "this processor, which computes it faster"
        return f"{name}, assumed for {device}" if self.assumed_dtype else name

    @property
    def memory(self) -> dict[str, float]:
        """part → bytes at the peak of a step, overhead included."""
        return _with_overhead(self.step, self.setup.accelerator)

    @property
    def peak(self) -> float:
        """Bytes at the peak."""
        return float(sum(self.memory.values()))

    @property
    def evaluation(self) -> float:
        """Bytes at the peak of an evaluation's batch, overhead included: both models and the optimizer's state are
        there still, and a batch has `fakit.evaluation.batches.TOKENS` tokens or 64 rows, whatever a step's has.
        """
        step = self.step
        if not self.setup.accelerator:
            return float(step.evaluation)
        fixed = sum(step.memory.get(part, 0) for part in FIXED)
        return step.evaluation + CONTEXT + FRAGMENTS * max(0, step.evaluation - fixed)

    @property
    def fits(self) -> bool:
        """True when the peaks of a step and of an evaluation are within the limit."""
        return self.needed <= self.limit

    @property
    def needed(self) -> float:
        """Bytes at the higher of both peaks."""
        return max(self.peak, self.evaluation)

    @property
    def flops(self) -> float:
        """FLOPs of a step: a multiply-add is 2; products and attention alone, as torch counts."""
        return sum(self.step.flops.values())

    def seconds(self, card: Card | str | None = None) -> float:
        """Seconds of a step on a card (the one asked about unless given).

        Phase by phase the longer of two: its FLOPs at `utilization` of the card's rate for their precision, or what it
        writes, and reads as much of, and the weights that it reads, at 0.8 of the card's bandwidth.

        Raises:
            ValueError: no card was named.
        """
        card = self._card(card)
        weights, step = self.step.weight_bytes, self.step
        reads = {"teacher forward": weights["teacher"], "student forward": weights["student"]}
        reads["backward"] = weights["student"]
        total = 0.0
        for phase, flops in step.flops.items():
            single = step.single[phase]
            products = (single / card.single + (flops - single) / card.half) / self.utilization
            total += max(products, (2 * step.written[phase] + reads.get(phase, 0)) / (BANDWIDTH * card.bandwidth))
        # the optimizer reads weight, gradient and its state and writes them
        return total + 2 * (2 * 4 * step.trainable + step.memory.get("optimizer state", 0)) / (
            BANDWIDTH * card.bandwidth
        )

    def tokens_per_second(self, card: Card | str | None = None) -> float:
        """Tokens of the batch by the seconds of a step."""
        return self.setup.batch * self.setup.seq / self.seconds(card)

    def _card(self, card: Card | str | None) -> Card:
        found = find_card(card)[2] if isinstance(card, str) else card or self.card
        if found is None:
            raise ValueError(
                f"a time needs a card, and {card or self.limit_name} names none; cards: {', '.join(CARDS)}."
            )
        return found

    # -- what to change ---------------------------------------------------------------------------------------------

    @cached_property
    def largest_batch(self) -> int:
        """The largest batch that fits, everything else as it is; 0 if not even one row does."""

        def peak(batch: int) -> float:
            return self.with_setup(batch=batch).peak

        if max(peak(1), self.evaluation) > self.limit:
            return 0
        fits, too_large, tried = 1, None, max(2, self.setup.batch)
        while too_large is None or too_large - fits > 1:
            # memory grows by the row, nearly: aim where the line through both ends meets the limit
            slope = (peak(tried) - peak(1)) / (tried - 1)
            if peak(tried) <= self.limit:
                fits = tried
            else:
                too_large = tried
            aimed = max(fits + 1, int(fits + (self.limit - peak(fits)) / slope))
            tried = aimed if too_large is None else min(aimed, too_large - 1)
            tried = max(tried, 2)
        return fits

    @cached_property
    def changes(self) -> list[tuple[str, Plan]]:
        """Single changes that save memory, each with its plan, from the least intrusive on;
        for a plan that does not fit also their sum.
        """
        setup, found = self.setup, []
        for name, new in _changes(setup, self.largest_batch):
            plan = self.with_setup(**new)
            if plan.needed < self.needed:
                found.append((name, plan, new))
        chosen = [(name, plan) for name, plan, _ in found]
        if not self.fits and not any(plan.fits for _, plan in chosen):
            together = {key: value for _, _, new in found for key, value in new.items()} | {"batch": 1}
            chosen.append(("all of these, batch 1", self.with_setup(**together)))
        return chosen

    def with_setup(self, **changes) -> Plan:
        """The same plan with other settings of `setup`."""
        setup = replace(self.setup, **changes)
        steps = None if self.steps is None else math.ceil(self.steps * self.setup.batch / setup.batch)
        assumed = self.assumed_dtype and "dtype" not in changes
        return replace(self, setup=setup, step=simulate(setup), steps=steps, assumed_dtype=assumed)

    # -- how it shows itself ------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The set-up in a few words."""
        return describe(self.setup)

    @property
    def verdict(self) -> str:
        """One sentence: fits or not, by how much."""
        size, left = self.needed / GB, (self.limit - self.needed) / GB
        where = " when it is evaluated" if self.evaluation > self.peak else ""
        if self.fits:
            return (
                f"Fits: {size:.3g} GB{where} of {self.limit / GB:.3g} GB ({self.limit_name}), {left:.3g} GB to spare."
            )
        has = f"{self.limit_name} has {self.limit / GB:.3g} GB"
        return f"Does not fit: {size:.3g} GB{where}, and {has}, {-left:.3g} GB too few."

    def advice(self) -> Iterator[str]:
        """Sentences: the largest batch that fits, and for a plan that does not fit what would."""
        if self.largest_batch:
            yield f"Largest batch that fits at {self.setup.seq} tokens: {self.largest_batch}."
        elif not self.fits:
            yield "Not even a batch of one row fits."
        if not self.fits:
            for name, plan in self.changes:
                verdict = "fits" if plan.fits else "does not fit"
                yield f"{name[0].upper()}{name[1:]}: {plan.needed / GB:.3g} GB, {verdict}."

    def figure(self, changes: bool | None = None) -> Figure:
        """Memory by part against the cards.

        Args:
            changes: with a bar for each change of `changes`; where the plan does not fit unless given.
        """
        from fakit.figures.plan import memory_plan

        rows = {"as asked": self.memory}
        if changes if changes is not None else not self.fits:
            rows |= {name: plan.memory for name, plan in self.changes}
        others = {card.name: card.memory for card in CARDS.values()}
        return memory_plan(
            rows,
            self.limit,
            self.limit_name,
            others,
            title=f"{self.teacher.split('/')[-1]} → {self.name}, {self.setup.dtype}",
        )

    def __str__(self) -> str:
        step, setup = self.step, self.setup
        millions = {side: number / 1e6 for side, number in step.parameters.items()}
        lines = [
            f"teacher  {self.teacher}, {step.depths['teacher']} layers × {step.widths['teacher']}, "
            f"{millions['teacher']:,.0f} M parameters, {setup.quantize or _DTYPES[setup.dtype]}",
            f"student  {setup.student_name and setup.student_name + ', '}{step.depths['student']} layers × "
            f"{step.widths['student']}, {millions['student']:,.0f} M "
            "parameters, float32" + (" under bf16 autocast" if setup.dtype == "bf16" else ""),
            *self._adapter(),
            f"step     {setup.batch} × {setup.seq} tokens, {', '.join(setup.terms)}, {setup.optimizer}"
            + (", gradient checkpointing" if setup.checkpointing else ""),
            f"dtype    {self.precision}",
            *self._unquantized(),
            "",
            "memory at the peak of a step",
        ]
        longest = max(self.memory.values())
        for part, size in self.memory.items():
            lines.append(f"  {part:20}{size / GB:9.3f} GB  {'█' * round(30 * size / longest)}")
        if "gradients" not in self.memory:
            lines.append(
                f"  {'gradients':20}{'':12}  {4 * step.trainable / GB:.3g} GB come after the peak, as activations go"
            )
        lines.append(f"  {'peak':20}{self.peak / GB:9.3f} GB")
        lines.append(
            f"  {'evaluation':20}{self.evaluation / GB:9.3f} GB  at its own peak: {step.evaluation_rows} × {setup.seq} "
            "tokens, no gradients"
        )
        lines += ["", self.verdict, *self.advice(), ""]
        phases = ", ".join(f"{phase} {flops / 1e12:.3g}" for phase, flops in step.flops.items())
        lines.append(f"FLOPs of a step: {self.flops / 1e12:.4g} T ({phases})")
        lines += self._cache()
        lines += self._times()
        if setup.accelerator:
            lines.append(
                f"Overhead ({CONTEXT / GB:.1g} GB context, {FRAGMENTS:.0%} fragments) and times are assumptions; "
                "docs/gpu.md says which cards have measured them."
            )
        return "\n".join(lines)

    def _cache(self) -> list[str]:
        """What a teacher cache would take, and with the largest logits alone."""
        kept = self.step.cached
        if not kept:
            return []
        parts = ", ".join(f"{name} {_size(number)}" for name, number in kept.items())
        whole, tokens = sum(kept.values()), self.setup.batch * self.setup.seq * (self.steps or 0)
        line = f"A teacher cache in bfloat16 takes {_size(whole)} a token ({parts})"
        line += f", {_size(whole * tokens)} for {tokens:,.0f} tokens" if tokens else ""
        if self.setup.task != "causal-lm" or "logits" not in kept:
            return [line + "."]
        index = 2 if kept["logits"] <= 2 * 2**16 else 4  # bytes of a token's number
        few = whole - kept["logits"] + (2 + index) * TOP + 4
        if few >= whole:
            return [line + "."]
        line += f"; with the {TOP} largest logits alone {_size(few)}"
        return [line + (f", {_size(few * tokens)} in all." if tokens else ".")]

    def _adapter(self) -> list[str]:
        if self.setup.lora is None:
            return []
        trained = self.step.trainable / 1e6
        return [
            f"adapter  LoRA of rank {self.setup.lora} on every linear layer but the head: {trained:,.1f} M parameters "
            "trained, with the projections"
        ]

    def _unquantized(self) -> list[str]:
        """Why few bits save little on a mixture of experts."""
        share = self.step.stacked / self.step.parameters["teacher"]
        if self.setup.quantize is None or share < 0.05:
            return []
        return [
            f"note     {share:.0%} of the teacher's parameters are experts, all of a layer's in one tensor; "
            f"bitsandbytes quantizes linear layers alone, so they stay {_DTYPES[self.setup.dtype]}"
        ]

    def _times(self) -> list[str]:
        cards = [self.card] if self.card is not None else [c for c in CARDS.values() if c.memory >= self.needed][:3]
        lines = []
        for card in cards if self.setup.accelerator else []:
            seconds = self.seconds(card)
            whole = "" if self.steps is None else f", {self.steps:,} steps in {_duration(self.steps * seconds)}"
            note = f" ({card.note})" if card.note else ""
            lines.append(
                f"{card.name}: {seconds:.3g} s a step, {self.tokens_per_second(card):,.0f} tokens/s at "
                f"{self.utilization:.0%} of its FLOP/s{whole}{note}"
            )
        return lines

    def __repr__(self) -> str:
        return f"Plan({self.teacher} → {self.name}: {self.verdict})"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, object]:
        return {**self.figure()._repr_mimebundle_(), "text/plain": str(self)}


@renamed(utilisation="utilization")
def plan(
    teacher: str | Path | PreTrainedConfig | PreTrainedModel,
    student: Student,
    batch: int = 8,
    seq: int = 512,
    *,
    quantize: str | None = None,
    dtype: str = "auto",
    memory: str | float = "16GB",
    task: str | None = None,
    optimizer: str = "adamw",
    checkpointing: bool = False,
    terms: Sequence[str] = TERMS,
    layer_map: LayerMap | None = None,
    tokens: float | None = None,
    utilization: float = 0.4,
    device: str = "gpu",
    lora: int | None = None,
) -> Plan:
    """Memory, FLOPs and time of a distillation step, from configurations alone.

    The step is run on tensors that have shapes and no data: the models are made on the meta device, and the kit's own
    capture, objective and backward pass are watched for what they allocate and multiply. Adapters are merged into a
    teacher and take no memory of their own.

    Args:
        teacher: a recorded model ("meta-llama/Llama-3.1-8B", or what stands after the slash), a folder, a hub id, a
            configuration or a model.
        student: layers, or layers and width: 4, "4", (4, 1024), "4x1024"; or the teacher's block numbers, [1, 8, 16];
            or another model, as for the teacher ("meta-llama/Llama-3.2-1B").
        batch: rows of a batch, in one micro-step.
        seq: tokens of a row, padding included.
        quantize: the teacher's: None, "8bit" or "4bit"; of a checkpoint that is quantized already, as it is stored.
        dtype: "bf16": the teacher in bf16, the student in float32 under bf16 autocast (fp16 takes as much); "fp32";
            "auto": bf16 for a GPU, and for a CPU what this one computes faster, as in training
            (`fakit.training.precision`).
        memory: a card's name ("T4", "A100 40GB") or an amount ("16GB"), a GB being 10⁹ bytes.
        task: of both models, as for `load_teacher`; guessed from the configuration unless given.
        optimizer: "adamw" (fused), "adamw-8bit", "adafactor" or "sgd".
        checkpointing: recompute the student's activations in the backward pass.
        terms: which of "features", "attention", "outputs" and "task" the objective has.
        layer_map: evenly spaced unless given.
        tokens: how many tokens to train on, all epochs together, for the time of the whole.
        utilization: share of a card's FLOP/s that a step is taken to reach.
        device: "gpu", or "cpu", which takes the sizes and kernels of a CPU and no overhead.
        lora: the rank of an adapter on every linear layer of the student but its head; the rest is frozen.

    Raises:
        ValueError: nothing to be read as teacher or student, a student that the teacher does not allow (another
            vocabulary), or a setting that is not known.

    >>> plan("gpt2", "4x256", batch=4, seq=128, memory="T4").fits
    True
    """
    name, config = read_config(teacher)
    own = read_config(student) if is_model(student) else None
    layers, width = parse_student(student) if own is None else (0, None)
    choices = {
        "quantize": (quantize, (None, "8bit", "4bit")),
        "dtype": (dtype, ("auto", *_DTYPES)),
        "optimizer": (optimizer, OPTIMIZERS),
        "device": (device, ("gpu", "cpu")),
        "task": (task, (None, *CLASSES)),
        **{f"terms[{i}]": (term, TERMS) for i, term in enumerate(terms)},
    }
    for what, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{what} is {value!r}; choose one of {', '.join(map(str, known))}.")
    batch, seq = whole("batch", batch), whole("seq", seq)
    for what, number, most in (
        ("tokens", 1 if tokens is None else tokens, "finite"),
        ("utilization", utilization, "at most 1"),
    ):
        if not 0 < number < math.inf or (what == "utilization" and number > 1):
            raise ValueError(f"{what} is {number}; it is above 0 and {most}.")
    limit_name, limit, card = find_card(memory)
    stored = stored_precision(config)
    if stored is not None:
        check_stored_precision(name, stored, quantize)
        if stored not in ("8bit", "4bit"):
            raise ValueError(
                f"the checkpoint of {name} is stored in {stored!r} (its quantization_config), and what that takes is "
                "known of bitsandbytes' 8 and 4 bits alone. Plan with a configuration without quantization_config: "
                "full precision, or quantize=…."
            )
        quantize = stored
    used = tuple(term for term in TERMS if term in terms)
    pairs = None if layer_map is None else tuple(layer_map.pairs)
    assumed = dtype == "auto"
    if assumed:
        dtype = "bf16" if device == "gpu" or bf16_is_fast(torch.device("cpu")) else "fp32"
    how = (quantize, dtype, optimizer, checkpointing, used, pairs, device == "gpu")
    setup = Setup(config_text(config), task or guess_task(config), layers, width, batch, seq, *how)
    setup = replace(setup, untied=_untied(name, teacher, config, setup.task), stored=stored is not None)
    setup = setup if lora is None else replace(setup, lora=whole("lora", lora))
    if own is not None:
        setup = _with_student(setup, student, own, name)
    steps = None if tokens is None else math.ceil(tokens / (batch * seq))
    positions = position_limit(setup.config, setup.task)
    if positions is not None and seq > positions:
        raise ValueError(f"{seq} tokens a row, and {name} has {positions} positions; choose seq up to that.")
    try:
        step = simulate(setup)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if isinstance(error, _NEEDS_DATA):
            raise ValueError(
                f"a step of {name} cannot be run without data: its code looks at values or makes tensors in ways that "
                f"shapes alone do not answer ({said}). Plan with a family of its size that can, such as BERT or Llama."
            ) from error
        raise ValueError(
            f"a step of {name} as a {setup.task} model does not run: {said}. Its configuration may lack a setting, or "
            "its sizes not fit each other."
        ) from error
    return Plan(name, setup, step, limit_name, limit, card, utilization, steps, assumed)


def _untied(name: str, model: Student, config: PreTrainedConfig, task: str) -> tuple[str, ...]:
    """Parameters that the configuration ties, and the weights of the model do not."""
    source = config if recorded(name) or isinstance(model, PreTrainedConfig) else model
    source = resolve_model(source) if isinstance(source, str | Path) else source
    with in_one_sentence(name, f"as a {task} model"):
        made = built(config_text(config), task)
    return untied(made, source)


def _with_student(setup: Setup, student: Student, own: tuple[str, PreTrainedConfig], teacher: str) -> Setup:
    """The set-up with a model of its own, (name, configuration), as the student."""
    name, config = own
    if stored_precision(config) is not None:
        raise ValueError(f"the student {name} is stored in few bits (quantization_config), which cannot be trained.")
    positions = position_limit(config_text(config), setup.task)
    if positions is not None and setup.seq > positions:
        raise ValueError(f"{setup.seq} tokens a row, and the student {name} has {positions} positions.")
    if setup.task not in ("sequence-classification", "encoder"):
        sizes = (side.get_text_config().vocab_size for side in (config, setup.teacher_config()))
        check_vocabularies(*zip((name, teacher), sizes, strict=True))
    tied_not = _untied(name, student, config, setup.task)
    return replace(setup, student=config_text(config), student_name=name, student_untied=tied_not)


def describe(setup: Setup) -> str:
    """The set-up in a few words: student, batch, length, and what is out of the ordinary."""
    depth = setup.layers if isinstance(setup.layers, int) else len(setup.layers)
    student = setup.student_name.split("/")[-1] or f"{depth} layers" + (f" × {setup.width}" if setup.width else "")
    rest = [setup.lora and f"LoRA r {setup.lora}"]
    rest += [setup.quantize and f"{setup.quantize[0]}-bit teacher", setup.checkpointing and "checkpointing"]
    return ", ".join([student, f"batch {setup.batch} × {setup.seq}", *(word for word in rest if word)])


_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def _with_overhead(step: Step, accelerator: bool) -> dict[str, float]:
    memory = {part: float(size) for part, size in step.memory.items()}
    if accelerator:
        moving = sum(size for part, size in memory.items() if part not in FIXED)
        memory["overhead"] = CONTEXT + FRAGMENTS * moving
    return memory


def _changes(setup: Setup, largest_batch: int) -> Iterator[tuple[str, dict]]:
    if not setup.checkpointing:
        yield "gradient checkpointing", {"checkpointing": True}
    if setup.batch > 1:
        batch = largest_batch if 0 < largest_batch < setup.batch else setup.batch // 2
        yield f"batch {batch}", {"batch": batch}
    if setup.dtype == "fp32":
        yield "bf16", {"dtype": "bf16"}
    if setup.quantize is None:
        yield "8-bit teacher", {"quantize": "8bit"}
    if setup.quantize != "4bit" and not setup.stored:
        yield "4-bit teacher", {"quantize": "4bit"}
    if setup.optimizer == "adamw":
        yield "8-bit AdamW", {"optimizer": "adamw-8bit"}


def _size(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.3g} B"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
