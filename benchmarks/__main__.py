"""`make bench`: the kit's own way beside the plain way, on this machine; prints both and their ratio.

Each pair computes the same numbers, which is checked first. Seconds are the median of several repeats, taken in turns;
MiB are what autograd keeps for the backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fakit import capture
from fakit.losses.attention import map_kl
from fakit.losses.streamed import streamed_map_kl


@dataclass
class Cost:
    """What one way costs: median seconds, MiB kept for the backward pass."""

    seconds: float
    mebibytes: float


def kept_mebibytes(work: Callable[[], object]) -> float:
    """MiB that autograd keeps while `work` runs; a storage that several tensors share counts once."""
    storages: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    del result
    return sum(storages.values()) / 2**20


def compare(plain: Callable[[], Tensor], ours: Callable[[], Tensor], repeats: int) -> tuple[Cost, Cost]:
    """Measure both ways in turns, so that a busy moment of the machine meets both.

    Raises:
        ValueError: the two do not compute the same.
    """
    expected, found = plain(), ours()
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-5):
        raise ValueError(f"the two ways differ: {expected.flatten()[:3].tolist()} and {found.flatten()[:3].tolist()}")
    seconds: dict[Callable, list[float]] = {plain: [], ours: []}
    for _ in range(repeats):
        for way, taken in seconds.items():
            start = time.perf_counter()
            loss = way()
            if loss.requires_grad:
                loss.backward()
            taken.append(time.perf_counter() - start)
    plain_cost, our_cost = (Cost(statistics.median(taken), kept_mebibytes(way)) for way, taken in seconds.items())
    return plain_cost, our_cost


def attention_kl(tokens: int, heads: int = 12, width: int = 32) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The KL of attention maps: from whole maps (B, H, T, T), and streamed over blocks of queries."""
    student_q, student_k, teacher_q, teacher_k = torch.randn(4, 2, heads, tokens, width)
    student_q.requires_grad_()
    student_k.requires_grad_()
    mask = torch.arange(tokens) < torch.tensor([[tokens], [tokens // 2]])  # (B, T), half of the second row is padding
    scale = width**-0.5

    def maps(q: Tensor, k: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * scale  # (B, H, T, T)
        return scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1)

    def whole() -> Tensor:
        return map_kl(maps(student_q, student_k), maps(teacher_q, teacher_k).detach(), mask)

    def streamed() -> Tensor:
        return streamed_map_kl(student_q, student_k, teacher_q, teacher_k, mask, scale, scale)

    return whole, streamed


def early_end(tokens: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The teacher's hidden state of layer 4 of 12: from a full forward pass, and from one that ends there."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=6, intermediate_size=768)
    model: nn.Module = BertModel(config).eval()
    batch = {"input_ids": torch.randint(1000, 30_000, (4, min(tokens, 512)))}

    def full() -> Tensor:
        with torch.no_grad():
            return model(**batch, output_hidden_states=True).hidden_states[4]

    def ended() -> Tensor:
        with torch.no_grad():
            return capture(model, batch, hidden_states=[4], logits=False).hidden_states[4]

    return full, ended


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[128, 512, 1024], help="sequence lengths (%(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratio = plain / fakit: above 1, fakit costs less\n"
    )
    print(f"{'':42}{'plain':>18}{'fakit':>18}{'ratio':>14}")
    for title, pair in (
        ("attention KL, whole maps | streamed", attention_kl),
        ("layer 4 of 12, full | ended forward", early_end),
    ):
        for tokens in args.tokens:
            plain, ours = compare(*pair(tokens), args.repeats)
            name = f"{title}, T={tokens}"
            print(f"{name:44}{plain.seconds:14.4f} s{ours.seconds:16.4f} s{plain.seconds / ours.seconds:14.2f}")
            if plain.mebibytes:
                ratio = plain.mebibytes / max(ours.mebibytes, 1e-9)
                print(f"{'  kept for backward':44}{plain.mebibytes:12.1f} MiB{ours.mebibytes:14.1f} MiB{ratio:14.2f}")


if __name__ == "__main__":
    main()
