"""What a hand-written loop gets wrong is said before any work, in one sentence, and never taken for something else."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from fakit import (
    DistillationTrainer,
    Features,
    LayerMap,
    Objective,
    Outputs,
    TeacherCache,
    capture,
    preflight,
    shrink,
)
from fakit.losses.features import mse
from fakit.losses.outputs import forward_kl


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=3, n_head=2)).eval()


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize(
    "layers", ["all", [1.5], [True], 2, [None], torch.tensor(1)], ids=["word", "half", "bool", "number", "None", "0-d"]
)
@pytest.mark.parametrize("what", ["hidden_states", "attentions"])
def test_layers_that_are_no_numbers(gpt2, what, layers):
    with pytest.raises(ValueError, match=f"{what}=.* was requested, and layers are whole numbers"):
        capture(gpt2, {"input_ids": IDS}, **{what: layers})


def test_any_iterable_of_layer_numbers(gpt2):
    trace = capture(gpt2, {"input_ids": IDS}, hidden_states=(i for i in (3, 1, 3)), attentions=torch.tensor([1, 2]))
    assert (sorted(trace.hidden_states), sorted(trace.attention)) == ([1, 3], [1, 2])


@pytest.mark.parametrize(
    "ids, found",
    [
        (IDS[0], "holds torch.int64 \\(6,\\)"),
        (IDS.float(), "holds torch.float32 \\(2, 6\\)"),
        (IDS.tolist(), "holds list"),
        (IDS > 3, "holds torch.bool"),
        (IDS[:0], "hold no token: they are torch.int64 \\(0, 6\\)"),
        (IDS[:, :0], "hold no token: they are torch.int64 \\(2, 0\\)"),
    ],
)
def test_token_ids_that_are_none(gpt2, ids, found):
    with pytest.raises(ValueError, match=f"input_ids .*{found}"):
        capture(gpt2, {"input_ids": ids}, hidden_states=[1])


@pytest.mark.parametrize("layers", [2.0, True, "2", [True, 2], [1.0, 2]])
def test_layers_of_a_student(gpt2, layers):
    with pytest.raises(ValueError, match="asked of a 3-layer teacher; give a number of layers, or its block numbers"):
        shrink(gpt2, layers=layers)


def test_a_mask_that_is_added_to_scores_is_no_mask_of_tokens():
    x, y = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    additive = torch.tensor([[0.0, 0.0, -1e9], [0.0, 0.0, 0.0]])  # 0 = counts: the other way round
    for loss in (mse, forward_kl):
        with pytest.raises(ValueError, match="holds other numbers, such as -1e\\+09"):
            loss(x, y, additive)
        kept = torch.tensor([[1, 1, 0], [1, 1, 1]])
        assert loss(x, y, kept) == loss(x, y, kept.float()) == loss(x, y, kept.bool())


def test_a_term_over_layers_wants_a_layer_map():
    with pytest.raises(ValueError, match="features was given and no layer map, so that the term would compare nothing"):
        Objective(features=Features(), outputs=Outputs())
    assert Objective(LayerMap.none(), features=Features(), outputs=Outputs()).pairs("features") == {}


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), "gpt2", None], ids=["module", "name", "None"])
def test_what_is_no_transformers_model(gpt2, thing, tmp_path):
    objective, rows = Objective(outputs=Outputs()), [{"input_ids": [1, 2]}]
    student, arguments = shrink(gpt2, layers=1), TrainingArguments(str(tmp_path), use_cpu=True)
    asked = {
        "what capture runs": lambda: capture(thing, {"input_ids": IDS}),
        "the teacher": lambda: shrink(thing, layers=1),
        "the student": lambda: preflight(gpt2, thing),
        "the teacher (of a cache)": lambda: TeacherCache.build(tmp_path / "cache", thing, rows, objective),
    }
    if thing is not None:  # a trainer without a teacher has another sentence
        asked["the teacher (of a trainer)"] = lambda: DistillationTrainer(thing, student, objective, arguments)
    for what, ask in asked.items():
        with pytest.raises(ValueError, match=rf"^{what.split(' (')[0]} is .*, and a transformers model was expected"):
            ask()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("batch", [[1, 2], "a text", IDS, None], ids=["list", "text", "tensor", "None"])
def test_what_is_no_batch(gpt2, batch):
    with pytest.raises(ValueError, match="a batch is a mapping of tensors"):
        capture(gpt2, batch)


def test_what_is_no_objective_no_map_and_no_trace(gpt2, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="the objective is None, and an Objective was expected"):
        DistillationTrainer(gpt2, shrink(gpt2, layers=1), None, arguments)
    with pytest.raises(ValueError, match=r"Objective\(layer_map, …\) is a LayerMap, .*found \[\(1, 2\)\]"):
        Objective([(1, 2)], Features())
    with pytest.raises(ValueError, match=r"Features\(layer_map=…\) is a LayerMap, .*found \{1: 2\}"):
        Objective(LayerMap.uniform(1, 2), Features(layer_map={1: 2}))
    trace = capture(gpt2, {"input_ids": IDS})
    with pytest.raises(ValueError, match="the teacher's side is a dict, and a Trace was expected"):
        Objective(outputs=Outputs())(trace, {"logits": trace.logits})
    with pytest.raises(ValueError, match="the student's side is a NoneType"):
        Objective(outputs=Outputs())(None, trace)


@pytest.mark.parametrize("temperature", ["2", None, [1.0], -1, float("nan")])
def test_what_is_no_temperature(temperature):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="finite"):
        Outputs(temperature=temperature)
    with pytest.raises(ValueError, match="finite temperature above 0"):
        forward_kl(x, x, None, temperature)
