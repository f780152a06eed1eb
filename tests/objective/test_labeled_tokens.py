"""Features and attention at the tokens that carry a label: those alone, the same over parts of a batch, in a file."""

from dataclasses import replace

import pytest
import torch

from fakit import Attention, Features, LayerMap, Objective, capture
from fakit.experiments.config import ExperimentConfig
from fakit.objective.feature_terms import Dynamics, Flow, LayerAttention, Pooled
from fakit.objective.needs import CountedBatch
from fakit.objective.positions import labeled_tokens, later_tokens
from fakit.training.token_counts import counts, shares
from tests.families import tiny
from tests.objective.states import EVERY, MASK, OURS, THEIRS

MAP = LayerMap([(1, 1), (2, 3)])
LABELS = torch.tensor([[-100, 7, 7, 7], [7, -100, -100, -100], [-100, -100, 7, -100]])  # 7 where MASK is False, too
LEARNED = torch.tensor(
    [[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 0]]
).bool()  # of the second text all: its label is padding's
TERMS = {
    "features": lambda **more: Features("mse", layer_map=MAP, **more),
    "relations": lambda **more: Features("gram", layer_map=MAP, **more),
    "pooled": lambda **more: Pooled("cosine", layer_map=MAP, **more),
    "dynamics": lambda **more: Dynamics(layer_map=MAP, **more),
    "flow": lambda **more: Flow(layer_map=MAP, **more),
    "layer attention": lambda **more: LayerAttention(layer_map=EVERY, **more),
}


def loss(term, *sides, labels=LABELS):
    return Objective(terms={"it": term}).prepare(6, 6).double()(*sides, labels).terms["it"].item()


def test_which_tokens_carry_a_label():
    assert torch.equal(labeled_tokens(MASK, LABELS), LEARNED)
    packed, documents = torch.ones(1, 6).bool(), torch.tensor([[0, 0, 0, 1, 1, 2]])
    labels = torch.tensor([[-100, 7, 7, -100, -100, 7]])
    wanted = torch.tensor([[0, 1, 1, 1, 1, 1]]).bool()  # the second document has no label, so all of it counts
    assert torch.equal(labeled_tokens(packed, labels, documents), wanted)


def test_which_tokens_are_later_ones():
    padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    wanted = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(later_tokens(padded), wanted)
    packed, documents = torch.tensor([[1, 1, 1, 1, 1, 1, 0]]).bool(), torch.tensor([[0, 0, 0, 1, 1, 2, 3]])
    assert torch.equal(later_tokens(packed, documents), torch.tensor([[0, 1, 1, 0, 1, 0, 0]]).bool())


@pytest.mark.parametrize("name", TERMS)
def test_the_first_token_of_a_text_has_no_part_in_later_ones(name):
    found = loss(TERMS[name](tokens="later"), OURS, THEIRS)
    narrowed = [replace(side, mask=later_tokens(MASK)) for side in (OURS, THEIRS)]
    assert found == pytest.approx(loss(TERMS[name](), *narrowed), rel=1e-12)
    assert found == loss(TERMS[name](tokens="later"), OURS, THEIRS, labels=None)  # labels say nothing here
    assert found != pytest.approx(loss(TERMS[name](), OURS, THEIRS), rel=1e-3)


@pytest.mark.parametrize("kind", ["kl", "mse", "score_mse"])
@pytest.mark.parametrize("packed", [False, True])
def test_later_tokens_count_as_they_are_compared(kind, packed):
    """Attention by the numbers that a term counts: all pairs are those of first tokens and of later ones."""
    model, other = tiny("llama", seed=1), tiny("llama")
    batch = {"input_ids": torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(1))}
    if packed:
        batch["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)
    else:
        batch["attention_mask"] = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    sides = [capture(m, batch, attentions=[1]) for m in (model, other)]
    counted, one = CountedBatch(batch, causal=True, token_logits=True), LayerMap([(1, 1)])
    values, numbers = [], []
    for tokens in ("later", "all"):
        term = Attention(kind, tokens=tokens, layer_map=one)
        values.append(Objective(terms={"it": term})(*sides).terms["it"].item())
        numbers.append(term.count(counted).item())
    texts = 4 if packed else 2
    assert numbers[1] - numbers[0] == texts  # a first token sees itself alone
    first = 0.0
    if kind == "score_mse":  # the only kind that does not end with a softmax over one key
        one_key = sum(numbers[side] * values[side] * (1 - 2 * (side == 0)) for side in (0, 1))
        first = one_key
        assert first > 0
    assert values[0] * numbers[0] + first == pytest.approx(values[1] * numbers[1], rel=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_what_has_no_label_has_no_part(name):
    found = loss(TERMS[name](tokens="labeled"), OURS, THEIRS)
    narrowed = [replace(side, mask=LEARNED) for side in (OURS, THEIRS)]
    assert found == pytest.approx(loss(TERMS[name](), *narrowed), rel=1e-12)
    assert found != pytest.approx(loss(TERMS[name](), OURS, THEIRS), rel=1e-3)
    spoilt = {i: x.masked_fill(~LEARNED.unsqueeze(-1), 99.0) for i, x in OURS.hidden_states.items()}
    assert loss(TERMS[name](tokens="labeled"), replace(OURS, hidden_states=spoilt), THEIRS) == found
    assert loss(TERMS[name](tokens="labeled"), OURS, THEIRS, labels=None) == loss(TERMS[name](), OURS, THEIRS)


@pytest.mark.parametrize("name", ["features", "pooled", "dynamics", "flow"])
def test_parts_of_a_batch_make_the_whole(name):
    torch.manual_seed(0)
    made = Objective(terms={"it": TERMS[name](tokens="labeled")}).prepare(32, 32).double()
    student, teacher = tiny("gpt2", seed=1).double(), tiny("gpt2").double()
    batch = {"input_ids": torch.randint(3, 30, (6, 7)), "attention_mask": torch.ones(6, 7).long()}
    batch["attention_mask"][0, 4:] = batch["attention_mask"][3, 2:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(torch.rand(6, 7) < 0.6, -100)

    def value(rows, share=None):
        part = {key: x[rows] for key, x in batch.items()}
        sides = [capture(m, {k: x for k, x in part.items() if k != "labels"}, [0, 1, 2, 3]) for m in (student, teacher)]
        return made(*sides, part["labels"], share).terms["it"].item(), part

    pieces = [slice(0, 1), slice(1, 4), slice(4, 6)]
    parts = [counts(made, value(p)[1], causal=True, token_logits=True) for p in pieces]
    together = sum(value(p, s)[0] for p, s in zip(pieces, shares(parts, gather=lambda x: x), strict=True)) / 3
    assert together == pytest.approx(value(slice(0, 6))[0], rel=1e-6)


def test_labels_of_texts_and_other_words_are_refused():
    with pytest.raises(ValueError, match=r"Features\(tokens='answers'\) is not known; choose one of 'all', 'labeled'"):
        Features(tokens="answers")
    with pytest.raises(ValueError, match=r"it compares tokens that carry a label .* labels are \(3,\) beside \(3, 4\)"):
        loss(Features(layer_map=MAP, tokens="labeled"), OURS, THEIRS, labels=torch.tensor([0, 1, 0]))


def test_a_file_says_it():
    config = ExperimentConfig(features={"tokens": "labeled"})
    assert config.features.tokens == "labeled" and config.to_dict()["features"]["tokens"] == "labeled"
    assert "tokens" not in ExperimentConfig().to_dict()["features"]  # ids of runs stay
    assert config.features.build(lambda pairs: MAP).tokens == "labeled"


# -- attention: the maps of the labeled tokens, over all keys that they see -------------------------------------------

PAIRS = LayerMap([(1, 1), (2, 3)])
DOCUMENTS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2]])


def sides(family: str, packed: bool = False, attention: str = "sdpa", **changes):
    """Student, teacher and a batch, one row of it with padding (or both rows packed), a label at every token."""
    teacher, student = (tiny(family, attention, seed=seed, **changes).double() for seed in (0, 1))
    generator = torch.Generator().manual_seed(3)
    batch = {"input_ids": torch.randint(3, 30, (2, 7), generator=generator)}
    if packed:
        return student, teacher, batch | {"position_ids": DOCUMENTS}, batch["input_ids"]
    batch["attention_mask"] = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    return student, teacher, batch, batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def attention(student, teacher, batch, labels, **more) -> tuple[torch.Tensor, float, list[torch.Tensor]]:
    """The term, what it counts, and its gradient at the student's queries and keys."""
    objective = Objective(PAIRS, attention=Attention(**more))
    asked = {"attentions": [1, 2, 3], "logits": False}
    ours, theirs = capture(student, batch, **asked), capture(teacher, batch, **asked)
    value = objective(ours, theirs, labels).terms["attention"]
    weights = [p for name, p in student.named_parameters() if "ln" not in name and p.dim() > 1]
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    counted = CountedBatch(batch if labels is None else batch | {"labels": labels}, ours.causal, token_logits=True)
    return value, objective.attention.count(counted).item(), [g for g in gradients if g is not None]


@pytest.mark.parametrize(
    "family, packed", [("gpt2", False), ("roberta", False), ("llama", False), ("gpt2", True)], ids=str
)
@pytest.mark.parametrize(
    "more",
    [
        {"loss": "kl"},
        {"loss": "mse"},
        {"loss": "score_mse"},
        {"loss": "relations"},
        {"loss": "minilm"},
        {"loss": "kl", "heads": "best-match"},
    ],
    ids=lambda more: "-".join(more.values()),
)
def test_the_labeled_tokens_and_the_others_make_the_whole(more, family, packed):
    """Over any division of the tokens into two, the mean over all is the mean of both by what each counts."""
    *models, batch, labels = sides(family, packed)
    some = torch.rand(2, 7, generator=torch.Generator().manual_seed(4)) < 0.5
    some[:, 1::2], some[:, 2::2] = True, False  # of each row, and of each document, some in both parts
    # what begins a causal model's text, in a row of its own or packed, has nothing to go by: its label does not count
    whole, count, gradients = attention(
        *models, batch, labels, **more | {"tokens": "all" if family == "roberta" else "labeled"}
    )
    parts = [
        attention(*models, batch, labels.masked_fill(~which, -100), **more | {"tokens": "labeled"})
        for which in (some, ~some)
    ]
    counts_of = [part[1] for part in parts]
    assert sum(counts_of) == count and min(counts_of) > 0
    if more.get("heads") == "best-match":  # each part makes a match of its own
        assert all(part[0] > 0 for part in parts)
        return
    together = sum(value * own for value, own, _ in parts) / count
    assert together.item() == pytest.approx(whole.item(), rel=1e-9)
    for whole_gradient, *part_gradients in zip(gradients, *(part[2] for part in parts), strict=True):
        mixed = sum(g * own for g, own in zip(part_gradients, counts_of, strict=True)) / count
        rounding = 2e-7 * max(1.0, whole_gradient.abs().max().item())  # Llama has parts in float32
        assert torch.allclose(mixed, whole_gradient, atol=rounding)


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_labeled_attention_is_the_mean_over_rows_of_the_maps(loss):
    student, teacher, batch, labels = sides("gpt2")
    labels[:, :2] = -100
    labels[0, 5] = -100
    value, _, gradients = attention(student, teacher, batch, labels, loss=loss, tokens="labeled")
    ours, theirs = (capture(model, batch, attentions=[1, 2, 3]) for model in (student, teacher))
    sums, items = 0.0, 0
    for s, t in ((1, 1), (2, 3)):
        a, b = ours.attention_maps(s), theirs.attention_maps(t).detach()
        for row, query in (labels != -100).nonzero().tolist():
            x, y = a[row, :, query, : query + 1], b[row, :, query, : query + 1]
            sums = sums + ((y * (y.log() - x.log())) if loss == "kl" else (x - y).square()).sum()
            items += x.shape[0] * (1 if loss == "kl" else query + 1)
    expected = sums / items
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    weights = [p for name, p in student.named_parameters() if "ln" not in name and p.dim() > 1]
    by_hand = [g for g in torch.autograd.grad(expected, weights, allow_unused=True) if g is not None]
    for g, h in zip(gradients, by_hand, strict=True):
        assert torch.allclose(g, h, atol=1e-12)


@pytest.mark.parametrize("heads", ["one-to-one", "best-match"])
def test_maps_that_a_family_itself_returns_are_compared_at_the_same_tokens(heads):
    """BLOOM shows its maps alone; cut to the labeled rows by hand."""
    student, teacher, batch, labels = sides("bloom", attention="eager")
    labels[:, :3] = -100
    objective = Objective(PAIRS, attention=Attention("kl", tokens="labeled", heads=heads))
    ours, theirs = (capture(model, batch, attentions=[1, 2, 3]) for model in (student, teacher))
    assert ours.maps
    found = objective(ours, theirs, labels)
    rows, expected = (labels != -100).nonzero().tolist(), []
    for s, t in ((1, 1), (2, 3)):
        a, b = ours.attention_maps(s).double(), theirs.attention_maps(t).double()
        if heads == "best-match":
            b = b[:, found.heads[s, t]]
        pairs = [(a[r, :, q, : q + 1], b[r, :, q, : q + 1]) for r, q in rows]
        expected += [(y * (y.log() - x.log())).sum(-1).mean() for x, y in pairs]
    assert found.terms["attention"].item() == pytest.approx(sum(expected).item() / len(expected), rel=1e-6)


def test_what_attention_is_compared_at_is_one_of_two_and_a_function_sees_all():
    with pytest.raises(ValueError, match=r"Attention\(tokens='answers'\) is not known; choose one of 'all', 'labeled'"):
        Attention(tokens="answers")
    with pytest.raises(ValueError, match="a function of maps is given the mask of all tokens"):
        Attention(lambda student, teacher, mask: student.sum(), tokens="labeled")
    config = ExperimentConfig(attention={"tokens": "labeled"})
    assert config.to_dict()["attention"]["tokens"] == "labeled"
    assert "tokens" not in ExperimentConfig().to_dict()["attention"]
