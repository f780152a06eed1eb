"""What each layer of a model is worth: how much is lost without it, and how far it turns the hidden states.

    kl                 KL(teacher ‖ model without layer i), in nats
    quality            quality(model) - quality(model without layer i), for any quality that is measured
    block_influence    1 - E[cos(h_{i-1}, h_i)]
    angular_distance   E[arccos cos(h_{i-1}, h_i)] / π

h_0 is the output of the embeddings, h_i that of layer i; E is over valid tokens. Sources: block influence is ShortGPT's
(Men et al. 2024, arXiv 2403.03853), angular distance that of Gromov et al. 2024 (arXiv 2403.17887), who look at the
last token of each text alone. A layer that passes on what it is given costs 0 by all four.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fakit.evaluation.batches import device_of, eval_mode, length_sorted_batches, rows_of
from fakit.losses.reduce import at_least_float32
from fakit.models.blocks import find_stacks
from fakit.objective.objective import Objective
from fakit.objective.outputs import Outputs
from fakit.tracing.capture import capture
from fakit.tracing.hooks import given_hidden
from fakit.training.token_counts import counts

MEASURES = ("kl", "quality", "block_influence", "angular_distance")
Quality = Callable[[PreTrainedModel], float]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model whose layers can be taken out one by one: `layers_of(model)[i - 1]` is layer i.

    Raises:
        ValueError: two stacks of layers, or a block that serves several layers.
    """
    stacks, name = find_stacks(model), type(model).__name__
    if len(stacks) > 1:
        raise ValueError(
            f"layers of {name} were to be weighed or taken out one by one, and it has two stacks, an encoder of "
            f"{len(stacks[0].blocks)} and a decoder of {len(stacks[1].blocks)} layers, which work on different tokens. "
            "Take a model of one stack, or choose the layers yourself: shrink(teacher, layers=[…])."
        )
    blocks = stacks[0].blocks
    if len(set(blocks)) < len(blocks):
        raise ValueError(
            f"layers of {name} were to be weighed or taken out one by one, and its {len(blocks)} layers share "
            f"{len(set(blocks))} blocks, so that none can be trained apart. Fewer rounds through the same block are a "
            "student, too: shrink(teacher, layers=3)."
        )
    return blocks


@contextmanager
def leaving_out(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """While open, these layers pass on what they are given. Nothing is copied; the model is left as it was found.

    The blocks run all the same, so that what they make for others (position biases, shared keys and values) is there,
    and time is not saved. What comes out is what `shrink` without these layers gives, but for families whose first
    block is built otherwise than the later ones (ModernBERT's has no norm of its own): there the block that comes first
    keeps its form here.

    Args:
        layers: layer numbers 1…L.

    Raises:
        ValueError: a layer the model does not have; see `layers_of`.
    """
    blocks, chosen = layers_of(model), sorted(set(layers))
    if wrong := [i for i in chosen if isinstance(i, bool) or not isinstance(i, int) or not 1 <= i <= len(blocks)]:
        raise ValueError(
            f"layers {wrong} were to be left out of a {len(blocks)}-layer model; it has layers 1…{len(blocks)}."
        )
    handles = [blocks[i - 1].register_forward_hook(_passing_on, with_kwargs=True) for i in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _passing_on(block: nn.Module, args: tuple, kwargs: dict, output):
    given = given_hidden(args, kwargs)
    if isinstance(output, Tensor):
        return given
    first = next(i for i, x in enumerate(output) if isinstance(x, Tensor))
    return type(output)([*output[:first], given, *output[first + 1 :]])


@dataclass(frozen=True)
class Turning:
    """How far layers turn the hidden states, on average over valid tokens.

    Attributes:
        block_influence: {i: 1 - E[cos(h_{i-1}, h_i)]}, 0…2.
        angular_distance: {i: E[arccos cos(h_{i-1}, h_{i-1+run})] / π}, 0…1, of the `run` layers from i on.
        run: how many layers in a row.
        tokens: how many were looked at.
    """

    block_influence: dict[int, float]
    angular_distance: dict[int, float]
    run: int
    tokens: int


def turning(model: nn.Module, data, collator: Callable, run: int = 1, batch_size: int = 16) -> Turning:
    """Block influence and angular distance of every layer, in one pass over the data.

    Args:
        model: a transformers model of one stack; in evaluation mode while this runs, then as it was.
        data: encoded rows with input_ids (and attention_mask): a dataset or a list.
        collator: pads a list of rows to a batch of tensors.
        run: the angular distance of so many layers in a row.

    Raises:
        ValueError: no rows, a run that is longer than the model, no valid token, or a hidden state that is not finite
            or 0 in every dimension, which has no angle.
    """
    depth = len(layers_of(model))
    if isinstance(run, bool) or not isinstance(run, int) or not 1 <= run <= depth:
        raise ValueError(f"run={run!r} layers in a row were asked of a {depth}-layer model; choose 1…{depth}.")
    one, several = [(i - 1, i) for i in range(1, depth + 1)], [(i, i + run) for i in range(depth - run + 1)]
    cosines, angles, tokens = dict.fromkeys(one, 0.0), dict.fromkeys(several, 0.0), 0
    with torch.no_grad(), eval_mode(model):
        for _, batch in length_sorted_batches(rows_of(data), collator, batch_size, device_of(model)):
            trace = capture(model, batch, hidden_states=range(depth + 1), logits=False)
            unit = [_directions(trace.hidden_states[i], trace.mask, i) for i in range(depth + 1)]  # (N, d) each
            tokens += len(unit[0])
            # of unit vectors: 1 - cos = ‖u - v‖² / 2, and tan(angle / 2) = ‖u - v‖ / ‖u + v‖. Exact where they are
            # equal, and sharp where they hardly differ, as 1 - cos and arccos are not.
            apart = {(i, j): (unit[i] - unit[j]).norm(dim=-1) for i, j in {*one, *several}}
            for pair in one:
                cosines[pair] += (apart[pair].double().square() / 2).sum().item()
            for i, j in several:
                half = torch.atan2(apart[i, j], (unit[i] + unit[j]).norm(dim=-1))
                angles[i, j] += (2 / math.pi * half.double()).sum().item()
    if tokens == 0:
        raise ValueError("the data hold no valid token (attention_mask is 0 throughout): there is nothing to measure.")
    return Turning(
        {j: total / tokens for (_, j), total in cosines.items()},
        {i + 1: total / tokens for (i, _), total in angles.items()},
        run,
        tokens,
    )


def _directions(hidden: Tensor, mask: Tensor | None, layer: int) -> Tensor:
    """Hidden states of the valid tokens, each of length 1. (B, T, d) -> (N, d)"""
    hidden = at_least_float32(hidden.flatten(0, 1) if mask is None else hidden[mask])
    lengths = hidden.norm(dim=-1, keepdim=True)
    if bad := int((~(lengths.isfinite() & (lengths > 0))).sum()):
        raise ValueError(
            f"the hidden states of layer {layer} are not finite, or 0 throughout, at {bad} of {len(hidden)} tokens, so "
            "that they have no direction. Load the model again from whole files; in fp16, take bfloat16 or float32."
        )
    return hidden / lengths


def divergence(
    teacher: nn.Module,
    model: nn.Module,
    data,
    collator: Callable,
    without: Sequence[Iterable[int]] = ((),),
    batch_size: int = 16,
) -> list[float]:
    """KL(teacher ‖ model), once for each set of layers that is left out of the model; by default for none.

    As `Outputs("forward_kl", temperature=1.0)` has it: the mean over texts, or over the tokens that predict (where a
    text carries labels on tokens, over those), in nats. The teacher runs once a batch.

    Args:
        without: sets of layer numbers; [()] for the model as it is.

    Raises:
        ValueError: no rows, outputs that are no distributions (regression), none at all, or of other sizes.
    """
    objective = Objective(outputs=Outputs("forward_kl", temperature=1.0))
    totals, counted = [0.0] * len(without), 0
    with torch.no_grad(), eval_mode(teacher), eval_mode(model):
        for _, batch in length_sorted_batches(rows_of(data), collator, batch_size, device_of(teacher)):
            labels = batch.get("labels")
            theirs = capture(teacher, batch)
            by_token = theirs.logits is not None and theirs.logits.dim() == 3
            weight = int(counts(objective, batch, theirs.causal, by_token)["outputs"])
            counted += weight
            for place, layers in enumerate(without):
                with leaving_out(model, layers):
                    ours = capture(model, batch)
                totals[place] += weight * float(objective(ours, theirs, labels).total)
    if counted == 0:
        raise ValueError("the data hold no token that predicts another: there is nothing to compare outputs at.")
    return [total / counted for total in totals]


def importance(
    model: PreTrainedModel,
    measure: str = "kl",
    data=None,
    collator: Callable | None = None,
    teacher: PreTrainedModel | None = None,
    quality: Quality | None = None,
    batch_size: int = 16,
) -> dict[int, float]:
    """What each layer is worth: {layer number: cost of taking it out}, by one of `MEASURES`.

    Args:
        model: of one stack.
        measure: "kl", "quality", "block_influence" or "angular_distance"; see above.
        data, collator: encoded rows, and what makes batches of them; "quality" needs none.
        teacher: whose outputs are kept to under "kl"; the whole model itself unless given.
        quality: a function of a model, higher is better; for "quality". It is called depth + 1 times.

    Raises:
        ValueError: an unknown measure, or one whose parts are missing; a cost that is not finite.
    """
    check_measure(measure, quality)
    depth = len(layers_of(model))
    numbers = range(1, depth + 1)
    if measure == "quality":
        with eval_mode(model):
            whole, found = measured(quality, model), {}
            for i in numbers:
                with leaving_out(model, [i]):
                    found[i] = whole - measured(quality, model)
        return found
    if data is None or collator is None:
        raise ValueError(f"importance by {measure!r} looks at texts: give data=… (encoded rows) and collator=….")
    if measure == "kl":
        costs = divergence(
            model if teacher is None else teacher, model, data, collator, [[i] for i in numbers], batch_size
        )
        found = dict(zip(numbers, costs, strict=True))
    else:
        found = getattr(turning(model, data, collator, batch_size=batch_size), measure)
    if bad := [i for i, cost in found.items() if not math.isfinite(cost)]:
        raise ValueError(
            f"the cost ({measure}) of layers {bad} is not finite: the model's outputs without them are not."
        )
    return found


def check_measure(measure: str, quality: Quality | None) -> None:
    """Raise ValueError for a measure that is not known, or that lacks its function."""
    if measure not in MEASURES:
        raise ValueError(f"importance {measure!r} is not known; choose one of {', '.join(map(repr, MEASURES))}.")
    if measure == "quality" and quality is None:
        raise ValueError("importance 'quality' was asked, and no function: quality=lambda model: …, higher is better.")


def measured(quality: Quality, model: PreTrainedModel) -> float:
    """A model's quality as the user's function says it.

    Raises:
        ValueError: it is no finite number, by which nothing can be ranked.
    """
    with torch.no_grad(), eval_mode(model):
        found = float(quality(model))
    if not math.isfinite(found):
        raise ValueError(
            f"quality gave {found} for a {len(layers_of(model))}-layer model; layers cannot be told apart by it."
        )
    return found
