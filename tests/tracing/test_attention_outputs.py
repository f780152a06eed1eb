"""What attention adds to the hidden states: captured where any family makes it, compared by `Features(at="attention")`."""

import peft
import pytest
import torch
from torch import Tensor, nn

from fakit import Attention, Features, LayerMap, Objective, Trace, capture
from fakit.experiments.terms import FeaturesConfig
from fakit.models import find_blocks
from fakit.objective.feature_terms import Dynamics, LayerAttention, Pooled
from fakit.objective.gradients import term_gradients
from fakit.objective.needs import Needs
from fakit.training.fit import check_fit
from fakit.training.teacher_cache import CacheContent
from tests.families import batch, batch_for, tiny
from tests.models.test_inputs import packed, texts
from tests.tracing.test_capture_leaves_no_trace import assert_same, state
from tests.training.runs import cache_of, logged, make, parts

# The module whose output it is, in each block.
PROJECTIONS = {
    "bert": "attention.output.dense",
    "distilbert": "attention.out_lin",
    "albert": "albert_layers.0.attention.dense",
    "modernbert": "attn.Wo",
    "gpt2": "attn.c_proj",
    "opt": "self_attn.out_proj",
    "gpt-neox": "attention.dense",
    "llama": "self_attn.o_proj",
    "gemma2": "self_attn.o_proj",
    "phi": "self_attn.dense",
    "qwen3-moe": "self_attn.o_proj",
    "falcon": "self_attention.dense",
    "t5": "layer.0.SelfAttention.o",
    "bart": "self_attn.out_proj",
}


def by_hand(model: nn.Module, inputs: dict, name: str) -> list[Tensor]:
    """The outputs of the named module of every block, in order."""
    found: list[Tensor] = []
    blocks = list(dict.fromkeys(find_blocks(model)))
    handles = [b.get_submodule(name).register_forward_hook(lambda m, a, out: found.append(out)) for b in blocks]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", PROJECTIONS)
def test_it_is_the_output_of_the_output_projection(family):
    model = tiny(family, "eager" if family == "gemma2" else "sdpa")
    inputs, last = batch_for(model), len(find_blocks(model))
    expected = by_hand(model, inputs, PROJECTIONS[family])
    assert len(expected) == last
    whole = capture(model, inputs, [1], [2], attention_outputs=[1, 2, last])
    assert sorted(whole.attention_outputs) == sorted({1, 2, last}) and whole.logits is not None
    for trace in (whole, capture(model, inputs, logits=False, attention_outputs=[1, 2, last])):
        for layer, found in trace.attention_outputs.items():
            assert torch.equal(found, expected[layer - 1]) and found.shape[-1] == 32
    early = capture(model, inputs, [1], [2], logits=False, attention_outputs=[2])
    assert torch.equal(early.attention_outputs[2], expected[1]) and sorted(early.attention or early.maps) == [2]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_a_text_its_own(family, side):
    model, rows = tiny(family, "eager" if family == "gemma2" else "sdpa"), texts()[:2]
    ids = nn.utils.rnn.pad_sequence(rows, True, padding_side=side)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], True, padding_side=side)
    trace = capture(model, {"input_ids": ids, "attention_mask": mask}, attention_outputs=[1, 3])
    for b, row in enumerate(rows):
        alone = by_hand(model, {"input_ids": row[None]}, PROJECTIONS[family])
        for layer in (1, 3):
            found = trace.attention_outputs[layer][b][mask[b].bool()]
            torch.testing.assert_close(found, alone[layer - 1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packed_documents_have_their_own(family):
    model = tiny(family)
    trace, start = capture(model, packed(), attention_outputs=[1, 3]), 0
    for row in texts():
        alone = by_hand(model, {"input_ids": row[None]}, PROJECTIONS[family])
        for layer in (1, 3):
            found = trace.attention_outputs[layer][:, start : start + len(row)]
            torch.testing.assert_close(found, alone[layer - 1], rtol=1e-4, atol=1e-5)
        start += len(row)


@pytest.mark.parametrize("family", ["bert", "llama", "falcon", "t5", "albert"])
def test_a_capture_leaves_the_model_as_it_found_it(family):
    model = tiny(family)
    before = state(model)
    capture(model, batch_for(model), [2], [1, 2], attention_outputs=[1, 3])
    assert_same(before, state(model))
    broken = find_blocks(model)[1].register_forward_pre_hook(lambda *_: 1 / 0)
    before = state(model)
    with pytest.raises(ZeroDivisionError):
        capture(model, batch_for(model), attention_outputs=[1, 3])
    assert_same(before, state(model))
    broken.remove()
    assert sorted(capture(model, batch_for(model), attention_outputs=[1, 3]).attention_outputs) == [1, 3]


@pytest.mark.parametrize("family, inside", [("llama", "self_attn.o_proj"), ("gpt2", "attn.c_proj")])
def test_an_adapter_of_the_output_projection_takes_part(family, inside):
    settings = peft.LoraConfig(target_modules=[inside.split(".")[-1]], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny(family), settings).eval()
    found = capture(model, batch(), attention_outputs=[2]).attention_outputs[2]
    assert torch.equal(found, by_hand(model, batch(), inside)[1])
    plain = by_hand(model, batch(), f"{inside}.base_layer")[1]
    assert not torch.allclose(found, plain)


def test_a_gate_on_attention_is_not_its_projection():
    """As Laguna has it: a linear layer after attention that is given what queries are made of."""
    model = tiny("llama")
    for block in model.model.layers:
        attention = block.self_attn
        attention.gate = nn.Linear(32, 32)
        given: list[Tensor] = []
        attention.q_proj.register_forward_pre_hook(lambda m, a, given=given: given.append(a[0]))

        def gated(module, args, attention=attention, given=given):
            return (args[0] * attention.gate(given.pop()).sigmoid(),)

        # within the attention module, before its own projection runs
        attention.o_proj = nn.Sequential(nn.Identity(), attention.o_proj)
        attention.o_proj[0].register_forward_hook(lambda m, a, out, gated=gated: gated(m, (out,))[0])
    expected = by_hand(model, batch(), "self_attn.o_proj")
    found = capture(model, batch(), attention_outputs=[1, 3]).attention_outputs
    assert torch.equal(found[1], expected[0]) and torch.equal(found[3], expected[2])


def test_families_that_hide_where_attention_ends_are_refused_by_name():
    for family in ("bloom", "deberta-v2", "xlnet"):
        with pytest.raises(
            ValueError, match=rf"attention outputs asked of {type(tiny(family)).__name__}, whose blocks"
        ):
            capture(tiny(family), batch(), attention_outputs=[1])
    with pytest.raises(ValueError, match=r"attention output of layer 0, 4 asked of a 3-layer model \(Bert"):
        capture(tiny("bert"), batch(), attention_outputs=[0, 4])
    with pytest.raises(ValueError, match=r"attention_outputs=\['a'\] was requested, and layers are whole numbers"):
        capture(tiny("bert"), batch(), attention_outputs=["a"])
    teacher, student, _ = parts("bloom", width=None)
    with pytest.raises(ValueError, match="attention outputs asked of Bloom"):
        check_fit(teacher, student, Objective(LayerMap.uniform(2, 3), Features(at="attention")))


# -- the term ---------------------------------------------------------------------------------------------------------

MAP = LayerMap([(0, 0), (1, 2), (2, 3)])


def sides(dtype=torch.float64) -> tuple[Trace, Trace]:
    student = tiny("bert", seed=1, hidden_size=16, intermediate_size=24, num_hidden_layers=2).to(dtype)
    teacher = tiny("bert").to(dtype)
    ours = capture(student, batch(), [0, 1, 2], attention_outputs=[1, 2])
    return ours, capture(teacher, batch(), [0, 1, 2, 3], attention_outputs=[1, 2, 3])


def test_the_term_compares_them_and_leaves_the_embeddings_out():
    made = Objective(MAP, Features("mse", at="attention")).prepare(16, 32).double()
    assert made.needs("student").attention_outputs == {1, 2} and made.needs("teacher").attention_outputs == {2, 3}
    assert not made.needs("teacher").hidden_states and set(made.projections) == {"S1_T2", "S2_T3"}
    ours, theirs = sides()
    found = made(ours, theirs)
    for (s, t), value in found.per_layer["features"].items():
        projected = ours.attention_outputs[s] @ made.projections[f"S{s}_T{t}"].weight.T
        valid = ours.mask.bool()
        expected = (projected - theirs.attention_outputs[t])[valid].square().mean()
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    assert set(found.per_layer["features"]) == {(1, 2), (2, 3)}
    with pytest.raises(ValueError, match=r"attention_outputs of layer 1 asked .*attention_outputs=\[1\]\) keeps it"):
        made(Trace(hidden_states=ours.hidden_states, mask=ours.mask), theirs)
    with pytest.raises(ValueError, match=r"at='head'\) is not known; choose one of 'block', 'attention'"):
        Features(at="head")
    with pytest.raises(ValueError, match="layer 4"):
        Objective(LayerMap([(1, 4)]), Features(at="attention")).check_layers(2, 3)


def test_gradient_reaches_attention_and_what_is_below_it_alone():
    student = tiny("llama", seed=1)
    made = Objective(LayerMap([(2, 2)]), Features("mse", at="attention"))
    trace = capture(student, batch(), logits=False, attention_outputs=[2])
    made(trace, capture(tiny("llama"), batch(), attention_outputs=[2])).total.backward()
    touched = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    second = {name for name in touched if name.startswith("model.layers.1.")}
    assert {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"} <= second
    assert not any("mlp" in name for name in second) and "model.layers.0.mlp.up_proj.weight" in touched
    assert not any(name.startswith("model.layers.2.") for name in touched)


TERMS = {
    "features": lambda: Features("mse", at="attention", layer_map=MAP),
    "cka": lambda: Features("cka_loss", at="attention", layer_map=MAP),
    "pooled": lambda: Pooled("cosine", at="attention", layer_map=MAP),
    "dynamics": lambda: Dynamics("mse", at="attention", layer_map=MAP),
    "layer attention": lambda: LayerAttention(at="attention", layer_map=LayerMap([(1, 1), (1, 2), (2, 3)])),
}


@pytest.mark.parametrize("name", TERMS)
def test_it_trains_the_same_live_and_from_a_cache(name, tmp_path):
    runs = {}
    for how in ("live", "cached"):
        teacher, student, _ = parts()
        torch.manual_seed(0)
        made, more = Objective(terms={"it": TERMS[name]()}), {}
        if how == "cached":
            cache = cache_of(tmp_path / "cache", teacher, made)
            assert cache.content.hidden_states == () and set(cache.content.attention_outputs) <= {1, 2, 3}
            more = {"teacher_cache": cache}
        trainer = make(tmp_path / how, made=(teacher, student, made), extra=more)
        trainer.train()
        runs[how] = logged(trainer, "it")
    assert runs["cached"] == pytest.approx(runs["live"], rel=1e-4)
    assert len(runs["live"]) == 6 and runs["live"][-1] < runs["live"][0]


def test_a_cache_says_what_it_lacks_and_older_ones_are_as_they_were():
    made = Objective(LayerMap([(1, 2)]), Features(at="attention"))
    assert CacheContent.for_objective(made) == CacheContent(logits=False, attention_outputs=(2,))
    lacking = CacheContent(hidden_states=(2,)).missing(made)
    assert lacking == ["the attention output of teacher layer 2 (features term)"]
    assert "attention_outputs" not in CacheContent(hidden_states=(2,)).written()
    both = made.needs("teacher") | Needs(hidden_states=[1]) | Needs(attentions=[3])
    assert both.layers == {1, 2, 3} and both and both.asked()["attention_outputs"] == {2}


def test_a_file_and_the_laboratorys_gradients_take_it():
    term = FeaturesConfig.from_dict({"loss": "cosine", "at": "attention"}).build(lambda pairs: LayerMap(pairs))
    assert (term.at, term.loss) == ("attention", "cosine")
    assert "at" not in FeaturesConfig.from_dict({}).to_dict()  # so that the ids of runs stay
    with pytest.raises(ValueError, match=r"features\.at"):
        FeaturesConfig.from_dict({"at": "head"})
    made = Objective(LayerMap([(2, 2)]), Features("mse", at="attention"), Attention("kl"))
    found = term_gradients(made, tiny("bert"), tiny("bert", seed=1), batch())
    assert found.norms()["features"] > 0 and found.norms(part=3)["features"] == 0


def test_a_nan_is_named_by_layer():
    ours, theirs = sides(torch.float32)
    theirs.attention_outputs[3] = theirs.attention_outputs[3] * torch.nan
    made = Objective(MAP, Features("cosine", at="attention")).prepare(16, 32)
    with pytest.raises(ValueError, match="attention outputs of layer 3 are not finite"):
        made(ours, theirs)
