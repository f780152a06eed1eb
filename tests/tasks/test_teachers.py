"""The shipped teachers are as good as data/README.md says, on test rows they never saw."""

import pytest
import torch

from fakit.evaluation import evaluate
from fakit.models.load import is_quantized
from fakit.tasks import data_dir, embedded_teacher, load_task


# accuracies on the whole test split are .867 and .835; a sample of 300 has a standard error of .02
@pytest.mark.parametrize(("name", "floor"), [("reviews", 0.82), ("glosses", 0.78)])
def test_classifiers(name, floor):
    task = load_task(name)
    teacher, tokenizer = embedded_teacher(name)
    assert [teacher.config.id2label[i] for i in range(teacher.num_labels)] == task.label_names
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    sample = task.test.shuffle(seed=0).select(range(300))
    assert evaluate(teacher, task.encode(sample, tokenizer), task.collator(tokenizer), task)["accuracy"] > floor


def test_the_decoder_undoes_most_of_the_errors():
    task = load_task("scans")
    teacher, tokenizer = embedded_teacher("scans")
    sample = task.encode(task.test.select(range(100)), tokenizer)
    scores = evaluate(teacher, sample, task.collator(tokenizer), task, tokenizer)
    assert scores["cer"] < 0.035 < 0.11 < scores["cer_copy"]  # .024 and .126 on the whole split
    assert scores["perplexity"] < 1.1


def test_a_quantized_teacher_agrees_with_the_full_one():
    task = load_task("glosses")
    full, tokenizer = embedded_teacher("glosses")
    eight, _ = embedded_teacher("glosses", quantize="8bit")
    assert is_quantized(eight) and not is_quantized(full)
    batch = task.collator(tokenizer)(list(task.encode(task.test.select(range(64)), tokenizer)))
    batch.pop("labels")
    with torch.inference_mode():
        agreement = (full(**batch).logits.argmax(-1) == eight(**batch).logits.argmax(-1)).float().mean()
    assert agreement > 0.9


def test_unknown_and_damaged_teachers_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'sst2' has no embedded teacher; there is one for reviews, glosses, scans"):
        embedded_teacher("sst2")
    data = data_dir()
    (tmp_path / "teachers" / "scans").mkdir(parents=True)
    (tmp_path / "manifest.json").write_bytes((data / "manifest.json").read_bytes())
    for path in (data / "teachers" / "scans").iterdir():
        content = path.read_bytes()
        (tmp_path / "teachers" / "scans" / path.name).write_bytes(
            content[:-64] if path.suffix == ".safetensors" else content
        )
    monkeypatch.setenv("FAKIT_DATA", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"model.safetensors is not the file that belongs here.*train_teacher.py scans"
    ):
        embedded_teacher("scans")
