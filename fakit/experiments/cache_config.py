"""The section `teacher_cache` of a configuration: the teacher reads each text once, and the steps read what it said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fakit.experiments.schema import Count, Section

if TYPE_CHECKING:
    from datasets import Dataset

    from fakit.objective.objective import Objective
    from fakit.training.teacher_cache import PlannedCache, TeacherCache

DECIDING = ("dtype", "top_k")
"""Keys that a run's numbers follow from; where the cache lies, and which other texts it holds, changes none."""


class TeacherCacheConfig(Section):
    """A `TeacherCache` in a folder, for runs of the same texts whose terms ask for the same.

    Example:
        >>> TeacherCacheConfig(folder="cache", top_k=64).to_dict()
        {'folder': 'cache', 'top_k': 64}
    """

    section: ClassVar[str] = "teacher_cache"
    folder: str | None = None  # null: given at the command (--teacher-cache)
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "bfloat16"
    top_k: Count | None = None  # only the k largest logits and the mass of the rest; null: all
    rows: Literal["planned", "all"] = "planned"  # the texts that this run's steps see, or all for runs of other plans

    def to_dict(self) -> dict[str, Any]:
        """Without what is as it would be anyway."""
        defaults = {key: field.default for key, field in type(self).model_fields.items()}
        return {key: value for key, value in super().to_dict().items() if value != defaults[key]}

    def build(self, teacher, texts: Dataset, plan: np.ndarray, objective: Objective, tokenizer) -> TeacherCache:
        """The cache, built where it is not there yet. A causal model's logits are kept at labels alone where nothing
        but output terms looks at them.

        Args:
            texts: all training rows, encoded.
            plan: the numbers of those that the steps see.
        """
        from fakit.training.teacher_cache import TeacherCache

        return TeacherCache.build(
            *self._parts(teacher, texts, plan, objective), **self._how(teacher, objective, tokenizer)
        )

    def plan(self, teacher, texts: Dataset, plan: np.ndarray, objective: Objective, tokenizer) -> PlannedCache:
        """What `build` would still write. The teacher reads one row; nothing is written."""
        from fakit.training.teacher_cache import TeacherCache

        return TeacherCache.plan(
            *self._parts(teacher, texts, plan, objective), **self._how(teacher, objective, tokenizer)
        )

    def _parts(self, teacher, texts: Dataset, plan: np.ndarray, objective: Objective):
        assert self.folder is not None, "asked in `cache_of`"
        if self.rows == "planned":
            texts = texts.select(np.unique(plan).tolist())
        return self.folder, teacher, texts, objective

    def _how(self, teacher, objective: Objective, tokenizer) -> dict[str, Any]:
        from fakit.models.kinds import is_causal_lm
        from fakit.training.teacher_cache.content import labels_suffice

        tokens = "labeled" if is_causal_lm(teacher) and labels_suffice(objective) else "all"
        return {"top_k": self.top_k, "dtype": self.dtype, "tokenizer": tokenizer, "tokens": tokens}


def cache_of(configured: TeacherCacheConfig | None, **given: Any) -> TeacherCacheConfig | None:
    """What a configuration and a command ask for together; None where neither asks for a cache. A dtype alone asks for
    none.

    Args:
        given: at the command, by key; None where it says nothing. It goes before the configuration.

    Raises:
        ValueError: a cache without a folder, or a value that it cannot have.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if configured is None and not given.keys() - {"dtype"}:
        return None
    asked = TeacherCacheConfig() if configured is None else configured
    asked = TeacherCacheConfig(**{key: getattr(asked, key) for key in asked.keys()} | given)  # noqa: SIM118 (no dict)
    if not asked.folder:
        raise ValueError(
            f"a teacher cache was asked for ({', '.join(f'{k} {v}' for k, v in asked.to_dict().items())}) and no "
            "folder for it: teacher_cache.folder in the configuration, or --teacher-cache DIR."
        )
    return asked


def without_place(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration's dictionary with what of its teacher cache decides a run's numbers."""
    kept = {key: value for key, value in (config.get("teacher_cache") or {}).items() if key in DECIDING}
    return {k: v for k, v in config.items() if k != "teacher_cache"} | ({"teacher_cache": kept} if kept else {})
