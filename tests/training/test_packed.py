"""Packed rows in training: every term and its gradient are those of rows of their own, to 1e-5; models and terms that
would mix documents are refused before the first step, with what was found on both sides.
"""

import pytest
import torch
import transformers as hf
from datasets import Dataset
from transformers import DataCollatorWithFlattening

from fakit import (
    Attention,
    DistillationTrainer,
    Features,
    LayerMap,
    Objective,
    Outputs,
    Task,
    TeacherCache,
    capture,
    shrink,
)
from fakit.objective.feature_terms import Dynamics, EarthMover, Flow, LayerAttention, Pooled
from fakit.objective.units import Units
from fakit.tasks.packing import pack
from fakit.tasks.task import Collator
from fakit.training.packed import check_packed
from fakit.training.token_counts import counts
from tests.families import LAYERS, SIZES, VOCAB, tiny
from tests.training.runs import arguments

COLLATOR = Collator(pad_token_id=0, padding_side="right", per_token=True)
LEFT = Collator(pad_token_id=0, padding_side="left", per_token=True)
MAP = LayerMap.uniform(2, LAYERS)


def rows() -> Dataset:
    """Rows of 3 to 13 tokens; the first third has no labels, as a prompt has none; the last row has none at all."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in (6, 9, 3, 4, 13, 5, 3, 8):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        labels = [-100] * (length // 3) + ids[length // 3 :]
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    made[3]["labels"] = made[3]["input_ids"]  # nothing predicts its first
    made[-1]["labels"] = [-100] * 8
    return Dataset.from_list(made)


def packed(length: int = 16) -> Dataset:
    return pack(rows(), length)


def objective(**changes) -> Objective:
    terms = {
        "features": Features("mse"),
        "attention": Attention("kl"),
        "outputs": Outputs("forward_kl"),
        "task": Task(),
    }
    return Objective(MAP, **(terms | changes)).prepare(32, 32)


def found(teacher, student, loss: Objective, batch) -> tuple[dict, dict, dict]:
    """Every term, every gradient, and what each term counts."""
    needs = {side: loss.needs(side).asked() for side in ("teacher", "student")}
    with torch.no_grad():
        theirs = capture(teacher, batch, **needs["teacher"])
    student.zero_grad()
    breakdown = loss(capture(student, batch, **needs["student"]), theirs, batch["labels"])
    breakdown.total.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return breakdown.terms, gradients, counts(loss, batch, causal=True, token_logits=True)


def same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("collator", [COLLATOR, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_packed_is_one_by_one(family, implementation, collator):
    teacher = tiny(family, implementation)
    student = shrink(teacher, 2, init="random").eval()
    both = [found(teacher, student, objective(), collator(list(data))) for data in (packed(), rows())]
    for ours, theirs in zip(*both, strict=True):
        same(ours, theirs)
    assert len(both[0][0]) == 4 and len(packed()) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": Attention("mse")},
        {"attention": Attention("score_mse")},
        {"attention": Attention("relations")},
        {"attention": Attention("minilm")},
        {"attention": Attention("kl", heads="best-match")},
        {"features": Features("cosine", tokens="labeled"), "attention": Attention("mse", tokens="labeled")},
        {"attention": Attention("kl", tokens="labeled")},
        {"outputs": Outputs("jsd", beta=0.3)},
        {"outputs": Outputs("rlkd")},
        {"terms": {"dynamics": Dynamics(), "mixed": LayerAttention(layer_map=LayerMap([(1, 1), (1, 2), (2, 3)]))}},
    ],
    ids=lambda changes: " ".join(f"{name} {term}" for name, term in changes.items())[:60],
)
def test_packed_is_one_by_one_for_other_terms(changes):
    teacher = tiny("llama")
    student = shrink(teacher, 2, init="random").eval()
    both = [found(teacher, student, objective(**changes), COLLATOR(list(data))) for data in (packed(), rows())]
    for ours, theirs in zip(*both, strict=True):
        same(ours, theirs)


def trainer(folder, teacher, student, loss, data, cache=None, collator=COLLATOR, **changes) -> DistillationTrainer:
    changes = {"optim": "sgd", "learning_rate": 0.1} | changes
    return DistillationTrainer(
        teacher,
        student,
        loss,
        arguments(folder, **changes),
        train_dataset=data,
        data_collator=collator,
        teacher_cache=cache,
    )


@pytest.mark.parametrize("cached", ["live", "cached", "the cache alone"])
def test_a_step_over_packed_rows_is_the_step_over_the_rows(tmp_path, cached):
    teacher, students = tiny("mistral"), []
    for name, data, batch_size in (("packed", packed(), 2), ("rows", rows(), 8)):
        student, loss = shrink(teacher, 2, init="copy"), objective()
        cache = None
        if cached != "live":
            cache = TeacherCache.build(tmp_path / f"{name} cache", teacher, data, loss, dtype="float32")
        accumulated = {
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": 8 // batch_size // 2 or 1,
        }
        own = None if cached == "the cache alone" else teacher
        trainer(tmp_path / name, own, student, loss, data, cache, **accumulated).train()
        students.append(dict(student.named_parameters()))
    start = dict(shrink(teacher, 2, init="copy").named_parameters())
    assert any((students[0][name] - x).abs().max() > 1e-3 for name, x in start.items())
    same(*students)


def mamba():
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2)).eval()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny("bloom"), "its forward pass takes no position_ids"),
        (mamba, "its forward pass takes no position_ids"),
        (
            lambda: tiny("opt"),
            r"a later document sees what an earlier one says .*: what it says changes by [\d.]+, where rounding explains "
            r"[\d.e-]+\. Give each document a row of its own, padded \(DataCollatorWithPadding, or packing: false\)",
        ),
    ],
)
def test_models_that_mix_documents_are_refused_before_the_first_step(tmp_path, make, reason):
    teacher = make()
    loss = Objective(outputs=Outputs(), task=Task())
    with pytest.raises(ValueError, match=f"packs several documents into a row, .* cannot keep them apart: {reason}"):
        trainer(tmp_path, teacher, shrink(teacher, 1), loss, packed())
    trainer(tmp_path, teacher, shrink(teacher, 1), loss, rows())


def test_chunks_of_attention_that_begin_inside_of_a_document_are_refused(tmp_path):
    config = hf.Llama4TextConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        attention_chunk_size=12,
        num_local_experts=2,
        intermediate_size_mlp=48,
    )
    teacher = hf.Llama4ForCausalLM(config).eval()
    loss = Objective(outputs=Outputs(), task=Task())
    with pytest.raises(
        ValueError, match=r"packed to 16 tokens, and the student \(Llama4ForCausalLM\) attends in chunks of 12"
    ):
        trainer(tmp_path, teacher, shrink(teacher, 2), loss, pack(rows(), 16))
    trainer(tmp_path, teacher, shrink(teacher, 2), loss, pack(rows().select(range(4)), 12))


NUMBERS = r"over 2 documents it is [\d.e-]+ packed, and [\d.e-]+ where each has a row of its own\. Leave packing out"


@pytest.mark.parametrize(
    "term",
    [
        Pooled("mse"),
        Flow(),
        Features("rkd_distance"),
        Attention(lambda ours, theirs, mask: (ours - theirs).square().sum((1, 2, 3)).mean()),
    ],
    ids=["pooled", "flow", "relations", "function"],
)
@pytest.mark.parametrize("cached", ["live", "the cache alone"])
def test_terms_that_take_a_row_for_a_text_are_refused_with_both_numbers(tmp_path, term, cached):
    teacher, loss = tiny("llama"), objective(terms={"mine": term})
    cache = None
    if cached != "live":
        cache = TeacherCache.build(tmp_path / "cache", teacher, packed(), loss, dtype="float32")
    args = (None if cache else teacher, shrink(teacher, 2, init="random"), loss, packed(), cache)
    with pytest.raises(
        ValueError, match=rf"the mine term \({type(term).__name__}\) takes a row for one text: {NUMBERS}"
    ):
        trainer(tmp_path, *args)
    loss.weights["mine"] = 0.0  # it may be set while training
    with pytest.raises(ValueError, match="takes a row for one text"):
        trainer(tmp_path, *args)


def test_terms_that_are_gathered_first_and_terms_with_a_memory_are_asked_as_they_are():
    teacher = tiny("llama")
    student = shrink(teacher, 2, hidden_size=16, init="random").train()
    terms = {
        "units": Units(batches=1),
        "movers": EarthMover("mse", layer_map=LayerMap.every(2, 3)),
    }
    loss = Objective(MAP, Features("mse", standardize="phi_s", standardize_batches=1), terms=terms).prepare(16, 32)
    before, drawn = {name: x.clone() for name, x in loss.state_dict().items()}, torch.get_rng_state()
    check_packed(packed(), COLLATOR, loss, student, teacher, arguments("unused"))
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    assert student.training and torch.equal(torch.get_rng_state(), drawn)


def test_rows_that_a_collator_joins_are_asked_too(tmp_path):
    teacher, loss = tiny("llama"), objective(terms={"mine": Pooled("mse")})
    joined = DataCollatorWithFlattening(return_tensors="pt")
    data = rows().remove_columns("attention_mask")
    with pytest.raises(ValueError, match=NUMBERS.replace("2", "4")):
        trainer(tmp_path, teacher, shrink(teacher, 2, init="random"), loss, data, collator=joined)
    trainer(tmp_path, teacher, shrink(teacher, 2, init="random"), objective(), data, collator=joined)
