"""`write`: what a saved language model answers, beside its teacher; what `fakit generate` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fakit.experiments.schema import check_whole
from fakit.files import write_whole
from fakit.models.kinds import is_causal_lm
from fakit.models.positions import declared_positions, longest_row
from fakit.models.random_state import random_state_kept
from fakit.tasks.reading import SUFFIXES, read_file, suffix_of, text_of

LEAST = 1e-6  # a temperature that logits of any size can be divided by in float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Written:
    """A prompt and what came after it.

    Attributes:
        prompt: as it was given.
        seen: as the model saw it, special tokens included.
        text: what it wrote, without what ended it.
        tokens: how many tokens that is.
        ended: the model ended it; False where `max_new_tokens` did.
    """

    prompt: str
    seen: str
    text: str
    tokens: int
    ended: bool


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    template: str = "auto",
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[Written]:
    """Answers of a language model, one a prompt.

    Args:
        model: a causal language model. tokenizer: its own.
        prompts: a user's messages, or texts to be continued.
        template: "auto" takes the tokenizer's chat template, or none where it has none; "none" continues the text; or
            "…{prompt}…", as for tasks.
        max_new_tokens: where a text that does not end is cut.
        temperature: sample at it; greedy unless given.
        top_p: sample among the likeliest tokens that reach this share.
        seed: of the samples. Each prompt draws from its own place in the list, whatever the others are.

    Raises:
        ValueError: before any work: no prompts, an empty one, values out of range, prompts too long for the model.
    """
    from fakit.evaluation.batches import device_of, eval_mode
    from fakit.evaluation.generation import generating, stops_of, written_text
    from fakit.tasks.instructions import check_options, prompt_ids

    check_options(template, "completion")
    prompts = list(prompts)
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts: found {prompts!r:.80}, expected at least one text that is not empty.")
    check_whole("max_new_tokens", max_new_tokens)
    check_whole("seed", seed, least=0)
    if seed >= 2**63 - len(prompts):
        raise ValueError(f"seed: found {seed}, and torch counts to 2**63; give a smaller one.")
    if temperature is not None and not LEAST <= temperature <= 1 / LEAST:
        raise ValueError(
            f"temperature: found {temperature!r}, expected a number from {LEAST:g} to {1 / LEAST:g}; leave it out to "
            "be greedy."
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: found {top_p!r}, expected a share above 0, at most 1.")
    asked = [prompt_ids(prompt, tokenizer, template) for prompt in prompts]
    positions, longest = longest_row(model) or declared_positions(model), max(map(len, asked))
    if positions is not None and longest + max_new_tokens > positions:
        raise ValueError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} new ones were asked of a model with "
            f"{positions} positions; shorten it, or give a smaller max_new_tokens."
        )
    ends = stops_of(model, tokenizer)
    ways: dict = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
    ways |= {"max_new_tokens": max_new_tokens} | ({} if temperature is None else {"top_p": top_p, "top_k": 0})
    fill = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    found = []
    with torch.no_grad(), eval_mode(model), generating(model, ends, fill, **ways):
        for number, (prompt, ids) in enumerate(zip(prompts, asked, strict=True)):
            given = torch.tensor([ids], device=device_of(model))
            with random_state_kept(given.device):
                torch.manual_seed(seed + number)
                new = model.generate(input_ids=given, attention_mask=torch.ones_like(given))[0, len(ids) :].tolist()
            ended = bool(new) and new[-1] in ends
            kept = new[:-1] if ended else new
            found.append(Written(prompt, tokenizer.decode(ids), written_text(tokenizer, kept), len(kept), ended))
    return found


def answers(
    model: str | Path,
    prompts: Sequence[str],
    file: Path | None = None,
    beside: str | Path | None = None,
    out: Path | None = None,
    **ways,
) -> list[dict]:
    """Print what a saved model writes after each prompt, and what another one does; `write` has the `ways`.

    Returns:
        a row a prompt: {"prompt", "text", "tokens", "ended"} and with `beside` the same of the other under "beside".

    Raises:
        ValueError: nothing to answer, a model that cannot be loaded or is no causal language model; see `write`.
    """
    from fakit.experiments.quiet import without_side_bars

    asked = read_prompts(prompts, file)
    if not asked:
        raise ValueError("there is no prompt: give some, each in quotes, or --file with one a line.")
    if out is not None and (out.is_dir() or not out.resolve().parent.is_dir()):
        what = "is a folder" if out.is_dir() else f"lies in {out.parent}, and there is no such folder"
        raise ValueError(f"{out} {what}; name a file that the answers can be written to.")
    with without_side_bars():
        loaded = [load(one) for one in (model, beside) if one is not None]
    rows: list[dict] = []
    both = [write(one, tokenizer, asked, **ways) for one, tokenizer in loaded]
    for each in zip(*both, strict=True):
        told = [{"text": one.text, "tokens": one.tokens, "ended": one.ended} for one in each]
        rows.append({"prompt": each[0].prompt, **told[0], **({"beside": told[1]} if beside else {})})
        print(_in_words(rows[-1], str(model), str(beside)), end="\n\n", flush=True)
    if out is not None:
        write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return rows


def load(model: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model with its tokenizer: a folder, also of pairs of low rank, a hub id or "smollm2"."""
    from fakit.compression import low_rank
    from fakit.models.load import load_teacher, load_tokenizer, resolve_model
    from fakit.models.low_rank_linear import FILE as PAIRS

    source = resolve_model(model)
    tokenizer = load_tokenizer(source)
    if (Path(source) / PAIRS).is_file():
        found = low_rank.load(Path(source))
    else:
        found = load_teacher(source, "causal-lm")
    if not (found.can_generate() and is_causal_lm(found)):
        raise ValueError(f"{model} holds a {type(found).__name__}, which writes no text; give a causal language model.")
    return found, tokenizer


def _in_words(row: dict, model: str, beside: str) -> str:
    def told(name: str, of: dict) -> str:
        cut = "" if of["ended"] else f"  [cut after {of['tokens']} tokens]"
        return f"{name}: {of['text']}{cut}"

    lines = [f"> {row['prompt']}", told(Path(model).name, row)]
    return "\n".join([*lines, *([told(Path(beside).name, row["beside"])] if "beside" in row else [])])


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Prompts of a command: the ones given, then one a line of a text file, or the column "prompt" of a file of rows
    (.jsonl, .json, .csv, .tsv, .parquet), as tasks read them.

    Raises:
        ValueError: no such file, one that cannot be read, or a row without a prompt.
    """
    prompts = list(given)
    if file is None:
        return prompts
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file of prompts.")
    if suffix_of(file) not in SUFFIXES:
        try:
            lines = text_of(file).split("\n")
        except ValueError as error:
            raise ValueError(f"{file} cannot be read as text: {error}") from error
        return prompts + [line.removesuffix("\r") for line in lines if line.strip()]
    rows = read_file(file, ["prompt"])
    if "prompt" not in rows.column_names:
        raise ValueError(f'{file} has no column "prompt"; it has {", ".join(rows.column_names)}.')
    for number, prompt in enumerate(rows["prompt"], 1):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{file}, row {number}: has no text under "prompt"; it is {prompt!r:.60}.')
    return prompts + list(rows["prompt"])
