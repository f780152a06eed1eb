"""Large vocabularies: the head in place of logits, found and checked by asking the model, and the objective over it."""

import pytest
import torch
import transformers as hf

from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, capture, shrink
from fakit.losses.fused import chunked
from fakit.tracing import head_finder as heads
from tests.families import batch, tiny

LARGE = ["bert", "gpt2", "llama", "gemma2", "t5", "roberta"]


@pytest.fixture(autouse=True)
def every_vocabulary_is_large(monkeypatch):
    monkeypatch.setattr(heads, "LARGE_VOCABULARY", 10)


def model(family: str):
    if family == "bert":  # the table's BERT is a classifier
        made = tiny("bert")
        return hf.BertForMaskedLM._from_config(made.config).eval()
    changes = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    return tiny(family, attention="eager" if family == "gemma2" else "sdpa", **changes)


def inputs(family: str) -> dict:
    made = batch()
    return made | {"decoder_input_ids": made["input_ids"].flip(0)} if family == "t5" else made


@pytest.mark.parametrize("family", LARGE)
def test_the_head_gives_the_models_logits(family):
    net = model(family)
    whole, trace = (capture(net, inputs(family), [1], logits=asked) for asked in (True, "head"))
    assert trace.logits is None and trace.head.hidden.shape[:2] == whole.logits.shape[:2]
    torch.testing.assert_close(trace.head.logits(), whole.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trace.hidden_states[1], whole.hidden_states[1])
    torch.testing.assert_close(capture(net, inputs(family)).logits, whole.logits)  # no hook stays


def test_a_scale_after_the_head_is_found():
    config = hf.GraniteConfig(
        **{
            k: v
            for k, v in tiny("llama").config.to_dict().items()
            if k in hf.GraniteConfig().to_dict() and k not in ("model_type", "architectures")
        }
    )
    config.logits_scaling = 4.0
    net = hf.GraniteForCausalLM._from_config(config).eval()
    whole, trace = (capture(net, batch(), logits=asked) for asked in (True, "head"))
    torch.testing.assert_close(trace.head.logits(), whole.logits, rtol=1e-5, atol=1e-5)


def test_no_head_is_taken_where_it_does_not_explain_the_logits():
    class Odd(hf.GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits.sin()
            return outputs

    net = Odd._from_config(tiny("gpt2").config).eval()
    trace = capture(net, batch(), logits="head")
    assert trace.head is None
    torch.testing.assert_close(trace.logits, capture(net, batch()).logits)
    classifier = capture(tiny("bert"), batch(), logits="head")  # two classes, and no head over the vocabulary
    assert classifier.head is None and classifier.logits.shape == (2, 2)


def test_asking_for_the_head_draws_no_random_numbers():
    net = tiny("gpt2").train()
    net.config.resid_pdrop = 0.5
    torch.manual_seed(0)
    expected = (capture(net, batch()), torch.rand(3))[1]
    torch.manual_seed(0)
    assert torch.equal((capture(net, batch(), logits="head"), torch.rand(3))[1], expected)


@pytest.mark.parametrize("family", ["bert", "gpt2", "gemma2", "t5"])
@pytest.mark.parametrize("loss", ["forward_kl", "jsd"])
def test_the_objective_is_the_same_in_chunks_and_whole(family, loss):
    teacher = model(family)
    student = shrink(teacher, layers=2, init="random").eval()
    labels = inputs(family)["input_ids"].clone()
    labels[0, 2:4] = -100
    found = {}
    for asked in ("head", True):
        objective = Objective(
            LayerMap.last(*((2, 3) if family != "t5" else ([2, 2], [3, 3]))),
            Features(),
            Attention("kl"),
            Outputs(loss, weight=0.7),
            Task(weight=0.2),
        )
        needs = [objective.needs(side) for side in ("student", "teacher")]
        assert all(n.in_chunks for n in needs)
        ours, theirs = (
            capture(net, inputs(family), n.hidden_states, n.attentions, asked)
            for net, n in zip((student, teacher), needs, strict=True)
        )
        breakdown = objective(ours, theirs, labels)
        weights = [p for p in student.parameters() if p.requires_grad]
        found[asked] = (
            [breakdown.total, *breakdown.terms.values(), *breakdown.weighted.values()],
            torch.autograd.grad(breakdown.total, weights, retain_graph=True, allow_unused=True),
            torch.autograd.grad(breakdown.terms["outputs"], weights, allow_unused=True),
        )
    for ours, theirs in zip(found["head"], found[True], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


def test_one_side_without_a_head_is_compared_whole():
    teacher, student = tiny("gpt2"), tiny("gpt2", seed=1)
    objective = Objective(outputs=Outputs(), task=Task())
    whole = [capture(net, batch()) for net in (student, teacher)]
    ours = capture(student, batch(), logits="head")
    labels = batch()["input_ids"]
    torch.testing.assert_close(objective(ours, whole[1], labels).total, objective(*whole, labels).total)


def test_heads_are_left_alone_where_nothing_predicts(monkeypatch):
    teacher, student = (capture(tiny("gpt2", seed=seed), batch(), [1], logits="head") for seed in (0, 1))
    monkeypatch.setattr(type(student.head), "logits", lambda head: pytest.fail("logits were made, and no term asks"))
    objective = Objective(LayerMap([(1, 1)]), Features("mse"), outputs=Outputs(), task=Task())
    objective.weights.update(outputs=0.0, task=0.0)
    assert set(objective(student, teacher, batch()["input_ids"]).terms) == {"features"}
    objective = Objective(LayerMap([(1, 1)]), Features("mse"), task=Task())
    assert set(objective(student, teacher).terms) == {"features"}


def test_a_function_of_ones_own_is_given_logits():
    needs = Objective(outputs=Outputs(lambda s, t, mask, temperature: (s - t).abs().mean())).needs("student")
    assert needs.logits and not needs.in_chunks
    assert not Objective(outputs=Outputs(chunked=False)).needs("teacher").in_chunks


@pytest.mark.parametrize("family", ["bert", "gpt2", "gemma2", "t5"])
@pytest.mark.parametrize("outputs", [None, Outputs("forward_kl", temperature=2.0, weight=0.7)], ids=["task", "both"])
def test_a_batch_that_is_a_part_weighs_the_same_in_chunks_and_whole_in_one_pass(family, outputs, monkeypatch):
    teacher, student = model(family), shrink(model(family), layers=2, init="random").eval()
    labels = inputs(family)["input_ids"].clone()
    labels[0, 2:4] = -100
    share = {"outputs": torch.tensor(1.75), "task": torch.tensor(0.25)}
    sweeps, sweep = [], chunked._sweep
    monkeypatch.setattr(chunked, "_sweep", lambda *args: (sweeps.append(1), sweep(*args))[1])
    found = []
    for asked in ("head", True):
        objective = Objective(outputs=outputs, task=Task(weight=0.2))
        assert objective.needs("student").in_chunks
        theirs = None if outputs is None else capture(teacher, inputs(family), logits=asked)
        ours = capture(student, inputs(family), logits=asked)
        assert (ours.head is not None) == (asked == "head")
        breakdown = objective(ours, theirs, labels, share)
        breakdown.total.backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        found.append([breakdown.total, *breakdown.terms.values(), *breakdown.weighted.values(), *gradients])
        student.zero_grad()
    assert len(sweeps) == 1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def test_a_mask_of_pairs_is_cut_to_the_tokens_that_the_head_is_asked_with():
    net, rows = model("gpt2"), inputs("gpt2")
    pairs = torch.ones(*rows["input_ids"].shape, rows["input_ids"].shape[1]).tril().bool()[:, None]  # (B, 1, T, T)
    trace = capture(net, {"input_ids": rows["input_ids"], "attention_mask": pairs}, logits="head")
    assert trace.head is not None
    whole = net(input_ids=rows["input_ids"]).logits
    torch.testing.assert_close(trace.head.logits(), whole, rtol=1e-4, atol=1e-4)


# -- what follows the head, at any size -----------------------------------------------------------------------------


def sizes(config: type) -> dict:
    known = config().to_dict()
    return {
        k: v
        for k, v in tiny("llama").config.to_dict().items()
        if k in known and k not in ("model_type", "architectures")
    }


def grown(net):
    """Its head's output made 20,000 times as large, as training may."""
    with torch.no_grad():
        net.get_output_embeddings().weight.mul_(2e4)
    return net


FINISHES = {
    "a soft cap": lambda: tiny("gemma2", attention="eager", final_logit_softcapping=3.0),
    "a soft cap by another name": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(
            **sizes(hf.RecurrentGemmaConfig), logits_soft_cap=5.0, block_types=["recurrent", "attention", "recurrent"]
        )
    ),
    "a scale": lambda: hf.CohereForCausalLM(hf.CohereConfig(**sizes(hf.CohereConfig) | {"logit_scale": 0.0625})),
    "a divisor": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**sizes(hf.GraniteConfig) | {"logits_scaling": 7.0})),
    "nothing": lambda: tiny("llama"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FINISHES)
def test_what_follows_the_head_is_known_from_the_smallest_logits(name, dtype):
    net = FINISHES[name]().to(dtype).train()
    with torch.no_grad():
        net.get_output_embeddings().weight.mul_(1e-3)
        assert capture(net, batch(), logits="head").head is not None
        trace, whole = (
            capture(grown(net) if first else net, batch(), logits=asked) for first, asked in ((1, "head"), (0, True))
        )
    rtol = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(trace.head.logits().float(), whole.logits.float(), rtol=rtol, atol=rtol)


class Learned(hf.GPT2LMHeadModel):
    """A scale that is trained, and does nothing at the start."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = torch.nn.Parameter(torch.ones(()))

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * self.temperature
        return outputs


class Forbidding(hf.GPT2LMHeadModel):
    """One token is never said."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.index_fill(-1, torch.tensor([5]), -1e4)
        return outputs


def shifting():
    net = tiny("bart")
    net.final_logits_bias[0, 7] = 1e-3
    return net


@pytest.mark.parametrize(
    "make", [lambda: Learned(tiny("gpt2").config), lambda: Forbidding(tiny("gpt2").config), shifting]
)
def test_logits_are_made_whole_where_more_follows(make):
    net = make().eval()
    rows = inputs("t5") if net.config.is_encoder_decoder else batch()
    trace = capture(net, rows, logits="head")
    assert trace.head is None
    torch.testing.assert_close(trace.logits, net(**rows).logits)


def test_images_and_positions_of_three_axes_are_not_cut():
    text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    eye = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "temporal_patch_size": 1}
    tokens = {"image_token_id": 49, "video_token_id": 48, "vision_start_token_id": 47}
    net = hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=eye, **tokens)).eval()
    ids = torch.tensor([[3, 47, 49, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(6).expand(3, 2, 6)}
    rows |= {"pixel_values": torch.rand(4, 12), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    trace = capture(net, rows, logits="head")
    torch.testing.assert_close(trace.head.logits(), net(**rows).logits, rtol=1e-5, atol=1e-5)
