"""Outputs beside a teacher with tokens of its own: the loss against a loop, heads, parts of a step, refusals."""

from dataclasses import replace

import pytest
import torch

from fakit import LayerMap, Objective, Outputs, Task, Trace
from fakit.losses import outputs
from fakit.losses.fused.output_head import Head
from fakit.losses.shared_tokens import over_shared
from fakit.training.token_counts import counts, shares

B, T, T_OTHER, V, V_OTHER = 3, 6, 8, 11, 9
SHARED = torch.tensor([[0, 3], [2, 2], [5, 0], [7, 8]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
LABELS = torch.tensor([[-100, -100, 3, 4, 5, 6], [-100, 1, 2, 3, -100, -100], [-100, -100, -100, 9, 1, -100]])
TEXT = torch.tensor([[-1, 3, -1, 4, 7, -1], [2, -1, 3, -1, -1, -1], [-1, -1, 0, 6, -1, -1]])
ORDER = torch.tensor([[-1, 3, 4, 5, -1, -1], [1, 2, 3, -1, -1, -1], [-1, -1, 5, 6, -1, -1]])
TERMS = [
    Outputs("uld", temperature=2.0),
    Outputs("uld", align="text", temperature=2.0),
    *(Outputs(name, align="text", temperature=2.0) for name in ("forward_kl", "reverse_kl", "jsd", "tvd")),
]


def traces(heads: bool, seed: int = 0) -> list[Trace]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length, width, vocabulary in ((T, 4, V), (T_OTHER, 5, V_OTHER)):
        head = Head(
            torch.randn(B, length, width, generator=generator, dtype=torch.float64).requires_grad_(),
            torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).requires_grad_(),
        )
        made.append(Trace(head=head, causal=True) if heads else Trace(logits=head.logits(), head=head, causal=True))
    ours, theirs = made
    if not heads:
        ours, theirs = replace(ours, head=None), replace(theirs, head=None)
    same = {"text": TEXT, "order": ORDER}
    return [
        replace(ours, mask=MASK),
        replace(theirs, mask=torch.ones(B, T_OTHER).bool(), same=same, shared_tokens=SHARED),
    ]


def by_hand(term: Outputs, ours: torch.Tensor, theirs: torch.Tensor, rows=range(B)) -> torch.Tensor:
    """A mean over the pairs of positions, one by one."""
    found = []
    for row in rows:
        for place in range(T - 1):
            at = int({"text": TEXT, None: ORDER}[term.align][row, place])
            if at >= 0 and LABELS[row, place + 1] != -100:
                one, other = ours[row, place][None], theirs[row, at][None]
                if term.loss != "uld":
                    one, other = over_shared(one, other, SHARED, 2.0)
                found.append(outputs.LOSSES[term.loss](one, other, temperature=2.0))
    return torch.stack(found).mean()


@pytest.mark.parametrize("term", TERMS, ids=lambda term: f"{term.loss}-{term.align}")
def test_the_loss_is_the_mean_over_the_pairs_and_so_is_its_gradient(term):
    for heads in (False, True):
        ours, theirs = traces(heads)
        whole = [trace.logits if trace.head is None else trace.head.logits() for trace in (ours, theirs)]
        wanted = by_hand(term, *whole)
        found = Objective(outputs=term)(ours, theirs, LABELS)
        assert found.terms["outputs"].item() == pytest.approx(wanted.item(), rel=1e-10)
        if heads:
            of = ours.head.hidden, ours.head.weight
            for one, other in zip(torch.autograd.grad(found.total, of), torch.autograd.grad(wanted, of), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("term", TERMS, ids=lambda term: f"{term.loss}-{term.align}")
def test_the_task_beside_it_is_as_alone(term):
    ours, theirs = traces(heads=True)
    both, alone = Objective(outputs=term, task=Task())(ours, theirs, LABELS), Objective(task=Task())(ours, None, LABELS)
    assert both.terms["task"].item() == pytest.approx(alone.terms["task"].item(), rel=1e-12)
    own = Objective(outputs=term)(ours, theirs, LABELS)
    parts = [torch.autograd.grad(one.total, ours.head.hidden)[0] for one in (own, alone)]
    torch.testing.assert_close(torch.autograd.grad(both.total, ours.head.hidden)[0], sum(parts))


@pytest.mark.parametrize("term", TERMS, ids=lambda term: f"{term.loss}-{term.align}")
def test_parts_of_a_step_weigh_by_their_pairs(term):
    ours, theirs = traces(heads=False)
    made = Objective(outputs=term)
    same = {f"same_{how}": x for how, x in theirs.same.items()}
    batch = {"input_ids": MASK.long(), "attention_mask": MASK.long(), "labels": LABELS}
    parts = [
        {k: x[one] for k, x in batch.items()} | {"teacher_batch": {k: x[one] for k, x in same.items()}}
        for one in (slice(0, 1), slice(1, 3))
    ]
    share = shares([counts(made, part, True, True) for part in parts], gather=lambda x: x)
    found = 0
    for one, own in zip((slice(0, 1), slice(1, 3)), share, strict=True):
        sides = (
            replace(ours, logits=ours.logits[one], mask=MASK[one]),
            replace(
                theirs,
                logits=theirs.logits[one],
                mask=theirs.mask[one],
                same={k: x[one] for k, x in theirs.same.items()},
            ),
        )
        found = found + made(*sides, LABELS[one], own).terms["outputs"] / 2
    assert found.item() == pytest.approx(by_hand(term, ours.logits, theirs.logits).item(), rel=1e-6)


@pytest.mark.parametrize("heads", [False, True], ids=["whole", "heads"])
@pytest.mark.parametrize("name", ["uld", "forward_kl", "jsd"])
def test_one_tokenizer_is_the_plain_loss(name, heads):
    ours, theirs = traces(heads)
    theirs = replace(ours, head=None if ours.head is None else replace(ours.head, weight=ours.head.weight.flip(0)))
    theirs = theirs if heads else replace(theirs, logits=ours.logits.flip(-1))
    itself = torch.arange(T).expand(B, T)
    beside = replace(
        theirs, same={"text": itself, "order": itself}, shared_tokens=torch.arange(V)[:, None].expand(V, 2)
    )
    plain = Objective(outputs=Outputs(name), task=Task())(ours, theirs, LABELS)
    found = Objective(outputs=Outputs(name, align="text"), task=Task())(ours, beside, LABELS)
    assert found.total.item() == pytest.approx(plain.total.item(), rel=1e-12)
    unaligned = Objective(outputs=Outputs(name, align="text"), task=Task())(ours, theirs, LABELS)
    assert unaligned.total.item() == pytest.approx(plain.total.item(), rel=1e-12)


def test_rows_in_which_nothing_corresponds_count_nothing():
    ours, theirs = traces(heads=True)
    nowhere = {how: torch.full_like(TEXT, -1) for how in ("text", "order")}
    found = Objective(outputs=Outputs(align="text"))(ours, replace(theirs, same=nowhere), LABELS)
    assert found.total.item() == 0
    assert torch.autograd.grad(found.total, ours.head.hidden)[0].abs().max() == 0


def test_what_compares_token_by_token_is_refused():
    ours, theirs = traces(heads=False)
    for term in (Outputs("forward_kl"), Outputs("dkd")):
        with pytest.raises(ValueError, match=r"tokens of its own, and Outputs\('.*'\) compares token by token"):
            Objective(outputs=term)(ours, theirs, LABELS)
    with pytest.raises(ValueError, match=r"are mapped to \(3, 5\) of the student's, which read \(3, 6\)"):
        Objective(outputs=Outputs("uld"))(ours, replace(theirs, same={"order": ORDER[:, :5]}), LABELS)
    with pytest.raises(ValueError, match="no shared_tokens"):
        Objective(outputs=Outputs(align="text"))(ours, replace(theirs, shared_tokens=None), LABELS)
    assert Objective(LayerMap([(1, 1)]), outputs=Outputs("uld")).terms["outputs"].same_tokens is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "forward_kl", "align": "order"}, r"stand for different text.*Outputs\('uld'\), or align='text'"),
        ({"loss": "akl", "align": "text"}, "akl is not defined; take uld, or forward_kl, "),
        ({"loss": "forward_kl", "align": "text", "vocab_size": 5}, "leave vocab_size out"),
        (
            {"loss": "forward_kl", "align": "text", "reversal": 1.0},
            "a learned temperature of forward_kl is not defined",
        ),
        ({"loss": "uld", "align": "words"}, "align='words'.* choose one of 'order', 'text', None"),
        ({"loss": lambda s, t, m, temperature: s.sum(), "align": "text"}, "<lambda> is not defined"),
    ],
)
def test_alignments_that_are_not_defined(settings, message):
    with pytest.raises(ValueError, match=message):
        Outputs(**settings)
