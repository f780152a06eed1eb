"""Watch a model while it runs: hooks on its blocks, and an ear at its attention functions.
Nothing of the model is changed.

Attention is taken where transformers hands it over, at the functions of `transformers.AttentionInterface`: there every
implementation (eager, sdpa, flash) receives the same queries, keys and values, after rotary embedding, so the maps can
be had although sdpa and flash never return them. Models that call torch's `scaled_dot_product_attention` themselves
(Falcon) are watched there.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from fakit.losses.fused.attention_inputs import AttentionInputs
from fakit.models.low_rank_linear import LowRankLinear
from fakit.tracing.mlp import MlpWatch, is_activation
from fakit.tracing.trace import Trace


class EnoughSeen(Exception):
    """Ends a forward pass of which nobody asked for the rest."""


class Recorder:
    """Writes into a trace while the model runs. `layer` is the block the forward pass is in;
    one module may serve several layers.

    Args:
        trace: is written into.
        hidden_states, attentions, attention_outputs: layer numbers to keep.
        mlp: the same of places inside of MLPs, `fakit.tracing.mlp.PLACES`.
        last: the layer after which nothing more is asked for: its output, or its attention where its output is not
            asked for; None to let the forward pass run to its end.
    """

    def __init__(
        self,
        trace: Trace,
        hidden_states: set[int],
        attentions: set[int],
        last: int | None,
        attention_outputs: set[int] | None = None,
        mlp: Mapping[str, set[int]] | None = None,
    ):
        self.trace, self.hidden_states, self.attentions, self.last = trace, hidden_states, attentions, last
        self.attention_outputs = attention_outputs or set()
        self.layer = 0
        # of the block at hand: what it was given, and its linear layers before it attended; whether it has attended,
        # so that its output projection comes next; and that projection while it runs
        self._block_input: Tensor | None = None
        self._given_before: list[Tensor] = []
        self._attended, self._projection = False, None
        self.mlp = {place: layers for place, layers in (mlp or {}).items() if layers}
        self.mlp_layers: set[int] = set().union(*self.mlp.values())
        self._mlp: MlpWatch | None = None  # of the block at hand
        self.without: dict[tuple[str, int], str] = {}  # places that a block has not, and why

    @contextmanager
    def watching(self, blocks: list[nn.Module], attention: str) -> Iterator[None]:
        """While open, this thread's forward passes through `blocks` are recorded.
        Swallows the end that the recorder itself brings about.

        Args:
            blocks: one a layer.
            attention: where attention is seen: "interface", "sdpa" (torch's function), or "none".
        """
        watch = {"interface": _watching_interface, "sdpa": _WatchingSdpa, "none": nullcontext}[attention]
        handles = []
        token = _recorder.set(self)
        try:
            for block in dict.fromkeys(blocks):  # each module once, though it may serve several layers
                numbers = [i for i, other in enumerate(blocks, 1) if other is block]
                handles.append(block.register_forward_pre_hook(self._entering(numbers), with_kwargs=True))
                handles.append(block.register_forward_hook(self._leaving))
            linears = (
                [m for block in blocks for m in block.modules() if _is_linear(m)]
                if self.attention_outputs or self.mlp
                else []
            )
            activations = [m for block in blocks for m in block.modules() if is_activation(m)] if self.mlp else []
            for activation in dict.fromkeys(activations):
                handles.append(activation.register_forward_pre_hook(self._entering_activation))
            for linear in dict.fromkeys(linears):
                handles.append(linear.register_forward_pre_hook(self._entering_linear))
                handles.append(linear.register_forward_hook(self._leaving_linear))
            with watch():
                yield
        except EnoughSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
            _recorder.reset(token)

    def _entering(self, numbers: list[int]):
        def pre_hook(block, args, kwargs):
            if _recorder.get() is not self:  # another thread's forward pass through the same model
                return
            # a shared block serves its layers in turn; any other one has exactly one number
            self.layer = next((i for i in numbers if i > self.layer), numbers[0])
            if self.layer == 1 and 0 in self.hidden_states:
                self.trace.hidden_states[0] = given_hidden(args, kwargs)
                if self.last == 0:
                    raise EnoughSeen
            if self.layer in self.attention_outputs:
                self._block_input = given_hidden(args, kwargs)
                self._given_before, self._attended, self._projection = [], False, None
            if self.layer in self.mlp_layers:
                self._mlp = MlpWatch(given_hidden(args, kwargs))

        return pre_hook

    def _leaving(self, block, args, output):
        if _recorder.get() is not self:
            return
        if self.layer in self.hidden_states:
            self.trace.hidden_states[self.layer] = hidden_in(output)
        if self._mlp is not None:
            found, why = self._mlp.places()
            for place, layers in self.mlp.items():
                if self.layer in layers and place in found:
                    getattr(self.trace, place)[self.layer] = found[place]
                elif self.layer in layers:
                    self.without[place, self.layer] = why
            self._mlp = None
        if self.layer == self.last:
            raise EnoughSeen

    def _entering_linear(self, linear, args):
        """The output projection is the first linear layer after the attention function, but for one that is given what
        a layer before it was: a gate.
        """
        if _recorder.get() is not self or not args:
            return
        if self._mlp is not None and self._mlp.inside is None:
            self._mlp.inside = linear
        if self._projection is not None or self._block_input is None:
            return
        if not self._attended:
            self._given_before.append(args[0])
        elif not any(args[0] is given for given in self._given_before):
            self._projection = linear  # a layer with an adapter is entered before the one inside it

    def _leaving_linear(self, linear, args, output):
        if _recorder.get() is not self:
            return
        if self._mlp is not None and self._mlp.inside is linear:
            self._mlp.layers.append((args[0], output))
            self._mlp.inside = None
        if self._projection is not linear or self._block_input is None:
            return
        if output.shape != self._block_input.shape:
            raise ValueError(
                f"attention output of layer {self.layer} of {self.trace.name}: its block works on "
                f"{tuple(self._block_input.shape)}, and what follows its attention gives {tuple(output.shape)}, so "
                "that is not what the attention adds to the hidden states (bottlenecks in MobileBERT, several "
                "projections in DeepSeek V4). Compare the blocks' own outputs: Features(at='block')."
            )
        self.trace.attention_outputs[self.layer] = output
        self._block_input, self._given_before, self._projection = None, [], None
        if self.layer == self.last and self.last not in self.hidden_states | self.mlp_layers:
            raise EnoughSeen

    def _entering_activation(self, activation, args):
        if _recorder.get() is self and self._mlp is not None and args:
            self._mlp.activated.append(args[0])

    def attention(self, module, query, key, value, attention_mask=None, *_, **options) -> None:
        """One call of an attention function."""
        # the first call of a block is its self-attention; a decoder's cross-attention comes second
        self._attended = True
        if self._mlp is not None:
            self._mlp.attention()
        if self.layer not in self.attentions or self.layer in self.trace.attention:
            return
        scaling, causal = options.get("scaling"), options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        self.trace.attention[self.layer] = AttentionInputs(
            query,
            key,
            value,
            mask=attention_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            # sdpa masks the future by itself when no mask does; flash does whenever the module is causal
            causal=bool(causal) and (attention_mask is None or attention_mask.dim() == 2) and query.shape[2] > 1,
            softcap=options.get("softcap"),
            position_bias=options.get("position_bias"),
            sinks=options.get("s_aux"),
        )
        if self.layer == self.last and self.last not in self.hidden_states | self.attention_outputs | self.mlp_layers:
            raise EnoughSeen


def _is_linear(module: nn.Module) -> bool:
    """A linear layer, a pair in the place of one, or one that an adapter (PEFT) is around."""
    return isinstance(module, nn.Linear | Conv1D | LowRankLinear) or isinstance(
        getattr(module, "base_layer", None), nn.Linear | Conv1D
    )


def hidden_in(output) -> Tensor:
    """The hidden state in what a block takes or returns: the first tensor."""
    return next(x for x in output if isinstance(x, Tensor)) if isinstance(output, (tuple, list)) else output


def given_hidden(args: tuple, kwargs: dict) -> Tensor:
    """The hidden state that a block is given."""
    return hidden_in(args) if args else kwargs["hidden_states"]


_recorder: ContextVar[Recorder | None] = ContextVar("fakit_recorder", default=None)  # of this thread's capture
_lock = threading.Lock()
_watchers = 0  # captures under way in all threads: the first one in puts the watch up, the last one out takes it down


@contextmanager
def _watching_interface() -> Iterator[None]:
    """While open, attention functions report their inputs to their thread's recorder, then do what they always do.

    Watched is the question "which function?" that every attention module asks of transformers' table, not the table: no
    entry and no configuration changes, so mask building, kernels and gradient checkpointing see what they always see.
    Forward passes of other threads run through untouched.
    """
    global _watchers
    with _lock:
        if _watchers == 0:
            ask = ALL_ATTENTION_FUNCTIONS.get_interface
            ALL_ATTENTION_FUNCTIONS.get_interface = lambda *args, **kwargs: _reporting(ask(*args, **kwargs))
        _watchers += 1
    try:
        yield
    finally:
        with _lock:
            _watchers -= 1
            if _watchers == 0:
                del ALL_ATTENTION_FUNCTIONS.get_interface  # the class's own shows again


def _reporting(function: Callable) -> Callable:
    def attention(*args, **kwargs):
        if (recorder := _recorder.get()) is not None:
            recorder.attention(*args, **kwargs)
        return function(*args, **kwargs)

    return attention


class _WatchingSdpa(TorchFunctionMode):
    """While open, calls of torch's own attention function in this thread are reported too."""

    # ty: ignore[lost-keyword-for-regular-parameter]
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and (recorder := _recorder.get()) is not None:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
            given = dict(zip(names, args, strict=False)) | kwargs
            recorder.attention(
                None,
                given["query"],
                given["key"],
                given["value"],
                given.get("attn_mask"),
                scaling=given.get("scale"),
                is_causal=given.get("is_causal", False),
            )
        return function(*args, **kwargs)
