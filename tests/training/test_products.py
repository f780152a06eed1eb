"""Products by oneDNN: the same numbers, counted by torch's FLOP counter,
and torch's own where oneDNN does not serve.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fakit.losses.fused.gemm import times_transposed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_is_the_product(dtype, turned):
    generator = torch.Generator().manual_seed(0)
    x, y, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((5, 7), (3, 7), (3,)))
    given = (x.T.contiguous().T, y.T.contiguous().T) if turned else (x, y)
    torch.testing.assert_close(times_transposed(*given), x @ y.T)
    torch.testing.assert_close(times_transposed(*given, bias), x @ y.T + bias)


def test_flops_are_counted():
    with FlopCounterMode(display=False) as counter:
        times_transposed(torch.ones(5, 7), torch.ones(3, 7))
    assert counter.get_total_flops() == 2 * 5 * 7 * 3
