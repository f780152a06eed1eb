"""The run browser: what it lists, sorts, draws and lets one choose is what the store holds."""

from xml.etree import ElementTree

import numpy as np
import pytest

from fakit.experiments.store import RunStore
from fakit.tasks import data_dir
from fakit.widgets import run_browser

# task, arm, seed, score, parameters, seconds: errors in "scans", where the cheapest is also the best
RUNS = [
    ("films", "none", 0, 0.70, 1e6, 10.0),
    ("films", "none", 1, 0.90, 1e6, 12.0),
    ("films", "all", 0, 0.85, 1e6, 30.0),
    ("films", "all", 1, 0.87, 1e6, 28.0),
    ("films", "features", 0, 0.75, 1e6, 50.0),
    ("scans", "none", 0, 0.30, 2e6, 5.0),
    ("scans", "all", 0, 0.10, 2e6, 9.0),
]


@pytest.fixture
def store(tmp_path):
    made = RunStore.create(tmp_path / "runs", "a test")
    teacher = {"kind": "baseline", "arm": "teacher", "seed": 0, "metric": "accuracy", "higher_is_better": True}
    made.append_run({"run_id": "t", "task": "films", "score": 0.95, "parameters": 4e6, **teacher})
    for task, arm, seed, score, parameters, seconds in RUNS:
        run = f"{task}-{arm}-{seed}"
        metric = {"metric": "accuracy" if task == "films" else "cer", "higher_is_better": task == "films"}
        record = {"run_id": run, "kind": "run", "task": task, "arm": arm, "seed": seed, "score": score, **metric}
        made.append_run(
            {**record, "parameters": parameters, "cost": {"seconds": seconds}, "test": {"agreement": score / 2}}
        )
        made.append_steps(run, [{"step": step, "loss": score / step, "features/S1_T2": 1.0} for step in (1, 2, 4)])
    return made


@pytest.fixture
def browser(store):
    return run_browser(store)


def marks(drawing: str) -> dict[str, ElementTree.Element]:
    """What a drawing shows of each run, from the back to the front."""
    return {mark.get("data-run"): mark for mark in ElementTree.fromstring(drawing).iter("g") if mark.get("data-run")}


def places(browser) -> dict[str, tuple[float, float]]:
    """(x, y) in px of every run's point."""
    found = {run: mark.find("path").get("transform") for run, mark in marks(browser.view["points"]).items()}
    return {run: tuple(map(float, place[len("translate(") : -1].split())) for run, place in found.items()}


def ids(browser) -> list[str]:
    return [row["id"] for row in browser.view["rows"]]


def test_it_starts_with_the_first_task_best_first(browser):
    assert browser.tasks == ["films", "scans"] and browser.task == "films"
    assert browser.arms == ["teacher", "none", "all", "features"]
    assert ids(browser) == ["t", "films-none-1", "films-all-1", "films-all-0", "films-features-0", "films-none-0"]
    assert browser.cost == "cost.seconds"  # all students are of one size
    assert browser.sentence == "6 runs of films, 0 chosen; best: teacher, seed 0, accuracy 95.00 %."


def test_errors_are_best_first_too(browser):
    browser.task = "scans"
    assert ids(browser) == ["scans-all-0", "scans-none-0"] and not browser.descending
    assert browser.arms == ["none", "all"] and "best: all, seed 0, cer 10.00 %" in browser.sentence
    browser.sort = "seed"
    browser.task = "films"
    assert not browser.descending  # another order than by score is the reader's own


def test_frame_is_the_table(browser):
    browser.selected = ["films-all-0"]
    frame = browser.frame()
    assert list(frame["run_id"]) == ids(browser)
    assert frame[frame["selected"]]["run_id"].tolist() == ["films-all-0"]
    row = frame.set_index("run_id").loc["films-all-0"]
    assert (row["parameters (millions)"], row["training time (s)"], row["agreement"]) == (1.0, 30.0, 0.425)
    shown = {row["id"]: row["cells"] for row in browser.view["rows"]}
    assert shown["films-all-0"] == ["all", "0", "85.00", "42.50", "1", "30"]
    assert shown["t"] == ["teacher", "0", "95.00", "–", "4", "–"]


@pytest.mark.parametrize("descending", [True, False])
def test_sorted_by_a_cost_what_is_not_recorded_goes_last(browser, descending):
    browser.sort, browser.descending = "cost.seconds", descending
    seconds = browser.frame()["training time (s)"].to_numpy()
    assert np.isnan(seconds[-1]) and ids(browser)[-1] == "t"
    order = np.diff(seconds[:-1])
    assert (order < 0).all() if descending else (order > 0).all()


def test_arms_filter_table_and_figures(browser):
    browser.arms = ["none", "teacher"]
    assert set(ids(browser)) == {"t", "films-none-0", "films-none-1"}
    assert set(marks(browser.view["lines"])) == {"films-none-0", "films-none-1"}
    browser.arms = []
    assert browser.sentence == "No run of films is shown: every arm is off." and browser.figure is None
    assert set(browser._repr_mimebundle_()[0]) == {"application/vnd.jupyter.widget-view+json", "text/plain"}


def test_the_front_is_of_means_and_not_of_lucky_seeds(browser):
    # by single runs none-1 (0.90 at 12 s) would beat all of "all" (0.85, 0.87); by means "all" is better and dearer
    assert browser.front() == [pytest.approx((11.0, 0.80)), pytest.approx((29.0, 0.86))]
    browser.cost = "parameters"
    assert browser.front() == [pytest.approx((1.0, 0.86)), pytest.approx((4.0, 0.95))]
    browser.task, browser.cost = "scans", "cost.seconds"
    assert browser.front() == [pytest.approx((5.0, 0.3)), pytest.approx((9.0, 0.1))]  # lower is better


def test_points_and_lines_lie_where_the_numbers_say(browser):
    points = places(browser)
    assert "t" not in points and "1 without this record" in browser.view["points"]
    assert points["films-features-0"][0] > points["films-all-0"][0] > points["films-none-0"][0]
    assert points["films-none-1"][1] < points["films-all-1"][1] < points["films-none-0"][1]  # px, from the top down
    line = marks(browser.view["lines"])["films-all-0"].find("path[@class='curve']").get("d")
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, point.split())) for point in line[1:].split("L")]
    assert (x2 - x1) == pytest.approx(2 * (x1 - x0), abs=0.2) and (y1 - y0) == pytest.approx(2 * (y2 - y1), abs=0.3)
    ticks = {text.text: float(text.get("x")) for text in ElementTree.fromstring(browser.view["lines"]).iter("text")}
    assert ticks["1"] == x0
    browser.task = "scans"
    assert places(browser)["scans-all-0"][1] < places(browser)["scans-none-0"][1]  # a lower error is better, and up


def test_the_chosen_stand_out_and_lie_on_top(browser):
    looks = {run: mark.get("class") for run, mark in marks(browser.view["points"]).items()}
    assert set(looks.values()) == {"run"}
    browser.selected = ["films-none-0"]
    for drawing in (browser.view["lines"], browser.view["points"]):
        looks = {run: mark.get("class") for run, mark in marks(drawing).items()}
        assert looks.pop("films-none-0") == "run chosen" and set(looks.values()) == {"run faded"}
        assert list(marks(drawing))[-1] == "films-none-0"
    browser.task = "scans"  # whose runs are all as they were
    assert {mark.get("class") for mark in marks(browser.view["points"]).values()} == {"run"}


def test_names_of_arms_are_text_and_no_markup(tmp_path):
    made = RunStore.create(tmp_path / "runs", "a test")
    run = {"task": "films", "kind": "run", "seed": 0, "metric": "accuracy", "higher_is_better": True, "score": 0.5}
    made.append_run({"run_id": 'a"<b', "arm": "<script>", "cost": {"seconds": 1.0}, **run})
    (found,) = marks(run_browser(made).view["points"]).items()
    assert found[0] == 'a"<b' and found[1].find("title").text == "<script>, seed 0"


def test_the_curve_is_one_of_the_terms(browser):
    assert browser._curve_names == ["loss"]  # no layer pair, no step
    (first, *_) = [row for row in browser.figure.plotly.data if len(row.x) == 3]
    assert list(first.x) == [1, 2, 4]


def test_the_choice_outlives_a_change_of_task_and_says_its_best(browser):
    browser.selected = ["films-none-0", "films-all-0", "films-none-0"]
    assert browser.selected == ["films-none-0", "films-all-0"]
    assert "2 chosen; best of these: all, seed 0, accuracy 85.00 %" in browser.sentence
    faded = {trace.opacity for trace in browser.figure.plotly.data if trace.opacity is not None}
    assert faded == {0.25, 1.0} and "the best of 2 chosen is all" in browser.figure.summary
    browser.task = "scans"
    assert browser.selected == ["films-none-0", "films-all-0"] and "0 chosen" in browser.sentence


def test_observers_hear_of_a_choice(browser):
    heard = []
    browser.observe(lambda change: heard.append(change["new"]), "selected")
    browser.set_state({"selected": ["films-all-1"]})  # what the page sends
    assert heard == [["films-all-1"]] and "1 chosen" in browser.view["sentence"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("task", "poems", "task = 'poems' is not among the recorded ones; there are 'films', 'scans'"),
        ("sort", "luck", "sort = 'luck'.*'cost.seconds'"),
        ("cost", "latency", "cost = 'latency'.*'parameters', 'cost.seconds'"),
        ("curve", "features/S1_T2", "curve = .*'loss'"),
        ("selected", ["films-all-9"], r"films-all-9 is not recorded in .*\.frame\(\) lists"),
    ],
)
def test_what_is_not_recorded_is_named_and_changes_nothing(browser, name, value, message):
    before = getattr(browser, name), ids(browser)
    with pytest.raises(ValueError, match=message):
        setattr(browser, name, value)
    assert (getattr(browser, name), ids(browser)) == before


def test_no_runs_and_no_directory_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run yet"):
        run_browser(RunStore.create(tmp_path / "empty"))
    with pytest.raises(ValueError, match="is no runs directory"):
        run_browser(tmp_path / "nothing")
    with pytest.raises(ValueError, match="task = 'poems'"):
        run_browser(data_dir() / "recorded" / "study", task="poems")


def test_runs_without_cost_or_curves_are_a_table_still(tmp_path):
    made = RunStore.create(tmp_path / "bare")
    made.append_run({"run_id": "a", "task": "films", "arm": "none", "kind": "run", "seed": 0, "metric": "accuracy", "score": 0.5, "higher_is_better": True})  # fmt: skip
    bare = run_browser(made)
    assert (bare.cost, bare.curve, bare.front()) == ("", "", []) and ids(bare) == ["a"]
    assert marks(bare.view["points"]) == marks(bare.view["lines"]) == {}
    assert "image/svg+xml" in bare._repr_mimebundle_()[0]


def unscored(tmp_path, scores, higher_is_better=False):
    """A browser of runs with these scores, of which some are missing."""
    made = RunStore.create(tmp_path / "unscored")
    for seed, (arm, score) in enumerate(scores):
        record = {"task": "films", "arm": arm, "kind": "run", "seed": seed, "metric": "perplexity", "score": score}
        made.append_run(
            {"run_id": f"r{seed}", **record, "higher_is_better": higher_is_better, "cost": {"seconds": 1.0 + seed}}
        )
    return run_browser(made)


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")], ids=str)
def test_a_run_without_a_score_is_listed_last_and_makes_no_point(missing, tmp_path):
    browser = unscored(tmp_path, [("none", missing), ("all", 7.5), ("all", missing), ("features", 9.0)])
    assert browser.frame()["score"].dtype == float and ids(browser)[:2] == ["r1", "r3"]
    assert "best: all, seed 1, perplexity 7.50; 2 without a score." in browser.sentence
    drawn = browser.view["points"]
    assert set(marks(drawn)) == {"r1", "r3"} and "2 without this record" in drawn and "nan" not in drawn
    assert [score for _, score in browser.front()] == [7.5]
    assert "the best is all, seed 1, perplexity 7.5; 2 have no score" in browser.figure.summary
    browser.selected = ["r0"]
    assert browser.sentence == "4 runs of films, 1 chosen; no score is recorded of these."
    assert "of 1 chosen no score is recorded" in browser.figure.summary


@pytest.mark.parametrize("missing", [None, float("nan")], ids=str)
def test_runs_of_which_none_has_a_score_are_a_table_still(missing, tmp_path):
    browser = unscored(tmp_path, [("none", missing), ("all", missing)], higher_is_better=True)
    assert browser.sentence == "2 runs of films, 0 chosen; no score is recorded."
    assert browser.front() == [] and marks(browser.view["points"]) == {}
    assert "2 without this record" in browser.view["points"]
    data, _ = browser._repr_mimebundle_()
    assert "no score is recorded" in data["text/plain"] and "nan" not in data["text/plain"]
    assert "<svg" in data["image/svg+xml"]


def test_the_recorded_study(tmp_path):
    browser = run_browser(data_dir() / "recorded" / "study", task="glosses")
    everything = RunStore(data_dir() / "recorded" / "study").runs()
    assert len(browser.frame()) == (everything["task"] == "glosses").sum()
    assert {"loss", "features", "attention", "outputs", "task"} <= set(browser._curve_names)
    data, _ = browser._repr_mimebundle_()
    assert data["image/svg+xml"].startswith("<svg") and data["text/plain"] == repr(browser)
