"""Rounds of taking out the cheapest layer and healing beside the cut."""

import json
import logging

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, default_data_collator

from fakit import LayerMap
from fakit.compression import importance as measures
from fakit.compression import layerwise
from fakit.compression.layerwise import Round, cuts, prune
from fakit.models import find_blocks
from tests.families import batch, tiny
from tests.training.runs import data

ROWS = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in data(rows=8)]
FAST = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}


def teacher(layers: int = 5, family: str = "llama"):
    return tiny(family, num_hidden_layers=layers)


def pruned(model, layers=None, rows=ROWS, **settings) -> list[Round]:
    return prune(model, layers, rows, default_data_collator, **(FAST | settings))


def closeness(model) -> float:
    """A quality: how close the model's logits are to 0."""
    return -float(model(**batch()).logits.detach().abs().mean())


def weights_of(block) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in block.named_parameters()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- rounds -----------------------------------------------------------------------------------------------------------


def test_maps_are_composed_over_three_rounds():
    model = teacher(6)
    rounds = pruned(model, 3, steps=0)
    assert [r.number for r in rounds] == [1, 2, 3] and [len(r.layers) for r in rounds] == [5, 4, 3]
    gone, before = [], [1, 2, 3, 4, 5, 6]
    for r in rounds:
        assert sorted(r.importance) == before and len(r.removed) == 1
        assert r.importance[r.removed[0]] == min(r.importance.values())
        gone += r.removed
        before = [i for i in before if i not in r.removed]
        assert r.layers == before
    assert rounds[-1].layer_map == LayerMap([(1, before[0]), (2, before[1]), (3, before[2])])
    assert sorted(gone + before) == [1, 2, 3, 4, 5, 6]
    # what the map says is what the weights say: nothing was healed
    for block, number in zip(find_blocks(rounds[-1].student), before, strict=True):
        assert same(weights_of(block), weights_of(find_blocks(model)[number - 1]))
    assert rounds[-1].kl_cut == rounds[-1].kl_healed > 0
    assert all(r.student is None for r in rounds[:-1])


def test_an_identity_layer_is_the_first_to_go_and_costs_nothing():
    model = teacher(4)
    with torch.no_grad():
        find_blocks(model)[1].self_attn.o_proj.weight.zero_()
        find_blocks(model)[1].mlp.down_proj.weight.zero_()
    for measure in ("kl", "block_influence", "angular_distance"):
        (only,) = pruned(model, 3, steps=0, importance=measure)
        assert only.removed == [2] and only.importance[2] == 0.0 and only.kl_cut == pytest.approx(0.0, abs=1e-6)


def test_only_the_layers_beside_the_cut_are_trained_toward_the_original_teacher(monkeypatch):
    model, seen = teacher(5), []
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train = layerwise.DistillationTrainer.train

    def watched(trainer):
        start = [weights_of(block) for block in find_blocks(trainer.student)]
        train(trainer)
        moved = [i for i, b in enumerate(find_blocks(trainer.student), 1) if not same(start[i - 1], weights_of(b))]
        maps = {name: trainer.objective.map_of(name).pairs for name in ("adjacent", "last")}
        seen.append((trainer.teacher, moved, maps, dict(trainer.objective.weights)))

    monkeypatch.setattr(layerwise.DistillationTrainer, "train", watched)
    rounds = pruned(model, 2)
    numbers = [1, 2, 3, 4, 5]
    for r, (taught_by, moved, maps, weights) in zip(rounds, seen, strict=True):
        place = numbers.index(r.removed[0])  # so many layers stay before the cut
        numbers.remove(r.removed[0])
        assert taught_by is model and weights == {"outputs": 0.01, "adjacent": 1.0, "last": 1.0}
        assert moved == [j for j in (place, place + 1) if 1 <= j <= len(numbers)]
        after = min(place + 1, len(numbers))
        targets = [*numbers[:-1], 5]
        assert maps == {"adjacent": [(after, targets[after - 1])], "last": [(len(numbers), 5)]}
    frozen = dict(rounds[-1].student.named_parameters())
    assert torch.equal(frozen["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_healing_brings_the_student_closer():
    rounds = pruned(teacher(3), 2, steps=60, quality=closeness, batch_size=8)
    (only,) = rounds
    assert only.kl_healed < 0.8 * only.kl_cut
    assert only.quality_healed == pytest.approx(closeness(only.student)) and only.quality_cut != only.quality_healed
    assert str(only).startswith(f"round 1: without teacher layer {only.removed[0]}, 2 stay; healing: KL ")


def test_padding_has_no_effect_on_any_round():
    wider = [
        {name: torch.nn.functional.pad(x, (0, 4), value=9 if name == "input_ids" else 0) for name, x in row.items()}
        for row in ROWS
    ]
    one, other = pruned(teacher(4), 2), pruned(teacher(4), 2, rows=wider)
    for r, s in zip(one, other, strict=True):
        assert r.removed == s.removed and s.importance == pytest.approx(r.importance, rel=1e-3)
        assert s.kl_healed == pytest.approx(r.kl_healed, rel=1e-3)
    for p, q in zip(one[-1].student.parameters(), other[-1].student.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_one_shot_takes_the_cheapest_of_the_whole_teacher_with_as_many_steps(monkeypatch):
    model, steps = teacher(5), []
    train = layerwise.DistillationTrainer.train

    def counted(trainer):
        train(trainer)
        steps.append(trainer.state.global_step)

    monkeypatch.setattr(layerwise.DistillationTrainer, "train", counted)
    (only,) = pruned(model, 2, one_shot=True)
    costs = measures.importance(model, "kl", ROWS, default_data_collator)
    assert only.importance == costs and only.removed == sorted(sorted(costs, key=costs.get)[:3])
    assert len(find_blocks(only.student)) == 2 and steps == [3 * FAST["steps"]]
    steps.clear()
    pruned(model, 2)
    assert steps == [2, 2, 2]


def test_it_stops_at_a_quality(caplog):
    model = teacher(4)
    with torch.no_grad():
        theirs = model(**batch()).logits

    def likeness(other) -> float:
        return -(other(**batch()).logits - theirs).abs().mean().item()

    settings = {"quality": likeness, "importance": "quality", "steps": 0}
    every = pruned(model, 1, **settings)
    healed = [r.quality_healed for r in every]
    floor = (max(healed) + min(healed)) / 2
    kept = next(i for i, quality in enumerate(healed) if quality < floor)
    assert kept >= 1
    with caplog.at_level(logging.WARNING, "fakit"):
        rounds = pruned(model, at_least=floor, **settings)
    assert [r.layers for r in rounds] == [r.layers for r in every[:kept]]
    assert len(find_blocks(rounds[-1].student)) == 4 - kept
    assert "Stopped before this round" in caplog.text
    with pytest.raises(ValueError, match="the teacher itself comes to"):
        pruned(model, at_least=0.1, **settings)


@pytest.mark.parametrize("bf16", [True, "auto"])
def test_healing_in_bf16_or_as_the_device_is_fast(bf16):
    (only,) = pruned(teacher(3), 2, steps=1, bf16=bf16)
    assert only.student.dtype == torch.float32 and only.kl_healed != only.kl_cut


@pytest.mark.parametrize(
    "stays, depth, found", [([2, 3], 3, [0]), ([1, 2], 3, [2]), ([1, 3], 3, [1]), ([3], 5, [0, 1])]
)
def test_cuts(stays, depth, found):
    assert cuts(stays, depth) == found


# -- on the disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, auto", [("llama", AutoModelForCausalLM), ("bert", AutoModelForSequenceClassification)]
)
def test_each_round_is_a_plain_transformers_folder(family, auto, tmp_path):
    rounds = pruned(teacher(4, family), 2, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-1", "round-2"]
    for r in rounds:
        loaded = auto.from_pretrained(tmp_path / f"round-{r.number}").eval()
        assert len(find_blocks(loaded)) == len(r.layers)
        written = json.loads((r.folder / "round.json").read_text())
        assert written["removed"] == r.removed and written["layers"] == r.layers
        assert written["settings"]["steps"] == 2 and written["settings"]["importance"] == "kl"
    with torch.no_grad():
        assert torch.allclose(loaded(**batch()).logits, rounds[-1].student(**batch()).logits, atol=1e-6)


class Killed(BaseException):
    pass


def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path, monkeypatch):
    train, healed = layerwise.DistillationTrainer.train, []

    def dying(trainer):
        train(trainer)
        healed.append(trainer)
        if len(healed) == 2:
            raise Killed

    monkeypatch.setattr(layerwise.DistillationTrainer, "train", dying)
    with pytest.raises(Killed):
        pruned(teacher(4), 1, out=tmp_path / "killed", seed=3)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["round-1"]
    (tmp_path / "killed" / ".round-2.partial").mkdir()  # as where it ended while a round was written
    (tmp_path / "killed" / ".round-2.partial" / "model.safetensors").write_bytes(b"half of it")
    torch.rand(7)  # whatever was drawn before
    resumed = pruned(teacher(4), 1, out=tmp_path / "killed", seed=3, resume=True)
    through = pruned(teacher(4), 1, out=tmp_path / "through", seed=3)
    for r, s in zip(resumed, through, strict=True):
        aside = {"seconds": 0.0, "folder": None, "student": None}
        assert {**vars(r), **aside} == {**vars(s), **aside}
    assert all(
        torch.equal(p, q)
        for p, q in zip(resumed[-1].student.parameters(), through[-1].student.parameters(), strict=True)
    )
    again = pruned(teacher(4), 1, out=tmp_path / "through", seed=3, resume=True)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["round-1", "round-2", "round-3"]
    assert again == through and len(find_blocks(again[-1].student)) == 1


def test_other_rounds_are_not_gone_on_from(tmp_path):
    pruned(teacher(3), 2, out=tmp_path)
    with pytest.raises(ValueError, match="holds 1 finished rounds already; resume=True"):
        pruned(teacher(3), 2, out=tmp_path)
    with pytest.raises(ValueError, match=r"made otherwise:\n  learning_rate: 0.001 there, 0.002 here"):
        pruned(teacher(3), 2, out=tmp_path, resume=True, learning_rate=2e-3)
    with pytest.raises(ValueError, match=r"made otherwise:\n  teacher: \w+ there, \w+ here"):
        pruned(tiny("llama", seed=1), 2, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"made otherwise:\n  data: \w+ there, \w+ here"):
        pruned(teacher(3), 2, rows=ROWS[:-1], scored=ROWS, out=tmp_path, resume=True)
    with (tmp_path / "round-1" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"round-1 is damaged: config.json"):
        pruned(teacher(3), 2, out=tmp_path, resume=True)
    (tmp_path / "round-1" / "round.json").unlink()
    with pytest.raises(ValueError, match=r"round-1 is not whole"):
        pruned(teacher(3), 2, out=tmp_path, resume=True)


# -- hybrids, and refusals --------------------------------------------------------------------------------------------


def test_a_hybrid_keeps_what_it_cannot_run_without():
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pad_token_id": 0}
    kinds = ["conv", "full_attention", "conv"]
    config = hf.Lfm2Config(
        **sizes, num_key_value_heads=2, num_hidden_layers=3, layer_types=kinds, block_auto_adjust_ff_dim=False
    )
    torch.manual_seed(0)
    model = hf.Lfm2ForCausalLM(config).eval()
    with torch.no_grad():  # attention would be the first to go
        find_blocks(model)[1].self_attn.out_proj.weight.zero_()
        find_blocks(model)[1].feed_forward.w2.weight.zero_()
    (only,) = pruned(model, 2, steps=0)
    assert only.importance[2] == 0.0 and only.removed != [2] and only.student.config.layer_types.count("full_attention")


def test_a_depth_that_a_family_cannot_be_made_with_is_refused():
    model = hf.RwkvForCausalLM(hf.RwkvConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2)).eval()
    with pytest.raises(ValueError, match=r"cannot be made with \[1\] layers .*Take more layers"):
        pruned(model, 1)


def test_the_adapter_of_a_teacher_goes_into_the_student():
    model = get_peft_model(teacher(3), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    (only,) = pruned(model, 2, steps=1)
    number = only.layers[0]
    adapted = model.get_base_model().model.layers[number - 1].self_attn.q_proj
    expected = adapted.base_layer.weight + adapted.get_delta_weight("default")
    blocks = find_blocks(only.student)
    beside = cuts(only.layers, 3)[0]
    assert not hasattr(only.student, "peft_config")
    assert torch.allclose(blocks[0].self_attn.q_proj.weight, expected, atol=1e-6 if beside > 1 else 0.01)


def never(*args, **kwargs):
    raise AssertionError("work was done before the input was refused")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": 3}, "layers=3 asked of a 3-layer teacher, of which at least one goes: choose 1…2"),
        ({"layers": 7}, "layers=7 asked of a 3-layer teacher"),
        ({"layers": 0}, "layers=0 asked of a 3-layer teacher"),
        ({"layers": True}, "layers=True asked"),
        ({"layers": [1, 2]}, r"layers=\[1, 2\] asked"),
        ({"layers": None}, "when to stop was not said"),
        ({"rows": []}, "no data to score layers and to heal on"),
        ({"rows": None}, "no data to score layers and to heal on"),
        ({"rows": iter(ROWS)}, "no data to score layers and to heal on"),
        ({"scored": []}, "scored=… holds no rows"),
        ({"importance": "magnitude"}, "importance 'magnitude' is not known"),
        ({"importance": "quality"}, "importance 'quality' was asked, and no function"),
        ({"at_least": 0.5}, "at_least=0.5 is a quality, and no function says it"),
        ({"at_least": float("nan"), "quality": closeness}, "at_least=nan"),
        ({"one_shot": True, "layers": None, "at_least": -9.0, "quality": closeness}, "one_shot=True takes out all"),
        ({"steps": -1}, "steps=-1: a whole number of at least 0"),
        ({"batch_size": 0}, "batch_size=0: a whole number of at least 1"),
        ({"seed": 0.5}, "seed=0.5: a whole number"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: a number above 0"),
        ({"resume": True}, "no folder was given"),
    ],
)
def test_bad_input_is_refused_before_any_work(settings, said, monkeypatch):
    for name in ("importance", "shrink", "DistillationTrainer", "divergence", "measured"):
        monkeypatch.setattr(layerwise, name, never)
    with pytest.raises(ValueError, match=said):
        pruned(tiny("bert"), **({"layers": 2} | settings))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: tiny("t5"), "two stacks, an encoder of 3 and a decoder of 3 layers"),
        (lambda: tiny("albert"), "3 layers share 1 blocks"),
        (lambda: tiny("bert", num_labels=1), "single output is 0 whatever the models say|regression"),
        (lambda: tiny("llama").model, "outputs|logits"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused(model, said, monkeypatch):
    monkeypatch.setattr(layerwise, "importance", never)
    with pytest.raises(ValueError, match=said):
        pruned(model(), 2)


def test_no_collator_is_refused():
    with pytest.raises(ValueError, match="no collator was given"):
        prune(tiny("bert"), 2, ROWS)


def test_a_student_that_diverges_is_refused():
    with pytest.raises(ValueError, match=r"diverged|NaN|not finite"):
        pruned(teacher(3), 2, learning_rate=1e30, steps=4)
