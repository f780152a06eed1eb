"""Greedy generation from a causal language model, and what the texts are worth.

For tasks that map a source to a target (`scans`: noisy line → clean line) a row is prompt + target in one sequence,
with labels -100 on the prompt: the labels say where to cut.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fakit.evaluation.batches import by_length, device_of, eval_mode, rows_of
from fakit.evaluation.metrics import bleu, cer, rouge
from fakit.models.blocks import without_adapter
from fakit.models.positions import declared_positions
from fakit.tracing.inputs import left_padding

logger = logging.getLogger(__name__)

SCORED = 200  # rows that are generated for and scored, unless asked otherwise


@dataclass(frozen=True)
class Generations:
    """Texts that a model wrote, beside what it was given and what was wanted; (N,) each.

    `metrics` holds "cer", "bleu", "rouge1", "rouge2", "rougeL", the same of leaving the source as it is under "…_copy",
    and "bleu_signature" is the protocol of both BLEU values.
    """

    sources: list[str]
    references: list[str]
    outputs: list[str]
    metrics: dict[str, float]
    bleu_signature: str

    def _repr_markdown_(self) -> str:
        def cell(text: str) -> str:
            return text.replace("|", "\\|").replace("\n", " ")

        rows = zip(self.sources[:5], self.outputs[:5], self.references[:5], strict=True)
        lines = ["| source | output | reference |", "|---|---|---|"]
        lines += [f"| {cell(source)} | {cell(output)} | {cell(reference)} |" for source, output, reference in rows]
        return "\n".join([*lines, "", self._summary()])

    def __str__(self) -> str:
        return self._summary()

    def _summary(self) -> str:
        values = self.metrics
        return (
            f"{len(self.outputs)} lines: CER {values['cer']:.3f} (source as it is: {values['cer_copy']:.3f}), "
            f"BLEU {values['bleu']:.1f} ({values['bleu_copy']:.1f}), "
            f"ROUGE-L {values['rougeL']:.3f} ({values['rougeL_copy']:.3f})"
        )


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[list[int]]:
    """Continue each prompt greedily until the end-of-sequence token.

    Prompts are padded on the left and masked, so that a batch gives what each prompt gives alone. Sampling options in
    the model's own generation_config are not used.

    Args:
        model: a causal language model.
        prompts: token ids, one list a prompt.
        eos_token_id: stops a sequence; any of them, where there are several.
        pad_token_id: fills on the left (any id, it is masked).
        max_new_tokens: a sequence that never ends is cut here.
        batch_size: prompts per batch at most; those of similar length go together, as many as `batches.TOKENS` allows.

    Returns:
        The new token ids of each prompt, without the end-of-sequence token, in the order of `prompts`.

    Raises:
        ValueError: no prompts, an empty prompt, or prompt + new tokens exceed the model's positions.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        empty = [index for index, prompt in enumerate(prompts) if not len(prompt)]
        raise ValueError(
            f"generate: {len(prompts)} prompts, empty ones at {empty[:5]}; give each at least one token (a BOS, say)"
        )
    longest = max(len(prompt) for prompt in prompts)
    positions = declared_positions(model)
    if max_new_tokens < 1 or (positions and longest + max_new_tokens > positions):
        raise ValueError(
            f"generate: the longest prompt has {longest} tokens and {max_new_tokens} new ones were asked of a model "
            f"with {positions} positions; shorten the prompts or lower max_new_tokens (at least 1)"
        )
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    outputs: list[list[int]] = [[] for _ in prompts]
    ways = {"do_sample": False, "max_new_tokens": max_new_tokens}
    with torch.no_grad(), eval_mode(model), generating(model, eos_token_id, pad_token_id, **ways):
        for indices in _batches(model, [len(prompt) for prompt in prompts], max_new_tokens, batch_size):
            width = max(len(prompts[index]) for index in indices)
            ids = torch.full((len(indices), width), pad_token_id)  # (B, T), padded on the left
            mask = torch.zeros_like(ids)
            for row, index in enumerate(indices):
                ids[row, width - len(prompts[index]) :] = torch.as_tensor(prompts[index])
                mask[row, width - len(prompts[index]) :] = 1
            device = device_of(model)
            generated = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))[:, width:].tolist()
            for index, tokens in zip(indices, generated, strict=True):
                outputs[index] = list(itertools.takewhile(lambda token: token not in ends, tokens))
    return outputs


def _batches(model, lengths: list[int], new: int, batch_size: int) -> list[list[int]]:
    """Prompts that are continued together: of similar length; of one length where a model takes no padding on the left,
    as a recurrent one does whose state padding changes.
    """
    found = by_length([length + new for length in lengths], batch_size)
    if left_padding(model) != "moved":
        return found
    return [
        [index for index in indices if lengths[index] == length]
        for indices in found
        for length in sorted({lengths[index] for index in indices})
    ]


def check_prompts_fit(model, rows: Sequence[dict], what: str) -> None:
    """Raise ValueError where a prompt leaves no position to write at: said before a training, not after it."""
    positions = declared_positions(model)
    longest = max((_last_run(row["labels"])[0] for row in rows), default=0)
    if positions and longest >= positions:
        raise ValueError(
            f"{what} has a prompt of {longest} tokens, and {type(model).__name__} has {positions} positions, so "
            f"nothing can be written behind it; set training.max_length to at most {positions}, or leave such rows out."
        )


@contextmanager
def generating(model, eos_token_id: int | Sequence[int], pad_token_id: int, **ways) -> Iterator[None]:
    """Swap the model's generation_config: `generate` would fill what we leave open (penalties, sampling) from it.

    Args:
        ways: of transformers' GenerationConfig, such as do_sample and max_new_tokens.
    """
    from transformers import GenerationConfig

    ends = eos_token_id if isinstance(eos_token_id, int) else list(eos_token_id)
    # an adapted model may read its own, that of the model inside, or hand its own on to it
    models = {id(each): each for each in (model, without_adapter(model))}.values()
    found = [each.generation_config for each in models]
    asked = GenerationConfig(eos_token_id=ends, pad_token_id=pad_token_id, **ways)
    for each in models:
        each.generation_config = asked
    try:
        yield
    finally:
        for each, before in zip(models, found, strict=True):
            each.generation_config = before


def split_prompts(rows: Sequence[dict], eos_token_id: int | Collection[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Cut encoded rows before their last answer: where the last run of labels begins.

    Args:
        rows: encoded examples with input_ids and labels (T,), labels -100 on the prompt.
        eos_token_id: what ends an answer; any of them, where there are several.

    Returns:
        prompts and targets as token ids, targets without what ends them.

    Raises:
        ValueError: a row has no labeled token, or none that is not labeled (plain language modeling has no prompt).
    """
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    prompts, targets = [], []
    for number, row in enumerate(rows):
        ids, labels = [int(token) for token in row["input_ids"]], [int(label) for label in row["labels"]]
        cut, stop = _last_run(labels)
        if cut == 0:
            raise ValueError(
                f"row {number} has no prompt: {sum(label != -100 for label in labels)} of its {len(labels)} tokens are "
                "labeled; generation needs labels -100 on the source part and target tokens after it"
            )
        prompts.append(ids[:cut])
        targets.append(list(itertools.takewhile(lambda token: token not in ends, labels[cut:stop])))
    return prompts, targets


def _last_run(labels: Sequence[int]) -> tuple[int, int]:
    """Where the last run of labels begins and ends; (0, 0) where there is none."""
    stop = next((place for place in range(len(labels), 0, -1) if labels[place - 1] != -100), 0)
    cut = next((place for place in range(stop, 0, -1) if labels[place - 1] == -100), 0)
    return cut, stop


def ends_of(rows: Sequence[dict], tokenizer) -> set[int]:
    """The tokens that end an answer: the tokenizer's end of a sequence, and the special tokens that the labels of rows
    end with, as the end of a turn of a chat template.
    """
    last = {int(row["labels"][stop - 1]) for row in rows if (stop := _last_run(row["labels"])[1])}
    return {tokenizer.eos_token_id} | (last & set(tokenizer.added_tokens_decoder))


def stops_of(model, tokenizer, fix: str = "set tokenizer.eos_token") -> list[int]:
    """The tokens that end a text, as the tokenizer and the model's generation_config name them.

    Raises:
        ValueError: neither names one.
    """
    given = [getattr(side, "eos_token_id", None) for side in (tokenizer, getattr(model, "generation_config", None))]
    ends = dict.fromkeys(i for of in given if of is not None for i in ([of] if isinstance(of, int) else of))
    if not ends:
        raise ValueError(
            "no token is known to end a text: neither the tokenizer nor the model's generation_config names an "
            f"eos_token_id; {fix}."
        )
    return list(ends)


def written_text(tokenizer, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens; cleaning up blanks before punctuation would change what CER
    counts.
    """
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check_references(rows: Sequence[dict], tokenizer) -> None:
    """Raise ValueError where a target does not end: it was cut,
    and a whole text would be compared with a part of its reference.
    """
    ends = {-100} | ends_of(rows, tokenizer)
    cut = [number for number, row in enumerate(rows) if row["labels"][-1] not in ends]
    if cut:
        longest = max(len(row["input_ids"]) for row in rows)
        raise ValueError(
            f"{len(cut)} of {len(rows)} targets do not end with the eos token {tokenizer.eos_token_id} (row {cut[0]}, "
            f"say): they were cut to fit {longest} tokens. Generated texts cannot be scored against parts of their "
            "references; encode with a larger max_length, or leave these rows out."
        )


def generation_metrics(
    model,
    dataset,
    tokenizer,
    max_examples: int = SCORED,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    separator: str = "\n",
) -> Generations:
    """Decode greedily from the prompts of an encoded dataset, and score against its targets and against copying.

    Args:
        model: a causal language model. tokenizer: with pad and eos tokens.
        dataset: encoded rows, labels -100 on the prompt (see `split_prompts`).
        max_examples: the first so many rows.
        max_new_tokens: None takes the longest target of these rows + 16; a prompt that leaves fewer positions takes
            those.
        separator: ends a prompt and is no part of the source.
    """
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
        raise ValueError(
            f"generation needs an eos and a pad token, {type(tokenizer).__name__} has eos {tokenizer.eos_token!r} "
            f"and pad {tokenizer.pad_token!r}; set tokenizer.pad_token = tokenizer.eos_token"
        )
    if max_examples < 1:
        raise ValueError(f"generation_metrics: max_examples={max_examples} was asked; use at least 1")
    rows = rows_of(dataset)[:max_examples]
    check_references(rows, tokenizer)
    ends = ends_of(rows, tokenizer)
    prompts, targets = split_prompts(rows, ends)
    if max_new_tokens is None:
        check_prompts_fit(model, rows, "the data to write answers for")
        most = max(len(target) for target in targets) + 16
        room = [(declared_positions(model) or math.inf) - len(prompt) for prompt in prompts]
        limits = [int(min(most, free)) for free in room]
        if short := sum(free < len(target) for free, target in zip(room, targets, strict=True)):
            logger.warning(
                "%d of %d prompts leave fewer positions than their target has tokens; what is written there ends "
                "early.",
                short,
                len(prompts),
            )
    else:
        limits = [max_new_tokens] * len(prompts)
    outputs: list[list[int]] = [[] for _ in prompts]
    for limit in sorted(set(limits)):
        chosen = [number for number, own in enumerate(limits) if own == limit]
        written = generate(model, [prompts[i] for i in chosen], sorted(ends), tokenizer.pad_token_id, limit, batch_size)
        for number, ids in zip(chosen, written, strict=True):
            outputs[number] = ids

    def decode(sequences: list[list[int]]) -> list[str]:
        return [written_text(tokenizer, ids) for ids in sequences]

    sources = [source.removesuffix(separator) for source in decode(prompts)]
    references, texts = decode(targets), decode(outputs)
    own, signature = _scores(texts, references)
    copied, _ = _scores(sources, references)
    metrics = own | {f"{name}_copy": value for name, value in copied.items()}
    return Generations(sources, references, texts, metrics, signature)


def _scores(texts: list[str], references: list[str]) -> tuple[dict[str, float], str]:
    score = bleu(texts, references)
    return {"cer": cer(texts, references), "bleu": score.value} | rouge(texts, references), score.signature
