"""What is inside of a block: its MLP's output, up and gate projections, queries, keys and values; and activation cloning."""

import peft
import pytest
import torch
from torch import Tensor

from fakit import Features, LayerMap, Objective, Outputs, Trace, capture
from fakit.experiments import ExperimentConfig
from fakit.models import find_blocks
from fakit.objective.feature_terms import activation_cloning
from fakit.training.trainer import check_fit
from tests.families import batch, batch_for, tiny
from tests.tracing.test_attention_outputs import by_hand
from tests.tracing.test_capture_leaves_no_trace import assert_same, state
from tests.training.runs import cache_of, data, logged, make, parts

# The modules whose outputs they are, in each block: of the MLP as a whole, up, gate; and queries, keys, values.
PLACES = {
    "bert": {
        "mlp": "output.dense",
        "up": "intermediate.dense",
        "queries": "attention.self.query",
        "keys": "attention.self.key",
        "values": "attention.self.value",
        "attention": "attention.output.dense",
    },
    "gpt2": {"mlp": "mlp.c_proj", "up": "mlp.c_fc", "attention": "attn.c_proj"},
    "llama": {
        "mlp": "mlp.down_proj",
        "up": "mlp.up_proj",
        "gate": "mlp.gate_proj",
        "values": "self_attn.v_proj",
        "attention": "self_attn.o_proj",
    },
    "distilbert": {"mlp": "ffn.lin2", "up": "ffn.lin1"},
    "albert": {"mlp": "albert_layers.0.ffn_output", "up": "albert_layers.0.ffn"},
    "opt": {"mlp": "fc2", "up": "fc1"},
    "phi": {"mlp": "mlp.fc2", "up": "mlp.fc1"},
    "gemma2": {"mlp": "mlp.down_proj", "up": "mlp.up_proj", "gate": "mlp.gate_proj"},
    "modernbert": {"mlp": "mlp.Wo"},
}
KEPT = {"mlp": "mlp_outputs", "up": "mlp_ups", "gate": "mlp_gates", "attention": "attention_outputs"}


@pytest.mark.parametrize("family", PLACES)
def test_they_are_the_outputs_of_these_modules(family):
    model = tiny(family, "eager" if family == "gemma2" else "sdpa")
    inputs, last = batch_for(model), len(find_blocks(model))
    places = {at: name for at, name in PLACES[family].items() if at in KEPT}
    trace = capture(model, inputs, logits=False, **{KEPT[at]: [1, last] for at in places})
    for at, name in places.items():
        expected, found = by_hand(model, inputs, name), getattr(trace, KEPT[at])
        assert sorted(found) == [1, last]
        assert all(torch.equal(found[i], expected[i - 1].view_as(found[i])) for i in found), at
        assert all(x.shape[:2] == inputs["input_ids"].shape for x in found.values())


@pytest.mark.parametrize("family", ["t5", "bart"])  # with cross-attention between self-attention and the MLP
def test_a_decoders_are_behind_its_cross_attention(family):
    model = tiny(family)
    first = len(find_blocks(model)) // 2 + 1
    trace = capture(model, batch_for(model), mlp_outputs=[1, first], mlp_ups=[first])
    found: list[Tensor] = []
    block = find_blocks(model)[first - 1]
    names = {"t5": ("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"), "bart": ("fc1", "fc2")}[family]
    handles = [block.get_submodule(n).register_forward_hook(lambda m, a, out: found.append(out)) for n in names]
    model(**batch_for(model))
    for handle in handles:
        handle.remove()
    assert torch.equal(trace.mlp_ups[first], found[0]) and torch.equal(trace.mlp_outputs[first], found[1])


def test_padding_on_the_left_and_an_adapter_change_nothing_of_it():
    plain = tiny("llama")
    settings = peft.LoraConfig(target_modules=["down_proj", "gate_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(plain, settings).eval()
    ids = batch()["input_ids"][:2]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    trace = capture(model, {"input_ids": ids, "attention_mask": mask}, mlp_outputs=[2], mlp_gates=[2], mlp_ups=[3])
    alone = {"input_ids": ids[:1, 2:]}
    for name, found, layer in (
        ("mlp.down_proj", trace.mlp_outputs, 2),
        ("mlp.gate_proj", trace.mlp_gates, 2),
        ("mlp.up_proj", trace.mlp_ups, 3),
    ):
        torch.testing.assert_close(found[layer][0, 2:], by_hand(model, alone, name)[layer - 1][0], rtol=1e-4, atol=1e-5)


def test_a_capture_leaves_the_model_as_it_found_it():
    model = tiny("llama")
    before = state(model)
    capture(model, batch(), mlp_outputs=[1], mlp_gates=[3])
    assert_same(before, state(model))
    broken = find_blocks(model)[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    before = state(model)
    with pytest.raises(ZeroDivisionError):
        capture(model, batch(), mlp_outputs=[1, 3])
    assert_same(before, state(model))
    broken.remove()


def test_what_a_block_does_not_have_is_refused_by_name():
    for family, place, why in (
        (
            "bert",
            "gate",
            "gate projection of layers .1. asked of BertFor.*its MLP has one linear layer before its last",
        ),
        ("modernbert", "up", "up projection of layers .1. asked of ModernBert.*makes gate and up in one linear layer"),
        ("qwen3-moe", "mlp", "MLP output of layers .1. asked of Qwen3Moe.*an MLP is two or three linear layers"),
        ("bloom", "mlp", "mlp outputs asked of Bloom"),
    ):
        with pytest.raises(ValueError, match=why):
            capture(tiny(family), batch(), **{KEPT[place]: [1]})
    with pytest.raises(ValueError, match=r"MLP output of layer 0, 4 asked of a 3-layer model"):
        capture(tiny("bert"), batch(), mlp_outputs=[0, 4])
    with pytest.raises(ValueError, match="what is compared there is never projected"):
        Features(at="up", at_equal_width=True)
    with pytest.raises(ValueError, match="statistics are of what is as wide as the hidden states"):
        Features(at="keys", standardize="phi_s")
    teacher, student, _ = parts("bloom", width=None)
    with pytest.raises(ValueError, match="asked of Bloom"):
        check_fit(teacher, student, Objective(LayerMap.uniform(2, 3), Features(at="queries")))
    narrow = Objective(LayerMap([(1, 1)]), terms=activation_cloning(places=("up",)))
    sides = [Trace(mlp_ups={1: torch.ones(1, 2, width)}) for width in (4, 6)]
    with pytest.raises(ValueError, match=r"cloned_up compares up at S1←T1: the student's are 4 wide, the teacher's 6"):
        narrow(*sides)


def by_loops(teacher, student, inputs: dict, places: dict[str, str], pairs) -> dict[str, float]:
    """In float64, from hooks placed by hand: the mean over pairs of the mean over tokens and dimensions."""
    mask, found = inputs["attention_mask"].bool(), {}
    for at, name in places.items():
        sides = [by_hand(model, inputs, name) for model in (student, teacher)]
        squares = [(sides[0][s - 1][mask].double() - sides[1][t - 1][mask].double()) ** 2 for s, t in pairs]
        found[f"cloned_{at}"] = sum(x.sum().item() / x.numel() for x in squares) / len(squares)
    return found


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_activation_cloning_is_the_mse_of_every_place(family):
    teacher, student, _ = parts(family, width=None)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    objective = Objective(LayerMap.uniform(2, 3), terms=activation_cloning(places=tuple(PLACES[family]))).eval()
    inputs = batch()
    traces = [capture(m, inputs, **objective.needs(s).asked()) for m, s in ((student, "student"), (teacher, "teacher"))]
    breakdown = objective(*traces)
    expected = by_loops(teacher, student, inputs, PLACES[family], objective.layer_map.pairs)
    assert {n: v.item() for n, v in breakdown.terms.items()} == pytest.approx(expected, rel=1e-5)
    assert breakdown.total.item() == pytest.approx(0.2 * sum(expected.values()), rel=1e-5)


def test_queries_and_keys_may_be_rotated_both_or_not_at_all():
    """Rotary embedding turns student and teacher alike: the squared difference is that of the projections."""
    teacher, student, _ = parts("llama", width=None)
    with torch.no_grad():
        for block in find_blocks(student):
            block.self_attn.q_proj.weight.mul_(1.3)
            block.self_attn.k_proj.weight.mul_(0.8)
    objective = Objective(LayerMap.uniform(2, 3), terms=activation_cloning(places=("queries", "keys")))
    inputs = batch()
    traces = [capture(m, inputs, **objective.needs(s).asked()) for m, s in ((student, "student"), (teacher, "teacher"))]
    names = {"queries": "self_attn.q_proj", "keys": "self_attn.k_proj"}
    expected = by_loops(teacher, student, inputs, names, objective.layer_map.pairs)
    found = {name: value.item() for name, value in objective(*traces).terms.items()}
    assert found == pytest.approx(expected, rel=1e-4) and min(found.values()) > 1e-4


def test_it_trains_and_a_cache_holds_it(tmp_path):
    def run(folder, cached=False, **changes):
        teacher, student, _ = parts("llama", width=None)
        objective = Objective(LayerMap.uniform(2, 3), outputs=Outputs(), terms=activation_cloning())
        extra = {"teacher_cache": cache_of(tmp_path / "cache", teacher, objective)} if cached else {}
        trainer = make(
            folder, "llama", made=(teacher, student, objective), train=data(causal=True), extra=extra, **changes
        )
        trainer.train()
        return trainer

    live = run(tmp_path)
    names = [f"cloned_{at}" for at in ("queries", "keys", "values", "gate", "up", "attention", "mlp")]
    assert all(logged(live, name)[0] > 0 for name in names)
    for other in (run(tmp_path, cached=True), run(tmp_path, activation_checkpointing=True)):
        assert logged(other) == pytest.approx(logged(live), rel=1e-4)
        assert logged(other, "cloned_gate") == pytest.approx(logged(live, "cloned_gate"), rel=1e-4)


def test_a_narrower_student_learns_projections_of_its_outputs_alone():
    objective = Objective(LayerMap([(1, 2)]), terms=activation_cloning()).prepare(16, 32)
    assert objective.projection_parameters == {"cloned_attention_S1_T2": 16 * 32, "cloned_mlp_S1_T2": 16 * 32}


def test_a_file_names_the_place():
    config = ExperimentConfig.from_dict(
        {
            "task": {"name": "glosses"},
            "features": {"loss": "mse", "at": "gate"},
            "terms": {"up": {"kind": "features", "at": "up"}},
        }
    )
    assert ExperimentConfig.from_dict(config.to_dict()) == config and config.features.build(None).at == "gate"
    with pytest.raises(ValueError, match=r"features\.at: 'gates' is not one of block, attention, mlp, up, gate"):
        ExperimentConfig.from_dict({"task": {"name": "glosses"}, "features": {"at": "gates"}})
