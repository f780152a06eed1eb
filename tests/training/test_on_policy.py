"""On-policy distillation: what the student writes, what is scored of it, and a run that goes on as it would have."""

import copy
import functools
import itertools
import math
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithFlattening

from fakit import Attention, DistillationTrainer, Features, LayerMap, Objective, Outputs, Schedule, Task, capture
from fakit.objective.needs import CountedBatch
from fakit.tasks.task import Collator
from fakit.training.on_policy import OnPolicy
from fakit.training.on_policy.fit import longest_prompt
from fakit.training.on_policy.rollouts import seed_of
from fakit.training.on_policy.writing import prompts_of, write, written_batch
from tests.families import VOCAB, tiny
from tests.training.runs import At, logged, make, parts, weights

EOS = 2
SHORT = {"max_new_tokens": 6}
COLLATE = Collator(pad_token_id=0, padding_side="right", per_token=True)


def rows(number: int = 24, seed: int = 4) -> list[dict[str, list[int]]]:
    """Prompts of 2 to 5 tokens with answers of 1 to 4 and an end."""
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        prompt = [draw.randrange(3, VOCAB) for _ in range(draw.randint(2, 5))]
        answer = [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 4))] + [EOS]
        ids = prompt + answer
        made.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer})
    return made


def run(folder, made=None, on_policy=None, train=None, **changes) -> DistillationTrainer:
    extra = {"data_collator": COLLATE} | ({} if on_policy is None else {"on_policy": on_policy})
    teacher, student, objective = made or parts("gpt2")
    trainer = DistillationTrainer(
        teacher, student, objective, args=_arguments(folder, **changes), train_dataset=train or rows(), **extra
    )
    return trainer


def _arguments(folder, **changes):
    from tests.training.runs import arguments

    return arguments(folder, **changes)


# -- what the student writes ------------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 3, 7, 11], [4], [8, 12, 6], [13, 3, 3, 5]]


def greedy_by_hand(model, prompt: list[int], new: int, ends=(EOS,)) -> list[int]:
    """The whole row through the model for each token: no cache, no padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + new and (len(ids) == len(prompt) or ids[-1] not in ends):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "mistral", "gemma3", "bloom", "falcon"])
def test_a_batch_of_prompts_gives_what_each_gives_alone(family):
    student = tiny(family, "eager")
    written = write(student, PROMPTS, OnPolicy(max_new_tokens=6, temperature=0), ends=(EOS,), seed=0)
    assert written == [greedy_by_hand(student, prompt, 6) for prompt in PROMPTS]


def test_prompts_of_one_length_go_together_where_padding_on_the_left_is_read(monkeypatch):
    student, asked = tiny("gpt2"), []
    monkeypatch.setattr("fakit.training.on_policy.writing.left_padding", lambda model: "moved")
    student.register_forward_pre_hook(lambda _, args, given: asked.append(given["input_ids"].shape), with_kwargs=True)
    prompts = [*PROMPTS, [9], [6, 6, 6]]
    written = write(student, prompts, OnPolicy(max_new_tokens=3, temperature=0), ends=(-1,), seed=0)
    lengths = [(2, 1), (2, 3), (1, 4), (1, 5)]
    assert asked == [shape for rows, length in lengths for shape in ((rows, length), (rows, 1), (rows, 1))]  # a cache
    assert written == [greedy_by_hand(student, prompt, 3, ends=()) for prompt in prompts]


def test_an_answer_goes_up_to_its_end_and_with_it():
    student = tiny("gpt2").double()
    whole = [greedy_by_hand(student, prompt, 6, ends=()) for prompt in PROMPTS]
    ends = (whole[0][2], whole[1][0])  # one that ends at its third token, one at its first
    written = write(student, PROMPTS, OnPolicy(max_new_tokens=6, temperature=0), ends=ends, seed=0)
    for own, other in zip(written, whole, strict=True):
        cut = [*itertools.takewhile(lambda token: token not in ends, other)]
        assert own == other[: len(cut) + 1]
    assert len(written[0]) <= 3 and len(written[1]) == 1


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.5, 0.6)])
def test_samples_are_of_the_softened_and_cut_distribution(temperature, top_p):
    """All 50 tokens may come: transformers' own top_k of 50, and a model's settings, would be seen with more."""
    student = tiny("gpt2", vocab_size=80)
    student.generation_config.update(repetition_penalty=5.0, top_k=3)  # of the model, and not used
    settings = OnPolicy(max_new_tokens=1, temperature=temperature, top_p=top_p)
    drawn = [answer[0] for answer in write(student, [[5, 9, 3]] * 4000, settings, ends=(EOS,), seed=7)]
    with torch.no_grad():
        chances = (student(input_ids=torch.tensor([[5, 9, 3]])).logits[0, -1] / temperature).softmax(-1)
    ordered, places = chances.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < top_p
    chances = torch.zeros_like(chances).scatter(0, places[kept], ordered[kept] / ordered[kept].sum())
    found = torch.bincount(torch.tensor(drawn), minlength=80) / len(drawn)
    assert found[chances == 0].sum() == 0
    assert (found - chances).abs().max() < 4.5 * math.sqrt(0.25 / len(drawn))


def test_writing_draws_from_its_seed_alone_and_leaves_the_rest_untouched():
    student = tiny("gpt2", resid_pdrop=0.5).train()
    student.transformer.h[0].eval()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = write(student, PROMPTS, OnPolicy(**SHORT), ends=(EOS,), seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert write(student, PROMPTS, OnPolicy(**SHORT), ends=(EOS,), seed=5) == first
    assert write(student, PROMPTS, OnPolicy(**SHORT), ends=(EOS,), seed=6) != first
    assert student.training and not student.transformer.h[0].training and student.transformer.h[1].training


def test_tokens_that_the_teacher_does_not_have_are_not_written():
    written = write(tiny("gpt2"), [[5]] * 50, OnPolicy(max_new_tokens=4, temperature=3.0), (EOS,), 0, vocabulary=12)
    assert max(token for answer in written for token in answer) == 11


# -- rows -------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_what_stands_before_the_last_answer():
    none = -100
    batch = {
        "input_ids": torch.tensor([[3, 4, 5, 2, 0, 0], [3, 4, 5, 6, 7, 2], [8, 9, 3, 0, 0, 0], [0, 0, 4, 5, 2, 9]]),
        "attention_mask": torch.tensor([[1] * 4 + [0] * 2, [1] * 6, [1] * 3 + [0] * 3, [0] * 2 + [1] * 4]),
        "labels": torch.tensor(
            [
                [none, none, 5, 2, none, none],
                [none, 4, none, none, 7, 2],  # two answers
                [none] * 6,  # no label: all of it is prompt
                [none, none, none, 5, 2, none],  # padded on the left, a line break behind the answer
            ]
        ),
    }
    assert prompts_of(batch) == [[3, 4], [3, 4, 5, 6], [8, 9, 3], [4]]
    whole = {key: x[1:2] for key, x in batch.items() if key != "attention_mask"}
    assert prompts_of(whole) == [[3, 4, 5, 6]]
    with pytest.raises(ValueError, match="needs prompts, and found a row of 4 tokens with none before its labels"):
        prompts_of({**batch, "labels": batch["input_ids"]})
    with pytest.raises(ValueError, match="found rows that pack several texts"):
        prompts_of({"input_ids": torch.ones(1, 4).long(), "position_ids": torch.tensor([[0, 1, 0, 1]]), "labels": 1})


def test_what_is_written_is_labeled_and_a_row_without_an_answer_counts_nothing():
    made = written_batch([[3, 4], [5], [6, 7]], [[8, 2], [9, 9, 2], []], fill=0)
    assert made["input_ids"].tolist() == [[3, 4, 8, 2], [5, 9, 9, 2], [6, 7, 0, 0]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert made["labels"].tolist() == [[-100, -100, 8, 2], [-100, 9, 9, 2], [-100] * 4]
    counted = CountedBatch(made, causal=True, token_logits=True)
    assert (counted.positions, counted.tokens, counted.labeled_tokens.sum()) == (5, 8, 5)

    teacher, student, objective = tiny("gpt2"), tiny("gpt2", seed=1), _four_terms()

    def loss(batch):
        asked = {side: objective.needs(side, labels=False).asked() for side in ("student", "teacher")}
        ours, theirs = capture(student, batch, **asked["student"]), capture(teacher, batch, **asked["teacher"])
        return objective(ours, theirs, batch["labels"], written=True)

    two = written_batch([[3, 4], [5]], [[8, 2], [9, 9, 2]], fill=0)
    found, expected = loss(made), loss(two)
    assert sorted(found.terms) == ["attention", "features", "outputs"]  # the task's loss has no answers
    for name, value in expected.terms.items():
        assert found.terms[name].item() == pytest.approx(value.item(), rel=1e-5)
    found.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def _four_terms(**outputs) -> Objective:
    return Objective(
        LayerMap.uniform(3, 3),
        Features("mse", tokens="labeled"),
        Attention("kl"),
        Outputs(**({"loss": "forward_kl"} | outputs)),
        Task(),
    )


# -- a step -----------------------------------------------------------------------------------------------------------


def sampled_by_hand(model, prompts, new: int, temperature: float, seed: int) -> list[list[int]]:
    """Row by row without cache or padding; one draw for all rows of a place, as they were written."""
    torch.manual_seed(seed)
    texts = [list(prompt) for prompt in prompts]
    for _ in range(new):
        with torch.no_grad():
            last = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in texts])
        drawn = torch.multinomial((last.float() / temperature).softmax(-1), 1)[:, 0].tolist()
        texts = [[*ids, token] for ids, token in zip(texts, drawn, strict=True)]
        if all(EOS in ids[len(prompt) :] for ids, prompt in zip(texts, prompts, strict=True)):
            break
    answers = [ids[len(prompt) :] for ids, prompt in zip(texts, prompts, strict=True)]
    return [a[: a.index(EOS) + 1] if EOS in a else a for a in answers]


def divergence(loss: str, p, q):
    """(K, V) log-probabilities of teacher and student → (K,)"""
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    if loss == "forward_kl":
        return kl(p, q)
    if loss == "reverse_kl":
        return kl(q, p)
    if loss == "jsd":  # β = 0.3
        m = (0.3 * p.exp() + 0.7 * q.exp()).log()
        return 0.3 * kl(p, m) + 0.7 * kl(q, m)
    return kl(q, (0.1 * q.exp() + 0.9 * p.exp()).log())


@pytest.mark.parametrize(
    "outputs",
    [{"loss": "forward_kl"}, {"loss": "reverse_kl"}, {"loss": "jsd", "beta": 0.3}, {"loss": "skew_reverse_kl"}],
    ids=lambda outputs: outputs["loss"],
)
def test_a_step_is_the_divergence_and_the_states_of_what_the_student_wrote(outputs, tmp_path):
    teacher, student = tiny("gpt2").double(), tiny("gpt2", seed=3).double()
    objective = Objective(
        LayerMap([(2, 2), (3, 3)]),
        Features("mse", weight=0.5, tokens="labeled"),
        Attention("kl", weight=0.25, tokens="labeled"),
        Outputs(**outputs, temperature=2.0, weight=1.5),
        Task(weight=0.7),
    )
    first = copy.deepcopy(student)
    settings = OnPolicy(share=1.0, max_new_tokens=5, temperature=0.8)
    trainer = run(tmp_path, (teacher, student, objective), settings, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]

    prompts = [row["input_ids"][: row["labels"].count(-100)] for row in rows()[:4]]
    answers = sampled_by_hand(first, prompts, 5, 0.8, seed_of(3, 0, 0, 0))
    total, states, maps, tokens = 0.0, 0.0, 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, start = torch.tensor([prompt + answer]), len(prompt)
        with torch.no_grad():
            ours, theirs = (model(input_ids=ids, output_hidden_states=True) for model in (first, teacher))
        p, q = ((side.logits[0, start - 1 : -1] / 2.0).log_softmax(-1) for side in (theirs, ours))
        total += 4.0 * divergence(outputs["loss"], p, q).sum().item()
        for layer in (2, 3):
            with torch.no_grad():
                s, t = (capture(m, {"input_ids": ids}, [layer], [layer]) for m in (first, teacher))
            difference = (s.hidden_states[layer] - t.hidden_states[layer])[0, start:]
            states += difference.square().mean(-1).sum().item() / 2
            for place in range(start, start + len(answer)):
                a, b = (side.attention_maps(layer)[0, :, place, : place + 1] for side in (s, t))  # (H, keys)
                maps += (b * (b.log() - a.log())).sum(-1).mean().item() / 2
        tokens += len(answer)
    assert "task" not in entry
    assert entry["outputs"] == pytest.approx(total / tokens, abs=1e-6)
    assert entry["features"] == pytest.approx(states / tokens, abs=1e-6)
    assert entry["attention"] == pytest.approx(maps / tokens, abs=1e-6)
    assert entry["loss"] == pytest.approx((1.5 * total + 0.5 * states + 0.25 * maps) / tokens, abs=1e-4)
    assert entry["on_policy/share"] == 1.0 and entry["on_policy/tokens"] == tokens / 4
    assert entry["on_policy/ended"] == sum(answer[-1] == EOS for answer in answers) / 4
    assert entry["on_policy/tokens_per_second"] > 0


def test_accumulated_micro_batches_weigh_by_the_tokens_that_were_written(tmp_path):
    settings = OnPolicy(share=1.0, max_new_tokens=5, temperature=0)

    def trained(size: int, accumulation: int):
        teacher, student = tiny("gpt2").double(), tiny("gpt2", seed=3).double()
        objective = Objective(outputs=Outputs("reverse_kl"), task=Task())
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        trainer = run(tmp_path, (teacher, student, objective), settings, **changes)
        trainer.train()
        return trainer

    whole, parted = trained(8, 1), trained(2, 4)
    assert logged(parted, "outputs") == pytest.approx(logged(whole, "outputs"), abs=1e-9)
    for name, p in weights(whole).items():
        assert torch.allclose(weights(parted)[name], p, atol=1e-9), name


# -- a run ------------------------------------------------------------------------------------------------------------


def test_share_0_is_the_run_without_it_bit_by_bit(tmp_path):
    trainers = []
    for never in (None, OnPolicy(share=0)):
        trainers.append(run(tmp_path, parts("gpt2", resid_pdrop=0.1), never))
        trainers[-1].train()
    without, never = trainers
    assert never.rollouts is None and never.written() is None
    for name, p in weights(without).items():
        assert torch.equal(weights(never)[name], p), name
    assert logged(never) == logged(without)


def test_writing_leaves_the_runs_random_numbers_alone(tmp_path, monkeypatch):
    """The same answers, given by hand in place of being drawn, give the same weights under dropout."""
    place, drawn = "fakit.training.on_policy.rollouts.write", []
    settings, made = OnPolicy(share=0.5, **SHORT), functools.partial(parts, "gpt2", resid_pdrop=0.1)
    monkeypatch.setattr(place, lambda *asked: drawn.append(write(*asked)) or drawn[-1])
    wrote = run(tmp_path, made(), settings, num_train_epochs=2)
    wrote.train()
    answers = iter(drawn)
    monkeypatch.setattr(place, lambda *asked: next(answers))
    given = run(tmp_path, made(), settings, num_train_epochs=2)
    given.train()
    for name, p in weights(wrote).items():
        assert torch.equal(weights(given)[name], p), name
    assert 3 < len(drawn) < 10


def test_a_step_on_the_data_is_as_it_was_and_the_tasks_loss_is_off_in_the_others(tmp_path):
    logs = []
    for on_policy in (None, OnPolicy(share=1.0, every=3, **SHORT)):
        trainer = run(tmp_path, parts("gpt2"), on_policy, learning_rate=0.0)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    without, some = logs
    assert [entry["on_policy/share"] for entry in some] == [1, 0, 0, 1, 0, 0]
    assert ["task" in entry for entry in some] == [False, True, True, False, True, True]
    for step, (ours, theirs) in enumerate(zip(some, without, strict=True)):
        assert (ours["outputs"] == theirs["outputs"]) == (step % 3 > 0)
        assert step % 3 == 0 or ours["loss"] == theirs["loss"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_continues_exactly(accumulation, tmp_path):
    def trained(folder, resume=None):
        made = parts("gpt2", resid_pdrop=0.1)
        trainer = run(
            folder,
            made,
            OnPolicy(share=0.5, max_new_tokens=6),
            num_train_epochs=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="random",
            lr_scheduler_type="linear",
            save_strategy="steps",
            save_steps=8 // accumulation,
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    straight = trained(tmp_path / "straight")
    resumed = trained(tmp_path / "resumed", tmp_path / "straight" / f"checkpoint-{8 // accumulation}")
    for name, p in weights(straight).items():
        assert torch.equal(weights(resumed)[name], p), name
    assert logged(resumed) == logged(straight)
    assert logged(resumed, "on_policy/share") == logged(straight, "on_policy/share")
    assert 0 < sum(logged(straight, "on_policy/share")) < len(logged(straight))
    with pytest.raises(ValueError, match=r"on_policy\.max_new_tokens: 6 in the checkpoint, 7 here"):
        other = run(tmp_path / "other", parts("gpt2", resid_pdrop=0.1), OnPolicy(share=0.5, max_new_tokens=7))
        other.train(str(tmp_path / "straight" / f"checkpoint-{8 // accumulation}"))


def test_steps_are_drawn_by_seed_and_step_and_a_share_may_be_a_schedule():
    half = [OnPolicy(share=0.5).in_step(1, step) for step in range(4000)]
    assert abs(sum(half) / 4000 - 0.5) < 0.03
    assert half == [OnPolicy(share=0.5).in_step(1, step) for step in range(4000)]
    assert half != [OnPolicy(share=0.5).in_step(2, step) for step in range(4000)]
    assert [OnPolicy(share=1.0, every=3).in_step(0, step) for step in range(6)] == [True, False, False] * 2
    rising = OnPolicy(share=Schedule(0.0, 1.0))
    drawn = [rising.in_step(0, step, 4000) for step in range(4000)]
    assert sum(drawn[:2000]) / 2000 == pytest.approx(0.25, abs=0.04)
    assert sum(drawn[2000:]) / 2000 == pytest.approx(0.75, abs=0.04)


def test_an_adapter_writes_as_the_model_that_it_makes_and_leaves_its_settings(tmp_path):
    teacher, student, objective = parts("gpt2", width=None)
    before = student.generation_config
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False))
    merged = copy.deepcopy(adapted).merge_and_unload()
    greedy = OnPolicy(share=1.0, max_new_tokens=6, temperature=0)
    assert write(adapted, PROMPTS, greedy, (EOS,), 0) == write(merged, PROMPTS, greedy, (EOS,), 0)
    assert adapted.get_base_model().generation_config is before
    trainer = run(tmp_path, (teacher, adapted, objective), greedy, max_steps=2)
    trainer.train()
    assert trainer.written()["share"] == 1.0 and "task" not in trainer.state.log_history[0]


# -- refused before any work ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"share": 1.2}, r"share=1.2\): expected a share of the steps"),
        ({"share": "half"}, r"share='half'"),
        ({"share": Schedule(0, 2)}, "expected a share of the steps"),
        ({"every": 0}, "every=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0}, "top_p=0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        OnPolicy(**settings)


def test_models_that_do_not_write(tmp_path):
    for family in ("bert", "t5"):
        teacher, student, objective = parts(family, width=None) if family == "bert" else _seq2seq()
        with pytest.raises(ValueError, match="is no causal language model with generate"):
            make(tmp_path, family, made=(teacher, student, objective), extra={"on_policy": OnPolicy()})
    with pytest.raises(ValueError, match=r"on_policy is 0\.5, and OnPolicy"):
        run(tmp_path, on_policy=0.5)


def _seq2seq():
    return tiny("t5"), tiny("t5", seed=1), Objective(outputs=Outputs())


def test_data_without_prompts(tmp_path):
    whole = [{**row, "labels": row["input_ids"]} for row in rows()]
    with pytest.raises(ValueError, match="with none before its labels"):
        run(tmp_path, on_policy=OnPolicy(**SHORT), train=whole)
    bare = [{key: x for key, x in row.items() if key != "labels"} for row in rows()]
    with pytest.raises(ValueError, match="needs prompts, and found no labels"):
        run(tmp_path, on_policy=OnPolicy(**SHORT), train=bare)
    packed = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in rows()]
    with pytest.raises(ValueError, match="found rows that pack several texts"):
        run(tmp_path, on_policy=OnPolicy(**SHORT), train=packed)
    teacher, student, objective = parts("gpt2")
    with pytest.raises(ValueError, match="DataCollatorWithFlattening"):
        DistillationTrainer(
            teacher,
            student,
            objective,
            args=_arguments(tmp_path),
            train_dataset=rows(),
            data_collator=DataCollatorWithFlattening(),
            on_policy=OnPolicy(**SHORT),
        )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_answers_that_do_not_fit_the_positions(family, tmp_path):
    long = [*rows(), {"input_ids": [3] * 40 + [EOS], "attention_mask": [1] * 41, "labels": [-100] * 40 + [EOS]}]
    assert longest_prompt(long) == 40
    made = parts(family, width=None)
    with pytest.raises(ValueError, match=r"longest prompt has 40 tokens, max_new_tokens is 25, .* has 64 positions"):
        run(tmp_path, made, OnPolicy(max_new_tokens=25), train=long)
    run(tmp_path, made, OnPolicy(max_new_tokens=24), train=long)


def test_terms_that_all_need_labels(tmp_path):
    teacher, student, _ = parts("gpt2")
    with pytest.raises(ValueError, match="has the terms outputs, task, which need labels"):
        run(tmp_path, (teacher, student, Objective(outputs=Outputs("dkd"), task=Task())), OnPolicy(**SHORT))
    balanced = Objective(outputs=Outputs(), task=Task(), balancing="gradient_norm")
    with pytest.raises(ValueError, match="balancing by gradient norms"):
        run(tmp_path, (teacher, student, balanced), OnPolicy(**SHORT))
    late = Objective(outputs=Outputs(weight=Schedule(0.0, 1.0, "steps", milestones=(3,))), task=Task())
    with pytest.raises(ValueError, match="step 0 of 6 is on-policy, and every weight is 0 then"):
        run(tmp_path, (teacher, student, late), OnPolicy(share=1.0, **SHORT)).train()
    later = OnPolicy(share=Schedule(0.0, 1.0, "steps", milestones=(3,)), **SHORT)
    trainer = run(tmp_path, (*parts("gpt2")[:2], late), later)
    trainer.train()
    assert trainer.written()["share"] == 0.5


def test_a_teacher_cache_and_no_end(tmp_path):
    from tests.training.runs import cache_of

    teacher, student, objective = parts("gpt2")
    cache = cache_of(tmp_path / "cache", teacher, objective)
    with pytest.raises(ValueError, match="on-policy distillation and a teacher cache"):
        DistillationTrainer(
            teacher, student, objective, args=_arguments(tmp_path), teacher_cache=cache, on_policy=OnPolicy(**SHORT)
        )
    student.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"no token is known to end a text.*give OnPolicy"):
        run(tmp_path, (teacher, student, objective), OnPolicy(**SHORT))
    with pytest.raises(ValueError, match=r"token 50 is to end an answer, .* writes tokens 0–49"):
        run(tmp_path, (teacher, student, objective), OnPolicy(eos_token_id=(7, 50), **SHORT))
    run(tmp_path, (teacher, student, objective), OnPolicy(eos_token_id=7, **SHORT))


def test_a_student_in_shards(tmp_path, monkeypatch):
    made = DistillationTrainer.create_accelerator_and_postprocess

    def sharded(trainer):
        made(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(DistillationTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="on-policy distillation and a student in shards"):
        run(tmp_path, on_policy=OnPolicy(**SHORT))


def test_a_weight_that_is_set_to_0_while_training_is_named(tmp_path):
    teacher, student, _ = parts("gpt2")
    objective = Objective(outputs=Outputs(), task=Task())
    trainer = run(tmp_path, (teacher, student, objective), OnPolicy(share=1.0, **SHORT))
    trainer.add_callback(At(2, trainer.objective, lambda objective: objective.weights.update(outputs=0)))
    with pytest.raises(ValueError, match="nothing to compute"):
        trainer.train()
