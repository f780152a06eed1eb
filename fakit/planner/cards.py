"""Graphics cards: memory, arithmetic, bandwidth, as their makers publish them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Card:
    """One accelerator.

    Attributes:
        memory: bytes, counting a GB as 10⁹: a card of 16 GB shows about 15 GiB.
        half: FLOP/s of dense bf16 or fp16 products that accumulate in float32.
        single: FLOP/s of float32, without TF32 (torch's default for products).
        bandwidth: bytes/s of its memory.
        note: what to know about it.
    """

    name: str
    memory: float
    half: float
    single: float
    bandwidth: float
    note: str = ""


def _card(name: str, memory: float, half: float, single: float, bandwidth: float, note: str = "") -> Card:
    return Card(name, memory * GB, half * 1e12, single * 1e12, bandwidth * GB, note)


# GB, TFLOP/s in half and in single precision, GB/s. From the makers' data sheets: NVIDIA T4, L4, A10, V100 (SXM2), A100
# (40 GB PCIe/SXM, 80 GB SXM), H100 and H200 (SXM); NVIDIA's Ampere GA102 and Ada architecture papers for RTX 3060, 3090
# and 4090, whose tensor cores run at half of their rate when they accumulate in float32; AMD Instinct MI300X. Rates are
# dense ones: sparsity is not counted.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("RTX 3060", 12, 25.6, 12.7, 360),
        _card("T4", 16, 65, 8.1, 320, "Colab's and Kaggle's free card; fp16, no bf16 arithmetic"),
        _card("V100 16GB", 16, 125, 15.7, 900, "fp16, no bf16 arithmetic"),
        _card("L4", 24, 121, 30.3, 300),
        _card("A10", 24, 125, 31.2, 600),
        _card("RTX 3090", 24, 71, 35.6, 936),
        _card("RTX 4090", 24, 165.2, 82.6, 1008),
        _card("V100 32GB", 32, 125, 15.7, 900, "fp16, no bf16 arithmetic"),
        _card("A100 40GB", 40, 312, 19.5, 1555),
        _card("A100 80GB", 80, 312, 19.5, 2039),
        _card("H100", 80, 989, 67, 3350),
        _card("H200", 141, 989, 67, 4800),
        _card("MI300X", 192, 1307, 163.4, 5300),
    )
}


def find_card(memory: str | float) -> tuple[str, float, Card | None]:
    """(name, bytes, card) of a card's name ("A100 40GB", "t4"), of an amount ("16GB", "0.5 GB") or of bytes;
    no card for an amount.

    Raises:
        ValueError: neither.
    """
    if isinstance(memory, int | float) and not isinstance(memory, bool) and 0 < memory < math.inf:
        return f"{memory / GB:.3g} GB", float(memory), None
    said = re.sub(r"[\s_-]", "", str(memory)).lower()
    for card in CARDS.values():
        if said == card.name.replace(" ", "").lower():
            return card.name, card.memory, card
    amount = re.sub(r"\s", "", str(memory)).lower()  # its sign stays
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?)(gb|g|gib|mb)", amount)) and float(found[1]) > 0:
        size = float(found[1]) * {"gb": GB, "g": GB, "gib": 2**30, "mb": 1e6}[found[2]]
        return f"{size / GB:.3g} GB", size, None
    raise ValueError(f"memory {memory!r} is neither an amount ('16GB') nor a card that is known: {', '.join(CARDS)}.")
