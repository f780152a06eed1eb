"""`make bench` compares ways that compute the same number, says what each costs and which bars are reached."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from benchmarks import hand_written
from benchmarks.__main__ import main
from benchmarks.measure import Way, agree, run_json, seconds
from benchmarks.models import QUICK, models, random_batch
from benchmarks.peers import environments
from benchmarks.peers.environments import measure_peer
from benchmarks.peers.run import trained_loss
from benchmarks.report import conditions, figure, markdown, peers_figure, peers_markdown, write
from benchmarks.table import ROWS, Result, Table
from benchmarks.ways import WAYS

ROW = Result("long-memory", "features", "by hand", ours=12.0, theirs=100.0, unit="MiB", bar=0.1)


@pytest.mark.parametrize("work", WAYS)
def test_both_ways_give_one_number_and_one_gradient(work):
    torch.set_default_dtype(torch.float64)  # in float32 the hand-written loop keeps four digits of a KL of .01
    try:
        batch = random_batch(QUICK, rows=3, tokens=24)
        ways = {name: WAYS[work][name](QUICK) for name in ("by hand", "fakit")}
        losses = {name: way.step(batch) for name, way in ways.items()}
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for way in ways.values() for parameter in way.parameters} == {torch.float64}
    agree(losses, rtol=1e-5)
    assert losses["fakit"] > 0
    for ours, theirs in zip(ways["fakit"].parameters, ways["by hand"].parameters, strict=True):
        if theirs.grad is None:
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_padding_takes_no_part_in_the_hand_written_loss():
    teacher, student = models(QUICK, "eager")
    batch = random_batch(QUICK, rows=2, tokens=16)
    changed = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    assert not torch.equal(batch["input_ids"], changed["input_ids"])
    losses = [hand_written.all_terms(teacher, student, b).item() for b in (batch, changed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_ways_that_differ_are_refused():
    with pytest.raises(ValueError, match="'by hand' gives 1, 'fakit' 2"):
        agree({"by hand": 1.0, "fakit": 2.0})
    with pytest.raises(ValueError, match="do not compute the same"):
        agree({"by hand": 1.0, "fakit": float("nan")})


def test_seconds_are_those_of_the_steps():
    x = nn.Parameter(torch.ones(()))
    turns = []

    def way(name):
        return Way(lambda batch: (turns.append(name), x * 3)[1], [x])

    taken = seconds({"a": way("a"), "b": way("b")}, {}, repeats=2, same=("a", "b"))
    assert turns == ["a", "b"] * 3  # one unmeasured turn each, then in turns
    assert set(taken) == {"a", "b"} and min(taken.values()) > 0
    assert x.grad is None


def test_a_failing_process_says_why():
    with pytest.raises(ValueError, match=r"failed: .*broken"):
        run_json([sys.executable, "-c", "raise SystemExit('broken')"])


def test_the_rows_are_those_of_the_issue_and_all_run_small(tmp_path, capsys):
    main(["--quick", "--repeats", "1", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in record["rows"]] == list(ROWS)
    for row in record["rows"]:
        assert row["ours"] > 0 and row["theirs"] > 0
        assert row["ratio"] == row["ours"] / row["theirs"]
        assert row["reached"] == (row["ratio"] <= row["bar"])
        assert f"{row['ratio']:.2f}, bar {row['bar']:.2f}: {'reached' if row['reached'] else 'missed'}" in said
    (row,) = (row for row in record["rows"] if row["name"] == "vocabulary")
    logits = 64 * QUICK.vocabulary * 4 / 2**20  # (N, V) in float32
    assert row["theirs"] > 3 * logits  # those of student and teacher, and their logarithms, at least
    assert row["ours"] < row["theirs"]
    assert "threads" in record["conditions"] and "show nothing" in record["conditions"]


def test_rows_are_chosen_by_name(tmp_path):
    main(["--quick", "--repeats", "1", "--rows", "floor", "--out", str(tmp_path)])
    assert [row["name"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == ["floor"]
    with pytest.raises(ValueError, match="no row is called nonsense; the rows are seconds, memory"):
        list(Table(quick=True, repeats=1).run(["nonsense"]))


def test_a_bar_is_reached_at_or_below_it():
    assert not ROW.reached and ROW.ratio == 0.12
    assert replace(ROW, ours=10.0).reached
    assert "| 0.12 | ≤ 0.10 | missed |" in markdown([ROW], "said")


def test_the_report_has_table_record_and_figure(tmp_path):
    paths = write(tmp_path / "new", [ROW, replace(ROW, name="other", ours=5.0)], conditions(quick=False, repeats=5))
    assert [path.name for path in paths] == ["bench.json", "bench.md", "bench.svg"]
    assert "median of 5 turns" in paths[1].read_text()
    assert ElementTree.parse(paths[2]).getroot().tag.endswith("svg")
    (axes,) = figure([ROW, replace(ROW, ours=5.0)]).axes
    assert [text.get_text() for text in axes.texts] == ["0.12 (bar 0.10, missed)", "0.05 (bar 0.10, reached)"]
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == pytest.approx([0.12, 0.05])


def test_a_peer_that_does_not_run_is_a_finding_with_its_reason():
    with_nothing_installed = measure_peer("textbrewer", (2, 16), quick=True, repeats=1, python=Path(sys.executable))
    assert list(with_nothing_installed) == ["error"]
    assert "No module named 'textbrewer'" in with_nothing_installed["error"]
    row = {"package": "textbrewer==1", "work": "all terms", "fakit_seconds_ratio": 0.5, "fakit_memory_ratio": 0.25}
    *_, broken = peers_markdown([row | with_nothing_installed]).splitlines()
    assert broken.startswith("| textbrewer==1 | all terms | – | 0.50 | – | 0.25 |") and "No module named" in broken
    *_, good = peers_markdown([row | {"seconds_ratio": 1.5, "memory_ratio": 1.25, "note": "a|b"}]).splitlines()
    assert good == "| textbrewer==1 | all terms | 1.50 | 0.50 | 1.25 | 0.25 | a/b |"


def test_a_peer_that_trains_nothing_is_refused():
    x, unused = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    assert trained_loss(Way(lambda batch: x * 3, [x, unused]), {}) == 3
    for loss in (lambda batch: x * 0, lambda batch: x * float("nan"), lambda batch: x.detach() + unused * 0 + 1):
        with pytest.raises(ValueError, match="the loss is"):
            trained_loss(Way(loss, [x, unused]), {})


def test_an_environment_that_cannot_be_made_says_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments.venv, "create", lambda folder, **options: folder.mkdir())
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no such package\n")
    monkeypatch.setattr(environments.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(ValueError, match=r"pip install torch==.*failed: ERROR: no such package"):
        environments.environment("trl")
    assert not (tmp_path / "trl" / ".installed").exists()


def test_torchvision_in_an_environment_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "FOLDER", tmp_path)

    def create(folder, **options):
        (folder / "lib" / "python3.11" / "site-packages" / "torchvision").mkdir(parents=True)

    monkeypatch.setattr(environments.venv, "create", create)
    monkeypatch.setattr(environments.subprocess, "run", lambda *a, **o: subprocess.CompletedProcess([], 0, "", ""))
    with pytest.raises(ValueError, match="brought torchvision"):
        environments.environment("trl")


def test_an_unknown_peer_is_refused_before_any_work():
    with pytest.raises(
        ValueError, match="no peer is called nobody; the peers are textbrewer, silverspoon, trl, modelopt"
    ):
        main(["--quick", "--peers", "nobody"])


def test_the_figure_of_peers_shows_those_that_did_not_run(tmp_path):
    row = {"package": "one==1", "work": "outputs", "fakit_seconds_ratio": 0.5, "fakit_memory_ratio": 0.25}
    peers = [row | {"seconds_ratio": 1.5, "memory_ratio": 1.25, "note": ""}, row | {"error": "broken"}]
    assert [path.name for path in write(tmp_path, [], "said", peers)] == ["bench.json", "bench.md", "peers.svg"]
    seconds, memory = peers_figure(peers).axes
    said = [[text.get_text() for text in axes.texts] for axes in (seconds, memory)]
    assert said[0] == ["peer 1.50", "fakit 0.50", "peer did not run", "fakit 0.50"]
    assert said[1] == ["peer 1.25", "fakit 0.25", "peer did not run", "fakit 0.25"]
