"""Feature matching: how far are the student's hidden states from the teacher's?

Every function takes student (B, T, d), teacher (B, T, d) and mask, bool (B, T), True = counts (None = all count), and
returns the mean over valid tokens, a scalar in float32 or better. Shapes that differ raise ValueError. The teacher gets
no gradient from `Objective`, which detaches it; the functions themselves are symmetric in what they differentiate.

Which one? Some dimensions of a language model's residual stream are hundreds of times larger than the rest, and plain
`mse` sees little else; `cosine` and `layernorm_mse` are not led by the scale of a token,
`fakit.similarity.rogue_dimensions` shows whether it matters.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fakit import warn_of_old_name
from fakit.losses.reduce import at_least_float32, check_mask, check_same_shape, masked_mean

_FIX = "Widths that differ need a projection: Features(..., projection='linear') learns one for each mapped layer."


def _prepare(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    check_same_shape(name, student, teacher, "B T d", _FIX)
    check_mask(name, mask, student.shape[:2])
    if mask is not None:  # what stands in padding may be inf or NaN: it must not reach a norm, nor its gradient
        padding = ~mask.bool().unsqueeze(-1)
        student, teacher = student.masked_fill(padding, 0.0), teacher.masked_fill(padding, 0.0)
    return at_least_float32(student), at_least_float32(teacher)


def _unit(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last dimension. A row of zeros has no direction: it stays 0, and gets no gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    nothing = norm < 1e-12
    return torch.where(nothing, 0.0, x / norm.masked_fill(nothing, 1.0))


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error, `mean_t mean_d (s - t)²`. FitNets (Romero et al. 2015); the feature term of arXiv 2412.19449.

    >>> import torch
    >>> mse(torch.zeros(1, 2, 4), torch.ones(1, 2, 4), torch.tensor([[True, False]])).item()
    1.0
    """
    student, teacher = _prepare("mse", student, teacher, mask)
    return masked_mean((student - teacher).square().mean(-1), mask)  # (B, T) -> ()


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cosine distance, `mean_t 1 - cos(s, t)`, in 0…2. DistilBERT (Sanh et al. 2019). Blind to each token's scale.

    A token that is all zeros on one side counts ½ and gets no gradient, on both sides 0.
    """
    student, teacher = _prepare("cosine", student, teacher, mask)
    # 1 - cos = ½‖s/‖s‖ - t/‖t‖‖²: the same number, but 0 to rounding squared where the two agree
    difference = _unit(student) - _unit(teacher)  # (B, T, d)
    return masked_mean(0.5 * difference.square().sum(-1), mask)


def normalized_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of L2-normalized rows, `mean_t mean_d (s/‖s‖ - t/‖t‖)²`. Patient KD (Sun et al. 2019).

    Equal to 2/d times `cosine`: the form PKD gives, whose β = 500 makes up for the division by d.
    """
    student, teacher = _prepare("normalized_mse", student, teacher, mask)
    return masked_mean((_unit(student) - _unit(teacher)).square().mean(-1), mask)


def layernorm_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of LayerNorm states without affine. MobileBERT's feature map transfer (Sun et al. 2020).

    Each token is centered and scaled to unit variance over its d dimensions first,
    so neither its offset nor its scale counts.
    """
    student, teacher = _prepare("layernorm_mse", student, teacher, mask)
    width = student.shape[-1:]
    return masked_mean((F.layer_norm(student, width) - F.layer_norm(teacher, width)).square().mean(-1), mask)


LOSSES = {"mse": mse, "cosine": cosine, "normalized_mse": normalized_mse, "layernorm_mse": layernorm_mse}
OLD_NAMES = {"normalised_mse": "normalized_mse"}


def __getattr__(name: str):
    if name not in OLD_NAMES:
        raise AttributeError(f"fakit.losses.features has no {name!r}; its losses are {', '.join(LOSSES)}")
    warn_of_old_name(name, OLD_NAMES[name])
    return LOSSES[OLD_NAMES[name]]
