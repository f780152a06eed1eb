"""The recorded studies are those of the shipped configurations: each run id, and nothing left to do."""

import shutil
from pathlib import Path

import pytest

from fakit import recipes
from fakit.__main__ import main
from fakit.experiments import ExperimentConfig, RunStore, Study
from fakit.experiments import study as study_module
from fakit.experiments.baselines import baseline_id
from fakit.experiments.statistics import Interval, main_effects, mean_interval, paired_difference, paired_table

ROOT = Path(__file__).resolve().parents[2]
RECORDED = {
    "study": "study.yaml",
    "glosses_1400_labels": "study_glosses_1400.yaml",
    "maps": "maps.yaml",
    "weights": "weights.yaml",
    "skew_and_dynamics": "skew_and_dynamics.yaml",
    "recipes": "recipes.yaml",
    "smollm2": "study_smollm2.yaml",
    "head_to_head_glosses": "head_to_head_glosses.yaml",
    "head_to_head_scans": "head_to_head_scans.yaml",
}


COMPRESSIONS = ("layerwise",)  # by scripts/record_compressions.py


def test_every_recorded_study_is_one_of_these():
    found = {path.name for path in (ROOT / "data/recorded").iterdir() if (path / "runs.jsonl").exists()}
    assert found == {*RECORDED, *COMPRESSIONS}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_the_recorded_compressions_are_those_of_the_script(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import record_compressions

    planned = [config for seed in record_compressions.SEEDS for config in record_compressions.planned(name, seed)]
    store = RunStore(ROOT / "data/recorded" / name)
    assert [record["run_id"] for record in store.records()] == [config.run_id for config in planned]
    assert store.manifest["what"] == record_compressions.RECORDED[name][0]


def test_one_layer_a_round_and_all_at_once_are_as_the_page_says():
    page = (ROOT / "docs/compression.md").read_text()
    by_arm = {}
    for record in RunStore(ROOT / "data/recorded/layerwise").records():
        numbers = {"accuracy": 100 * record["score"], "kl": record["test"]["kl"]}
        by_arm.setdefault(record["arm"], {})[record["seed"]] = numbers
    seeds = range(5)
    columns = (("accuracy", 1, 2), ("kl", 3, 3))
    values = {arm: {m: [of[seed][m] for seed in seeds] for m, *_ in columns} for arm, of in by_arm.items()}
    one, all_ = values["layerwise"], values["layerwise, one shot"]
    for name, of in (("one a round", one), ("all at once", all_)):
        cells = " | ".join(mean_interval(of[m]).format(digits=digits) for m, digits, _ in columns)
        assert f"| {name} | {cells} |" in page
    points, kl = (paired_difference(one[m], all_[m]).format(digits=d, sign=True) for m, _, d in columns)
    assert f"| difference | {points} points | {kl} |" in page


@pytest.mark.parametrize(("folder", "file"), RECORDED.items())
def test_the_recorded_runs_are_those_of_the_study(folder, file):
    study, store = Study.from_yaml(ROOT / "configs" / file), RunStore(ROOT / "data/recorded" / folder)
    planned = [*study.runs(), *study.equal_compute_runs(store)]
    by_kind = {"run": [], "baseline": []}
    for record in store.records():
        by_kind[record.get("kind", "run")].append(record["run_id"])
    assert sorted(by_kind["run"]) == sorted(run.run_id for run in planned)
    names = ("teacher", "untrained", "copy") if study.baselines else ()
    first = [experiment.replace(seed=study.seeds[0]) for experiment in study.base]
    assert {*by_kind["baseline"]} <= {baseline_id(experiment, name) for experiment in first for name in names}
    assert len(by_kind["baseline"]) == (2 * len(first) + ("scans" in file or folder == "study")) * study.baselines
    assert store.manifest["what"] == study.what


@pytest.mark.parametrize(("folder", "file"), RECORDED.items())
def test_the_command_finds_nothing_left_to_do(folder, file, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "data/recorded" / folder, tmp_path / folder)
    before = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
    for name in ("run_experiment", "prepare_run", "evaluate_baselines", "record_similarity"):
        monkeypatch.setattr(study_module, name, lambda *_, **__: pytest.fail("there was something to do"))
    assert main(["study", str(ROOT / "configs" / file), "--out", str(tmp_path / folder)]) == 0
    assert "; 0 to go." in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir() if path.name in before} == before


def test_each_run_of_the_weights_moves_one_weight_and_nothing_else():
    study = Study.from_yaml(ROOT / "configs/weights.yaml")
    whole = ExperimentConfig.from_yaml(ROOT / "configs/distill_glosses.yaml")
    assert study.base == (whole.replace(**{"training.steps": study.base[0].training.steps}),)
    by_arm = {run.arm: run for run in study.runs() if run.seed == 0}
    start = by_arm.pop("default")
    assert len(by_arm) == 3 * 2
    for arm, moved in by_arm.items():
        term, factor = arm.split(" × ")
        assert getattr(moved, term).weight == float(factor) * getattr(start, term).weight
        assert moved.replace(**{f"{term}.weight": getattr(start, term).weight, "name": "default"}) == start


def test_the_head_to_head_is_as_the_readme_and_its_page_say(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from scripts import head_to_head_tables as tables

    assert tables.recorded() == [name for name in RECORDED if name.startswith("head_to_head")]
    assert f"\n{tables.readme()}\n" in (ROOT / "README.md").read_text()
    for name in tables.recorded():
        runs = RunStore(ROOT / "data/recorded" / name).runs()
        sizes = runs[runs["kind"] == "run"].groupby("arm")["parameters"].first()
        assert sizes.max() / sizes.min() < 1.01, "equal parameters"
        assert f"\n{tables.page(name)}\n" in (ROOT / "docs/compression.md").read_text()


def test_the_record_of_the_weights_is_whole_and_small():
    store = RunStore(ROOT / "data/recorded/weights")
    runs = store.runs()
    assert (runs["steps"] == runs["config.training.steps"]).all() and runs["score"].between(0, 1).all()
    assert sum(path.stat().st_size for path in store.path.iterdir()) < 1_000_000


def test_smollm2_is_as_its_page_says():
    page = (ROOT / "docs/instruction_data.md").read_text()
    every = RunStore(ROOT / "data/recorded/smollm2").runs()
    runs, teacher = every[every["kind"] == "run"], every[every["arm"] == "teacher"].iloc[0]
    columns = {"test.bits_per_byte": (1, 2), "test.rougeL": (100, 1), "test.agreement": (100, 1)}
    columns |= {"test.acceptance": (100, 1)}
    told = {}
    for metric, (factor, digits) in columns.items():
        for row in paired_table(runs, metric, "none").to_dict("records"):
            values = [factor * row[key] for key in ("mean", "low", "high")]
            told.setdefault(row["arm"], []).append("{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*values, d=digits))
            if row["arm"] == "outputs" and factor == 100:
                change = [factor * row[f"difference{end}"] for end in ("", "_low", "_high")]
                assert "{:+.1f} [{:+.1f}, {:+.1f}] points".format(*change) in page, metric
    for arm, cells in told.items():
        assert f"| {arm} | {' | '.join(cells)} |" in page
    own = f"{teacher['test.bits_per_byte']:.2f} | {100 * teacher['test.rougeL']:.1f} | – | – |"
    assert f"| *teacher* | {own}" in page
    beside = runs[runs["arm"] != "none"]
    apart = {metric: paired_table(beside, metric, "outputs").set_index("arm").loc["all"] for metric in columns}
    bits = apart.pop("test.bits_per_byte")
    cost = [bits[f"difference{end}"] for end in ("", "_low", "_high")]
    assert "cost {:.2f} [{:.2f}, {:.2f}] bits per byte".format(*cost) in page
    assert all(row["difference_low"] < 0 < row["difference_high"] for row in apart.values())


def test_the_recipes_side_by_side_are_as_the_readme_says():
    """Counts and intervals of the README, from the record; docs/losses.md has the table, which a test of its holds."""
    runs = RunStore(ROOT / "data/recorded/recipes").runs()
    runs = runs[runs["kind"] == "run"]
    none, soft = (paired_table(runs, "score", arm).set_index("arm") for arm in ("none", "distilbert"))
    ahead, behind = ((none["p_holm"] < 0.05) & (sign * none["gain"] > 0) for sign in (1, -1))
    others = soft[soft["p_holm"] < 0.05].drop(index="none")
    best = others[others["gain"] > 0]

    def told(row) -> str:
        return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * row[key] for key in ("gain", "gain_low", "gain_high")))

    text = (ROOT / "README.md").read_text()
    assert f"**{ahead.sum()} of {len(none) - 1} published recipes beat labels alone" in text
    assert f"Three fall behind ({', '.join(f'`{arm}`' for arm in behind[behind].index)})" in text and behind.sum() == 3
    assert f"DistilBERT's gain {told(none.loc['distilbert'])}" in text
    assert list(best.index) == ["mobilebert"] and f"`mobilebert` {told(best.loc['mobilebert'])} points" in text


def test_what_skew_and_dynamics_are_worth_is_as_the_recipe_says():
    runs = RunStore(ROOT / "data/recorded/skew_and_dynamics").runs()
    cells = {
        f"{divergence}{more}": {"divergence": divergence, "dynamics": more}
        for divergence in ("forward KL", "skew KL")
        for more in ("", " and dynamics")
    }
    found = main_effects(runs[runs["kind"] == "run"], "score", cells).set_index("factor")
    assert (found["n"] == 5).all() and (found["p_holm"] > 0.05).all()
    said = recipes.fdd().evidence
    for factor in ("divergence", "dynamics"):
        gain = found.loc[factor]
        assert Interval(*gain[["gain", "gain_low", "gain_high", "n"]]).format(100, 2, sign=True) in said
