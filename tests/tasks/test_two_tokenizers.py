"""The same texts in the tokens of two tokenizers: what stands for what, by hand on short texts."""

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fakit.models.load import load_tokenizer
from fakit.tasks import task_from
from fakit.tasks.embedded import MINILM
from fakit.tasks.progress import NOWHERE, WHOLE, progress
from fakit.tasks.scans import scan_tokenizer
from fakit.tasks.two_tokenizers import COLUMNS, both_collator, differ, encode_both, shared_tokens, untrimmed
from tests.tasks.test_instructions import CHATML, GEMMA, LLAMA3, SPECIAL, THINKING, letters, messages, task

WORDS = ["the cat sat on the mat", " It is 12 😀 café naïve", "one two three", "The cat  sits\n\n  here."]


def words(template: str | None = None, trim: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of whole words, as GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bos, eos, more = SPECIAL[template] if template else ("<start>", "<end>", [])
    special = ["<pad>", bos, eos, *more]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(WORDS * 3, trainer)
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=bos, eos_token=eos, pad_token="<pad>")
    found.chat_template = template
    return found


def read(row: dict, ours, theirs, how: str) -> list[tuple[str, str]]:
    """What each side has read of the answer where one stands for the other, byte by byte where it is no text yet."""
    start = next(place for place, label in enumerate(row["labels"]) if label != -100)
    their_start = next(place for place, label in enumerate(row["teacher_labels"]) if label != -100)
    return [
        (
            ours.decode(row["input_ids"][start : place + 1]),
            theirs.decode(row["teacher_input_ids"][their_start : at + 1]),
        )
        for place, at in enumerate(row[f"same_{how}"])
        if at != NOWHERE
    ]


def answered(answer: str, ours, theirs, **options) -> dict:
    (row,) = encode_both(
        task({"messages": messages(("user", "Hi"), ("assistant", answer))}, **options), "test", ours, theirs, 128
    ).to_list()
    return row


def test_positions_that_have_read_the_same_text_by_hand():
    ours, theirs = letters(LLAMA3), words(CHATML)
    row = answered("the cat", ours, theirs)
    assert read(row, ours, theirs, "text") == [("", ""), ("the", "the"), ("the cat", "the cat")]
    assert read(row, ours, theirs, "order") == [("", ""), ("t", "the"), ("th", "the cat")]
    # the last place of both is before the end of the turn
    last = max(place for place, at in enumerate(row["same_text"]) if at != NOWHERE)
    assert row["labels"][last + 1] == ours.eos_token_id
    assert row["input_ids"][: last + 2] == row["input_ids"]


@pytest.mark.parametrize(
    "answer",
    ["café naïve", "It is 😀 and 👩‍🚀!", "  two  spaces \n\n\tin front", "e\u0301 is two", "日本語 it is"],
)
def test_both_have_read_the_same_characters_whatever_they_are(answer):
    for ours, theirs in ((letters(None), words()), (words(), letters(None)), (letters(LLAMA3), words(GEMMA))):
        row = answered(answer, ours, theirs)
        found = read(row, ours, theirs, "text")
        assert len(found) > 2 and found[-1][0].strip() == answer.strip()
        for one, other in found:
            assert one.lstrip() == other.lstrip() or (one.strip() == answer.strip() == other.strip())
            assert "�" not in one + other  # behind whole characters alone


def test_a_template_that_strips_an_answer_or_thinks_before_it_reads_the_same():
    stripped, kept = letters(LLAMA3), words(CHATML)
    row = answered(" the cat\n", stripped, kept)
    assert read(row, stripped, kept, "text") == [
        ("", ""),
        ("the", " the"),
        ("the cat", " the cat\n"),  # each before its own end
    ]
    thinking = letters(THINKING)
    row = answered("the cat", thinking, kept)
    found = read(row, thinking, kept, "text")
    assert [other for _, other in found] == ["", "the", "the cat"]
    assert [one for one, _ in found] == [f"<think>\n\n</think>\n\n{text}" for text in ("", "the", "the cat")]


def test_answers_of_a_conversation_are_told_apart():
    ours, theirs = letters(LLAMA3), words(CHATML)
    turns = messages(("user", "Hi"), ("assistant", "the cat"), ("user", "And"), ("assistant", "the mat"))
    (row,) = encode_both(task({"messages": turns}), "test", ours, theirs, 256).to_list()
    for how, number in (("text", 6), ("order", 6)):
        pairs = [(place, at) for place, at in enumerate(row[f"same_{how}"]) if at != NOWHERE]
        assert len(pairs) == number and pairs == sorted(pairs, key=lambda pair: pair[1])
        for place, at in (pairs[0], pairs[3]):  # the first token of either answer, whatever stands before it
            assert ours.decode(row["labels"][place + 1]) == "t"
            assert theirs.decode(row["teacher_labels"][at + 1]) == "the"


def test_one_tokenizer_on_both_sides_is_each_token_by_itself():
    for one in (letters(LLAMA3), words(CHATML), words()):
        row = answered("The cat  sits café\n\n  here.", one, one)
        labeled = [place for place, label in enumerate(row["labels"][1:]) if label != -100]
        assert [place for place, at in enumerate(row["same_order"]) if at == place] == labeled
        inside = [place for place in labeled if row["same_text"][place] == NOWHERE]
        text = one.decode(row["input_ids"], skip_special_tokens=True)
        assert all("�" in one.decode(row["input_ids"][: place + 1]) for place in inside), text
        assert {row["same_text"][place] - place for place in labeled if place not in inside} == {0}


def test_word_pieces_beside_bytes():
    ours, theirs = load_tokenizer(MINILM), words()
    ours.eos_token = "[SEP]"
    row = answered("The cat sits, here", ours, theirs)
    assert read(row, ours, theirs, "text") == [
        ("", ""),
        ("the", "The"),
        ("the cat", "The cat"),
        ("the cat sits", "The cat sits"),
        ("the cat sits,", "The cat sits,"),
        ("the cat sits, here", "The cat sits, here"),
    ]


def test_text_to_text_and_plain_texts():
    ours, theirs = scan_tokenizer(), words()
    pairs = [{"source": f"tbe c{n}t", "target": "the cat"} for n in "abc"]
    splits = {name: Dataset.from_list([row]) for name, row in zip(("train", "validation", "test"), pairs, strict=True)}
    (row,) = encode_both(task_from(splits, name="pairs"), "test", ours, theirs, 64).to_list()
    assert read(row, ours, theirs, "text") == [("", ""), ("the", "the"), ("the cat", "the cat")]
    texts = {name: Dataset.from_list([{"text": f"the cat {n}"}]) for n, name in enumerate(splits)}
    (row,) = encode_both(task_from(texts, name="texts"), "test", ours, theirs, 64).to_list()
    found = [(ours.decode(row["input_ids"][: i + 1]), at) for i, at in enumerate(row["same_text"]) if at != NOWHERE]
    assert [text for text, _ in found] == ["the", "the cat", "the cat ", "the cat 2"][: len(found)]
    with pytest.raises(ValueError, match="has 10 tokens, and max_length=6; give a larger one, or shorter texts: two"):
        encode_both(task_from(texts, name="texts"), "test", ours, theirs, 6)


def test_a_row_that_one_side_leaves_out_is_left_out():
    ours, theirs = letters(None), words()
    rows = [
        {"messages": messages(("user", "Hi"), ("assistant", text))} for text in ("the cat", "the cat sat on the mat")
    ]
    found = encode_both(task(*rows), "test", ours, theirs, 20)
    assert [theirs.decode(row["teacher_input_ids"], skip_special_tokens=True) for row in found] == ["Hi\nthe cat"]
    with pytest.raises(ValueError, match="no answer of its 2 rows fits"):
        encode_both(task(*rows), "test", ours, theirs, 6)


def test_a_cut_row_keeps_what_is_left_aligned():
    ours, theirs = letters(None), words()
    turns = [{"messages": messages(("user", "x" * 50), ("assistant", "the cat"))}]
    (row,) = encode_both(task(*turns), "test", ours, theirs, 24).to_list()
    assert len(row["input_ids"]) == 24 == len(row["same_text"]) == len(row["same_order"])
    assert read(row, ours, theirs, "text") == [("", ""), ("the", "the"), ("the cat", "the cat")]


def test_white_space_belongs_to_the_token_that_holds_it():
    trims, plain = words(trim=True), words()
    text = "the\n\n  cat"
    found = [untrimmed(one)(text, return_offsets_mapping=True).offset_mapping for one in (trims, plain)]
    assert found[0] == found[1] and "".join(text[slice(*each)] for each in found[0]) == text
    assert trims(text, return_offsets_mapping=True).offset_mapping != found[0]  # and it is not changed itself


def test_progress_by_hand():
    whole = WHOLE
    assert progress([], 0, 0) == [NOWHERE]
    assert progress([(0, 3)], 0, 3) == [0, whole]
    assert progress([(0, 1), (0, 1), (1, 2)], 0, 2) == [0, NOWHERE, 1, whole]  # a character of two tokens
    assert progress([(0, 4), (4, 6)], 2, 6) == [NOWHERE, 2, whole]  # a token that begins in the prompt
    assert progress([(0, 2), (2, 4), (4, 9)], 2, 6) == [NOWHERE, 0, 2, NOWHERE]  # and one that ends behind the answer
    assert progress([(0, 2), (2, 4)], 2, 4, answer=3) == [NOWHERE, (3 << 32), (3 << 32) + whole]
    assert progress([(0, 2), (3, 5), (6, 8)], 3, 8) == [NOWHERE, 0, 2, whole]  # spaces that no token holds


def test_shared_tokens_stand_for_the_same_bytes():
    ours, theirs = words(), letters(LLAMA3)
    pairs = shared_tokens(ours, theirs)
    assert len(pairs) == 256 + 2  # bytes, the padding's name, and the ends
    for one, other in pairs.tolist():
        names = ours.convert_ids_to_tokens(one), theirs.convert_ids_to_tokens(other)
        assert names[0] == names[1] or (one, other) == (ours.eos_token_id, theirs.eos_token_id)
    assert len(pairs[:, 0].unique()) == len(pairs[:, 1].unique()) == len(pairs)
    assert shared_tokens(ours, ours).tolist() == [[i, i] for i in range(len(ours))]

    pieces = load_tokenizer(MINILM)
    shared = {
        (pieces.convert_ids_to_tokens(a), ours.convert_ids_to_tokens(b))
        for a, b in shared_tokens(pieces, ours).tolist()
    }
    assert {("cat", "Ġcat"), ("##t", "t"), ("two", "Ġtwo"), (".", ".")} <= shared
    assert ("cat", "cat") not in shared

    sentence = Tokenizer(models.BPE({"<unk>": 0, "<0x0A>": 1, "▁cat": 2, "a": 3, "</s>": 4}, [], byte_fallback=True))
    sentence.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    llama = PreTrainedTokenizerFast(tokenizer_object=sentence, unk_token="<unk>", eos_token="</s>")
    named = {
        (llama.convert_ids_to_tokens(a), ours.convert_ids_to_tokens(b)) for a, b in shared_tokens(llama, ours).tolist()
    }
    assert named == {("<0x0A>", "Ċ"), ("▁cat", "Ġcat"), ("a", "a"), ("</s>", "<end>")}


@pytest.mark.parametrize("sides", [("right", "right"), ("left", "right"), ("right", "left"), ("left", "left")])
def test_batches_map_padded_places(sides):
    ours, theirs = letters(LLAMA3), words(CHATML)
    ours.padding_side, theirs.padding_side = sides
    rows = [
        {"messages": messages(("user", "Hi"), ("assistant", text))} for text in ("the cat", "one two three the mat")
    ]
    encoded = encode_both(task(*rows), "test", ours, theirs, 128).to_list()
    batch = both_collator(task(*rows), ours, theirs)(encoded)
    own = batch["teacher_batch"]
    assert set(own) == {"input_ids", "attention_mask", "labels", "same_order", "same_text", "shared_tokens"}
    for number, row in enumerate(encoded):
        for how in ("order", "text"):
            wanted = [
                (row["input_ids"][place], row["teacher_input_ids"][at])
                for place, at in enumerate(row[f"same_{how}"])
                if at != NOWHERE
            ]
            same = own[f"same_{how}"][number]
            places = (same >= 0).nonzero().flatten()
            found = batch["input_ids"][number][places], own["input_ids"][number][same[places]]
            assert list(zip(*(x.tolist() for x in found), strict=True)) == wanted
    plain = both_collator(task(*rows), ours, theirs)(
        [{k: v for k, v in row.items() if k not in COLUMNS} for row in encoded]
    )
    assert "teacher_batch" not in plain and torch.equal(plain["input_ids"], batch["input_ids"])


def test_what_two_tokenizers_cannot_read():
    ours, theirs = letters(LLAMA3), words()
    assert differ(ours, theirs) and not differ(ours, letters(LLAMA3)) and differ(ours, letters(GEMMA))
    chats = {"messages": messages(("user", "Hi"), ("assistant", "the cat"))}
    for options, message in (({"tokens": "all"}, "labels on all tokens"), ({"packing": True}, "pack other rows")):
        with pytest.raises(ValueError, match=f"tokenizers of their own, and talk is .*{message}"):
            encode_both(task(chats, **options), "test", ours, theirs, 128)
    labeled = {
        name: Dataset.from_list([{"text": f"{name} {n}", "label": n} for n in (0, 1)]) for name in ("train", "test")
    }
    with pytest.raises(ValueError, match="is a sequence-classification task"):
        encode_both(
            task_from(labeled | {"validation": Dataset.from_list([{"text": "v", "label": 1}])}, name="x"),
            "test",
            ours,
            theirs,
        )
    assert json.loads(json.dumps(COLUMNS)) == ["teacher_input_ids", "teacher_labels", "same_order", "same_text"]
