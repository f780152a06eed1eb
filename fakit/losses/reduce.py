"""What every loss shares: precision, shape checks, and the mean over valid positions."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 are widened, float64 stays: a loss in half precision loses the small differences it is made of."""
    return x if x.dtype == torch.float64 else x.float()


def in_full(x: Tensor):
    """A context without autocast, which would take products of float32 tensors in half precision."""
    return torch.autocast(x.device.type, enabled=False)


def values_known(x: Tensor) -> bool:
    """Whether a tensor's numbers may be looked at.

    An accelerator would stop for it, a compiled graph would break, and a fake tensor has none, unless a mode around it
    answers for them, as the planner's does.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if not isinstance(x, FakeTensor):
        return True
    try:
        return torch.equal(x, x)
    except DataDependentOutputException:
        return False


def check_same_shape(name: str, student: Tensor, teacher: Tensor, dims: str, fix: str) -> None:
    """Raise ValueError unless both sides have one shape with as many dimensions as `dims` names ("B T d")."""
    if student.shape != teacher.shape or student.dim() != len(dims.split()):
        raise ValueError(
            f"{name} compares two tensors of one shape ({', '.join(dims.split())}); "
            f"student has {tuple(student.shape)}, teacher has {tuple(teacher.shape)}. {fix}"
        )


def check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `mask` is None or has `shape`, and (where that can be seen for free) counts something.

    On an accelerator, looking into the mask would stop the stream in every step; an all-masked batch gives NaN there
    instead, which `Breakdown.check` names at the next logging step.
    """
    if mask is None:
        return
    if mask.shape != shape:
        raise ValueError(
            f"{name} wants a mask of shape {tuple(shape)}, one entry a position; the mask has {tuple(mask.shape)}. "
            "Pass the batch's attention_mask as bool (True = counts)."
        )
    if not values_known(mask):
        return
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"{name} wants a bool mask (True = counts), or one of 0 and 1; this one is {mask.dtype} and holds other "
            f"numbers, such as {mask[(mask != 0) & (mask != 1)].flatten()[0].item():g}. An additive mask is turned by "
            "mask == 0, weights of tokens have no place here."
        )
    if not mask.any():
        raise ValueError(
            f"{name} has no valid position in the whole batch: all {mask.numel()} entries of the mask are False. "
            "True means 'counts': look at the collator, at truncation, or for an inverted mask."
        )


def check_labels(name: str, labels: Tensor, classes: int) -> None:
    """Raise ValueError for a label that is neither a class nor -100, where that can be seen for free.

    On an accelerator the kernels themselves stop at it (a device-side assert).
    """
    if not values_known(labels):
        return
    known = (labels == -100) | ((labels >= 0) & (labels < classes))
    if known.all():
        return
    wrong = labels[~known]
    raise ValueError(
        f"{name} wants labels from 0 to {classes - 1}, or -100 where one takes no part; found "
        f"{wrong.unique().tolist()[:5]} at {len(wrong)} of {labels.numel()} positions. Only -100 means 'no label': "
        "look at the collator's padding value, and whether model and labels agree on the number of classes."
    )


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values` where `mask` is True; the mask is broadcast from the left. () float.

    Masked entries are replaced before the sum, not multiplied by 0, so that NaN or inf in padding stays in padding,
    forward and backward.
    """
    if mask is None:
        return values.mean()
    mask = mask.bool().reshape(mask.shape + (1,) * (values.dim() - mask.dim())).expand_as(values)
    return values.masked_fill(~mask, 0.0).sum() / mask.sum()


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last dimension. A row of zeros has no direction: it stays 0, and gets no gradient."""
    norm = x.norm(dim=-1, keepdim=True)
    nothing = norm < 1e-12
    return torch.where(nothing, 0.0, x / norm.masked_fill(nothing, 1.0))
