"""Local distillation: its loss by another route, padding, what runs, resuming, refusals."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import pytest
import torch

from fakit import capture
from fakit.compression import local, low_rank
from fakit.compression.block_states import States
from fakit.losses.features import l1_cosine
from fakit.models import find_blocks
from fakit.models.blocks import find_stacks
from tests.families import batch, batch_for, tiny, tokenizer

FAMILIES = ["bert", "gpt2", "llama", "gemma3", "mixtral", "modernbert", "t5", "bart"]
STILL = {"bf16": False, "learning_rate": 1e-30}  # below the rounding of any weight


def made(family: str = "bert", keep: float = 0.75, method: str = "uniform"):
    teacher = tiny(family)
    return low_rank.compress(teacher, keep, method), teacher


def pairs_of(model) -> dict[str, torch.Tensor]:
    return {f"{n}.{own}": x for n, pair in low_rank.pairs(model).items() for own, x in pair.state_dict().items()}


def two_batches(model) -> list[dict]:
    return [batch_for(model, 3, 9, padding=4), batch_for(model, 2, 7, padding=0)]


def swapped(teacher, student, layer: int):
    """The teacher with one block of the student's."""
    mixed = copy.deepcopy(teacher)
    for stack in find_stacks(mixed):
        for i, block in enumerate(stack.members):
            if block is find_blocks(mixed)[layer - 1]:
                stack.members[i] = copy.deepcopy(find_blocks(student)[layer - 1])
    mixed.config._experts_implementation = student.config._experts_implementation
    return mixed


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_papers_equation(family):
    """By whole models: the student's own pass, and the teacher's with one block exchanged."""
    student, teacher = made(family, 0.85)
    before = copy.deepcopy(student)
    batches = two_batches(teacher)
    results = low_rank.distill(student, teacher, batches, **STILL)
    assert [r.layer for r in results] == list(range(1, len(find_blocks(teacher)) + 1))
    for result in results:
        i, total, tokens = result.layer, 0.0, 0
        mixed = swapped(teacher, before, i)
        for inputs in batches:
            with torch.no_grad():
                ours, theirs, between = (
                    capture(m, inputs, hidden_states=[i], logits=False) for m in (before, teacher, mixed)
                )
            mask, y = theirs.layer_mask(i), theirs.hidden_states[i]
            both = l1_cosine(between.hidden_states[i], y, mask) + l1_cosine(ours.hidden_states[i], y, mask)
            total, tokens = total + both.item() * mask.sum().item(), tokens + mask.sum().item()
        assert result.losses == (pytest.approx(total / tokens, rel=2e-5),)
    for name, x in pairs_of(student).items():
        torch.testing.assert_close(x, pairs_of(before)[name], rtol=0, atol=1e-20)


@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_students_come_nearer_to_their_teachers_and_only_pairs_are_trained(family):
    student, teacher = made(family)
    before, inputs = copy.deepcopy(student), batch_for(teacher, 16, 12, padding=3)
    results = low_rank.distill(student, teacher, [inputs], epochs=12, learning_rate=5e-3)
    said = [capture(m, inputs).logits.detach() for m in (before, student, teacher)]
    assert (said[1] - said[2]).abs().mean() < 0.8 * (said[0] - said[2]).abs().mean()
    assert all(r.losses[-1] < r.losses[0] for r in results)
    own = {f"{name}.{p}" for name, pair in low_rank.pairs(student).items() for p, _ in pair.named_parameters()}
    for name, x in student.named_parameters():
        assert torch.equal(x, before.get_parameter(name)) == (name not in own), name
    assert sum(r.trained for r in results) == sum(student.get_parameter(name).numel() for name in own)
    assert all(p.requires_grad for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())


def test_with_bottom_the_upper_blocks_do_not_run():
    student, teacher = made(keep=0.9, method="bottom")
    ran = []
    for model in (student, teacher):
        for i, block in enumerate(find_blocks(model), 1):
            block.register_forward_hook(lambda m, args, out, i=i: ran.append(i))
    results = low_rank.distill(student, teacher, two_batches(teacher))
    assert [r.layer for r in results] == [1] and set(ran) == {1}


def test_the_states_pass_through_blocks_without_pairs():
    teacher = tiny("bert")
    plan = low_rank.plan(teacher, 0.9, "top")
    student = low_rank.compress(teacher, plan=plan)
    results = low_rank.distill(student, teacher, two_batches(teacher), **STILL)
    assert [(r.layer, r.trained > 0) for r in results] == [(1, False), (2, False), (3, True)]


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_padding_changes_neither_loss_nor_weights(family):
    results, weights = [], []
    for extra in (0, 6):
        student, teacher = made(family, 0.85)
        inputs = batch_for(teacher, 3, 9, padding=4)
        inputs = {
            name: torch.nn.functional.pad(x, (0, extra), value=-100 if name == "labels" else 0) if x.dim() == 2 else x
            for name, x in inputs.items()
        }
        results.append(low_rank.distill(student, teacher, [inputs], epochs=3, learning_rate=1e-3))
        weights.append(pairs_of(student))
    for one, other in zip(*results, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
    for name, x in weights[0].items():
        if not name.endswith(("key.up.bias", "k_proj.up.bias")):  # a softmax does not see it: its gradient is rounding
            torch.testing.assert_close(x, weights[1][name], rtol=1e-3, atol=1e-4)


def test_texts_are_read_with_a_tokenizer():
    student, teacher = made()
    words = tokenizer("a b c d e f g")
    words.pad_token = "[UNK]"
    results = low_rank.distill(student, teacher, ["a b c", "d", "e f g a b", "c"], words, batch_size=2, **STILL)
    assert len(results) == 3 and all(r.losses[0] > 0.6 for r in results)


@pytest.mark.parametrize("states", ["float16", "bfloat16"])
def test_states_in_few_bits_change_little_and_take_half_of_the_disk(states, tmp_path, monkeypatch):
    sizes: dict[str, set] = {}
    losses = {}
    for kind in ("float32", states):
        student, teacher = made()
        entered = local._Run._train

        def watched(run, number, trained, kind=kind, entered=entered):
            sizes.setdefault(kind, set()).update(
                p.stat().st_size for p in Path(run.folder).glob("*.*") if p.suffix in (".in", ".out")
            )
            return entered(run, number, trained)

        with monkeypatch.context() as patch:
            patch.setattr(local._Run, "_train", watched)
            losses[kind] = [r.losses[0] for r in low_rank.distill(student, teacher, two_batches(teacher), states=kind)]
    assert sizes == {"float32": {(27 + 14) * 32 * 4}, states: {(27 + 14) * 32 * 2}}
    assert losses[states] == pytest.approx(losses["float32"], rel=0.02) and losses[states] != losses["float32"]


# -- resuming ---------------------------------------------------------------------------------------------------------


def run(folder: Path | None, **options):
    student, teacher = made("bert")
    results = low_rank.distill(
        student, teacher, two_batches(teacher), folder=folder, epochs=2, learning_rate=1e-3, **options
    )
    return student, results


@pytest.mark.parametrize("moment", ["training", "states", "weights"])
def test_a_killed_run_ends_as_it_would_have(tmp_path, moment, monkeypatch):
    whole, results = run(None)
    before = made("bert")[0]
    assert not any(torch.equal(x, pairs_of(before)[name]) for name, x in pairs_of(whole).items() if "down" in name)
    child = os.fork()
    if child == 0:  # dies in the second block, without a chance to tidy up
        counts = {"training": 0, "states": 0, "weights": 0}
        at = {"training": 5, "states": 9, "weights": 1}

        def dying(kind, function):
            def wrapped(*args, **kwargs):
                if kind == moment and counts[kind] == at[kind]:
                    os.kill(os.getpid(), signal.SIGKILL)
                counts[kind] += 1
                return function(*args, **kwargs)

            return wrapped

        torch.optim.AdamW.step = dying("training", torch.optim.AdamW.step)
        States.put = dying("states", States.put)
        local.save_file = dying("weights", local.save_file)
        run(tmp_path)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [p.name for p in sorted(tmp_path.glob("layer_*")) if p.suffix == ".safetensors"] == ["layer_001.safetensors"]
    student, again = run(tmp_path)
    assert all(torch.equal(x, pairs_of(whole)[name]) for name, x in pairs_of(student).items())
    assert [r.losses for r in again] == [r.losses for r in results]
    left = sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".partial")
    assert left == ["layer_001.safetensors", "layer_002.safetensors", "layer_003.safetensors", "run.json"]
    # and a run that is finished is read
    student, third = run(tmp_path)
    assert third == again and all(torch.equal(x, pairs_of(whole)[name]) for name, x in pairs_of(student).items())


def test_a_folder_of_another_run_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"a run of something else \(seed: 0 there, 1 here\)"):
        run(tmp_path, seed=1)
    student, teacher = made("bert")
    low_rank.distill(student, teacher, two_batches(teacher), **STILL)
    with pytest.raises(ValueError, match=r"something else \(student: .*as they were at its start"):
        low_rank.distill(
            made(keep=0.8)[0], teacher, two_batches(teacher), folder=tmp_path, epochs=2, learning_rate=1e-3
        )
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt and no run\.json"):
        run(other)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": True}, "epochs=True"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0"),
        ({"loss": "huber"}, "'huber' is not known; choose one of mse"),
        ({"states": "int8"}, "'float32', 'float16', 'bfloat16'"),
    ],
)
def test_wrong_arguments_are_refused(asked, said):
    student, teacher = made()
    with pytest.raises(ValueError, match=said):
        low_rank.distill(student, teacher, two_batches(teacher), **asked)


def test_models_and_texts_that_do_not_fit_are_refused():
    student, teacher = made()
    batches = two_batches(teacher)

    def refused(said, ours=student, theirs=teacher, texts=batches, **options):
        with pytest.raises(ValueError, match=said):
            low_rank.distill(ours, theirs, texts, **options)

    refused("has no pairs to train", ours=tiny("bert"))
    refused(r"3 × BertLayer, LlamaForCausalLM 3 × LlamaDecoderLayer", theirs=tiny("llama"))
    refused("differ in width: 32 and 64", theirs=tiny("bert", hidden_size=64))
    refused(r"held in bfloat16, float32", theirs=tiny("bert").bfloat16())
    refused(r"lie on cpu, meta", theirs=tiny("bert").to("meta"))
    albert = tiny("albert")
    refused("serve several layers each", ours=low_rank.compress(albert, 0.85), theirs=albert)
    shared = copy.copy(student)
    refused("share weights", theirs=shared)
    refused("texts hold nothing", texts=[])
    refused("no tokenizer", texts=["a text"])
    refused("these are int", texts=[1, 2])
    refused("padded on the left", texts=[batch(2, 7, side="left")])
    big = tiny("bert")
    with torch.no_grad():
        for block in find_blocks(big):
            block.output.LayerNorm.weight.mul_(1e6)
    refused(r"not finite in batch 0, stored in float16", low_rank.compress(big, 0.8), big, states="float16")
