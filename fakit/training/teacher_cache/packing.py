"""From float32 to what is stored, and back: shorter floats, int8 with a scale for each vector, the k largest logits."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fakit.losses.top_k import TopK

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


def pack_top_k(logits: Tensor, top_k: int, dtype: str, temperatures: Sequence[float] = (1.0,)) -> dict[str, Tensor]:
    """The k largest of logits (N, V): log-probabilities in `dtype`, indices, and in float32 the log of the rest's mass
    at each temperature, (N, number of temperatures); where k = V, the logsumexp in place of the rest.
    """
    logits = logits.float()
    classes = logits.shape[-1]
    total = logits.logsumexp(-1, keepdim=True)  # (N, 1)
    values, indices = logits.topk(top_k)  # (N, k)
    # of log-probabilities the large ones are near 0, where any dtype is finest
    packed = pack(values - total, dtype)
    packed[".indices"] = indices.to(torch.uint16 if classes <= 2**16 else torch.int32)
    if top_k == classes:
        return packed | {".logsumexp": total.squeeze(-1)}
    others = (logits - total).scatter_(-1, indices, -torch.inf)  # (N, V)
    rest = torch.stack([(others / temperature).logsumexp(-1) for temperature in temperatures], -1)
    return packed | {".rest": rest}


def pack_known(values: Tensor, indices: Tensor, classes: int, dtype: str) -> dict[str, Tensor]:
    """As `pack_top_k` at temperature 1, of log-probabilities (N, k) in float64 that are known already. The rest is what
    they lack of 1: right to the rounding of the values.

    Rounded values may sum to 1 or more. The rest is at least what float32 can tell from 0, since a class without any
    mass would make a reverse KL infinite.
    """
    packed = pack(values.float(), dtype)
    packed[".indices"] = indices.to(torch.uint16 if classes <= 2**16 else torch.int32)
    if values.shape[-1] == classes:
        return packed | {".logsumexp": torch.zeros(len(values))}
    least = torch.finfo(torch.float32).eps
    return packed | {".rest": (1 - values.exp().sum(-1, keepdim=True)).clamp_min(least).log().float()}


def unpack_all(stored: dict[str, Tensor], classes: int) -> Tensor:
    """Logits (N, V), all of which were among the V largest."""
    kept = _kept(stored)
    logits = torch.zeros(len(kept), classes, device=kept.device).scatter_(-1, stored[".indices"].long(), kept)
    return logits.add_(stored[".logsumexp"].unsqueeze(-1))


def unpack_top_k(stored: dict[str, Tensor], classes: int, temperatures: Sequence[float]) -> TopK:
    """The k largest of N distributions, to the stored precision.

    The divergence over k + 1 classes follows from them (`fakit.losses.top_k`). Where log-probabilities are stored with
    an error of at most e each, the k + 1 probabilities are wrong by a factor of at most exp(2e).
    """
    rest = stored[".rest"].view(len(stored[".rest"]), -1)  # caches of one temperature were (N,) once
    by_temperature = {tau: rest[:, number] for number, tau in enumerate(temperatures)}
    return TopK(_kept(stored), stored[".indices"].long(), by_temperature, classes)


def _kept(stored: dict[str, Tensor]) -> Tensor:
    return unpack({suffix: stored[suffix] for suffix in ("", ".scale") if suffix in stored})  # (N, k)
