"""preflight: every row, ok and not, with both sides and the fix."""

import pytest
import torch
import transformers as hf

from fakit import load_teacher, preflight, shrink
from tests.families import VOCAB, WIDTH, tiny, tokenizer


def frozen(family: str, **changes):
    return tiny(family, **changes).requires_grad_(False)


def test_a_pair_that_fits_is_ok_in_every_row():
    teacher = frozen("bert")
    report = preflight(teacher, shrink(teacher, 2), tokenizer("students align layers"))
    assert [row.status for row in report.rows] == ["ok"] * len(report.rows) and report.ok and report.errors == []
    assert [row.name for row in report.rows] == [
        "layers",
        "hidden size",
        "attention heads",
        "task head",
        "labels",
        "tokenizer",
        "vocabulary fits the embeddings",
        "longest sequence",
        "mode",
        "trainable",
        "precision",
    ]
    assert all(row.fix == "" for row in report.rows)
    assert (report["layers"].teacher, report["layers"].student) == (3, 2)
    report.raise_if_error()


def row(name: str, teacher, student, *tokenizers):
    found = preflight(teacher, student, *tokenizers)[name]
    return found.status, found.teacher, found.student, found.fix


def test_sizes():
    teacher = frozen("bert")
    deeper = tiny("bert", num_hidden_layers=4)
    assert row("layers", teacher, deeper) == ("warning", 3, 4, "A student deeper than its teacher is unusual.")
    narrow = shrink(teacher, 2, hidden_size=16)
    status, *sides, fix = row("hidden size", teacher, narrow)
    assert (status, sides) == ("warning", [32, 16]) and "linear projection" in fix
    status, *sides, fix = row("attention heads", teacher, narrow)
    assert (status, sides) == ("warning", [4, 2]) and "heads='group-mean'" in fix
    shorter = tiny("bert", max_position_embeddings=32)
    assert row("longest sequence", teacher, shorter) == ("warning", 64, 32, "Tokenize with max_length=32.")
    assert preflight(teacher, narrow).ok  # warnings do not forbid


def test_heads_and_labels():
    teacher = frozen("bert")
    status, *sides, fix = row("task head", teacher, tiny("roberta"))
    assert (status, sides) == ("warning", ["SequenceClassification", "MaskedLM"]) and "outputs=None" in fix
    assert row("task head", teacher.bert, tiny("bert").bert)[:3] == ("ok", "encoder", "encoder")
    more = tiny("bert", id2label={0: "a", 1: "b", 2: "c"})
    status, *sides, fix = row("labels", teacher, more)
    assert (status, sides) == ("error", ["2: LABEL_0, LABEL_1", "3: a, b, c"]) and "num_labels, id2label" in fix
    assert row("labels", teacher, tiny("bert", id2label={0: "LABEL_1", 1: "LABEL_0"}))[0] == "warning"


def test_vocabularies_of_logits():
    status, *sides, fix = row("vocabulary (logits)", frozen("gpt2"), tiny("gpt2", vocab_size=56))
    assert (status, sides) == ("error", [50, 56]) and "Outputs(vocab_size=50)" in fix and "tokenizers differ" in fix
    assert row("vocabulary (logits)", frozen("gpt2"), tiny("gpt2"))[0] == "ok"


def test_tokenizers():
    teacher, student = frozen("bert"), tiny("bert")
    one, other = tokenizer("students align layers"), tokenizer("layers align students")
    status, *sides, fix = row("tokenizer", teacher, student, one, other)
    assert status == "error" and all(" of 4: " in side for side in sides) and "use the teacher's tokenizer" in fix
    assert row("tokenizer", teacher, student, one, tokenizer("students align layers"))[0] == "ok"
    assert "layers (3)" in sides[0] and "layers (1)" in sides[1]  # names, and the ids that differ
    large = tokenizer(" ".join(f"w{i}" for i in range(59)))
    status, *sides, fix = row("vocabulary fits the embeddings", teacher, student, large)
    assert (status, sides) == ("error", ["60 of 50", "60 of 50"]) and "resize_token_embeddings" in fix


def test_state(tmp_path):
    teacher, student = frozen("bert"), tiny("bert")
    status, *sides, fix = row("mode", tiny("bert").requires_grad_(False).train(), student)
    assert (status, sides[0]) == ("warning", "train (dropout is on)") and "teacher.eval()" in fix
    assert row("trainable", tiny("bert"), student)[:3] == ("warning", "yes", "yes")
    status, *sides, fix = row("trainable", teacher, frozen("bert"))
    assert (status, sides) == ("error", ["no", "no"]) and "student.requires_grad_(True)" in fix
    student.save_pretrained(tmp_path)
    quantized = load_teacher(tmp_path, task="sequence-classification", quantize="8bit")
    assert row("precision", quantized, student) == ("ok", "quantized", "float32", "")
    assert row("precision", teacher, quantized)[:3] == ("error", "float32", "quantized")
    assert row("precision", teacher, tiny("bert").to(torch.bfloat16))[2] == "bfloat16"


def test_errors_are_raised_together_with_both_sides_and_fixes():
    report = preflight(frozen("gpt2"), frozen("gpt2", vocab_size=56))
    assert not report.ok and [r.name for r in report.errors] == ["vocabulary (logits)", "trainable"]
    with pytest.raises(
        ValueError,
        match=r"do not fit: vocabulary \(logits\): teacher has 50, student has 56\. If only .*trainable: .* has no\. The student",
    ):
        report.raise_if_error()


def test_a_report_prints_itself_and_draws_itself():
    report = preflight(frozen("gpt2"), tiny("gpt2", vocab_size=56))
    assert "ERROR    vocabulary (logits): teacher 50, student 56. If only" in str(report)
    assert "ok       layers: teacher 3, student 3\n" in str(report)
    table = report._repr_markdown_().splitlines()
    assert (
        len(table) == 2 + len(report.rows)
        and "| ✗\u00a0**error** | vocabulary (logits) | 50 | 56 | If only" in table[6]
    )
    with pytest.raises(KeyError, match="no row 'color'"):
        report["color"]


def test_two_stacks_need_two_stacks():
    teacher = frozen("t5")
    assert row("encoder + decoder layers", teacher, shrink(teacher, [2, 4, 6]))[:3] == ("ok", "3 + 3", "1 + 2")
    status, *sides, fix = row("encoder + decoder layers", teacher, tiny("bert"))
    assert (status, sides) == ("error", ["3 + 3", "3"]) and "both stacks" in fix


def test_images_and_models_without_attention():
    teacher = frozen("vit")
    report = preflight(teacher, shrink(teacher, 2))
    assert report.ok and report["labels"].status == "ok" and "vocabulary (logits)" not in str(report)
    mamba = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2))
    status, *sides, fix = row("attention heads", frozen("gpt2"), mamba)
    assert (status, sides) == ("warning", [4, "none"]) and "attention=None" in fix


def test_a_language_model_is_no_encoder_whatever_its_class_is_called():
    gpt2 = tiny("gpt2")
    assert preflight(gpt2, tiny("llama"))["task head"].status == "ok"
    row = preflight(gpt2, hf.GPT2Model(gpt2.config).eval())["task head"]
    assert (row.status, row.teacher, row.student) == ("warning", "CausalLM", "encoder")
