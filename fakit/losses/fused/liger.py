"""Output matching by Liger's chunked loss, where a GPU and the package liger_kernel are there.
Nothing here needs the package otherwise.

`LigerFusedLinearJSDLoss` (read at 0.8.5) is the idea of `fakit.losses.fused.chunked`, with torch.compile around each
chunk. Its β of 0 and 1 mean forward and reverse KL, β between them the Jensen-Shannon divergence of `outputs.jsd`; it
divides by the number of targets that are not -100 and leaves τ² to its caller. In float32 on a CPU, uncompiled, value
and gradients of the three equal ours to 4e-7. Any β but ½ is computed by `chunked` itself:
releases of Liger differ in which side β weighs.

The compiled path runs on a GPU alone: `make gpu` compares its result, speed and memory (docs/gpu.md).
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from fakit.losses.fused.output_head import Head

# name in `outputs.PER_POSITION` → Liger's β
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


def serves(divergence: object, *heads: Head) -> bool:
    """Whether Liger is there for these hidden states and heads, and means by `divergence` what we mean.

    Float32 alone: Liger divides half-precision logits by τ as they are, and outside autocast takes their softmax so as
    well, where every loss of ours is computed in float32 (bf16 autocast on a CPU: its value is 0.1 to 0.6 % from ours).
    """
    return (
        isinstance(divergence, str)
        and divergence in BETAS
        and all(x.is_cuda and x.dtype == torch.float32 for head in heads for x in (head.hidden, head.weight))
        and not torch.is_autocast_enabled("cuda")
        and find_spec("liger_kernel") is not None
    )


def output_loss(student: Head, teacher: Head, mask: Tensor | None, divergence: str, temperature: float) -> Tensor:
    """The outputs term of `chunked.fused_outputs` by Liger. Hidden states (N, d), mask bool (N,) or None. A scalar."""
    student_hidden, teacher_hidden = student.hidden, teacher.hidden
    if mask is None:
        targets = torch.zeros(student_hidden.shape[0], dtype=torch.long, device=student_hidden.device)
    else:  # Liger masks by targets; which class they name matters to its hard loss alone, which has weight 0
        targets = torch.where(mask.bool(), 0, -100)
        padding = ~mask.bool().unsqueeze(-1)  # NaN in padding must not reach the products
        student_hidden, teacher_hidden = (x.masked_fill(padding, 0.0) for x in (student_hidden, teacher_hidden))
    loss = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=temperature**2,
        beta=BETAS[divergence],
        temperature=temperature,
        compiled=student_hidden.is_cuda,
    )
    return loss(student_hidden, student.weight, teacher_hidden, teacher.weight, targets, student.bias, teacher.bias)
