"""From float32 to what is stored, and back: shorter floats, int8 with a scale for each vector, the k largest logits."""

import math

import torch
from torch import Tensor

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def pack(values: Tensor, dtype: str) -> dict[str, Tensor]:
    """Tensors to store for `values` (…, d), by the suffix of their names.

    int8 keeps x ≈ code · scale, with scale = max |x| / 127 over the last dimension: an error of at most scale / 2. The
    scale is rounded to bfloat16 before the codes are made, which costs nothing but two bytes a vector.

    Raises:
        ValueError: a number that is not finite, or not in the stored dtype.
    """
    if dtype == "int8":
        scale = (values.float().abs().amax(-1) / 127).to(torch.bfloat16)  # (…,)
        codes = values.float() / scale.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        packed = {"": codes.round().clamp(-127, 127).to(torch.int8), ".scale": scale}
    else:
        packed = {"": values.to(PRECISIONS[dtype])}
    if not all(torch.isfinite(tensor).all() for tensor in packed.values()):
        largest = values.float().abs().max().item()
        raise ValueError(
            f"the teacher gives numbers up to {largest:.3g}, and {dtype} cannot hold them all; "
            + ("look at the teacher's weights." if not math.isfinite(largest) else "use dtype='bfloat16'.")
        )
    return packed


def unpack(stored: dict[str, Tensor]) -> Tensor:
    """What `pack` was given, to the stored precision, in float32. (…, d)"""
    values = stored[""].float()
    return values.mul_(stored[".scale"].float().unsqueeze(-1)) if ".scale" in stored else values


def pack_top_k(logits: Tensor, top_k: int, dtype: str) -> dict[str, Tensor]:
    """The k largest of logits (N, V): log-probabilities in `dtype`, indices,
    and in float32 the logsumexp and the log of the rest's mass.
    """
    logits = logits.float()
    total = logits.logsumexp(-1)  # (N,)
    values, indices = logits.topk(top_k)  # (N, k)
    rest = logits.scatter(-1, indices, -torch.inf).logsumexp(-1) - total  # -inf where k = V
    # of log-probabilities the large ones are near 0, where any dtype is finest
    packed = pack(values - total.unsqueeze(-1), dtype)
    small = logits.shape[-1] <= 2**16
    return packed | {
        ".indices": indices.to(torch.uint16 if small else torch.int32),
        ".logsumexp": total,
        ".rest": rest,
    }


def unpack_top_k(stored: dict[str, Tensor], classes: int) -> Tensor:
    """Logits (N, V) whose k largest are the stored ones and whose other entries share the rest's mass evenly.

    Probabilities of the kept classes are the teacher's own, to the stored precision, at temperature 1. The divergence
    of these logits from the full ones is then m · (log(V - k) - H), with m the rest's mass and H the entropy within the
    rest: at most m · log(V - k). Above temperature 1 an even rest takes more mass than the teacher's own would,
    so m should be small: raise k.
    """
    kept = unpack({suffix: stored[suffix] for suffix in ("", ".scale") if suffix in stored})  # (N, k)
    others = max(classes - kept.shape[-1], 1)
    even = stored[".rest"] - math.log(others)  # (N,)
    logits = even.unsqueeze(-1).repeat(1, classes).scatter_(-1, stored[".indices"].long(), kept)
    return logits.add_(stored[".logsumexp"].unsqueeze(-1))
