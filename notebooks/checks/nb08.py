"""Checks of the exercises of notebook 08."""

from __future__ import annotations

import torch
from torch import Tensor

from fakit.teaching import Exercise, one_of

PAIR_HINT = """```python
def my_pair(weight, rank):
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]
```"""

SAVES_HINT = """```python
def my_highest_rank(d_out, d_in):
    return (d_out * d_in - 1) // (d_out + d_in)
```"""


# -- 08.1 -------------------------------------------------------------------------------------------------------------


def check_pair(answer) -> str | None:
    """The best pair of rank 3 of a 7 × 5 weight."""
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    rank = 3
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    best = (left[:, :rank] * sigma[:rank]) @ right[:rank]
    found = answer(weight.clone(), rank)
    if not isinstance(found, tuple | list) or len(found) != 2:
        return "two matrices are wanted, up and down, in this order: `return up, down`."
    up, down = found
    shapes = tuple(up.shape), tuple(down.shape)
    if shapes == ((rank, 5), (7, rank)):
        return f"the two are exchanged: up comes first, and is (7, {rank})."
    if shapes != ((7, rank), (rank, 5)):
        wanted = f"up is (7, {rank}) and down ({rank}, 5) for a 7 × 5 weight and rank {rank}"
        return f"{wanted}; yours are {shapes[0]} and {shapes[1]}."
    product = up @ down
    if torch.allclose(product, best, atol=1e-8):
        return None
    wrong = _wrong_products(left, sigma, right, rank)
    why = next((why for why, other in wrong.items() if torch.allclose(product, other, atol=1e-8)), None)
    lost, least = ((weight - kept).norm().item() for kept in (product, best))
    return f"your product {why}." if why else f"your product is off by {lost:.3f}, the best one by {least:.3f}."


def _wrong_products(left: Tensor, sigma: Tensor, right: Tensor, rank: int) -> dict[str, Tensor]:
    """What is wrong → the product that it makes."""
    u, s, v = left[:, :rank], sigma[:rank], right[:rank]
    return {
        "keeps the weakest directions: singular values come in falling order": (left[:, -rank:] * sigma[-rank:])
        @ right[-rank:],
        "has the singular values in both factors: each gets their square root, or one gets them all": (u * s**2) @ v,
        "leaves the singular values out": u @ v,
        "has their square root once: each factor gets it, or one gets all of S": (u * s.sqrt()) @ v,
        "pairs up other directions: `torch.linalg.svd` returns Vᵀ, whose rows are the v": (u * s) @ right.T[:rank, :],
    }


pair = Exercise(
    "Write the best pair of a weight: `up` (d_out, rank) and `down` (rank, d_in), whose product is the sum of the "
    "`rank` strongest singular directions.",
    check_pair,
    hints=[
        "`torch.linalg.svd(weight, full_matrices=False)` gives U, the singular values in falling order, and Vᵀ.",
        "The first `rank` columns of U, the first `rank` rows of Vᵀ; the singular values go into either, or their "
        "square roots into both.",
        PAIR_HINT,
    ],
    done="and its error is exactly what you left out.",
    number="08.1",
    difficulty=2,
    minutes=6,
)


# -- 08.2 -------------------------------------------------------------------------------------------------------------


def check_saves(answer) -> str | None:
    """Of weights whose break-even lies at, and between, whole ranks."""
    for d_out, d_in in ((1536, 384), (384, 384), (6, 3), (768, 3072), (5, 1)):
        truth = (d_out * d_in - 1) // (d_out + d_in)
        found = answer(d_out, d_in)
        if found == truth:
            continue
        where = f"for a {d_out} × {d_in} weight"
        dense, pair_of = d_out * d_in, found * (d_out + d_in) if isinstance(found, int) else None
        if found == min(d_out, d_in):
            return f"{where} you give full rank, {found}: that pair has {pair_of:,} parameters, the weight {dense:,}."
        if not isinstance(found, int):
            return f"{where} a rank is a whole number; yours is {found!r}."
        if pair_of == dense:
            return f"{where} rank {found} has exactly as many parameters as the weight, {dense:,}: it saves none."
        if pair_of > dense:
            return f"{where} rank {found} takes {pair_of:,} parameters, more than the {dense:,} of the weight."
        return f"{where} rank {found} saves something, and so does {found + 1}: the highest one is wanted."
    return None


saves = Exercise(
    "Write the highest rank at which a pair has *fewer* parameters than its weight of size d_out × d_in; 0 where there "
    "is none. Biases stay as they are and do not count.",
    check_saves,
    hints=[
        "A pair of rank r has r · d_out + r · d_in parameters.",
        "r (d_out + d_in) < d_out · d_in. Mind the case in which both sides are equal.",
        SAVES_HINT,
    ],
    done="for a square weight that is a little less than half of full rank.",
    number="08.2",
    difficulty=1,
    minutes=4,
)


# -- 08.3 -------------------------------------------------------------------------------------------------------------

inputs = Exercise(
    "Each block is trained on two inputs, x_T of the teacher and x_S of the student. What would be lost if it were "
    "trained on x_T alone?\n\n"
    "- a) nothing: the target y is the same in both parts\n"
    "- b) when the student runs, a block is given x_S, with the errors of the blocks below, and has never seen any\n"
    "- c) the gradient could no longer reach the blocks below\n"
    "- d) padding would count",
    one_of(
        {
            "a": "the target is the same, but not what has to be turned into it. What is a block given when the "
            "student runs by itself?",
            "b": None,
            "c": "it never does: x_S is detached, too, and that is what keeps the memory small.",
            "d": "both parts are means over tokens that are no padding.",
        }
    ),
    hints=[
        "Think of the student when it is used: who gives block 4 its input?",
        "Block 4 gets what the student's blocks 1 to 3 made, which is not quite what the teacher's made.",
        '`my_inputs = "b"`',
    ],
    done="the second part teaches a block to mend what came before it; the first keeps the target clean.",
    number="08.3",
    difficulty=2,
    minutes=3,
)
