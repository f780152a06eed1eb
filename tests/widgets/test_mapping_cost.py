"""What a layer map costs: the board's formulas against torch's counter, a real trace's bytes and real projections."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from fakit import Attention, Features, LayerMap, Objective, capture
from fakit.evaluation.cost import count_flops, forward_flops
from fakit.widgets.mapping.cost import amount, map_cost

MAPS = [
    LayerMap.uniform(3, 6),
    LayerMap([(0, 0), (1, 2), (1, 5)]),
    LayerMap.all_to_one(3, 6, 4),
    LayerMap.random(3, 6),
    LayerMap.none(),
]


def model(layers, width, heads):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("layer_map", MAPS, ids=lambda layer_map: str(layer_map.pairs))
@pytest.mark.parametrize("width", [16, 32])
def test_the_formulas_are_what_torch_counts_and_the_trace_weighs(layer_map, width):
    student, teacher = model(3, width, 4), model(6, 32, 4)
    batch = {"input_ids": torch.randint(1, 64, (5, 12))}
    objective = Objective(layer_map, Features("mse"), Attention("kl")).prepare(width, 32)
    needs = {side: objective.needs(side) for side in ("student", "teacher")}
    with torch.no_grad():
        ours, theirs = (
            capture(m, batch, needs[side].hidden_states, needs[side].attentions, logits=False)
            for m, side in ((student, "student"), (teacher, "teacher"))
        )
    cost = map_cost(layer_map, 6, widths=(width, 32), heads=(4, 4), batch=5, tokens=12)

    def step():
        for state in ours.hidden_states.values():
            state.requires_grad_()
        for inputs in ours.attention.values():
            inputs.query.requires_grad_(), inputs.key.requires_grad_()
        objective(ours, theirs).total.backward()

    assert cost.flops == (count_flops(step) if layer_map.pairs else 0)
    kept = [*theirs.hidden_states.values()]
    kept += [x for inputs in theirs.attention.values() for x in (inputs.query, inputs.key, inputs.value)]
    assert cost.kept == sum(tensor.nbytes for tensor in kept)
    assert cost.projections == sum(p.numel() for p in objective.parameters())
    assert cost.features == sum(theirs.hidden_states[t].numel() for _, t in layer_map.pairs)
    attending = [pair for pair in layer_map.pairs if min(pair) > 0]
    assert cost.attention == sum(theirs.attention_maps(t).numel() for _, t in attending)
    assert cost.blocks == max(layer_map.teacher_layers, default=0)


def test_the_teachers_blocks_cost_what_torch_counts():
    batch = {"input_ids": torch.randint(1, 64, (5, 12))}
    six, none = (forward_flops(model(layers, 32, 4), batch) for layers in (6, 1))
    cost = map_cost(LayerMap.last(1, 6), 6, widths=(32, 32), batch=5, tokens=12)
    assert cost.teacher_flops == (six - none) * 6 // 5


def test_amounts_have_prefixes():
    assert [amount(n) for n in (0, 999, 1000, 2_359_296, 1e13)] == ["0", "999", "1 k", "2.36 M", "10 T"]
    assert amount(999_900, "B") == "1 MB" and amount(12, "B") == "12 B"
