import warnings
from pathlib import Path

import pytest

from fakit.experiments import ExperimentConfig, RunStore, Study, arms, maps, weights
from fakit.experiments import study as study_module
from fakit.experiments.baselines import evaluate_baselines, prepare_run
from fakit.experiments.config import ARMS, StudentConfig
from fakit.experiments.run import run_experiment
from fakit.experiments.study import equal_compute_steps
from fakit.experiments.vary import KINDS, grid, published, read_vary


@pytest.fixture
def small(config):
    return Study(
        config.replace(**{"training.steps": 2}), vary=arms(["none", "all"]), seeds=range(2), equal_compute=["none"]
    )


def _without_training(monkeypatch, score=0.5, fail_at=None):
    """Runs and baselines that record what they were asked for; returns the list of run ids in order."""
    asked = []

    def run(config, store, progress=True, **_):
        if fail_at is not None and len(asked) == fail_at:
            raise RuntimeError("power cut")
        asked.append(config.run_id)
        per_step = 100.0 if "none" in config.arm else 160.0
        record = {"run_id": config.run_id, "task": config.task.name, "arm": config.arm, "seed": config.seed}
        record |= {"score": score, "flops_per_step": per_step, "flops": per_step * config.training.steps}
        RunStore.open(store).append_run(record)
        return type("Result", (), {"student": None, "__str__": lambda self: config.run_id})()

    def baselines(config):
        asked.append(f"baselines {config.seed}")
        ids = [study_module.baseline_id(config, arm) for arm in ("teacher", "untrained")]
        return [{"run_id": run_id, "task": "t", "arm": "a", "metric": "accuracy", "score": 0.1} for run_id in ids]

    monkeypatch.setattr(study_module, "run_experiment", run)
    monkeypatch.setattr(study_module, "evaluate_baselines", baselines)
    monkeypatch.setattr(study_module, "prepare_run", lambda _: None)
    return asked


def test_a_small_study_runs_to_the_end(small, tmp_path, capsys):
    store = small.run(tmp_path / "runs")
    runs = store.runs()
    trained = runs[runs["kind"] == "run"]
    steps = trained.groupby("arm")["steps"].unique().map(list).to_dict()
    assert steps.keys() == {"none", "all", "none, equal compute"}
    assert steps["none"] == steps["all"] == [2]
    assert trained.groupby("arm")["seed"].apply(list).map(sorted).to_dict() == {arm: [0, 1] for arm in steps}
    # what equal compute means: the totals agree to within a step
    first = trained[trained["seed"] == 0].set_index("arm")
    equal = first.loc["none, equal compute"]
    assert abs(equal["steps"] * first.loc["none", "flops_per_step"] - first.loc["all", "flops"]) <= (
        first.loc["none", "flops_per_step"] / 2
    )
    assert equal["steps"] > 2
    baselines = runs[runs["kind"] == "baseline"]
    assert list(zip(baselines["arm"], baselines["seed"], strict=True)) == [("teacher", 0), ("untrained", 0)]
    out = capsys.readouterr().out.splitlines()
    assert sum("[" in line and "test accuracy" in line for line in out) == 6
    # again: nothing is left to do
    small.run(tmp_path / "runs")
    assert len(RunStore(tmp_path / "runs")) == len(store)
    assert capsys.readouterr().out.splitlines() == [
        f"4 of 4 runs are recorded in {tmp_path / 'runs'}; 0 to go.",
        f"2 of 2 runs are recorded in {tmp_path / 'runs'}; 0 to go.",
    ]


def test_two_workers_give_what_one_gives_and_what_a_run_of_its_own_gives(small, tmp_path):
    # recipes with schedules and further terms: their schemas are made at run time
    study = small.replace(vary=published(["taid", "jasper"], none=False), equal_compute=(), baselines=False)
    alone = study.run(tmp_path / "one", progress=False).runs().set_index("run_id").sort_index()
    side_by_side = study.run(tmp_path / "two", workers=2, progress=False).runs().set_index("run_id").sort_index()
    assert side_by_side["score"].to_dict() == alone["score"].to_dict()
    assert side_by_side["flops"].to_dict() == alone["flops"].to_dict()
    last = study.runs()[-1]
    own = run_experiment(last, progress=False)
    assert own.test == RunStore(tmp_path / "one").record(last.run_id)["test"]


def test_what_runs_share_is_loaded_once_for_each_task_and_seed(small, tmp_path, monkeypatch):
    loaded = []

    def load(config):
        loaded.append(config.seed)
        return prepare_run(config)

    monkeypatch.setattr(study_module, "prepare_run", load)
    store = small.replace(equal_compute=(), baselines=False, count_flops=False).run(tmp_path, progress=False)
    assert loaded == [0, 1] and len(store) == 4
    assert {record["flops"] for record in store.records()} == {None}


def test_a_stopped_study_goes_on_where_it_was(small, tmp_path, monkeypatch, capsys):
    asked = _without_training(monkeypatch, fail_at=4)
    with pytest.raises(RuntimeError, match="power cut") as error:
        small.run(tmp_path)
    assert "seed 1" in str(error.value.__notes__)
    before = list(asked)
    asked_again = _without_training(monkeypatch)
    small.run(tmp_path)
    assert before[0] == "baselines 0" and len(before) == 4
    assert not set(before) & set(asked_again)
    plain = [config.run_id for config in small.runs()]
    assert before[1:] + asked_again[:1] == plain
    assert [run_id.rsplit("-", 2)[0] for run_id in asked_again[1:]] == [
        plain[0].rsplit("-", 2)[0] + "-equal-compute"
    ] * 2
    assert "3 of 4 runs are recorded" in capsys.readouterr().out


def test_equal_compute_steps_by_hand(small, tmp_path, monkeypatch):
    assert equal_compute_steps({"flops_per_step": 100.0}, {"flops_per_step": 1.0, "flops": 320.0}) == 3
    assert equal_compute_steps({"flops_per_step": 100.0}, {"flops_per_step": 1.0, "flops": 10.0}) == 1
    with pytest.raises(ValueError, match="x has no FLOPs per step"):
        equal_compute_steps({"run_id": "x", "flops_per_step": None}, {"flops_per_step": 1.0, "flops": 1.0})
    _without_training(monkeypatch)
    study = small.replace(base=small.base[0].replace(**{"training.steps": 50}), seeds=(7, 8))
    store = study.run(tmp_path, progress=False)
    configs = study.equal_compute_runs(store)
    assert [(c.seed, c.training.steps, c.arm, c.transfers) for c in configs] == [
        (7, 80, "none, equal compute", ()),
        (8, 80, "none, equal compute", ()),
    ]
    with pytest.raises(ValueError, match=r"s9-.* is not recorded in"):
        study.replace(seeds=(9,)).equal_compute_runs(store)


def test_equal_compute_is_that_of_the_arm_that_costs_most(config, tmp_path, monkeypatch):
    _without_training(monkeypatch)
    vary = {"as it is": {}, "longer": {"training.steps": 30}, "none": {"layer_map": "none"}}
    study = Study(config.replace(**{"training.steps": 20}), vary, seeds=[0], equal_compute=["none", "longer"])
    store = study.run(tmp_path, progress=False)
    steps = {run.arm: run.training.steps for run in study.equal_compute_runs(store)}
    assert steps == {"none, equal compute": 48, "longer, equal compute": 30}  # 30 · 160 = 48 · 100


def test_runs_go_seed_by_seed_through_all_tasks(config):
    other = config.replace(**{"task.name": "glosses"})
    study = Study((config, other), arms(), seeds=(5, 6))
    order = [(run.seed, run.task.name, run.arm) for run in study.runs()]
    assert order == [
        (seed, task, arm)
        for seed in (5, 6)
        for task in (config.task.name, "glosses")
        for arm in ("none", "outputs", "features", "attention", "all")
    ]
    assert str(study) == "2 tasks × 5 arms × 2 seeds = 20 runs"
    assert "Arms: none, outputs" in study._repr_markdown_()


def test_arms_are_changes_or_functions_and_named_by_their_keys(config):
    study = Study(
        config,
        vary={
            "low": {"features.weight": 0.1, "training.learning_rate": 1e-3},
            "by seed": lambda config, seed: {"layer_map": [[1, 1 + seed]]},
            "whole": lambda config, seed: config.replace(outputs=None, name="another name"),
            "all": {},
        },
        seeds=range(2),
    )
    low, by_seed, whole, as_it_is = study.runs()[4:]
    assert [run.arm for run in study.runs()[:4]] == ["low", "by seed", "whole", "all"]
    assert low.features.weight == 0.1 and low.seed == 1
    assert by_seed.layer_map == ((1, 2),)
    assert whole.outputs is None and whole.name == "whole"
    assert as_it_is == config.replace(seed=1)  # its terms say "all": the id is that of the run outside of the study


def test_the_random_map_of_maps_is_of_the_seed(config):
    runs = Study(config, maps(2, 4), seeds=range(3)).runs()
    by_arm = {arm: [run.layer_map for run in runs if run.arm == arm] for arm in maps(2, 4)}
    assert len(set(by_arm["random"])) > 1 and by_arm["reverse"] == [((1, 4), (2, 2))] * 3
    assert by_arm["none"] == ["none"] * 3 and len(by_arm) == 6 + 3


def test_weights_reach_every_term_and_hold_the_others(config):
    config = config.replace(terms={"embeddings": {"kind": "features", "layer_map": [[0, 0]], "weight": 0.5}})
    vary = weights({"outputs": [2], "task": (0.5,), "embeddings": [4]})
    default, outputs, task, embeddings = Study(config, vary, seeds=[0]).runs()
    assert default.replace(name=None) == config
    assert outputs.outputs.weight == 2 and outputs.replace(name=None, **{"outputs.weight": 1}) == config
    assert task.task_weight == 0.5 and task.replace(name=None, task_weight=1) == config
    assert embeddings.terms["embeddings"]["weight"] == 2 and config.terms["embeddings"]["weight"] == 0.5


def test_study_files_name_experiments_or_hold_them(tmp_path):
    base = ExperimentConfig(student=StudentConfig(layers=1))
    base.to_yaml(tmp_path / "base.yaml")
    (tmp_path / "study.yaml").write_text(
        "base: [base.yaml, {task: {name: reviews}}]\nvary: {low: {features.weight: 0.1}}\nseeds: [3, 4]\n"
    )
    study = Study.from_yaml(tmp_path / "study.yaml")
    assert study.base == (base, ExperimentConfig().replace(**{"task.name": "reviews"}))
    assert (study.seeds, study.equal_compute, study.baselines) == ((3, 4), (), True)
    study.to_yaml(tmp_path / "whole.yaml")
    assert Study.from_yaml(tmp_path / "whole.yaml") == study
    with pytest.raises(ValueError, match=r"vary\.none: is a function, which no file can hold"):
        study.replace(vary=arms()).to_yaml()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_makes_of_a_kind_what_python_makes(kind):
    options = {
        "arms": {"names": ["none", "all"]},
        "maps": {"student_layers": 2, "teacher_layers": 4},
        "weights": {"factors": {"task": [2]}},
        "recipes": {"names": ["pkd", "gkd"]},
        "grid": {
            "student": {"deep": {}, "flat": {"student": {"layers": 1}}},
            "loss": {"kl": {}, "jsd": {"outputs.loss": "jsd"}, "none": {"outputs": None, "training.steps": 9}},
        },
    }[kind]
    made = Study(ExperimentConfig(), KINDS[kind](**options)).runs()
    assert Study.from_dict({"base": {}, "vary": {"kind": kind, **options}}).runs() == made


def test_a_grid_makes_every_combination_and_refuses_what_is_not_one():
    levels = {"way": {"a": {"seed": 3}, "b": {}}, "rank": {"x": {}, "y": {"outputs.weight": 2.0}}}
    assert grid(**levels) == {"a, x": {"seed": 3}, "a, y": {"seed": 3, "outputs.weight": 2.0}, "b, x": {}} | {
        "b, y": {"outputs.weight": 2.0}
    }
    for wrong, said in (
        ({"way": levels["way"]}, "found way; one factor alone is a mapping of arms"),
        ({**levels, "rank": {"x": {}}}, r"grid\.rank: found .*, expected at least two levels"),
        ({**levels, "rank": {"x": {}, "y, z": {}}}, "the level 'y, z' is no name, which is text without a comma"),
        ({**levels, "rank": {"x": {}, "y": 2}}, r"grid\.rank\.y: found 2, expected changes"),
        ({**levels, "rank": {"x": {}, "y": {"seed": 4}}}, "seed is changed by way and by rank; let one of them do it"),
    ):
        with pytest.raises(ValueError, match=said):
            grid(**wrong)


def test_a_grid_leaves_out_what_is_named():
    levels = {"start": {"deep": {}, "flat": {"student.layers": 1}}, "terms": {"all": {}, "none": {"outputs": None}}}
    made = read_vary({"kind": "grid", **levels, "without": [{"start": "flat", "terms": "none"}]})
    assert list(made) == ["deep, all", "deep, none", "flat, all"]
    assert list(grid(without=[{"terms": "all"}], **levels)) == ["deep, none", "flat, none"]
    for aside, words in (
        ({"terms": "features"}, r"grid.without\[0\].terms: 'features' is not in the grid, which has all, none"),
        ({"begin": "deep"}, r"grid.without\[0\].begin: 'deep' is not in the grid, which has start, terms"),
        ({}, r"grid.without\[0\]: found {}, expected levels by factor"),
    ):
        with pytest.raises(ValueError, match=words):
            grid(without=[aside], **levels)
    with pytest.raises(ValueError, match="leaves no combination"):
        grid(without=[{"start": "deep"}, {"start": "flat"}], **levels)


def test_runs_of_the_same_data_come_together(config):
    """Whatever the order of the factors: what they share is loaded once."""
    data = {"few": {"task.labels": 6}, "many": {"task.labels": 12}}
    vary = read_vary({"kind": "grid", "terms": {"all": {}, "none": {"outputs": None}}, "data": data})
    runs = Study(config, vary, seeds=[0, 1]).runs()
    assert [(run.seed, run.task.labels) for run in runs] == [(s, n) for s in (0, 1) for n in (6, 6, 12, 12)]
    assert [run.arm for run in runs[:4]] == ["all, few", "none, few", "all, many", "none, many"]


def test_what_cells_are_compared_with_is_a_level(config):
    vary = read_vary(
        {"kind": "grid", "terms": {"all": {}, "soft": {"features": None}}, "x": {"a": {}, "b": {"seed": 0}}}
    )
    with pytest.raises(
        ValueError, match="against: 'outputs' was to be compared with in every cell, and is a level of no"
    ):
        Study(config, vary, seeds=[0], against="outputs")
    assert Study(config, vary, seeds=[0], against="soft").against == "soft"


def test_a_kind_without_options_is_its_name():
    assert list(Study.from_dict({"base": {}, "vary": "arms"}).vary) == list(ARMS)


def test_the_file_of_before_is_read_with_a_warning(tmp_path):
    text = "experiments: [{}]\narms: [none, outputs]\nseeds: [0]\n"
    (tmp_path / "old.yaml").write_text(text)
    with pytest.warns(FutureWarning) as said:
        old = Study.from_yaml(tmp_path / "old.yaml")
    assert {str(warning.message).split(" is called")[0] for warning in said} == {"experiments", "arms"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = Study(ExperimentConfig(), arms(["none", "outputs"]), seeds=[0], equal_compute=["none"])
    assert (old.runs(), old.equal_compute) == (new.runs(), new.equal_compute)
    (tmp_path / "old.yaml").write_text("maps: increasing\nexperiments: [{}]\ntexts: 512\n")
    with (
        pytest.warns(FutureWarning, match="experiments is called base"),
        pytest.raises(ValueError, match=r"maps: is of before.*vary: \{kind: maps, student_layers: 3"),
    ):
        Study.from_yaml(tmp_path / "old.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vary: arms", ["base", "missing"]),
        ("vary: {kind: arms, names: [none, al]}", ["vary: arms", "'al'", "Did you mean 'all'?"]),
        ("vary: {kind: arms, names: [none, none]}", ["vary: arms", "twice"]),
        ("vary: {kind: arms, name: [none]}", ["vary: arms takes names; found name"]),
        ("vary: {kind: map}", ["vary.kind", "'map'", "arms, maps, weights", "Did you mean 'maps'?"]),
        ("vary: maps", ["vary: maps takes student_layers, teacher_layers; found nothing"]),
        ("vary: {kind: maps, student_layers: 7, teacher_layers: 6}", ["vary: each of 7 student layers"]),
        ("vary: {kind: maps, student_layers: two, teacher_layers: 6}", ["student_layers is 'two'", "whole number"]),
        ("vary: {kind: maps, student_layers: 20, teacher_layers: 40}", ["137,846,528,820 increasing maps"]),
        ("vary: {kind: weights, factors: {features: 2}}", ["vary: weights: found 2 for features", "[0.25, 4]"]),
        ("vary: {kind: weights, factors: {features: [-1]}}", ["[-1] for features", "from 0 up"]),
        ("vary: {kind: weights, factors: {feature: [2]}}", ["'feature'", "features, attention, outputs, task"]),
        ("vary: {kind: weights, factors: []}", ["vary: weights: found []"]),
        ("vary: {}", ["vary: found none"]),
        ("vary: 3", ["vary: found 3 (whole number), expected a mapping"]),
        ("vary: {low: 3}", ["vary.low: found 3 (whole number)", "features.weight: 0.1"]),
        ("vary: {low: {features.weigth: 1}}", ["vary.low: features.weigth: unknown key", "Did you mean 'weight'?"]),
        ("vary: {low: {1: 1}}", ["vary.low: 1: unknown key"]),
        ("vary: {low: {seed: 3}}", ["vary.low: changes seed from 0 to 3", "`seeds`"]),
        ("vary: {low: {task.name: reviews}}", ["vary.low: changes task.name from 'glosses' to 'reviews'", "`base`"]),
        ("vary: arms\nseeds: [1, 1]", ["seeds", "[1, 1]", "twice"]),
        ("vary: arms\nseeds: []", ["seeds", "at least one"]),
        ("vary: arms\nbase: []", ["base: found none"]),
        ("vary: arms\nbase: [{}, {}]", ["base", "glosses, glosses", "one for each task"]),
        ("vary: arms\nbase: {features: null}", ["vary.features: arm 'features' needs"]),
        ("vary: arms\nequal_compute: [low]", ["equal_compute: 'low' is not among the arms, which are none, outputs"]),
        ("vary: {low: {}}\nequal_compute: [low]", ["equal_compute: 'low' is the only arm"]),
        ("vary: arms\nequal_compute: [none]\ncount_flops: false", ["equal_compute", "count_flops"]),
        ("vary: arms\nequal_compute: [none, none]", ["equal_compute", "twice"]),
        ("vary: arms\nsimilarity_texts: 1", ["similarity_texts", "at least 8"]),
        ("vary: arms\nbase: [{}, {trainin: {}}]", ["base[1].trainin", "Did you mean 'training'?"]),
        ("vary: arms\nbase: 3", ["base: found 3 (whole number)"]),
        ("vary: arms\nbase: [3]", ["base: found 3 (whole number)"]),
        ("vary: arms\nbase: nowhere.yaml", ["nowhere.yaml", "no such file", "study.yaml"]),
        ("vary: arms\nbase: {}\nworkers: 2", ["workers", "unknown key", "equal_compute"]),
    ],
)
def test_wrong_studies_are_answered(tmp_path, text, words):
    with_base = text if "base" in text or "missing" in words else f"{text}\nbase: {{}}"
    (tmp_path / "study.yaml").write_text(with_base)
    with pytest.raises(ValueError) as error:
        Study.from_yaml(tmp_path / "study.yaml")
    assert [word for word in ("study.yaml", *words) if word not in str(error.value)] == []


def test_the_patched_names_are_the_real_ones():
    """`_without_training` stands in for these; it must not outlive a renaming."""
    assert study_module.run_experiment is run_experiment
    assert study_module.evaluate_baselines is evaluate_baselines
    assert study_module.prepare_run is prepare_run


def test_the_kits_own_files_are_valid():
    folder = Path(__file__).parents[2] / "configs"
    study = Study.from_yaml(folder / "study.yaml")
    assert [experiment.task.name for experiment in study.base] == ["glosses", "reviews", "scans"]
    more_labels = Study.from_yaml(folder / "study_glosses_1400.yaml")
    assert len(study.seeds) >= 3 and study.equal_compute == ("none",)
    own = [ExperimentConfig.from_yaml(path) for path in folder.glob("distill_*.yaml")]
    assert all(config in own and config.arm == "all" for config in (*study.base, *more_labels.base))


@pytest.mark.parametrize("workers", [0, -1, True])
def test_a_number_of_workers_that_cannot_work_is_refused_before_the_baselines(small, tmp_path, monkeypatch, workers):
    asked = _without_training(monkeypatch)
    with pytest.raises(ValueError, match=f"workers: found {workers}, expected a whole number of processes, at least 1"):
        small.run(tmp_path / "runs", workers=workers)
    assert asked == [] and not (tmp_path / "runs").exists()
