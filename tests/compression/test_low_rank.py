"""Pairs for dense weights: closed forms, budgets, families, export, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fakit import capture
from fakit.compression import low_rank
from fakit.compression.ranks import METHODS
from fakit.compression.spectra import find_matrices
from fakit.models.low_rank_linear import LowRankExperts, LowRankLinear
from tests.families import WIDTH, batch, batch_for, tiny, with_sinks

FAMILIES = ["bert", "gpt2", "llama", "mixtral", "qwen3-moe", "t5", "bart", "albert", "modernbert", "gemma3"]


def parameters(model) -> int:
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def exact(family: str):
    """In float64, which transformers' grouped products of experts do not take."""
    model = tiny(family).double()
    model.config._experts_implementation = "eager"
    return model


def logits(model, inputs):
    with torch.no_grad():
        return capture(model, inputs).logits


def texts(model, rows: int = 40, tokens: int = 20) -> list[dict]:
    """Two batches of enough tokens for every weight."""
    return [batch_for(model, rows, tokens, padding=5), batch_for(model, rows // 2, tokens + 2, padding=7)]


@pytest.fixture(scope="module")
def bert():
    return tiny("bert")


@pytest.fixture(scope="module")
def measured(bert):
    return low_rank.spectra(bert)


# -- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral"])
def test_the_error_of_a_pair_is_the_tail_of_the_weights_singular_values(family):
    model = exact(family)
    plan = low_rank.plan(model, 0.7, "uniform", lowest=0.0)
    student = low_rank.compress(model, plan=plan)
    made = low_rank.pairs(student)
    assert made.keys() == {row.module for row in plan.rows if row.rank is not None} and len(made) > 10
    for row in plan.rows:
        if row.rank is None:
            continue
        owner, _, own = row.module.rpartition(".")
        dense = getattr(model.get_submodule(owner), own)
        dense = dense if isinstance(dense, torch.Tensor) else dense.weight
        error = dense - made[row.module].weight  # in the form of the layer, Conv1D's too
        values = torch.linalg.svdvals(dense)
        tail = values[..., row.rank :].square().sum()
        torch.testing.assert_close(error.square().sum(), tail, rtol=1e-9, atol=1e-12)
        assert row.error == pytest.approx((tail / values.square().sum()).sqrt().item(), rel=1e-9)
        assert low_rank.ranks(student)[row.module] == row.rank


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "bart"])
def test_from_activations_the_error_of_the_outputs_is_the_tail_after_whitening(family):
    """Inputs are gathered here by hooks of the test's own, without padding."""
    model = exact(family)
    batches = texts(model)
    plan = low_rank.plan(model, 0.75, "energy", batches, lowest=0.0)
    student = low_rank.compress(model, plan=plan)
    given: dict[str, list] = {row.module: [] for row in plan.rows}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: given[name].append(args[0]))
        for name in given
    ]
    for inputs in batches:
        trace = capture(model, inputs)
        for name, seen in given.items():
            decoder = trace.decoder_mask is not None and "decoder" in name
            crossed = any(part in name for part in ("EncDecAttention.k", "EncDecAttention.v")) or (
                "encoder_attn" in name and any(part in name for part in ("k_proj", "v_proj"))
            )
            seen[-1] = seen[-1][trace.decoder_mask if decoder and not crossed else trace.mask]
    for handle in handles:
        handle.remove()
    some = 0
    for row in plan.rows:
        x = torch.cat(given[row.module]).detach()
        dense, pair = model.get_submodule(row.module), student.get_submodule(row.module)
        bias = 0 if dense.bias is None else dense.bias
        outputs, error = (dense(x) - bias).detach(), (dense(x) - pair(x)).detach()
        relative = (error.square().sum() / outputs.square().sum()).sqrt().item()
        assert row.error == pytest.approx(relative, rel=1e-6, abs=1e-7)
        values = torch.linalg.svdvals(outputs)
        assert row.stable_rank_activations == pytest.approx(low_rank.stable_rank(values), rel=1e-6)
        if row.rank is not None:
            some += 1
            tail = values[row.rank :].square().sum()
            torch.testing.assert_close(error.square().sum(), tail, rtol=1e-6, atol=1e-9 * values.square().sum().item())
    assert some > 5


def test_from_activations_each_expert_of_a_mixture_counts_with_its_own_tokens():
    model = exact("mixtral")
    batches = texts(model, 60, 30)
    plan = low_rank.plan(model, 0.7, "uniform", batches, lowest=0.0)
    student = low_rank.compress(model, plan=plan)
    rows = {row.module: row for row in plan.rows}
    routed: list[tuple] = []
    experts, name = model.model.layers[1].mlp.experts, "model.layers.1.mlp.experts.gate_up_proj"
    handle = experts.register_forward_pre_hook(lambda m, args: routed.append(args))
    for inputs in batches:
        mask = capture(model, inputs).mask.flatten()
        hidden, index, _ = routed[-1]
        routed[-1] = (hidden[mask], index[mask])
    handle.remove()
    pair, error, whole = student.get_submodule(name), 0.0, 0.0
    for hidden, index in routed:
        for place in range(index.shape[1]):
            for x, expert in zip(hidden, index[:, place].tolist(), strict=True):
                out = experts.gate_up_proj[expert] @ x
                error += (out - pair(x[None], expert)[0]).square().sum().item()
                whole += out.square().sum().item()
    assert rows[name].rank is not None and rows[name].error == pytest.approx((error / whole) ** 0.5, rel=1e-6)


def test_activations_beat_weights_where_inputs_have_few_directions(bert):
    batches = texts(bert)
    by_weights = low_rank.compress(bert, 0.7, "uniform", lowest=0.0)
    by_outputs = low_rank.compress(bert, 0.7, "uniform", batches=batches, lowest=0.0)
    far = [(logits(m, batches[0]) - logits(bert, batches[0])).abs().mean() for m in (by_weights, by_outputs)]
    assert far[1] < far[0]


def test_both_halves_of_a_pair_have_the_same_norms(bert):
    for pair in low_rank.pairs(low_rank.compress(bert, 0.7)).values():
        torch.testing.assert_close(pair.up.weight.norm(dim=0), pair.down.weight.norm(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_is_asked_nothing_changes(family):
    model = tiny(family)
    same = low_rank.compress(model, keep=1.0)
    assert not low_rank.pairs(same) and torch.equal(logits(same, batch_for(model)), logits(model, batch_for(model)))
    assert not {id(p) for p in same.parameters()} & {id(p) for p in model.parameters()}


def test_pairs_of_full_rank_say_what_the_dense_layers_say(bert, measured):
    """Of higher ranks than save anything, which no plan asks for."""
    full = tuple(min(m.d_in, m.d_out) for m in measured.matrices)
    student = low_rank.compress(bert, plan=low_rank.Plan(measured, "uniform", 1.0, full, 0))
    torch.testing.assert_close(logits(student, batch()), logits(bert, batch()), rtol=1e-4, atol=1e-5)


def test_stable_rank_is_the_number_of_directions_where_they_are_equal():
    assert low_rank.stable_rank(torch.linalg.svdvals(3 * torch.eye(5, 8))) == pytest.approx(5)
    assert low_rank.stable_rank(torch.linalg.svdvals(torch.ones(5, 8))) == pytest.approx(1)
    assert low_rank.stable_rank(torch.zeros(4)) == 0


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.95, 0.8, 0.63])
def test_the_budget_is_met_as_counted_and_not_undercut_by_a_step(bert, measured, method, keep):
    plan = low_rank.plan(measured, keep, method)
    student = low_rank.compress(bert, plan=plan)
    budget = int(keep * parameters(bert))
    assert parameters(student) == plan.after <= budget and plan.before == parameters(bert)
    widest = max(m.parameters - m.parameters_at(m.highest_rank) for m in measured.matrices)
    step = max(widest, max(m.experts * (m.d_in + m.d_out) for m in measured.matrices))
    assert plan.after > budget - step
    assert plan.before - plan.after == sum(row.before - row.after for row in plan.rows)


def test_bottom_and_top_take_one_block_after_the_other(measured):
    def touched(method):
        return [row.layer for row in low_rank.plan(measured, 0.9, method).rows if row.rank is not None]

    assert set(touched("bottom")) == {1} and set(touched("top")) == {3}
    assert set(touched("uniform")) == {1, 2, 3}
    deeper = low_rank.plan(measured, 0.7, "bottom").rows
    lowest = [row for row in deeper if row.layer == 1]
    assert all(row.rank == round(0.25 * row.highest_rank) for row in lowest)  # down to the floor before the next
    assert any(row.rank is not None for row in deeper if row.layer == 2)


def test_uniform_takes_all_down_in_proportion(measured):
    rows = low_rank.plan(measured, 0.75, "uniform").rows
    shares = [row.rank / row.highest_rank for row in rows]
    assert max(shares) - min(shares) <= 1 / min(row.highest_rank for row in rows) + 1e-9


def test_energy_takes_where_the_least_is_lost():
    model = tiny("bert")
    thin = model.bert.encoder.layer[1].intermediate.dense
    with torch.no_grad():  # one weight of rank 2
        left, values, right = torch.linalg.svd(thin.weight, full_matrices=False)
        thin.weight.copy_(left[:, :2] * values[:2] @ right[:2])
    saved = 32 * 48 - 2 * (32 + 48)
    keep = 1 - saved / parameters(model)
    rows = low_rank.plan(low_rank.spectra(model), keep, "energy", lowest=0.0).rows
    assert [row.rank for row in rows if row.module.endswith("1.intermediate.dense")] == [2]
    assert all(row.rank is None for row in rows if not row.module.endswith("1.intermediate.dense"))


def test_a_rank_saves_exactly_up_to_the_highest(measured):
    for matrix in measured.matrices:
        r = matrix.highest_rank
        assert r * (matrix.d_in + matrix.d_out) < matrix.d_in * matrix.d_out <= (r + 1) * (matrix.d_in + matrix.d_out)


def test_plans_show_themselves(measured):
    plan = low_rank.plan(measured, 0.8)
    assert f"{plan.before:,} → {plan.after:,} parameters" in str(plan)
    shown = plan._repr_markdown_()
    assert shown.count("\n| ") == len(plan.rows) and all(f"`{row.module}`" in shown for row in plan.rows)


def test_a_shared_block_counts_once():
    model = tiny("albert")
    names = [m.name for m in find_matrices(model)]
    assert len(names) == len(set(names)) == 6 and {m.layer for m in find_matrices(model)} == {1}
    student = low_rank.compress(model, 0.85)
    assert parameters(student) <= 0.85 * parameters(model) and len(low_rank.pairs(student)) == 6


# -- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_embeddings_stay_and_students_run_train_and_export(family, tmp_path):
    model = tiny(family)
    inputs = batch_for(model)
    student = low_rank.compress(model, 0.85, "uniform")
    kept = dict(student.named_parameters())
    for part in (model.get_output_embeddings(), model.get_input_embeddings()):
        if part is not None:
            name = next(n for n, p in model.named_parameters() if p is part.weight)
            assert torch.equal(kept[name], part.weight)
    said = logits(student, inputs)
    assert said.isfinite().all() and not torch.equal(said, logits(model, inputs))
    capture(student, inputs).logits.square().mean().backward()
    for name, pair in low_rank.pairs(student).items():
        assert all(
            p.grad is not None and p.grad.abs().max() > 0 for p in (pair.down, pair.up) if isinstance(p, torch.Tensor)
        ), name

    low_rank.save(student, tmp_path / "pairs")
    again = low_rank.load(tmp_path / "pairs")
    assert torch.equal(logits(again, inputs), said) and low_rank.ranks(again) == low_rank.ranks(student)
    low_rank.merge(student).save_pretrained(tmp_path / "merged")
    plain = (
        type(model)
        .from_pretrained(
            tmp_path / "merged", attn_implementation=model.config._attn_implementation, trust_remote_code=False
        )
        .eval()
    )
    assert not low_rank.pairs(plain) and parameters(plain) == parameters(model)
    torch.testing.assert_close(logits(plain, inputs), said, rtol=1e-5, atol=1e-6 * said.abs().max().item())


def test_merged_in_float64_the_logits_are_the_same_to_1e_minus_6(bert, tmp_path):
    student = low_rank.compress(bert, 0.8)
    low_rank.merge(student).save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(plain, batch()), logits(student, batch()), rtol=0, atol=1e-6)


def test_the_model_is_left_as_it_is_and_shares_nothing_with_the_student(bert):
    before = {name: x.clone() for name, x in bert.state_dict().items()}
    low_rank.plan(bert, 0.8, batches=texts(bert))
    student = low_rank.compress(bert, 0.8)
    assert all(torch.equal(x, before[name]) for name, x in bert.state_dict().items()) and not bert.training
    assert not {p.data_ptr() for p in bert.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("family", ["bert", "mixtral", "bart"])
def test_padding_changes_no_spectrum(family):
    model = exact(family)
    short = batch_for(model, 60, 20, padding=0)
    longer = {
        name: torch.nn.functional.pad(x, (0, 5), value=-100 if name == "labels" else 0) if x.dim() == 2 else x
        for name, x in short.items()
    }
    one, other = (low_rank.spectra(model, [inputs]) for inputs in (short, longer))
    for a, b in zip(one.of, other.of, strict=True):
        assert a.tokens == b.tokens
        torch.testing.assert_close(a.values, b.values, rtol=1e-6, atol=1e-7 * a.values.max().item())


def test_attention_outputs_of_a_student_are_seen_after_the_whole_pair(bert):
    student = low_rank.compress(bert, 0.7, "uniform")
    seen = capture(student, batch(), attention_outputs=[1, 2, 3]).attention_outputs
    assert {i: x.shape for i, x in seen.items()} == dict.fromkeys([1, 2, 3], (2, 7, WIDTH))


def test_bf16_models_stay_bf16():
    model = tiny("llama").bfloat16()
    student = low_rank.compress(model, 0.85)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert logits(student, batch()).isfinite().all()


# -- files ------------------------------------------------------------------------------------------------------------


def test_saved_pairs_are_smaller_and_plain_transformers_refuses_them(tmp_path):
    model = tiny("llama")
    student = low_rank.compress(model, 0.7)
    low_rank.save(student, tmp_path)
    stored = load_file(tmp_path / "low_rank.safetensors")
    assert sum(x.numel() for x in stored.values()) == parameters(student) < parameters(model)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.partial"))


def test_weights_that_are_not_tied_stay_apart(tmp_path):
    model = tiny("gpt2")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() + 1.0)
    student = low_rank.compress(model, 0.9)
    low_rank.save(student, tmp_path)
    assert torch.equal(logits(low_rank.load(tmp_path), batch()), logits(student, batch()))


def test_loading_leaves_random_numbers_as_they_are(bert, tmp_path):
    low_rank.save(low_rank.compress(bert, 0.8), tmp_path)
    state = torch.get_rng_state()
    low_rank.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_folders_that_do_not_fit_are_refused(bert, tmp_path):
    with pytest.raises(ValueError, match=r"holds no low_rank\.safetensors"):
        low_rank.load(tmp_path)
    low_rank.save(low_rank.compress(bert, 0.8), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(ValueError, match=r"'NoSuchModel', which transformers does not have"):
        low_rank.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    with pytest.raises(ValueError, match=r"do not belong together: \d+ weights"):
        low_rank.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = load_file(tmp_path / "low_rank.safetensors")
    save_file({name: x for name, x in stored.items() if "classifier" not in name}, tmp_path / "low_rank.safetensors")
    with pytest.raises(ValueError, match=r"classifier\.bias"):
        low_rank.load(tmp_path)
    (tmp_path / "low_rank.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ValueError, match=r"damaged"):
        low_rank.load(tmp_path)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_budget_out_of_reach_is_answered_with_the_bound(bert, measured):
    with pytest.raises(ValueError, match=r"keep=0\.1 was requested.*keep=(0\.\d+)\).*keep=(0\.\d+)") as caught:
        low_rank.plan(bert, 0.1)
    import re

    bound, thinnest = (float(x) for x in re.findall(r"\(?keep=(0\.\d+)", str(caught.value))[1:])
    assert thinnest < bound
    assert low_rank.plan(measured, bound).after <= bound * measured.parameters
    assert low_rank.plan(measured, thinnest, lowest=0).after <= thinnest * measured.parameters
    with pytest.raises(ValueError, match="was requested"):
        low_rank.plan(measured, bound - 0.001)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method": "middle"}, "'bottom', 'top', 'uniform', 'energy'"),
        ({"keep": 80}, r"keep=80 was requested; it is a share"),
        ({"keep": True}, r"keep=True was requested"),
        ({"lowest": -0.1}, r"lowest=-0\.1 was requested"),
        ({"method": "energy"}, r"measured on texts. Pass batches"),
    ],
)
def test_wrong_arguments_are_refused(bert, asked, said):
    with pytest.raises(ValueError, match=said):
        low_rank.compress(bert, **asked)


def test_batches_that_cannot_be_counted_are_refused(bert, measured):
    with pytest.raises(ValueError, match="batches hold nothing"):
        low_rank.spectra(bert, [])
    with pytest.raises(ValueError, match=r"has 32 inputs and saw 12 tokens"):
        low_rank.spectra(bert, [batch()])
    with pytest.raises(ValueError, match=r"padded on the left"):
        low_rank.spectra(bert, [batch(20, 12, side="left")])
    with pytest.raises(ValueError, match="beside the spectra"):
        low_rank.plan(measured, batches=[batch()])
    with pytest.raises(ValueError, match=r"an expert of .*experts\.gate_up_proj has 32 inputs and saw \d+ tokens"):
        low_rank.spectra(tiny("qwen3-moe", num_experts=3), [batch(4, 12)])


def test_models_that_are_not_dense_are_refused(bert):
    student = low_rank.compress(bert, 0.8)
    with pytest.raises(ValueError, match=r"of low rank already.*low_rank\.merge"):
        low_rank.compress(student)
    assert parameters(low_rank.compress(low_rank.merge(student), 0.7)) <= 0.7 * parameters(bert)
    with pytest.raises(ValueError, match="no pairs to merge"):
        low_rank.merge(bert)
    with pytest.raises(ValueError, match="no pairs: save it as any model"):
        low_rank.save(bert, "unused")
    with pytest.raises(ValueError, match=r"experts \(GptOssExperts\) holds its experts in one tensor, transposed"):
        low_rank.compress(with_sinks())
    adapted = tiny("bert")
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=r"carries an adapter"):
        low_rank.compress(get_peft_model(adapted, LoraConfig(target_modules=["query"])))


def test_a_plan_of_another_model_is_refused(bert, measured):
    with pytest.raises(ValueError, match="Plan this model"):
        low_rank.compress(tiny("llama"), plan=low_rank.plan(measured))


def test_pairs_refuse_nothing_and_compute_their_product():
    pair = LowRankLinear(6, 4, 2)
    x = torch.randn(3, 5, 6)
    torch.testing.assert_close(pair(x), torch.nn.functional.linear(x, pair.weight, pair.bias))
    torch.testing.assert_close(pair.dense()(x), pair(x))
    experts = LowRankExperts(3, 6, 4, 2)
    torch.nn.init.normal_(experts.up), torch.nn.init.normal_(experts.down)
    torch.testing.assert_close(experts(x[0], 1), x[0] @ experts.weight[1].T)
