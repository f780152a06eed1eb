"""Output terms in an objective: whole and in chunks, labels that a loss looks at, two vocabularies, YAML."""

import pytest
import torch
import transformers as hf

from fakit import Objective, Outputs, Task, Trace, capture, shrink
from fakit.experiments import ExperimentConfig
from fakit.experiments.build import build_objective
from fakit.losses import outputs
from fakit.losses.fused.output_head import Head
from fakit.losses.logits import asked_of
from fakit.tracing import head_finder
from fakit.training.fit import check_fit
from fakit.training.token_counts import counts, shares
from tests.families import batch, tiny
from tests.scale.ranks import uneven

SETTINGS = [
    ("skew_forward_kl", {"alpha": 0.2}),
    ("skew_reverse_kl", {}),
    ("tvd", {}),
    ("akl", {"head": 0.7}),
    ("taid", {"t": 0.6}),
    ("dkd", {"alpha": 0.5, "beta": 2.0}),
    ("uld", {}),
    ("neg_log_acceptance", {}),
    ("lk_hybrid", {"eta": 2.0}),
    ("rlkd", {"k": 4, "divergence": "forward_kl", "dynamic": True}),
]


def test_every_named_loss_is_among_the_settings():
    known = {"forward_kl", "reverse_kl", "jsd", "logit_mse"}
    assert known | {name for name, _ in SETTINGS} == set(outputs.LOSSES) == set(outputs.PER_POSITION)


def model(family: str):
    return hf.BertForMaskedLM._from_config(tiny("bert").config).eval() if family == "bert" else tiny(family)


def inputs(family: str) -> dict:
    made = batch()
    return made | {"decoder_input_ids": made["input_ids"].flip(0)} if family == "t5" else made


def labels_of(family: str) -> torch.Tensor:
    labels = inputs(family)["input_ids"].clone()
    labels[0, 2:4] = -100
    return labels


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize(("loss", "parameters"), SETTINGS, ids=lambda x: x if isinstance(x, str) else "")
def test_the_same_in_chunks_and_whole_beside_the_task(family, loss, parameters, monkeypatch):
    monkeypatch.setattr(head_finder, "LARGE_VOCABULARY", 10)
    teacher = model(family)
    student, found = shrink(teacher, layers=2, init="random").eval(), []
    made = Objective(outputs=Outputs(loss, weight=0.7, **parameters), task=Task(weight=0.2))
    for asked in ("head", True):
        ours, theirs = (capture(net, inputs(family), logits=asked) for net in (student, teacher))
        assert (ours.head is not None) == (asked == "head")
        breakdown = made(ours, theirs, labels_of(family))
        gradients = torch.autograd.grad(breakdown.total, list(student.parameters()), allow_unused=True)
        found.append([breakdown.total, *breakdown.terms.values(), *(g for g in gradients if g is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_a_loss_that_looks_at_labels_is_off_without_them_and_has_them_shifted():
    made = Objective(outputs=Outputs("dkd", temperature=1.5), task=Task())
    assert made.outputs.needs_labels and not Outputs("forward_kl").needs_labels
    assert not made.needs("student", labels=False) and made.needs("student", labels=True)
    ours, theirs = (capture(tiny("gpt2", seed=seed), inputs("gpt2")) for seed in (0, 1))
    labels = labels_of("gpt2")
    found = made(ours, theirs, labels).terms["outputs"]
    counted = (ours.mask[:, 1:] & ours.mask[:, :-1]) & (ours.own_labels(labels)[:, 1:] != -100)
    rows = (z.logits[:, :-1][counted] for z in (ours, theirs))
    expected = outputs.dkd(*rows, None, 1.5, labels=labels[:, 1:][counted])
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="nothing to compute"):
        made(ours, theirs)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_parts_of_a_step_make_the_whole_by_the_labels_that_count(family):
    rows = uneven(causal=family == "gpt2", rows=8)
    made = Objective(outputs=Outputs("dkd"))

    def loss(part, share=None):
        batch = {name: torch.stack([row[name] for row in part]) for name in part[0]}
        ours, theirs = (capture(tiny(family, seed=seed).double(), batch) for seed in (1, 0))
        return batch, made(ours, theirs, batch["labels"], share)

    _, whole = loss(rows)
    pieces = [rows[:3], rows[3:6], rows[6:]]
    causal = family == "gpt2"
    found = shares([counts(made, loss(p)[0], causal, causal) for p in pieces], gather=lambda x: x)
    together = sum(loss(p, s)[1].terms["outputs"] for p, s in zip(pieces, found, strict=True)) / 3
    torch.testing.assert_close(together, whole.terms["outputs"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("over_heads", [False, True], ids=["whole", "in chunks"])
@pytest.mark.parametrize("causal", [False, True])
def test_two_tokenizers_are_aligned_by_the_order_of_their_predicting_positions(over_heads, causal):
    generator = torch.Generator().manual_seed(0)
    masks = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool(), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool()
    traces, whole = [], []
    for mask, width, vocabulary in zip(masks, (3, 4), (7, 11), strict=True):
        head = Head(
            torch.randn(*mask.shape, width, generator=generator, dtype=torch.float64),
            torch.randn(vocabulary, width, generator=generator, dtype=torch.float64),
        )
        whole.append(head.logits())
        made = {"head": head} if over_heads else {"logits": head.logits()}
        traces.append(Trace(mask=mask, causal=causal, **made))
    positions = []
    for mask in masks:  # of each row, those that predict
        predicts = mask if not causal else torch.cat([mask[:, :-1] & mask[:, 1:], mask[:, :1] & False], 1)
        positions.append([row.nonzero().flatten().tolist() for row in predicts])
    pairs = [(b, s, t) for b in range(2) for s, t in zip(positions[0][b], positions[1][b], strict=False)]
    rows = torch.stack([whole[0][b, s] for b, s, _ in pairs]), torch.stack([whole[1][b, t] for b, _, t in pairs])
    found = Objective(outputs=Outputs("uld", temperature=2.0))(*traces).terms["outputs"]
    assert found.item() == pytest.approx(outputs.uld(*rows, None, 2.0).item(), rel=1e-12)
    refused = (
        r"vocabulary sizes differ: .* 7 entries, .* 11.*Outputs\('uld'\)|saw \(2, 5\) tokens, the teacher \(2, 4\)"
    )
    with pytest.raises(ValueError, match=refused):
        Objective(outputs=Outputs("tvd"))(*traces)


def test_a_ranking_beside_a_divergence_is_two_terms_or_one():
    ours, theirs = (capture(tiny("gpt2", seed=seed), inputs("gpt2")) for seed in (0, 1))
    two = Objective(outputs=Outputs("forward_kl"), terms={"ranking": Outputs("rlkd", k=5, weight=2.0)})
    one = Objective(outputs=Outputs("rlkd", k=5, divergence="forward_kl"))
    assert one(ours, theirs).total.item() == pytest.approx(two(ours, theirs).total.item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["dkd", "uld", "rlkd"])
def test_several_labels_a_text_are_refused_where_one_class_of_many_is_meant(loss):
    traces = [Trace(logits=torch.randn(2, 4), problem_type="multi_label_classification") for _ in range(2)]
    labels = torch.ones(2, 4)
    with pytest.raises(ValueError, match=rf"{loss} looks at which of many classes is meant.*Outputs\('forward_kl'\)"):
        Objective(outputs=Outputs(loss))(*traces, labels)


def test_a_cut_makes_no_sense_of_sorted_probabilities():
    with pytest.raises(ValueError, match=r"Outputs\('uld', vocab_size=9\).*leave vocab_size out"):
        Outputs("uld", vocab_size=9)


@pytest.mark.parametrize(("loss", "parameters"), SETTINGS, ids=lambda x: x if isinstance(x, str) else "")
def test_all_of_it_in_a_file(loss, parameters, tmp_path):
    keys = "".join(f", {key}: {str(value).lower()}" for key, value in parameters.items())
    (tmp_path / "run.yaml").write_text(f"outputs: {{loss: {loss}{keys}}}")
    config = ExperimentConfig.from_yaml(tmp_path / "run.yaml")
    teacher = tiny("bert")
    term = build_objective(config, shrink(teacher, 2), teacher).outputs
    assert (term.loss, term.parameters) == (loss, parameters)
    assert ExperimentConfig.from_dict(config.to_dict()) == config
    assert term.needs_labels == ("labels" in asked_of(outputs.PER_POSITION[loss]))


def test_heads_of_two_sizes_are_fit_for_sorted_probabilities_alone():
    teacher, student = tiny("gpt2"), tiny("gpt2", seed=1, vocab_size=70)
    assert teacher.config.vocab_size != 70
    check_fit(teacher, student, Objective(outputs=Outputs("uld")))
    with pytest.raises(ValueError, match="vocabular"):
        check_fit(teacher, student, Objective(outputs=Outputs("tvd")))
