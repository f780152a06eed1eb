"""bf16 or float32: one decision, by what the device computes faster.
`bf16="auto"` in configurations and notebooks means this one.

    with autocast(device):                       # a loop of one's own
    use_bf16("auto", device)                     # True or False, e.g. for TrainingArguments(bf16=…)

A GPU says whether it has bf16 arithmetic. A processor is asked twice: whether it has such instructions
(`torch.cpu.get_capabilities`), and, if so, how long a linear layer takes in bf16 and in float32, since a limit
(`ONEDNN_MAX_CPU_ISA`), a build of torch or a hypervisor may keep the instructions from being used. Where they are not,
bf16 is emulated and takes several times as long as float32.
"""

from __future__ import annotations

import functools
import time
import warnings
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import TrainingArguments

AUTO = "auto"
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")  # x86, then Arm; named as torch names them


def use_bf16(asked: bool | str = AUTO, device: str | torch.device = AUTO) -> bool:
    """True where a run takes bf16 autocast, False where it computes in float32.

    In a job of several processes all of them call this: with "auto" they take bf16 only where it is faster for each.

    Args:
        asked: "auto", or True or False, which is obeyed: True with a UserWarning where it is slower than float32.
        device: "cpu", "cuda", "cuda:1", …; "auto" takes the accelerator where there is one.

    Raises:
        ValueError: `asked` is none of the three.

    >>> use_bf16(False)
    False
    """
    device = _device(device)
    if asked == AUTO:
        return _all_agree(bf16_is_fast(device), device)
    if not isinstance(asked, bool):
        raise ValueError(f"bf16 is {asked!r}; choose 'auto', True or False.")
    if asked and not bf16_is_fast(device):
        found = "has no bf16 arithmetic that torch knows of"
        if device.type == "cpu":
            found = f"takes {bf16_cost():.2g} times as long for a linear layer in bf16 as in float32"
        warnings.warn(f"bf16 was requested, and this {device.type} {found}; 'auto' takes the faster one.", stacklevel=2)
    return asked


def autocast(device: str | torch.device = AUTO, bf16: bool | str = AUTO) -> torch.autocast:
    """The context in which a step's forward passes run: bf16 autocast where `use_bf16` says so,
    else nothing changes.
    """
    device = _device(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(bf16, device))


def settle(args: TrainingArguments) -> None:
    """Put the decision in the place of `args.bf16` ("auto", True or False),
    before an accelerator is made of the arguments.
    """
    asked, args.bf16 = args.bf16, use_bf16(args.bf16, args.device)
    if args.bf16 or asked == AUTO:  # with False the launcher has its word (`accelerate launch --mixed_precision`)
        args.mixed_precision = "bf16" if args.bf16 else "no"


def precision_name(mixed_precision: str) -> str:
    """What a record calls Accelerate's "no", "bf16" or "fp16"."""
    return "float32" if mixed_precision == "no" else mixed_precision


@functools.cache
def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 is the faster one, decided once a process; a list of processors' or GPUs' names is not looked at."""
    if device.type in ("cuda", "xpu"):
        accelerator = torch.get_device_module(device)
        with accelerator.device(device):
            return accelerator.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":  # MPS among them: Metal does not say whether bf16 is emulated
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in _INSTRUCTIONS) and bf16_cost() < 1


@functools.cache
def bf16_cost() -> float:
    """Time of a linear layer, forward and backward, under bf16 autocast over that in float32, on this CPU.

    The least of several turns, taken in alternation, in the processor time of one thread: other work on the machine
    does not count, so that the answer is the same each time. Without bf16 arithmetic it is between 3 and 15,
    with it below .8.
    """
    clock = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-5 else time.perf_counter
    x, weight = torch.full((256, 384), 0.5), torch.full((768, 384), 0.5, requires_grad=True)

    def seconds(bf16: bool) -> float:
        start = clock()
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            torch.autograd.grad(F.linear(x, weight).sum(), weight)
        return clock() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = [(seconds(True), seconds(False)) for _ in range(6)]
    finally:
        torch.set_num_threads(threads)
    return min(b for b, _ in turns[1:]) / min(f for _, f in turns[1:])  # the first turn makes oneDNN's kernels


def _device(device: str | torch.device) -> torch.device:
    if device != AUTO:
        return torch.device(device)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _all_agree(fast: bool, device: torch.device) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return fast
    votes = torch.tensor(int(fast), device=device)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN)
    return bool(votes)
