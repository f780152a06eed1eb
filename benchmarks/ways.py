"""The pieces of work and the ways to do each. As a command: the peak memory of one way, in this process.

python -m benchmarks.ways "features + attention" fakit 1 2048
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import hand_written
from benchmarks.measure import Way, peak_mebibytes
from benchmarks.models import FULL, QUICK, Batch, Size, models, random_batch
from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, capture
from fakit.losses.fused.chunked import fused_outputs
from fakit.losses.fused.output_head import Head


def all_terms() -> Objective:
    """What `hand_written.all_terms` computes."""
    return Objective(
        LayerMap(list(hand_written.PAIRS)),
        Features("mse"),
        Attention("kl"),
        Outputs("forward_kl", temperature=hand_written.TEMPERATURE),
        Task(),
    )


def without_attention() -> Objective:
    """What `hand_written.without_attention` computes."""
    return Objective(
        LayerMap(list(hand_written.PAIRS)),
        Features("mse"),
        outputs=Outputs("forward_kl", temperature=hand_written.TEMPERATURE),
        task=Task(),
    )


def outputs_alone() -> Objective:
    """What `hand_written.outputs_alone` computes."""
    return Objective(outputs=Outputs("forward_kl", temperature=hand_written.TEMPERATURE))


def features_and_attention() -> Objective:
    """What `hand_written.features_and_attention` computes."""
    return Objective(LayerMap(list(hand_written.PAIRS)), Features("mse"), Attention("kl"))


def loss_of(objective: Objective, teacher: nn.Module, student: nn.Module, batch: Batch) -> Tensor:
    """The loop of the README: capture twice, compare."""
    needs, given = objective.needs("student"), objective.needs("teacher")
    with torch.no_grad():
        theirs = capture(teacher, batch, given.hidden_states, given.attentions, given.capture_logits)
    ours = capture(student, batch, needs.hidden_states, needs.attentions, needs.capture_logits)
    return objective(ours, theirs, batch["labels"]).total


def by_fakit(objective: Callable[[], Objective], size: Size, device: torch.device | str = "cpu") -> Way:
    """The kit's way, under fused attention."""
    teacher, student = models(size, device=device)
    return Way(partial(loss_of, objective(), teacher, student), list(student.parameters()))


def heads(whole: bool, size: Size, device: torch.device | str = "cpu") -> Way:
    """The output loss from hidden states (N, d) and two heads (V, d): through whole logits,
    or a chunk of tokens at a time.
    """
    vocabulary = 151_936 if size == FULL else size.vocabulary
    torch.manual_seed(0)
    teacher = (torch.randn(vocabulary, size.width) / size.width**0.5).to(device)
    student = nn.Parameter((torch.randn(vocabulary, size.width) / size.width**0.5).to(device))

    def loss(batch: Batch) -> Tensor:
        random = torch.Generator().manual_seed(0)
        ours, theirs = torch.randn(2, batch["input_ids"].numel(), size.width, generator=random).to(device)
        ours.requires_grad_()
        if whole:
            return hand_written.output_loss(F.linear(ours, student), F.linear(theirs, teacher))
        tau = hand_written.TEMPERATURE
        return fused_outputs(Head(ours, student), Head(theirs, teacher), temperature=tau)[0]

    return Way(loss, [student])


WAYS: dict[str, dict[str, Callable[..., Way]]] = {  # each is given a size, and a device
    "all terms": {
        "by hand": partial(hand_written.by_hand, hand_written.all_terms, "eager"),
        "floor": partial(hand_written.by_hand, hand_written.floor, "sdpa"),
        "fakit": partial(by_fakit, all_terms),
    },
    "features + attention": {
        "by hand": partial(hand_written.by_hand, hand_written.features_and_attention, "eager"),
        "fakit": partial(by_fakit, features_and_attention),
    },
    "hidden states, outputs, labels": {
        "by hand": partial(hand_written.by_hand, hand_written.without_attention, "sdpa"),
        "fakit": partial(by_fakit, without_attention),
    },
    "outputs": {
        "by hand": partial(hand_written.by_hand, hand_written.outputs_alone, "sdpa"),
        "fakit": partial(by_fakit, outputs_alone),
    },
    "output loss": {"by hand": partial(heads, True), "fakit": partial(heads, False)},
}


def main(argv: list[str] | None = None) -> None:
    """Print {"mebibytes", "loss"} of one way."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ways", description=__doc__)
    parser.add_argument("work", choices=WAYS)
    parser.add_argument("way")
    parser.add_argument("rows", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else FULL
    way = WAYS[args.work][args.way](size)
    mebibytes, loss = peak_mebibytes(way, random_batch(size, args.rows, args.tokens), random_batch(size, args.rows, 16))
    print(json.dumps({"mebibytes": mebibytes, "loss": loss}))


if __name__ == "__main__":
    main()
