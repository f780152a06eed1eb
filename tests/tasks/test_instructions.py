"""Instruction data: five shapes, one form; rows as `apply_chat_template` gives them; labels by hand on three templates."""

import csv
import itertools
import json
import logging
import re
import textwrap
from pathlib import Path

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fakit.evaluation.generation import check_references
from fakit.experiments import ExperimentConfig, run_experiment
from fakit.tasks import load_task, task_from
from fakit.tasks.conversations import as_turns
from fakit.tasks.instructions import prompt_ids
from fakit.tasks.task import say
from tests.families import tiny

ROOT = Path(__file__).parents[2]

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You help.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | "
    "trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Qwen 3 writes an empty thought before the last answer alone.
THINKING = CHATML.replace(
    "+ message['content'] +",
    "+ ('<think>\n\n</think>\n\n' if message['role'] == 'assistant' and loop.last else '') + message['content'] +",
)
# bos, eos and what else is one token, by template
SPECIAL = {
    CHATML: ("<|im_start|>", "<|im_end|>", []),
    THINKING: ("<|im_start|>", "<|im_end|>", []),
    LLAMA3: ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    GEMMA: ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    None: ("<s>", "</s>", []),
}
# A conversation of two answers, and how each template writes it; ⟦what has labels⟧
TALK = [("user", "Hi"), ("assistant", "Yes?"), ("user", "1+1"), ("assistant", "It is 2 ☺")]
WRITTEN = {
    CHATML: (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "⟦Yes?<|im_end|>⟧\n<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n⟦It is 2 ☺<|im_end|>⟧\n"
    ),
    LLAMA3: (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n⟦Yes?<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\n1+1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 2 ☺<|eot_id|>⟧"
    ),
    GEMMA: (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟦Yes?<end_of_turn>⟧\n<start_of_turn>user\n"
        "1+1<end_of_turn>\n<start_of_turn>model\n⟦It is 2 ☺<end_of_turn>⟧\n"
    ),
}


def letters(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens of a chat template. Llama and Gemma put their BOS before every text."""
    bos, eos, more = SPECIAL[template]
    names = ["<pad>", bos, eos, *more]
    vocabulary = {token: i for i, token in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if template in (LLAMA3, GEMMA, None):
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<pad>", extra_special_tokens=more
    )
    found.chat_template = template
    return found


def messages(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def task(*rows: dict, **options):
    """The rows as the test split, beside others to train and validate on."""
    first = rows[0]
    swap = {"messages": messages(("user", "a"), ("assistant", "b")), "prompt": "a", "completion": "b"}
    fill = [{name: swap[name] for name in first} for _ in range(2)]
    if "prompt" in first:
        fill = [row | {"prompt": f"a{number}"} for number, row in enumerate(fill)]
    else:
        fill = [{"messages": messages(("user", f"a{n}"), ("assistant", "b"))} for n in range(2)]
    splits = {"train": fill[:1], "validation": fill[1:], "test": list(rows)}
    return task_from({name: Dataset.from_list(part) for name, part in splits.items()}, name="talk", **options)


def marked(row: dict, tokenizer) -> str:
    """A row in words, ⟦labels⟧; where there is one, it is the token itself."""
    text, labeled = [], [label != -100 for label in row["labels"]]
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    assert row["attention_mask"] == [1] * len(labeled)
    edges = [0, *(i for i in range(1, len(labeled)) if labeled[i] != labeled[i - 1]), len(labeled)]
    for start, end in itertools.pairwise(edges):
        words = tokenizer.decode(row["input_ids"][start:end])
        text.append(f"⟦{words}⟧" if labeled[start] else words)
    return "".join(text)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA])
def test_rows_are_what_the_chat_template_gives_and_every_answer_with_its_end_has_labels(template):
    tokenizer = letters(template)
    (row,) = task({"messages": messages(*TALK)}).encode("test", tokenizer, 512)
    assert marked(row, tokenizer) == WRITTEN[template]
    expected = tokenizer.apply_chat_template(messages(*TALK), tokenize=True, return_dict=False)
    assert row["input_ids"] == expected


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA])
def test_all_tokens_have_labels_where_that_is_asked(template):
    tokenizer = letters(template)
    (row,) = task({"messages": messages(*TALK)}, tokens="all").encode("test", tokenizer, 512)
    given = template != CHATML  # nothing precedes a BOS
    assert row["labels"] == [-100] * given + row["input_ids"][given:]


def test_a_template_that_writes_earlier_answers_in_another_way_than_the_last():
    tokenizer = letters(THINKING)
    (row,) = task({"messages": messages(*TALK)}).encode("test", tokenizer, 512)
    written = WRITTEN[CHATML].replace("⟦It is", "⟦<think>\n\n</think>\n\nIt is")
    assert marked(row, tokenizer) == written


def test_a_system_message_and_what_follows_the_last_answer():
    tokenizer = letters(CHATML)
    talk = [("system", "Short."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Bye")]
    (row,) = task({"messages": messages(*talk)}).encode("test", tokenizer, 512)
    assert marked(row, tokenizer) == (
        "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Ho<|im_end|>⟧\n"
    )


def test_without_an_answer_a_row_is_unlabeled_and_ends_where_one_is_asked_for():
    rows = [{"messages": messages(("user", f"q{n}"), ("assistant", "a"))} for n in range(20)]
    rows.append({"messages": messages(("user", "and?"))})
    found = task_from(Dataset.from_list(rows), name="talk")
    tokenizer = letters(GEMMA)
    (row,) = found.encode("pool", tokenizer)
    assert marked(row, tokenizer) == "<bos><start_of_turn>user\nand?<end_of_turn>\n<start_of_turn>model\n"
    assert found.metrics == ("perplexity",) and found.kind == "causal-lm"


def shapes(path, name: str):
    """The same twenty questions in each of the shapes, in a file."""
    rows = [(f"Add {n} and 1.", f"It is {n + 1}.") for n in range(20)]
    talks = {
        "messages": [{"messages": messages(("user", q), ("assistant", a))} for q, a in rows],
        "sharegpt": [
            {"id": "x", "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in rows
        ],
        "completion": [{"prompt": q, "completion": a} for q, a in rows],
        "turns": [{"prompt": messages(("user", q)), "completion": messages(("assistant", a))} for q, a in rows],
        "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in rows],
    }
    file = path / name
    shape, suffix = name.split(".")
    if suffix == "csv":
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, fieldnames=list(talks[shape][0]))
            writer.writeheader()
            writer.writerows(talks[shape])
    elif suffix == "parquet":
        Dataset.from_list(talks[shape]).to_parquet(file)
    elif suffix == "json":
        file.write_text(json.dumps(talks[shape]))
    else:
        file.write_text("\n".join(map(json.dumps, talks[shape])))
    return file


@pytest.mark.parametrize(
    "name",
    [
        "messages.jsonl",
        "messages.parquet",
        "sharegpt.json",
        "completion.jsonl",
        "completion.csv",
        "turns.jsonl",
        "turns.parquet",
        "alpaca.json",
        "alpaca.csv",
    ],
)
def test_every_shape_gives_the_same_rows(tmp_path, name):
    found, tokenizer = load_task(shapes(tmp_path, name)), letters(LLAMA3)
    assert found.kind == "causal-lm"
    assert (len(found.train), len(found.validation), len(found.test)) == (16, 2, 2)
    written = {
        marked(row, tokenizer) for part in ("train", "validation", "test") for row in found.encode(part, tokenizer, 200)
    }
    assert written == {
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nAdd {n} and 1.<|eot_id|><|start_header_id|>"
        f"assistant<|end_header_id|>\n\n⟦It is {n + 1}.<|eot_id|>⟧"
        for n in range(20)
    }


def test_prompt_and_completion_may_be_lists_of_messages_and_answers_in_the_prompt_are_given():
    tokenizer = letters(CHATML)
    rows = [{"prompt": messages(*TALK[:3]), "completion": messages(TALK[3])}, {"prompt": messages(*TALK[:3])}]
    splits = {
        "train": [{"prompt": messages(("user", "a")), "completion": messages(("assistant", "b"))}],
        "validation": [{"prompt": messages(("user", "c")), "completion": messages(("assistant", "b"))}],
        "test": rows[:1],
    }
    found = task_from({name: Dataset.from_list(part) for name, part in splits.items()}, name="talk")
    (row,) = found.encode("test", tokenizer, 512)
    assert marked(row, tokenizer) == WRITTEN[CHATML].replace("⟦Yes?<|im_end|>⟧", "Yes?<|im_end|>")
    # a completion of several turns has all of its answers to learn
    splits["test"] = [{"prompt": messages(TALK[0]), "completion": messages(*TALK[1:])}]
    found = task_from({name: Dataset.from_list(part) for name, part in splits.items()}, name="talk")
    (row,) = found.encode("test", tokenizer, 512)
    assert marked(row, tokenizer) == WRITTEN[CHATML]


def test_content_in_parts_of_text_is_their_text():
    parts = [
        {"role": role, "content": [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]}
        for role, text in TALK
    ]
    tokenizer = letters(GEMMA)
    (row,) = task({"messages": parts}).encode("test", tokenizer, 512)
    assert marked(row, tokenizer) == WRITTEN[GEMMA]


def test_an_input_stands_below_its_instruction():
    rows = [{"instruction": f"Add {n}.", "input": "2 and 3", "output": "5"} for n in range(20)]
    assert set(task_from(Dataset.from_list(rows), name="sums").train["text"]) <= {
        f"Add {n}.\n\n2 and 3" for n in range(20)
    }


def test_text_alone_is_plain_text(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": f"line {n}"}) for n in range(20)))
    found = load_task(tmp_path / "t.jsonl")
    assert found.kind == "causal-lm" and found.train.column_names == ["text"]
    with pytest.raises(ValueError, match=r"template and tokens are for instruction data .*; its columns are text"):
        load_task(tmp_path / "t.jsonl", tokens="all")


def test_columns_that_were_named_or_known_before_are_read_as_before():
    rows = Dataset.from_list(
        [{"prompt": f"q{n}", "completion": "a", "text": f"t{n}", "label": n % 2} for n in range(40)]
    )
    assert task_from(rows, name="x").kind == "sequence-classification"
    assert task_from(rows, name="x", kind="causal-lm").train.column_names == ["text"]
    pairs = task_from(rows.remove_columns("label"), name="x", source_text="prompt", target_text="completion")
    assert pairs.train.column_names == ["source", "target"]


@pytest.mark.parametrize(
    ("template", "prompt", "answer", "written"),
    [
        ("none", "Q: 1+1\nA:", " 2", "<s>Q: 1+1\nA:⟦ 2</s>⟧"),
        ("none", "1+1", "2", "<s>1+1\n⟦2</s>⟧"),
        ("auto", "1+1", "2", "<s>1+1\n⟦2</s>⟧"),  # there is no chat template
        ("Q: {prompt}\nA: ", "1+1", "2", "<s>Q: 1+1\nA: ⟦2</s>⟧"),
    ],
)
def test_without_a_chat_template_the_row_has_the_tokenizers_own_begin_and_end(template, prompt, answer, written):
    tokenizer = letters(None)
    (row,) = task({"prompt": prompt, "completion": answer}, template=template).encode("test", tokenizer)
    assert marked(row, tokenizer) == written
    (row,) = task({"prompt": prompt, "completion": answer}, template=template, tokens="all").encode("test", tokenizer)
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_a_chat_template_is_left_out_where_none_is_asked_for():
    tokenizer = letters(CHATML)
    (row,) = task({"prompt": "1+1", "completion": "2"}, template="none").encode("test", tokenizer)
    assert marked(row, tokenizer) == "1+1\n⟦2<|im_end|>⟧"


def test_a_row_that_is_too_long_is_cut_from_the_prompts_side():
    tokenizer, talk = letters(LLAMA3), task({"messages": messages(*TALK)})
    (whole,) = talk.encode("test", tokenizer, 512)
    size = len(whole["input_ids"])
    for length in range(size - 1, 0, -1):
        try:
            (row,) = talk.encode("test", tokenizer, length)
        except ValueError as error:
            assert f"no answer of its 1 rows fits into max_length={length}" in str(error)
            break
        assert row["input_ids"] == whole["input_ids"][:1] + whole["input_ids"][1 + size - length :]
        written = marked(row, tokenizer)
        assert written.startswith("<|begin_of_text|>") and written.endswith("⟦It is 2 ☺<|eot_id|>⟧")
        # half an answer is context, and so is one that nothing precedes
        assert ("⟦Yes?<|eot_id|>⟧" in written) == ("\nYes?<|eot_id|>" in written.replace("⟦", ""))
        assert written.count("⟦") == 1 + ("⟦Yes?" in written)
    assert length == len("It is 2 ☺".encode()) + 2  # the answer, its end and the BOS leave no token of the prompt


def test_rows_whose_answer_does_not_fit_are_left_out_or_all_are_refused(caplog):
    say.cache_clear()
    rows = [{"prompt": "short", "completion": "one"}, {"prompt": "long", "completion": "o" * 40}]
    rows.append({"prompt": "q" * 40, "completion": "two"})
    with caplog.at_level(logging.WARNING):
        found = task(*rows).encode("test", letters(None), 20)
    assert [marked(row, letters(None)) for row in found] == ["<s>short\n⟦one</s>⟧", f"<s>{'q' * 14}\n⟦two</s>⟧"]
    (said,) = [record.getMessage() for record in caplog.records if "rows read" in record.getMessage()]
    assert said == (
        "talk, test: 3 rows read, 2 kept, 1 of them cut from the prompt's side to max_length=20, 1 left out, whose answer "
        "does not fit into max_length=20; 23 tokens of prompts and 8 of answers, labels on the answers'; without a chat "
        f"template. As the model sees them, labels in ⟦ ⟧:\n  row 1: <s>short\\n⟦one</s>⟧\n  row 2: <s>{'q' * 14}\\n"
        "⟦two</s>⟧"
    )
    with pytest.raises(ValueError, match=r"talk, test: row 2 \('long'\) has 47 tokens, 41 of them .* max_length=20"):
        task(*rows, too_long="refuse").encode("test", letters(None), 20)


@pytest.mark.parametrize(
    ("rows", "template", "said"),
    [
        ([("system", "S"), ("user", "q"), ("assistant", "a")], GEMMA, r"row 1 \('S'\): .*System role not supported"),
        (
            TALK,
            None,
            r"row 1 \('Hi'\): before its last answer it has turns of user, assistant, user, which take a chat",
        ),
    ],
)
def test_what_a_template_cannot_write_is_refused_with_its_row(rows, template, said):
    with pytest.raises(ValueError, match=said):
        task({"messages": messages(*rows)}).encode("test", letters(template), 512)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"messages": [{"role": "user", "content": None}]}], "row 1: message 1 .user. holds None where its text"),
        ([{"messages": [{"name": "user", "content": "x"}]}], "row 1: message 1 has no role .it has name, content"),
        ([{"prompt": ["x"], "completion": "y"}], "row 1: message 1 is 'x', not a mapping of role and content"),
        ([{"prompt": {"x": "y"}, "completion": "y"}], "row 1: prompt holds .* not a text"),
        (
            [{"prompt": "x", "completion": messages(("user", "a"), ("tool", "b"))}],
            "row 1: completion has turns of user, tool and none of assistant",
        ),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}],
            r"row 1: message 1 .user. holds \[{'type': 'image', 'url': 'x'}\] where its text",
        ),
    ],
)
def test_rows_that_are_none_are_refused(rows, said):
    with pytest.raises(ValueError, match=f"talk: train, {said}"):
        task_from(Dataset.from_list(rows), name="talk")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"template": "Q: "}, "holds {prompt} 0 times"),
        ({"tokens": "answers"}, "tokens='answers' is not known; choose 'completion' or 'all'"),
        ({"too_long": "pieces"}, "too_long='pieces' is not known of instruction data; choose 'cut' or 'refuse'"),
    ],
)
def test_unknown_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        task({"prompt": "a", "completion": "b"}, **options)


@pytest.mark.slow  # a run each
@pytest.mark.parametrize("name", ["messages.jsonl", "sharegpt.json", "completion.csv", "alpaca.json"])
def test_the_configuration_of_the_page_distills_from_each_shape(tmp_path, name):
    page = (ROOT / "docs/instruction_data.md").read_text()
    block = re.search(r"\n((?:    .*\n)+)", page)[1]
    (tmp_path / "run.yaml").write_text(textwrap.dedent(block))
    written = ExperimentConfig.from_yaml(tmp_path / "run.yaml")
    assert written.task.options == {"template": "auto", "tokens": "completion", "too_long": "cut"}
    tokenizer = letters(CHATML)
    tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    config = written.replace(
        **{"task.name": str(shapes(tmp_path, name)), "teacher.id": str(tmp_path / "teacher"), "student.layers": 2},
        **{"training.steps": 2, "training.log_every": 1, "training.bf16": False},
        device="cpu",
    )
    result = run_experiment(config, progress=False, count_flops=False)
    assert (result.metric, result.steps) == ("perplexity", 2)
    assert {"features", "outputs", "task"} <= result.history[0].keys()


def words(*known: str, spoken: str = "byte") -> PreTrainedTokenizerFast:
    """A tokenizer that makes one token of a blank and the word behind it: byte-level, or by Metaspace."""
    blank = "Ġ" if spoken == "byte" else "▁"
    parts = pre_tokenizers.ByteLevel.alphabet() if spoken == "byte" else [blank, *map(chr, range(33, 127)), "\n", "é"]
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *sorted(set(parts))])}
    merges = []
    for word in known:
        token = blank
        for letter in word:
            merges.append((token, letter))
            token += letter
            vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=list(dict.fromkeys(merges))))
    if spoken == "byte":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("spoken", ["byte", "metaspace"])
@pytest.mark.parametrize("answer", ["Paris", "Paris is it", "Nice", "é"])
def test_a_token_of_a_blank_and_a_word_is_the_answers_first(spoken, answer):
    """Behind a template that ends with a blank; the prompt alone ends where the row's labels begin."""
    tokenizer, template = words("Paris", "is", "a", spoken=spoken), "Q: {prompt}\nA: "
    (row,) = task({"prompt": "1+1", "completion": answer}, template=template).encode("test", tokenizer)
    first = next(place for place, label in enumerate(row["labels"]) if label != -100)
    assert tokenizer.decode(row["input_ids"][first:]).strip() == f"{answer}</s>"
    if answer.startswith("Paris"):
        assert prompt_ids("1+1", tokenizer, template) == row["input_ids"][:first]
        assert tokenizer.decode(row["input_ids"][:first]).endswith("A:")


@pytest.mark.parametrize("name", ["gpt", "GPT", "chatgpt", "model", "Assistant", "assistant", "bing"])
def test_who_answers_has_many_names(name):
    rows = Dataset.from_list([{"conversations": [{"from": "Human", "value": "q"}, {"from": name, "value": "a"}]}])
    (row,) = as_turns(rows, "conversations", "talk")
    assert row["answer"] == "a" and row["turns"] == [{"role": "user", "content": "q"}]


def test_what_nobody_knows_as_an_answer_is_refused():
    rows = Dataset.from_list([{"conversations": [{"from": "human", "value": "q"}, {"from": "llama", "value": "a"}]}])
    with pytest.raises(ValueError, match="row 1: message 2 is from 'llama', and nobody knows whether"):
        as_turns(rows, "conversations", "talk")


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}),
        ("completion", {"prompt": "q", "completion": "a"}),
        ("conversations", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
    ],
)
def test_a_column_of_systems_is_read_and_others_are_named(shape, row, caplog):
    rows = Dataset.from_list([row | {"system": "Be brief.", "history": ["x"]}, row | {"system": "", "history": []}])
    with caplog.at_level("WARNING"):
        first, second = as_turns(rows, shape, "talk")
    asked = {"role": "user", "content": "q"}
    assert first["turns"] == [{"role": "system", "content": "Be brief."}, asked] and second["turns"] == [asked]
    assert "not read, and so not seen by the models: history (1 rows)" in caplog.text


def test_empty_messages_and_answers_without_weight():
    def read(*turns: dict) -> dict:
        return as_turns(Dataset.from_list([{"messages": list(turns)}]), "messages", "talk")[0]

    system, asked = {"role": "system", "content": ""}, {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    assert read(system, asked, answer)["turns"] == [asked]
    assert read(asked, {"role": "assistant", "content": ""}) == {"text": "q", "turns": [asked], "answer": None}
    kept = read(asked, answer | {"weight": 0.0}, asked | {"weight": None}, {**answer, "content": "b", "weight": 1.0})
    assert kept["answer"] == "b" and [turn.get("given") for turn in kept["turns"]] == [None, True, None]
    assert read(asked, answer | {"weight": 0})["answer"] is None


def test_a_conversation_that_begins_with_an_answer_is_refused_in_words():
    rows = task({"messages": messages(("assistant", "Hi"), ("user", "q"), ("assistant", "a"))})
    with pytest.raises(ValueError, match="it begins with an answer, 'Hi', and nothing was asked before it"):
        rows.encode("test", letters(CHATML))


def test_a_turn_may_end_with_another_token_than_the_text():
    """Llama 3 instruct models, whose tokenizer's eos is <|end_of_text|>: nothing was cut."""
    tokenizer = letters(LLAMA3)
    tokenizer.add_special_tokens({"eos_token": "<|end_of_text|>"})
    rows = task({"messages": messages(*TALK)}).encode("test", tokenizer, 512).to_list()
    check_references(rows, tokenizer)
    cut = [{"input_ids": [1, 20, 21], "labels": [-100, 20, 21]}]
    with pytest.raises(ValueError, match="1 of 1 targets do not end with the eos token"):
        check_references(cut, tokenizer)
