"""The scripts that made data/: the files they write are reproducible,
and the training of teachers runs and saves what loads.
"""

import gzip
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fakit.models.load import load_teacher
from fakit.tasks import MINILM, data_dir, load_task

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import _build
    import train_teacher

    yield _build, train_teacher
    for name in ("_build", "train_teacher"):
        sys.modules.pop(name)


@pytest.mark.parametrize("name", ["reviews", "glosses", "scans", "instructions"])
def test_rows_written_again_give_the_shipped_bytes(scripts, tmp_path, name):
    build, _ = scripts
    with gzip.open(data_dir() / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    build.write_rows(tmp_path / "again.gz", rows)
    assert gzip.decompress((tmp_path / "again.gz").read_bytes()) == gzip.decompress(
        (data_dir() / f"{name}.jsonl.gz").read_bytes()
    )
    assert (tmp_path / "again.gz").read_bytes()[4:8] == bytes(4)  # no time stamp
    build.write_rows(tmp_path / "renamed.gz", rows)
    assert (tmp_path / "again.gz").read_bytes() == (tmp_path / "renamed.gz").read_bytes()


def test_splits_keep_the_labels_shares_and_every_row_once(scripts):
    build, _ = scripts
    rows = [{"text": str(i), "label": "aab"[i % 3]} for i in range(300)]
    dealt = build.split_by_label(rows, {"test": 60, "train": 1000}, seed=4)
    assert sorted(row["text"] for row in dealt) == sorted(row["text"] for row in rows)
    assert Counter((row["split"], row["label"]) for row in dealt) == {
        ("test", "a"): 40, ("test", "b"): 20, ("train", "a"): 160, ("train", "b"): 80,
    }  # fmt: skip
    assert dealt == build.split_by_label(rows, {"test": 60, "train": 1000}, seed=4)
    assert dealt != build.split_by_label(rows, {"test": 60, "train": 1000}, seed=5)


def test_a_changed_source_is_refused(scripts, tmp_path):
    build, _ = scripts
    (tmp_path / "data.noun").write_text("another version")
    with pytest.raises(ValueError, match="the data were built from a file with sha256 fea17d"):
        build.checked(tmp_path / "data.noun", "fea17d")


def small(name: str, train: int):
    """The task with a few rows in each split that training reads."""
    task = load_task(name)
    few = {split: getattr(task, split).select(range(32)) for split in ("validation", "test")}
    return replace(task, teacher_train=task.teacher_train.select(range(train)), **few)


def test_training_an_adapter_saves_one_that_loads_merged(scripts, tmp_path, monkeypatch, capsys):
    _, script = scripts
    monkeypatch.setattr(script, "DATA", tmp_path)
    recipe = replace(script.RECIPES["glosses"], steps=4, batch=16, warmup=1)
    script.train_adapter(small("glosses", train=48), recipe)
    out = capsys.readouterr().out
    assert "after 3 steps, validation: {'accuracy'" in out and "test: {'accuracy'" in out
    folder = tmp_path / "adapters" / "glosses"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.json",
    }
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == MINILM
    trained = load_teacher(MINILM, task="sequence-classification", adapter=folder)
    assert trained.config.id2label[13] == "substance" and trained.num_labels == 14
    base = load_teacher(MINILM, task="encoder")
    moved = (
        trained.bert.encoder.layer[0].attention.self.query.weight - base.encoder.layer[0].attention.self.query.weight
    )
    assert 0 < moved.abs().max() < 0.1
    assert torch.equal(trained.bert.embeddings.word_embeddings.weight, base.embeddings.word_embeddings.weight)


def test_training_the_decoder_lowers_the_loss_and_saves_it_with_its_tokenizer(scripts, tmp_path, monkeypatch, capsys):
    _, script = scripts
    monkeypatch.setattr(script, "DATA", tmp_path)
    task = small("scans", train=64)
    script.train_decoder(task, replace(script.RECIPES["scans"], steps=17, batch=8, warmup=2))
    out = capsys.readouterr().out
    assert "after 8 steps, validation: {'perplexity'" in out and "'cer'" in out
    folder = tmp_path / "teachers" / "scans"
    model = load_teacher(folder, task="causal-lm")
    assert (model.config.n_layer, model.config.n_embd, model.config.n_head) == (4, 128, 4)
    perplexity = float(out.split("test: {'perplexity': ")[1].split(",")[0])
    assert perplexity < 40  # of 99 characters, after 17 steps


def test_instructions_are_made_again_from_the_other_files(scripts, tmp_path, monkeypatch):
    import build_instructions

    monkeypatch.setattr(build_instructions, "register", lambda *_, **__: None)
    written = []
    monkeypatch.setattr(build_instructions, "write_rows", lambda path, rows: written.extend(rows))
    build_instructions.main()
    with gzip.open(data_dir() / "instructions.jsonl.gz", "rt", encoding="utf-8") as lines:
        assert written == [json.loads(line) for line in lines]
