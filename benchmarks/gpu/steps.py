"""Whole training steps on the device beside the CPU's float64: the four terms, every kind of term, every recipe,
and the four terms in half precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.gpu.check import Bench, Check, Finding, NotRun, relative_error, within
from benchmarks.models import QUICK, Batch, models, random_batch
from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, capture, recipes
from fakit.objective.feature_terms import KINDS
from fakit.objective.units import Units, fit_units
from fakit.training.precision import bf16_is_fast

STEPS, LENGTH = 3, 0.1
BARS = {"losses of three steps": 1e-4, "movement of the weights": 2e-3}  # relative errors
# Of one step; autocast rounds each product to 8 bits (bf16) or 11 (fp16).
HALF_BARS = {torch.bfloat16: (0.05, 0.1), torch.float16: (0.02, 0.05)}
PAIRS = LayerMap([(1, 2), (2, 4), (3, 6)])

Made = tuple[PreTrainedModel, PreTrainedModel, Objective, Batch]


def checks() -> list[Check]:
    """The four terms in two families, each kind of further term, each recipe; bf16 and fp16."""
    whole = {"the four terms, BERT": encoder, "the four terms, Llama": decoder}
    whole |= {f"term {kind}": partial(one_term, kind) for kind in KINDS}
    whole |= {f"recipe {name}": partial(one_recipe, name) for name in recipes.RECIPES}
    steps = [Check("training steps", name, partial(equal, make)) for name, make in whole.items()]
    halves = [
        Check("half precision", f"{str(dtype).removeprefix('torch.')} autocast, {family}", partial(half, make, dtype))
        for dtype in HALF_BARS
        for family, make in (("BERT", encoder), ("Llama", decoder))
    ]
    return steps + halves


# -- what is trained --------------------------------------------------------------------------------------------------


def four_terms() -> Objective:
    """Hidden states, attention, outputs and labels."""
    return Objective(PAIRS, Features("mse"), Attention("kl"), Outputs("forward_kl", temperature=2.0), Task())


def lively(*pair: PreTrainedModel) -> tuple[PreTrainedModel, ...]:
    """The models with larger random weights. As transformers draws them, small ones attend to all tokens alike and say
    the same of all, and a comparison of such models shows little. Norms and biases, too: means and variances of hidden
    states that are 0 and 1 but for rounding have a gradient of rounding in MobileBERT's loss.
    """
    random = torch.Generator().manual_seed(0)
    for model in pair:
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=random)
            weight.data = drawn * 1.5 / weight.shape[1] ** 0.5 if weight.dim() == 2 else weight.data + 0.3 * drawn
    return pair


def encoder() -> Made:
    """BERT with masked tokens."""
    return *lively(*models(QUICK, head=BertForMaskedLM)), four_terms(), random_batch(QUICK, rows=3, tokens=24)


def decoder() -> Made:
    """Llama with grouped keys, a large enough vocabulary to be chunked, and padding on the right."""
    torch.manual_seed(0)
    teacher, student = (
        LlamaForCausalLM._from_config(
            LlamaConfig(
                vocab_size=QUICK.vocabulary,
                hidden_size=QUICK.width,
                intermediate_size=2 * QUICK.width,
                num_hidden_layers=layers,
                num_attention_heads=QUICK.heads,
                num_key_value_heads=QUICK.heads // 2,
            ),
            attn_implementation="sdpa",
        )
        for layers in (QUICK.teacher_layers, QUICK.student_layers)
    )
    batch = random_batch(QUICK, rows=3, tokens=24)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return *lively(teacher.eval().requires_grad_(False), student.train()), four_terms(), batch


def one_term(kind: str) -> Made:
    """A kind of term by itself, with its own settings left as they are but for its layer map."""
    teacher, student, _, batch = encoder()
    width = student.config.hidden_size
    layer_map = LayerMap.every(QUICK.student_layers, QUICK.teacher_layers) if kind == "earth_mover" else PAIRS
    objective = Objective(layer_map, terms={kind: KINDS[kind]()}).prepare(width, width)
    if objective.of_kind(Units):
        fit_units(objective, teacher, [batch])
    return teacher, student, objective, batch


def one_recipe(name: str) -> Made:
    """A recipe's objective between classifiers, which every recipe takes; of three classes: rankings refuse two."""
    teacher, student = models(QUICK, head=BertForSequenceClassification)
    for model in (teacher, student):
        model.classifier = nn.Linear(model.config.hidden_size, 3)
        model.config.num_labels = model.num_labels = 3
    lively(teacher.requires_grad_(False), student)
    batch = random_batch(QUICK, rows=3, tokens=24) | {"labels": torch.arange(3)}
    return teacher, student, recipes.RECIPES[name]().objective(student, teacher), batch


# -- a step -----------------------------------------------------------------------------------------------------------


def placed(made: Made, device: torch.device, dtype: torch.dtype = torch.float32) -> Made:
    """Copies of models, objective and batch, there."""
    teacher, student, objective = (copy.deepcopy(part).to(device, dtype) for part in made[:3])
    return teacher, student, objective, {name: value.to(device) for name, value in made[3].items()}


def loss_of(made: Made) -> Tensor:
    """The total of the objective over both models' traces."""
    teacher, student, objective, batch = made
    given, needs = objective.needs("teacher"), objective.needs("student")
    with torch.no_grad():
        theirs = capture(teacher, batch, **given.asked())
    return objective(capture(student, batch, **needs.asked()), theirs, batch["labels"]).total


def trained(made: Made) -> list[nn.Parameter]:
    """What a step moves."""
    return [p for part in made[1:3] for p in part.parameters() if p.requires_grad]


def three_steps(made: Made) -> tuple[Tensor, Tensor]:
    """Losses, and how far all weights moved, in one vector.

    Gradient descent, each step of one length: AdamW's first steps are as long for a weight whose gradient is 0 but for
    rounding as for any other, and the recipes' losses lie between 1e-3 and 1e3.
    """
    weights, losses = trained(made), []
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.SGD(weights, lr=LENGTH)
    for step in range(STEPS):
        made[2].set_step(step, of=10)
        loss = loss_of(made)
        optimizer.zero_grad()
        loss.backward()
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        torch._foreach_div_(gradients, nn.utils.get_total_norm(gradients))
        optimizer.step()
        losses.append(loss.detach())
    moved = [(now.detach() - old).flatten() for now, old in zip(weights, before, strict=True)]
    return torch.stack(losses), torch.cat(moved)


def equal(make: Callable[[], Made], bench: Bench) -> Finding:
    """Three steps on the device in float32, and on the CPU in float64, from the same weights."""
    made = make()
    exact = three_steps(placed(made, torch.device("cpu"), torch.float64))
    found = three_steps(placed(made, bench.device))
    errors = {name: relative_error(*pair) for name, *pair in zip(BARS, found, exact, strict=True)}
    return Finding({"first loss": exact[0][0].item()} | errors, within(errors, BARS))


def half(make: Callable[[], Made], dtype: torch.dtype, bench: Bench) -> Finding:
    """Loss and gradient under autocast on the device against float64 on the CPU."""
    if dtype == torch.bfloat16 and not bench.on_cpu and not bf16_is_fast(bench.device):
        raise NotRun(f"{torch.cuda.get_device_name(bench.device)} has no bf16 arithmetic")
    made = make()

    def compute(made: Made, mixed: bool) -> tuple[Tensor, Tensor]:
        weights = trained(made)
        with torch.autocast(made[3]["input_ids"].device.type, dtype, enabled=mixed):
            loss = loss_of(made)
        loss.backward()
        return loss, torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in weights])

    exact = compute(placed(made, torch.device("cpu"), torch.float64), False)
    found = compute(placed(made, bench.device), True)
    errors = {name: relative_error(*pair) for name, *pair in zip(("loss", "gradient"), found, exact, strict=True)}
    bars = dict(zip(errors, HALF_BARS[dtype], strict=True))
    return Finding({"exact loss": exact[0].item()} | errors, within(errors, bars))
