"""Flex-KD: the teacher's units that matter to the task, against a recomputation by hooks placed by hand."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import default_data_collator

from fakit import Features, LayerMap, Objective, Outputs, Task, Trace, capture
from fakit.experiments import ExperimentConfig
from fakit.models import find_blocks
from fakit.objective.units import Units, fit_units
from tests.families import tiny
from tests.training.runs import cache_of, data, make, parts, weights


def scores_by_hand(model, batches: list[dict[str, Tensor]], layer: int) -> Tensor:
    """Σ over tokens of |∂L/∂h · h| in float64, L the sum of the labels' cross-entropies, of a model that is trainable."""
    model, total = model.double().requires_grad_(True), 0.0
    for batch in batches:
        kept = []
        handle = find_blocks(model)[layer - 1].register_forward_hook(
            lambda m, a, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        handle.remove()
        kept[0].retain_grad()
        if logits.dim() == 3:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
        else:
            loss = F.cross_entropy(logits, batch["labels"], reduction="sum")
        loss.backward()
        total = total + (kept[0].grad * kept[0]).abs()[batch["attention_mask"].bool()].sum(0).detach()
    return total


def batches(causal: bool) -> list[dict[str, Tensor]]:
    rows = data(causal)
    return [default_data_collator(rows[:4]), default_data_collator(rows[4:10])]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_units_are_those_of_the_largest_gradient_times_activation(family):
    teacher, (causal, student) = tiny(family).requires_grad_(False), (family != "bert", parts(family)[1])
    objective = Objective(LayerMap([(1, 2), (2, 3)]), terms={"units": Units()}).prepare(16, 32)
    found = fit_units(objective, teacher, batches(causal))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches(causal))
    assert found == {2: tokens, 3: tokens} and all(p.grad is None for p in teacher.parameters())
    inputs = {key: batches(causal)[1][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        traces = [capture(m, inputs, [1, 2, 3][:n], logits=False) for m, n in ((student, 2), (teacher, 3))]
    per_layer = objective(*traces).per_layer["units"]
    mask = inputs["attention_mask"].bool()
    for s, t in ((1, 2), (2, 3)):
        expected = scores_by_hand(tiny(family), batches(causal), t)
        torch.testing.assert_close(objective.projections[f"units_T{t}"].scores.double(), expected, rtol=1e-3, atol=1e-7)
        units = sorted(expected.argsort(descending=True)[:16].tolist())
        ours = traces[0].hidden_states[s][mask].double()  # (n, 16)
        theirs = traces[1].hidden_states[t][mask].double()[:, units]
        by_unit = [torch.corrcoef(torch.stack([ours[:, u], theirs[:, u]]))[0, 1].item() for u in range(16)]
        assert per_layer[s, t].item() == pytest.approx(sum((1 - r) ** 2 for r in by_unit) / 16, rel=1e-5)
    assert objective.projection_parameters == {} and not list(objective.parameters())


def run(folder, resume=None, extra=None, batches=2, **changes):
    teacher, student, _ = parts(hidden_dropout_prob=0.1)
    torch.manual_seed(2)
    terms = {"units": Units("mse", batches=batches, weight=0.5), "same": Units(weight=0.5)}
    objective = Objective(LayerMap.uniform(2, 3), outputs=Outputs(), task=Task(), terms=terms)
    made = (None if extra else teacher), student, objective
    trainer = make(folder, made=made, extra=extra, save_strategy="steps", save_steps=2, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_trainer_scores_them_once_and_a_resumed_run_keeps_them(tmp_path):
    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight/checkpoint-2"))
    for layer in straight.objective.terms["units"].layers():
        ours, theirs = (t.objective.projections[f"units_T{layer}"] for t in (straight, resumed))
        assert torch.equal(ours.scores, theirs.scores) and int(ours.tokens) == int(theirs.tokens) > 0
        expected = scores_by_hand(parts()[0], [default_data_collator(data()[i : i + 4]) for i in (0, 4)], layer)
        torch.testing.assert_close(ours.scores.double(), expected, rtol=1e-3, atol=1e-7)
    for name, p in weights(straight).items():
        assert torch.equal(weights(resumed)[name], p), name


def test_what_cannot_be_chosen_is_refused(tmp_path):
    sides = [Trace(hidden_states={1: torch.randn(2, 3, width)}) for width in (4, 6)]
    objective = Objective(LayerMap([(1, 1)]), terms={"units": Units()}).prepare(4, 6)
    with pytest.raises(ValueError, match="units chooses units of the teacher's layer 1, whose scores are not there"):
        objective(*sides)
    with pytest.raises(ValueError, match="the student is 6 wide, the teacher 4"):
        Objective(LayerMap([(1, 1)]), terms={"units": Units()}).prepare(6, 4)
    with pytest.raises(ValueError, match=r"found none\."):
        fit_units(Objective(LayerMap([(1, 1)]), Features()), tiny("bert"), [])
    with pytest.raises(ValueError, match="terms that are not prepared"):
        fit_units(Objective(LayerMap([(1, 1)]), terms={"units": Units()}), tiny("bert"), [])
    prepared = Objective(LayerMap([(1, 1)]), terms={"units": Units()}).prepare(16, 32)
    with pytest.raises(ValueError, match="the batch has no labels"):
        fit_units(prepared, tiny("bert"), [{"input_ids": torch.ones(1, 3, dtype=torch.long)}])
    for wrong, why in ((dict(at="attention"), "leave at and standardize out"), (dict(batches=0), "1 or more")):
        with pytest.raises(ValueError, match=why):
            Units(**wrong)
    with pytest.raises(ValueError, match="needs no choice of units"):
        Units("nst")
    teacher, _, _plain = parts()
    cache = cache_of(tmp_path / "cache", teacher, Objective(LayerMap.uniform(2, 3), Features(), outputs=Outputs()))
    with pytest.raises(ValueError, match="which a cache does not hold"):
        run(tmp_path, extra={"teacher_cache": cache})


def test_a_file_says_it_with_the_same_words():
    given = {"task": {"name": "glosses"}, "terms": {"units": {"kind": "units", "batches": 4, "weight": 2.0}}}
    config = ExperimentConfig.from_dict(given)
    assert ExperimentConfig.from_dict(config.to_dict()) == config and "units" in config.transfers
    with pytest.raises(ValueError, match=r"terms\.units: Units\(batches=0\)"):
        ExperimentConfig.from_dict(given | {"terms": {"units": {"kind": "units", "batches": 0}}})
