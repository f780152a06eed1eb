"""From rows of the data to rows that the student wrote: prompts, answers, a batch of both."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fakit.evaluation.batches import device_of, eval_mode
from fakit.evaluation.generation import generating
from fakit.models.random_state import random_state_kept
from fakit.tracing.inputs import find_documents, left_padding
from fakit.training.on_policy.settings import OnPolicy

IGNORED = -100


def write(
    student: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    on_policy: OnPolicy,
    ends: Sequence[int],
    seed: int,
    vocabulary: int | None = None,
) -> list[list[int]]:
    """What a causal language model writes after each prompt, up to and with its end of sequence, in the prompts' order.

    Prompts are padded on the left and masked; of a model that cannot read such rows, only prompts of one length go
    together. The model is in evaluation mode meanwhile (no dropout), and the random numbers of whoever asks go on as
    if nothing had been drawn.

    Args:
        prompts: token ids, one list or more each.
        ends: token ids that end an answer.
        seed: of what is drawn.
        vocabulary: token ids from here on are not written; None: all may be.
    """
    device = device_of(student)
    written: list[list[int]] = [[] for _ in prompts]
    beyond = range(student.config.get_text_config().vocab_size)[vocabulary:] if vocabulary else ()
    ways = on_policy.ways | ({"suppress_tokens": list(beyond)} if beyond else {})
    groups = [list(range(len(prompts)))]
    if left_padding(student) == "moved":
        lengths = sorted({len(prompt) for prompt in prompts})
        groups = [[i for i, prompt in enumerate(prompts) if len(prompt) == length] for length in lengths]
    with torch.no_grad(), eval_mode(student), _drawing(seed, device), generating(student, ends, ends[0], **ways):
        for rows in groups:
            ids, mask = _padded([prompts[row] for row in rows], ends[0], left=True)
            found = student.generate(input_ids=ids.to(device), attention_mask=mask.to(device))[:, ids.shape[1] :]
            for row, tokens in zip(rows, found.tolist(), strict=True):
                stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
                written[row] = tokens[:stop]
    return written


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of this seed inside, those of before afterwards."""
    with random_state_kept(device):
        torch.random.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _padded(rows: Sequence[Sequence[int]], fill: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """int64 (B, T) each: the rows, and which of it are their tokens."""
    longest = max(map(len, rows))
    sides = [((longest - len(row), 0) if left else (0, longest - len(row))) for row in rows]
    ids = [[fill] * before + list(row) + [fill] * behind for row, (before, behind) in zip(rows, sides, strict=True)]
    mask = [[0] * before + [1] * len(row) + [0] * behind for row, (before, behind) in zip(rows, sides, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def prompts_of(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """The prompt of each row: what stands before its last run of labeled tokens; all of a row without a label.

    Args:
        batch: input_ids and labels (B, T), attention_mask (B, T) where rows are padded.

    Raises:
        ValueError: no labels, packed rows, or a row in which nothing stands before what is labeled.
    """
    if batch.get("labels") is None or find_documents(batch) is not None:
        raise ValueError(no_prompts("no labels" if batch.get("labels") is None else "rows that pack several texts"))
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
    rows = zip(batch["input_ids"].tolist(), mask.tolist(), batch["labels"].tolist(), strict=True)
    return [prompt_of(*row) for row in rows]


def prompt_of(ids: Sequence[int], mask: Sequence[int], labels: Sequence[int]) -> list[int]:
    """Of one row; ValueError where it has none."""
    tokens = [(token, label) for token, counts, label in zip(ids, mask, labels, strict=True) if counts]
    end = len(tokens)
    while end and tokens[end - 1][1] == IGNORED:
        end -= 1
    start = end
    while start and tokens[start - 1][1] != IGNORED:
        start -= 1
    prompt = [token for token, _ in tokens[: start if end else None]]
    if not prompt:
        raise ValueError(no_prompts(f"a row of {len(tokens)} tokens with none before its labels"))
    return prompt


def no_prompts(found: str) -> str:
    """What to say of data without prompts."""
    return (
        f"on-policy distillation needs prompts, and found {found}: a row is a prompt with labels of -100 and an answer "
        "with labels. Give such rows (source and target, or instruction data with tokens='completion'), or leave "
        "on_policy out."
    )


def written_batch(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], fill: int) -> dict[str, Tensor]:
    """Rows of prompt and answer, padded on the right, labels on the answers; of a row without an answer no token
    counts: input_ids, attention_mask, labels (B, T).
    """
    both = list(zip(prompts, answers, strict=True))
    ids, mask = _padded([[*prompt, *answer] for prompt, answer in both], fill)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(both):
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer, dtype=labels.dtype)
        mask[row] *= bool(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
