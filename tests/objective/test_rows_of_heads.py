"""Beside a teacher whose logits are there already, the student's are made at the compared positions alone."""

from dataclasses import replace

import pytest
import torch

from fakit import Objective, Outputs, Task, Trace
from fakit.losses.fused.output_head import Head
from fakit.losses.top_k import TopK

B, T, V = 3, 7, 40
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]).bool()
LABELS = torch.full((B, T), -100).masked_scatter(
    torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0]]).bool(),
    torch.tensor([3, 9, 1, 0, 7]),
)


def head(bias: bool = True, finish=None, padding: float = torch.nan) -> Head:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, 5), (V, 5), (V,))
    hidden, weight, own = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    hidden = hidden.masked_fill(~MASK[..., None], padding)  # what stands there must not be looked at
    return Head(hidden.requires_grad_(), weight.requires_grad_(), own.requires_grad_() if bias else None, finish)


def teacher(kind: str, causal: bool) -> Trace:
    logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    given = {"logits": logits}
    if kind == "top k":
        values, indices = logits.log_softmax(-1).topk(6)
        rest = {t: (logits.log_softmax(-1) / t).scatter(-1, indices, -torch.inf).logsumexp(-1) for t in (1.0, 2.0)}
        given = {"top_k": TopK(values, indices, rest, V)}
    return Trace(**given, mask=MASK, causal=causal)


def both(objective: Objective, kind: str, causal: bool, **of_head):
    """Total and gradients with the head in place of logits, and with logits in full."""
    found = []
    for whole in (False, True):
        ours = head(**of_head, padding=0.0 if whole else torch.nan)
        of = [x for x in (ours.hidden, ours.weight, ours.bias) if x is not None]
        own = {"logits": ours.logits()} if whole else {"head": ours}
        breakdown = objective(Trace(**own, mask=MASK, causal=causal), teacher(kind, causal), LABELS)
        found.append((breakdown, torch.autograd.grad(breakdown.total, of)))
    return found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["top k", "all"])
@pytest.mark.parametrize("task", [None, Task(weight=0.5)], ids=["alone", "task"])
def test_loss_and_gradient_are_those_of_all_logits(kind, causal, task):
    finish = None if task is None else lambda z: 5 * (z / 5).tanh()
    objective = Objective(outputs=Outputs("forward_kl", temperature=2.0), task=task)
    rows, whole = both(objective, kind, causal, finish=finish)
    assert rows[0].total.item() == pytest.approx(whole[0].total.item(), rel=1e-10)
    for name, value in whole[0].terms.items():
        assert rows[0].terms[name].item() == pytest.approx(value.item(), rel=1e-10)
    for one, other in zip(rows[1], whole[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "akl", "dkd", "rlkd", "logit_mse"])
def test_every_loss_takes_rows(name):
    rows, whole = both(Objective(outputs=Outputs(name, temperature=2.0)), "all", True, bias=False)
    assert rows[0].total.item() == pytest.approx(whole[0].total.item(), rel=1e-9)
    for one, other in zip(rows[1], whole[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)


def test_logits_are_made_at_labels_alone_unless_another_term_wants_them(monkeypatch):
    made, logits = [], Head.logits
    monkeypatch.setattr(Head, "logits", lambda self: made.append(self.hidden.shape[:-1].numel()) or logits(self))
    ours = Trace(head=head(), mask=MASK, causal=True)
    labeled = int((LABELS[:, 1:] != -100).sum())
    Objective(outputs=Outputs(temperature=1.0), task=Task())(ours, teacher("top k", True), LABELS)
    assert made == [labeled] and labeled == 5
    two = Objective(outputs=Outputs(temperature=1.0), terms={"own": Outputs(own_loss, temperature=1.0)})
    two(replace(ours, head=head()), teacher("all", True), LABELS)
    assert made[1:] == [B * T, labeled]


def own_loss(student, teacher, mask, temperature):
    return (student - teacher)[mask].square().mean()


def test_positions_whose_logits_are_not_known_are_refused():
    ours, theirs = Trace(head=head(), mask=MASK, causal=True), teacher("all", True)
    theirs = replace(theirs, logits_known=torch.zeros(B, T).bool())
    with pytest.raises(ValueError, match=r"known at 0 tokens .* 5 others are compared"):
        Objective(outputs=Outputs())(ours, theirs, LABELS)
