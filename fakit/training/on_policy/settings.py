"""`OnPolicy`: in which steps the student writes, and how."""

import math
import random
from dataclasses import dataclass
from numbers import Real

from fakit.objective.schedules import Schedule, at_step


@dataclass(frozen=True)
class OnPolicy:
    """How often, and how, the student writes.

    Args:
        share: λ, of the steps: each is drawn by itself, for all of its micro-batches. 0: never. A `Schedule` raises it
            while training.
        every: only every so many steps, from the first on; of these, `share`.
        max_new_tokens: an answer that has not ended by then is cut there.
        temperature: of sampling; 0 takes the most likely token.
        top_p: sample from the likeliest tokens that have this much of the probability.
        eos_token_id: ends an answer; any of them, where there are several. None takes those of the tokenizer and of the
            student's generation_config.

    Raises:
        ValueError: a value outside of its range.
    """

    share: float | Schedule = 0.5
    every: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self):
        highest = self.share.highest if isinstance(self.share, Schedule) else self.share
        for name, right, expected in (
            ("share", _number(highest) and 0 <= highest <= 1, "a share of the steps, 0 … 1, or a Schedule of one"),
            ("every", _count(self.every), "a whole number of steps, at least 1"),
            ("max_new_tokens", _count(self.max_new_tokens), "a whole number of tokens, at least 1"),
            (
                "temperature",
                _number(self.temperature) and 0 <= self.temperature < math.inf,
                "0 (greedy) or a finite number above",
            ),
            ("top_p", _number(self.top_p) and 0 < self.top_p <= 1, "a number above 0, up to 1"),
        ):
            if not right:
                raise ValueError(f"OnPolicy({name}={getattr(self, name)!r}): expected {expected}.")

    @property
    def is_on(self) -> bool:
        """Whether the student ever writes."""
        return (self.share.highest if isinstance(self.share, Schedule) else self.share) > 0

    def in_step(self, seed: int, step: int, steps: int | None = None) -> bool:
        """Whether the student writes in this optimizer step; the same in every process."""
        if step % self.every:
            return False
        # a text as seed is hashed with sha512: the same on every platform
        return random.Random(f"{seed} on-policy {step}").random() < at_step(self.share, step, steps)

    @property
    def ways(self) -> dict[str, object]:
        """Of transformers' GenerationConfig."""
        if self.temperature == 0:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        sampled = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return sampled | {"max_new_tokens": self.max_new_tokens}


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
