"""A teacher's log-probabilities from files: read as they stand, checked against the rows, distilled from as from a
cache that was built.

answers/vllm_completion.json is written by hand in the shape that vLLM's code gives its answers.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig

from fakit import LayerMap, Objective, Outputs, Task, TeacherCache, capture
from fakit.training.teacher_cache import completion_request, import_published, published_rows
from fakit.training.teacher_cache.packing import pack_known
from fakit.training.teacher_cache.published import _of_server, read_answers
from tests.families import VOCAB, tokenizer
from tests.training.runs import logged, weights
from tests.training.test_teacher_cache_top_k import rows, run, teacher

ANSWERS = Path(__file__).parent / "answers" / "vllm_completion.json"
RECORDED = [{"input_ids": [5, 31, 9, 12]}, {"input_ids": [4, 7]}]
K = 6


def objective(temperature: float = 1.0) -> Objective:
    return Objective(LayerMap.none(), outputs=Outputs("forward_kl", temperature), task=Task(weight=0.5))


def log_probabilities(live, row: dict) -> torch.Tensor:
    with torch.no_grad():
        return capture(live, {"input_ids": torch.tensor([row["input_ids"]])}).logits[0].log_softmax(-1)  # (n, V)


def as_vllm(live, row: dict, k: int = K, say_ids: bool = True) -> dict:
    """What a server would answer: the text's own token first, then the k likeliest."""
    ids, places = row["input_ids"], [None]
    for token, log_p in zip(ids[1:], log_probabilities(live, row), strict=False):
        rank = int((log_p > log_p[token]).sum()) + 1
        entries = {token: rank} | {int(t): r for r, t in enumerate(log_p.topk(k).indices, 1)}
        places.append(
            {str(t): {"logprob": log_p[t].item(), "rank": r, "decoded_token": f"w{t}"} for t, r in entries.items()}
        )
    said = {"prompt_token_ids": ids} if say_ids else {}
    return {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": places} | said


def written(folder, answers: list[dict], name: str = "answers.jsonl") -> list[Path]:
    (folder / name).write_text("\n".join(map(json.dumps, answers)))
    return [folder / name]


def completions(live, dataset, **how) -> list[dict]:
    return [{"object": "text_completion", "choices": [as_vllm(live, row, **how)]} for row in dataset]


def as_columns(live, row: dict, last: bool) -> dict:
    values, indices = log_probabilities(live, row)[: None if last else -1].topk(K)
    return {"input_ids": row["input_ids"], "top_ids": indices.tolist(), "top_logprobs": values.tolist()}


def imported(folder, files, dataset=None, **how) -> TeacherCache:
    how = {"config": teacher().config, "dtype": "float32"} | how
    return import_published(folder / "imported", files, rows() if dataset is None else dataset, **how)


# -- what is read -----------------------------------------------------------------------------------------------------


def test_an_answer_of_a_server_by_hand(tmp_path):
    cache = imported(tmp_path, [ANSWERS], RECORDED, shard_rows=1)
    assert (len(cache), cache.content.top_k, cache.manifest["classes"]) == (2, 3, VOCAB)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    top, known = (trace := cache.trace([0, 1], mask)).top_k, trace.logits_known
    assert known.tolist() == [[True, True, True, False], [True, False, False, False]]
    # logits at token t are of token t + 1
    assert top.indices[0, :3].tolist() == [[12, 40, 7], [9, 12, 3], [31, 12, 44]]
    torch.testing.assert_close(top.values[0, 0].exp(), torch.tensor([0.4, 0.2, 0.1]))
    torch.testing.assert_close(top.rest_at(1.0)[0, :3].exp(), torch.tensor([0.3, 0.25, 0.16]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(top.values[1, 0].exp(), torch.tensor([0.7, 0.15, 0.05]))
    assert top.values[0, 1, 2] == -9999


SHAPES = {
    "completions": completions,
    "completions without ids": lambda live, dataset: completions(live, dataset, say_ids=False),
    "one answer to many prompts": lambda live, dataset: [
        {"choices": [as_vllm(live, row) | {"index": i} for i, row in enumerate(dataset)][::-1]}
    ],
    "chat": lambda live, dataset: [
        {"choices": [{"index": 0, "message": {}}]}
        | {name: as_vllm(live, row)[name] for name in ("prompt_logprobs", "prompt_token_ids")}
        for row in dataset
    ],
    "batch file": lambda live, dataset: [
        {"custom_id": f"{i}", "response": {"status_code": 200, "body": body}, "error": None}
        for i, body in enumerate(completions(live, dataset))
    ],
    "columns of n": lambda live, dataset: [as_columns(live, row, last=True) for row in dataset],
    "columns of n - 1": lambda live, dataset: [as_columns(live, row, last=False) for row in dataset],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_holds_what_a_cache_that_was_built_holds(shape, tmp_path):
    live, dataset = teacher(), rows()
    how = {"top_k": K, "dtype": "float32", "tokens": "labeled"}
    built = TeacherCache.build(tmp_path / "built", live, dataset, objective(), **how)
    files = written(tmp_path, SHAPES[shape](live, dataset))
    same(imported(tmp_path, files, shard_rows=5), built)


def test_parquet_and_json_arrays(tmp_path):
    live, dataset = teacher(), rows()
    columns = [as_columns(live, row, last=False) for row in dataset]
    Dataset.from_list(columns[:10]).to_parquet(str(tmp_path / "first.parquet"))
    (tmp_path / "second.json").write_text(json.dumps(columns[10:]))
    how = {"top_k": K, "dtype": "float32", "tokens": "labeled"}
    built = TeacherCache.build(tmp_path / "built", live, dataset, objective(), **how)
    same(imported(tmp_path, [tmp_path / "first.parquet", tmp_path / "second.json"]), built)


def same(found: TeacherCache, built: TeacherCache) -> None:
    assert len(found) == len(built) and found.hashes() == built.hashes()
    for row in range(len(built)):
        mask = torch.ones(1, len(rows()[row]["input_ids"]))
        ours, theirs = (cache.trace([row], mask) for cache in (found, built))
        at = theirs.logits_known
        assert torch.equal(ours.logits_known, at) and torch.equal(ours.top_k.indices[at], theirs.top_k.indices[at])
        torch.testing.assert_close(ours.top_k.values[at], theirs.top_k.values[at], rtol=1e-5, atol=2e-5)
        rests = [cache.top_k.rest_at(1.0)[at].exp() for cache in (ours, theirs)]
        torch.testing.assert_close(*rests, rtol=1e-4, atol=1e-6)


# -- distillation from it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [("float32", 2e-5), ("float16", 2e-3)])
def test_distilling_from_a_servers_answers_is_distilling_from_a_cache(dtype, error, tmp_path):
    live = teacher()
    how = {"top_k": K, "dtype": "float32", "tokens": "labeled"}
    built = TeacherCache.build(tmp_path / "built", live, rows(), objective(), **how)
    found = imported(tmp_path, written(tmp_path, completions(live, rows())), dtype=dtype)
    ours, theirs = (run(tmp_path, objective(), cache, num_train_epochs=2) for cache in (found, built))
    assert logged(ours) == pytest.approx(logged(theirs), rel=error)
    for name, p in weights(theirs).items():
        assert torch.allclose(weights(ours)[name], p, atol=error / 5), name


def test_all_of_the_vocabulary_from_a_server_is_the_live_teacher(tmp_path):
    live = teacher()
    found = imported(tmp_path, written(tmp_path, completions(live, rows(), k=VOCAB)))
    ours, theirs = (run(tmp_path, objective(2.0), cache) for cache in (found, None))
    assert logged(ours) == pytest.approx(logged(theirs), rel=1e-4)


def test_a_published_set_is_its_own_data_set_and_serves_a_build_that_asks_the_same(tmp_path):
    live = teacher()
    files = written(tmp_path, [as_columns(live, row, last=False) for row in rows()])
    texts = published_rows(files)
    assert [row["input_ids"] for row in texts] == [row["input_ids"] for row in rows()] and texts[0]["labels"]
    found = imported(tmp_path, files, texts)
    how = {"top_k": K, "dtype": "float32", "tokens": "labeled"}
    assert TeacherCache.build(found.folder, live, texts[3:9], objective(), **how).manifest == found.manifest
    assert logged(run(tmp_path, objective(), found, train=texts, made=live))
    with pytest.raises(ValueError, match=r"the mass of the rest at temperature 2\.0"):
        run(tmp_path, objective(2.0), found, train=texts)


def test_what_is_asked_of_a_server():
    asked = completion_request({"input_ids": [5, 7, 0], "attention_mask": [1, 1, 0]}, "teacher", 20)
    assert asked["prompt"] == [5, 7] and asked["prompt_logprobs"] == 20 and asked["return_token_ids"]


def test_its_size_is_said(tmp_path, caplog):
    cache = imported(tmp_path, written(tmp_path, completions(teacher(), rows())), shard_rows=7)
    assert f"will take {cache.bytes:,} bytes in 3 files" in caplog.text


# -- refusals, before anything is written -----------------------------------------------------------------------------


def changed(place: int, change) -> list[dict]:
    """The server's answers, one of them changed."""
    answers = completions(teacher(), rows())
    change(answers[place]["choices"][0])
    return answers


def other_token(choice):
    choice["prompt_token_ids"][2] = 49 if choice["prompt_token_ids"][2] != 49 else 48


def own_token_out(choice):
    """Without ids: in place of the own token beside the likeliest stands another."""
    del choice["prompt_token_ids"]
    place = next(i for i, entries in enumerate(choice["prompt_logprobs"]) if entries and len(entries) > K)
    own = next(token for token, entry in choice["prompt_logprobs"][place].items() if entry["rank"] > K)
    other = next(str(t) for t in range(VOCAB) if str(t) not in choice["prompt_logprobs"][place])
    choice["prompt_logprobs"][place][other] = choice["prompt_logprobs"][place].pop(own)


def fewer(choice):
    own = str(choice["prompt_token_ids"][1])
    entries = choice["prompt_logprobs"][1]
    choice["prompt_logprobs"][1] = {t: e for t, e in entries.items() if e["rank"] < K or t == own}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_token, r"number 4 is not of row 3: at position 2 the row's token is \d+ \('.*'\), the file's 4\d"),
        (own_token_out, r"number 4 is not of row 3: at position \d the row's token is \d+ .* and the file's is \d+"),
        (lambda c: c["prompt_logprobs"].pop() and c["prompt_token_ids"].pop(), "has 6 tokens, and row 3 has 7"),
        (lambda c: c.update(prompt_logprobs=None), "number 4 has no prompt_logprobs of a whole text"),
        (lambda c: c["prompt_logprobs"].__setitem__(3, None), "number 4 has no prompt_logprobs of a whole text"),
        (lambda c: [e.update(logprob=1.5) for e in c["prompt_logprobs"][2].values()], r"position 2: \[1.5, .* no natural"),
        (lambda c: c["prompt_logprobs"][1].update({"99": {"logprob": -0.9, "rank": 1}}) or
            c["prompt_logprobs"].__setitem__(1, {**{"99": {"logprob": -0.9, "rank": 1}},
            **{t: e for t, e in c["prompt_logprobs"][1].items() if e["rank"] > 1}}), "holds the token 99, .* has 50"),
    ],
)  # fmt: skip
def test_answers_that_are_not_of_the_rows_are_refused_by_row_and_position(change, message, tmp_path):
    files = written(tmp_path, changed(3, change))
    with pytest.raises(ValueError, match=message):
        imported(tmp_path, files, tokenizer=tokenizer(" ".join(f"w{i}" for i in range(VOCAB))))
    assert not (tmp_path / "imported").exists()


def test_fewer_than_are_asked_for(tmp_path):
    files = written(tmp_path, changed(3, fewer))
    with pytest.raises(ValueError, match="number 4, position 1, holds the 5 likeliest tokens, and top_k=6 were asked"):
        imported(tmp_path, files, top_k=K)
    assert imported(tmp_path, files).content.top_k == K - 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"error": {"message": "too long"}}, "is an error of the server: .*too long"),
        ({"response": {"status_code": 500, "body": None}, "error": {"message": "boom"}}, "is an error of the server"),
        ({"input_ids": [1, 2], "compressed_logprobs": [], "bytepacked_indices": []}, "DistillKit's compressed logits"),
        ({"text": "a"}, "holds text; expected prompt_logprobs"),
        ({"input_ids": [1, 2], "top_ids": [[1], [2, 3]], "top_logprobs": [[-1], [-1, -2]]}, "lists of k numbers a token"),
        ({"input_ids": [1, 2], "top_ids": [[1]] * 3, "top_logprobs": [[-1.0]] * 3}, r"expected \(n, k\) or \(n - 1, k\)"),
        ({"input_ids": [1, 2], "top_ids": [[4, 4]], "top_logprobs": [[-1.0, -1.0]]}, "of different tokens"),
        ([1], "is .* not an object"),
    ],
)  # fmt: skip
def test_files_that_are_of_neither_kind(answer, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        list(read_answers(written(tmp_path, [answer])))


def test_the_rest_of_what_does_not_fit(tmp_path):
    files = written(tmp_path, completions(teacher(), rows()))
    with pytest.raises(ValueError, match=r"18 answers in answers\.jsonl, and 17 rows"):
        imported(tmp_path, files, rows()[:17])
    with pytest.raises(ValueError, match="number 1 is not of row 0: at position 0"):
        imported(tmp_path, files, rows()[::-1])
    with pytest.raises(ValueError, match=r"no file .*missing"):
        imported(tmp_path, [tmp_path / "missing.jsonl"])
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        imported(tmp_path, [tmp_path / "broken.jsonl"])
    with pytest.raises(ValueError, match=r"holds the token \d+, .* has 8"):
        imported(tmp_path, files, config=BertConfig(vocab_size=8))
    with pytest.raises(ValueError, match="does not say its token ids"):
        published_rows([ANSWERS])
    packed = [row | {"position_ids": list(range(len(row["input_ids"])))} for row in rows()]
    with pytest.raises(ValueError, match="row 0 has position_ids"):
        imported(tmp_path, files, packed)
    assert not (tmp_path / "imported").exists()
    imported(tmp_path, files)
    with pytest.raises(ValueError, match="holds a cache already"):
        imported(tmp_path, files)


@pytest.mark.parametrize("digits", [None, 2, 1])
def test_a_rest_that_rounding_ate_is_small_and_no_zero(digits):
    """Confident teachers: the k largest sum to 1 or more as they are rounded, and a reverse KL divides by the rest."""
    torch.manual_seed(0)
    logits = torch.randn(64, 300).double()
    logits[:, 7] += 16
    values, indices = logits.log_softmax(-1).float().topk(20)
    values = values.double() if digits is None else torch.round(values.double(), decimals=digits)
    rest = pack_known(values, indices, 300, "float32")[".rest"].squeeze(-1)
    assert torch.isfinite(rest).all() and (rest <= 0).all()
    if digits is None:
        exact = logits.log_softmax(-1).exp().scatter(-1, indices, 0.0).sum(-1)
        assert ((rest.exp() - exact).abs() <= 3 * torch.finfo(torch.float32).eps).all()


def test_a_rest_that_is_there_is_as_before():
    values = torch.tensor([[0.5, 0.3]]).double().log()
    assert pack_known(values, torch.tensor([[0, 1]]), 10, "float32")[".rest"].item() == pytest.approx(math.log(0.2))


@pytest.mark.parametrize(
    "place", [[0.5, 0.5], None, {"5": None}, {"5": -0.5}, {"5": {"rank": 1}}, {"x": {"logprob": -1.0}}]
)
def test_a_place_that_is_no_mapping_of_log_probabilities_is_named(place):
    good = {"5": {"logprob": -0.5, "rank": 1}}
    with pytest.raises(
        ValueError, match=r"answer 1(, position 2, holds .* expected a mapping of token id| has no prompt_log)"
    ):
        _of_server([None, good, place, good], [1, 5, 5, 5], "answer 1", 1)
