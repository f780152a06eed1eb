"""`fakit generate`: what a saved language model answers, as transformers' own generate has it."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fakit.__main__ import main
from fakit.compression import low_rank
from fakit.experiments import written
from fakit.experiments.written import load, read_prompts, write
from fakit.models.shrink import shrink
from tests.families import tiny

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}>{{ m.content }}={% endfor %}{% if add_generation_prompt %}a>{% endif %}"
)


@pytest.fixture
def model(world):
    return AutoModelForCausalLM.from_pretrained(world / "causal", trust_remote_code=False).eval()


@pytest.fixture
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "causal", trust_remote_code=False)


def _alone(model, ids: list[int], new: int, **ways) -> list[int]:
    given = torch.tensor([ids])
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": 4, "pad_token_id": 0, **ways}
    return model.generate(given, attention_mask=torch.ones_like(given), **options)[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("template", "chat", "seen"),
    [
        ("none", TEMPLATE, "a cat"),
        ("auto", None, "a cat"),
        ("auto", TEMPLATE, "u>a cat=a>"),
        (">{prompt}=", TEMPLATE, ">a cat="),
    ],
)
def test_the_prompt_is_as_asked_and_the_text_what_the_model_writes(model, tokenizer, template, chat, seen):
    tokenizer.chat_template = chat
    first, second = write(model, tokenizer, ["a cat", "mm"], template=template, max_new_tokens=9)
    assert (first.prompt, first.seen) == ("a cat", seen)
    ids = tokenizer(seen, add_special_tokens=False).input_ids
    expected = _alone(model, ids, 9)
    assert first.ended == (expected[-1] == 4) and first.tokens == len(expected) - first.ended
    assert first.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert write(model, tokenizer, ["mm"], template=template, max_new_tokens=9) == [second]


def test_samples_follow_the_seed_and_leave_the_random_state(model, tokenizer):
    def sample(seed: int, **ways) -> list[str]:
        given = {"temperature": 1.0, "max_new_tokens": 20, "seed": seed, **ways}
        return [one.text for one in write(model, tokenizer, ["a cat", "a cat"], **given)]

    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = sample(3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == sample(3) and first[0] != first[1] and first != sample(4)
    assert sample(3, top_p=1e-6) == [write(model, tokenizer, ["a cat"], max_new_tokens=20)[0].text] * 2  # the likeliest


def test_what_ends_a_text_is_no_part_of_it(model, tokenizer):
    """Whatever the model likes best ends it, once its configuration says so."""
    ids = tokenizer("a cat", add_special_tokens=False).input_ids
    model.generation_config.eos_token_id = _alone(model, ids, 1)
    (found,) = write(model, tokenizer, ["a cat"], template="none", max_new_tokens=5)
    assert (found.text, found.tokens, found.ended) == ("", 0, True)


def test_the_command_prints_both_models_and_writes_them(world, model, tokenizer, tmp_path, capsys):
    student = tmp_path / "student"
    shrink(model, 1).save_pretrained(student)
    tokenizer.save_pretrained(student)
    (tmp_path / "more.txt").write_text("mm\n\n")
    given = ["--file", str(tmp_path / "more.txt"), "--out", str(tmp_path / "out.jsonl"), "--max-new-tokens", "6"]
    assert main(["generate", str(student), "a cat", *given, "--beside", str(world / "causal")]) == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a cat", "mm"]
    for row in rows:
        expected = write(model, tokenizer, [row["prompt"]], max_new_tokens=6)[0]
        assert row["beside"] == {"text": expected.text, "tokens": expected.tokens, "ended": expected.ended}
        assert f"> {row['prompt']}\nstudent: {row['text']}" in said and f"causal: {expected.text}" in said
        assert row["ended"] or "[cut after 6 tokens]" in said


def test_pairs_of_low_rank_are_read(model, tokenizer, tmp_path):
    smaller = low_rank.compress(model, plan=low_rank.plan(model, 0.9, "uniform", lowest=0.0))
    low_rank.save(smaller, tmp_path, tokenizer)
    found, own = load(tmp_path)
    assert write(found, own, ["a cat"], max_new_tokens=5) == write(smaller, tokenizer, ["a cat"], max_new_tokens=5)


def test_prompts_come_from_lines_and_from_rows(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo three\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "four", "n": 1}\n\n')
    assert read_prompts(["zero"], tmp_path / "p.txt") == ["zero", "one", "two three"]
    assert read_prompts([], tmp_path / "p.jsonl") == ["four"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompts": []}, "prompts: found []"),
        ({"prompts": ["a", " "]}, "expected at least one text that is not empty"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, expected a whole number, at least 1"),
        ({"max_new_tokens": 159}, "the longest prompt has 5 tokens and 159 new ones were asked of a model with 160"),
        (
            {"temperature": 0.0},
            "temperature: found 0.0, expected a number from 1e-06 to 1e.06; leave it out to be greedy",
        ),
        ({"top_p": 1.5}, "top_p: found 1.5"),
        ({"seed": -1}, "seed: found -1"),
        ({"template": "chat"}, "template='chat' is neither"),
    ],
)
def test_what_cannot_be_written_is_refused(model, tokenizer, given, said, monkeypatch):
    monkeypatch.setattr(type(model), "forward", None)  # before any work
    with pytest.raises(ValueError, match=said.replace("[", r"\[").replace("]", r"\]")):
        write(model, tokenizer, **{"prompts": ["a cat"], **given})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["causal"], "there is no prompt"),
        (["teacher", "a cat"], "causal"),
        (["causal", "--file", "none.txt"], "there is no such file of prompts"),
        (["causal", "--file", "broken.jsonl"], "row 2: has no text under"),
    ],
)
def test_commands_that_cannot_be_are_one_sentence(world, tmp_path, capsys, arguments, said):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    places = {name: str(world / name) for name in ("causal", "teacher")}
    places |= {name: str(tmp_path / name) for name in ("none.txt", "broken.jsonl")}
    assert main(["generate", *(places.get(word, word) for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_prompts_are_read_as_tasks_read_files(tmp_path):
    said = ["the\u2028quick", "brown \x0b fox"]
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in said]
    texts = {
        "a.jsonl": "\n".join(rows) + "\n",
        "b.JSONL": "\ufeff" + "\n".join(rows),
        "c.json": f"[{','.join(rows)}]",
        "d.txt": "\ufeff" + "\r\n".join(said) + "\n\n",
        "e.csv": "prompt\n" + "\n".join(f'"{prompt}"' for prompt in said),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert read_prompts([], tmp_path / name) == said, name
    (tmp_path / "f.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(ValueError, match=r"f.txt cannot be read as text: line 1 is not UTF-8"):
        read_prompts([], tmp_path / "f.txt")
    (tmp_path / "g.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match='has no column "prompt"; it has text'):
        read_prompts([], tmp_path / "g.jsonl")


@pytest.mark.parametrize("out", ["nope/o.jsonl", "."])
def test_where_answers_go_is_asked_before_they_are_written(tmp_path, monkeypatch, out):
    monkeypatch.setattr(written, "load", lambda model: pytest.fail("loaded before it was asked"))
    with pytest.raises(ValueError, match="name a file that the answers can be written to"):
        written.answers("model", ["x"], out=tmp_path / out)


@pytest.mark.parametrize(
    ("ways", "words"),
    [
        ({"temperature": 1e-40}, "temperature: found 1e-40, expected a number from 1e-06 to 1e"),
        ({"temperature": math.nan}, "temperature: found nan"),
        ({"temperature": 1.0, "seed": 99999999999999999999}, "seed: found 99999999999999999999, and torch counts to"),
        ({"max_new_tokens": 500}, "new ones were asked of a model with 64 positions"),
    ],
)
def test_ways_that_cannot_be_are_refused(tokenizer, ways, words):
    """Of a rotary model, too, which has positions without a table of them."""
    with pytest.raises(ValueError, match=words):
        write(tiny("llama", max_position_embeddings=64), tokenizer, ["a cat"], template="none", **ways)
