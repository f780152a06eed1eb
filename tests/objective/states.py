"""Two sides' hidden states with padding, of two and of three layers: what tests of terms over states compare."""

import torch

from fakit import LayerMap, Trace

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]]).bool()
EVERY = LayerMap([(s, t) for s in (1, 2) for t in (1, 2, 3)])


def trace(width: int, layers: int, seed: int) -> Trace:
    """Hidden states by chance; NaN in padding."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(layers + 1, *MASK.shape, width, generator=generator, dtype=torch.float64)
    states = states.masked_fill(~MASK.unsqueeze(-1), torch.nan)
    return Trace(hidden_states=dict(enumerate(states)), mask=MASK)


OURS, THEIRS = trace(6, 2, seed=1), trace(6, 3, seed=2)
