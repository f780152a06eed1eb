"""A NaN is said to be whose it is: the teacher's or the student's, by term and layer, live,
cached and before training.
"""

import copy

import pytest
import torch

from fakit import Attention, DistillationTrainer, Features, LayerMap, Objective, Outputs, Task, TeacherCache, capture
from tests.families import batch, tiny
from tests.training.runs import arguments, data, make, parts

TERMS = {
    "features": (
        Features(),
        r"the features term is nan at S1←T2: the teacher's \(GPT2LMHeadModel\) hidden states of layer 2 are not finite",
    ),
    "attention": (
        Attention(),
        r"the attention term is nan at S1←T2: the teacher's .* attention inputs of layer 2 are not finite",
    ),
    "outputs": (Outputs(), r"the outputs term is nan: the teacher's .* logits are not finite"),
}


def broken(family: str = "gpt2", value: float = float("nan")):
    """A model that gives `value` from an early block on."""
    model = tiny(family)
    with torch.no_grad():
        if family == "gpt2":
            model.transformer.h[0].attn.c_attn.bias[0] = value
        else:
            model.bert.encoder.layer[1].attention.self.query.bias[0] = value
    return model


@pytest.mark.parametrize("logits", [True, "head"])
@pytest.mark.parametrize("name", TERMS)
def test_a_teachers_nan_is_the_teachers(name, logits):
    term, message = TERMS[name]
    objective = Objective(LayerMap([(1, 2)]), **{name: term})
    with torch.no_grad():
        theirs, ours = (capture(model, batch(2), [1, 2], [1, 2], logits) for model in (broken(), tiny("gpt2")))
        with pytest.raises(ValueError, match=message):
            objective(ours, theirs)
        with pytest.raises(ValueError, match=rf"the {name} term is nan.*If the student's.*Found: the student's \(GPT2"):
            objective(theirs, ours)


def test_nan_in_padding_is_nobodys():
    objective = Objective(LayerMap([(1, 2)]), features=Features())
    rows = batch(2)
    with torch.no_grad():
        theirs, ours = (capture(model, rows, [1, 2]) for model in (tiny("bert"), tiny("bert", seed=1)))
        assert not rows["attention_mask"].all()
        theirs.hidden_states[2][rows["attention_mask"] == 0] = float("nan")
        assert objective(ours, theirs).total.isfinite()
        ours.hidden_states[1][0, 0] = float("inf")
        with pytest.raises(ValueError, match=r"Found: the student's .* hidden states of layer 1 are not finite"):
            objective(ours, theirs)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_weights_that_are_nan_are_refused_before_training(side, tmp_path):
    teacher, student, objective = parts()
    made = {"teacher": teacher, "student": student}
    with torch.no_grad():
        made[side].classifier.weight[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=rf"the {side} \(Bert\w+\) holds NaN in 1 of its parameters.*classifier.weight"
    ):
        make(tmp_path, made=(teacher, student, objective)).train()


def test_an_accelerator_that_looks_when_it_logs_asks_the_teacher_once_more(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    with torch.no_grad():
        trainer.teacher.bert.encoder.layer[2].output.dense.bias[0] = float("nan")
    breakdown = trainer.distiller.breakdown
    breakdown.total = breakdown.terms["features"] = torch.tensor(float("nan"))
    breakdown.per_layer["features"] = {(2, 3): torch.tensor(float("nan"))}
    trainer.logged.sums = {"features": (torch.tensor(1.0), 1)}
    with pytest.raises(
        ValueError, match=r"features term is nan at S2←T3: the teacher's \(Bert\w+\) hidden states of layer 3"
    ):
        trainer.log({"loss": 1.0})


def test_a_cache_of_a_broken_teacher_is_refused_by_layer(tmp_path):
    teacher = broken("bert", value=float("inf"))
    with pytest.raises(
        ValueError, match=r"BertForSequenceClassification, hidden states of layer 2: the teacher gives numbers up to"
    ):
        TeacherCache.build(tmp_path, teacher, data(rows=4), hidden_states=[1, 2, 3], attentions=[])


def test_a_students_loss_that_explodes_is_the_students(tmp_path):
    teacher, student, _ = parts("bert", None)
    broken_later = copy.deepcopy(student)
    objective = Objective(LayerMap([(2, 3)]), Features(), task=Task())
    trainer = DistillationTrainer(
        teacher, broken_later, objective, arguments(tmp_path, max_steps=2), train_dataset=data()
    )
    with torch.no_grad():
        broken_later.bert.encoder.layer[1].output.dense.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"the features term is .* at S2←T3\. If .*Found: the student's"):
        trainer.train()
