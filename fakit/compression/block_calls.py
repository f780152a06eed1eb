"""How a model calls one of its blocks: all that the block is given beside its hidden states."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fakit.models.blocks import find_blocks
from fakit.tracing.hooks import EnoughSeen, given_hidden, hidden_in
from fakit.tracing.inputs import prepare_inputs

Call = tuple[tuple, dict[str, Any]]  # arguments and keywords


class BlockCalls:
    """What a model gives a block beside its hidden states: masks, positions, an encoder's states.

    The model's own code makes them, in a forward pass that ends at the block. The blocks before it in its stack only
    hand on what they get, for nothing of it depends on hidden states; blocks that return more than those (T5's
    position bias) run.
    """

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, Tensor], starts: set[int], last: int):
        self.model, self.blocks, self.starts = model, find_blocks(model), starts
        returned: dict[int, Any] = {}

        def leaving(number: int):
            def hook(block, args, out):
                returned[number] = out
                if number == last:
                    raise EnoughSeen

            return hook

        handles = [block.register_forward_hook(leaving(i)) for i, block in enumerate(self.blocks, 1)]
        try:
            model(**prepare_inputs(model, batch).inputs)
        except EnoughSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
        silent = [f"{i}" for i in range(1, last + 1) if i not in returned]
        if silent:
            raise ValueError(
                f"blocks {', '.join(silent)} of {type(model).__name__} did not run as modules, so that they cannot be "
                "trained by themselves: distill it end to end, with DistillationTrainer."
            )
        # of each block that can stand aside: how many things it returns; 0 for the hidden states as they are
        self.forms = {
            i: len(out) if isinstance(out, tuple) else 0
            for i, out in returned.items()
            if isinstance(out, Tensor) or (isinstance(out, tuple) and all(x is None for x in out[1:]))
        }

    def of(self, batch: Mapping[str, Tensor], layer: int) -> Call:
        """The arguments that the block of a layer is called with."""
        caught: list[Call] = []

        def catch(block, args, kwargs):
            caught.append((args, kwargs))
            raise EnoughSeen

        start = max(s for s in self.starts if s <= layer)
        aside = [(self.blocks[i - 1], self.forms[i]) for i in range(start, layer) if i in self.forms]
        handle = self.blocks[layer - 1].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for block, form in aside:
                block.forward = partial(_hand_on, form)  # of this module alone, over its class's own
            self.model(**prepare_inputs(self.model, batch).inputs)
        except EnoughSeen:
            pass
        finally:
            handle.remove()
            for block, _ in aside:
                del block.forward
        return caught[0]


def _hand_on(form: int, *args, **kwargs):
    x = given_hidden(args, kwargs)
    return (x, *[None] * (form - 1)) if form else x


def through(block: nn.Module, call: Call, x: Tensor) -> Tensor:
    """What a block makes of x (B, T, d), given all else as in a call."""
    args, kwargs = call
    return hidden_in(block(x, *args[1:], **kwargs) if args else block(**kwargs | {"hidden_states": x}))
