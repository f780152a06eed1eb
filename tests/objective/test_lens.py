"""Hidden states read by the models' own norm and head: as the models read their last ones, and as DistillLens has it."""

import copy

import peft
import pytest
import torch
from torch import Tensor

from fakit import Features, LayerMap, Objective, Outputs, TeacherCache, Trace, capture
from fakit.experiments.terms import build_further_term
from fakit.losses import outputs
from fakit.models import find_blocks
from fakit.objective.lens import Lens
from fakit.training.fit import check_fit
from fakit.training.teacher_cache import CacheContent
from fakit.training.token_counts import counts, shares
from tests.families import batch, batch_for, tiny
from tests.models.test_inputs import packed
from tests.scale.ranks import uneven
from tests.tracing.test_capture_leaves_no_trace import assert_same, state
from tests.training.runs import data, logged, make, parts

READ = ["gpt2", "llama", "opt", "gpt-neox", "phi", "qwen3-moe", "bloom", "falcon", "gemma2", "t5", "bart", "roberta"]
READ += ["albert", "mpnet", "deberta-v3"]


@pytest.mark.parametrize("family", READ)
def test_the_last_layer_is_read_as_the_model_reads_it(family):
    model = tiny(family, "eager" if family == "gemma2" else "sdpa")
    last = len(find_blocks(model))
    for module in model.modules():  # a norm that changes nothing would not be missed
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    before = state(model)
    trace = capture(model, batch_for(model), [last], lens=True)
    assert_same(before, state(model))
    found = trace.lens(trace.hidden_states[last])
    torch.testing.assert_close(found.logits(), trace.logits, rtol=1e-5, atol=1e-5)
    early = capture(model, batch_for(model), [last - 1], logits=False, lens=True)
    assert early.lens(early.hidden_states[last - 1]).logits().shape == trace.logits.shape
    assert not found.weight.requires_grad and trace.lens(trace.hidden_states[last], train=True).weight.requires_grad


@pytest.mark.parametrize("family", ["bert", "vit", "xlnet"])
def test_models_without_a_head_over_a_vocabulary_are_refused_by_name(family):
    model = tiny(family)
    with pytest.raises(ValueError, match=f"a lens asked of {type(model).__name__}, which has no plain linear head"):
        capture(model, batch_for(model), [1], lens=True)


# -- the term ---------------------------------------------------------------------------------------------------------

MAP = LayerMap([(0, 0), (1, 2), (2, 3)])


def models(family: str = "gpt2", dtype: torch.dtype = torch.float64):
    """A student of another width over the same vocabulary, and its teacher."""
    narrow = {"n_embd": 16} if family == "gpt2" else {"hidden_size": 16, "intermediate_size": 24}
    student, teacher = tiny(family, seed=1, **narrow).to(dtype), tiny(family).to(dtype)
    for number, model in enumerate((student, teacher)):
        generator = torch.Generator().manual_seed(number)
        for name, parameter in model.named_parameters():  # far enough from each other, and norms that do something
            change = torch.randn(parameter.shape, generator=generator, dtype=dtype)
            parameter.data += (0.2 if "norm" in name or "ln_" in name else 0.1) * change
    return student, teacher


def traces(family: str = "gpt2", given: dict | None = None):
    student, teacher = models(family)
    given = batch() if given is None else given
    ours = capture(student, given, [0, 1, 2, 3], lens=True)
    with torch.no_grad():
        return student, teacher, ours, capture(teacher, given, [0, 1, 2, 3], lens=True)


def by_hand(model, hidden: Tensor, norm: bool = True) -> Tensor:
    """The model's own modules, one after another. (B, T, V)"""
    own = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    return model.lm_head(own(hidden) if norm else hidden)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "as DistillLens's code"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_it_is_the_divergence_of_what_the_heads_say(family, norm):
    student, teacher, ours, theirs = traces(family)
    made = Objective(MAP, terms={"it": Lens(norm=norm)})
    found = made(ours, theirs)
    assert set(found.per_layer["it"]) == set(MAP.pairs)
    for (s, t), value in found.per_layer["it"].items():
        sides = by_hand(student, ours.hidden_states[s], norm), by_hand(teacher, theirs.hidden_states[t], norm)
        q, p = (z.detach().softmax(-1).double() for z in sides)
        m, numbers = (p + q) / 2, []
        for b, tokens in enumerate(ours.mask):
            for i in range(tokens.shape[0] - 1):
                if tokens[i] and tokens[i + 1]:  # what predicts a token
                    at = (p[b, i] * (p[b, i] / m[b, i]).log()).sum(), (q[b, i] * (q[b, i] / m[b, i]).log()).sum()
                    numbers.append(float(sum(at)) / 2)
        assert value.item() == pytest.approx(sum(numbers) / len(numbers), rel=1e-6) and value > 1e-4


@pytest.mark.parametrize("given", [lambda: batch(), packed], ids=["padded", "packed"])
@pytest.mark.parametrize("loss", ["jsd", "forward_kl", "tvd"])
def test_at_the_last_layers_it_is_the_outputs_term(loss, given):
    given = given()
    labels = given["input_ids"].masked_fill(given["input_ids"] % 3 == 0, -100)
    _, _, ours, theirs = traces("gpt2", {k: v for k, v in given.items() if k != "labels"})
    lens = Objective(LayerMap([(3, 3)]), terms={"it": Lens(loss, temperature=1.7)})
    whole = Objective(outputs=Outputs(loss, temperature=1.7))
    for known in (None, labels):
        expected = whole(ours, theirs, known).total.item()
        assert lens(ours, theirs, known).total.item() == pytest.approx(expected, rel=1e-9)
    assert lens(theirs, theirs).total.item() == pytest.approx(0.0, abs=1e-15)
    lens.temperature = 3.0
    assert lens(ours, theirs).total.item() != pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match=r"Lens\(temperature=0\): a temperature is finite and above 0"):
        lens.temperature = 0


@pytest.mark.parametrize("train", [False, True])
def test_gradients_are_those_of_the_plain_computation(train):
    student, teacher, ours, theirs = traces("llama")
    made = Objective(LayerMap([(1, 2)]), terms={"it": Lens(train_head=train)})
    weights = [student.lm_head.weight, student.model.norm.weight]
    below = list(student.model.layers[0].parameters())
    z, t = by_hand(student, ours.hidden_states[1]), by_hand(teacher, theirs.hidden_states[2]).detach()
    plain = outputs.jsd(z[:, :-1], t[:, :-1], ours.mask[:, :-1] & ours.mask[:, 1:])
    wanted = torch.autograd.grad(plain, [*weights, *below], retain_graph=True)
    found = torch.autograd.grad(made(ours, theirs).total, [*weights, *below], allow_unused=True)
    for grad, expected in zip(found[2:], wanted[2:], strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-7, atol=1e-12)
    for grad, expected in zip(found[:2], wanted[:2], strict=True):
        if train:
            torch.testing.assert_close(grad, expected, rtol=1e-7, atol=1e-12)
        else:
            assert grad is None
    assert all(p.grad is None for p in teacher.parameters())


def test_padding_has_no_effect_not_even_nan():
    _, _, ours, theirs = traces("gpt2")
    made = Objective(MAP, terms={"it": Lens()})
    mask = ours.mask.clone()
    mask[0] = False  # a row that counts nowhere
    results = []
    for number in (0.5, torch.nan):
        sides = []
        for side in (ours, theirs):
            states = {i: h.detach().masked_fill(~mask.unsqueeze(-1), number) for i, h in side.hidden_states.items()}
            sides.append(Trace(hidden_states=states, mask=mask, lens=side.lens, causal=True))
        leaf = sides[0].hidden_states[1].requires_grad_()
        loss = made(*sides).total
        results.append((loss.item(), *torch.autograd.grad(loss, leaf)))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert (results[1][1][~mask] == 0).all() and results[1][1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_finite_numbers_near_the_whole(dtype):
    student, teacher = models("llama", torch.float32)
    values = []
    for kind in (torch.float32, dtype):
        sides = [capture(m.to(kind), batch(), [1, 2], logits=False, lens=True) for m in (student, teacher)]
        loss = Objective(LayerMap([(1, 2)]), terms={"it": Lens()})(*sides).total
        loss.backward()
        values.append(loss.item())
        assert loss.dtype == torch.float32
        assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
        student.zero_grad()
    assert values[1] == pytest.approx(values[0], rel=0.05)


def test_what_it_cannot_read_is_refused_with_the_fix():
    _, _, ours, theirs = traces("gpt2")
    with pytest.raises(ValueError, match=r"Lens\('dkd'\) is not known; choose one of 'forward_kl', .*'jsd'"):
        Lens("dkd")
    with pytest.raises(ValueError, match=r"jsd mixes teacher and student with 0 < beta < 1, not 2"):
        Lens("jsd", beta=2)
    with pytest.raises(ValueError, match=r"its trace has none; capture\(..., lens=True\) keeps it"):
        Objective(MAP, terms={"it": Lens()})(ours, Trace(hidden_states=theirs.hidden_states, mask=theirs.mask))
    model = tiny("bart")
    trace = capture(model, batch_for(model), [2, 5], lens=True)
    with pytest.raises(
        ValueError, match=r"layer 2 of BartForConditionalGeneration is its encoder's.*map layers above 3"
    ):
        Objective(LayerMap([(2, 2)]), terms={"it": Lens()})(trace, trace)
    assert Objective(LayerMap([(5, 5)]), terms={"it": Lens()})(trace, trace).total.item() == pytest.approx(0, abs=1e-9)
    teacher, student, _ = parts("bert")
    with pytest.raises(ValueError, match="a lens asked of BertForSequenceClassification"):
        check_fit(teacher, student, Objective(MAP, terms={"it": Lens()}))
    other = capture(tiny("gpt2", vocab_size=60), batch(), [1], lens=True)
    small = capture(tiny("gpt2"), batch(), [1], lens=True)
    with pytest.raises(ValueError, match=r"60.*50|50.*60"):
        Objective(LayerMap([(1, 1)]), terms={"it": Lens()})(small, other)
    assert Objective(LayerMap([(1, 1)]), terms={"it": Lens(vocab_size=50)})(small, other).total >= 0


def test_a_cache_holds_no_head_and_says_so(tmp_path):
    made = Objective(MAP, Features(weight=0.1), terms={"it": Lens()})
    rows = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in data(causal=True)]
    with pytest.raises(ValueError, match="a lens reads the teacher's hidden states by its own norm and head"):
        TeacherCache.build(tmp_path / "cache", tiny("gpt2"), rows, made)
    lacking = CacheContent(hidden_states=(0, 2, 3)).missing(made)
    assert lacking == ["the teacher's own norm and head, which no cache holds (it term)"]


def test_it_trains_a_narrower_student_and_one_with_an_adapter(tmp_path):
    for adapted in (False, True):
        teacher, student, _ = parts("gpt2", width=None if adapted else 16)
        if adapted:
            torch.manual_seed(0)
            student = peft.get_peft_model(
                student, peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
            )
        made = Objective(LayerMap([(1, 2), (2, 3)]), terms={"it": Lens(weight=10.0)})
        head = copy.deepcopy(student.get_output_embeddings().weight)
        trainer = make(tmp_path / str(adapted), "gpt2", made=(teacher, student, made))
        trainer.train()
        values = logged(trainer, "it")
        assert len(values) == 6 and values[-1] < values[0]
        assert adapted is torch.equal(student.get_output_embeddings().weight, head)  # tied to embeddings, which learn


def test_parts_of_a_batch_make_the_whole():
    torch.manual_seed(0)
    rows, made = uneven(causal=True, rows=8), Objective(MAP, terms={"it": Lens()})
    student, teacher = models("gpt2")

    def loss(part, share=None):
        given = {key: torch.stack([row[key] for row in part]) for key in part[0]}
        inputs = {key: value for key, value in given.items() if key != "labels"}
        sides = [capture(model, inputs, [0, 1, 2, 3], logits=False, lens=True) for model in (student, teacher)]
        return made(*sides, given["labels"], share).terms["it"].item(), given

    whole, _ = loss(rows)
    pieces = [rows[:3], rows[3:6], rows[6:]]
    found = shares([counts(made, loss(p)[1], causal=True, token_logits=True) for p in pieces], gather=lambda x: x)
    together = sum(loss(p, s)[0] for p, s in zip(pieces, found, strict=True)) / 3
    assert together == pytest.approx(whole, rel=1e-6)
    assert sum(loss(p)[0] for p in pieces) / 3 != pytest.approx(whole, rel=1e-5)


def test_a_file_names_it():
    given = {"kind": "lens", "loss": "jsd", "beta": 0.3, "norm": False, "layer_map": [[1, 2]], "temperature": 2.0}
    term = build_further_term("it", given, lambda pairs: LayerMap(pairs))
    assert (term.loss, term.parameters, term.norm, term.temperature) == ("jsd", {"beta": 0.3}, False, 2.0)
    assert term.layer_map == LayerMap([(1, 2)]) and term.weight == 1.0
