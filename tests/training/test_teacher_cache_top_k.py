"""A cache of a language model's largest logits, at labels alone: the losses of the live teacher, its size to the byte,
and what it cannot serve, refused before any work.
"""

import logging
import shutil
from itertools import pairwise

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening

from fakit import (
    DistillationTrainer,
    Features,
    LayerMap,
    Objective,
    Outputs,
    Schedule,
    Task,
    TeacherCache,
    Term,
    capture,
    shrink,
)
from fakit.losses import outputs
from fakit.losses.top_k import SERVED, TopK, buckets, excess_at_most
from fakit.tasks import embedded_teacher, load_task
from fakit.training.teacher_cache import CacheContent
from tests.families import VOCAB, tiny, tokenizer
from tests.training.runs import At, arguments, logged, weights

K = 6


def teacher(family: str = "llama"):
    made = tiny(family)
    made.get_output_embeddings().weight.data.mul_(15)  # distributions that are not all alike
    return made


def rows(number: int = 18) -> list[dict]:
    """Rows of 4 to 9 tokens: a prompt without labels and an answer with them; every fifth has no label at all."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for i in range(number):
        ids = torch.randint(3, VOCAB, (4 + i % 6,), generator=generator).tolist()
        prompt = len(ids) if i % 5 == 4 else 2 + i % 2
        labels = [-100] * prompt + ids[prompt:]
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return made


def collator(side: str = "right"):
    def collate(features: list[dict]) -> dict[str, torch.Tensor]:
        paddings = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            name: pad_sequence([torch.as_tensor(f[name]) for f in features], True, padding, padding_side=side)
            for name, padding in paddings.items()
        }

    return collate


def run(folder, objective, cache=None, side="right", train=None, made=None, callbacks=(), collate=None, **changes):
    """A trainer that has trained; without its teacher where it has a cache."""
    live = teacher() if made is None else made
    torch.manual_seed(1)
    student = shrink(live, 2, init="random")
    trainer = DistillationTrainer(
        live if cache is None else None,
        student,
        objective,
        args=arguments(folder, **{"optim": "sgd", "learning_rate": 1e-2} | changes),
        train_dataset=rows() if train is None else train,
        data_collator=collate or collator(side),
        callbacks=list(callbacks),
        teacher_cache=cache,
    )
    trainer.train()
    return trainer


def both(loss: str = "forward_kl", temperature: float = 2.0, **more) -> Objective:
    return Objective(
        LayerMap.uniform(2, 3), Features("mse"), None, Outputs(loss, temperature, **more), Task(weight=0.5)
    )


# -- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", SERVED)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_that_of_the_live_teachers_logits_joined(loss, temperature, tmp_path):
    live, dataset = teacher(), rows()
    objective = Objective(outputs=Outputs(loss, temperature))
    how = {"top_k": K, "dtype": "float32", "tokens": "labeled", "shard_rows": 5}
    cache = TeacherCache.build(tmp_path, live, dataset, objective, **how)
    student = shrink(live, 2, init="random").eval()
    for numbers in ([0, 7, 3], [4], [9, 17]):
        batch = collator()([dataset[i] for i in numbers])
        labels = batch.pop("labels")
        ours, theirs = capture(student, batch), capture(live, batch)
        found = objective(ours, cache.trace(numbers, batch["attention_mask"]), labels).terms["outputs"]
        expected = []
        for b, i in enumerate(numbers):  # by hand: each place whose next token counts
            own = dataset[i]["labels"]
            for t, (_, after) in enumerate(pairwise(own)):
                if after != -100 or {*own} == {-100}:
                    p, q = theirs.logits[b, t], ours.logits[b, t]
                    kept = p.topk(K).indices
                    left = torch.ones(VOCAB, dtype=torch.bool).scatter(0, kept, False)
                    joined = [
                        torch.cat([z[kept], temperature * (z[left] / temperature).logsumexp(0, keepdim=True)])
                        for z in (q, p)
                    ]
                    expected.append(outputs.LOSSES[loss](*(z[None] for z in joined), None, temperature))
        torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("side", "family"), [("right", "llama"), ("left", "llama"), ("right", "gpt2")])
def test_logits_at_labels_alone_train_as_the_live_teachers(side, family, tmp_path):
    live = teacher(family)
    cache = TeacherCache.build(tmp_path / "c", live, rows(), both(), dtype="float32", tokens="labeled")
    how = {"side": side, "made": live, "train_sampling_strategy": "random", "num_train_epochs": 2}
    ours, theirs = run(tmp_path, both(), cache, **how), run(tmp_path, both(), **how)
    for name in ("loss", "outputs", "features", "task"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-4, abs=1e-6), name
    for name, p in weights(theirs).items():
        assert torch.allclose(weights(ours)[name], p, atol=2e-6), name


def test_all_of_the_vocabulary_among_the_largest_is_the_live_teacher_whatever_the_loss(tmp_path):
    """k = V: no rest, so that every loss, temperature and schedule is served."""
    objective = Objective(
        outputs=Outputs("taid", Schedule(4.0, 1.0), t=Schedule(0.4, 1.0)), terms={"u": Outputs("uld")}
    )
    cache = TeacherCache.build(tmp_path / "c", teacher(), rows(), objective, top_k=VOCAB, dtype="float32")
    found, expected = (logged(run(tmp_path, objective, given)) for given in (cache, None))
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_largest_train_nearly_as_all_of_them(tmp_path):
    losses, ends = {}, {}
    for k in (2, 20, None):
        cache = TeacherCache.build(tmp_path / str(k), teacher(), rows(), both(), top_k=k, dtype="float32")
        losses[k] = logged(trained := run(tmp_path, both(), cache, num_train_epochs=3), "outputs")
        ends[k] = torch.cat([p.flatten() for p in weights(trained).values()])
    assert losses[2][0] < losses[20][0] < losses[None][0]  # of the same student: lower bounds
    assert (ends[20] - ends[None]).norm() < 0.5 * (ends[2] - ends[None]).norm()


def test_packed_by_the_collator_and_in_the_rows(tmp_path):
    live, dataset = teacher(), rows()
    outputs_alone = Objective(outputs=Outputs())
    how = {"dtype": "float32", "tokens": "labeled", "top_k": VOCAB}
    cache = TeacherCache.build(tmp_path / "c", live, dataset, outputs_alone, **how)
    collate = {"collate": DataCollatorWithFlattening(return_flash_attn_kwargs=False)}
    bare = [{name: row[name] for name in ("input_ids", "labels")} for row in dataset]
    found, expected = (logged(run(tmp_path, outputs_alone, given, train=bare, **collate)) for given in (cache, None))
    assert found == pytest.approx(expected, rel=1e-4)
    packed = []
    for first, second in zip(dataset[::2], dataset[1::2], strict=True):
        positions = [*range(len(first["input_ids"])), *range(len(second["input_ids"]))]
        packed.append({name: first[name] + second[name] for name in first} | {"position_ids": positions})

    def collate(features):
        places = [torch.tensor(f["position_ids"]) for f in features]
        return collator()(features) | {"position_ids": pad_sequence(places, True)}

    cache = TeacherCache.build(tmp_path / "packed", live, packed, outputs_alone, **how)
    how = {"train": packed, "collate": collate}
    found, expected = (logged(run(tmp_path, outputs_alone, given, **how)) for given in (cache, None))
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_bounds_hold_on_the_distributions_of_a_trained_teacher():
    live, words = embedded_teacher("scans")
    batch = {"input_ids": torch.tensor(load_task("scans").encode("validation", words, 64)["input_ids"][0][:40])[None]}
    ours, theirs = (capture(model, batch).logits.double() for model in (shrink(live, 2), live))
    for k in (1, 4, 16):
        values, indices = theirs.log_softmax(-1).topk(k)
        rest = theirs.log_softmax(-1).scatter(-1, indices, -torch.inf).logsumexp(-1)
        top = TopK(values, indices, {1.0: rest}, theirs.shape[-1])
        joined = buckets(ours, top)
        for loss in SERVED:
            full = outputs.PER_POSITION[loss](ours, theirs)
            assert (outputs.PER_POSITION[loss](*joined) <= full * (1 + 1e-6) + 1e-9).all(), loss
        lost = outputs.PER_POSITION["forward_kl"](ours, theirs) - outputs.PER_POSITION["forward_kl"](*joined)
        assert (lost <= excess_at_most(ours, top) + 1e-9).all() and lost.mean() > 1e-4


# -- its size ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"top_k": K, "tokens": "labeled", "dtype": "float16"},
        {"top_k": K, "temperatures": [1.0, 2.0], "hidden_states": [1, 3]},
        {"tokens": "labeled", "dtype": "int8", "attentions": [2]},
        {"top_k": VOCAB, "dtype": "float32"},
    ],
)
def test_the_size_that_is_said_is_what_is_written(how, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        cache = TeacherCache.build(tmp_path / "c", teacher(), rows(), shard_rows=4, **how)
    (said,) = [record.message for record in caplog.records if "teacher cache" in record.message]
    written = [path.stat().st_size for path in (tmp_path / "c").glob("*.safetensors")]
    assert len(written) == 5 and f"will take {sum(written):,} bytes in 5 files" in said
    assert cache.bytes == sum(written)
    tokens = sum(len(row["input_ids"]) for row in rows())
    assert f"18 rows of {tokens} tokens" in said and ("logits at" in said) == (how.get("tokens") == "labeled")


def test_a_classifiers_size_and_that_of_rows_with_positions(tmp_path, caplog):
    labeled = [{"input_ids": row["input_ids"]} for row in rows()]
    with caplog.at_level(logging.WARNING):
        first = TeacherCache.build(tmp_path / "bert", tiny("bert"), labeled, hidden_states=[2])
        positions = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in rows()]
        second = TeacherCache.build(tmp_path / "llama", teacher(), positions, top_k=K)
    for cache, record in zip((first, second), caplog.records, strict=True):
        assert f"{cache.bytes:,} bytes in 1 file" in record.message


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"where the teacher cache would go, has 0\.0 MB free"):
        TeacherCache.build(tmp_path / "c", teacher(), rows(), top_k=K)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_build_that_goes_on_says_what_is_left(tmp_path, caplog, monkeypatch):
    from fakit.training.teacher_cache import cache as module

    whole, made = module.make_shard, []

    def killed(*given):
        made.append(given)
        if len(made) == 3:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(module, "make_shard", killed)
    how = {"top_k": K, "tokens": "labeled", "shard_rows": 4}
    with pytest.raises(KeyboardInterrupt):
        TeacherCache.build(tmp_path, teacher(), rows(), **how)
    done = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    with caplog.at_level(logging.WARNING):
        cache = TeacherCache.build(tmp_path, teacher(), rows(), **how)
    assert "10 rows of" in caplog.text and f"{cache.bytes - done:,} bytes in 3 files" in caplog.text


def test_bytes_a_token(tmp_path):
    """k · (2 + 2) of bfloat16 and 16-bit indices, and 4 for the rest."""
    cache = TeacherCache.build(tmp_path, teacher(), rows(), top_k=K)
    assert sum(cache.manifest["sizes"].values()) == K * 4 + 4


# -- which cache serves -----------------------------------------------------------------------------------------------


def test_a_cache_of_more_rows_or_more_tokens_serves(tmp_path):
    live = teacher()
    how = {"objective": both(), "top_k": K}
    built = TeacherCache.build(tmp_path, live, rows(), **how)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for some in (rows()[3:9], rows()[::-1], [*rows()[:2], *rows()[:2]]):
        for tokens in ("all", "labeled"):
            cache = TeacherCache.build(tmp_path, live, some, **how, tokens=tokens)
            assert cache.manifest == built.manifest
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="another tokenized data set"):
        TeacherCache.build(tmp_path, live, [*rows(), {**rows()[0], "input_ids": [9, 8, 7, 6]}], **how)
    with pytest.raises(ValueError, match="another content"):
        TeacherCache.build(tmp_path, live, rows(), both(temperature=1.0), top_k=K)


def test_older_caches_of_the_largest_are_those_of_temperature_1():
    old = {"hidden_states": [], "attentions": [], "inputs": ["queries", "keys"], "logits": True, "top_k": K}
    old |= {"dtype": "bfloat16"}
    content = CacheContent(**old)
    assert content == CacheContent(top_k=K, temperatures=(1.0,)) and {*content.written()} == {*old}


# -- refusals ---------------------------------------------------------------------------------------------------------


class Own(Term):
    def needs(self, side):
        return {"logits": True}

    def compare(self, student, teacher, labels):
        return (student.logits - teacher.logits).square().mean()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        *((Objective(outputs=Outputs(loss)), f"beyond the 6 largest of {VOCAB}: '{loss}' compares all")
          for loss in sorted({*outputs.LOSSES} - {*SERVED})),
        (Objective(outputs=Outputs(outputs.forward_kl)), "'forward_kl' compares all"),
        (Objective(outputs=Outputs(temperature=Schedule(2.0, 1.0))), "its temperature changes"),
        (Objective(outputs=Outputs(reversal=0.5)), "its temperature changes"),
        (Objective(outputs=Outputs(vocab_size=40)), "vocab_size=40 cuts its 50 classes"),
        (Objective(terms={"own": Own()}), r"the logits beyond the 6 largest of 50 \(own term\)"),
    ],
)  # fmt: skip
def test_what_the_largest_do_not_serve_is_refused_before_anything_is_written(objective, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TeacherCache.build(tmp_path / "c", teacher(), rows(), objective, top_k=K)
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, objective, TeacherCache.build(tmp_path / "other", teacher(), rows(), top_k=K))


def test_another_temperature_is_refused_also_while_training(tmp_path):
    cache = TeacherCache.build(tmp_path / "c", teacher(), rows(), both(), top_k=K)
    with pytest.raises(ValueError, match=r"the mass of the rest at temperature 1.0, .* known at 2.0 \(outputs term\)"):
        run(tmp_path, both(temperature=1.0), cache)
    objective = both()

    def cooler(objective):
        objective.temperature = 1.5

    with pytest.raises(ValueError, match=r"the mass of the rest at temperature 1\.5"):
        run(tmp_path, objective, cache, callbacks=[At(2, objective, cooler)])


def test_labels_that_the_cache_was_not_built_with_are_refused(tmp_path):
    cache = TeacherCache.build(tmp_path / "c", teacher(), rows(), both(), tokens="labeled")
    others = rows()
    others[3]["labels"] = others[3]["input_ids"]
    with pytest.raises(ValueError, match=r"row 3\) are not among the 18 rows .* or other labels"):
        run(tmp_path, both(), cache, train=others)
    words = tokenizer("a b c")
    words.pad_token = words.pad_token or "a"
    collate = DataCollatorForLanguageModeling(words, mlm=False)  # labels of its own: every token

    def collated(features):
        return collate([{k: v for k, v in feature.items() if k != "labels"} for feature in features])

    with pytest.raises(ValueError, match=r"compares outputs at .* tokens whose next token has no label in the rows"):
        run(tmp_path, both(), cache, collate=collated)
    batch = collator()(rows()[:2])
    labels = batch.pop("labels")
    trace, objective = cache.trace([0, 1], batch["attention_mask"]), Objective(outputs=Outputs())
    ours = capture(shrink(teacher(), 2), batch)
    assert objective(ours, trace, labels).total > 0
    with pytest.raises(ValueError, match=r"known at 4 tokens of this batch, .* and 3 others are compared"):
        objective(ours, trace)
    with pytest.raises(ValueError, match="uld compares a text's tokens by their order"):
        Objective(outputs=Outputs("uld"))(ours, trace, labels)


def test_labels_alone_are_for_causal_models_whose_outputs_look_at_nothing_else(tmp_path):
    with pytest.raises(ValueError, match=r"'labeled' keeps the logits of a causal model .* Bert"):
        TeacherCache.build(tmp_path / "c", tiny("bert"), [{"input_ids": [3, 4]}], tokens="labeled")
    for objective in (Objective(outputs=Outputs("uld")), Objective(terms={"own": Own()})):
        with pytest.raises(ValueError, match="the logits of all tokens, beside those whose next token has a label"):
            TeacherCache.build(tmp_path / "c", teacher(), rows(), objective, tokens="labeled")
    with pytest.raises(ValueError, match=r"row 0 has labels \(\) beside 2 tokens"):
        TeacherCache.build(tmp_path / "c", teacher(), [{"input_ids": [3, 4], "labels": 1}], tokens="labeled")
    with pytest.raises(ValueError, match="tokens='some' is not known; logits are kept at all or labeled tokens"):
        CacheContent(tokens="some")
    with pytest.raises(ValueError, match="finite temperature above 0"):
        CacheContent(top_k=K, temperatures=(0.0,))


def test_a_trace_of_the_largest_moves_and_detaches():
    top = TopK(torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, dtype=torch.long), {1.0: torch.zeros(2)}, 9)
    assert not top.map(torch.Tensor.detach).values.requires_grad
    assert buckets(torch.zeros(2, 9), top.map(lambda x: x[:1]).map(lambda x: x.expand(2, *x.shape[1:])))[1].shape == (
        2,
        4,
    )
