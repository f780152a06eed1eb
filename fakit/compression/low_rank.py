"""Low rank (Lillama; Sy, Cerisara, Illina, arXiv 2412.16719, NAACL 2025): pairs of thin matrices for dense weights.

    plan = low_rank.plan(teacher, keep=0.8)                 # ranks, parameters and predicted errors, to look at first
    student = low_rank.compress(teacher, plan=plan)         # or low_rank.compress(teacher, keep=0.8, method="bottom")
    low_rank.distill(student, teacher, texts, tokenizer)    # block by block, each from its own inputs and outputs

A weight W (d_out, d_in) becomes up (d_out, r) times down (r, d_in) where r (d_in + d_out) < d_in d_out.

How it is exported. transformers has no class, and PEFT no adapter, whose linear layer is a product alone: an adapter
adds to a dense weight, which would have to be there; factored families (DeepSeek's attention) put a norm between the
factors. So there are two ways, and one chooses between them:

* `save(model, folder)` and `load(folder)`: the pairs as they are, as small and as fast as the plan says. The folder
  holds config.json and low_rank.safetensors, and `load` needs nothing else: the configuration makes the model, and the
  shapes of the pairs say their ranks. No pickle and no code of the folder's is run. Plain transformers finds no
  model.safetensors there and refuses, instead of starting what it has no name for at random.
* `merge(model).save_pretrained(folder)`: the products. Plain transformers loads it, without fakit, with the same logits
  up to rounding, and at the teacher's size and speed: the rank is not seen any more.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fakit.compression.local import LayerResult, distill
from fakit.compression.ranks import Plan, Row, make_plan
from fakit.compression.spectra import Matrix, Spectra, count, dense_weight, find_matrices, spectra, stable_rank
from fakit.files import check_room
from fakit.models.kinds import ties, untie
from fakit.models.low_rank_linear import EXPERTS, FILE, LowRankExperts, LowRankLinear, pairs, save_pairs
from fakit.models.pretrained import in_one_sentence, read_config
from fakit.models.random_state import random_state_kept

__all__ = [
    "LayerResult",
    "LowRankExperts",
    "LowRankLinear",
    "Plan",
    "Row",
    "Spectra",
    "compress",
    "distill",
    "load",
    "merge",
    "plan",
    "ranks",
    "save",
    "spectra",
    "stable_rank",
]

Batches = Iterable[Mapping[str, Tensor]]


def plan(
    model: PreTrainedModel | Spectra,
    keep: float = 0.8,
    method: str = "bottom",
    batches: Batches | None = None,
    lowest: float = 0.25,
) -> Plan:
    """Which rank each weight would get, to look at before anything is changed.

    Args:
        model: or its `spectra`, computed once: then a plan takes milliseconds.
        keep, method, lowest: see `fakit.compression.ranks.make_plan`.
        batches: texts as the model reads them. With them, errors are those of the outputs on these texts, and pairs
            start from them. Refused beside spectra, which are
            of the weights or of activations already.

    >>> measured = low_rank.spectra(teacher)  # doctest: +SKIP
    >>> low_rank.plan(measured, keep=0.7, method="uniform").after  # doctest: +SKIP
    """
    return _planned(model, keep, method, batches, lowest)


def _planned(
    model: PreTrainedModel | Spectra, keep: float, method: str, batches: Batches | None, lowest: float
) -> Plan:
    if isinstance(model, Spectra):
        if batches is not None:
            raise ValueError(f"batches were given beside the spectra of {model.name}; give them to low_rank.spectra.")
        return make_plan(model, keep, method, lowest)
    if method == "energy" and batches is None:
        raise ValueError(
            "method='energy' was requested without batches: activation energy is measured on texts. Pass batches=…, or "
            "plan from low_rank.spectra(model) to go by the energy of the weights."
        )
    make_plan(_blank(model), keep, method if method != "energy" else "uniform", lowest)  # refuses before any work
    return make_plan(spectra(model, batches), keep, method, lowest)


def _blank(model: PreTrainedModel) -> Spectra:
    return Spectra(type(model).__name__, count(model), tuple(find_matrices(model)), ())


def compress(
    model: PreTrainedModel,
    keep: float = 0.8,
    method: str = "bottom",
    *,
    batches: Batches | None = None,
    lowest: float = 0.25,
    plan: Plan | None = None,
) -> PreTrainedModel:
    """A trainable copy of a model with pairs in the place of dense weights: at most `keep` of its parameters.

    W becomes up · down = U_r U_rᵀ W, with U the left singular vectors of W, so that this is its best approximation of
    rank r, or with batches those of W C^½, so that its outputs on these texts are. Row i of down and column i of up
    have one norm, √‖u_iᵀ W‖; from the weights this is Lillama's U √S and √S Vᵀ. A weight that the plan leaves dense is
    copied as it is. Where the budget asks for nothing, nothing changes.

    Args:
        model: left as it is.
        keep, method, batches, lowest: as in `plan`.
        plan: a plan of this model, in place of them.

    Returns:
        a model of the same class, dtype, device and mode. `save` it, or `merge` it for plain transformers: its own
        `save_pretrained` would write names that transformers has no place for.

    Raises:
        ValueError: as `plan`; a plan of another model.
    """
    if plan is None:
        plan = _planned(model, keep, method, batches, lowest)
    _check_plan(plan, model)
    pairs = [x for x in zip(plan.spectra.matrices, plan.spectra.of, plan.ranks, strict=True) if x[2] is not None]
    # what is replaced is not copied first
    replaced = [
        model.get_parameter(matrix.name if matrix.experts > 1 else f"{matrix.name}.weight") for matrix, *_ in pairs
    ]
    student = copy.deepcopy(model, {id(weight): weight for weight in replaced})
    with torch.no_grad():
        for matrix, spectrum, rank in pairs:
            weight = dense_weight(model, matrix.name)  # (E, d_out, d_in)
            left = spectrum.left[:, :, :rank].to(weight.device)
            down = left.mT @ weight.to(left.dtype)  # (E, r, d_in)
            norms = down.norm(dim=2)  # (E, r)
            scale = torch.where(norms > 0, norms.sqrt(), 1.0)
            _fill(_replace(student, matrix, rank), left * scale[:, None], down / scale[:, :, None])
    return student.requires_grad_(True)


def _check_plan(plan: Plan, model: PreTrainedModel) -> None:
    ours, theirs = find_matrices(model), plan.spectra.matrices
    if tuple(ours) != theirs or count(model) != plan.before:
        raise ValueError(
            f"the plan is of a {plan.spectra.name} with {len(theirs)} weights in its blocks and {plan.before:,} "
            f"parameters; this {type(model).__name__} has {len(ours)} and {count(model):,}. Plan this model."
        )


def _replace(model: PreTrainedModel, matrix: Matrix, rank: int) -> LowRankLinear | LowRankExperts:
    """Put an empty pair in the place of one weight; nothing random is drawn for it."""
    owner, _, own = matrix.name.rpartition(".")
    holder = model.get_submodule(owner)
    if matrix.experts > 1:
        dense = getattr(holder, own)
        pair = LowRankExperts(matrix.experts, matrix.d_in, matrix.d_out, rank, device="meta", dtype=dense.dtype)
        pair.to_empty(device=dense.device)
        delattr(holder, own)
        holder.config._experts_implementation = EXPERTS
    else:
        layer = getattr(holder, own)
        form = (layer.bias is not None, isinstance(layer, Conv1D))
        pair = LowRankLinear(matrix.d_in, matrix.d_out, rank, *form, device="meta", dtype=layer.weight.dtype)
        pair.to_empty(device=layer.weight.device)
        if layer.bias is not None:
            pair.up.bias = layer.bias
    setattr(holder, own, pair.train(holder.training))
    return pair


def _fill(pair: LowRankLinear | LowRankExperts, up: Tensor, down: Tensor) -> None:
    """Put (E, d_out, r) and (E, r, d_in) into a pair."""
    if isinstance(pair, LowRankExperts):
        pair.up.copy_(up)
        pair.down.copy_(down)
    else:
        pair.up.weight.copy_(up[0])
        pair.down.weight.copy_(down[0])


def ranks(model: nn.Module) -> dict[str, int]:
    """The rank of each pair of a model, by name."""
    return {name: _rank(pair) for name, pair in pairs(model).items()}


def _rank(pair: LowRankLinear | LowRankExperts) -> int:
    return pair.down.shape[1] if isinstance(pair, LowRankExperts) else pair.down.out_features


# -- export ------------------------------------------------------------------------------------------------------------


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in which the products stand in the place of the pairs: a plain transformers model, whose logits are the
    same up to rounding, as large and as slow as the one that was compressed.

    Raises:
        ValueError: a model without pairs.
    """
    if not pairs(model):
        raise ValueError(f"{type(model).__name__} has no pairs to merge: it is a plain transformers model already.")
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, pair in pairs(merged).items():
            owner, _, own = name.rpartition(".")
            holder = merged.get_submodule(owner)
            if isinstance(pair, LowRankLinear):
                setattr(holder, own, pair.dense())
                continue
            product = (pair.up.double() @ pair.down.double()).to(pair.up.dtype)
            delattr(holder, own)
            setattr(holder, own, nn.Parameter(product, pair.up.requires_grad))
            holder.config._experts_implementation = merged.get_correct_experts_implementation(None)
    return merged


def save(model: PreTrainedModel, folder: str | Path, tokenizer=None) -> None:
    """Write a model with its pairs, for `load`: config.json, low_rank.safetensors, and the files of generation and
    tokenizer.

    Raises:
        ValueError: a model without pairs, or of a class that is not transformers' own; a folder without room.
    """
    kind = type(model)
    if not pairs(model):
        raise ValueError(f"{kind.__name__} has no pairs: save it as any model, with save_pretrained.")
    if getattr(transformers, kind.__name__, None) is not kind:
        raise ValueError(f"{kind.__name__} is no class of transformers' own, and load(folder) makes no others.")
    tied, folder = ties(model), Path(folder)
    state = {name: x for name, x in model.state_dict().items() if name not in tied}
    check_room(folder, sum(x.nbytes for x in state.values()), "the model")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    save_pairs(model, state, folder)


def load(folder: str | Path, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model that `save` wrote, in evaluation mode.

    Raises:
        ValueError: a folder without such a model, of a class that transformers lacks, or with weights that are damaged,
            missing or too many; code of the folder's own.
    """
    folder = Path(folder)
    if not (folder / FILE).is_file():
        found = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise ValueError(
            f"{folder} holds no {FILE} (found: {found}); give the folder that low_rank.save wrote. A merged model is "
            "loaded as any other."
        )
    config = read_config(str(folder))
    name = next(iter(config.architectures or []), None)
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(f"{folder / 'config.json'} names the class {name!r}, which transformers does not have.")
    with in_one_sentence(str(folder), "as a low-rank model"), safe_open(folder / FILE, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with in_one_sentence(str(folder), "as a low-rank model"), random_state_kept(torch.device("cpu")):
        dtype = next(x.dtype for x in state.values() if x.is_floating_point())
        model = kind._from_config(config, dtype=dtype)
    untie(model, [name for name, first in ties(model).items() if {name, first} <= state.keys()])
    for matrix in find_matrices(model):
        if rank := _stored_rank(matrix, state):
            _replace(model, matrix, rank)
    tied = ties(model)
    wanted = {name: x for name, x in model.state_dict().items() if name not in tied}
    wrong = sorted(name for name in wanted if name not in state or state[name].shape != wanted[name].shape)
    wrong += sorted(state.keys() - wanted.keys())
    if wrong:
        raise ValueError(
            f"{folder / FILE} and the configuration beside it do not belong together: {len(wrong)} weights are "
            f"missing, of another shape or too many ({', '.join(wrong[:4])}). Save the model again."
        )
    model.load_state_dict(state, strict=False)
    written = folder / "generation_config.json"
    if model.can_generate() and written.is_file():
        model.generation_config = transformers.GenerationConfig.from_dict(json.loads(written.read_text("utf-8")))
    return model.to(device).eval()


def _stored_rank(matrix: Matrix, state: dict[str, Tensor]) -> int | None:
    """The rank of the pair that stands for a weight in a file; None where it is dense."""
    down = state.get(f"{matrix.name}.down" if matrix.experts > 1 else f"{matrix.name}.down.weight")
    return None if down is None else down.shape[-2]
