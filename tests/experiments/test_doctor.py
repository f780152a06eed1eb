"""Rules of the doctor over records written by hand: a healthy one is silent, and each fault is found by its rule alone."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fakit.experiments import RunStore, diagnose
from fakit.experiments.doctor import RULES
from scripts import doctor_page

RECORDED = Path(__file__).parents[2] / "data/recorded"
MADE = {"processor": "EPYC", "gpu": None, "commit": "a" * 40}
TERMS = {"features": 0.4, "attention": 0.3, "outputs": 0.8, "task": 0.5}
STEPS = range(10, 210, 10)
FALL = [1.0 + 5.0 * math.exp(-step / 25) for step in STEPS]  # done by the end
SCORES = {"all": [0.80, 0.82, 0.81, 0.80, 0.82], "none": [0.70, 0.71, 0.69, 0.70, 0.72]}


def config(arm="all", **changes):
    """As a run records it; dotted keys change it."""
    on = arm != "none"
    made = {
        "task": {"name": "t"},
        "layer_map": "uniform",
        "features": {"loss": "mse", "weight": 1.0} if on else None,
        "attention": {"loss": "kl", "weight": 1.0} if on else None,
        "outputs": {"loss": "forward_kl", "temperature": 2.0, "weight": 1.0} if on else None,
        "task_weight": 1.0,
        "training": {"steps": 200, "batch_size": 8, "warmup": 0.1, "scheduler": "linear", "max_length": 48},
    }
    for key, value in changes.items():
        *folders, name = key.split("__")
        place = made
        for folder in folders:
            place = place[folder]
        place[name] = value
    return made


def record(arm, seed, score, **more):
    texts = {"padding": 0.2, "cut": {"train": [1, 100]}, "validation": 700, "test": 2100, "majority": 0.1}
    made = {
        "run_id": f"t-{arm}-s{seed}",
        "kind": "run",
        "task": "t",
        "arm": arm,
        "seed": seed,
        "metric": "accuracy",
        "score": score,
        "higher_is_better": True,
        "validation": {"accuracy": score and score + 0.02},
        "test": {"accuracy": score},
        "steps": 200,
        "flops": None,
        "config": config(arm),
        "versions": {"fakit": "0.1.0", "torch": "2", "transformers": "5"},
        "precision": "float32",
        "teacher": {"accuracy": 0.9},
        "softness": {"outputs": {"temperature": 2.0, "classes": 3.0, "of": 14}} if arm != "none" else None,
        "texts": texts,
        "layers": {"student": 2, "teacher": 4},
        "made_on": MADE,
    }
    made = {**made, **more}
    made["config"]["seed"] = seed
    return made


def history(arm, losses=FALL, terms=None, pairs=((1, 2), (2, 4))):
    parts = terms or (TERMS if arm != "none" else {"task": 1.0})
    rows = []
    for step, loss in zip(STEPS, losses, strict=False):
        row = {"step": step, "loss": loss, "learning_rate": 1e-3}
        if loss is not None:
            row |= {name: loss * part / sum(parts.values()) for name, part in parts.items()}
        if "features" in parts:
            row |= {f"features/S{s}_T{t}": 0.1 for s, t in pairs}
        rows.append(row)
    return rows


@pytest.fixture
def written(tmp_path):
    """A function that writes a store: healthy records of two arms, five seeds, with baselines, and what is changed."""

    def write(change=None, steps=None, scores=SCORES, baselines=True, name="runs"):
        store = RunStore.open(tmp_path / name, what="made up")
        for arm, of_arm in scores.items():
            for seed, score in enumerate(of_arm):
                made = record(arm, seed, score)
                made = made if change is None else change(made)
                if made is None:
                    continue
                rows = history(arm) if steps is None else steps(arm, seed)
                store.append_steps(made["run_id"], rows)
                store.append_run(made)
        for arm, score in {"teacher": 0.9, "untrained": 0.5}.items() if baselines else ():
            more = {"kind": "baseline", "run_id": f"t-baseline-{arm}"}
            store.append_run({**record(arm, 0, score), **more})
        return store

    return write


def found(store, **options):
    """Rule → the arms that it speaks of."""
    arms = {}
    for finding in diagnose(store, **options).findings:
        arms.setdefault(finding.rule, []).extend(finding.arms)
    return arms


def of_all(**changes):
    """Changes of the records of `all`."""
    return lambda made: {**made, **changes} if made["arm"] == "all" else made


def with_config(**changes):
    def change(made):
        return {**made, "config": config(made["arm"], **changes, seed=made["seed"])} if made["arm"] == "all" else made

    return change


def test_healthy_runs_are_silent(written):
    diagnosis = diagnose(written())
    assert diagnosis.findings == () and diagnosis.not_looked_at == {} and diagnosis.ok and diagnosis.runs == 10
    assert str(diagnosis) == "The doctor found nothing in the records of 10 runs.\n"
    assert diagnosis.table.empty and "seen" in diagnosis.table


CHANGED = {
    "layer map: off by one": with_config(layer_map=[[1, 1], [2, 3]]),
    "padding": of_all(texts={**record("all", 0, 0.8)["texts"], "padding": 0.5}),
    "texts cut": of_all(texts={**record("all", 0, 0.8)["texts"], "cut": {"train": [5, 100], "test": [900, 2100]}}),
    "temperature: hard labels": of_all(softness={"outputs": {"temperature": 0.1, "classes": 1.05, "of": 14}}),
    "temperature: uniform": of_all(softness={"outputs": {"temperature": 90.0, "classes": 13.4, "of": 14}}),
    "warm-up": with_config(training__warmup=100),
    "teacher weaker than the student": lambda made: {**made, "teacher": {"accuracy": 0.75}},
    "validation and test apart": of_all(validation={"accuracy": 0.92}),
    "mixed versions or machines": lambda made: (
        made if made["seed"] else {**made, "made_on": MADE | {"commit": made["arm"]}}
    ),
    "no better than no training": of_all(texts={**record("all", 0, 0.8)["texts"], "majority": 0.85}),
    "teacher no better than chance": lambda made: {**made, "teacher": {"accuracy": 0.11}, "score": made["score"] / 10},
}


@pytest.mark.parametrize("rule", CHANGED)
def test_a_fault_in_the_records_is_found_by_its_rule(written, rule):
    arms = found(written(CHANGED[rule], baselines="teacher" not in rule))
    assert "all" in arms.pop(rule)
    assert not arms or rule.startswith("teacher")  # what a teacher without knowledge teaches is found, too


STEPPED = {
    "layer map: reversed": {"pairs": ((1, 4), (2, 2))},
    "layer map: crossing": {"pairs": ((1, 2), (2, 4), (3, 3))},
    "a term leads": {"terms": {**TERMS, "outputs": 60.0}},
    "a term at zero": {"terms": {**TERMS, "attention": 1e-4}},
    "loss still falls": {"losses": [5.0 - 0.2 * i for i in range(20)]},
    "loss rises": {"losses": [*FALL[:12], *(1.2 + 0.3 * i for i in range(8))]},
    "diverged": {"losses": [*FALL[:10], None, *FALL[11:]]},
}


@pytest.mark.parametrize("rule", STEPPED)
def test_a_fault_in_the_steps_is_found_by_its_rule(written, rule):
    store = written(steps=lambda arm, seed: history(arm, **(STEPPED[rule] if arm == "all" else {})))
    assert found(store) == {rule: ["all"]}


def test_a_loss_that_falls_in_some_seeds_alone_is_noise(written):
    down, flat = STEPPED["loss still falls"]["losses"], [*FALL[:16], 1.0, 1.2, 1.1, 1.3]
    assert found(written(steps=lambda arm, seed: history(arm, losses=down if seed else flat))) == {}


def test_a_loss_falls_from_its_highest(written):
    """A student that training first harms: from its first value it would have fallen by more than all."""
    losses = [1.0, 2.0, 4.0, 5.0, *(5.0 - 0.25 * i for i in range(16))]
    (seen,) = diagnose(written(steps=lambda arm, seed: history(arm, losses=losses if arm == "all" else FALL))).of(
        "loss still falls"
    )
    end, before = np.mean(losses[-4:]), np.mean(losses[-8:-4])
    top = max(np.convolve(losses, np.ones(4) / 4, "valid"))
    assert f"fell from {top:.3g} to {end:.3g}, by {(before - end) / (top - end):.0%} of that" in str(seen)


def test_the_validation_loss_goes_before_the_training_loss(written):
    evaluated = [4.0, 2.0, 1.5, 1.6, 2.2, 2.9]

    def steps(arm, seed):
        rows = history(arm)
        if arm == "all":
            rows += [{"step": 30 * (i + 1), "eval_loss": loss} for i, loss in enumerate(evaluated)]
        return [row for step in sorted({r["step"] for r in rows}) for row in [_merged(rows, step)]]

    diagnosis = diagnose(written(steps=steps))
    (rises,) = diagnosis.of("loss rises")
    assert rises.arms == ("all",) and "validation loss rose from its lowest, 1.55" in rises.seen


def _merged(rows, step):
    return {key: value for row in rows if row["step"] == step for key, value in row.items()}


def test_scores_are_held_against_baselines_teacher_and_labels(written):
    low = {"all": [0.44, 0.45, 0.43, 0.46, 0.44], "none": SCORES["none"]}
    assert found(written(scores=low)) == {"no better than no training": ["all"], "worse than labels alone": ["all"]}
    high = {"all": [0.95, 0.96, 0.94, 0.95, 0.95], "none": SCORES["none"]}
    assert found(written(scores=high, name="high")) == {"teacher weaker than the student": ["all"]}


def test_lower_is_better_where_it_is(written):
    def change(made):
        more = {"metric": "cer", "higher_is_better": False, "teacher": {"cer": 0.1}}
        return {**made, **more, "validation": {"cer": 0.3}, "test": {"cer": 0.3}, "score": 1 - made["score"]}

    store = written(change, baselines=False)
    assert found(store) == {}  # 0.2 of `all` against 0.3
    copied = {
        **record("copy", 0, 0.15),
        "kind": "baseline",
        "run_id": "copy",
        "metric": "cer",
        "higher_is_better": False,
    }
    store.append_run(copied)
    assert found(store) == {"no better than no training": ["all", "none"]}


def test_claims_need_pairs_and_an_interval(written):
    two = {"all": [0.80, 0.74], "none": [0.70, 0.73]}
    (finding,) = diagnose(written(scores=two)).findings
    assert (finding.rule, finding.status, finding.arms) == ("gain not significant", "note", ("all",))
    assert "1 of 1 gains over none" in finding.seen and "with 2 pairs" in finding.seen
    assert "have no interval: all +10.0 points" in found_text(written(scores={"all": [0.8], "none": [0.7]}, name="one"))
    unpaired = written(lambda made: None if (made["arm"], made["seed"]) == ("none", 3) else made, name="unpaired")
    (finding,) = diagnose(unpaired).findings
    assert finding.rule == "seeds not paired" and finding.seen.endswith("all: 3")


def found_text(store):
    return " ".join(finding.seen for finding in diagnose(store).findings)


def test_seeds_of_other_commits_are_fine_where_each_seed_is_of_one(written):
    assert found(written(lambda made: {**made, "made_on": MADE | {"commit": str(made["seed"]) * 9}})) == {}


def test_a_run_without_a_score_is_an_error(written):
    diagnosis = diagnose(written(lambda made: {**made, "score": None} if made["run_id"] == "t-all-s1" else made))
    assert diagnosis.findings[0].status == "error" and diagnosis.findings[0].seen == "no score in 1 of 5 seeds"
    assert not diagnosis.ok


def test_what_the_record_lacks_is_said_once_and_not_guessed(written):
    new = ("texts", "softness", "teacher", "layers", "made_on")
    before = written(lambda made: {key: value for key, value in made.items() if key not in new}, baselines=False)
    diagnosis = diagnose(before)
    assert diagnosis.findings == ()
    lacking = diagnosis.not_looked_at
    assert lacking["the share of padding and how many texts were cut"] == (("padding", "texts cut"), 10)
    assert lacking["how soft the teacher's outputs are at τ"][1] == 5  # `none` has no outputs
    assert lacking["the teacher's score"] == (("teacher weaker than the student",), 10)
    assert lacking["processor and commit"] == (("mixed versions or machines",), 10)
    assert str(diagnosis).count("padding; texts cut: of 10 runs the record lacks the share of padding") == 1


@pytest.mark.parametrize(("tau", "odd"), [(0.5, True), (1.0, False), (20.0, False), (21.0, True)])
def test_without_entropies_the_temperature_is_held_against_the_usual(written, tau, odd):
    def change(made):
        return {**with_config(outputs__temperature=tau)(made), "softness": None}

    assert found(written(change)) == ({"temperature: unusual": ["all"]} if odd else {})


def test_schedules_are_not_taken_for_faults(written):
    """A stage whose terms are off, and a loss that moves since its weight does, as tinybert and taid have them."""
    schedule = {"from": 1.0, "to": 0.0, "kind": "linear"}
    store = written(
        with_config(features__weight=schedule),
        lambda arm, seed: history(arm, **STEPPED["loss rises"] if arm == "all" else {}),
    )
    assert found(store) == {}
    ((rules, runs),) = [
        v for what, v in diagnose(store).not_looked_at.items() if what.startswith("one loss from start")
    ]
    assert rules == ("loss still falls",) and runs == 5


@pytest.mark.parametrize(
    "pairs",
    [
        [[1, 2], [2, 4]],  # uniform
        [[1, 3], [2, 4]],  # last
        [[1, 1], [2, 2]],  # first: not last with a slip
        [[0, 0], [1, 2], [2, 4]],  # embeddings too
        [[2, 3]],  # one pair is no series
        [[1, 4], [2, 4]],  # all to one
    ],
)
def test_maps_that_are_right_are_not_off_by_one(written, pairs):
    assert "layer map: off by one" not in found(written(with_config(layer_map=pairs)))


@pytest.mark.parametrize("pairs", [[[0, 1], [1, 3]], [[0, 2], [1, 4]], [[1, 1], [2, 3]], [[0, 0], [1, 1], [2, 3]]])
def test_maps_counted_from_0_on_either_side_are_found(written, pairs):
    assert found(written(with_config(layer_map=pairs))) == {"layer map: off by one": ["all"]}


def test_a_map_of_a_term_is_looked_at_too(written):
    store = written(with_config(features__layer_map=[[1, 1], [2, 3]]))
    assert "features.layer_map S1→T1, S2→T3" in found_text(store)
    assert found(written(with_config(features__layer_map=[[1, 1], [2, 3]], features__weight=0.0), name="off")) == {}


def test_several_teacher_layers_for_one_student_layer_are_no_crossing(written):
    every = [(s, t) for s in (1, 2) for t in (1, 2, 3, 4)]
    assert found(written(steps=lambda arm, seed: history(arm, pairs=every))) == {}


def test_a_schedule_of_another_version_is_no_error(written):
    unknown = {"from": 1.0, "to": 0.5, "kind": "spiral"}
    changes = {"features__weight": unknown, "outputs__temperature": unknown, "task_weight": unknown}
    diagnosis = diagnose(written(with_config(**changes)))
    assert diagnosis.findings == ()
    assert diagnosis.not_looked_at["the weights of each step"] == (("a term leads", "a term at zero"), 5)


def test_tables_and_names(written):
    diagnosis = diagnose(written(CHANGED["warm-up"]))
    assert diagnosis.table.loc[0, ["status", "rule", "task", "arms"]].tolist() == ["warning", "warm-up", "t", "all"]
    assert isinstance(diagnosis.table, pd.DataFrame) and "100 of 200 steps" in diagnosis.table.loc[0, "seen"]
    assert "**warm-up** (warning)" in diagnosis._repr_markdown_() and "**" not in str(diagnosis)
    assert max(map(len, str(diagnosis).splitlines())) <= 110
    with pytest.raises(ValueError, match="'warmup' is no rule; there are diverged"):
        diagnosis.of("warmup")


def test_every_rule_says_all_of_it_and_the_page_has_it():
    assert len({rule.name for rule in RULES}) == len(RULES)
    page = doctor_page.PAGE.read_text()
    for rule in RULES:
        assert all((rule.bound, rule.why, rule.means, rule.fix)) and rule.status in ("error", "warning", "note")
        assert f"| {rule.name} | {rule.status} | {rule.bound} |" in page


def test_an_empty_store_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run yet"):
        diagnose(RunStore.open(tmp_path))


def test_the_recorded_studies_have_what_is_known_of_them():
    """By hand: which students stay behind the copied line, and which recipes train the body away from its head."""
    study = found(RECORDED / "study")["no better than no training"]
    assert study == [
        "none",
        "outputs",
        "features",
        "none, equal compute",
    ]  # of scans, where leaving the line has 12.4 %
    recipes = found(RECORDED / "recipes")
    assert recipes["no better than no training"] == ["minilmv2"] and recipes["a term leads"] == ["mobilebert"]
    assert recipes["worse than labels alone"] == ["minilm", "minilmv2", "dkd"]
    maps = found(RECORDED / "maps")
    assert set(maps["layer map: reversed"]) == {"reverse", "random"} and set(maps["layer map: off by one"]) == {
        "1-3-5",
        "3-4-5",
    }
