"""Compare losses with released code of others, number by number → docs/peers.md.

    pip install --no-deps --target PEERS trl==1.16.0 liger-kernel==0.8.5 textbrewer==0.2.1.post1 \
        sentence-transformers==6.2.0 optipfair==0.4.2
    python scripts/compare_peers.py PEERS

Into a folder of its own and without what they depend on: the kit needs none of them, and importing them whole takes a
GPU (Liger's kernels), vLLM or data sets. Each function is taken out of the one file that it stands in, with torch alone
around it; nothing in it is changed. Both sides are given the same float64 numbers; compared are the value and the
student's gradient.
"""

import __future__

import argparse
import ast
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fakit import LayerMap, Objective
from fakit.losses import attention, features, outputs, relational
from fakit.objective.feature_terms import Dynamics, Flow, Pooled
from fakit.tracing.trace import Trace

PAGE = Path(__file__).parents[1] / "docs/peers.md"
PACKAGES = ("trl", "liger-kernel", "textbrewer", "sentence-transformers", "optipfair")
HEAD = (
    "# The losses beside released code\n",
    "This page is written by `python scripts/compare_peers.py PEERS`, which says how the packages are installed.",
    "Both sides are given the same random float64 numbers: 3 texts of 7, 4 and 2 of 7 tokens, 11 classes, 6 "
    "dimensions, 2 heads.",
    "A difference is relative: of the value, and of the student's gradient (the largest entry, over the largest of "
    "ours).",
    'Where a factor stands before "ours" the two define the loss up to it, and the last column says why.',
    "Triton kernels (Liger's KL, JSD and TVD) need a GPU and are not among these; of skew KLs, TRL and Liger have "
    "none.\n",
)
B, T, V, D, H = 3, 7, 11, 6, 2
MASK = torch.arange(T) < torch.tensor([7, 4, 2]).unsqueeze(1)  # (B, T)
LABELS = torch.where(MASK, torch.arange(B * T).view(B, T) % V, -100)
PEERS: Path = Path()  # where the packages lie


def draw(*shape: int, seed: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def taken(path: str, name: str, **around) -> Callable:
    """A function out of an installed file, by its dotted name there, with torch and `around` to refer to."""
    file = PEERS / path
    found: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    for part in name.split("."):
        found = next(node for node in found.body if getattr(node, "name", None) == part)
    found.decorator_list = []
    code = compile(
        ast.Module([found], []), str(file), "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True
    )
    namespace = {"torch": torch, "F": F, "nn": nn, "math": math, **around}
    exec(code, namespace)
    return namespace[found.name]


@dataclass(frozen=True)
class Row:
    """One comparison: both sides as functions of what the student has.

    Attributes:
        peer, theirs, ours: as the table names them.
        student: (…), with a gradient.
        both: gives (their loss, ours), () each.
        why: what a factor in `ours` comes from, or why a gradient differs.
    """

    peer: str
    theirs: str
    ours: str
    student: Tensor
    both: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    why: str = ""

    def differences(self) -> tuple[float, float]:
        """Of the value and of the gradient, each relative to ours."""
        values, gradients = [], []
        for side in self.both:
            student = self.student.clone().requires_grad_()
            value = side(student)
            values.append(value.item())
            gradients.append(torch.autograd.grad(value, student)[0])
        theirs, ours = gradients
        return abs(values[0] / values[1] - 1), ((theirs - ours).abs().max() / ours.abs().max()).item()


# -- output distributions ---------------------------------------------------------------------------------------------


def divergences() -> list[Row]:
    """TRL's and Liger's JSD with its two limits, and Liger's cosine of logits."""
    student, teacher = 3 * draw(B, T, V, seed=0), 3 * draw(B, T, V, seed=1)
    trl = taken("trl/experimental/gkd/gkd_trainer.py", "GKDTrainer.generalized_jsd_loss")
    liger = taken("liger_kernel/chunked_loss/jsd_loss.py", "LigerFusedLinearJSDFunction.distillation_loss_fn")
    rows = []
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl"), (0.1, "jsd"), (0.5, "jsd"), (0.9, "jsd")):
        settings, text = ({"beta": beta}, f", beta={beta}") if name == "jsd" else ({}, "")
        loss = outputs.LOSSES[name]

        def ours(z: Tensor, tau: float = 1.0, loss=loss, settings=settings) -> Tensor:
            return loss(z, teacher, MASK, temperature=tau, **settings)

        rows.append(
            Row(
                "TRL",
                f"`GKDTrainer.generalized_jsd_loss(beta={beta:g})`",
                f"`{name}{text}`",
                student,
                (lambda z, beta=beta: trl(z, teacher, LABELS, beta=beta), ours),
            )
        )
        if beta in (0.0, 0.5):
            rows.append(
                Row(
                    "TRL",
                    f"`GKDTrainer.generalized_jsd_loss(beta={beta:g}, temperature=2)`",
                    f"¼ ours: `{name}{text}, temperature=2`",
                    student,
                    (
                        lambda z, beta=beta: trl(z, teacher, LABELS, beta=beta, temperature=2.0),
                        lambda z, ours=ours: ours(z, 2.0) / 4,
                    ),
                    "theirs is without τ², so that its gradient shrinks as τ grows",
                )
            )
        rows.append(
            Row(
                "Liger",
                f"`LigerFusedLinearJSDFunction.distillation_loss_fn(beta={beta:g})`, over the number of labels",
                f"`{name}{text}`",
                student,
                (
                    lambda z, beta=beta: (
                        liger(z.flatten(0, 1), teacher.flatten(0, 1), beta, LABELS.flatten()) / MASK.sum()
                    ),
                    ours,
                ),
                "its loss class divides logits by τ and leaves out τ², as TRL's" if beta == 0.5 else "",
            )
        )
    cosine = taken(
        "liger_kernel/chunked_loss/cosine_similarity_loss.py",
        "LigerFusedLinearCosineSimilarityFunction.distillation_loss_fn",
    )
    rows.append(
        Row(
            "Liger",
            "`LigerFusedLinearCosineSimilarityFunction.distillation_loss_fn`, over the number of labels",
            "`cosine` of the logits",
            student,
            (
                lambda z: cosine(z.flatten(0, 1), teacher.flatten(0, 1), LABELS.flatten(), -100) / MASK.sum(),
                lambda z: features.cosine(z, teacher, MASK),
            ),
        )
    )
    ce = taken("textbrewer/losses.py", "kd_ce_loss")
    squares = taken("textbrewer/losses.py", "kd_mse_loss")
    return [
        *rows,
        Row(
            "TextBrewer",
            "`kd_ce_loss(temperature=2)`, less that of the teacher with itself",
            "¼ ours: `forward_kl, temperature=2`",
            student,
            (
                lambda z: ce(z, teacher, 2.0) - ce(teacher, teacher, 2.0),
                lambda z: outputs.forward_kl(z, teacher, None, 2.0) / 4,
            ),
            "a cross-entropy, so more by the teacher's entropy; without τ² and without a mask",
        ),
        Row(
            "TextBrewer",
            "`kd_mse_loss(temperature=2)`",
            "¼ ours: `logit_mse`",
            student,
            (lambda z: squares(z, teacher, 2.0), lambda z: outputs.logit_mse(z, teacher) / 4),
            "theirs shrinks with 1/τ²",
        ),
    ]


# -- hidden states ----------------------------------------------------------------------------------------------------


def states() -> list[Row]:
    """TextBrewer's losses of hidden states, and sentence-transformers' EmbedDistillLoss."""
    student, teacher, wider = draw(B, T, D, seed=2), draw(B, T, D, seed=3), draw(B, T, D + 2, seed=4)
    brewer = {n: taken("textbrewer/losses.py", n, mask_dtype=torch.bool) for n in ("hid_mse_loss", "cos_loss")}
    brewer |= {n: taken("textbrewer/losses.py", n) for n in ("pkd_loss", "fsp_loss", "mmd_loss")}
    lower = draw(B, T, D, seed=5)  # a layer below, the same on both sides of the comparison
    flow = Objective(LayerMap([(1, 1), (2, 2)]), terms={"flow": Flow()})

    def by_term(objective: Objective, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        sides = [Trace(hidden_states=dict(enumerate(layers, 1)), mask=MASK) for layers in (ours, theirs)]
        return objective(*sides).total

    def first(z: Tensor) -> Tensor:
        objective = Objective(LayerMap([(1, 1)]), terms={"first": Pooled("normalized_mse", pool="first")})
        return D * by_term(objective, [z], [teacher])

    rows = [
        Row(
            "TextBrewer",
            f"`{name}`",
            f"`{loss.__name__}`",
            student,
            (lambda z, name=name: brewer[name](z, teacher, MASK), lambda z, loss=loss: loss(z, teacher, MASK)),
        )
        for name, loss in (("hid_mse_loss", features.mse), ("cos_loss", features.cosine))
    ]
    rows += [
        Row(
            "TextBrewer",
            "`pkd_loss`",
            'd · ours: `Pooled("normalized_mse", pool="first")`',
            student,
            (lambda z: brewer["pkd_loss"](z, teacher), first),
            "theirs sums over dimensions; PKD's paper has a mean, and β = 500 for it",
        ),
        Row(
            "TextBrewer",
            "`fsp_loss` (also `gram`)",
            "`Flow`",
            student,
            (
                lambda z: brewer["fsp_loss"]([lower, z], [lower, teacher], MASK),
                lambda z: by_term(flow, [lower, z], [lower, teacher]),
            ),
        ),
        Row(
            "TextBrewer",
            "`mmd_loss` (also `nst`), without a mask",
            "`nst`",
            student,
            (lambda z: brewer["mmd_loss"]([z, z], [wider, wider]), lambda z: relational.nst(z, wider)),
        ),
        Row(
            "TextBrewer",
            "`mmd_loss` (also `nst`), with a mask, equal widths",
            "(d/T)² · ours: `nst`",
            student,
            (
                lambda z: brewer["mmd_loss"]([z, z], [teacher, teacher], MASK),
                lambda z: (D / T) ** 2 * relational.nst(z, teacher, MASK),
            ),
            "with a mask theirs divides by the padded length in place of the width",
        ),
    ]
    embed = taken(
        "sentence_transformers/sentence_transformer/losses/embed_distill.py",
        "EmbedDistillLoss.compute_loss_from_embeddings",
    )
    of_texts, target = draw(B, D, seed=6), draw(B, D, seed=7)
    for metric, loss in (("mse", features.mse), ("cosine", features.cosine), ("l2", features.l2)):
        settings = SimpleNamespace(projection=None, distance_metric=metric)
        rows.append(
            Row(
                "sentence-transformers",
                f'`EmbedDistillLoss(distance_metric="{metric}")`',
                f'`Pooled("{loss.__name__}")` of the embeddings',
                of_texts,
                (
                    lambda z, settings=settings: embed(settings, [z], [target]),
                    lambda z, loss=loss: loss(z.unsqueeze(1), target.unsqueeze(1)),
                ),
            )
        )
    return rows


# -- attention --------------------------------------------------------------------------------------------------------


def maps() -> list[Row]:
    """TextBrewer's losses of attention. It is given scores, which are far below 0 where a key is padding."""
    padding = ~MASK[:, None, None, :]
    student, teacher = (draw(B, H, T, T, seed=seed).masked_fill(padding, -1e4) for seed in (8, 9))
    names = ("att_mse_loss", "att_mse_sum_loss", "att_ce_loss", "att_ce_mean_loss")
    brewer = {name: taken("textbrewer/losses.py", name) for name in names}
    kl = attention.map_kl

    def averaged(z: Tensor) -> Tensor:
        return z.mean(1, keepdim=True).softmax(-1)

    return [
        Row(
            "TextBrewer",
            "`att_mse_loss`",
            "`score_mse`",
            student,
            (
                lambda z: brewer["att_mse_loss"](z, teacher, MASK),
                lambda z: attention.score_mse(z, teacher, MASK),
            ),
        ),
        Row(
            "TextBrewer",
            "`att_mse_sum_loss`",
            "H² · ours: `score_mse` of the heads' mean",
            student,
            (
                lambda z: brewer["att_mse_sum_loss"](z, teacher, MASK),
                lambda z: (
                    H**2 * attention.score_mse(attention.group_mean(z, 1), attention.group_mean(teacher, 1), MASK)
                ),
            ),
            "theirs sums the heads first",
        ),
        Row(
            "TextBrewer",
            "`att_ce_loss`, less that of the teacher with itself",
            "`kl`",
            student,
            (
                lambda z: brewer["att_ce_loss"](z, teacher, MASK) - brewer["att_ce_loss"](teacher, teacher, MASK),
                lambda z: kl(z.softmax(-1), teacher.softmax(-1), MASK),
            ),
            "a cross-entropy, so more by the teacher's entropy",
        ),
        Row(
            "TextBrewer",
            "`att_ce_mean_loss`, less that of the teacher with itself",
            "`kl` of the heads' mean score",
            student,
            (
                lambda z: (
                    brewer["att_ce_mean_loss"](z, teacher, MASK) - brewer["att_ce_mean_loss"](teacher, teacher, MASK)
                ),
                lambda z: kl(averaged(z), averaged(teacher), MASK),
            ),
            "a cross-entropy; ours averages maps, after the softmax",
        ),
    ]


# -- optipfair --------------------------------------------------------------------------------------------------------


def compound() -> list[Row]:
    """optipfair's skew KL, trajectory and feature dynamics, one at a time."""
    loss = taken("optipfair/distillation/loss.py", "compute_distillation_loss")
    logits = 3 * draw(B, T, V, seed=10), 3 * draw(B, T, V, seed=11)
    student, teacher = draw(3, B, T, D, seed=12), draw(5, B, T, D, seed=13)  # (layers, B, T, d)
    layer_map = [0, 2, 4]
    valid = LABELS[:, 1:] != -100  # of the tokens that predict one
    on = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "delta": 0.0}

    def theirs(weight: str, z: Tensor = logits[0], layers: Tensor = student, **more: float) -> Tensor:
        weights = on | {weight: 1.0}
        return loss(z, logits[1], list(layers), list(teacher), LABELS, layer_map, **weights, **more)[0]

    dynamics = Objective(
        LayerMap([(s, t) for s, t in enumerate(layer_map)]), terms={"dynamics": Dynamics(projection=None)}
    )

    def ours(layers: Tensor) -> Tensor:
        sides = [Trace(hidden_states=dict(enumerate(x[:, :, :-1])), mask=valid) for x in (layers, teacher)]
        return dynamics(*sides).total

    def trajectory(layers: Tensor) -> Tensor:
        pairs = [(layers[s][:, :-1], teacher[t][:, :-1]) for s, t in enumerate(layer_map)]
        return torch.stack([features.cosine(*pair, valid) for pair in pairs]).mean()

    def skew(z: Tensor) -> Tensor:
        return outputs.skew_reverse_kl(z[:, :-1], logits[1][:, :-1], valid, 2.0, alpha=0.4)

    return [
        Row(
            "optipfair",
            "`compute_distillation_loss(beta=1)`, skew KL",
            "`skew_reverse_kl, alpha=0.4, temperature=2`",
            logits[0],
            (lambda z: theirs("beta", z), skew),
            "theirs takes the student's probabilities before the logarithm, and those in the mixture, without "
            "gradient: what is left, Σ Q ∇ log Q, is 0, so that its logits term trains nothing; the value differs by "
            "the 1e-9 in its logarithm",
        ),
        Row(
            "optipfair",
            "`compute_distillation_loss(gamma=1)`, trajectory",
            "`cosine`",
            student,
            (lambda x: theirs("gamma", layers=x), trajectory),
        ),
        Row(
            "optipfair",
            "`compute_distillation_loss(delta=1)`, feature dynamics",
            '`Dynamics("cosine")`',
            student,
            (lambda x: theirs("delta", layers=x), ours),
            "theirs is summed in float32",
        ),
    ]


def rows() -> list[Row]:
    return [*divergences(), *states(), *maps(), *compound()]


def page(versions: dict[str, str]) -> str:
    """The page's text."""
    lines = ["| peer | its function | ours | value | gradient | why |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows():
        value, gradient = (f"{x:.0e}" if x else "0" for x in row.differences())
        lines.append(f"| {row.peer} | {row.theirs} | {row.ours} | {value} | {gradient} | {row.why} |")
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join([*HEAD, f"Measured with torch {torch.__version__.split('+')[0]}, {named}.\n", *lines, ""])


def main() -> None:
    global PEERS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", type=Path, help="the folder that the packages were installed into")
    PEERS = parser.parse_args().peers
    found = importlib.metadata.distributions(path=[str(PEERS)])
    versions = {d.metadata["Name"].replace("_", "-"): d.version for d in found}
    if missing := [name for name in PACKAGES if name not in versions]:
        parser.error(f"{PEERS} lacks {', '.join(missing)}; the first lines of --help say how they are installed.")
    text = page({name: versions[name] for name in PACKAGES})
    PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
