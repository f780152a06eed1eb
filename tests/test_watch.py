"""The watch on a student's similarity: what it measures is CKA, and a watched run trains the very same student."""

import pytest
import torch

from fakit import DistillationTrainer, LayerMap, capture
from fakit.similarity import cka
from fakit.watch import SimilarityWatch
from tests.families import batch
from tests.training import arguments, data, parts


def held_out(rows=8):
    made = batch(rows, padding=2)
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def train(tmp_path, *callbacks, **changes):
    teacher, student, objective = parts()
    trainer = DistillationTrainer(
        teacher, student, objective, arguments(tmp_path, **changes), train_dataset=data(), callbacks=list(callbacks)
    )
    trainer.train()
    return student


def test_it_measures_at_the_start_every_n_steps_and_at_the_end(tmp_path):
    watch = SimilarityWatch(parts()[0], held_out(), every=4)
    student = train(tmp_path, watch)
    assert list(watch.history) == [0, 4, 6]  # 24 rows, 4 a step
    assert all(matrix.shape == (3, 4) for matrix in watch.history.values())
    assert student.training
    assert not torch.equal(watch.history[0], watch.history[6])
    trained = watch.history[6]
    torch.testing.assert_close(watch.measure(student, 6), trained)


def test_the_values_are_cluster_aware_cka_of_valid_tokens():
    teacher, student, _ = parts()
    given = held_out(6)
    found = SimilarityWatch(teacher, given).measure(student, 0)
    mask = given["attention_mask"].bool()
    rows = torch.arange(6)[:, None].expand_as(mask)[mask]
    with torch.no_grad():
        ours, theirs = (capture(m.eval(), given, hidden_states=range(4 - (m is student))) for m in (student, teacher))
    expected = cka(ours.hidden_states[2][mask], theirs.hidden_states[3][mask], clusters=rows)
    assert found[2, 3].item() == pytest.approx(expected, abs=1e-5)


def test_batches_split_as_one_likes():
    teacher, student, _ = parts()
    whole = held_out(8)
    pieces = [{name: value[i : i + 3] for name, value in whole.items()} for i in range(0, 8, 3)]
    values = [SimilarityWatch(teacher, given).measure(student, 0) for given in (whole, pieces)]
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=0)


def test_a_watched_run_trains_the_very_same_student(tmp_path):
    """With dropout: its random numbers go on as if the student had not been asked."""
    plain = train(tmp_path / "plain")
    watched = train(tmp_path / "watched", SimilarityWatch(parts()[0], held_out(), every=1))
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_figure_follows_a_map_or_the_best_pairs(tmp_path):
    watch = SimilarityWatch(parts()[0], held_out(), every=3)
    with pytest.raises(ValueError, match="nothing was measured yet"):
        watch.figure()
    train(tmp_path, watch)
    figure = watch.figure(LayerMap([(1, 2), (2, 3)]))
    assert [trace.name for trace in figure.plotly.data] == ["S1 and T2", "S2 and T3"]
    assert list(figure.plotly.data[0].x) == [0, 3, 6]
    assert figure.plotly.data[1].y[-1] == pytest.approx(float(watch.history[6][2, 3]))
    assert figure.summary.startswith("CKA from step 0 to step 6: S1 and T2")
    best = watch.figure().plotly.data
    assert [trace.name for trace in best] == [f"S{s} and T{int(watch.history[6][s].argmax())}" for s in (1, 2)]
    with pytest.raises(ValueError, match="layer 9 asked of a 3-layer teacher"):
        watch.figure(LayerMap([(1, 9)]))


def test_refusals():
    with pytest.raises(ValueError, match="every = 0"):
        SimilarityWatch(parts()[0], held_out(), every=0)
    with pytest.raises(ValueError, match="3 sequences"):
        SimilarityWatch(parts()[0], held_out(3))
