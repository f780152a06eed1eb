"""One training step of a plan, run on fake tensors: what is in memory at its peak, and its FLOPs."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from fakit.evaluation.batches import TOKENS
from fakit.evaluation.fidelity import Agreement
from fakit.evaluation.labeled import labeled_logits
from fakit.evaluation.language_modeling import summed_nll
from fakit.layer_maps import LayerMap
from fakit.models.blocks import find_blocks, stack_depths
from fakit.models.kinds import remember_causal, untie
from fakit.models.peft_students import LORA, TASK_TYPES
from fakit.models.positions import longest_row
from fakit.models.shrink import shrink
from fakit.objective.attention import Attention
from fakit.objective.features import Features
from fakit.objective.objective import Objective
from fakit.objective.outputs import Outputs
from fakit.objective.task import Task
from fakit.planner.fake import give_fake_weights, loops_of, meta_model, quantize, run_one_of_each
from fakit.planner.ledger import Ledger
from fakit.tracing.capture import capture
from fakit.tracing.head_finder import remember_finish
from fakit.tracing.trace import Trace

TERMS = ("features", "attention", "outputs", "task")
OPTIMIZERS = ("adamw", "adamw-8bit", "adafactor", "sgd")
PARTS = (
    "teacher weights",
    "teacher activations",
    "captured traces",
    "student weights",
    "student activations",
    "gradients",
    "optimizer state",
    "losses",
    "overhead",
)
EVALUATED = 64  # rows of an evaluation's batch at most, as `fakit.evaluation.evaluate` takes them
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attn_dropout")


def _config(text: str) -> PreTrainedConfig:
    values = json.loads(text)
    return AutoConfig.for_model(values.pop("model_type"), **values)


@dataclass(frozen=True)
class Setup:
    """What decides about memory and FLOPs of a step; see `fakit.planner.plan` for each."""

    config: str  # the teacher's configuration as JSON
    task: str
    layers: int | tuple[int, ...]
    width: int | None
    batch: int
    seq: int
    quantize: str | None = None
    dtype: str = "bf16"
    optimizer: str = "adamw"
    checkpointing: bool = False
    terms: tuple[str, ...] = TERMS
    pairs: tuple[tuple[int, int], ...] | None = None
    accelerator: bool = True
    untied: tuple[str, ...] = ()  # parameters that the configuration ties and the teacher's weights do not
    stored: bool = False  # the checkpoint is quantized already
    student: str | None = None  # the configuration of a student that is a model of its own, as JSON
    student_name: str = ""
    student_untied: tuple[str, ...] = ()
    lora: int | None = None  # the rank of the student's adapter, which is then all that is trained of it

    def teacher_config(self) -> PreTrainedConfig:
        """The configuration as an object."""
        return _config(self.config)


@dataclass(frozen=True)
class Step:
    """What a step costs.

    Attributes:
        memory: part → bytes, at the moment when most are in use; "overhead" left out.
        flops: "teacher forward", "student forward", "losses", "backward" → FLOPs.
        single: the same → those of them that are computed in float32.
        written: the same, and "optimizer" → bytes that are written.
        parameters: "teacher", "student" → number.
        trainable: number of entries that the optimizer has, projections included.
        weight_bytes: "teacher", "student" → bytes of weights as stored.
        depths: "teacher", "student" → layers; widths: the same → hidden size.
        stacked: number of the teacher's weights that are experts of a mixture, all of a layer's in one tensor,
            which is never quantized.
        cached: what a teacher cache in bfloat16 keeps → bytes a token, logits whole; of a classifier's logits, a row.
        evaluation: bytes at the peak of evaluating a batch, weights and optimizer state included.
        evaluation_rows: rows of that batch.
    """

    memory: dict[str, int]
    flops: dict[str, float]
    single: dict[str, float]
    written: dict[str, float]
    parameters: dict[str, int]
    trainable: int
    weight_bytes: dict[str, int]
    depths: dict[str, int]
    widths: dict[str, int]
    stacked: int = 0
    cached: dict[str, float] = field(default_factory=dict)
    evaluation: int = 0
    evaluation_rows: int = 0


@lru_cache(maxsize=256)
def simulate(setup: Setup) -> Step:
    """Run the step of a setup without data. Seconds for the largest teachers; each setup once a process."""
    mixed = setup.dtype == "bf16"
    config = setup.teacher_config()
    teacher = meta_model(config, setup.task, torch.bfloat16 if mixed else torch.float32)
    untie(teacher, setup.untied)
    student = _student(setup, teacher)
    if setup.lora is not None:
        student = _adapted(student, setup)
    if setup.accelerator:  # fused kernels drop attention themselves; torch's CPU kernel does not, and makes the maps
        _without_attention_dropout(student)
    logical = {"teacher": _numel(teacher), "student": _numel(student)}
    depths = {side: sum(stack_depths(model)) for side, model in (("teacher", teacher), ("student", student))}
    objective = _objective(setup, teacher, student)
    if setup.quantize is not None:
        quantize(teacher, setup.quantize, on_cpu=not setup.accelerator)
    teacher.eval().requires_grad_(False)
    if setup.checkpointing:
        student.config.use_cache = False
        student.activation_checkpointing_enable()

    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    for part in (teacher, student, objective):
        give_fake_weights(part, fakes)
    for model in (teacher, student):  # known beforehand: asking it of the model would run it
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        remember_finish(model, None if cap is None else lambda z, cap=cap: cap * torch.tanh(z / cap))
        remember_causal(model, setup.task == "causal-lm")
    ledger, needs, cached = Ledger(), objective.needs("teacher"), {}
    # layer i is what block i gives and block i + 1 is given
    run_one_of_each(find_blocks(teacher), needs.layers, ledger)
    with fakes, ledger:
        ledger.phase = "teacher weights"
        ledger.book(_tensors(teacher))
        ledger.phase = "student weights"
        ledger.book([*_tensors(student), *_tensors(objective)])
        ledger.phase = "student activations"
        batch = _batch(setup, teacher)
        trainable = [p for model in (student, objective) for p in model.parameters() if p.requires_grad]
        state = optimizer_bytes(setup.optimizer, trainable)
        ledger.phase = "optimizer state"
        kept = torch.empty(state, dtype=torch.uint8)
        with loops_of(setup.accelerator, ledger), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            labels = batch.get("labels")
            theirs = None
            if objective.needs_teacher():
                ledger.phase = "teacher activations"
                with torch.no_grad():
                    theirs = _trace(teacher, batch, needs)
                ledger.move("captured traces", booked="teacher activations")
                cached = _cached(theirs, setup)
            ledger.phase = "student activations"
            ours = _trace(student, batch, objective.needs("student", labels is not None))
            ledger.phase = "losses"
            total = objective(ours, theirs, labels).total
        del ours, theirs
        ledger.phase = "backward"
        total.backward()
        ledger.claim("gradients", [p.grad for p in trainable if p.grad is not None])
        ledger.phase = "optimizer step"
        scratch = torch.empty(step_bytes(setup.optimizer, trainable), dtype=torch.uint8)
        del scratch, kept
    for parameter in trainable:
        parameter.grad = None
    rows = min(EVALUATED, max(1, TOKENS // setup.seq))
    evaluation = _evaluation(replace(setup, batch=rows), teacher, student, [objective], state, fakes)
    step = _booked(ledger, logical, depths, teacher, student, trainable)
    return replace(step, cached=cached, evaluation=evaluation, evaluation_rows=rows)


def _cached(theirs: Trace, setup: Setup) -> dict[str, float]:
    """Bytes a token that a cache in bfloat16 takes for a trace, by what it is."""
    inputs = [x for layer in theirs.attention.values() for x in (layer.query, layer.key)]
    numbers = {
        "hidden states": sum(x.numel() for x in theirs.hidden_states.values()),
        "queries and keys": sum(x.numel() for x in inputs),
    }
    logits, head = theirs.logits, theirs.head
    if head is not None:
        numbers["logits"] = head.hidden.shape[:-1].numel() * head.weight.shape[0]
    elif logits is not None:
        numbers["logits"] = logits.numel()
    return {name: 2 * number / (setup.batch * setup.seq) for name, number in numbers.items() if number}


def _student(setup: Setup, teacher: PreTrainedModel) -> PreTrainedModel:
    """On the meta device, in float32: a model of its own, or one of the teacher's layers."""
    if setup.student is not None:
        student = meta_model(_config(setup.student), setup.task, torch.float32)
        untie(student, setup.student_untied)
        return student
    with torch.device("meta"):
        layers = setup.layers if isinstance(setup.layers, int) else list(setup.layers)
        return shrink(teacher, layers, setup.width, init="random")


def _adapted(student: PreTrainedModel, setup: Setup) -> PreTrainedModel:
    """With an adapter on every linear layer but the head, as `student: {lora: {r: …}}` trains it."""
    from peft import LoraConfig, get_peft_model

    kind = {"task_type": TASK_TYPES[setup.task]} if setup.task in TASK_TYPES else {}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name of before
        return get_peft_model(student, LoraConfig(r=setup.lora, **LORA, **kind))


def _evaluation(setup: Setup, teacher, student, others, state: int, fakes: FakeTensorMode) -> int:
    """Bytes at the peak of a batch of `fakit.evaluation.evaluate`, while the optimizer's state is still there."""
    ledger = Ledger()
    student.eval()

    def forward(model: PreTrainedModel, **options):
        # a teacher stored in bf16 computes in it; a student in float32
        with torch.autocast("cpu", torch.bfloat16, enabled=model is teacher and setup.dtype == "bf16"):
            return capture(model, batch, **options)

    with fakes, ledger, torch.no_grad():
        ledger.book(tensor for part in (teacher, student, *others) for tensor in _tensors(part))
        batch = _batch(setup, teacher)
        kept = torch.empty(state, dtype=torch.uint8)
        labels = batch.get("labels")
        with loops_of(setup.accelerator, ledger):
            if setup.task == "causal-lm":
                traces = [forward(model, logits="head") for model in (student, teacher)]
                agreement = Agreement(5, acceptance=True)
                for logits, targets in labeled_logits(traces, labels):
                    summed_nll(logits[0], targets)
                    agreement.update(*logits)
            else:
                for model in (student, teacher):
                    forward(model)
        del kept
    return sum(ledger.peak().values())


def _booked(ledger: Ledger, logical, depths, teacher, student, trainable) -> Step:
    found = ledger.peak()
    # gradients of activations, and under checkpointing activations made again
    found["student activations"] = found.get("student activations", 0) + found.pop("backward", 0)
    found["optimizer state"] = found.get("optimizer state", 0) + found.pop("optimizer step", 0)
    phases = {"teacher forward": "teacher activations", "student forward": "student activations"}
    phases |= {"losses": "losses", "backward": "backward"}
    single = {name: float(ledger.flops[phase, "single"]) for name, phase in phases.items()}
    return Step(
        memory={part: found[part] for part in PARTS if found.get(part)},
        flops={name: single[name] + ledger.flops[phase, "half"] for name, phase in phases.items()},
        single=single,
        written={name: float(ledger.written[phase]) for name, phase in phases.items()},
        parameters=logical,
        trainable=sum(p.numel() for p in trainable),
        stacked=sum(p.numel() for p in teacher.parameters() if p.dim() == 3),
        weight_bytes={side: _bytes(model) for side, model in (("teacher", teacher), ("student", student))},
        depths=depths,
        widths={
            side: model.config.get_text_config().hidden_size
            for side, model in (("teacher", teacher), ("student", student))
        },
    )


@lru_cache(maxsize=64)
def built(config: str, task: str) -> PreTrainedModel:
    """A model of a configuration (as JSON) on the meta device, for looking at alone."""
    return meta_model(_config(config), task, torch.float32)


@lru_cache(maxsize=64)
def position_limit(config: str, task: str) -> int | None:
    """`longest_row` of a configuration.

    Args:
        config: the configuration as JSON; task: as for `load_teacher`.
    """
    return longest_row(built(config, task))


def optimizer_bytes(name: str, parameters: list[Tensor]) -> int:
    """Bytes that an optimizer keeps between steps: AdamW two float32 numbers an entry; in 8 bits two bytes and a scale
    for every 256 entries (tensors below 4,096 entries stay in float32); Adafactor a row and a column of each matrix;
    SGD without momentum nothing.
    """
    if name == "adamw":
        return sum(8 * p.numel() for p in parameters)
    if name == "adamw-8bit":
        return sum(
            8 * p.numel() if p.numel() < 4096 else 2 * (p.numel() + 4 * -(-p.numel() // 256)) for p in parameters
        )
    if name == "adafactor":
        return sum(
            4 * (p.numel() if p.dim() < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2]) for p in parameters
        )
    return 0


def step_bytes(name: str, parameters: list[Tensor]) -> int:
    """Bytes that the optimizer's step takes for a moment: fused AdamW none, Adafactor updates of the largest tensor."""
    return 8 * max(p.numel() for p in parameters) if name == "adafactor" else 0


def _objective(setup: Setup, teacher: PreTrainedModel, student: PreTrainedModel) -> Objective:
    ours, theirs = student.config.get_text_config(), teacher.config.get_text_config()
    counts = [getattr(config, "num_attention_heads", None) for config in (ours, theirs)]
    heads = "one-to-one" if counts[0] == counts[1] else "group-mean"
    terms = {
        "features": Features("mse"),
        "attention": Attention("kl", heads=heads),
        "outputs": Outputs("forward_kl", temperature=2.0),
        "task": Task(),
    }
    depths = [stack_depths(model) for model in (student, teacher)]
    layer_map = LayerMap.uniform(*depths) if setup.pairs is None else LayerMap(setup.pairs)
    layer_map.check(*depths)
    objective = Objective(layer_map, **{name: term for name, term in terms.items() if name in setup.terms})
    with torch.device("meta"):
        return objective.prepare(ours.hidden_size, theirs.hidden_size)


def _batch(setup: Setup, teacher: PreTrainedModel) -> dict[str, Tensor]:
    shape = (setup.batch, setup.seq)
    batch = {"input_ids": torch.zeros(shape, dtype=torch.long), "attention_mask": torch.ones(shape, dtype=torch.long)}
    if setup.task == "sequence-classification":
        batch["labels"] = torch.zeros(setup.batch, dtype=torch.long)
    elif setup.task != "encoder":
        batch["labels"] = torch.zeros(shape, dtype=torch.long)
    return batch


def _trace(model: PreTrainedModel, batch: dict[str, Tensor], needs):
    return capture(model, batch, **needs.asked())


def _without_attention_dropout(model: PreTrainedModel) -> None:
    for module in model.modules():
        for name in (*_ATTENTION_DROPOUT, "dropout_p", "dropout_prob"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    for name in _ATTENTION_DROPOUT:
        if isinstance(getattr(model.config, name, None), float):
            setattr(model.config, name, 0.0)


def _tensors(model: torch.nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _numel(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(model))
