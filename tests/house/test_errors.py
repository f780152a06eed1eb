"""Every error of the contract: raised before any work, with what was asked, what was found on both sides,
and the fix.
"""

import json
import math

import pytest
import torch
from transformers import TrainingArguments

from fakit import (
    Attention,
    DistillationTrainer,
    Features,
    LayerMap,
    Objective,
    Outputs,
    Task,
    TeacherCache,
    Trace,
    capture,
    load_teacher,
    shrink,
)
from fakit.experiments.store import RunStore
from tests.families import batch, tiny, tokenizer


def idle(model):
    """The model, which must not be run any more: doing so is an error of another kind."""

    def work(*_):
        raise AssertionError("the model was run before the error was found")

    model.register_forward_pre_hook(work)
    return model


def make_trainer(teacher, student, objective, tmp_path, **kwargs) -> DistillationTrainer:
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    return DistillationTrainer(idle(teacher), idle(student), objective, args=args, **kwargs)


def refuses(message: str):
    return pytest.raises(ValueError, match=message)


# -- teacher and student do not fit ------------------------------------------------------------------------------------


def test_vocabulary_sizes_differ(tmp_path):
    teacher, student = tiny("gpt2"), tiny("gpt2", vocab_size=56)
    with refuses(r"vocabulary \(logits\): teacher has 50, student has 56.*Outputs\(vocab_size=50\) cuts both"):
        make_trainer(teacher, student, Objective(outputs=Outputs()), tmp_path)
    teacher = tiny("gpt2")
    make_trainer(teacher, student, Objective(outputs=Outputs(vocab_size=50)), tmp_path)  # the fix it names
    ours, theirs = Trace(logits=torch.zeros(1, 3, 56)), Trace(logits=torch.zeros(1, 3, 50))
    with refuses(r"the student's logits have 56 entries, the teacher's 50\. .*vocab_size=50.* tokenizers differ"):
        Objective(outputs=Outputs())(ours, theirs)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            (1, 7),
            r"layer 7 asked of a 6-layer teacher \(pair \(1, 7\).*student has layers 0…3, the teacher 0…6\. .*uniform\(3, 6\) fits",
        ),
        (
            (5, 6),
            r"layer 5 asked of a 3-layer student \(pair \(5, 6\).*student has layers 0…3, the teacher 0…6\. .*uniform\(3, 6\) fits",
        ),
    ],
)
@pytest.mark.parametrize("where", ["objective", "term"])
def test_a_layer_that_a_model_does_not_have(pair, message, where, tmp_path):
    teacher = tiny("bert", num_hidden_layers=6)
    student = shrink(teacher, 3)
    own = LayerMap([pair])
    objective = Objective(own, Features()) if where == "objective" else Objective(attention=Attention(layer_map=own))
    with refuses(message):
        make_trainer(teacher, student, objective, tmp_path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"hidden_states": [2, 7]},
            r"hidden state of layer 7 asked of a 6-layer model \(BertForSequenceClassification\); it has layers 0…6",
        ),
        ({"attentions": [7]}, r"attention of layer 7 asked of a 6-layer model .*it has layers 1…6"),
        ({"attentions": [0]}, r"attention of layer 0 asked of a 6-layer model .*it has layers 1…6 \(0 = embeddings"),
        ({"hidden_states": [-1]}, r"hidden state of layer -1 asked of a 6-layer model"),
    ],
)
def test_capturing_a_layer_that_the_model_does_not_have(asked, message):
    with refuses(message):
        capture(idle(tiny("bert", num_hidden_layers=6)), batch(), **asked)


def test_teacher_and_student_tokenize_differently(tmp_path):
    teacher = tiny("bert")
    student = shrink(teacher, 2)
    objective = Objective(LayerMap.uniform(2, 3), Features())
    one, other = tokenizer("students align layers"), tokenizer("layers align students")
    with refuses(
        r"tokenizer: teacher has \w+ of 4: .*, student has \w+ of 4: .*tokenize differently.*use the teacher's tokenizer"
    ):
        make_trainer(teacher, student, objective, tmp_path, teacher_tokenizer=one, processing_class=other)
    make_trainer(teacher, student, objective, tmp_path, teacher_tokenizer=one, processing_class=one)


def test_a_student_that_saw_another_batch():
    traces = [Trace(hidden_states={1: torch.zeros(2, t, 4)}, mask=torch.ones(2, t, dtype=torch.bool)) for t in (5, 6)]
    with refuses(r"the student saw \(2, 5\) tokens, the teacher \(2, 6\) \(B, T\): both must be given the same batch"):
        Objective(LayerMap([(1, 1)]), Features())(*traces)


def test_widths_differ_and_no_projection(tmp_path):
    teacher = tiny("bert")
    student = shrink(teacher, 2, hidden_size=16)
    objective = Objective(LayerMap.uniform(2, 3), Features(projection=None))
    with refuses(r"the student is 16 wide, the teacher 32, and Features\(projection=None\).*use projection='linear'"):
        make_trainer(teacher, student, objective, tmp_path)
    with refuses("student layer 1 is 16 wide, teacher layer 2 is 32 wide.*use Features.*projection='linear'"):
        objective.prepare(16, 32)
    ours, theirs = (Trace(hidden_states={i: torch.zeros(1, 3, d) for i in range(4)}) for d in (16, 32))
    with refuses("student layer 1 is 16 wide, teacher layer 2 is 32 wide"):
        objective(ours, theirs)
    # a control without any pair compares no widths and no heads
    none = Objective(LayerMap.none(2, 3), Features(projection=None), Attention(), outputs=Outputs())
    make_trainer(tiny("bert"), student, none, tmp_path)


def test_a_projection_for_other_models():
    objective = Objective(LayerMap([(1, 1)]), Features()).prepare(16, 32)
    ours, theirs = Trace(hidden_states={1: torch.zeros(1, 3, 8)}), Trace(hidden_states={1: torch.zeros(1, 3, 32)})
    with refuses("S1←T1 maps 16 → 32, and the student is 8 wide, the teacher 32: .*make a new one"):
        objective(ours, theirs)


def test_heads_differ_under_one_to_one(tmp_path):
    teacher = tiny("bert")
    student = shrink(teacher, 2, heads=2)
    with refuses(
        r"the student has 2 heads, the teacher 4\. Use Attention\(\.\.\., heads='group-mean' or 'best-match'\), Attention\('relations'\), or shrink\(teacher, heads=4\)"
    ):
        make_trainer(teacher, student, Objective(LayerMap.uniform(2, 3), attention=Attention()), tmp_path)
    ours, theirs = (Trace(maps={1: torch.full((1, h, 3, 3), 1 / 3)}) for h in (2, 4))
    with refuses("at S1←T1: the student has 2 heads, the teacher 4.*group-mean"):
        Objective(LayerMap([(1, 1)]), attention=Attention())(ours, theirs)
    grouped = Objective(LayerMap.uniform(2, 3), attention=Attention(heads="group-mean"))
    make_trainer(tiny("bert"), student, grouped, tmp_path)  # the fix it names


def test_a_student_with_nothing_to_train_and_other_labels(tmp_path):
    teacher, objective = tiny("bert"), Objective(outputs=Outputs())
    with refuses(r"trainable: .*student has no\. The student has nothing to train: student\.requires_grad_\(True\)"):
        make_trainer(teacher, tiny("bert").requires_grad_(False), objective, tmp_path)
    more = tiny("bert", id2label={0: "a", 1: "b", 2: "c"})
    with refuses(r"labels: teacher has 2: LABEL_0, LABEL_1, student has 3: a, b, c\. Load both with the same labels"):
        make_trainer(tiny("bert"), more, objective, tmp_path)


# -- batches and numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["features", "attention", "outputs"])
def test_no_valid_position_in_the_whole_batch(term):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    made = Trace({1: torch.ones(2, 3, 4)}, maps={1: torch.ones(2, 1, 3, 3)}, logits=torch.zeros(2, 3, 5), mask=mask)
    terms = {"features": Features(), "attention": Attention(), "outputs": Outputs()}
    with refuses("no valid position in the whole batch: all 6 entries of the mask are False.*collator.*inverted mask"):
        Objective(LayerMap([(1, 1)]), **{term: terms[term]})(made, made)


def test_nan_in_a_term_names_the_term_and_the_layer():
    good, bad = torch.ones(1, 3, 4), torch.full((1, 3, 4), math.nan)
    objective = Objective(LayerMap([(1, 1), (2, 2)]), Features(), outputs=Outputs())
    ours = Trace({1: good, 2: bad}, logits=torch.zeros(1, 5), mask=torch.ones(1, 3, dtype=torch.bool))
    theirs = Trace({1: good, 2: good}, logits=torch.zeros(1, 5), mask=ours.mask)
    with refuses(r"the features term is nan at S2←T2\. If .*learning rate.*bf16"):
        objective(ours, theirs)
    ours.hidden_states[2], ours.logits = good, torch.full((1, 5), math.nan)
    with refuses(r"the outputs term is nan\. If"):
        objective(ours, theirs)
    ours.logits = torch.zeros(1, 5)
    objective(ours, theirs).check()
    objective.weights["features"] = 0.0  # what is off cannot spoil the rest
    ours.hidden_states[2] = bad
    assert objective(ours, theirs).total.item() == 0.0


def test_traces_that_do_not_hold_what_is_compared():
    full = Trace({1: torch.ones(1, 3, 4)}, logits=torch.zeros(1, 5), name="BertModel")
    with refuses(
        r"hidden_states of layer 2 asked of a trace of BertModel that holds layers \[1\]; .*hidden_states=\[2\]"
    ):
        Objective(LayerMap([(1, 2)]), Features())(full, full)
    with refuses("output matching needs logits, and the teacher's trace has none; .*logits=True"):
        Objective(outputs=Outputs())(full, Trace())
    with refuses("the task's loss needs logits, and the student's trace has none; .*logits=True"):
        Objective(task=Task())(Trace(), None, torch.zeros(1))
    with refuses(r"compares with a teacher, and no teacher trace was given"):
        Objective(outputs=Outputs())(full)
    with refuses(r"labels \(2,\) do not fit logits \(1, 5\)"):
        Objective(task=Task())(full, None, torch.zeros(2, dtype=torch.long))


def test_objectives_with_nothing_to_compute():
    with refuses("at least one of features, attention, outputs and task"):
        Objective(LayerMap.uniform(2, 3))
    objective = Objective(LayerMap([(1, 1)]), Features(), task=Task())
    objective.weights["features"] = 0
    with refuses(r"nothing to compute: weights \{'features': 0\.0, 'task': 1\.0\}, 1 layer pairs, labels missing"):
        objective(Trace({1: torch.ones(1, 3, 4)}), Trace({1: torch.ones(1, 3, 4)}))


def test_soft_labels_of_a_single_output_say_nothing():
    one = Trace(logits=torch.zeros(3, 1))
    with refuses(r"forward_kl over a single output is 0 whatever .*for regression use Outputs\('logit_mse'\)"):
        Objective(outputs=Outputs())(one, one)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Features("euclid"),
            r"Features\('euclid'\) is not known; choose one of \['mse', 'cosine', .*or pass a function",
        ),
        (
            lambda: Attention("js"),
            r"Attention\('js'\) is not known; choose one of \['kl', 'mse', 'score_mse', 'relations', 'minilm'\]",
        ),
        (
            lambda: Outputs("kl"),
            r"Outputs\('kl'\) is not known; choose one of \['forward_kl', 'reverse_kl', 'jsd', 'logit_mse', 'skew",
        ),
        (lambda: Features(projection="l1"), "projection='l1'.*choose one of 'linear', 'orthogonal', 'mlp', or None"),
        (lambda: Attention(heads="max"), "heads='max'.*choose 'one-to-one', 'group-mean' or 'best-match'"),
        (lambda: Outputs(temperature=0), "temperature=0.*finite and above 0"),
    ],
)
def test_unknown_choices_name_the_known_ones(make, message):
    with refuses(message):
        make()


def test_weights_of_terms_that_are_not_there():
    objective = Objective(outputs=Outputs())
    with refuses(r"no term 'features' in this objective.*terms: \['outputs'\]"):
        objective.weights["features"] = 1.0
    with refuses(r"terms stay; objective\.weights\['outputs'\] = 0 switches it off"):
        del objective.weights["outputs"]


def test_a_batch_without_inputs():
    with refuses(
        r"a batch holds input_ids.*this one holds \['attention_mask', 'labels'\].*the tokenizer or the collator"
    ):
        capture(idle(tiny("bert")), {"attention_mask": torch.ones(1, 3), "labels": torch.ones(1)})


def test_attention_that_cannot_be_had():
    import transformers as hf

    mamba = hf.MambaForCausalLM._from_config(hf.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2))
    mamba.config._attn_implementation = "eager"
    with refuses("attention asked of MambaForCausalLM, which gives no attention maps.*attention=None"):
        capture(idle(mamba), batch(), attentions=[1])


def test_reentrant_checkpointing_would_train_nothing(tmp_path):
    teacher = tiny("bert")
    args = TrainingArguments(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    with refuses(r"use_reentrant=True runs the student's blocks without graph.*leave use_reentrant out"):
        DistillationTrainer(idle(teacher), idle(shrink(teacher, 2)), Objective(outputs=Outputs()), args=args)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    return [{"input_ids": [3, 4, 5, 6 + i], "attention_mask": [1, 1, 1, 1]} for i in range(3)]


def test_a_cache_of_another_teacher_data_set_or_version(rows, tmp_path):
    teacher = tiny("bert")
    TeacherCache.build(tmp_path, teacher, rows, hidden_states=[2])
    other = tiny("bert", seed=1)
    with refuses("another teacher weights"):
        TeacherCache.open(tmp_path, idle(other), rows)
    with refuses("another tokenized data"):
        TeacherCache.open(tmp_path, idle(teacher), rows[::-1])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with refuses("another format version: it has 99"):
        TeacherCache.open(tmp_path, teacher, rows)


def test_truncated_and_corrupt_files(rows, tmp_path):
    TeacherCache.build(tmp_path / "cache", tiny("bert"), rows, hidden_states=[2])
    shard = next((tmp_path / "cache").glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-9])
    with refuses("truncated"):
        TeacherCache.open(tmp_path / "cache")
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    with refuses("corrupt"):
        TeacherCache.open(tmp_path / "cache")
    tiny("gpt2").save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with refuses("weights at .*model are truncated or damaged"):
        load_teacher(tmp_path / "model")


def test_a_directory_that_is_no_run(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with refuses(r"no runs directory: .*found notes\.txt"):
        RunStore(tmp_path)
    with refuses(r"no teacher cache"):
        TeacherCache.open(tmp_path)
    with refuses(r"holds no config\.json"):
        load_teacher(tmp_path)


def test_a_directory_that_is_no_checkpoint(tmp_path):
    teacher = tiny("bert")
    objective = Objective(LayerMap.uniform(2, 3), Features())
    trainer = make_trainer(teacher, shrink(teacher, 2), objective, tmp_path / "run", train_dataset=[{"input_ids": [1]}])
    trainer.save_model(str(tmp_path / "exported"))
    with refuses(
        "exported is no checkpoint of a DistillationTrainer: projections.safetensors, objective.json "
        "missing.*checkpoint-N"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "exported"))


def test_nothing_loads_pickles_and_remote_code_is_off(tmp_path):
    model = tiny("gpt2")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with refuses("could not be loaded as a causal-lm model"):
        load_teacher(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('remote code ran')")
    with refuses("trust_remote_code"):
        load_teacher(tmp_path)
