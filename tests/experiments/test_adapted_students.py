"""Students of which an adapter is trained, and teachers that are loaded in a way of their own."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from fakit.experiments.build import prepare
from fakit.experiments.config import ExperimentConfig
from fakit.experiments.run import run_experiment
from fakit.experiments.store import RunStore
from fakit.experiments.students import adapted_student, exported, make_student
from fakit.models.load import full_precision_state, is_quantized
from tests.families import tiny

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}


class _StopAt(TrainerCallback):
    def __init__(self, step: int = 5):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def same(ours, theirs) -> bool:
    one, two = ours.state_dict(), theirs.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_adapter_is_trained_merged_and_exported_as_a_plain_model(config, tmp_path):
    out, store = tmp_path / "student", RunStore.open(tmp_path / "runs")
    config = config.replace(student={"layers": 2, "lora": LORA}, out=str(out))
    made = make_student(config, prepare(config)).model
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trained) and any("query" in n for n in trained)
    result = run_experiment(config, store, progress=False)
    plain = AutoModelForSequenceClassification.from_pretrained(out)
    assert same(plain, result.student) and type(result.student) is type(plain)
    assert not list(out.glob("adapter*")) and store.record(config.run_id)["config"]["student"]["lora"] == LORA
    untouched, touched = (dict(model.named_parameters()) for model in (prepare(config).teacher, plain))
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(untouched[name], touched[name])
    own = "bert.encoder.layer.1.attention.self.query.weight"
    assert not torch.equal(untouched["bert.encoder.layer.3.attention.self.query.weight"], touched[own])
    assert ExperimentConfig.from_yaml(out / "experiment.yaml") == config


def test_a_merged_student_answers_as_the_adapted_one(config):
    config = config.replace(student={"layers": 2, "lora": {**LORA, "init_lora_weights": False}})
    prepared = prepare(config)
    adapted = make_student(config, prepared).model.eval()
    merged = exported(adapted).eval()
    batch = prepared.task.collator(prepared.tokenizer)(prepared.test.select(range(8)).to_list())
    batch.pop("labels")
    with torch.no_grad():
        theirs, ours = adapted(**batch).logits, merged(**batch).logits
        close = (ours - theirs).abs().max() / theirs.abs().max()
        adapted.double()
        exact = (exported(adapted).eval()(**batch).logits - adapted(**batch).logits).abs().max()
    assert close < 1e-6 and exact < 1e-12
    assert any("lora_" in name for name, _ in adapted.named_parameters())  # which is left as it was


def test_a_stopped_run_of_an_adapter_ends_as_one_that_was_not(config, tmp_path):
    config = config.replace(student={"layers": 2, "lora": LORA}, out=str(tmp_path / "a"), **{"training.save_every": 2})
    whole, broken = run_experiment(config, progress=False), config.replace(out=str(tmp_path / "b"))
    with pytest.raises(KeyboardInterrupt):
        run_experiment(broken, progress=False, callbacks=[_StopAt()])
    found = run_experiment(broken, progress=False, resume=True)
    assert same(found.student, whole.student) and found.test == whole.test
    again = run_experiment(broken, progress=False, resume=True)  # from the folder of the finished student
    assert same(again.student, whole.student) and again.test == whole.test


def test_a_causal_student_has_an_adapter_too(world, tmp_path):
    config = ExperimentConfig.from_dict(
        {
            "task": {"name": str(world / "pairs.jsonl"), "options": {"validation": 20, "test": 20}},
            "teacher": {"id": str(world / "causal")},
            "student": {"layers": 1, "lora": {"r": 2, "target_modules": ["c_attn"]}},
            "training": {"steps": 2, "batch_size": 4, "max_length": 150, "bf16": False},
            "attention": None,
            "device": "cpu",
            "out": str(tmp_path / "student"),
        }
    )
    result = run_experiment(config, progress=False)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), result.student)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_on_weights_of_few_bits_is_exported_as_a_plain_model(world, tmp_path, bits, family):
    """The export's weights are those of few bits, turned back, and the adapter's product; it resumes bit by bit."""
    tokenizer = AutoTokenizer.from_pretrained(world / "causal", trust_remote_code=False)
    size = {"max_position_embeddings" if family == "llama" else "n_positions": 160}
    tiny(family, vocab_size=len(tokenizer), **size).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = ExperimentConfig.from_dict(
        {
            "task": {"name": str(world / "pairs.jsonl"), "options": {"validation": 8, "test": 8}},
            "teacher": {"id": str(tmp_path / "base")},
            "student": {"path": str(tmp_path / "base"), "quantize": bits, "lora": {"r": 2, "init_lora_weights": False}},
            "training": {"steps": 3, "batch_size": 4, "max_length": 150, "bf16": False, "save_every": 1},
            "attention": None,
            "device": "cpu",
            "out": str(tmp_path / "student"),
        }
    )
    adapted = make_student(config, prepare(config)).model
    base = adapted.get_base_model()
    state = full_precision_state(base)
    plain = dict(exported(adapted).named_parameters())
    checked = 0
    for name, module in base.named_modules():
        if hasattr(module, "lora_A"):
            product = 4.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight  # lora_alpha 8 over r 2
            product = product.T if family == "gpt2" else product
            torch.testing.assert_close(plain[f"{name}.weight"], state[f"{name}.base_layer.weight"].float() + product)
            checked += 1
    assert checked and is_quantized(base)
    batch = {"input_ids": torch.arange(5, 25).view(2, 10)}
    if bits == "4bit":  # whose products are in float32; those of 8 bits round what they are given
        with torch.no_grad():
            ours, theirs = exported(adapted).eval()(**batch).logits, adapted.eval()(**batch).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    result = run_experiment(config, progress=False, count_flops=False)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student", trust_remote_code=False)
    assert not is_quantized(saved) and same(saved, result.student) and saved.dtype == torch.float32
    again = config.replace(out=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        run_experiment(again, progress=False, count_flops=False, callbacks=[_StopAt(2)])
    assert same(run_experiment(again, progress=False, count_flops=False, resume=True).student, result.student)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}], ids=str)
def test_what_else_an_adapter_trains_on_few_bits_is_exported_too(world, tmp_path, more):
    tokenizer = AutoTokenizer.from_pretrained(world / "causal", trust_remote_code=False)
    base = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=160, tie_word_embeddings=False)
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = ExperimentConfig.from_dict(
        {
            "task": {"name": str(world / "pairs.jsonl"), "options": {"validation": 8, "test": 8}},
            "teacher": {"id": str(tmp_path)},
            "student": {
                "path": str(tmp_path),
                "quantize": "4bit",
                "lora": {"r": 2, "init_lora_weights": False, **more},
            },
            "training": {"max_length": 150},
            "device": "cpu",
        }
    )
    adapted = make_student(config, prepare(config)).model.eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.mul_(1.25)  # as training would move it
        batch = {"input_ids": torch.arange(5, 25).view(2, 10)}
        ours, theirs = exported(adapted).eval()(**batch).logits, adapted(**batch).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("student", [{"quantize": "8bit", "lora": {"r": 2}}, {"quantize": "4bit", "path": "somewhere"}])
def test_few_bits_want_a_saved_model_and_an_adapter(student):
    with pytest.raises(ValueError, match=r"student.quantize: found .bit with path .* and lora .* give student.path"):
        ExperimentConfig.from_dict({"student": student})


def test_a_classifier_of_few_bits_is_refused_before_work(config, world):
    student = {"quantize": "8bit", "path": str(world / "teacher"), "lora": {"r": 2}}
    with pytest.raises(ValueError, match=r"student.quantize: 8bit was asked for .* a sequence-classification task"):
        run_experiment(config.replace(student=student), progress=False)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"rank": 4}, r"student\.lora\.rank: peft\.LoraConfig has no such argument; the common ones are r, lora_alpha"),
        ({"r": 0}, r"student\.lora\.r: found 0, expected a whole number above 0"),
        ({"r": 2.5}, r"student\.lora\.r: found 2\.5, expected a whole number above 0"),
        ({"target_modules": 5}, r"student\.lora\.target_modules: found 5, expected all-linear"),
        ({"lora_alpha": float("nan")}, r"student\.lora\.lora_alpha: found nan"),
        ({"lora_dropout": 1.0}, r"student\.lora\.lora_dropout: found 1\.0"),
        ({"task_type": "SEQ_CLS"}, r"student\.lora\.task_type: follows from task\.name; leave it out"),
        ({"bias": "some"}, r"student\.lora: .*some.* does not fit BertFor"),
        (
            {"target_modules": ["nothing"]},
            r"student\.lora: .* does not fit BertForSequenceClassification: No modules were targeted",
        ),
    ],
)
def test_what_is_no_adapter_is_refused_before_any_step(config, lora, said):
    with pytest.raises(ValueError, match=said):
        run_experiment(config.replace(student={"layers": 2, "lora": lora}), progress=False)


def test_an_adapter_beside_pairs_is_refused(config):
    with pytest.raises(ValueError, match=r"student\.lora: is beside dense weights, and student\.low_rank leaves none"):
        config.replace(student={"low_rank": {"keep": 0.9}, "lora": LORA})


def test_a_teacher_in_half_precision_teaches_a_student_in_float32(config):
    config = config.replace(**{"teacher.dtype": "bfloat16", "teacher.attn_implementation": "eager"})
    prepared = prepare(config)
    assert prepared.teacher.dtype == torch.bfloat16 and prepared.teacher.config._attn_implementation == "eager"
    result = run_experiment(config, progress=False)
    assert result.student.dtype == torch.float32 and 0 <= result.score <= 1
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in result.history if "loss" in row)


def test_keys_of_a_teacher_belong_to_one_that_is_loaded(config):
    assert set(config.to_dict()["teacher"]) == {"id", "adapter", "quantize"}  # ids of runs stay
    with pytest.raises(ValueError, match=r"teacher\.dtype: is for a teacher that is loaded by its path or hub id"):
        ExperimentConfig(teacher={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"teacher\.dtype: 'bf16' is not one of float32, bfloat16, float16"):
        config.replace(**{"teacher.dtype": "bf16"})
    with pytest.raises(ValueError, match=r"teacher\.revision: found ' ' \(text\), expected a name"):
        config.replace(**{"teacher.revision": " "})


@pytest.mark.parametrize(("family", "target"), [("llama", "embed_tokens"), ("llama", "lm_head"), ("gpt2", "wte")])
def test_an_adapter_of_a_tied_weight_is_refused(family, target):
    """Merged, it would change both sides, and another model than was trained would be saved and scored."""
    model = tiny(family, tie_word_embeddings=True)
    task = SimpleNamespace(model_task="causal-lm")
    with pytest.raises(
        ValueError, match=f"{target} was to have an adapter, and its weight is tied: it is .* and .*lm_head"
    ):
        adapted_student(model, {"r": 2, "target_modules": [target]}, task)
    alone = tiny(family, tie_word_embeddings=False)
    rows = torch.arange(6).view(1, 6)
    made = adapted_student(alone, {"r": 2, "target_modules": [target], "init_lora_weights": False}, task).eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(made)(input_ids=rows).logits, made(input_ids=rows).logits)


def test_without_keeping_it_the_student_itself_is_merged(config):
    config = config.replace(student={"layers": 2, "lora": {**LORA, "init_lora_weights": False}})
    made = make_student(config, prepare(config)).model.eval()
    weight = made.get_base_model().get_input_embeddings().weight
    kept = exported(made)
    merged = exported(made, keep=False)
    assert same(merged, kept) and merged.get_input_embeddings().weight is weight
    assert kept.get_input_embeddings().weight is not weight
