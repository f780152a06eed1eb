"""Configurations that are none: each is one sentence that names the file, in no time,
whatever YAML would make of it.
"""

import pytest

from fakit.experiments import ExperimentConfig, Study
from fakit.experiments.schema import LARGEST

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize("read", [ExperimentConfig.from_yaml, Study.from_yaml])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: &a [*a]\n", "line 1: this value holds itself, by an anchor"),
        ("task: &a {name: {again: *a}}\n", "line 1: this value holds itself"),
        (BOMB, "with its anchors .* filled in this is more than 1,000,000 values"),
        ("? [a, b]\n: c\n", "line 1: a key is a list or a mapping; keys are names"),
        ("seed: 0\n? {a: 1}\n: c\n", "line 2: a key is a list or a mapping"),
        ("task:\n\tname: glosses\n", "line 2, column 1: no valid YAML.*indented with spaces, not tabs"),
        ("seed: 1\nseed: 2\n", "seed: given twice, in lines 1 and 2"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("training: {steps: 0100}\n", "line 1: YAML reads 0100 as a number to base 8"),
        ("training: {steps: 1:30}\n", "YAML reads 1:30 as a number to base 8 or 60"),
        ("task: !!python/object/apply:os.system [ls]\n", "line 1, column 7: .*constructor for the tag"),
        ("seed: 0\n---\nseed: 1\n", "line 2, column 1: .*another document"),
        ("task: {name: *nope}\n", "undefined alias 'nope'"),
        ("seed: " + "9" * 5000 + "\n", "integer string conversion"),
        ("out: 2020-13-45\n", "month must be in 1..12"),
        ("seed: \x01\n", "special characters are not allowed"),
        ("", "found None"),
        ("glosses\n", "found 'glosses'"),
        ("- seed: 1\n", "expected a mapping with keys"),
        ("1: seed\n", "1: unknown key"),
    ],
)
def test_what_is_no_configuration(text, message, read, tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}") as found:
        read(path)
    assert "\n" not in str(found.value) and len(str(found.value)) < 700


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(range(256)), r"is no text in UTF-8 \(found byte 0x80 at 128\)"),
        ("seed: 1\n".encode("utf-16"), r"is no text in UTF-8 \(found UTF-16\)"),
        (b"#" * (LARGEST + 1), "1,000,001 bytes are no configuration"),
    ],
)
def test_what_is_no_text(content, message, tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        ExperimentConfig.from_yaml(path)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 1\n")
    with pytest.raises(ValueError, match=r"is a folder, where a YAML file was expected\. YAML files in .*: mine\.yaml"):
        ExperimentConfig.from_yaml(tmp_path)


def test_anchors_merges_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "experiment.yaml"
    text = "features: &base {loss: mse, weight: 0.25}\nattention: {<<: *base, loss: kl}\nseed: 0\n"
    path.write_text(text, encoding="utf-8-sig")
    config = ExperimentConfig.from_yaml(path)
    assert (config.attention.loss, config.attention.weight, config.features.weight) == ("kl", 0.25, 0.25)


def test_numbers_beyond_all_counting_are_refused():
    with pytest.raises(ValueError, match=r"training.max_length: found 1e\+20, and nothing here counts that far"):
        ExperimentConfig.from_dict({"training": {"max_length": 10**20}})
