"""The watch on a student's similarity: what it measures is CKA, and a watched run trains the very same student."""

import pytest
import torch

from fakit import DistillationTrainer, LayerMap, capture
from fakit.similarity import cka
from fakit.training.watch import SimilarityWatch
from tests.families import VOCAB, batch, tiny
from tests.training.runs import arguments, data, parts


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


def translated(rows=8, tokens=7, target=5, padding=2):
    """Sequences of `tokens` with targets of `target`, the last row of each with padding of its own."""
    labels = torch.randint(3, VOCAB, (rows, target), generator=torch.Generator().manual_seed(3))
    labels[-1, -1] = labels[0, 1:] = -100
    made = batch(rows, tokens, padding)
    return {name: made[name] for name in ("input_ids", "attention_mask")} | {"labels": labels}


@pytest.mark.parametrize("target", [5, 7])  # 7: as long as the input, so that the wrong mask would fit
def test_each_stack_of_an_encoder_decoder_is_compared_on_its_own_tokens(target):
    teacher, student = tiny("t5"), tiny("t5", seed=1, num_layers=2, num_decoder_layers=1)
    given = translated(target=target)
    watch = SimilarityWatch(teacher, [{k: v[i : i + 4] for k, v in given.items()} for i in (0, 4)])
    found = watch.measure(student, 0)
    assert found.shape == (4, 7)
    with torch.no_grad():
        ours, theirs = capture(student, given, range(4)), capture(teacher, given, range(7))
    for s, t in ((0, 0), (2, 3), (3, 4), (3, 6)):
        mask = theirs.layer_mask(t)
        assert mask.shape == (8, 7 if t < 4 else target) and not mask.all()
        rows = torch.arange(8)[:, None].expand_as(mask)[mask]
        expected = cka(ours.hidden_states[s][mask], theirs.hidden_states[t][mask], clusters=rows)
        assert found[s, t].item() == pytest.approx(expected, abs=1e-5)
    assert found[:3, 4:].isnan().all() and found[3:, :4].isnan().all()  # other tokens: nothing to pair
    assert not (found[:3, :4].isnan().any() or found[3:, 4:].isnan().any())
    best = [trace.name for trace in watch.figure().plotly.data]
    assert best[:2] == [f"S{s} and T{found[s, :4].argmax()}" for s in (1, 2)] and best[2][:6] == "S3 and"


def test_a_student_of_one_stack_is_compared_with_the_encoder():
    teacher, student = tiny("t5"), tiny("bert")
    given = translated()
    watch = SimilarityWatch(teacher, given)
    found = watch.measure(student, 0)
    assert not found[:, :4].isnan().any() and found[:, 4:].isnan().all()
    back = SimilarityWatch(student, given)
    torch.testing.assert_close(back.measure(teacher, 0), found.T, equal_nan=True, atol=1e-5, rtol=0)
    assert len(back.figure().plotly.data) == 3  # the decoder's layers resemble nothing


def test_images_have_no_padding_and_every_patch_counts():
    teacher, student = tiny("vit"), tiny("vit", seed=1)
    given = {"pixel_values": torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    found = SimilarityWatch(teacher, given).measure(student, 0)
    with torch.no_grad():
        ours, theirs = (capture(m, given, hidden_states=[2]).hidden_states[2] for m in (student, teacher))
    rows = torch.arange(6).repeat_interleave(ours.shape[1])
    assert found[2, 2].item() == pytest.approx(cka(ours.flatten(0, 1), theirs.flatten(0, 1), clusters=rows), abs=1e-5)


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
