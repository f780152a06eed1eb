"""Modules that low rank puts in place of dense weights: two thin matrices for one, of one layer or of each expert."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from fakit.files import whole

EXPERTS = "fakit_low_rank"  # what a model's configuration calls the forward pass of experts in pairs
FILE = "low_rank.safetensors"
"""What a model's weights lie in as pairs. Not model.safetensors: plain transformers would leave out what it has no name
for, and start that at random.
"""


class LowRankLinear(nn.Module):
    """y = up(down(x)) with `down` (r, d_in) and `up` (d_out, r), in place of a linear layer of weight (d_out, d_in).

    Args:
        conv1d: it stands for GPT-2's Conv1D, whose weight is (d_in, d_out).
    """

    def __init__(
        self, d_in: int, d_out: int, rank: int, bias: bool = True, conv1d: bool = False, device=None, dtype=None
    ):
        super().__init__()
        self.conv1d = conv1d
        self.down = nn.Linear(d_in, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, d_out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) → (…, d_out)"""
        return self.up(self.down(x))

    @property
    def weight(self) -> Tensor:
        """The product in the form of the layer it stands for, (d_out, d_in) or Conv1D's, for code that reads a layer's
        weight instead of calling it (T5 asks for its dtype, Mamba's kernels multiply by it). It is computed each time.
        """
        product = self.up.weight @ self.down.weight  # (d_out, d_in)
        return product.T if self.conv1d else product

    def dense(self) -> nn.Linear | Conv1D:
        """The layer it stands for, with the product for its weight, multiplied in float64."""
        d_in, d_out, kind = self.down.in_features, self.up.out_features, self.up.weight
        product = (kind.double() @ self.down.weight.double()).to(kind.dtype)
        with torch.device("meta"):  # nothing random is drawn
            layer = Conv1D(d_out, d_in) if self.conv1d else nn.Linear(d_in, d_out, self.bias is not None)
        layer.weight = nn.Parameter(product.T.contiguous() if self.conv1d else product, kind.requires_grad)
        layer.bias = self.bias
        return layer.train(self.training)

    @property
    def bias(self) -> Tensor | None:
        """(d_out,)"""
        return self.up.bias


class LowRankExperts(nn.Module):
    """`down` (E, r, d_in) and `up` (E, d_out, r), for the weights (E, d_out, d_in) of E experts in one tensor."""

    def __init__(self, experts: int, d_in: int, d_out: int, rank: int, device=None, dtype=None):
        super().__init__()
        self.down = nn.Parameter(torch.empty(experts, rank, d_in, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(experts, d_out, rank, device=device, dtype=dtype))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """The tokens x (n, d_in) of one expert → (n, d_out)"""
        return F.linear(F.linear(x, self.down[expert]), self.up[expert])

    @property
    def weight(self) -> Tensor:
        """The products, (E, d_out, d_in), computed each time."""
        return self.up @ self.down


def pairs(model: nn.Module) -> dict[str, LowRankLinear | LowRankExperts]:
    """The pairs of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLinear | LowRankExperts)}


def save_pairs(model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """The files of a model with pairs: config.json, low_rank.safetensors, and those of generation.

    Args:
        state: its weights by name, each once.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    with whole(folder / FILE) as partial:
        save_file({name: x.contiguous() for name, x in state.items()}, partial, {"format": "pt"})


def first_projection(experts: nn.Module) -> str:
    """What a module of fused experts calls the weight that its tokens meet first."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def expert_inner(experts: nn.Module, first: Tensor) -> Tensor:
    """What goes into an expert's second projection, of what comes out of its first."""
    return experts._apply_gate(first) if experts.has_gate else experts.act_fn(first)


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward pass of a module of fused experts whose weights are dense or in pairs: transformers' own loop, expert by
    expert.

    Args:
        hidden_states: (T, d).
        top_k_index: (T, k), the experts of each token.
        top_k_weights: (T, k), what each of them counts.
    """
    mixed = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= experts.num_experts:  # an expert that another process holds
            continue
        token, place = torch.where(top_k_index == expert)
        first = _through(getattr(experts, first_projection(experts)), hidden_states[token], expert)
        out = _through(experts.down_proj, expert_inner(experts, first), expert)  # (n, d)
        mixed.index_add_(0, token, (out * top_k_weights[token, place, None]).to(mixed.dtype))
    return mixed


def _through(weight: Tensor | LowRankExperts, x: Tensor, expert: int) -> Tensor:
    return weight(x, expert) if isinstance(weight, LowRankExperts) else F.linear(x, weight[expert])


# transformers asks this table which forward pass experts take, by the configuration's name for it
ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
