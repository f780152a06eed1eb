"""Several labels a text, regressions of many outputs, heads without logits: right, or refused before work."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMultipleChoice,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForQuestionAnswering,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fakit import (
    DistillationTrainer,
    Features,
    LayerMap,
    Objective,
    Outputs,
    Task,
    TeacherCache,
    capture,
    preflight,
    shrink,
)
from fakit.evaluation import evaluate
from fakit.losses.task import task_loss
from fakit.tracing.trace import Trace
from fakit.training.token_counts import counts
from tests.families import batch, tiny
from tests.training.runs import arguments, data, make

SIZES = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}


def electra(classes: int = 4, seed: int = 0, **settings) -> ElectraForSequenceClassification:
    torch.manual_seed(seed)
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ElectraConfig(**SIZES, embedding_size=16, num_labels=classes, **settings)
    model = ElectraForSequenceClassification(config).eval()
    with torch.no_grad():
        model.classifier.out_proj.weight.mul_(50)  # answers that differ from text to text
    return model


def several(rows: int = 4, classes: int = 4) -> torch.Tensor:
    return (torch.rand(rows, classes, generator=torch.Generator().manual_seed(3)) > 0.5).float()


def bernoulli_kl(p, q):
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def by_hand(name: str, student: torch.Tensor, teacher: torch.Tensor, tau: float) -> float:
    q, p = (torch.sigmoid(z.double() / tau) for z in (student, teacher))
    m = (p + q) / 2
    values = {
        "forward_kl": bernoulli_kl(p, q),
        "reverse_kl": bernoulli_kl(q, p),
        "jsd": (bernoulli_kl(p, m) + bernoulli_kl(q, m)) / 2,
    }[name]
    return (tau**2 * values.mean()).item()


@pytest.mark.parametrize("stated", ["multi_label_classification", None])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_several_labels_are_compared_label_by_label(name, stated):
    teacher, student = electra(problem_type=stated), electra(seed=1, problem_type=stated)
    rows, labels = batch(4), several()
    objective = Objective(None, outputs=Outputs(name, temperature=3.0), task=Task())
    with torch.no_grad():
        found = objective(capture(student, rows), capture(teacher, rows), labels)
        ours, theirs = student(**rows).logits, teacher(**rows).logits
        own = student(**rows, labels=labels).loss
    assert found.terms["outputs"].item() == pytest.approx(by_hand(name, ours, theirs, 3.0), rel=1e-5)
    assert found.terms["task"].item() == pytest.approx(own.item(), rel=1e-6)


def test_forward_kl_of_several_labels_is_their_cross_entropy_minus_the_teachers_entropy():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, 3, generator=generator) for _ in range(2))
    p = torch.sigmoid(teacher)
    expected = F.binary_cross_entropy_with_logits(student, p) - F.binary_cross_entropy_with_logits(teacher, p)
    traces = [Trace(logits=z, problem_type="multi_label_classification") for z in (student, teacher)]
    found = Objective(None, outputs=Outputs(temperature=1.0))(*traces)
    assert found.terms["outputs"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_all_labels_against_none_is_far_though_a_softmax_sees_no_difference():
    teacher, student = electra(classes=3, problem_type="multi_label_classification"), electra(classes=3, seed=1)
    with torch.no_grad():
        for model, bias in ((teacher, 4.0), (student, -4.0)):
            model.classifier.out_proj.weight.zero_()
            model.classifier.out_proj.bias.fill_(bias)
        found = Objective(None, outputs=Outputs(temperature=1.0))(
            capture(student, batch(2)), capture(teacher, batch(2))
        )
    assert found.terms["outputs"].item() == pytest.approx(3.8561, abs=1e-3)  # (2σ(4) - 1) · 4


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_with_several_labels(cached, tmp_path):
    teacher = electra(problem_type="multi_label_classification")
    student = shrink(teacher, 1)
    rows = [row | {"labels": labels} for row, labels in zip(data(rows=8), several(8), strict=True)]
    objective = Objective(LayerMap([(1, 2)]), Features(), outputs=Outputs(), task=Task())
    cache = TeacherCache.build(tmp_path / "cache", teacher, rows, objective, dtype="float32") if cached else None
    trainer = DistillationTrainer(
        teacher,
        student,
        objective,
        arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2),
        teacher_cache=cache,
        train_dataset=rows,
        eval_dataset=rows,
    )
    with torch.no_grad():
        given = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
        q = student.eval()(**given)
        p = teacher(**{k: v for k, v in given.items() if k != "labels"}).logits
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["task"] == pytest.approx(q.loss.item(), rel=1e-4)
    assert first["outputs"] == pytest.approx(by_hand("forward_kl", q.logits, p, 2.0), rel=1e-4)
    with torch.no_grad():
        own = student.eval()(**given).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own, rel=1e-5)


def test_what_several_labels_need_is_refused_where_it_lacks(tmp_path):
    teacher = electra(problem_type="multi_label_classification")
    student = electra(problem_type="single_label_classification")
    objective = Objective(None, outputs=Outputs())
    with pytest.raises(
        ValueError, match=r"problem type: teacher has multi_label_classification, student has single_label"
    ):
        DistillationTrainer(teacher, student, objective, arguments(tmp_path))
    with pytest.raises(
        ValueError, match="the student's problem_type is single_label_classification, the teacher's multi"
    ):
        objective(capture(student, batch(2)), capture(teacher, batch(2)))
    with pytest.raises(ValueError, match=r"top_k=2 of Electra.*multi_label.*Keep all"):
        TeacherCache.build(tmp_path / "cache", teacher, data(rows=4), hidden_states=[], attentions=[], top_k=2)
    task = SimpleNamespace(kind="sequence-classification", label_names=None)
    with pytest.raises(ValueError, match="the model's problem_type is 'multi_label_classification'"):
        evaluate(teacher, data(rows=4), None, task)


def test_labels_of_several_a_text():
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1.0, -100.0, 0.0], [0.5, 1.0, float("nan")]])
    kept = torch.tensor([[True, False, True], [True, True, False]])
    expected = F.binary_cross_entropy_with_logits(logits[kept], labels[kept]).item()
    assert task_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    whole = torch.tensor([[1, 0, 1], [0, 0, 1]])
    expected = F.binary_cross_entropy_with_logits(logits, whole.float()).item()
    assert task_loss(logits, whole, problem_type="multi_label_classification").item() == pytest.approx(
        expected, rel=1e-6
    )
    with pytest.raises(ValueError, match=r"0 to 1.*found \[2.0\] at 1 of 6"):
        task_loss(logits, whole.float().index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(2.0)))
    with pytest.raises(ValueError, match=r"labels \(2,\) do not fit logits \(2, 3\) of multi_label"):
        task_loss(logits, torch.tensor([0, 1]), problem_type="multi_label_classification")


def test_one_output_may_be_one_of_several_labels():
    logits, labels = torch.tensor([[0.3], [-2.0]]), torch.tensor([1.0, 0.0])
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], labels).item()
    assert task_loss(logits, labels, problem_type="multi_label_classification").item() == pytest.approx(expected)


@pytest.mark.parametrize("labels", [torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0])])
def test_floats_for_classes_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels are float32 \(2,\), and the head has 2 classes, which are integers"):
        task_loss(torch.zeros(2, 2), labels)


def test_a_regression_of_many_outputs_is_the_models_own():
    torch.manual_seed(0)
    config = RobertaConfig(**SIZES, max_position_embeddings=40, num_labels=3, problem_type="regression")
    teacher = RobertaForSequenceClassification(config).eval()
    rows, labels = batch(4), torch.randn(4, 3)
    with torch.no_grad():
        own = teacher(**rows, labels=labels).loss.item()
        trace = capture(teacher, rows)
        found = Objective(None, outputs=Outputs("logit_mse"), task=Task())(trace, trace, labels)
    assert found.terms["task"].item() == pytest.approx(own, rel=1e-6) and found.terms["outputs"].item() == 0
    with pytest.raises(ValueError, match="3 outputs of a regression"):
        Objective(None, outputs=Outputs("reverse_kl"))(trace, trace)


@pytest.mark.parametrize("classes", [1, 3])
def test_divergences_of_a_regression_are_refused_before_work(classes, tmp_path):
    teacher = electra(classes, problem_type="regression")
    with pytest.raises(ValueError, match=r"over a single output|3 outputs of a regression"):
        DistillationTrainer(teacher, shrink(teacher, 1), Objective(None, outputs=Outputs()), arguments(tmp_path))
    DistillationTrainer(teacher, shrink(teacher, 1), Objective(None, outputs=Outputs("logit_mse")), arguments(tmp_path))


# -- heads without logits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [BertForQuestionAnswering, BertForPreTraining, BertModel, LlamaForQuestionAnswering])
@pytest.mark.parametrize("terms", [{"outputs": Outputs()}, {"task": Task()}, {"outputs": Outputs(), "task": Task()}])
def test_heads_without_logits_are_refused_before_work(family, terms, tmp_path):
    config = LlamaConfig(**SIZES) if "Llama" in family.__name__ else tiny("bert").config
    models = [family(config).eval() for _ in range(2)]
    with pytest.raises(
        ValueError, match=rf"{' and '.join(terms)} term.* logits, and the student, {family.__name__}, returns"
    ):
        DistillationTrainer(*models, Objective(LayerMap([(1, 1)]), Features(), **terms), arguments(tmp_path))
    DistillationTrainer(*models, Objective(LayerMap([(1, 1)]), Features()), arguments(tmp_path))


def multiple_choice(kind):
    torch.manual_seed(0)
    if kind is AlbertForMultipleChoice:
        return kind(AlbertConfig(**SIZES, embedding_size=16, max_position_embeddings=40)).eval()
    return kind(DistilBertConfig(vocab_size=60, dim=16, n_heads=2, hidden_dim=24, n_layers=3)).eval()


@pytest.mark.parametrize("kind", [AlbertForMultipleChoice, DistilBertForMultipleChoice])
def test_multiple_choice_is_a_softmax_over_the_choices(kind, tmp_path):
    teacher, student = multiple_choice(kind), multiple_choice(kind)
    with torch.no_grad():
        student.classifier.weight.normal_()
        teacher.classifier.weight.normal_()
    flat = batch(8)
    rows = {name: x.view(2, 4, -1) for name, x in flat.items()}
    labels = torch.tensor([3, 1])
    objective = Objective(LayerMap([(1, 2)]), Features("mse"), outputs=Outputs(temperature=1.0), task=Task())
    with torch.no_grad():
        ours, theirs = capture(student, rows, [1]), capture(teacher, rows, [2])
        found = objective(ours, theirs, labels)
        q, p = student(**rows).logits, teacher(**rows).logits
        own = student(**rows, labels=labels).loss.item()
    assert found.terms["task"].item() == pytest.approx(own, rel=1e-6)
    expected = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean").item()
    assert found.terms["outputs"].item() == pytest.approx(expected, rel=1e-4)
    mask = flat["attention_mask"].bool()
    difference = (ours.hidden_states[1] - theirs.hidden_states[2])[mask].square().mean().item()
    assert found.terms["features"].item() == pytest.approx(difference, rel=1e-5)
    assert counts(objective, rows | {"labels": labels}, False, False)["features"] == mask.sum()
    data_rows = [{name: x[i % 2] for name, x in rows.items()} | {"labels": labels[i % 2]} for i in range(8)]
    make(tmp_path, made=(teacher, student, objective), train=data_rows, max_steps=2).train()


def test_next_sentences_and_token_classes_are_their_models_own():
    config = tiny("bert").config
    torch.manual_seed(0)
    rows = batch(4)
    pairs = BertForNextSentencePrediction(config).eval()
    tokens = BertForTokenClassification(config).eval()
    classes = rows["input_ids"].remainder(2).masked_fill(rows["attention_mask"] == 0, -100)
    objective = Objective(None, outputs=Outputs(), task=Task())
    for model, labels in ((pairs, torch.tensor([0, 1, 1, 0])), (tokens, classes)):
        with torch.no_grad():
            trace = capture(model, rows)
            found = objective(trace, trace, labels)
            own = model(**rows, labels=labels).loss.item()
        assert found.terms["task"].item() == pytest.approx(own, rel=1e-6)
    # a mean over tokens weighs the parts of a step by their tokens
    assert counts(objective, rows | {"labels": classes}, False, False)["outputs"] == rows["attention_mask"].sum()


def test_logits_that_are_no_tensor_are_said():
    class Two(BertForNextSentencePrediction):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = (found.logits, found.logits)
            return found

    with pytest.raises(ValueError, match="Two returned its logits as a tuple"):
        capture(Two(tiny("bert").config).eval(), batch(2))


def test_the_report_says_the_problem_type():
    teacher = electra(problem_type="multi_label_classification")
    row = preflight(teacher, electra())["problem type"]
    assert (row.status, row.teacher, row.student) == ("ok", "multi_label_classification", "not stated")
    assert re.search("problem type", str(preflight(teacher, teacher)))
