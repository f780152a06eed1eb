import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from fakit.experiments.store import RunStore


def _run(run_id, seed=0, accuracy=0.5):
    return {"run_id": run_id, "task": "glosses", "arm": "none", "seed": seed, "test": {"accuracy": accuracy}}


def test_what_is_written_is_read_back(tmp_path):
    store = RunStore.create(tmp_path / "runs", what="a test")
    config = {"layer_map": [[1, 2]], "training": {"steps": 3}}
    store.append_steps("a", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "loss_outputs": 0.25}])
    store.append_run({**_run("a", accuracy=0.75), "config": config})
    store.append_steps("b", [{"step": 1, "loss": float("nan")}])
    store.append_run(_run("b", seed=1))

    again = RunStore(tmp_path / "runs")
    runs = again.runs()
    assert runs["run_id"].tolist() == ["a", "b"]
    assert runs["test.accuracy"].tolist() == [0.75, 0.5]
    assert runs["config.training.steps"].iloc[0] == 3
    assert runs["config.layer_map"].iloc[0] == [[1, 2]]
    assert again.record("a")["config"] == config
    assert again.has("a") and not again.has("c")
    assert again.steps("a")["loss"].tolist() == [2.0, 1.5]
    assert again.steps("a")["loss_outputs"].isna().tolist() == [True, False]
    assert len(again.steps()) == 3
    assert again.steps("b")["loss"].isna().all()
    # and without fakit
    assert pd.read_json(tmp_path / "runs" / "runs.jsonl", lines=True)["run_id"].tolist() == ["a", "b"]
    for line in (tmp_path / "runs" / "steps.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # no NaN: strict JSON


def test_manifest_says_what_made_it(tmp_path):
    import torch
    import transformers

    manifest = RunStore.create(tmp_path / "runs", what="a test").manifest
    assert manifest == json.loads((tmp_path / "runs" / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["what"]) == ("fakit-runs", 1, "a test")
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["transformers"] == transformers.__version__
    assert manifest["versions"]["python"] == sys.version.split()[0]
    assert manifest["machine"]["threads"] == torch.get_num_threads()
    assert pd.Timestamp(manifest["created"]).tzinfo is not None


def test_an_empty_store_has_no_runs_and_no_steps(tmp_path):
    store = RunStore.open(tmp_path / "runs")
    assert len(store) == len(store.runs()) == len(store.steps()) == 0
    assert RunStore.open(tmp_path / "runs").manifest == store.manifest


def test_runs_are_append_only(tmp_path):
    store = RunStore.open(tmp_path)
    store.append_run(_run("a"))
    with pytest.raises(ValueError, match=r"a is recorded in .* already"):
        store.append_run(_run("a"))
    with pytest.raises(ValueError, match="needs a run_id; found the keys seed"):
        store.append_run({"seed": 0})
    with pytest.raises(ValueError, match=r"b is not recorded in .*, which holds a\."):
        store.record("b")
    assert len(store) == 1


def test_steps_of_a_run_begun_twice_count_once(tmp_path):
    store = RunStore.open(tmp_path)
    store.append_steps("a", [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}])
    store.append_steps("a", [{"step": 1, "loss": 1.0}])
    assert dict(zip(*store.steps("a")[["step", "loss"]].to_numpy().T, strict=True)) == {1: 1.0, 2: 8.0}


@pytest.mark.filterwarnings("ignore:.*cut short")
@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_cut_last_line_is_reported_set_aside_and_written_anew(tmp_path, cut):
    store = RunStore.open(tmp_path)
    store.append_run(_run("a"))
    store.append_run(_run("b"))
    path = tmp_path / "runs.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(path.read_bytes()[:-cut])

    store = RunStore(tmp_path)
    with pytest.warns(UserWarning, match=r"runs\.jsonl: the last line is cut short .*line 2.*left out"):
        assert store.runs()["run_id"].tolist() == ["a"]
    assert not store.has("b")
    with pytest.warns(UserWarning, match=r"moved to runs\.jsonl\.rest"):
        store.append_run(_run("b"))
    assert store.runs()["run_id"].tolist() == ["a", "b"]
    assert path.read_bytes().splitlines() == lines
    assert (tmp_path / "runs.jsonl.rest").read_bytes() == (lines[1] + b"\n")[:-cut] + b"\n"


def test_a_corrupt_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    store = RunStore.open(tmp_path)
    store.append_run(_run("a"))
    path = tmp_path / "runs.jsonl"
    path.write_text('{"run_id": "x", "see\n' + path.read_text())
    with pytest.raises(ValueError, match=r"runs\.jsonl: line 1 is corrupt: expected a JSON object.*run_id.*\"see"):
        store.runs()
    path.write_text('{"no": "id"}\n')
    with pytest.raises(ValueError, match="line 1 is corrupt"):
        store.runs()


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no runs directory: .*manifest\.json, found an empty folder.*create"):
        RunStore(tmp_path)
    with pytest.raises(ValueError, match="found no such folder"):
        RunStore(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"found notes\.txt"):
        RunStore(tmp_path)
    with pytest.raises(ValueError, match=r"found notes\.txt"):
        RunStore.open(tmp_path)
    with pytest.raises(ValueError, match=r"asked for a new runs directory, found notes\.txt"):
        RunStore.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_another_format_or_version_is_refused(tmp_path):
    RunStore.create(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(ValueError, match="holds fakit-runs of version 2, this fakit reads fakit-runs of version 1"):
        RunStore(tmp_path)
    path.write_text(json.dumps(manifest | {"format": "other"}))
    with pytest.raises(ValueError, match="holds other of version 1"):
        RunStore(tmp_path)
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json is corrupt"):
            RunStore(tmp_path)


_WRITER = """
import sys
from fakit.experiments.store import RunStore
store = RunStore.open(sys.argv[1])
for n in range(int(sys.argv[3])):
    store.append_steps(sys.argv[2], [{"step": n, "text": "x" * 5000}])
    print(n, flush=True)
"""


def test_two_writers_at_once_lose_nothing(tmp_path):
    tmp_path = tmp_path / "made by whoever comes first"
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name, "60"], stdout=subprocess.DEVNULL) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    steps = RunStore(tmp_path).steps()
    assert steps.groupby("run_id")["step"].apply(list).to_dict() == {"a": list(range(60)), "b": list(range(60))}


@pytest.mark.filterwarnings("ignore:.*cut short")
def test_a_killed_writer_leaves_every_line_it_reported(tmp_path):
    RunStore.create(tmp_path)
    command = [sys.executable, "-c", _WRITER, str(tmp_path), "a", "1000000"]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    reported = [int(writer.stdout.readline()) for _ in range(20)]
    time.sleep(0.05)
    os.kill(writer.pid, signal.SIGKILL)
    reported += [int(line) for line in writer.stdout.read().split()]
    writer.wait()
    steps = RunStore(tmp_path).steps("a")["step"].tolist()
    assert steps[: len(reported)] == reported
    assert len(steps) - len(reported) in (0, 1)
