"""What a model is given of a batch: its own columns, no cache, any side of the padding,
documents of packed rows apart.
"""

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import DataCollatorWithFlattening

from fakit import Attention, Features, LayerMap, Objective, Outputs, Task, TeacherCache, capture, shrink
from fakit.tracing.inputs import find_documents, left_padding, prepare_inputs, taken_columns
from tests.families import LAYERS, SEQ2SEQ, SIZES, VOCAB, WIDTH, tiny

ALL = range(LAYERS + 1)
LENGTHS = (6, 9, 2, 4)


def gpt_neo() -> hf.PreTrainedModel:
    config = hf.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_layers=3,
        num_heads=4,
        attention_types=[[["global", "local", "global"], 1]],
        window_size=3,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return hf.GPTNeoForCausalLM(config).eval()


def mamba() -> hf.PreTrainedModel:
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2)).eval()


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]


def padded(side: str = "right") -> dict[str, Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    ids, ones = texts(), [torch.ones(length, dtype=torch.long) for length in LENGTHS]
    batch = {"input_ids": pad(ids, True, padding_side=side), "attention_mask": pad(ones, True, padding_side=side)}
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def packed(**options) -> dict[str, Tensor]:
    rows = [{"input_ids": x.tolist(), "labels": x.tolist()} for x in texts()]
    return DataCollatorWithFlattening(return_tensors="pt", **options)(rows)


def objective(attention: str = "kl") -> Objective:
    return Objective(LayerMap.uniform(2, LAYERS), Features("mse"), Attention(attention), Outputs("forward_kl"), Task())


def terms(teacher, student, batch: dict[str, Tensor], loss: Objective) -> dict[str, Tensor]:
    with torch.no_grad():
        sides = [
            capture(model, batch, needs.hidden_states, needs.attentions)
            for model, needs in ((student, loss.needs("student")), (teacher, loss.needs("teacher")))
        ]
        return loss(*sides, batch["labels"]).terms


# -- no cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [lambda: tiny("llama"), mamba, lambda: tiny("t5"), lambda: tiny("xlnet", "eager")])
def test_nothing_that_only_generation_reads_is_kept(model):
    model, seen = model(), []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(set(output)))
    with torch.no_grad():
        capture(model, padded(), logits=True)
    handle.remove()
    assert not seen[0] & {"past_key_values", "cache_params", "mems"}
    assert getattr(model.config, "use_cache", True)  # generation keeps its own


# -- columns ----------------------------------------------------------------------------------------------------------


def test_each_model_is_given_its_own_columns():
    batch = padded() | {"token_type_ids": torch.ones(4, 9, dtype=torch.long), "length": torch.tensor(LENGTHS)}
    given = {name: set(prepare_inputs(tiny(name), batch).inputs) for name in ("bert", "distilbert", "llama")}
    assert given["bert"] - {"use_cache"} == {"input_ids", "attention_mask", "token_type_ids"}
    assert given["distilbert"] == {"input_ids", "attention_mask"}
    assert given["llama"] == {"input_ids", "attention_mask", "use_cache"}


def test_a_forward_pass_that_hands_its_arguments_on_takes_what_is_taken_behind_it():
    class Mine(hf.BertForSequenceClassification):
        def forward(self, input_ids, **kwargs):
            return super().forward(input_ids, **kwargs)

    class Open(torch.nn.Module):
        def forward(self, **inputs):
            return inputs

    model = Mine(hf.BertConfig(**SIZES))
    assert {"attention_mask", "token_type_ids"} <= taken_columns(model) and "length" not in taken_columns(model)
    assert taken_columns(Open()) is None


# -- the side of the padding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "way"),
    [
        (lambda: tiny("llama"), "as it is"),
        (lambda: tiny("opt"), "as it is"),  # makes its positions of the mask
        (lambda: tiny("roberta"), "as it is"),  # … of the tokens
        (lambda: tiny("gpt2"), "positions"),
        (gpt_neo, "positions"),
        (lambda: tiny("distilbert"), "moved"),  # reads its classes off the first place
        (lambda: hf.BartForCausalLM(SEQ2SEQ["bart"][1]()).eval(), "moved"),  # takes no positions
    ],
)
def test_rows_padded_on_the_left_give_what_the_same_rows_give_padded_on_the_right(model, way):
    model = model()
    assert left_padding(model) == way
    found = []
    for side in ("right", "left"):
        batch = padded(side)
        with torch.no_grad():
            trace = capture(model, batch, ALL, range(1, LAYERS + 1))
        tokens = batch["attention_mask"].bool()
        pairs = (tokens[:, None, :, None] & tokens[:, None, None, :]).expand(-1, 4, -1, -1)
        assert torch.equal(trace.mask, tokens)
        kept = [trace.hidden_states[i][tokens] for i in ALL] + [trace.attention_maps(i)[pairs] for i in ALL[1:]]
        found.append([*kept, trace.logits[tokens] if trace.logits.dim() == 3 else trace.logits])
    for right, left in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_the_terms_and_their_gradients_do_not_know_the_side():
    teacher, loss = tiny("gpt2"), objective()
    student = shrink(teacher, 2, init="random")
    found = {}
    for side in ("right", "left"):
        batch = padded(side)
        needs = loss.needs("teacher")
        with torch.no_grad():
            theirs = capture(teacher, batch, needs.hidden_states, needs.attentions)
        needs = loss.needs("student")
        student.zero_grad()
        result = loss(capture(student.eval(), batch, needs.hidden_states, needs.attentions), theirs, batch["labels"])
        result.total.backward()
        found[side] = [*result.terms.values(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)]
    for right, left in zip(found["right"], found["left"], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


# -- packed rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3"])
def test_packed_documents_say_what_each_says_alone(family, implementation):
    model = tiny(family, implementation)
    with torch.no_grad():
        trace = capture(model, packed(), ALL, range(1, LAYERS + 1))
        start = 0
        for ids in texts():
            alone = capture(model, {"input_ids": ids[None]}, ALL, range(1, LAYERS + 1))
            own = slice(start, start + len(ids))
            for i in ALL:
                close(trace.hidden_states[i][:, own], alone.hidden_states[i])
            for i in ALL[1:]:
                maps = trace.attention_maps(i)
                close(maps[:, :, own, own], alone.attention_maps(i))
                assert not maps[:, :, own, : own.start].any() and not maps[:, :, own, own.stop :].any()
            close(trace.logits[:, own], alone.logits)
            start = own.stop


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["kl", "mse", "score_mse", "relations", "minilm", "maps"])
def test_packed_terms_are_those_of_the_documents_in_rows_of_their_own(attention, monkeypatch):
    teacher = tiny("mistral")
    student, loss = shrink(teacher, 2, init="random").eval(), objective("kl" if attention == "maps" else attention)
    if attention == "maps":  # in full, as for families that give nothing else
        monkeypatch.setattr(
            Attention, "compare_pair", lambda term, s, t, pair: term._compare_maps(s, t, pair, s.mask & t.mask)
        )
    batch = packed()
    batch["labels"] = batch["input_ids"].clone()  # the first token of a document is no label of the one before it
    found, wanted = terms(teacher, student, batch, loss), terms(teacher, student, padded(), loss)
    for name, value in wanted.items():
        close(found[name], value)
    again = terms(teacher, teacher, packed(), Objective(LayerMap([(3, 3)]), Features(), Attention(), Outputs()))
    assert all(value.abs() < 1e-9 for value in again.values())


@pytest.mark.parametrize(
    "options",
    [
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True},
        {"return_position_ids": False, "return_seq_idx": True},
        {"return_position_ids": False, "return_flash_attn_kwargs": True},
    ],
)
def test_every_way_to_say_where_documents_begin(options):
    model, wanted = tiny("llama"), find_documents(packed())
    assert wanted.tolist() == [[n for n, length in enumerate(LENGTHS) for _ in range(length)]]
    batch = packed(**options)
    with torch.no_grad():
        assert torch.equal(capture(model, batch).documents, wanted)
        close(capture(model, batch).logits, capture(model, packed()).logits)


def test_packed_rows_with_a_mask_and_padding_on_either_side():
    model, ids = tiny("gpt2"), torch.cat(texts()[:2])
    own = torch.cat([torch.arange(6), torch.arange(9)])
    with torch.no_grad():
        wanted = capture(model, {"input_ids": ids[None], "position_ids": own[None]}).logits[0]
        for before, after in ((0, 3), (3, 0), (2, 2)):
            wide = {"input_ids": ids, "position_ids": own, "attention_mask": torch.ones_like(ids)}
            batch = {k: torch.nn.functional.pad(x, (before, after))[None].repeat(2, 1) for k, x in wide.items()}
            found = capture(model, batch).logits
            for row in found:
                close(row[before : before + len(ids)], wanted)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (mamba, "takes no position_ids"),
        (lambda: tiny("bloom"), "takes no position_ids"),
        (lambda: tiny("roberta"), "attention both ways"),
        (lambda: tiny("opt"), "a later document sees what an earlier one says"),
        (lambda: tiny("bert"), "one prediction for a row"),
    ],
)
def test_a_model_that_would_mix_documents_is_refused_with_the_reason(model, reason):
    with pytest.raises(ValueError, match=f"packs several documents into a row.*cannot keep them apart: .*{reason}"):
        capture(model(), packed())


# -- caches -----------------------------------------------------------------------------------------------------------


def test_a_cached_teacher_reads_packed_batches_and_packed_rows(tmp_path):
    teacher, rows = tiny("mistral"), [{"input_ids": x} for x in texts()]
    layers = {"hidden_states": ALL, "attentions": ALL[1:], "dtype": "float32"}
    cache = TeacherCache.build(tmp_path / "rows", teacher, rows, **layers)
    batch = packed()
    with torch.no_grad():
        live = capture(teacher, batch, ALL, ALL[1:])
    row = {"input_ids": batch["input_ids"][0], "position_ids": batch["position_ids"][0]}
    whole = TeacherCache.build(tmp_path / "packed", teacher, [row, {k: x[:9] for k, x in row.items()}], **layers)
    for found in (cache.trace([0, 1, 2, 3], torch.ones(1, 21)), whole.trace([0], torch.ones(1, 21))):
        assert torch.equal(found.documents, live.documents)
        for i in ALL:
            close(found.hidden_states[i], live.hidden_states[i])
        for i in ALL[1:]:
            close(found.attention_maps(i), live.attention_maps(i))
        close(found.logits, live.logits)
    with pytest.raises(ValueError, match="they do not fill them one after another"):
        cache.trace([0, 1, 2], torch.ones(2, 8))


def test_what_a_cache_cannot_hold_is_refused_before_the_teacher_runs(tmp_path):
    teacher, rows = tiny("bert"), [{"input_ids": x, "token_type_ids": torch.zeros_like(x)} for x in texts()]

    def refused(dataset, message, model=teacher, **options):
        with pytest.raises(ValueError, match=message):
            TeacherCache.build(tmp_path / "c", model, dataset, hidden_states=[1], **options)
        assert not (tmp_path / "c").exists()

    import datasets

    refused([{"text": "words"}], r"row 0 of the data set holds \['text'\].*tokenize the data set first")
    refused(datasets.Dataset.from_list([{"text": "words"}]), r"holds \['text'\]")
    refused(datasets.Dataset.from_list([{"input_ids": [5]}]).to_iterable_dataset(), "IterableDataset is a stream")
    refused((row for row in rows), "generator is a stream")
    refused([*rows, {"input_ids": texts()[0]}], "row 0 holds input_ids, token_type_ids, row 4 input_ids.")
    refused([{"input_ids": texts()[0]}, *rows], "row 0 holds input_ids, row 1 input_ids, token_type_ids.")
    refused([*rows, {"input_ids": [], "token_type_ids": []}], "row 4 of the data set has no tokens")
    refused(rows, "batch_size=0", batch_size=0)
    fnet = hf.FNetForMaskedLM(hf.FNetConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2)).eval()
    refused([{"input_ids": x} for x in texts()], "takes no attention_mask", model=fnet)


def test_the_columns_of_the_teacher_count_in_its_cache(tmp_path):
    rows = [{"input_ids": x, "token_type_ids": torch.arange(len(x)) % 2} for x in texts()]
    without = [{"input_ids": row["input_ids"]} for row in rows]
    cache = TeacherCache.build(tmp_path / "bert", tiny("bert"), rows, hidden_states=[1])
    with pytest.raises(ValueError, match="are not among the 4 rows"):
        cache.rows_of(without)
    cache = TeacherCache.build(tmp_path / "distilbert", tiny("distilbert"), rows, hidden_states=[1])
    assert cache.rows_of(without) == [0, 1, 2, 3]  # it does not take them
