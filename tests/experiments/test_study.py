from pathlib import Path

import pytest

from fakit.experiments import study as study_module
from fakit.experiments.config import ExperimentConfig, StudentConfig
from fakit.experiments.map_study import MapStudyConfig, run_map_study
from fakit.experiments.run import evaluate_baselines, run_experiment
from fakit.experiments.store import RunStore
from fakit.experiments.study import StudyConfig, equal_compute_steps, run_study


@pytest.fixture
def small(config):
    return StudyConfig((config.replace(**{"training.steps": 2}),), arms=("none", "all"), seeds=(0, 1))


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
    return asked


def test_a_small_study_runs_to_the_end(small, tmp_path, capsys):
    store = run_study(small, tmp_path / "runs")
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
    run_study(small, tmp_path / "runs")
    assert len(RunStore(tmp_path / "runs")) == len(store)
    assert capsys.readouterr().out.splitlines() == [
        f"4 of 4 runs are recorded in {tmp_path / 'runs'}; 0 to go.",
        f"2 of 2 runs are recorded in {tmp_path / 'runs'}; 0 to go.",
    ]


def test_two_workers_give_what_one_gives(small, tmp_path):
    study = StudyConfig(small.experiments, arms=("none",), seeds=(0, 1), equal_compute=(), baselines=False)
    alone = run_study(study, tmp_path / "one", progress=False).runs().set_index("run_id").sort_index()
    side_by_side = run_study(study, tmp_path / "two", workers=2, progress=False).runs().set_index("run_id").sort_index()
    assert side_by_side["score"].to_dict() == alone["score"].to_dict()
    assert side_by_side["flops"].to_dict() == alone["flops"].to_dict()


def test_a_stopped_study_goes_on_where_it_was(small, tmp_path, monkeypatch, capsys):
    asked = _without_training(monkeypatch, fail_at=4)
    with pytest.raises(RuntimeError, match="power cut") as error:
        run_study(small, tmp_path)
    assert "seed 1" in str(error.value.__notes__)
    before = list(asked)
    asked_again = _without_training(monkeypatch)
    run_study(small, tmp_path)
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
    study = StudyConfig((small.experiments[0].replace(**{"training.steps": 50}),), arms=("none", "all"), seeds=(7, 8))
    store = run_study(study, tmp_path, progress=False)
    configs = study.equal_compute_runs(store)
    assert [(c.seed, c.training.steps, c.arm, c.transfers) for c in configs] == [
        (7, 80, "none, equal compute", ()),
        (8, 80, "none, equal compute", ()),
    ]


def test_runs_go_seed_by_seed_through_all_tasks(config):
    other = config.replace(**{"task.name": "glosses"})
    study = StudyConfig((config, other), seeds=(5, 6))
    order = [(run.seed, run.task.name, run.arm) for run in study.runs()]
    assert order == [
        (seed, task, arm)
        for seed in (5, 6)
        for task in (config.task.name, "glosses")
        for arm in ("none", "outputs", "features", "attention", "all")
    ]


def test_study_files_name_experiments_or_hold_them(tmp_path):
    base = ExperimentConfig(student=StudentConfig(layers=1))
    base.to_yaml(tmp_path / "base.yaml")
    (tmp_path / "study.yaml").write_text(
        "experiments: [base.yaml, {task: {name: reviews}}]\nseeds: [3, 4]\nequal_compute: []\n"
    )
    study = StudyConfig.from_yaml(tmp_path / "study.yaml")
    assert study.experiments == (base, ExperimentConfig().replace(**{"task.name": "reviews"}))
    assert study.seeds == (3, 4)
    study.to_yaml(tmp_path / "whole.yaml")
    assert StudyConfig.from_yaml(tmp_path / "whole.yaml") == study


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arms: [none]", ["experiments", "missing"]),
        ("experiments: [{}]\narms: [none, al]", ["arms", "'al'", "Did you mean 'all'?"]),
        ("experiments: [{}]\nseeds: [1, 1]", ["seeds", "[1, 1]", "twice"]),
        ("experiments: [{}]\nseeds: []", ["seeds", "at least one"]),
        ("experiments: [{}, {}]", ["experiments", "glosses, glosses", "one for each task"]),
        ("experiments: [{features: null}]", ["arm 'features' needs"]),
        ("experiments: [{}]\narms: [none, outputs]", ["equal_compute", "'all'", "none, outputs"]),
        ("experiments: [{trainin: {}}]", ["experiments[0].trainin", "Did you mean 'training'?"]),
        ("experiments: [3]", ["experiments", "3 (whole number)"]),
        ("experiments: [nowhere.yaml]", ["nowhere.yaml", "no such file", "study.yaml"]),
        ("experiments: [{}]\nworkers: 2", ["workers", "unknown key", "equal_compute"]),
    ],
)
def test_wrong_studies_are_answered(tmp_path, text, words):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        StudyConfig.from_yaml(tmp_path / "study.yaml")
    assert [word for word in ("study.yaml", *words) if word not in str(error.value)] == []


def test_the_patched_names_are_the_real_ones():
    """`_without_training` stands in for these two; it must not outlive a renaming."""
    assert study_module.run_experiment is run_experiment
    assert study_module.evaluate_baselines is evaluate_baselines


def test_the_kits_own_files_are_valid():
    folder = Path(__file__).parents[2] / "configs"
    study = StudyConfig.from_yaml(folder / "study.yaml")
    assert [experiment.task.name for experiment in study.experiments] == ["glosses", "reviews", "scans"]
    more_labels = StudyConfig.from_yaml(folder / "study_glosses_1400.yaml")
    assert len(study.seeds) >= 3 and study.equal_compute == ("none",)
    for path in folder.glob("distill_*.yaml"):
        config = ExperimentConfig.from_yaml(path)
        assert config.arm == "all"
        assert config in (*study.experiments, *more_labels.experiments)


@pytest.mark.parametrize("workers", [0, -1, True])
def test_a_number_of_workers_that_cannot_work_is_refused_before_the_baselines(small, tmp_path, monkeypatch, workers):
    asked = _without_training(monkeypatch)
    for run, study in ((run_study, small), (run_map_study, MapStudyConfig(small.experiments, seeds=(0,)))):
        with pytest.raises(
            ValueError, match=f"workers: found {workers}, expected a whole number of processes, at least 1"
        ):
            run(study, tmp_path / "runs", workers=workers)
    assert asked == [] and not (tmp_path / "runs").exists()
