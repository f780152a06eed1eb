"""Runs of a student with a tokenizer of its own: trained, exported, evaluated; refusals before any work."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from fakit import capture
from fakit.experiments import ExperimentConfig, RunResult, RunStore, run_experiment
from fakit.experiments.build import build_objective, build_training_rows, prepare
from fakit.experiments.facts import softness
from fakit.experiments.measured import measure
from fakit.models.load import load_student
from tests.families import tiny
from tests.tasks.test_instructions import GEMMA, LLAMA3, letters, messages
from tests.tasks.test_two_tokenizers import words


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    rows = [
        {
            "messages": messages(
                ("user", f"Add {n} and 1." + "?" * (n % 5)), ("assistant", f"It is {n + 1} café 😀 cats.")
            )
        }
        for n in range(60)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, tokenizer in (("teacher", words(LLAMA3)), ("student", letters(GEMMA)), ("alike", words(LLAMA3))):
        model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512, seed=len(name))
        model.config.pad_token_id = None if name == "student" else 0
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def config(world):
    written = {
        "task": {"name": str(world / "chats.jsonl")},
        "teacher": {"id": str(world / "teacher")},
        "student": {"path": str(world / "student")},
        "features": None,
        "attention": None,
        "outputs": {"loss": "uld", "temperature": 1.0},
        "training": {"steps": 2, "batch_size": 3, "accumulation": 2, "max_length": 256, "log_every": 1, "bf16": False},
        "device": "cpu",
    }
    return ExperimentConfig.from_dict(written)


def run(config, **more):
    return run_experiment(config, progress=False, **more)


@pytest.mark.parametrize("changes", [{}, {"align": "text"}, {"loss": "forward_kl", "align": "text"}], ids=str)
def test_the_first_step_is_the_loss_of_its_rows_one_by_one(config, changes):
    config = config.replace(outputs={"loss": "uld", "temperature": 1.0} | changes)
    result = run(config)
    assert result.flops_per_step > 0 and "agreement" not in result.test and result.test["rougeL"] >= 0
    parts = prepare(config)
    rows = build_training_rows(config, parts.task, parts.tokenizer, teacher_tokenizer=parts.teacher_tokenizer)
    student = load_student(config.student.path, "causal-lm").eval()
    values, how = [], changes.get("align", "order")
    shared = parts.collator().shared
    for number in rows.plan[:2].ravel().tolist():
        row = rows.rows[number]
        sides = [
            capture(model, {"input_ids": torch.tensor([row[name]])}).logits[0].double()
            for model, name in ((student, "input_ids"), (parts.teacher, "teacher_input_ids"))
        ]
        for place, at in enumerate(row[f"same_{how}"][:-1]):
            if at < 0 or row["labels"][place + 1] == -100:
                continue
            one, other = sides[0][place].softmax(-1), sides[1][at].softmax(-1)
            if config.outputs.loss == "uld":
                one, other = (x.sort(descending=True).values for x in (one, other))
                width = max(len(one), len(other))
                one, other = (torch.nn.functional.pad(x, (0, width - len(x))) for x in (one, other))
                values.append((one - other).abs().sum())
            else:
                one, other = (
                    torch.cat([x[ids], 1 - x[ids].sum(0, keepdim=True)])
                    for x, ids in zip((one, other), shared.T, strict=True)
                )
                values.append((other * (other / one).log()).sum())
    assert len(values) > 60
    assert result.history[0]["outputs"] == pytest.approx(torch.stack(values).mean().item(), rel=1e-4)


def test_a_student_is_exported_with_its_own_tokenizer_and_evaluated_beside_its_teacher(config, tmp_path):
    config = config.replace(out=str(tmp_path / "out"), **{"outputs.align": "text"})
    result = run(config, store=tmp_path / "runs", count_flops=False)
    assert run(config, store=tmp_path / "runs", resume=True).test == result.test
    own = AutoTokenizer.from_pretrained(config.out)
    assert own.get_vocab() == letters(GEMMA).get_vocab()
    found = measure(config.out, config, rows=4)
    assert set(found.scores) == set(found.teacher) and found.teacher_latency > 0 and len(found.samples) == 3
    assert found.teacher["bits_per_byte"] != found.scores["bits_per_byte"]
    with pytest.raises(ValueError, match="has a tokenizer of its own, and a draft proposes the teacher's own tokens"):
        measure(config.out, config, rows=4, draft=4)
    with pytest.raises(ValueError, match=r"another tokenizer than the model at student\.path"):
        measure(config.teacher.id, config, rows=4)


def test_a_record_tells_the_students_texts_and_the_softness_of_the_teachers_tokens(config, tmp_path):
    """At 54 tokens the student's letters are cut, and the teacher's words fit."""
    config = config.replace(**{"training.max_length": 54, "training.steps": 1, "outputs.temperature": 2.0})
    result = run(config, store=tmp_path, count_flops=False)
    parts = prepare(config)
    ours = {split: parts.task.encode(split, parts.tokenizer, 54) for split in ("train", "validation", "test")}
    cut = {split: list(parts.task.cut[split]) for split in ours}
    tokenizer, rows = parts.of_teacher("test")
    assert cut["test"] == list(parts.task.cut["test"]), "what is cut of the teacher's rows is not counted on"
    assert result.texts["cut"] == cut and all(of > 0 for of, _ in cut.values())
    wide = parts.task.encode("train", parts.teacher_tokenizer, 54)
    assert max(map(len, wide["input_ids"])) < 54 == max(map(len, ours["train"]["input_ids"]))
    assert (
        result.teacher is None and RunResult.from_store(RunStore(tmp_path), config.run_id).softness == result.softness
    )

    entropies = []
    for row in rows.to_list()[:16]:
        logits = capture(parts.teacher, {"input_ids": torch.tensor([row["input_ids"]])}).logits[0].double()
        of_label = torch.tensor(row["labels"])[1:] != -100
        entropies.append(torch.distributions.Categorical(logits=logits[:-1][of_label] / 2.0).entropy())
    found = result.softness["outputs"]
    assert (found["temperature"], found["of"]) == (2.0, len(tokenizer))
    assert found["classes"] == pytest.approx(torch.cat(entropies).mean().exp().item(), abs=1e-3)


def test_softness_is_left_out_where_no_test_row_fits_in_the_teachers_tokens(config):
    """The run has been trained by then, and must not end there."""
    parts = prepare(config)
    objective = build_objective(config, load_student(config.student.path, "causal-lm"), parts.teacher)
    assert softness(parts, objective, [])["outputs"]["of"] == len(parts.teacher_tokenizer)
    parts = replace(parts, config=config.replace(**{"training.max_length": 8}))
    with pytest.raises(ValueError, match="no answer of its 6 rows fits into max_length=8"):
        parts.of_teacher("test")
    assert softness(parts, objective, []) is None


def test_labels_alone_train_on_the_students_own_tokens(config):
    alone, beside = run(config.with_arm("none"), count_flops=False), run(config, count_flops=False)
    assert alone.history[0]["task"] == pytest.approx(beside.history[0]["task"], rel=1e-6)


def test_a_tokenizer_that_is_the_teachers_is_the_plain_run(config, world):
    config = config.replace(student={"path": str(world / "alike")}, outputs={"loss": "forward_kl", "temperature": 1.0})
    plain, aligned = run(config, count_flops=False), run(config.replace(**{"outputs.align": "text"}), count_flops=False)
    assert aligned.history == plain.history and "agreement" in aligned.test


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs.loss": "forward_kl"}, "teacher and student do not fit: .*tokenizer: .* outputs: {loss: uld}"),
        ({"features": {"loss": "cosine"}}, "teacher and student do not fit: tokenizer: .* features: null"),
        ({"teacher_cache": {"folder": "nowhere"}}, "a teacher cache holds .* tokenizer of its own"),
        ({"on_policy": {"share": 0.5}}, "on_policy has the teacher score .* tokenizer of its own"),
        ({"task.options": {"packing": True}}, "tokenizers of their own, and .* pack other rows"),
        ({"training.max_length": 12}, "no answer of its 6 rows fits into max_length=12"),
    ],
)
def test_what_takes_one_tokenizer_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        run(config.replace(**changes))


def test_parts_that_were_prepared_for_another_tokenizer_are_refused(config, world):
    parts = prepare(config)
    assert not parts.differs(config)
    assert parts.differs(config.replace(student={"path": str(world / "alike")})).keys() == {"student.path"}
    assert prepare(config.replace(student={"layers": 2})).differs(config).keys() == {"student.path"}
    with pytest.raises(ValueError, match=r"prepared for student\.path"):
        run(config.replace(student={"layers": 2}, outputs={"loss": "forward_kl"}), prepared=parts)
