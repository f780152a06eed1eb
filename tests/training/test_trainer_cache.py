"""Training from a cache of the teacher against training with the live one: the same losses, the same weights;
what does not fit is refused.
"""

from dataclasses import replace

import datasets
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification
from transformers.trainer_callback import PrinterCallback

from fakit import DistillationTrainer, LayerMap, Objective, TeacherCache
from fakit.training.teacher_cache.training import ROW, CachedRowsCollator, with_rows
from tests.families import VOCAB, tiny, tokenizer
from tests.training.runs import At, arguments, logged, parts, weights

NAMES = ("input_ids", "attention_mask", "labels")


def rows(causal: bool = False, number: int = 24) -> list[dict]:
    """Rows of 3 to 9 tokens without padding, each different."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for i in range(number):
        ids = torch.randint(3, VOCAB, (3 + i % 7,), generator=generator).tolist()
        labels = ids if causal else int(ids[0] > VOCAB // 2)
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return made


def collator(side: str = "right"):
    def collate(features: list[dict]) -> dict[str, torch.Tensor]:
        batch = {}
        for name, padding in zip(NAMES, (0, 0, -100), strict=True):
            values = [torch.as_tensor(feature[name]) for feature in features]
            padded = values[0].dim() and pad_sequence(values, True, padding, padding_side=side)
            batch[name] = padded if values[0].dim() else torch.stack(values)
        return batch

    return collate


def run(folder, family="bert", cache=None, train=None, side="right", made=None, teacher=None, callbacks=(), **changes):
    """A trainer that has trained; without its teacher where it has a cache."""
    live, student, objective = made or parts(family)
    changes = {"optim": "sgd", "learning_rate": 1e-2, "train_sampling_strategy": "random"} | changes
    trainer = DistillationTrainer(
        live if cache is None else teacher,
        student,
        objective,
        args=arguments(folder, **changes),
        train_dataset=rows(family in ("gpt2", "llama")) if train is None else train,
        data_collator=collator(side),
        callbacks=list(callbacks),
        teacher_cache=cache,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def build(folder, family="bert", dataset=None, **how) -> TeacherCache:
    teacher, _, objective = parts(family)
    dataset = rows(family in ("gpt2", "llama")) if dataset is None else dataset
    how.setdefault("dtype", "float32")
    return TeacherCache.build(folder / "cache", teacher, dataset, objective, shard_rows=7, **how)


# -- the same training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "side", "sampling"),
    [
        ("bert", "right", "random"),
        ("bert", "right", "group_by_length"),
        ("gpt2", "right", "random"),
        ("llama", "left", "random"),
    ],
)
def test_a_float32_cache_trains_as_the_live_teacher_does(family, side, sampling, tmp_path):
    cache = build(tmp_path, family)
    how = {"side": side, "train_sampling_strategy": sampling, "num_train_epochs": 2}
    live = run(tmp_path, family, **how)
    cached = run(tmp_path, family, cache, **how)
    assert cached.teacher is None and len(logged(cached)) == 12
    for name in ("loss", "features", "attention", "outputs", "task", "features/S1_T2", "attention/S2_T3"):
        assert logged(cached, name) == pytest.approx(logged(live, name), rel=1e-4, abs=1e-6), name
    for name, p in weights(live).items():
        assert torch.allclose(weights(cached)[name], p, atol=2e-6), name


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 1e-2), ("int8", 2e-2)])
def test_a_smaller_cache_trains_nearly_so(dtype, error, tmp_path):
    exact, near = (logged(run(tmp_path, cache=build(tmp_path / kind, dtype=kind))) for kind in ("float32", dtype))
    assert near == pytest.approx(exact, rel=error) and near != exact


def test_all_of_the_logits_among_the_k_largest_train_as_full_ones(tmp_path):
    full = run(tmp_path, "gpt2", build(tmp_path / "full", "gpt2"))
    top = run(tmp_path, "gpt2", build(tmp_path / "top", "gpt2", top_k=VOCAB))
    assert logged(top) == pytest.approx(logged(full), rel=1e-5)


def test_logits_of_a_large_vocabulary_are_compared_whole_where_the_live_teachers_are_in_chunks(tmp_path):
    made = parts("gpt2", vocab_size=9000)
    live = run(tmp_path, "gpt2", made=made, max_steps=3)
    made = parts("gpt2", vocab_size=9000)
    cache = TeacherCache.build(tmp_path / "cache", made[0], rows(causal=True), made[2], dtype="float32")
    cached = run(tmp_path, "gpt2", cache, made=made, max_steps=3)
    assert logged(cached) == pytest.approx(logged(live), rel=1e-4)


def test_accumulation_and_the_last_smaller_batch(tmp_path):
    cache = build(tmp_path)
    how = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 5}
    live, cached = run(tmp_path, **how), run(tmp_path, cache=cache, **how)
    assert logged(cached) == pytest.approx(logged(live), rel=1e-4)


def test_a_datasets_dataset_keeps_its_kind_its_format_and_its_columns(tmp_path):
    dataset = datasets.Dataset.from_list([{**row, "text": "words"} for row in rows()])
    cache = build(tmp_path, dataset=dataset)
    some = dataset.shuffle(seed=1).select(range(10)).with_format("torch", columns=list(NAMES))
    live, cached = run(tmp_path, train=some), run(tmp_path, cache=cache, train=some)
    assert isinstance(cached.train_dataset, datasets.Dataset) and cached.train_dataset.format["type"] == "torch"
    assert cached.train_dataset.column_names == [*NAMES, "text", ROW]
    assert logged(cached) == pytest.approx(logged(live), rel=1e-4) and len(logged(cached)) == 3


def test_rows_that_carry_padding_lose_it_in_the_cache(tmp_path):
    padded = [
        {
            "input_ids": row["input_ids"] + [0] * (9 - len(row["input_ids"])),
            "attention_mask": row["attention_mask"] + [0] * (9 - len(row["input_ids"])),
            "labels": row["labels"],
        }
        for row in rows()
    ]
    cache = build(tmp_path, dataset=padded)
    assert cache.trace([0], torch.ones(1, 3)).hidden_states[2].shape == (1, 3, 32)
    live, cached = run(tmp_path, train=padded), run(tmp_path, cache=cache, train=padded)
    assert logged(cached) == pytest.approx(logged(live), rel=1e-4)


def test_a_teacher_beside_its_cache_is_not_run(tmp_path):
    cache = build(tmp_path)
    made = parts()
    made[0].register_forward_pre_hook(lambda *_: 1 / 0)
    assert len(logged(run(tmp_path, cache=cache, made=made, teacher=made[0]))) == 6


def test_weight_0_reads_nothing(tmp_path, monkeypatch):
    cache = build(tmp_path)
    made, read = parts(), []
    trace = cache.trace
    monkeypatch.setattr(
        cache, "trace", lambda rows, mask, needs, device: read.append(needs) or trace(rows, mask, needs)
    )

    def outputs_alone(objective):
        objective.weights.update(features=0, attention=0)

    def nothing(objective):
        objective.weights["outputs"] = 0

    run(tmp_path, cache=cache, made=made, callbacks=[At(2, made[2], outputs_alone), At(4, made[2], nothing)])
    assert [sorted(needs.hidden_states) for needs in read] == [[2, 3], [2, 3], [], []]
    assert all(needs.logits for needs in read)


def test_each_process_of_several_gets_its_own_rows(tmp_path):
    """What Accelerate's sharded sampler leaves to a process still says which rows it is made of."""
    dataset = rows()
    numbered = with_rows(build(tmp_path), dataset)
    seen = []
    for process in (0, 1):
        loader = DataLoader(
            numbered, 4, shuffle=True, generator=torch.Generator(), collate_fn=CachedRowsCollator(collator())
        )
        loader.generator.manual_seed(0)
        sharded = prepare_data_loader(loader, num_processes=2, process_index=process, put_on_device=False)
        for batch in sharded:
            for row, ids, mask in zip(batch[ROW].rows, batch["input_ids"], batch[ROW].mask, strict=True):
                assert ids[mask].tolist() == dataset[row]["input_ids"]
            seen += batch[ROW].rows
    assert sorted(seen) == list(range(24)) and seen != sorted(seen)


@pytest.mark.parametrize("how", [{"dataloader_num_workers": 1}, {"activation_checkpointing": True}, {"bf16": True}])
def test_workers_checkpointing_and_autocast(how, tmp_path):
    cache = build(tmp_path)
    live, cached = run(tmp_path, max_steps=3, **how), run(tmp_path, cache=cache, max_steps=3, **how)
    # under autocast the live teacher works in bfloat16, the cached one has worked in float32
    assert logged(cached) == pytest.approx(logged(live), rel=5e-3 if "bf16" in how else 1e-4)


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
    cache = build(tmp_path)
    whole = run(tmp_path / "whole", cache=cache, num_train_epochs=2)
    run(tmp_path / "parts", cache=cache, num_train_epochs=2, save_strategy="steps", save_steps=4)
    _, student, objective = parts()
    changes = {"optim": "sgd", "learning_rate": 1e-2, "train_sampling_strategy": "random", "num_train_epochs": 2}
    resumed = DistillationTrainer(
        None,
        student,
        objective,
        arguments(tmp_path / "parts", **changes),
        train_dataset=rows(),
        data_collator=collator(),
        teacher_cache=cache,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-8"))
    assert logged(resumed)[-4:] == pytest.approx(logged(whole)[-4:])
    for name, p in weights(whole).items():
        assert torch.allclose(weights(resumed)[name], p, atol=1e-7), name


def test_evaluation_knows_no_rows(tmp_path):
    trainer = run(tmp_path, cache=build(tmp_path))
    plain, numbered = trainer.evaluate(rows()), trainer.evaluate(trainer.train_dataset)
    assert numbered["eval_loss"] == pytest.approx(plain["eval_loss"])


# -- refusals, before any work ----------------------------------------------------------------------------------------


def refused(message: str):
    return pytest.raises(ValueError, match=message)


def test_another_data_set_is_refused(tmp_path):
    cache = build(tmp_path)
    other = rows()
    other[3]["input_ids"][0] += 1
    with refused(r"1 of the data set's 24 rows \(the first is row 3\) are not among the 24 rows of the cache"):
        run(tmp_path, cache=cache, train=other)
    stream = datasets.Dataset.from_list(rows()).to_iterable_dataset()
    with refused("IterableDataset is a stream"):
        run(tmp_path, cache=cache, train=stream)


def test_another_teacher_and_tokenizer_are_refused(tmp_path):
    mine, yours = tokenizer("a b c"), tokenizer("a b d")
    cache = build(tmp_path, tokenizer=mine)
    with refused("another teacher weights"):
        run(tmp_path, cache=cache, teacher=tiny("bert", seed=9))
    _, student, objective = parts()
    with refused("another tokenizer"):
        DistillationTrainer(None, student, objective, arguments(tmp_path), processing_class=yours, teacher_cache=cache)
    DistillationTrainer(None, student, objective, arguments(tmp_path), processing_class=mine, teacher_cache=cache)


def test_neither_teacher_nor_cache_is_refused(tmp_path):
    _, student, objective = parts()
    with refused("neither a teacher nor a cache"):
        DistillationTrainer(None, student, objective, arguments(tmp_path))


def test_students_that_do_not_fit_the_recorded_teacher_are_refused(tmp_path):
    cache = build(tmp_path)
    _, student, objective = parts()
    objective = Objective(
        objective.layer_map, objective.features, replace(objective.attention, heads="one-to-one"), objective.outputs
    )
    student.config.num_attention_heads = 2
    with refused("the student has 2 heads, the teacher 4"):
        run(tmp_path, cache=cache, made=(None, student, objective))
    student = BertForSequenceClassification(type(student.config)(**student.config.to_dict() | {"num_labels": 5}))
    with refused("labels: teacher has 2: .*, student has 5"):
        run(tmp_path, cache=cache, made=(None, student, parts()[2]))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"hidden_states": [2], "attentions": [2, 3]}, r"hidden state of teacher layer 3 \(features term\)"),
        ({"hidden_states": [2, 3], "attentions": [3]}, r"attention of teacher layer 2 \(attention term\)"),
        ({"hidden_states": [2, 3], "attentions": [2, 3], "logits": False}, r"the logits \(outputs term\)"),
    ],
)
def test_a_cache_that_lacks_something_is_refused_by_name(kept, message, tmp_path):
    cache = TeacherCache.build(tmp_path / "cache", parts()[0], rows(), **kept)
    with refused(message):
        run(tmp_path, cache=cache)


def test_relations_of_values_need_values(tmp_path):
    teacher, student, whole = parts()
    relations = replace(whole.attention, loss="relations")
    made = (teacher, student, Objective(whole.layer_map, whole.features, relations, whole.outputs, whole.task))
    with refused("the values of its attention layers"):
        run(tmp_path, cache=build(tmp_path), made=made)


def test_a_weight_that_rises_in_training_and_asks_too_much_is_refused_then(tmp_path):
    teacher, student, objective = parts()
    objective.weights["outputs"] = 0
    cache = TeacherCache.build(tmp_path / "cache", teacher, rows(), needs=objective.needs("teacher"))

    def raise_weight(objective):
        objective.weights["outputs"] = 1

    with refused(r"the logits \(outputs term\)"):
        run(tmp_path, cache=cache, made=(teacher, student, objective), callbacks=[At(2, objective, raise_weight)])


def test_a_random_map_finds_every_layer_that_it_may_draw(tmp_path):
    made = parts(layer_map=LayerMap.random(2, 3, seed=1))
    cache = TeacherCache.build(tmp_path / "cache", made[0], rows(), made[2], dtype="float32")
    assert cache.content.hidden_states == cache.content.attentions == (1, 2, 3)
    trainer = run(tmp_path, cache=cache, made=made, num_train_epochs=5)
    drawn = {name for entry in trainer.state.log_history for name in entry if name.startswith("features/")}
    assert len(drawn) > 2
    fixed = TeacherCache.build(tmp_path / "fixed", made[0], rows(), needs=made[2].needs("teacher"))
    with refused("hidden state of teacher layer"):
        run(tmp_path, cache=fixed, made=parts(layer_map=LayerMap.random(2, 3, seed=1)), num_train_epochs=5)


def test_a_collator_that_changes_tokens_is_refused(tmp_path):
    cache = build(tmp_path)
    numbered = with_rows(cache, rows())

    def masking(features):
        batch = collator()(features)
        batch["input_ids"][:, 1] = 1
        return batch

    with refused("made a batch .* whose .* tokens are not the .* tokens of its 3 rows"):
        CachedRowsCollator(masking)([numbered[i] for i in range(3)])

    def cutting(features):
        return {name: x[:, :4] if x.dim() == 2 else x for name, x in collator()(features).items()}

    with refused("the cached teacher read the rows as they are"):
        CachedRowsCollator(cutting)([numbered[i] for i in range(5)])
