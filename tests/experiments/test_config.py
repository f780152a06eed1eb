import inspect
import itertools
import pickle

import pytest
import yaml

from fakit import Attention, Features, LayerMap, Outputs, Schedule, recipes, shrink
from fakit.experiments import Study, weights
from fakit.experiments.build import build_objective
from fakit.experiments.config import (
    ARMS,
    AttentionConfig,
    ExperimentConfig,
    FeaturesConfig,
    OutputsConfig,
    StudentConfig,
    TaskConfig,
    TeacherConfig,
    TrainingConfig,
)
from fakit.experiments.schema import settings
from fakit.layer_maps import STRATEGIES
from fakit.objective.balancing import GradientNorm, Uncertainty
from tests.families import tiny

FULL = ExperimentConfig(
    task=TaskConfig("glue/sst2", labels=500, seed=7, options={"text": "sentence", "nested": {"a": [1, 2]}}),
    teacher=TeacherConfig("some/model", adapter="data/adapters/x", quantize="8bit"),
    student=StudentConfig(
        layers=(1, 3, 5), hidden_size=64, heads=4, init="random", path="models/ünï", freeze_embeddings=True
    ),
    layer_map=((1, 2), (2, 4)),
    features=FeaturesConfig("cosine", 0.3),
    attention=AttentionConfig("mse", 10.0, "group-mean"),
    outputs=OutputsConfig("jsd", 4.0, 0.5),
    task_weight=None,
    training=TrainingConfig(7, 3, 0.25, 5e-5, "cosine", 2, 0.0, True, 4, 16, 1, 2, 3),
    seed=2**32 - 1,
    device="cuda:1",
    out="runs/here",
    name="my arm: 50 %",
    training_args={"optim": "adafactor", "max_grad_norm": 0.5, "optim_args": None},
)


def _variants():
    """Every combination of terms on and off, with the layer maps and task weights going round."""
    maps = itertools.cycle((*STRATEGIES, ((1, 1),), ((1, 6), (2, 3))))
    for n, (features, attention, outputs) in enumerate(itertools.product((True, False), repeat=3)):
        for layers, init in itertools.product((1, (2, 4)), ("copy", "random")):
            yield ExperimentConfig(
                student=StudentConfig(layers=layers, init=init),
                layer_map=next(maps),
                features=FeaturesConfig("normalized_mse", 1 / 3) if features else None,
                attention=AttentionConfig(weight=1e-7) if attention else None,
                outputs=OutputsConfig(temperature=n + 0.1) if outputs else None,
                task_weight=0.1 + n,
                training=TrainingConfig(learning_rate=10.0 ** -(n + 1), warmup=n),
                seed=n,
                name=None if n % 2 else "null",  # text that YAML would read as nothing unless quoted
            )


@pytest.mark.parametrize("config", [ExperimentConfig(), FULL, *_variants()], ids=lambda config: config.run_id)
def test_a_config_survives_yaml_and_dict_unchanged(config, tmp_path):
    config.to_yaml(tmp_path / "run.yaml")
    again = ExperimentConfig.from_yaml(tmp_path / "run.yaml")
    assert again == config
    assert again.run_id == config.run_id
    assert ExperimentConfig.from_dict(config.to_dict()) == config
    assert yaml.safe_load(config.to_yaml()) == config.to_dict()


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_a_config_goes_to_another_process_and_comes_back(recipe):
    config = ExperimentConfig(recipe=recipe, task_weight={"from": 1.0, "to": 0.5})
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert again.run_id == config.run_id


def test_full_config_differs_from_the_default_in_every_key():
    """Otherwise the round trip above would not notice a key that is never written."""

    def leaves(data, path=()):
        for key, value in data.items():
            yield from leaves(value, (*path, key)) if isinstance(value, dict) and value else [((*path, key), value)]

    default = dict(leaves(ExperimentConfig().to_dict()))
    assert {path for path, value in leaves(FULL.to_dict()) if default.get(path, "absent") == value} == set()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"trainng": {}}, ["trainng", "training", "layer_map", "Did you mean 'training'?"]),
        ({"training": {1: 3}}, ["training.1: unknown key at training"]),
        ({"outputs": {"loss": ["jsd"]}}, ["outputs.loss: found ['jsd'] (list)", "forward_kl"]),
        ({"outputs": {"parameters": None}}, ["outputs.parameters: found None (nothing), expected a mapping"]),
        ({"task": {"labels": True}}, ["task.labels", "True (yes/no)", "a whole number or all"]),
        ({"outputs": {"temperature": True}}, ["outputs.temperature", "True (yes/no)", "a number"]),
        ({"training": {"steps": "5"}}, ["training.steps", "'5' (text)"]),
        ({"training": {"step": 3}}, ["training.step:", "batch_size", "Did you mean 'steps'?"]),
        (
            {"outputs": {"loss": "foward_kl"}},
            ["outputs.loss", "'foward_kl'", "jsd", "Did you mean 'forward_kl'?"],
        ),
        ({"features": {"loss": "l7"}}, ["features.loss", "mse, cosine"]),
        ({"layer_map": "unifrom"}, ["layer_map", "all_to_one", "Did you mean 'uniform'?"]),
        ({"layer_map": [[1, 2], [3]]}, ["layer_map", "[[1, 2], [3]]", "pairs of whole numbers"]),
        ({"teacher": {"quantize": "8-bit"}}, ["teacher.quantize", "8bit, 4bit"]),
        ({"training": {"steps": "many"}}, ["training.steps", "'many' (text)", "a whole number"]),
        ({"training": {"steps": 2.5}}, ["training.steps", "2.5 (number)"]),
        ({"training": {"steps": True}}, ["training.steps", "True (yes/no)"]),
        ({"training": {"steps": 0}}, ["training.steps", "found 0", "at least 1"]),
        ({"training": {"bf16": 1}}, ["training.bf16", "true or false"]),
        ({"training": {"bf16": "fast"}}, ["training.bf16", "'fast'", "auto"]),
        ({"training": {"learning_rate": float("nan")}}, ["training.learning_rate", "a number"]),
        ({"training": {"labeled_fraction": 1.5}}, ["training.labeled_fraction", "at most 1.0"]),
        ({"training": {"warmup": 1.5}}, ["training.warmup", "1.5", "a share"]),
        ({"outputs": {"temperature": 0}}, ["outputs.temperature", "above 0.0"]),
        ({"features": {"weight": -1}}, ["features.weight", "at least 0.0"]),
        ({"features": "none"}, ["features", "a mapping with keys loss, weight", "Write null"]),
        ({"training": None}, ["training", "None (nothing)", "a mapping"]),
        ({"task": {"options": [1]}}, ["task.options", "a mapping"]),
        ({"device": "gpu"}, ["device", "'gpu'", "cuda:0"]),
        ({"training_args": {"optimizer": "sgd"}}, ["training_args.optimizer", "no such argument"]),
        ({"training_args": {"max_grad_nrom": 1.0}}, ["training_args.max_grad_nrom", "Did you mean 'max_grad_norm'?"]),
        ({"training_args": {"max_steps": 3}}, ["training_args.max_steps", "the key training.steps"]),
        ({"training_args": {"disable_tqdm": False}}, ["training_args.disable_tqdm", "set by the kit", "progress bar"]),
        ({"training_args": ["optim"]}, ["training_args", "a mapping"]),
        ({"seed": 2**32}, ["seed", "at most"]),
        ({"training": {"save_every": 5}}, ["training.save_every", "out"]),
        (
            {"features": None, "attention": {"weight": 0}, "outputs": None, "task_weight": 0},
            ["task_weight", "nothing to learn from"],
        ),
        ([], ["the top level", "[] (list)", "a mapping"]),
    ],
)
def test_a_wrong_key_or_value_is_answered_with_its_path_and_the_allowed_ones(data, words):
    with pytest.raises(ValueError) as error:
        ExperimentConfig.from_dict(data)
    assert [word for word in words if word not in str(error.value)] == []


def test_keyword_construction_is_checked_as_a_file_is():
    with pytest.raises(ValueError, match=r"outputs\.temperature: found -1"):
        OutputsConfig(temperature=-1)
    with pytest.raises(ValueError, match=r"student\.init: 'copied'.*Did you mean 'copy'"):
        StudentConfig(init="copied")


def test_yaml_numbers_without_a_point_are_numbers(tmp_path):
    (tmp_path / "run.yaml").write_text("training: {learning_rate: 5e-4}\nlayer_map: none\nfeatures: null\n")
    config = ExperimentConfig.from_yaml(tmp_path / "run.yaml")
    assert config.training.learning_rate == 0.0005
    assert config.layer_map == "none"
    assert config.features is None


def test_yaml_errors_name_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    with pytest.raises(ValueError, match=r"run\.yaml: no such file.*none"):
        ExperimentConfig.from_yaml(path)
    path.write_text("training: {steps: 0}")
    with pytest.raises(ValueError, match=r"run\.yaml: training\.steps: found 0"):
        ExperimentConfig.from_yaml(path)
    path.write_text("training: [unclosed")
    with pytest.raises(ValueError, match=r"run\.yaml: (?s:.*)expected ',' or ']'"):
        ExperimentConfig.from_yaml(path)
    path.write_text("features:\n  weight: 1\n  weight: 0.3\n")
    with pytest.raises(ValueError, match=r"weight: given twice, in lines 2 and 3"):
        ExperimentConfig.from_yaml(path)
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        ExperimentConfig.from_yaml(path)


def test_replace_reaches_nested_keys_and_leaves_the_original():
    config = ExperimentConfig()
    changed = config.replace(seed=3, features=None, outputs={"loss": "jsd"}, **{"training.steps": 5, "task.labels": 9})
    assert (changed.seed, changed.features, changed.outputs.loss) == (3, None, "jsd")
    assert (changed.training.steps, changed.task.labels) == (5, 9)
    assert changed.training.batch_size == config.training.batch_size
    assert config == ExperimentConfig()
    with pytest.raises(ValueError, match=r"trainin\.steps: unknown key.*Did you mean 'training'"):
        config.replace(**{"trainin.steps": 5})
    with pytest.raises(ValueError, match=r"training\.stepz: unknown key.*Did you mean 'steps'"):
        config.replace(**{"training.stepz": 5})
    with pytest.raises(ValueError, match="features: is None"):
        changed.replace(**{"features.weight": 1})


def test_run_id_is_stable_and_follows_the_content():
    config = ExperimentConfig(task=TaskConfig("scans"), seed=4)
    prefix, _, digest = config.run_id.rpartition("-")
    assert prefix == "scans-all-s4"
    assert len(digest) == 8 and int(digest, 16) >= 0
    assert config.replace(out="elsewhere").run_id == config.run_id
    others = {config.replace(seed=5).run_id, config.replace(**{"training.learning_rate": 1e-5}).run_id, config.run_id}
    assert len(others) == 3
    # pinned: a change of this hash makes every recorded run look as if it had not been run
    assert ExperimentConfig(training=TrainingConfig(bf16=False)).run_id == "glosses-all-s0-6cdbd107"
    assert ExperimentConfig().run_id == "glosses-all-s0-a8714ea8"


def test_arms_keep_their_terms_and_nothing_else():
    config = ExperimentConfig()
    for arm, terms in ARMS.items():
        assert config.with_arm(arm).transfers == terms
        assert config.with_arm(arm).arm == arm
        assert config.with_arm(arm).training == config.training
    assert config.replace(outputs=None).arm == "features+attention"
    assert config.replace(name="mine").arm == "mine"
    assert config.replace(features={"weight": 0}).transfers == ("attention", "outputs")
    with pytest.raises(ValueError, match=r"'al' is not one of none, outputs.*Did you mean 'all'"):
        config.with_arm("al")
    with pytest.raises(ValueError, match=r"arm 'all' needs the terms.*has features, outputs"):
        config.replace(attention=None).with_arm("all")


@pytest.mark.parametrize(
    ("section", "made"), [(FeaturesConfig, Features), (AttentionConfig, Attention), (OutputsConfig, Outputs)]
)
def test_a_file_says_of_a_term_all_that_python_says(section, made):
    python = {name: p.default for name, p in inspect.signature(made).parameters.items() if name != "more"}
    assert set(section.keys()) == set(python)
    for name, default in python.items():
        own = getattr(section(), name)
        assert own == (default if name != "parameters" else {}), name


EVERYTHING = """
layer_map: last
features: {loss: cosine, weight: 0.5, projection: null, layer_map: [[0, 0], [2, 3]]}
attention: {loss: relations, relations: [keys, values], relation_heads: 2, layer_map: first}
outputs: {loss: jsd, beta: 0.1, vocab_size: 2, chunked: false, temperature: 1.0}
terms:
  embeddings: {kind: features, loss: mse, layer_map: [[0, 0]], weight: 0.25}
  sharp: {kind: outputs, loss: reverse_kl, temperature: 1.0}
  contrast: {kind: "tests.objective.own_term:Contrastive", student_layer: 2, teacher_layer: 3, weight: 2.0}
"""


def test_every_setting_and_further_terms_come_from_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text(EVERYTHING)
    config = ExperimentConfig.from_yaml(tmp_path / "run.yaml")
    assert ExperimentConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["outputs"]["beta"] == 0.1
    teacher = tiny("bert")
    objective = build_objective(config, shrink(teacher, 2), teacher)
    assert list(objective.terms) == ["features", "attention", "outputs", "task", "embeddings", "sharp", "contrast"]
    features, attention, outputs = objective.features, objective.attention, objective.outputs
    assert (features.loss, features.projection, objective.map_of("features")) == (
        "cosine",
        None,
        LayerMap([(0, 0), (2, 3)]),
    )
    assert (attention.relations, attention.relation_heads) == (("keys", "values"), 2)
    assert objective.map_of("attention") == LayerMap.first(2, 3) and objective.layer_map == LayerMap.last(2, 3)
    assert (outputs.parameters, outputs.vocab_size, outputs.chunked) == ({"beta": 0.1}, 2, False)
    assert objective.weights == {
        "features": 0.5,
        "attention": 1,
        "outputs": 1,
        "task": 1,
        "embeddings": 0.25,
        "sharp": 1,
        "contrast": 2,
    }
    assert type(objective.terms["contrast"]).__name__ == "Contrastive"
    assert config.arm == "features+attention+outputs+embeddings+sharp+contrast"
    assert config.with_arm("outputs").terms == {}
    assert config.replace(**{"outputs.temperature": 3.0}).outputs.parameters == {"beta": 0.1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outputs: {loss: jsd, beta: 2}", "outputs: jsd mixes teacher and student with 0 < beta < 1, not 2"),
        ("outputs: {loss: forward_kl, beta: 0.1}", "outputs.beta: unknown key at outputs; the keys are loss"),
        ("features: {layer_map: [[-1, 2]]}", "features: "),
        ("features: {layer_map: lest}", "features.layer_map: 'lest' is not one of .* Did you mean 'last'"),
        ("attention: {relations: [queres]}", "attention: Attention.relations=.'queres'"),
        ("terms: {mine: 3}", r"terms.mine: found 3 \(whole number\), expected a mapping with a kind"),
        ("terms: {mine: {kind: feature}}", "terms.mine.kind: 'feature' is not one of .* Did you mean 'features'"),
        ("terms: {outputs: {kind: outputs}}", "terms.outputs: a further term has a name of its own"),
        (
            "terms: {mine: {kind: outputs, los: jsd}}",
            "terms.mine.los: unknown key at terms.mine; .* Did you mean 'loss'",
        ),
        ("terms: {mine: {kind: 'nowhere.at_all:Mine'}}", "terms.mine.kind: 'nowhere.at_all' cannot be imported"),
        ("terms: {mine: {kind: 'json:dumps'}}", "expected a subclass of fakit.Term"),
        (
            "terms: {mine: {kind: 'tests.objective.own_term:Contrastive', layer: 1}}",
            "takes student_layer, .*found layer",
        ),
    ],
)
def test_what_is_no_term_in_a_file_is_refused_by_its_key(text, message, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        ExperimentConfig.from_yaml(tmp_path / "run.yaml")


# -- schedules --------------------------------------------------------------------------------------------------------

SCHEDULED = """
training: {steps: 400}
features: {loss: mse, weight: {from: 1.0, to: 0.1, kind: cosine, start: 0, end: 200}}
attention: {weight: {from: 0, to: 2, kind: steps, milestones: [100, 300]}}
outputs: {loss: taid, temperature: {from: 4, to: 1}, t: {from: 0.4, to: 1.0}}
task_weight: {from: 0.0, to: 1.0, kind: warmup, end: 40}
terms:
  embeddings: {kind: features, layer_map: [[0, 0]], weight: {from: 0.5, to: 0}}
  contrast: {kind: "tests.objective.own_term:Contrastive", student_layer: 2, scale: {from: 5.0, to: 10.0}}
"""


def test_schedules_come_from_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text(SCHEDULED)
    config = ExperimentConfig.from_yaml(tmp_path / "run.yaml")
    assert ExperimentConfig.from_dict(config.to_dict()) == config
    assert ExperimentConfig.from_yaml(config.to_yaml(tmp_path / "b.yaml") and tmp_path / "b.yaml") == config
    assert config.to_dict()["features"]["weight"] == {"from": 1.0, "to": 0.1, "kind": "cosine", "end": 200}
    teacher = tiny("bert")
    objective = build_objective(config, shrink(teacher, 2), teacher)
    assert objective.schedules == {
        "features.weight": Schedule(1.0, 0.1, "cosine", end=200),
        "attention.weight": Schedule(0, 2, "steps", milestones=(100, 300)),
        "outputs.temperature": Schedule(4, 1),
        "outputs.t": Schedule(0.4, 1.0),
        "task.weight": Schedule(0.0, 1.0, "warmup", end=40),
        "embeddings.weight": Schedule(0.5, 0.0),
        "contrast.scale": Schedule(5.0, 10.0),
    }
    objective.set_step(100, of=400)
    assert dict(objective.weights) == pytest.approx(
        {"features": 0.55, "attention": 1, "outputs": 1, "task": 1, "embeddings": 0.375, "contrast": 1}
    )
    assert config.transfers == ("features", "attention", "outputs", "embeddings", "contrast")


def test_a_schedule_changes_by_its_keys_and_by_a_factor():
    config = ExperimentConfig.from_dict(yaml.safe_load(SCHEDULED))
    changed = config.replace(**settings(["features.weight.to=0.2", "outputs.temperature.kind=constant"]))
    assert changed.features.weight.build() == Schedule(1.0, 0.2, "cosine", end=200)
    assert changed.outputs.temperature.build() == Schedule(4, 1, "constant") and changed.run_id != config.run_id
    assert config.replace(**{"features.weight": 0.5}).features.weight == 0.5
    scheduled = ExperimentConfig().replace(**{"features.weight": {"from": 0.0, "to": 1.0}})
    assert scheduled.arm == "all" and scheduled.features.weight.build() == Schedule(0.0, 1.0)

    study = Study(config, vary={"low": {"features.weight.to": 0.05}} | weights({"features": [2], "embeddings": [4]}))
    low, _, twice, other = study.runs()[:4]
    assert low.features.weight.build() == Schedule(1.0, 0.05, "cosine", end=200)
    assert twice.features.weight.build() == Schedule(2.0, 0.2, "cosine", end=200)
    assert other.terms["embeddings"]["weight"] == {"from": 2.0, "to": 0.0, "kind": "linear"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("features: {weight: {from: 1.0}}", "features.weight.to: missing at features.weight"),
        ("features: {weight: {from: 1.0, too: 2}}", "features.weight.too: unknown key .* Did you mean 'to'"),
        ("features: {weight: {from: 1, to: 0, kind: cosin}}", "features.weight.kind: 'cosin' is not one of linear"),
        ("features: {weight: {from: 1, to: -1}}", r"features.weight: Schedule\(1.0, -1.0, 'linear'\): end_value is -1"),
        ("features: {weight: {from: 1, to: 0, end: 0}}", "features.weight.end: found 0, expected a value at least 1"),
        ("features: {weight: {from: 1, to: 0, start: 9, end: 5}}", "features.weight: .*it ends at step 5"),
        ("features: {weight: [1, 0]}", "features.weight: found .*expected a number or a mapping with keys from, to"),
        (
            "outputs: {temperature: {from: 1, to: 0}}",
            "outputs.temperature: found 0, expected a value of 0.001 at least",
        ),
        ("outputs: {loss: taid, t: {from: 0, to: 2}}", "outputs: taid goes from"),
        ("task_weight: {from: 1, to: 0, kind: steps}", r"task_weight: .*found milestones \[\]"),
        ("terms: {x: {kind: features, weight: {from: 1, to: 0, kind: x}}}", "terms.x.weight.kind: 'x' is not one of"),
        (
            "features: {weight: {from: 1, to: 0, start: 900}}",
            "features.weight: .*starts at step 900, and training ends",
        ),
        (
            "{features: {weight: {from: 0, to: 0}}, attention: null, outputs: null, task_weight: 0}",
            "nothing to learn from",
        ),
    ],
)
def test_what_is_no_schedule_in_a_file_is_refused_by_its_key(text, message):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig.from_dict(yaml.safe_load(text))


# -- balancing --------------------------------------------------------------------------------------------------------


def test_balancing_comes_from_a_file():
    teacher = tiny("bert")
    for given, kind, settings_ in (
        ("uncertainty", Uncertainty, {"kind": "uncertainty", "learning_rate": 0.01}),
        ({"kind": "uncertainty", "learning_rate": 0.1}, Uncertainty, {"kind": "uncertainty", "learning_rate": 0.1}),
        ({"kind": "gradient_norm", "every": 5}, GradientNorm, {"kind": "gradient_norm", "every": 5, "momentum": 0.9}),
    ):
        config = ExperimentConfig.from_dict({"balancing": given})
        assert ExperimentConfig.from_dict(config.to_dict()) == config and config.run_id != ExperimentConfig().run_id
        balancing = build_objective(config, shrink(teacher, 2), teacher).balancing
        assert type(balancing) is kind and balancing.describe() == settings_
    assert config.replace(**{"balancing.every": 7}).balancing.every == 7
    assert "balancing" not in ExperimentConfig().to_dict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gradnorm", "balancing.kind: 'gradnorm' is not one of uncertainty, gradient_norm"),
        ({"every": 5}, "balancing.kind: missing at balancing"),
        ({"kind": "uncertainty", "every": 5}, "balancing.every: uncertainty has no such key; it takes learning_rate"),
        ({"kind": "gradient_norm", "momentum": 1}, "balancing.momentum: found 1, expected a value below 1"),
        (3, "balancing: found 3 .whole number., expected a mapping with keys kind"),
    ],
)
def test_what_is_no_balancing_in_a_file_is_refused_by_its_key(given, message):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig.from_dict({"balancing": given})
