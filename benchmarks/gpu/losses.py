"""Every named loss on the device beside the CPU's float64: value and gradient, and half-precision inputs."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor

import fakit.losses
from benchmarks.gpu.check import Bench, Check, Finding, relative_error, within
from fakit.losses.logits import asked_of
from fakit.losses.task import task_loss

B, T, D, H, V = 4, 24, 48, 3, 211
# What the losses of a module take.
KINDS = {"features": "states", "relational": "states", "attention": "maps", "outputs": "logits"}
# Relative errors. On a CPU those of float32 are at most 3e-7 (values) and 7e-7 (gradients).
BARS = {
    "value, float32": 1e-5,
    "gradient, float32": 1e-4,
    "value, float64": 1e-9,
    "gradient, float64": 1e-7,
    "value near equality": 1e-3,
    "value, bfloat16": 1e-5,
    "value, float16": 1e-5,
}


def named_losses() -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """{"features.mse": (module, loss)} of every table `LOSSES` in `fakit.losses`; a loss that two tables name, once."""
    found: dict[str, tuple[str, Callable[..., Tensor]]] = {}
    for info in pkgutil.iter_modules(fakit.losses.__path__):
        table = vars(import_module(f"fakit.losses.{info.name}")).get("LOSSES", {})
        known = [loss for _, loss in found.values()]
        found |= {f"{info.name}.{name}": (info.name, loss) for name, loss in table.items() if loss not in known}
    return found


def checks() -> list[Check]:
    """A check of each named loss, and of each problem of the task's loss."""
    named = [Check("losses", name, partial(equal, module, loss)) for name, (module, loss) in named_losses().items()]
    return named + [Check("losses", f"task.{name}", partial(equal_task, name)) for name in TASKS]


def inputs(module: str, near: bool = False, rounded: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher in float64, and mask (B, T).

    Args:
        near: the student is almost the teacher, as late in training, where differences of large numbers lose digits.
        rounded: the numbers are those that this dtype holds, so that every dtype is given the same.

    Raises:
        ValueError: a module whose losses take nobody knows what.
    """
    if module not in KINDS:
        raise ValueError(
            f"fakit.losses.{module} has LOSSES, and benchmarks/gpu/losses.py does not know what they take; add it to "
            f"KINDS, beside {', '.join(KINDS)}."
        )
    random = torch.Generator().manual_seed(0)
    shape = {"states": (B, T, D), "maps": (B, H, T, T), "logits": (B, T, V)}[KINDS[module]]
    student, teacher = (2 * torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(2))
    if near:
        student = teacher + student / 100
    if KINDS[module] == "maps":
        student, teacher = student.softmax(-1), teacher.softmax(-1)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[-1, -T // 4 :] = False
    return student.to(rounded).double(), teacher.to(rounded).double(), mask


def value_and_gradient(
    module: str, loss: Callable[..., Tensor], dtype: torch.dtype, device: torch.device, **numbers
) -> list[Tensor]:
    """[value (), gradient for the student]; `numbers` are those of `inputs`."""
    student, teacher, mask = inputs(module, **numbers)
    student, teacher = (x.to(device, dtype) for x in (student, teacher))
    given = {}
    if KINDS[module] == "logits":
        given["temperature"] = 2.0
        if "labels" in asked_of(loss):
            given["labels"] = _labels(device)
    value = loss(student.requires_grad_(), teacher, mask.to(device), **given)
    return [value, *torch.autograd.grad(value, student)]


def _labels(device: torch.device) -> Tensor:
    labels = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    labels[0, :3] = -100
    return labels.to(device)


def equal(module: str, loss: Callable[..., Tensor], bench: Bench) -> Finding:
    """A loss on the device against the same function in float64 on the CPU, of the same numbers."""
    cpu = torch.device("cpu")
    value, gradient = value_and_gradient(module, loss, torch.float64, cpu)
    errors: dict[str, float] = {}
    # on a CPU float64 would be compared with itself
    for dtype in (torch.float32,) if bench.on_cpu else (torch.float32, torch.float64):
        found = value_and_gradient(module, loss, dtype, bench.device)
        errors |= {f"value, {_name(dtype)}": relative_error(found[0], value)}
        errors |= {f"gradient, {_name(dtype)}": relative_error(found[1], gradient)}
    found, exact = (
        value_and_gradient(module, loss, dtype, device, near=True)[0]
        for dtype, device in ((torch.float32, bench.device), (torch.float64, cpu))
    )
    # of what is below .001, in units of .001: a logarithm near 0 has float32's absolute error, not its relative one
    errors["value near equality"] = abs(found.item() - exact.item()) / max(abs(exact.item()), 1e-3)
    for half in (torch.bfloat16, torch.float16):
        found, exact = (
            value_and_gradient(module, loss, dtype, device, rounded=half)[0]
            for dtype, device in ((half, bench.device), (torch.float64, cpu))
        )
        errors[f"value, {_name(half)}"] = relative_error(found, exact)
    return Finding({"value": value.item()} | errors, within(errors, BARS))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- the task's own loss ----------------------------------------------------------------------------------------------


def _token_classes(random: torch.Generator) -> tuple[Tensor, Tensor, dict]:
    return torch.randn(B, T, V, generator=random), _labels(torch.device("cpu")), {"causal": True}


def _several(random: torch.Generator) -> tuple[Tensor, Tensor, dict]:
    labels = (torch.rand(B, V, generator=random) < 0.3).double()
    return torch.randn(B, V, generator=random), labels, {"problem_type": "multi_label_classification"}


def _score(random: torch.Generator) -> tuple[Tensor, Tensor, dict]:
    return torch.randn(B, 1, generator=random), torch.randn(B, generator=random).double(), {}


TASKS = {"next tokens": _token_classes, "several labels": _several, "regression": _score}


def equal_task(name: str, bench: Bench) -> Finding:
    """The task's loss on the device against float64 on the CPU."""
    logits, labels, given = TASKS[name](torch.Generator().manual_seed(0))

    def compute(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        ours = logits.to(device, dtype).requires_grad_()
        value = task_loss(ours, labels.to(device), **given)
        return [value, *torch.autograd.grad(value, ours)]

    exact = compute(torch.float64, torch.device("cpu"))
    found = compute(torch.float32, bench.device)
    pairs = zip(("value, float32", "gradient, float32"), found, exact, strict=True)
    errors = {what: relative_error(ours, wanted) for what, ours, wanted in pairs}
    return Finding({"value": exact[0].item()} | errors, within(errors, BARS))
