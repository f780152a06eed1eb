"""Instruction data: the tokens that a language model is given of rows that `fakit.tasks.conversations` has read.

* `template`: "auto" is the tokenizer's chat template, or "none" where it has none; "none" is prompt and answer as they
  stand; "…{prompt}…" is what stands around a prompt. A row is rendered and tokenized as a whole, once, so its tokens
  are `apply_chat_template`'s. Without a chat template the row begins and ends with the tokenizer's own BOS and EOS.
* An answer begins where the template has asked for one (its generation prompt) and ends with what closes the turn.
  A token counts to the answer if it begins inside.
* `tokens`: labels on "completion" (every answer of the row but those of a prompt) or on "all" tokens.
* `too_long`: "cut" takes tokens away behind the BOS, from the left; an answer that loses a token is context from then
  on. A row whose last answer does not fit beside one token of its prompt is left out, and counted. "refuse" raises.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fakit.tasks.progress import NOWHERE, answer_of, laid_out, progress
from fakit.tasks.special_tokens import added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
SHOWN = 700  # characters of a row that is printed


def check_options(template: str, tokens: str) -> None:
    """Raise ValueError for a value that neither of them has."""
    if template not in ("auto", "none") and template.count("{prompt}") != 1:
        raise ValueError(
            f"template={template!r} is neither 'auto' nor 'none', and holds {{prompt}} {template.count('{prompt}')} "
            "times; write it once, where the prompt goes; the answer follows at the end."
        )
    if tokens not in ("completion", "all"):
        raise ValueError(f"tokens={tokens!r} is not known; choose 'completion' or 'all'.")


@dataclass
class Seen:
    """What became of the rows of a split: numbers, and the first two as the model sees them."""

    read: int = 0
    kept: int = 0
    cut: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    shown: list[str] = field(default_factory=list)

    def said(self, what: str, max_length: int, template: str, tokens: str) -> str:
        """Lines for the log."""
        cut = f", {self.cut:,} of them cut from the prompt's side to max_length={max_length}" if self.cut else ""
        left = self.read - self.kept
        lost = f", {left:,} left out, whose answer does not fit into max_length={max_length}" if left else ""
        learned = "the answers'" if tokens == "completion" else "all"
        rows = "".join(f"\n  row {number}: {row}" for number, row in enumerate(self.shown, 1))
        return (
            f"{what}: {self.read:,} rows read, {self.kept:,} kept{cut}{lost}; {self.prompt_tokens:,} tokens of prompts "
            f"and {self.answer_tokens:,} of answers, labels on {learned}; {template}. As the model sees them, labels "
            f"in ⟦ ⟧:{rows}"
        )


def encode_turns(
    rows: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: str,
    tokens: str,
    too_long: str,
    seen: Seen,
    read: bool = False,
) -> dict[str, list]:
    """Tokens, mask and labels of rows that have turns (, answer); `seen` is counted on. With `read`, the number of each
    row, too, and what is read behind each of its tokens (`fakit.tasks.progress`).

    Raises:
        ValueError: a row that the template cannot render, or that is too long where that is refused;
            a tokenizer that does not say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which characters its tokens stand for, so answers cannot be told "
            "from prompts; load the fast tokenizer of the same model."
        )
    begin, end = added_tokens(tokenizer)
    end = end or [tokenizer.eos_token_id]
    encoded: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    if read:
        encoded |= {"row": [], "read": []}
    for turns, answer in zip(rows["turns"], rows.get("answer") or [None] * len(rows["turns"]), strict=True):
        seen.read += 1
        try:
            if uses_chat(template, tokenizer):
                text, answers = _chat(turns, answer, tokenizer)
                ids, spans, offsets = _tokens(text, answers, tokenizer)
                given, before = len(begin) if ids[: len(begin)] == begin else 0, 0
            else:
                text, answers = _plain(turns, answer, template)
                ids, spans, offsets = _tokens(text, answers, tokenizer)
                given = before = len(begin)
                spans = [(first + given, last + given + len(end)) for first, last in spans]
                ids = begin + ids + (end if spans else [])
        except ValueError as error:
            raise ValueError(f"row {seen.read} ({turns[0]['content']!r:.60}): {error}") from error
        keys = _read(text, answers, turns, answer, offsets, before, len(ids)) if read else [NOWHERE] * len(ids)
        if (lost := max(0, len(ids) - max_length)) > 0:
            whole = len(ids) - spans[-1][0] if spans else 0  # from the last answer on
            if too_long == "refuse":
                raise ValueError(
                    f"row {seen.read} ({turns[0]['content']!r:.60}) has {len(ids)} tokens, {whole} of them from its "
                    f"last answer on, and max_length={max_length}; give a larger one, or too_long='cut'."
                )
            if given + 1 + whole > max_length:
                continue
            seen.cut += 1
            ids, keys = (x[:given] + x[given + lost :] for x in (ids, keys))
            whole_ones = {number for number, (first, _) in enumerate(spans) if first - lost > given}
            keys = [key if answer_of(key) in whole_ones else NOWHERE for key in keys]
            spans = [(first - lost, last - lost) for first, last in spans if first - lost > given]
        seen.kept += 1
        learned = [False] * len(ids)
        for first, last in spans:
            learned[first:last] = [True] * (last - first)
        seen.answer_tokens += sum(learned)
        seen.prompt_tokens += len(ids) - sum(learned)
        if tokens == "all" and spans:
            learned = [place >= given for place in range(len(ids))]
        encoded["input_ids"].append(ids)
        encoded["attention_mask"].append([1] * len(ids))
        encoded["labels"].append(
            [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
        )
        if read:
            encoded["row"].append(seen.read - 1)
            encoded["read"].append(keys)
        if len(seen.shown) < 2:
            seen.shown.append(shown(ids, learned, tokenizer))
    return encoded


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """A prompt alone, as the rows of a task begin; by the template "none" the text as it stands."""
    begin, _ = added_tokens(tokenizer)
    if uses_chat(template, tokenizer):
        return _tokens(_chat([{"role": "user", "content": prompt}], None, tokenizer)[0], [], tokenizer)[0]
    if template in ("auto", "none"):
        return begin + list(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)
    text = template.replace("{prompt}", prompt)
    # a token that would reach into the answer, as a blank before it does, is the answer's first
    found = tokenizer(f"{text}a", add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    whole = sum(end <= len(text) for _, end in found.offset_mapping)
    return begin + list(found.input_ids[:whole])


def uses_chat(template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """True where the tokenizer's chat template is applied."""
    return template == "auto" and bool(tokenizer.chat_template)


def _chat(turns: list[dict], answer: str | None, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The row by the chat template, and where in it each answer stands, in characters."""
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    given = [place for place, turn in enumerate(turns) if turn.get("given")]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    whole = _rendered(messages, tokenizer, ask=answer is None)
    answers = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or place in given:
            continue
        if place == 0:
            raise ValueError(
                f"it begins with an answer, {message['content']!r:.60}, and nothing was asked before it; give it a "
                "prompt, or leave the turn out."
            )
        asked = _rendered(messages[:place], tokenizer, ask=True)
        if not whole.startswith(asked):
            raise ValueError(
                f"the tokenizer's chat template asks for an answer with {asked[-60:]!r}, and does not write the answer "
                f"{message['content']!r:.60} behind it; where it begins is unknown. Give template='…{{prompt}}…'."
            )
        so_far = _rendered(messages[: place + 1], tokenizer, ask=False)
        if whole.startswith(so_far):
            last = len(so_far.rstrip())
        elif whole.startswith(message["content"].strip(), len(asked)):  # a template that writes earlier answers shorter
            last = len(asked) + len(message["content"].strip())
            marks = [str(mark) for mark in tokenizer.added_tokens_decoder.values()]
            last += max((len(mark) for mark in marks if whole.startswith(mark, last)), default=0)
        else:
            raise ValueError(
                f"the tokenizer's chat template does not write the answer {message['content']!r:.60} as it stands; "
                "where it ends is unknown. Give template='…{prompt}…'."
            )
        answers.append((len(asked), last))
    return whole, answers


def _rendered(messages: list[dict], tokenizer, ask: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template is a program of its author's, and raises what it likes
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the tokenizer's chat template cannot write turns of {roles}: {error}") from error


def _plain(turns: list[dict], answer: str | None, template: str) -> tuple[str, list[tuple[int, int]]]:
    """The row without a chat template: a single prompt and its answer."""
    if [turn["role"] for turn in turns] != ["user"]:
        roles = ", ".join(turn["role"] for turn in turns)
        raise ValueError(
            f"before its last answer it has turns of {roles}, which take a chat template, and there is none (template: "
            f"{template!r}); give a model whose tokenizer has one, or rows of one prompt and one answer."
        )
    prompt = turns[0]["content"]
    if template not in ("auto", "none"):
        prompt = template.replace("{prompt}", prompt)
    elif answer is None or not (prompt[-1:].isspace() or answer[:1].isspace()):
        prompt += "\n"  # else the two would run together
    return prompt + (answer or ""), [] if answer is None else [(len(prompt), len(prompt + answer))]


def _read(text, answers, turns, answer, offsets, before: int, tokens: int) -> list[int]:
    """What of the row's answers is read behind each of its tokens.

    Args:
        before: tokens of the row before those that `offsets` are of.
        tokens: of the row.
    """
    contents = [turn["content"] for turn in turns if turn["role"] == "assistant" and not turn.get("given")]
    contents += [] if answer is None else [answer]
    keys = [NOWHERE] * tokens
    for number, ((first, last), content) in enumerate(zip(answers, contents, strict=True)):
        skipped = 0
        if not text.startswith(content, first):  # a template that strips it, or writes an empty thought before it
            skipped, content = len(content) - len(content.lstrip()), content.strip()
            first = text.index(content, first, last)
        found = laid_out(progress(offsets, first, first + len(content), number, skipped), before, tokens)
        keys = [key if new == NOWHERE else new for key, new in zip(keys, found, strict=True)]
    return keys


def _tokens(text: str, answers: list[tuple[int, int]], tokenizer):
    """Token ids of a text, each answer's first token and the one behind its last, and which characters each token
    stands for. A token that reaches into an answer is the answer's: many tokenizers make one of a blank and the word
    behind it.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = []
    for first, last in answers:
        inside = [
            place
            for place, (start, end) in enumerate(found.offset_mapping)
            if start < last and (end > first or start >= first)
        ]
        if not inside:
            raise ValueError(f"the tokenizer makes no token of the answer {text[first:last]!r:.60}.")
        spans.append((inside[0], inside[-1] + 1))
    return list(found.input_ids), spans, found.offset_mapping


def shown(ids: list[int], learned: list[bool], tokenizer) -> str:
    """A row in words, labeled tokens in double brackets; of a long one the two ends."""
    parts, start = [], 0
    for place in range(1, len(ids) + 1):
        if place == len(ids) or learned[place] != learned[start]:
            words = tokenizer.decode(ids[start:place], clean_up_tokenization_spaces=False)
            parts.append(f"⟦{words}⟧" if learned[start] else words)
            start = place
    text = repr("".join(parts))[1:-1]
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
