"""A step without data against the same step with data: FLOPs as torch counts them, memory as torch allocates it,
what is stored.
"""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    default_data_collator,
)

from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, TeacherCache, capture, load_teacher, shrink
from fakit.evaluation import evaluate
from fakit.evaluation.cost import count_flops, forward_flops, peak_memory
from fakit.losses.fused import chunked, streamed
from fakit.losses.fused.output_head import Head
from fakit.planner import plan, step
from fakit.planner.fake import loops_of
from fakit.planner.ledger import Ledger
from tests.families import batch_for, objective_for, tiny

LARGE = BertConfig(
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=96,
    vocab_size=9_000,  # large enough to be compared in chunks
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def run(objective, teacher, student, batch) -> None:
    needs, given = objective.needs("student"), objective.needs("teacher")
    with torch.no_grad():
        theirs = capture(teacher, batch, given.hidden_states, given.attentions, given.capture_logits)
    ours = capture(student, batch, needs.hidden_states, needs.attentions, needs.capture_logits)
    total = objective(ours, theirs, batch.get("labels")).total
    del ours, theirs
    total.backward()


def labeled(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 9_000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return BertForMaskedLM(LARGE).eval().requires_grad_(False)


# -- FLOPs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["roberta", "albert", "modernbert", "gpt2", "llama", "qwen3", "gemma3", "bloom", "t5"]
)
def test_flops_of_a_step_are_those_that_torch_counts(family):
    teacher = tiny(family)
    student = shrink(teacher, 2)
    batch = batch_for(teacher, rows=3, tokens=16, padding=0)
    if family == "t5":  # a decoder as long as the encoder
        batch["labels"] = batch["input_ids"]
    task = {"t5": "seq2seq-lm", "modernbert": "sequence-classification"}.get(family)
    if task is None:
        task = "masked-lm" if family in ("roberta", "albert") else "causal-lm"
    objective = objective_for(student, teacher)
    counted = count_flops(lambda: run(objective, teacher, student, batch))
    assert plan(teacher, 2, 3, 16, task=task, dtype="fp32", device="cpu").flops == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("student", ["2", "2x24", [1, 4]], ids=str)
@pytest.mark.parametrize("terms", [("features", "attention", "outputs", "task"), ("attention",), ("outputs",)], ids=str)
def test_flops_with_a_large_vocabulary_a_projection_and_fewer_terms(models, student, terms):
    made = plan(LARGE, student, 16, 64, task="masked-lm", dtype="fp32", device="cpu", terms=terms)
    layers, width = made.setup.layers, made.setup.width
    small = shrink(models, layers if isinstance(layers, int) else list(layers), width)
    heads = "one-to-one" if width is None else "group-mean"
    every = {"features": Features(), "attention": Attention(heads=heads), "outputs": Outputs(), "task": Task()}
    objective = Objective(LayerMap.uniform(2, 4), **{term: every[term] for term in terms}).prepare(width or 48, 48)
    counted = count_flops(lambda: run(objective, models, small, labeled(16, 64)))
    assert made.flops == pytest.approx(counted, rel=0.02)
    assert made.step.flops["teacher forward"] <= forward_flops(models, labeled(16, 64))


def test_blocks_that_nobody_looks_at_cost_what_they_cost_when_they_run(models, monkeypatch):
    def plans():
        step.simulate.cache_clear()
        found = [plan(LARGE, 1, 8, 64, task="masked-lm", terms=(term,)).step for term in ("features", "outputs")]
        return [(one.flops, one.memory) for one in found]

    once = plans()
    monkeypatch.setattr(step, "run_one_of_each", lambda *_: None)
    all_of_them = plans()
    for (flops, memory), (expected_flops, expected_memory) in zip(once, all_of_them, strict=True):
        assert flops == expected_flops and memory == expected_memory


def test_experts_are_counted():
    """Two of three experts see a token each: as many products as two plain feed-forward layers of their width."""
    teacher = tiny("mixtral")
    rows, tokens, width, inner, layers = 3, 16, 32, 48, 3
    plain = plan(tiny("mistral"), 1, rows, tokens, task="causal-lm", dtype="fp32").step.flops["teacher forward"]
    mixed = plan(teacher, 1, rows, tokens, task="causal-lm", dtype="fp32").step.flops["teacher forward"]
    feed_forward = 2 * 3 * rows * tokens * width * inner * layers
    router = 2 * rows * tokens * width * 3 * layers
    assert mixed - plain == feed_forward + router


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("layers", "rows", "tokens"), [(2, 8, 64), (4, 4, 128)])
def test_memory_above_the_models_is_what_torch_allocates(models, layers, rows, tokens, checkpointing):
    student = shrink(models, layers).train()
    if checkpointing:
        student.activation_checkpointing_enable()
    objective = Objective(LayerMap.uniform(layers, 4), Features(), Attention(), Outputs(), Task())
    batch = labeled(rows, tokens)
    run(objective, models, student, batch)  # what is made once is there
    student.zero_grad()
    allocated = peak_memory(lambda: run(objective, models, student, batch))
    made = plan(LARGE, layers, rows, tokens, task="masked-lm", dtype="fp32", device="cpu", checkpointing=checkpointing)
    fixed = ("teacher weights", "student weights", "optimizer state")
    above = sum(size for part, size in made.memory.items() if part not in fixed)
    assert above == pytest.approx(allocated, rel=0.05)


def test_the_peak_is_that_of_a_fresh_process():
    """Resident memory as the system counts it, weights and optimizer left out of both sides:
    the rest is where a plan can be wrong.
    """
    from benchmarks.measure import run_json
    from benchmarks.planner import predict

    made = predict("small")
    measured = run_json([sys.executable, "-m", "benchmarks.planner", "--case", "small"])
    fixed = sum(made.memory[part] for part in ("teacher weights", "student weights", "optimizer state"))
    assert made.peak - fixed == pytest.approx(measured["bytes"] - fixed, rel=0.15)
    assert made.flops == pytest.approx(measured["flops"], rel=0.02)


@pytest.mark.parametrize("vocabulary", [50, 9_000])
def test_a_teacher_cache_takes_what_is_built(tmp_path, vocabulary):
    """Bytes a token, by what is kept, whole and with the largest logits alone."""
    teacher = tiny("llama", vocab_size=vocabulary)
    rows = [{"input_ids": list(range(5, 45)), "attention_mask": [1] * 40} for _ in range(30)]
    objective = Objective(LayerMap.uniform(2, 3), Features(), Attention(), Outputs(), Task()).prepare(32, 32)
    made = plan(teacher, 2, 4, 40, dtype="fp32", device="cpu", tokens=160 * 5)
    whole = TeacherCache.build(tmp_path / "whole", teacher, rows, objective, dtype="bfloat16")
    assert sum(made.step.cached.values()) == pytest.approx(whole.bytes / (30 * 40), rel=0.02)
    assert f"a token (hidden states {made.step.cached['hidden states']:.3g} B" in str(made)
    assert (" for 800 tokens; with the 64 largest logits alone " in str(made)) == (vocabulary > 64)
    if vocabulary > 64:
        few = TeacherCache.build(tmp_path / "few", teacher, rows, objective, dtype="bfloat16", top_k=64)
        kept = sum(made.step.cached.values()) - made.step.cached["logits"] + 4 * 64 + 4
        assert kept == pytest.approx(few.bytes / (30 * 40), rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapted_student_trains_its_adapter_alone(checkpointing):
    """FLOPs and memory of a step against the same step with PEFT's own model, whose weights are frozen."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=9_000, tie_word_embeddings=True)
    teacher = LlamaForCausalLM(config).eval().requires_grad_(False)
    student = get_peft_model(shrink(teacher, 2), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    student.train()
    if checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    objective = Objective(LayerMap.uniform(2, 4), Features(), Attention(), Outputs(), Task())
    batch = labeled(8, 64)
    run(objective, teacher, student, batch)
    student.zero_grad()
    allocated = peak_memory(lambda: run(objective, teacher, student, batch))
    options = {"task": "causal-lm", "dtype": "fp32", "device": "cpu", "checkpointing": checkpointing}
    made, whole = (plan(config, 2, 8, 64, lora=rank, **options) for rank in (4, None))
    assert made.step.trainable == sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert made.memory["optimizer state"] == 8 * made.step.trainable < whole.memory["optimizer state"] / 10
    fixed = ("teacher weights", "student weights", "optimizer state")
    above = sum(size for part, size in made.memory.items() if part not in fixed)
    assert above == pytest.approx(allocated, rel=0.05)
    student.zero_grad()
    counted = count_flops(lambda: run(objective, teacher, student, batch))
    assert made.flops == pytest.approx(counted, rel=0.02)
    assert f"{made.step.trainable / 1e6:,.1f} M parameters trained" in str(made) and "LoRA r 4" in made.name


def test_an_evaluation_takes_what_evaluate_allocates_and_less_than_a_step():
    """At a vocabulary whose logits are the largest tensor of all, and with a batch larger than the step's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=49_152, tie_word_embeddings=True)
    teacher = LlamaForCausalLM(config).eval().requires_grad_(False)
    student, batch = shrink(teacher, 2), {name: x.repeat(1, 12) for name, x in labeled(8, 16).items()}
    dataset = [
        {name: row.tolist() for name, row in zip(batch, rows, strict=True)}
        for rows in zip(*batch.values(), strict=True)
    ] * 4
    task = SimpleNamespace(kind="causal-lm", test=SimpleNamespace(column_names=["text"]))

    def evaluation() -> None:
        evaluate(student, dataset, default_data_collator, task, teacher=teacher)

    evaluation()  # what is made once is there
    allocated = peak_memory(evaluation)
    made = plan(teacher, 2, 8, 192, dtype="fp32", device="cpu")
    fixed = sum(made.step.weight_bytes.values()) + made.memory["optimizer state"]
    assert made.step.evaluation_rows == 21 and made.evaluation - fixed == pytest.approx(allocated, rel=0.1)
    objective = Objective(LayerMap.uniform(2, 4), Features("cosine"), None, Outputs(), Task())
    run(objective, teacher, student.train(), batch)
    student.zero_grad()
    assert allocated < 0.8 * peak_memory(lambda: run(objective, teacher, student, batch))


def test_checkpointing_trades_activations_for_products():
    plain, checkpointed = (plan(LARGE, 4, 16, 128, task="masked-lm", checkpointing=on).step for on in (False, True))
    assert checkpointed.memory["student activations"] < 0.7 * plain.memory["student activations"]
    blocks = plain.flops["student forward"] - 2 * 16 * 128 * 48 * 48  # all but the head's first layer are run again
    assert checkpointed.flops["backward"] - plain.flops["backward"] == pytest.approx(blocks, rel=0.02)


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_a_quantized_teacher_takes_what_bitsandbytes_stores(tmp_path, quantize):
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=500)).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, "causal-lm", quantize=quantize, device="cpu")
    stored = sum(tensor.nbytes for tensor in [*teacher.parameters(), *teacher.buffers()])
    for module in teacher.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        stored += 0 if state is None else state.absmax.nbytes
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        stored += 0 if scales is None else scales.nbytes
    planned = plan(tmp_path, 1, 1, 8, quantize=quantize, dtype="fp32", device="cpu").step.weight_bytes["teacher"]
    assert planned == pytest.approx(stored, rel=0.01)


@pytest.mark.parametrize(("optimizer", "bytes_an_entry"), [("adamw", 8), ("sgd", 0)])
def test_optimizer_state(optimizer, bytes_an_entry):
    found = plan(LARGE, 2, 2, 16, task="masked-lm", optimizer=optimizer).step
    assert found.memory.get("optimizer state", 0) == bytes_an_entry * found.trainable


def test_eight_bit_adamw_keeps_what_bitsandbytes_keeps():
    from bitsandbytes.optim import AdamW8bit

    weights = [torch.nn.Parameter(torch.zeros(64, 128)), torch.nn.Parameter(torch.zeros(7))]
    optimizer = AdamW8bit(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    maps = ("qmap1", "qmap2")  # two tables of 256 numbers, shared by all
    kept = [v for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and k not in maps]
    assert step.optimizer_bytes("adamw-8bit", weights) == sum(tensor.nbytes for tensor in kept)


def test_the_losses_blocks_are_as_they_were_after_a_plan_and_meanwhile():
    """Two blocks stand for all while a step is planned, and only there: not afterwards, and not in another thread."""
    hidden, weight = torch.randn(2_000, 8), torch.randn(9_000, 8)  # several chunks
    query, key = torch.randn(2, 4, 4, 512, 16)  # several blocks
    found = []

    def losses() -> None:
        compared = chunked.fused_outputs(Head(hidden, weight), Head(hidden.flip(0), weight))[1]
        found.append((compared.item(), streamed.streamed_map_kl(query, key, key, query).item()))

    losses()
    with loops_of(False, Ledger()):  # blocks of a CPU, so that there are several
        thread = threading.Thread(target=losses)
        thread.start()
        thread.join()
        losses()  # here, where two blocks stand for all, the sums are others
    losses()
    # where a buffer begins decides how its products are rounded
    assert found[1] == pytest.approx(found[0], rel=1e-6) and found[3] == pytest.approx(found[0], rel=1e-6)
    assert all(abs(two / one - 1) > 1e-3 for one, two in zip(found[0], found[2], strict=True))
    logits = [F.linear(h, weight).log_softmax(-1) for h in (hidden, hidden.flip(0))]
    assert found[1][0] == pytest.approx(F.kl_div(*logits, log_target=True, reduction="batchmean").item(), rel=1e-4)


def test_the_optimizers_own_workspace_counts():
    weight = torch.nn.Parameter(torch.empty(1_000, 1_000, device="meta"))
    assert step.step_bytes("adafactor", [weight]) == 8e6 and step.step_bytes("adamw", [weight]) == 0
    assert step.optimizer_bytes("adafactor", [weight]) == 4 * 2_000
    found = plan(
        LARGE, 1, 1, 8, task="masked-lm", optimizer="adafactor", dtype="bf16", device="cpu", terms=("features",)
    ).memory
    assert found["optimizer state"] >= 8 * 9_000 * 48  # its step is the peak of so small a batch


# -- a model of its own as the student --------------------------------------------------------------------------------

OTHER = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=9_000, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    shape = dict(hidden_size=48, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=9_000)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **shape)).eval().requires_grad_(False)


@pytest.mark.parametrize("given", ["configuration", "model", "folder"])
def test_another_model_as_the_student_costs_what_it_costs(decoder, given, tmp_path):
    torch.manual_seed(0)
    student = GPT2LMHeadModel(OTHER).train()
    student.save_pretrained(tmp_path)
    named = {"configuration": OTHER, "model": student, "folder": str(tmp_path)}[given]
    made = plan(decoder.config, named, 16, 64, task="causal-lm", dtype="fp32", device="cpu")
    terms = Features(), Attention(heads="group-mean"), Outputs(), Task()
    objective = Objective(LayerMap.uniform(2, 4), *terms).prepare(32, 48)
    batch = labeled(16, 64)
    run(objective, decoder, student, batch)  # what is made once is there
    student.zero_grad()
    allocated = peak_memory(lambda: run(objective, decoder, student, batch))
    counted = count_flops(lambda: run(objective, decoder, student, batch))
    fixed = ("teacher weights", "student weights", "optimizer state")
    assert made.flops == pytest.approx(counted, rel=0.03)
    assert sum(size for part, size in made.memory.items() if part not in fixed) == pytest.approx(allocated, rel=0.07)
    assert made.step.parameters["student"] == student.num_parameters()
    assert made.step.trainable == sum(p.numel() for p in [*student.parameters(), *objective.parameters()])
