"""A capture leaves the model, transformers' tables and other threads as it found them, also after an exception."""

import threading

import pytest
import torch
import transformers as hf
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fakit import Trace, capture
from fakit.models import find_blocks
from tests.families import WIDTH, batch, batch_for, tiny


def state(model) -> dict:
    """All that a capture could leave changed."""
    return {
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "table": dict(ALL_ATTENTION_FUNCTIONS._global_mapping),
        "asked by": "get_interface" in vars(ALL_ATTENTION_FUNCTIONS),
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "grad": torch.is_grad_enabled(),
    }


def assert_same(before: dict, after: dict) -> None:
    weights = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama", "bloom", "falcon", "t5", "albert", "xlnet"])
def test_everything_is_left_as_it_was_found(family, logits, training):
    model = tiny(family).train(training)
    before = state(model)
    assert before["asked by"] is False
    capture(model, batch_for(model), [0, 2], [1, 2], logits=logits)
    assert_same(before, state(model))


@pytest.mark.parametrize("family", ["bert", "llama", "bloom", "falcon", "t5", "albert", "xlnet"])
def test_everything_is_left_as_it_was_found_after_an_exception(family):
    model = tiny(family)
    inputs = batch_for(model)
    broken = find_blocks(model)[1].register_forward_pre_hook(lambda *_: 1 / 0)
    before = state(model)
    with pytest.raises(ZeroDivisionError):
        capture(model, inputs, [0, 2], [1, 2, 3])
    assert_same(before, state(model))
    broken.remove()
    fresh = capture(model, inputs, [0, 2], [1, 2, 3])  # and the next capture knows nothing of it
    assert sorted(fresh.attention or fresh.maps) == [1, 2, 3]


def test_a_users_own_attention_function_is_seen_and_kept():
    def mine(module, query, key, value, attention_mask, **kwargs):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    hf.AttentionInterface.register("mine", mine)
    hf.AttentionMaskInterface.register("mine", hf.AttentionMaskInterface()["sdpa"])
    try:
        trace = capture(tiny("bert", "mine"), batch(), attentions=[2])
        assert ALL_ATTENTION_FUNCTIONS["mine"] is mine
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["mine"]
        del hf.AttentionMaskInterface._global_mapping["mine"]
    assert torch.allclose(trace.attention_maps(2), capture(tiny("bert"), batch(), attentions=[2]).attention_maps(2))


@pytest.mark.parametrize("shared", [True, False], ids=["one model", "two models"])
def test_two_threads_that_capture_at_once_do_not_mix(shared):
    models = [tiny("llama")] * 2 if shared else [tiny("llama"), tiny("gpt2")]
    inputs = [batch(seed=3), batch(rows=3, tokens=5, seed=4)]
    asked = [([1, 3], [1, 3]), ([0, 2], [2])]
    alone = [capture(m, b, *a) for m, b, a in zip(models, inputs, asked, strict=True)]
    together: dict[int, Trace] = {}
    meeting = threading.Barrier(2, timeout=30)
    # both threads are inside their forward passes, hooks and all, before either goes on

    def meet(*_) -> None:
        meeting.wait()

    handles = [find_blocks(model)[1].register_forward_pre_hook(meet) for model in set(models)]

    def work(i: int) -> None:
        together[i] = capture(models[i], inputs[i], *asked[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    for i in range(2):
        assert sorted(together[i].hidden_states) == asked[i][0] and sorted(together[i].attention) == asked[i][1]
        for layer in asked[i][0]:
            assert torch.equal(together[i].hidden_states[layer], alone[i].hidden_states[layer])
        for layer in asked[i][1]:
            assert torch.equal(together[i].attention_maps(layer), alone[i].attention_maps(layer))
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_another_threads_plain_forward_pass_is_not_recorded():
    model, other = tiny("bert"), batch(rows=3, tokens=4, padding=0)
    expected = model(**other).logits
    seen = []

    def interrupt(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: seen.append(model(**other).logits))
            thread.start()
            thread.join()

    handle = find_blocks(model)[1].register_forward_pre_hook(interrupt)
    trace = capture(model, batch(), [1, 2, 3], [1, 2, 3])
    handle.remove()
    assert torch.equal(seen[0], expected)
    assert all(hidden.shape == (2, 7, WIDTH) for hidden in trace.hidden_states.values())
    assert all(trace.attention_maps(i).shape == (2, 4, 7, 7) for i in (1, 2, 3))
