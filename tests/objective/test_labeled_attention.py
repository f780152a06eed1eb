"""Attention alignment of the queries that carry a label: by hand from maps in full, streamed, in parts, cached, in files."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fakit import Attention, LayerMap, Objective, TeacherCache, capture
from fakit.experiments.config import ExperimentConfig
from fakit.losses.fused.blocks import use_blocks
from fakit.losses.fused.streamed import head_costs, match_heads
from fakit.objective.needs import CountedBatch
from fakit.objective.positions import labeled_tokens
from fakit.training.token_counts import counts, shares
from tests.families import VOCAB, tiny

PAIR = (2, 3)
MAP = LayerMap([PAIR])


def batch(packed: bool = False) -> dict[str, Tensor]:
    """Five rows of 9 tokens: labels behind a prompt; in the middle; at padding alone, so none; none; at the first."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (5, 9), generator=generator)
    mask = torch.ones(5, 9, dtype=torch.long)
    mask[0, 7:] = mask[2, 5:] = 0
    learned = torch.zeros(5, 9, dtype=torch.bool)
    learned[0, 4:7] = learned[1, 2:4] = learned[2, 6:] = learned[4, :2] = True
    made = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~learned, -100)}
    if packed:  # each row two documents
        made["position_ids"] = torch.cat([torch.arange(4), torch.arange(5)]).expand(5, -1).contiguous()
    return made


def sides(family: str, attention: str = "sdpa", packed: bool = False):
    student, teacher = tiny(family, attention, seed=1).double(), tiny(family, attention).double()
    made = batch(packed)
    inputs = {name: x for name, x in made.items() if name != "labels"}
    with torch.no_grad():
        theirs = capture(teacher, inputs, attentions=[3])
    return student, capture(student, inputs, attentions=[2]), theirs, made


def by_hand(loss: str, ours, theirs, labels: Tensor) -> Tensor:
    """The loss from maps (scores) in full, query by query."""
    queries = labeled_tokens(ours.mask, ours.own_labels(labels), ours.documents)
    found, number = 0.0, 0
    if loss == "score_mse":
        of_student, of_teacher = (side.attention[layer].scores() for side, layer in ((ours, 2), (theirs, 3)))
    else:
        of_student, of_teacher = ours.attention_maps(2), theirs.attention_maps(3)
    allowed = ours.attention[2].allowed() if 2 in ours.attention else None
    for b, q in queries.nonzero().tolist():
        keys = ours.mask[b].clone()
        if ours.causal:
            keys[q + 1 :] = False
        if ours.documents is not None:
            keys &= ours.documents[b] == ours.documents[b, q]
        if allowed is not None and loss != "kl":
            keys &= allowed[min(b, len(allowed) - 1), 0, min(q, allowed.shape[2] - 1)]
        s, t = of_student[b, :, q, keys], of_teacher[b, :, q, keys]
        if loss == "kl":
            s, t = s / s.sum(-1, keepdim=True), t / t.sum(-1, keepdim=True)
            tiny_number = torch.finfo(s.dtype).tiny
            found, number = (
                found + (t * (t.clamp_min(tiny_number).log() - s.clamp_min(tiny_number).log())).sum(),
                number + len(s),
            )
        else:
            found, number = found + (s - t).square().sum(), number + s.numel()
    return found / number


def gradients(value: Tensor, student) -> list[Tensor]:
    named = [p for p in student.parameters() if p.requires_grad]
    return [g for g in torch.autograd.grad(value, named, allow_unused=True, retain_graph=True) if g is not None]


FAMILIES = [(family, packed) for family in ("llama", "gpt2", "mistral") for packed in (False, True)]
FAMILIES += [("bert", False), ("bloom", False)]  # they mix documents


@pytest.mark.parametrize("loss", ["kl", "mse", "score_mse"])
@pytest.mark.parametrize(("family", "packed"), FAMILIES)
def test_only_queries_with_a_label_count_each_over_all_of_its_keys(family, loss, packed):
    student, ours, theirs, made = sides(family, packed=packed)
    labels = made["labels"]
    term = Objective(attention=Attention(loss, layer_map=MAP, tokens="labeled"), layer_map=MAP)
    if family == "bloom" and loss == "score_mse":
        with pytest.raises(ValueError, match="gives only its attention maps"):
            term(ours, theirs, labels)
        return
    wanted = by_hand(loss, ours, theirs, labels)
    with use_blocks(attention=1):  # a query at a time: blocks without one that counts are passed over
        found = term(ours, theirs, labels).terms["attention"]
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert found.item() == pytest.approx(term(ours, theirs, labels).terms["attention"].item(), rel=1e-9)
    for one, other in zip(gradients(found, student), gradients(wanted, student), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)
    everything = Objective(attention=Attention(loss, layer_map=MAP), layer_map=MAP)(ours, theirs, labels)
    assert everything.terms["attention"].item() != pytest.approx(found.item(), rel=1e-3)
    without = term(ours, theirs, None).terms["attention"].item()  # without labels every token counts
    assert without == pytest.approx(everything.terms["attention"].item(), rel=1e-9)


@pytest.mark.parametrize("settings", [{"heads": "group-mean"}, {"loss": "relations"}, {"loss": "minilm"}])
def test_two_halves_of_the_queries_make_the_whole_in_other_comparisons(settings):
    _, ours, theirs, made = sides("gpt2")
    tokens, ids = made["attention_mask"].bool(), made["input_ids"]
    settings = {"loss": "kl", "layer_map": MAP} | settings
    found = Objective(MAP, attention=Attention(**settings, tokens="labeled"))
    whole = Objective(MAP, attention=Attention(**settings))(ours, theirs).terms["attention"].item()
    assert found(ours, theirs).terms["attention"].item() == pytest.approx(whole, rel=1e-9)
    total = 0.0
    for half in (torch.arange(9) % 2 == 0, torch.arange(9) % 2 == 1):
        labels = torch.where(half & tokens, ids, -100)
        number = labeled_tokens(ours.mask, ours.own_labels(labels)).sum().item()
        total += found(ours, theirs, labels).terms["attention"].item() * number
    # a row's first token has no label of its own, and no choice: its map is 1 on both sides
    assert total / tokens.sum().item() == pytest.approx(whole, rel=1e-9)


def test_heads_are_matched_by_the_queries_that_count():
    _, ours, theirs, made = sides("gpt2")
    objective = Objective(MAP, attention=Attention("kl", heads="best-match", tokens="labeled"))
    breakdown = objective(ours, theirs, made["labels"])
    chosen = theirs.attention[3].select_heads(breakdown.heads[PAIR])
    matched = replace(theirs, attention={3: chosen})
    assert breakdown.terms["attention"].item() == pytest.approx(by_hand("kl", ours, matched, made["labels"]).item())
    queries = labeled_tokens(ours.mask, ours.own_labels(made["labels"]))
    costs = head_costs("kl", ours.attention[2], theirs.attention[3], ours.mask, queries)
    assert torch.equal(match_heads(costs), breakdown.heads[PAIR])
    one = [replace(ours, attention={2: ours.attention[2].select_heads(torch.tensor([1]))})]
    one.append(replace(theirs, attention={3: theirs.attention[3].select_heads(torch.tensor([2]))}))
    assert costs[1, 2].item() == pytest.approx(by_hand("kl", *one, made["labels"]).item(), rel=1e-9)


@pytest.mark.parametrize("loss", ["kl", "mse", "score_mse"])
@pytest.mark.parametrize(("family", "packed"), [("gpt2", False), ("gpt2", True), ("bert", False)])
def test_parts_of_a_batch_make_the_whole(family, packed, loss):
    student, teacher, made = tiny(family, seed=1).double(), tiny(family).double(), batch(packed)
    objective = Objective(MAP, attention=Attention(loss, tokens="labeled"))

    def value(rows, share=None):
        part = {name: x[rows] for name, x in made.items()}
        inputs = {name: x for name, x in part.items() if name != "labels"}
        both = capture(student, inputs, attentions=[2]), capture(teacher, inputs, attentions=[3])
        return objective(*both, part["labels"], share).terms["attention"].item(), part

    pieces = [slice(0, 1), slice(1, 3), slice(3, 5)]
    parts = [counts(objective, value(piece)[1], causal=family == "gpt2", token_logits=True) for piece in pieces]
    both = zip(pieces, shares(parts, gather=lambda x: x), strict=True)
    assert sum(value(piece, share)[0] for piece, share in both) / 3 == pytest.approx(value(slice(0, 5))[0], rel=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_pairs_are_counted_over_the_keys_that_a_query_sees(causal, packed):
    made = batch(packed)
    every = made | {"labels": torch.full_like(made["input_ids"], -100)}  # no text has a label, so all tokens count
    counted = CountedBatch(every, causal, True)
    assert counted.pairs_of(counted.labeled_tokens) == counted.pairs
    one = {name: x[1:2] for name, x in made.items()}
    one["labels"] = torch.full_like(one["input_ids"], -100)
    one["labels"][0, 6] = 7
    seen = {(True, False): 7, (True, True): 3, (False, False): 9, (False, True): 5}[causal, packed]
    others = sum(range(1, 5)) if causal else 16  # of the first document, which has no label
    counted = CountedBatch(one, causal, True)
    assert counted.pairs_of(counted.labeled_tokens) == seen + packed * others


def test_a_cached_teacher_gives_the_same(tmp_path):
    student, teacher, made = tiny("llama", seed=1), tiny("llama"), batch()
    objective = Objective(MAP, attention=Attention("kl", tokens="labeled"))
    rows = [
        {name: x[i][made["attention_mask"][i].bool()].tolist() for name, x in made.items()}
        for i in range(len(made["labels"]))
    ]
    cache = TeacherCache.build(tmp_path / "cache", teacher, rows, objective, dtype="float32")
    inputs = {name: x for name, x in made.items() if name != "labels"}
    with torch.no_grad():
        ours, live = capture(student, inputs, attentions=[2]), capture(teacher, inputs, attentions=[3])
    cached = cache.trace(range(5), made["attention_mask"], objective.needs("teacher"))
    found, wanted = (objective(ours, theirs, made["labels"]).terms["attention"].item() for theirs in (cached, live))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_file_says_it_and_ids_of_runs_stay():
    config = ExperimentConfig(attention={"tokens": "labeled"})
    assert config.to_dict()["attention"]["tokens"] == "labeled"
    assert config.attention.build(lambda pairs: MAP).tokens == "labeled"
    assert "tokens" not in ExperimentConfig().to_dict()["attention"]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"Attention\(tokens='answers'\) is not known; choose one of 'all', 'labeled'"):
        Attention(tokens="answers")
    with pytest.raises(
        ValueError, match=r"Attention\(a function, tokens='labeled'\): a function of maps is given the mask"
    ):
        Attention(lambda ours, theirs, mask: ours.mean(), tokens="labeled")
    _, ours, theirs, _ = sides("bert")
    with pytest.raises(
        ValueError, match=r"attention compares tokens that carry a label .* labels are \(5,\) beside \(5, 9\)"
    ):
        Objective(MAP, attention=Attention(tokens="labeled"))(ours, theirs, torch.arange(5) % 2)
