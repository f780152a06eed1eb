"""Model folders are somebody's input: no code of theirs runs, no pickle is opened,
and what does not fit is one sentence, for both sides.
"""

import ast
import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from fakit import load_teacher
from fakit.models.load import load_student, load_tokenizer
from fakit.models.pretrained import first_sentence
from fakit.planner import plan
from tests.families import WIDTH, batch, tiny, tokenizer

ROOT = Path(__file__).parents[2]
CODE = "import pathlib; pathlib.Path(__file__).with_name('RAN').touch()\nraise SystemExit('the code of a folder ran')\n"


def save(family: str, folder: Path, **changes) -> Path:
    tiny(family, **changes).save_pretrained(folder)
    (folder / "code.py").write_text(CODE)
    return folder


def change(folder: Path, file: str = "config.json", **changes) -> None:
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


def one_sentence(found) -> str:
    said = str(found.value)
    assert "\n" not in said and "=True" not in said and "weights_only" not in said
    return said


# -- code -------------------------------------------------------------------------------------------------------------


def test_every_load_names_its_trust():
    """An Auto class asks on the terminal where nothing is said, and a "y" runs the folder's code."""
    loads = ("from_pretrained", "from_config", "load_dataset", "pipeline")
    unsaid = []
    for path in [file for part in ("fakit", "scripts", "benchmarks") for file in (ROOT / part).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in loads:
                said = {keyword.arg for keyword in node.keywords}
                peft_own = ast.unparse(node.func).startswith("Peft")  # knows no code of a folder
                if not (peft_own or None in said or "trust_remote_code" in said):
                    unsaid.append(f"{path.name}:{node.lineno}")
    assert unsaid == []


@pytest.mark.parametrize("auto", ["AutoConfig", "AutoModelForMaskedLM"])
def test_an_architecture_of_the_folder_alone_is_refused(auto, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a reader might type on transformers' prompt
    folder = save("electra", tmp_path)
    change(folder, model_type="mine", auto_map={auto: "code.Mine"})
    for load in (
        load_teacher,
        lambda path, **_: plan(path, "1", memory="1GB"),
        lambda path, task: load_student(path, task),
    ):
        with pytest.raises(
            ValueError, match=r"brings Python code of its own \(auto_map in config.json: code.Mine\)"
        ) as found:
            load(folder, task="masked-lm")
        assert "'mine'" in one_sentence(found)
    assert not (folder / "RAN").exists()


def test_a_known_architecture_is_transformers_own_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = save("gpt-neox", tmp_path)
    expected = load_teacher(folder)(**batch()).logits
    change(folder, auto_map={"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"})
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(CODE)
    with pytest.warns(UserWarning, match=r"brings Python code .*code.Mine.*custom_generate.*it is not run"):
        teacher = load_teacher(folder)
    assert torch.equal(teacher(**batch()).logits, expected)
    assert type(teacher).__module__.startswith("transformers.") and not (folder / "RAN").exists()


def test_a_task_that_only_the_folders_code_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = save("vit", tmp_path)  # transformers knows the type, and no language model of it
    change(folder, auto_map={"AutoModelForCausalLM": "code.Mine"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="could not be loaded as a causal-lm model") as found:
            load_teacher(folder)
    one_sentence(found)
    assert not (folder / "RAN").exists()


def test_a_tokenizer_of_the_folders_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = save("gpt2", tmp_path)
    tokenizer("layers align").save_pretrained(folder)
    change(folder, "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["code.Mine", None]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_tokenizer(folder)
        except ValueError as error:
            assert "tokenizer" in str(error) and "=True" not in str(error)
    assert not (folder / "RAN").exists()


def test_kernels_of_the_hub_are_refused(tmp_path):
    folder = save("llama", tmp_path)
    change(folder, attn_implementation="somebody/fast-attention")
    with pytest.raises(ValueError, match=r"attention kernels of the hub .*'somebody/fast-attention'"):
        load_teacher(folder)


# -- pickles and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_teacher, load_student])
def test_pickled_weights_are_refused_with_their_conversion(load, tmp_path):
    folder = save("bloom", tmp_path)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model-00001-of-00001.bin")
    message = r"holds its weights as a pickle \(pytorch_model-00001-of-00001.bin\).*AutoModelForCausalLM as M; M.from_pretrained"
    with pytest.raises(ValueError, match=message) as found:
        load(folder, "causal-lm")
    one_sentence(found)


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../outside.safetensors"])
def test_an_index_may_not_name_a_pickle_or_leave_the_folder(shard, tmp_path):
    folder = save("llama", tmp_path / "model")
    shutil.move(folder / "model.safetensors", folder / shard)
    names = load_file(folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(ValueError, match=r"index.json names '.*'; fakit reads .safetensors files of that folder alone"):
        load_teacher(folder)


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    folder = save("opt", tmp_path)
    weights = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"lacks model-00001-of-00002.safetensors"):
        load_teacher(folder)
    index.unlink()
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no weights, neither model.safetensors nor its index"):
        load_teacher(folder)
    for text in (
        "{",
        "[1]",
        "\x00\x01",
        '{"model_type": "opt", "hidden_size": "large"}',
        '{"model_type": "no-such-type"}',
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=str(folder)) as found:
            load_teacher(folder)
        one_sentence(found)


# -- shapes, layers, classes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_teacher, load_student])
@pytest.mark.parametrize(
    ("family", "task", "changes", "message"),
    [
        (
            "distilbert",
            "sequence-classification",
            {"hidden_dim": 40},
            r"mismatch in shape: .*ffn.* \(48.* in the checkpoint, \(40",
        ),
        (
            "distilbert",
            "sequence-classification",
            {"n_layers": 5},
            r"has no weights for distilbert.transformer.layer.3",
        ),
        (
            "distilbert",
            "sequence-classification",
            {"n_layers": 2},
            r"weights that .* has no place for: .*layer\.2\..*has 2 layers",
        ),
        ("qwen2", "causal-lm", {"num_hidden_layers": 2}, r"has no place for: model.layers.2"),
    ],
)
def test_a_configuration_of_another_model_is_refused(load, family, task, changes, message, tmp_path):
    folder = save(family, tmp_path)
    change(folder, **changes)
    if family == "qwen2":
        change(folder, layer_types=["full_attention"] * 2)
    with pytest.raises(ValueError, match=message) as found:
        load(folder, task)
    one_sentence(found)


def test_biases_that_would_be_left_out_are_refused(tmp_path):
    folder = save("llama", tmp_path, attention_bias=True)
    change(folder, attention_bias=False)
    with pytest.raises(ValueError, match=r"has no place for: model.layers.0.self_attn.k_proj.bias"):
        load_teacher(folder)


def test_an_encoder_may_lack_its_pooler_and_no_layer(tmp_path):
    folder = save("roberta", tmp_path)
    assert load_teacher(folder, task="encoder").config.num_hidden_layers == 3
    change(folder, num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"has no weights for encoder.layer.3"):
        load_teacher(folder, task="encoder")


def test_a_students_head_may_start_random_and_nothing_else(tmp_path):
    tiny("electra").base_model.save_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning, match=r"no head for this task: classifier.dense.bias, .* start random"):
        student = load_student(tmp_path / "bare", "sequence-classification", num_labels=4)
    assert student.config.num_labels == 4 and all(p.requires_grad for p in student.parameters())
    tiny("gpt-neox").base_model.save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match=r"causal-lm student .*no weights for .*embed_out|lm_head"):
        load_student(tmp_path / "body", "causal-lm")


def test_a_student_of_other_classes_is_refused(tmp_path):
    folder = save("distilbert", tmp_path, num_labels=5)
    with pytest.raises(ValueError, match="has 5 outputs, the task has 3"):
        load_student(folder, "sequence-classification", num_labels=3)
    assert load_student(folder, "sequence-classification", num_labels=5).config.num_labels == 5


def test_a_quantized_student_is_refused(tmp_path):
    folder = save("llama", tmp_path)
    change(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(ValueError, match=r"is quantized .*cannot be trained"):
        load_student(folder, "causal-lm")


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tmp_path):
    """Folders of a base GPT-2 and of a LoRA adapter trained on it."""
    base = save("gpt2", tmp_path / "base")
    return base, adapter_for(base, tmp_path / "adapter", "c_attn")


def adapter_for(base: Path, folder: Path, *modules: str, auto=None, **changes) -> Path:
    from transformers import AutoModelForCausalLM

    model = (auto or AutoModelForCausalLM).from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(modules), **changes)).save_pretrained(folder)
    return folder


def test_an_adapter_of_another_base_of_the_same_shapes_is_refused(adapted, tmp_path):
    base, adapter = adapted
    other = save("gpt2", tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"mismatch of base models, it was trained on '.*base'.*'.*other' was given"):
        load_teacher(other, adapter=adapter)
    change(adapter, "adapter_config.json", base_model_name_or_path="somebody/their-gpt2")
    with pytest.raises(ValueError, match=r"trained on 'somebody/their-gpt2'"):
        load_teacher(base, adapter=adapter)
    # the same model elsewhere: by its weights, or by its name where the folder it was trained from is gone
    change(adapter, "adapter_config.json", base_model_name_or_path=str(base))
    load_teacher(shutil.copytree(base, tmp_path / "copy"), adapter=adapter)
    shutil.move(base, tmp_path / "moved" / "base")
    load_teacher(tmp_path / "moved" / "base", adapter=adapter)


def test_an_adapter_of_another_depth_is_refused(adapted, tmp_path):
    _, adapter = adapted
    for layers, message in ((4, r"it lacks weights for .*h\.3\."), (2, r"has no module for: .*h\.2\.")):
        change(adapter, "adapter_config.json", base_model_name_or_path=None)
        with pytest.raises(ValueError, match=message):
            load_teacher(save("gpt2", tmp_path / str(layers), n_layer=layers), adapter=adapter)


def test_an_adapter_for_modules_that_are_not_there_is_refused(adapted, tmp_path):
    base, adapter = adapted
    change(adapter, "adapter_config.json", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"does not fit .*[Tt]arget modules .*q_proj"):
        load_teacher(base, adapter=adapter)
    change(adapter, "adapter_config.json", target_modules=["c_attn"], r=3)
    with pytest.raises(ValueError, match=r"mismatch of its weights: size mismatch for .*lora_A"):
        load_teacher(base, adapter=adapter)
    change(adapter, "adapter_config.json", r=2, peft_type="NO_SUCH")
    with pytest.raises(ValueError, match=r"adapter_config.json is no configuration that PEFT reads"):
        load_teacher(base, adapter=adapter)


def test_an_adapter_in_a_models_place_and_a_damaged_one_are_refused(adapted):
    base, adapter = adapted
    shutil.copy(base / "config.json", adapter)
    with pytest.raises(ValueError, match=r"holds a PEFT adapter .*half a model"):
        load_teacher(adapter)
    weights = adapter / "adapter_model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in list(state.items())[1:]}, weights)
    with pytest.raises(ValueError, match=r"lacks weights for .*\(1 in all\)"):
        load_teacher(base, adapter=adapter)
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"adapter at .* does not fit"):
        load_teacher(base, adapter=adapter)


def test_prompts_cannot_be_merged(tmp_path):
    base = save("gpt2", tmp_path / "base")
    from transformers import AutoModelForCausalLM

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="PROMPT_TUNING, which adds tokens and cannot be merged"):
        load_teacher(base, adapter=tmp_path / "prompt")


def test_a_bare_body_with_an_adapter_says_the_same_as_pefts_own(tmp_path):
    save("distilbert", tmp_path / "base")
    adapter = adapter_for(tmp_path / "base", tmp_path / "adapter", "q_lin", auto=AutoModel)
    assert load_teacher(tmp_path / "base", task="encoder", adapter=adapter).config.dim == WIDTH


# -- words ------------------------------------------------------------------------------------------------------------


def test_advice_of_libraries_stays_inside():
    advice = "Weights only load failed. In PyTorch 2.6, pass weights_only=False."
    assert first_sentence(ValueError(advice)) == "Weights only load failed."
    assert "weights_only" not in first_sentence(ValueError("Pass `weights_only=False` to go on."))
    assert first_sentence(OSError("no file named\n  config.json found")) == "no file named config.json found."
