"""Singular values of the weights of a model's blocks, and of what these weights give on texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fakit.evaluation.batches import eval_mode
from fakit.models.blocks import find_blocks
from fakit.models.kinds import head_layers
from fakit.models.load import is_quantized
from fakit.models.low_rank_linear import LowRankExperts, LowRankLinear, expert_inner, first_projection
from fakit.models.peft_students import is_adapted
from fakit.tracing.capture import capture
from fakit.tracing.inputs import prepare_inputs


@dataclass(frozen=True)
class Matrix:
    """One weight that a pair of thin matrices could stand for.

    Attributes:
        name: what the model calls it: a linear layer, or of fused experts the tensor.
        layer: the block's number, 1…L; of a block that serves several layers the first.
        d_in, d_out: W is (d_out, d_in).
        experts: how many matrices of this shape the weight holds; 1 of a linear layer.
    """

    name: str
    layer: int
    d_in: int
    d_out: int
    experts: int = 1

    @property
    def parameters(self) -> int:
        """Numbers in the dense weight, its bias left out, which stays."""
        return self.experts * self.d_in * self.d_out

    @property
    def highest_rank(self) -> int:
        """The highest rank r that saves something: r (d_in + d_out) < d_in d_out. 0 where none does."""
        return (self.d_in * self.d_out - 1) // (self.d_in + self.d_out)

    def parameters_at(self, rank: int | None) -> int:
        """Numbers in a pair of rank r; in the dense weight for None."""
        return self.parameters if rank is None else self.experts * rank * (self.d_in + self.d_out)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one `Matrix`, float64, by expert.

    Attributes:
        values: (E, k), falling: of W, or of W C^½ with C = E[x xᵀ] of its inputs. Their squares sum up to ‖W‖² or to
            E‖W x‖², and those from r on to the squared error of the best rank-r pair.
        left: (E, d_out, k), the left singular vectors, in the weight's dtype but at least float32.
        weights: (E, k), of W alone.
        tokens: how many inputs C was taken over; 0 where `values` are those of W.
    """

    values: Tensor
    left: Tensor
    weights: Tensor
    tokens: int = 0

    def error(self, rank: int | None) -> float:
        """‖W - W_r‖ / ‖W‖ of the best pair of rank r, or the same of its outputs: the root of the tail's share."""
        squares = self.values.square()
        tail = 0.0 if rank is None else squares[:, rank:].sum().item()
        return (tail / total) ** 0.5 if (total := squares.sum().item()) > 0 else 0.0

    def energy_kept(self, rank: int) -> float:
        """The share of Σ σ² that rank r keeps."""
        return 1 - self.error(rank) ** 2


@dataclass(frozen=True)
class Spectra:
    """The spectra of all weights of a model's blocks: computed once, after which plans cost nothing.

    `left` of them all is about as large as the blocks' weights.

    Attributes:
        name: the model's class.
        parameters: of the whole model, each shared tensor once.
    """

    name: str
    parameters: int
    matrices: tuple[Matrix, ...]
    of: tuple[Spectrum, ...]

    @property
    def from_activations(self) -> bool:
        """Whether the singular values are those of what the weights give on texts."""
        return self.of[0].tokens > 0


def stable_rank(values: Tensor) -> float:
    """‖W‖_F² / ‖W‖_2² of a spectrum (k,): how many directions count, between 1 and k. Of several (E, k): their mean.

    >>> stable_rank(torch.tensor([2.0, 2.0, 0.0]))
    2.0
    """
    squares = torch.atleast_2d(values).square()
    some = squares[squares[:, 0] > 0]
    return (some.sum(1) / some[:, 0]).mean().item() if len(some) else 0.0


def count(model: nn.Module) -> int:
    """Parameters of the whole model, each shared tensor once."""
    return sum(parameter.numel() for parameter in model.parameters())


def find_matrices(model: PreTrainedModel) -> list[Matrix]:
    """The weights of a model's blocks that could be pairs, block by block: of linear layers, GPT-2's Conv1D, fused
    experts.

    A block that serves several layers (ALBERT) counts once. Left out: embeddings and output heads, weights that two
    modules share, and what is too thin for any pair to save.

    Raises:
        ValueError: a quantized model, one with an adapter, one that is of low rank already, or fused experts of a form
            that is not known.
    """
    _check(model)
    names = {module: name for name, module in model.named_modules()}
    owners = Counter(id(p) for module in names for p in module.parameters(recurse=False))
    heads, found = set(head_layers(model)), {}
    for layer, block in enumerate(find_blocks(model), 1):
        for module in block.modules():
            for name, weight, shape in _weights(names[module], module):
                # one that another module uses too would have to become a pair there as well
                if name not in heads and owners[id(weight)] == 1:
                    found.setdefault(name, Matrix(name, layer, *shape))
    matrices = [matrix for matrix in found.values() if matrix.highest_rank > 0]
    if not matrices:
        raise ValueError(
            f"{type(model).__name__} has no linear layer in its blocks that a pair of thin matrices would save "
            "parameters of; low rank needs layers of d_in · d_out > d_in + d_out."
        )
    return matrices


def _check(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if is_quantized(model):
        raise ValueError(
            f"{name} is quantized to few bits, and low rank starts from full weights: load it without quantize=…, "
            "compress it, and quantize the result."
        )
    if is_adapted(model):
        raise ValueError(f"{name} carries an adapter (PEFT): merge it first, model.merge_and_unload().")
    if pairs := [n for n, m in model.named_modules() if isinstance(m, LowRankLinear | LowRankExperts)]:
        raise ValueError(
            f"{name} is of low rank already ({pairs[0]} and {len(pairs) - 1} more); start from the model it was made "
            "of, or from low_rank.merge(model)."
        )


def _weights(name: str, module: nn.Module) -> list[tuple[str, Tensor, tuple[int, ...]]]:
    """The weights of one module that could be pairs: (name, weight, (d_in, d_out, experts))."""
    if type(module) is Conv1D:  # holds (d_in, d_out)
        return [(name, module.weight, (module.weight.shape[0], module.weight.shape[1], 1))]
    if type(module) is nn.Linear:
        return [(name, module.weight, (module.in_features, module.out_features, 1))]
    if hasattr(module, "is_transposed"):  # what transformers tells of fused experts (E, d_out, d_in)
        if module.is_transposed or module.has_bias or getattr(module, "has_post_expert_norm", False):
            raise ValueError(
                f"{name} ({type(module).__name__}) holds its experts in one tensor, transposed, with biases or with "
                "norms of their own, and low rank knows experts (E, d_out, d_in) without them (Mixtral, Qwen-MoE, "
                "OLMoE, DeepSeek). Use a family of that form."
            )
        both = {part: getattr(module, part) for part in (first_projection(module), "down_proj")}
        return [(f"{name}.{part}", w, (w.shape[2], w.shape[1], w.shape[0])) for part, w in both.items()]
    return []


def dense_weight(model: PreTrainedModel, name: str) -> Tensor:
    """W of a linear layer (1, d_out, d_in), of fused experts (E, d_out, d_in), by a name of its `Matrix`."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    found = getattr(module, own)
    if isinstance(found, nn.Module):
        return (found.weight.T if isinstance(found, Conv1D) else found.weight).detach()[None]
    return found.detach()


def spectra(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]] | None = None) -> Spectra:
    """Singular values of every weight of the blocks, in float64.

    Args:
        batches: padded on the right, if at all. With them, W's spectrum is that of its outputs: the singular values of
            W C^½, C = E[x xᵀ] over the tokens that are no padding. Then U_r U_rᵀ W is the rank-r weight of the least
            E‖(W - W_r) x‖², which is the sum of the squared values from r on (SVD-LLM, Wang et al. 2024; the same as
            keeping the outputs' principal directions, AFM, Yu & Wu 2023). Blocks are looked at one after the other, so
            that the C of one block alone are in memory, in float64; block i costs a pass through i blocks.

    Raises:
        ValueError: as `find_matrices`; batches with fewer tokens than a weight has inputs, or rows whose padding cannot
            be told from tokens.
    """
    matrices = find_matrices(model)
    kept = None if batches is None else list(batches)
    found = []
    with torch.no_grad(), eval_mode(model):
        if kept is not None:
            _check_batches(model, kept)
        for layer in dict.fromkeys(matrix.layer for matrix in matrices):
            own = [matrix for matrix in matrices if matrix.layer == layer]
            moments = None if kept is None else _Moments(model, layer, own).over(kept)
            for matrix in own:
                weight = dense_weight(model, matrix.name)
                found.append(_spectrum(weight, None if moments is None else moments[matrix.name]))
    return Spectra(type(model).__name__, count(model), tuple(matrices), tuple(found))


def _spectrum(weight: Tensor, moment: tuple[Tensor, Tensor] | None) -> Spectrum:
    """Of W (E, d_out, d_in) and, of its inputs, Σ x xᵀ (E, d_in, d_in) and their number (E,)."""
    exact = weight.double()
    at_least = torch.promote_types(weight.dtype, torch.float32)
    alone, left = _decomposed(exact, None)
    if moment is None:
        return Spectrum(alone, left.to(at_least), alone)
    sums, numbers = moment
    values, left = _decomposed(exact, sums / numbers.sum())  # an expert counts as often as tokens go to it
    return Spectrum(values, left.to(at_least), alone, int(numbers.sum()))


def _decomposed(weight: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """Singular values (E, k) and left vectors (E, d_out, k) of W C^½ (E, d_out, d_in); of W for None.

    Where W is wide, they are had from the small W C Wᵀ, without a root of C, which is d_in wide: exact to 1e-8 of the
    largest of them.
    """
    if weight.shape[1] <= weight.shape[2]:
        squares, left = torch.linalg.eigh((weight if second is None else weight @ second) @ weight.mT)
        return squares.flip(1).clamp_min(0).sqrt(), left.flip(2)
    if second is not None:
        eigenvalues, vectors = torch.linalg.eigh(second)
        weight = weight @ (vectors * eigenvalues.clamp_min(0).sqrt()[:, None])
    left, values, _ = torch.linalg.svd(weight, full_matrices=False)
    return values, left


# -- what goes into each weight ----------------------------------------------------------------------------------------


def unmoved_mask(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The tokens of a batch, bool (B, T), each in the place where the model reads it.

    Raises:
        ValueError: no tokens, or rows that the model has to be given in another order.
    """
    ready = prepare_inputs(model, batch)
    if ready.mask is None:
        raise ValueError(
            f"{type(model).__name__} was given no tokens (input_ids or inputs_embeds), and low rank counts over "
            "tokens: it is there for models that read text."
        )
    if ready.places is not None:
        raise ValueError(
            f"a batch for {type(model).__name__} is padded on the left, and this model reads such rows moved: pad on "
            "the right (tokenizer.padding_side = 'right')."
        )
    return ready.mask


def _check_batches(model: PreTrainedModel, batches: list) -> None:
    if not batches:
        raise ValueError("batches hold nothing: give a few hundred texts, or none for the weights' own spectra.")
    for batch in batches:
        unmoved_mask(model, batch)


class _Moments:
    """Σ x xᵀ over the tokens that go into each weight of one block, float64."""

    def __init__(self, model: PreTrainedModel, layer: int, matrices: list[Matrix]):
        self.model, self.layer, self.matrices = model, layer, matrices
        self.block = find_blocks(model)[layer - 1]
        device = next(model.parameters()).device
        self.sums = {
            m.name: torch.zeros(m.experts, m.d_in, m.d_in, dtype=torch.float64, device=device) for m in matrices
        }
        self.numbers = {m.name: torch.zeros(m.experts, dtype=torch.float64, device=device) for m in matrices}
        self.inputs: list[tuple[str, Tensor, bool]] = []  # of the batch at hand: weight, x, whether from the encoder
        self.routed: list[tuple[str, nn.Module, tuple[Tensor, ...]]] = []
        self.beside: list[Tensor] = []

    def over(self, batches: list[Mapping[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """{weight: (sums, numbers of tokens)}"""
        handles = [self.block.register_forward_pre_hook(self._entering, with_kwargs=True)]
        for matrix in self.matrices:
            owner, _, own = matrix.name.rpartition(".")
            if matrix.experts == 1:
                hook, module = self._seen(matrix.name), self.model.get_submodule(matrix.name)
            elif own == "down_proj":  # both weights of a module of experts at once
                hook, module = self._seen_experts(owner), self.model.get_submodule(owner)
            else:
                continue
            handles.append(module.register_forward_pre_hook(hook))
        try:
            for batch in batches:
                self._add(batch)
        finally:
            for handle in handles:
                handle.remove()
        for matrix in self.matrices:
            self._check_seen(matrix, int(self.numbers[matrix.name].min()))
        return {name: (self.sums[name], self.numbers[name]) for name in self.sums}

    def _check_seen(self, matrix: Matrix, tokens: int) -> None:
        if not self.numbers[matrix.name].any():
            raise ValueError(
                f"nothing went through {matrix.name} of {type(self.model).__name__} as through a layer: its weight is "
                "read by code of the family's own, or the batches do not reach it. Start from the weights instead: "
                "batches=None."
            )
        if tokens < matrix.d_in:
            which = f"an expert of {matrix.name}" if matrix.experts > 1 else matrix.name
            raise ValueError(
                f"{which} has {matrix.d_in} inputs and saw {tokens} tokens of the batches: directions that no token "
                f"took would be dropped as if they never were. Give more texts, so that it sees {matrix.d_in} at least "
                "and better ten times as many, or start from the weights: batches=None."
            )

    def _entering(self, block, args, kwargs):
        self.beside = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, Tensor)]

    def _seen(self, name: str):
        def hook(module, args):
            self.inputs.append((name, args[0].detach(), any(args[0] is x for x in self.beside)))

        return hook

    def _seen_experts(self, owner: str):
        def hook(module, args):
            self.routed.append((owner, module, args))

        return hook

    def _add(self, batch: Mapping[str, Tensor]) -> None:
        self.inputs, self.routed = [], []
        trace = capture(self.model, batch, hidden_states=[self.layer], logits=False)
        mask = trace.layer_mask(self.layer)
        for name, x, from_encoder in self.inputs:
            own = trace.mask if from_encoder and trace.decoder_mask is mask else mask
            x = self._tokens(name, x, own).double()  # (n, d)
            self.sums[name] += x.T @ x
            self.numbers[name] += len(x)
        for owner, experts, (hidden, index, _) in self.routed:
            self._add_routed(owner, experts, hidden.reshape(-1, hidden.shape[-1]), index, mask.flatten())

    def _tokens(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        if x.shape[:-1] == mask.shape:
            return x[mask]
        if x.dim() == 2 and len(x) == mask.numel():  # (B · T, d), as mixtures route their tokens
            return x[mask.flatten()]
        raise ValueError(
            f"{name} of {type(self.model).__name__} is given {tuple(x.shape)} where the batch is {tuple(mask.shape)} "
            "(B, T): padding cannot be told from tokens there. Start from the weights instead: batches=None."
        )

    def _add_routed(self, owner: str, experts: nn.Module, hidden: Tensor, index: Tensor, mask: Tensor) -> None:
        part = first_projection(experts)
        for expert in range(experts.num_experts):
            x = hidden[(index == expert).any(-1) & mask]
            inner = expert_inner(experts, nn.functional.linear(x, getattr(experts, part)[expert]))
            for name, given in ((f"{owner}.{part}", x.double()), (f"{owner}.down_proj", inner.double())):
                if name in self.sums:
                    self.sums[name][expert] += given.T @ given
                    self.numbers[name][expert] += len(given)
