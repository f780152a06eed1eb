"""A student as a draft of its teacher: speculative decoding, where the student proposes and the teacher checks.

The student writes γ tokens, the teacher reads them in one pass and keeps those that it agrees with, and one more of its
own (Leviathan et al. 2023, arXiv 2211.17192). What comes out is the teacher's; what a draft changes is the time.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fakit.evaluation.batches import device_of, eval_mode
from fakit.evaluation.generation import generate
from fakit.models.positions import longest_row
from fakit.tracing.capture import capture


@dataclass(frozen=True)
class DraftQuality:
    """What a student is worth as a draft; all over the teacher's own greedy continuations.

    Attributes:
        tokens: γ, what the student proposes before each of the teacher's passes.
        positions: tokens that the teacher wrote, over which means are taken.
        acceptance: α, the mean of Σ_v min(P(v), Q(v)) = 1 - TV: the chance that a sampled token is kept.
        greedy: share of the tokens that the student would have written, too.
        tokens_a_pass: of greedy decoding, counted block by block: tokens that one of the teacher's passes gives.
        sampled_tokens_a_pass: (1 - α^(γ+1)) / (1 - α), as if positions were independent.
        cost: seconds of a student's token over seconds of a teacher's, each decoding alone.
        seconds, draft_seconds: of the teacher's text, by the teacher alone and with the draft: medians of the repeats,
            summed over the prompts.
        equal: share of the prompts whose text is the same with the draft. Below 1 where rounding decides between two
            tokens: a pass over several tokens does not round as passes over one do.
    """

    tokens: int
    positions: int
    acceptance: float
    greedy: float
    tokens_a_pass: float
    cost: float
    seconds: float
    draft_seconds: float
    equal: float

    @property
    def sampled_tokens_a_pass(self) -> float:
        if self.acceptance >= 1:
            return self.tokens + 1.0
        return (1 - self.acceptance ** (self.tokens + 1)) / (1 - self.acceptance)

    @property
    def expected_speedup(self) -> float:
        """Of greedy decoding: tokens a pass over the cost of a pass, 1 + γ · cost."""
        return self.tokens_a_pass / (1 + self.tokens * self.cost)

    @property
    def speedup(self) -> float:
        """Measured: seconds without the draft over seconds with it."""
        return self.seconds / self.draft_seconds

    def __str__(self) -> str:
        return (
            f"as a draft of {self.tokens} tokens: acceptance {self.acceptance:.3f}, {self.greedy:.1%} of the teacher's "
            f"greedy tokens, {self.tokens_a_pass:.2f} tokens a pass; a token costs {self.cost:.2f} of a teacher's; "
            f"{self.speedup:.2f} times as fast as the teacher alone (expected {self.expected_speedup:.2f}), the same "
            f"text for {self.equal:.0%} of the prompts"
        )


@dataclass(frozen=True)
class DraftedText:
    """What the teacher writes after a prompt, and what the student would have written at each place of it.

    Attributes:
        tokens: N token ids, the teacher's greedy text.
        proposed: N token ids, the student's likeliest at each place, after the teacher's tokens before it.
        probability, teacher_probability: of the teacher's token, by the student and by the teacher, (N,).
        acceptance: Σ_v min(P(v), Q(v)) at each place, (N,) float64.
    """

    tokens: list[int]
    proposed: list[int]
    probability: Tensor
    teacher_probability: Tensor
    acceptance: Tensor

    @property
    def same(self) -> Tensor:
        """Whether the student would have written the teacher's token, (N,) bool."""
        return torch.tensor(self.tokens) == torch.tensor(self.proposed)

    def passes(self, tokens: int) -> list[int]:
        """How many tokens each of the teacher's passes gives, if the student proposes `tokens` before each: those that
        it got right, at most `tokens`, and the next one, which is the teacher's own. They add up to N.
        """
        _check_whole(tokens=tokens)
        same, given, position = self.same, [], 0
        while position < len(same):
            right = int(same[position : position + tokens].int().cumprod(0).sum())
            given.append(min(right + 1, len(same) - position))
            position += given[-1]
        return given


def drafted_texts(
    student,
    teacher,
    prompts: Sequence[Sequence[int]],
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    max_new_tokens: int = 64,
) -> list[DraftedText]:
    """The teacher's greedy text after each prompt, and what the student makes of each place: one pass of either model.

    Args and Raises: as `draft_quality`. A prompt after which the teacher writes nothing has an empty text.
    """
    _check_whole(max_new_tokens=max_new_tokens)
    _check_pair(student, teacher, prompts, max_new_tokens)
    written = generate(teacher, prompts, eos_token_id, pad_token_id, max_new_tokens)
    with torch.no_grad(), eval_mode(student), eval_mode(teacher):
        return [_beside(student, teacher, prompt, text) for prompt, text in zip(prompts, written, strict=True)]


def draft_quality(
    student,
    teacher,
    prompts: Sequence[Sequence[int]],
    eos_token_id: int | Sequence[int],
    pad_token_id: int,
    max_new_tokens: int = 64,
    tokens: int = 4,
    repeats: int = 3,
) -> DraftQuality:
    """Measure a student as a draft of its teacher, on prompts.

    Acceptance and tokens a pass are read off one pass of each model over the teacher's own text; time is that of
    `teacher.generate(assistant_model=student)` and of each model decoding alone, one prompt at a time.

    Args:
        student, teacher: causal language models of one tokenizer, on one device.
        prompts: token ids, one list a prompt.
        eos_token_id, pad_token_id: as for `generate`.
        max_new_tokens: where a text that does not end is cut.
        tokens: γ.
        repeats: of each timing, after one that is not counted; ways take turns.

    Raises:
        ValueError: before any work: models that do not generate so (encoders, encoder-decoders, recurrent ones, whose
            states cannot be taken back), vocabularies or devices that differ, too few positions, no prompts, numbers
            below 1; what `generate` refuses. Later: a teacher that writes nothing.
    """
    _check_whole(tokens=tokens, repeats=repeats)
    texts = drafted_texts(student, teacher, prompts, eos_token_id, pad_token_id, max_new_tokens)
    if not any(text.tokens for text in texts):
        raise ValueError(f"draft_quality: the teacher writes nothing after any of the {len(prompts)} prompts.")
    with torch.no_grad(), eval_mode(student), eval_mode(teacher):
        timed = _timed(student, teacher, prompts, eos_token_id, pad_token_id, max_new_tokens, tokens, repeats)
    positions = sum(len(text.tokens) for text in texts)
    return DraftQuality(
        tokens=tokens,
        positions=positions,
        acceptance=float(torch.cat([text.acceptance for text in texts]).mean()),
        greedy=sum(int(text.same.sum()) for text in texts) / positions,
        tokens_a_pass=positions / sum(len(text.passes(tokens)) for text in texts),
        **timed,
    )


def _check_whole(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"draft_quality: {name}={value!r} was asked; use a whole number of at least 1.")


def _check_pair(student, teacher, prompts, max_new_tokens: int) -> None:
    for side, model in (("student", student), ("teacher", teacher)):
        _check_generates(side, model)
    sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"draft_quality: the student's vocabulary has {sizes[0]:,} tokens, the teacher's {sizes[1]:,}; a draft "
            "proposes the teacher's own tokens: give models of one tokenizer."
        )
    for side, model in (("student", student), ("teacher", teacher)):
        positions = longest_row(model)
        longest = max(map(len, prompts), default=0) + max_new_tokens
        if positions is not None and longest > positions:
            raise ValueError(
                f"draft_quality: the longest prompt and {max_new_tokens} new tokens are {longest}, and the {side} has "
                f"{positions} positions; shorten the prompts or lower max_new_tokens."
            )
    if device_of(student) != device_of(teacher):
        raise ValueError(
            f"draft_quality: the student is on {device_of(student)}, the teacher on {device_of(teacher)}; move one."
        )


def _check_generates(side: str, model) -> None:
    config = model.config
    can = callable(getattr(model, "can_generate", None)) and model.can_generate()
    if not can or getattr(config, "is_encoder_decoder", False) or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"draft_quality: the {side} is a {type(model).__name__}, with which transformers does not draft: it takes "
            "causal language models with attention, whose cache can be cut back."
        )


def _beside(student, teacher, prompt: Sequence[int], text: list[int]) -> DraftedText:
    if not text:
        nothing = torch.zeros(0, dtype=torch.float64)
        return DraftedText([], [], nothing, nothing, nothing)
    batch = {"input_ids": torch.tensor([[*prompt, *text]], device=device_of(teacher))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    places = slice(len(prompt) - 1, -1)  # each predicts the token behind it
    ours, theirs = (capture(model, batch).logits[0, places].float() for model in (student, teacher))  # (N, V)
    q, p = ours.softmax(-1), theirs.softmax(-1)
    own = batch["input_ids"][0, len(prompt) :, None]  # (N, 1)
    of_token, theirs_of_token = (side.gather(-1, own)[:, 0].double().cpu() for side in (q, p))
    overlap = torch.minimum(p, q).double().sum(-1).cpu()
    return DraftedText(text, ours.argmax(-1).tolist(), of_token, theirs_of_token, overlap)


def _timed(student, teacher, prompts, eos, pad, max_new_tokens, tokens, repeats) -> dict[str, float]:
    """cost, seconds, draft_seconds and equal, see `DraftQuality`."""
    from transformers import GenerationConfig

    options = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad)
    alone, drafted, own, tokens_of, equal = [], [], [], [0, 0], 0
    with _drafting(student, teacher, options, tokens):
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=device_of(teacher))
            ways = {
                "alone": lambda ids=ids: _write(teacher, ids),
                "drafted": lambda ids=ids: _write(teacher, ids, assistant_model=student),
                "own": lambda ids=ids: _write(student, ids),
            }
            texts = {name: way() for name, way in ways.items()}
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(repeats):
                for name, way in ways.items():
                    _wait(ids.device)
                    began = time.perf_counter()
                    way()
                    _wait(ids.device)
                    seconds[name].append(time.perf_counter() - began)
            for kept, name in ((alone, "alone"), (drafted, "drafted"), (own, "own")):
                kept.append(statistics.median(seconds[name]))
            equal += texts["alone"] == texts["drafted"]
            tokens_of = [tokens_of[0] + len(texts["alone"]), tokens_of[1] + len(texts["own"])]
    return {
        "cost": (sum(own) / tokens_of[1]) / (sum(alone) / tokens_of[0]),
        "seconds": sum(alone),
        "draft_seconds": sum(drafted),
        "equal": equal / len(prompts),
    }


def _write(model, ids: Tensor, **more) -> list[int]:
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **more)[0, ids.shape[1] :].tolist()


@contextmanager
def _drafting(student, teacher, options, tokens: int) -> Iterator[None]:
    """Both decode greedily by `options`, and the student proposes `tokens` at a time whatever it is sure of."""
    found = student.generation_config, teacher.generation_config
    teacher.generation_config = options
    student.generation_config = copy.deepcopy(options)
    student.generation_config.update(
        num_assistant_tokens=tokens, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    try:
        yield
    finally:
        student.generation_config, teacher.generation_config = found


def _wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
