"""Feature matching: how far are the student's hidden states from the teacher's?

Every function takes student (B, T, d), teacher (B, T, d) and mask, bool (B, T), True = counts (None = all count), and
returns the mean over valid tokens, a scalar in float32 or better. Shapes that differ raise ValueError. The teacher gets
no gradient from `Objective`, which detaches it; the functions themselves are symmetric in what they differentiate.

Which one? Some dimensions of a language model's residual stream are hundreds of times larger than the rest, and plain
`mse` sees little else; `cosine` and `layernorm_mse` are not led by the scale of a token,
`fakit.similarity.rogue_dimensions` shows whether it matters. Losses that compare relations between tokens need no equal
widths: `fakit.losses.relational`, whose functions are here, too.
"""

from torch import Tensor
from torch.nn import functional as F

from fakit import warn_of_old_name
from fakit.losses import relational
from fakit.losses.reduce import at_least_float32, check_mask, check_same_shape, masked_mean, unit
from fakit.losses.relational import (
    cka_loss,
    codir,
    correlation,
    gram,
    margin_ranking,
    nst,
    procrustes,
    rkd_angle,
    rkd_distance,
    similarity,
)

__all__ = [
    "LOSSES",
    "OLD_NAMES",
    "cka_loss",
    "codir",
    "correlation",
    "cosine",
    "gram",
    "l1_cosine",
    "l2",
    "layernorm_mse",
    "margin_ranking",
    "mobilebert",
    "mse",
    "normalized_mse",
    "nst",
    "procrustes",
    "rkd_angle",
    "rkd_distance",
    "similarity",
    "smooth_l1",
]

_FIX = "Widths that differ need a projection: Features(..., projection='linear') learns one for each mapped layer."


def _prepare(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    check_same_shape(name, student, teacher, "B T d", _FIX)
    check_mask(name, mask, student.shape[:2])
    if mask is not None:  # what stands in padding may be inf or NaN: it must not reach a norm, nor its gradient
        padding = ~mask.bool().unsqueeze(-1)
        student, teacher = student.masked_fill(padding, 0.0), teacher.masked_fill(padding, 0.0)
    return at_least_float32(student), at_least_float32(teacher)


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error, `mean_t mean_d (s - t)²`. FitNets (Romero et al. 2015); the feature term of arXiv 2412.19449.

    >>> import torch
    >>> mse(torch.zeros(1, 2, 4), torch.ones(1, 2, 4), torch.tensor([[True, False]])).item()
    1.0
    """
    student, teacher = _prepare("mse", student, teacher, mask)
    return masked_mean((student - teacher).square().mean(-1), mask)  # (B, T) -> ()


def l2(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Euclidean distance, `mean_t ‖s - t‖`. EmbedDistill (Kim et al. 2023, arXiv 2301.12005), of pooled states: each
    token, or text, pulls as hard as any other, however far it is. Where the two agree it has no gradient.
    """
    student, teacher = _prepare("l2", student, teacher, mask)
    return masked_mean((student - teacher).norm(dim=-1), mask)  # (B, T) -> ()


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cosine distance, `mean_t 1 - cos(s, t)`, in 0…2. DistilBERT (Sanh et al. 2019). Blind to each token's scale.

    A token that is all zeros on one side counts ½ and gets no gradient, on both sides 0.
    """
    student, teacher = _prepare("cosine", student, teacher, mask)
    # 1 - cos = ½‖s/‖s‖ - t/‖t‖‖²: the same number, but 0 to rounding squared where the two agree
    difference = unit(student) - unit(teacher)  # (B, T, d)
    return masked_mean(0.5 * difference.square().sum(-1), mask)


def normalized_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of L2-normalized rows, `mean_t mean_d (s/‖s‖ - t/‖t‖)²`. Patient KD (Sun et al. 2019).

    Equal to 2/d times `cosine`: the form PKD gives, whose β = 500 makes up for the division by d.
    """
    student, teacher = _prepare("normalized_mse", student, teacher, mask)
    return masked_mean((unit(student) - unit(teacher)).square().mean(-1), mask)


def layernorm_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of LayerNorm states without affine. MobileBERT's feature map transfer (Sun et al. 2020).

    Each token is centered and scaled to unit variance over its d dimensions first,
    so neither its offset nor its scale counts.
    """
    student, teacher = _prepare("layernorm_mse", student, teacher, mask)
    width = student.shape[-1:]
    return masked_mean((F.layer_norm(student, width) - F.layer_norm(teacher, width)).square().mean(-1), mask)


def smooth_l1(student: Tensor, teacher: Tensor, mask: Tensor | None = None, beta: float = 1.0) -> Tensor:
    """Huber's loss, `mean_t mean_d ½ (s - t)²/β` where |s - t| < β, else `|s - t| - ½β`.

    EAGLE (Li et al. 2024), for the teacher's next hidden state, β = 1. Dimensions of a large scale pull by their sign
    alone.
    """
    if not beta > 0:
        raise ValueError(f"smooth_l1 wants beta above 0, the difference from which it is linear; found {beta!r}.")
    student, teacher = _prepare("smooth_l1", student, teacher, mask)
    return masked_mean(F.smooth_l1_loss(student, teacher, reduction="none", beta=beta).mean(-1), mask)


def l1_cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute error and direction, `mean_t [mean_d |s - t| - log σ(cos(s, t))]`. Lillama (Sy et al. 2025).

    Not 0 where the two agree: its least value, there, is log(1 + 1/e) = 0.3133. A token that is all zeros on one side
    has cosine 0.
    """
    student, teacher = _prepare("l1_cosine", student, teacher, mask)
    cos = (unit(student) * unit(teacher)).sum(-1)  # (B, T)
    return masked_mean((student - teacher).abs().mean(-1) - F.logsigmoid(cos), mask)


def mobilebert(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    hidden: float = 100.0,
    beta: float = 5000.0,
    gamma: float = 5.0,
) -> Tensor:
    """`layernorm_mse` with what it leaves out, a token's mean μ and variance σ² over its d dimensions:

        mean_t [hidden · mean_d (LN(s) - LN(t))² + beta · (μ_s - μ_t)² + gamma · |σ²_s - σ²_t|]

    MobileBERT (Sun et al. 2020): these three weights are those of its released training code.
    """
    student, teacher = _prepare("mobilebert", student, teacher, mask)
    width = student.shape[-1:]
    states = (F.layer_norm(student, width) - F.layer_norm(teacher, width)).square().mean(-1)  # (B, T)
    means = (student.mean(-1) - teacher.mean(-1)).square()
    variances = (student.var(-1, correction=0) - teacher.var(-1, correction=0)).abs()
    return masked_mean(hidden * states + beta * means + gamma * variances, mask)


LOSSES = {
    "mse": mse,
    "cosine": cosine,
    "normalized_mse": normalized_mse,
    "layernorm_mse": layernorm_mse,
    "smooth_l1": smooth_l1,
    "l1_cosine": l1_cosine,
    "l2": l2,
    "mobilebert": mobilebert,
} | relational.LOSSES
OLD_NAMES = {"normalised_mse": "normalized_mse"}


def __getattr__(name: str):
    if name not in OLD_NAMES:
        raise AttributeError(f"fakit.losses.features has no {name!r}; its losses are {', '.join(LOSSES)}")
    warn_of_old_name(name, OLD_NAMES[name])
    return LOSSES[OLD_NAMES[name]]
