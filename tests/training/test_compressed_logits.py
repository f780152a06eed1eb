"""DistillKit's compressed columns: bytes made by hand from the format's definition, and what does not fit."""

import json
import math
import struct

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig

from fakit.training.teacher_cache import import_published, published_rows
from fakit.training.teacher_cache.compressed import Compression, unpacked

SETTINGS = {
    "d": 300,  # 9 bits
    "k": 6,
    "exact_k": 2,
    "exact_dtype": "float16",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 3, "num_elements": 2},
        {"scale_dtype": "float32", "element_bits": 1, "num_elements": 1},
    ],
    "delta_encoding": True,
}
EXACT, TERMS, BINS = (-0.5, -1.25), (-0.75, 0.125, -0.25), ((0.0625, (1, 6)), (0.03125, (1,)))
IDS = [299, 4, 0, 17, 256, 255]


def bits_of(numbers, width: int) -> list[int]:
    written = "".join(f"{number:0{width}b}" for number in numbers)
    written += "0" * (-len(written) % 8)
    return [int(written[start : start + 8], 2) for start in range(0, len(written), 8)]


def packed() -> tuple[list[int], list[int]]:
    """The bytes of one token, by struct and strings of bits."""
    values = struct.pack("<2e3f", *EXACT, *TERMS)
    values += struct.pack("<e", BINS[0][0]) + bytes(bits_of(BINS[0][1], 3))
    values += struct.pack("<f", BINS[1][0]) + bytes(bits_of(BINS[1][1], 1))
    return [*values], bits_of(IDS, 9)


def by_hand() -> list[float]:
    steps = [*EXACT]
    residual = [0.0625 * (1 - 4), 0.0625 * (6 - 4), 0.03125 * (2 * 1 - 1), 0.0]
    for t, own in enumerate(residual):
        steps.append(TERMS[0] + TERMS[1] * t + TERMS[2] * math.sqrt(t) + own)
    return [sum(steps[: place + 1]) for place in range(6)]


def test_a_token_by_hand():
    values, numbers = packed()
    found = Compression.of(SETTINGS).read([values, values], [numbers, numbers], "here")
    assert found[0].tolist() == [IDS, IDS]
    for row in found[1].tolist():
        assert row == pytest.approx(by_hand(), rel=1e-6)
    plain = Compression.of(SETTINGS | {"delta_encoding": False})
    assert plain.read([values], [numbers], "here")[1][0, :3].tolist() == pytest.approx([-0.5, -1.25, -0.9375])
    even = Compression.of(SETTINGS | {"normalize_t": True, "delta_encoding": False})
    assert even.read([values], [numbers], "here")[1][0, -1].item() == pytest.approx(-0.75 + 0.125 - 0.25)


def test_bits_run_over_bytes():
    numbers = torch.tensor([5, 300, 511, 0, 256])
    assert unpacked(torch.tensor([bits_of(numbers.tolist(), 9)], dtype=torch.uint8), 9, 5)[0].equal(numbers)


def test_a_set_becomes_a_cache(tmp_path):
    values, numbers = packed()
    row = {"input_ids": [3, 4, 7], "compressed_logprobs": [values] * 2, "bytepacked_indices": [numbers] * 2}
    (tmp_path / "set.jsonl").write_text(json.dumps(row))
    Dataset.from_list([row]).to_parquet(str(tmp_path / "set.parquet"))
    config = LlamaConfig(vocab_size=300, architectures=["LlamaForCausalLM"])
    for name in ("set.jsonl", "set.parquet"):
        rows = published_rows([tmp_path / name], SETTINGS)
        assert rows[0]["input_ids"] == [3, 4, 7]
        cache = import_published(
            tmp_path / f"cache of {name}", [tmp_path / name], rows, config, dtype="float32", compression=SETTINGS
        )
        top = cache.trace([0], torch.ones(1, 3).bool()).top_k
        assert top.indices[0, 1].tolist() == IDS
        assert top.values[0, 1].tolist() == pytest.approx(by_hand(), rel=1e-5)
        with pytest.raises(ValueError, match=r"DistillKit's compressed logits; give the settings .*compression="):
            published_rows([tmp_path / name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d": 600}, r"bytepacked_indices has 7 bytes a token, .* it has 8"),
        ({"exact_k": 1}, r"compressed_logprobs has 24 bytes a token, .* it has 22"),
    ],
)
def test_settings_of_another_set_are_refused(changes, message):
    values, numbers = packed()
    with pytest.raises(ValueError, match=message):
        Compression.of(SETTINGS | changes).read([values], [numbers], "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "unknown key 'bits'; the keys are d, k, exact_k"),
        ({"d": None}, "d is missing"),
        ({"exact_k": 7}, "bins hold 3 of the -1 numbers"),
        ({"polynomial_terms": ["log"]}, "terms are whole numbers, sqrt, exp"),
        ({"exact_dtype": "float8"}, "dtypes are float16, bfloat16, float32, float64"),
        ({"polynomial_terms": None, "residual_bins": []}, "describes no set"),
    ],
)
def test_settings_that_describe_no_set(changes, message):
    with pytest.raises(ValueError, match=message):
        Compression.of(SETTINGS | changes)


def test_its_earlier_format_is_not_read(tmp_path):
    (tmp_path / "set.jsonl").write_text(json.dumps({"input_ids": [1, 2], "packed_indices": [], "coeffs": []}))
    with pytest.raises(ValueError, match="earlier format is not read: decompress them there"):
        published_rows([tmp_path / "set.jsonl"], SETTINGS)
