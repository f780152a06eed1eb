"""The noise of `scans` is fixed by line and seed, of the stated strength, and made of the stated errors."""

import random

import pytest

from fakit.tasks import load_task
from fakit.tasks.scans import ALPHABET, CONFUSIONS, add_scan_noise


def test_known_lines():
    """Literal values: another Python or platform must give the same pairs,
    or shipped teachers and recorded runs would not fit.
    """
    line = "the number of those who were with him"
    assert add_scan_noise(line, seed=0) == "tbe numberoftbose wbo vvere withhim"
    assert add_scan_noise(line, seed=1) == "the nurnher of thosse who were vvith bim"


def test_noise_depends_on_line_and_seed_only():
    lines = load_task("scans", labels=50).train["target"]
    first = [add_scan_noise(line) for line in lines]
    random.seed(5)
    assert [add_scan_noise(line) for line in reversed(lines)][::-1] == first
    assert [add_scan_noise(line, seed=1) for line in lines] != first


def test_copying_the_input_costs_twelve_to_thirteen_percent():
    import jiwer

    task = load_task("scans")
    for split in (task.test, task.train.select(range(2000))):
        assert 0.115 < jiwer.cer(split["target"][:], split["source"][:]) < 0.13


def test_each_confusion_occurs_and_only_the_alphabet():
    for clean, confused in CONFUSIONS.items():
        seen = {add_scan_noise(clean, seed=seed) for seed in range(400)}
        assert {clean, "", *confused} <= seen
    task = load_task("scans", labels=2000)
    assert set("".join(task.train["source"])) <= set(ALPHABET)


@pytest.mark.parametrize("text", ["", "  two  blanks ", 'He said, "In [1] - (or 2): it\'s done!"', "a\nb"])
def test_characters_survive_the_tokenizer(characters, text):
    ids = characters(text).input_ids
    assert len(ids) == len(text)
    assert characters.decode(ids) == text


def test_the_tokenizer_survives_saving(characters, tmp_path):
    from transformers import AutoTokenizer

    characters.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("amd tbe\n").input_ids == characters("amd tbe\n").input_ids
    assert (loaded.pad_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, len(ALPHABET) + 3)
    assert set(loaded("a")) == {"input_ids", "attention_mask"}
