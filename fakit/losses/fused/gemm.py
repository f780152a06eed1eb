"""float32 products on a CPU by oneDNN: it uses AVX-512 on every make of processor, where torch's default (MKL)
may not.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

# what torch.compile makes of a linear layer on a CPU; reached in no other way without copies to a layout of oneDNN's
# own and back
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def times_transposed(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """x yᵀ + bias of (p, n), (q, n) and (q,): (p, q). For tensors without graph."""
    if _ONEDNN is not None and x.device.type == "cpu" and x.dtype == y.dtype == torch.float32:
        return _ONEDNN(x, y, bias, "none", [], "")
    return F.linear(x, y, bias)


if _ONEDNN is not None:

    @register_flop_formula(_ONEDNN)
    def _flops(x, y, *args, out_shape=None, **kwargs) -> int:
        return 2 * x[0] * x[1] * y[0]
