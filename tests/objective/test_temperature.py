"""A temperature learned against the student (CTKD): value and gradients by hand in float64, and in the trainer."""

import pytest
import torch
from torch.nn import functional as F

from fakit import Objective, Outputs, Schedule, Task
from fakit.experiments import ExperimentConfig
from fakit.losses.fused.output_head import Head
from fakit.objective.gradients import gradients_by_temperature, term_gradients
from fakit.tracing.trace import Trace
from tests.training.runs import data, make, parts, weights


def sides(dtype=torch.float64, heads=False) -> tuple[Trace, Trace]:
    """Two traces of 2 × 5 tokens over 7 classes, with logits or with heads."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    made = []
    for _ in range(2):
        hidden = torch.randn(2, 5, 6, generator=generator, dtype=dtype).requires_grad_()
        weight = torch.randn(7, 6, generator=generator, dtype=dtype).requires_grad_()
        trace = Trace(mask=mask, causal=True)
        if heads:
            trace.head = Head(hidden, weight)
        else:
            trace.logits = hidden @ weight.T
        trace.leaf = hidden
        made.append(trace)
    return made[0], made[1]


def learned(loss="forward_kl", reversal=0.3, **more) -> Objective:
    outputs = Outputs(loss, temperature=1.5, reversal=reversal, temperature_range=4.0, weight=2.0, **more)
    return Objective(outputs=outputs).double()


def by_hand(loss, ours, theirs, tau):
    """τ² times the mean over the 6 positions that predict a token, from the textbook's sums."""
    p, q = (F.softmax(z[:, :-1] / tau, -1) for z in (theirs, ours))
    m = (p + q) / 2
    values = {
        "forward_kl": lambda: (p * (p / q).log()).sum(-1),
        "jsd": lambda: ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
    }[loss]()
    return tau**2 * (values[0].sum() + values[1, :2].sum()) / 6


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("loss", ["forward_kl", "jsd"])
def test_the_student_goes_down_the_loss_and_the_temperature_up(loss, heads):
    objective, (ours, theirs) = learned(loss), sides(heads=heads)
    (theta,) = objective.parameters()
    with torch.no_grad():
        theta.fill_(-0.4)
    breakdown = objective(ours, theirs)
    breakdown.total.backward()

    own = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    reference, fixed = sides()
    tau = 1.5 + 4.0 / (1 + (-own).exp())
    expected = 2.0 * by_hand(loss, reference.logits, fixed.logits.detach(), tau)
    expected.backward()
    torch.testing.assert_close(breakdown.total, expected)
    assert objective.taus["outputs"].item() == pytest.approx(tau.item(), rel=1e-12)
    assert abs(own.grad.item()) > 1e-3  # a sign that can be told
    assert theta.grad.item() == pytest.approx(-0.3 * own.grad.item(), rel=1e-6)
    torch.testing.assert_close(ours.leaf.grad, reference.leaf.grad)
    assert theirs.leaf.grad is None


def test_strength_0_leaves_the_temperature_and_a_schedule_lets_it_go(tmp_path):
    """Adam takes no step along a gradient of 0; λ rises from the second half on."""

    def run(reversal):
        teacher, student, _ = parts()
        torch.manual_seed(2)
        outputs = Outputs(temperature=1.0, reversal=reversal, temperature_range=8.0, temperature_rate=0.1)
        made = teacher, student, Objective(outputs=outputs, task=Task())
        trainer = make(tmp_path, made=made, weight_decay=0.1, lr_scheduler_type="linear")
        trainer.train()
        taus = [entry["temperature"] for entry in trainer.state.log_history if "temperature" in entry]
        return trainer, taus, trainer.objective.projections["outputs_temperature"].theta.item()

    start = 1.0 + 8.0 * torch.ones(()).sigmoid().item()
    still, taus, theta = run(0.0)
    assert theta == 1.0 and taus == pytest.approx([start] * 6, rel=1e-6)
    group = still.optimizer.param_groups[-1]
    assert [p.shape for p in group["params"]] == [(1,)] and (group["initial_lr"], group["weight_decay"]) == (0.1, 0.0)
    assert sum(len(group["params"]) for group in still.optimizer.param_groups) == len(weights(still))
    assert still.objective.projection_parameters == {}

    _, taus, theta = run(Schedule(0.0, 1.0, "cosine", start=3))
    # λ is 0 in the steps that begin with 0 … 3 done
    assert taus[:4] == pytest.approx([start] * 4, rel=1e-6) and abs(taus[5] - start) > 0.01 and theta != 1.0
    assert (run(1.0)[2] - 1.0) * (theta - 1.0) > 0  # the same way


def test_a_resumed_run_learns_its_temperature_to_the_last_bit(tmp_path):
    def run(folder, resume=None):
        teacher, student, _ = parts(hidden_dropout_prob=0.1)
        torch.manual_seed(2)
        outputs = Outputs("jsd", temperature=1.0, reversal=Schedule(0.0, 1.0, "cosine"), temperature_rate=0.05)
        made = teacher, student, Objective(outputs=outputs, task=Task(weight=0.5))
        trainer = make(folder, made=made, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path / "straight")
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight/checkpoint-2"))
    name = "objective.projections.outputs_temperature.theta"
    assert weights(straight)[name].item() != 1.0
    for name, p in weights(straight).items():
        assert torch.equal(weights(resumed)[name], p), name
    assert resumed.state.log_history[2:-1] == straight.state.log_history[2:-1]
    straight.save_model(str(tmp_path / "exported"))
    assert sorted(p.name for p in (tmp_path / "exported").iterdir()) == ["config.json", "model.safetensors"]


def test_measured_gradients_are_at_the_learned_temperature():
    teacher, student, _ = parts()
    objective = Objective(outputs=Outputs(temperature=1.0, reversal=0.5, temperature_range=4.0))
    batch = {key: torch.stack([row[key] for row in data()[:4]]) for key in ("input_ids", "attention_mask")}
    found = term_gradients(objective, teacher, student, batch)
    plain = term_gradients(Objective(outputs=Outputs(temperature=found.temperature)), teacher, student, batch)
    assert found.temperature == pytest.approx(1 + 4 * torch.ones(()).sigmoid().item())
    torch.testing.assert_close(found.gram, plain.gram)
    with pytest.raises(ValueError, match="outputs learns its temperature, so that none can be set"):
        gradients_by_temperature(objective, teacher, student, batch, [1.0, 2.0])


def test_a_file_says_it_with_the_same_words():
    outputs = {
        "loss": "forward_kl",
        "temperature": 1.0,
        "reversal": {"from": 0.0, "to": 1.0, "kind": "cosine", "end": 20},
        "temperature_range": 20.0,
    }
    task = {"name": "glosses"}
    config = ExperimentConfig.from_dict({"task": task, "outputs": outputs, "training": {"steps": 40}})
    assert ExperimentConfig.from_dict(config.to_dict()) == config
    term = config.outputs.build(None)
    assert term.reversal == Schedule(0.0, 1.0, "cosine", end=20) and term.temperature_range == 20.0
    with pytest.raises(ValueError, match=r"outputs\.reversal: Schedule\(0\.0, 1\.0, 'linear'\): it starts at step 50"):
        ExperimentConfig.from_dict(
            {
                "task": task,
                "outputs": outputs | {"reversal": {"from": 0, "to": 1, "start": 50}},
                "training": {"steps": 40},
            }
        )


def test_what_cannot_be_learned_is_refused_before_any_work():
    with pytest.raises(ValueError, match="no temperature changes this loss"):
        Outputs("logit_mse", reversal=1.0)
    with pytest.raises(ValueError, match=r"Outputs\(temperature_range=3.0\): it is of a learned temperature"):
        Outputs(temperature_range=3.0)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="a finite number above 0"):
            Outputs(reversal=1.0, temperature_rate=wrong)
    with pytest.raises(ValueError, match="a finite number of at least 0, or a Schedule"):
        Outputs(reversal=-1.0)
    with pytest.raises(ValueError, match=r"outputs\.reversal: by the optimizer step"):
        learned(reversal=Schedule(0.0, 1.0, "cosine"))(*sides())
