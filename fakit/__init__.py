"""fakit: feature-alignment knowledge distillation of transformer language models.

    from fakit import load_teacher, shrink, LayerMap, Objective, Features, Outputs, DistillationTrainer

Names, and parts such as `fakit.losses`, are imported when first used, so `import fakit` costs nothing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import pkgutil
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fakit.layer_maps import LayerMap
    from fakit.models.load import load_teacher
    from fakit.models.preflight import preflight
    from fakit.models.shrink import shrink
    from fakit.objective.attention import Attention
    from fakit.objective.features import Features
    from fakit.objective.objective import Objective
    from fakit.objective.outputs import Outputs
    from fakit.objective.schedules import Schedule
    from fakit.objective.task import Task
    from fakit.objective.term import Term
    from fakit.tracing.capture import capture
    from fakit.tracing.trace import Trace
    from fakit.training.teacher_cache import TeacherCache
    from fakit.training.trainer import DistillationTrainer

__version__ = "0.1.0"

# bitsandbytes warns of an optional kernel package it does not need, and of each cast to fp16 that its 8-bit kernels
# make
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Public name → the module that defines it; the block above says the same to type checkers.
_EXPORTS = {
    "Attention": "fakit.objective.attention",
    "DistillationTrainer": "fakit.training.trainer",
    "Features": "fakit.objective.features",
    "LayerMap": "fakit.layer_maps",
    "Objective": "fakit.objective.objective",
    "Outputs": "fakit.objective.outputs",
    "Schedule": "fakit.objective.schedules",
    "Task": "fakit.objective.task",
    "TeacherCache": "fakit.training.teacher_cache",
    "Term": "fakit.objective.term",
    "Trace": "fakit.tracing.trace",
    "capture": "fakit.tracing.capture",
    "load_teacher": "fakit.models.load",
    "preflight": "fakit.models.preflight",
    "shrink": "fakit.models.shrink",
}
__all__ = sorted(_EXPORTS)


def require(extra: str, *packages: str) -> None:
    """Ask for the packages of an optional part of the kit before it is used.

    Args:
        extra: the extra of pyproject.toml that brings them: "quantize", "eval", "study" or "lab".
        packages: by the names that Python imports.

    Raises:
        ImportError: some are not installed; the message ends with the line to type.

    >>> require("lab", "json")
    """
    if missing := [package for package in packages if not _is_installed(package)]:
        verb = "are" if len(missing) > 1 else "is"
        said = f'{", ".join(missing)} {verb} needed here and not installed: pip install "fakit[{extra}]"'
        raise ImportError(said, name=missing[0])


def renamed(**names: str) -> Callable:
    """A function that still takes keywords by their old names, with a warning; for one release.

    >>> @renamed(colour="color")
    ... def dot(color):
    ...     return color
    >>> dot(color="red")
    'red'
    """

    def wrap(function: Callable) -> Callable:
        @functools.wraps(function)
        def accepting(*args: Any, **keywords: Any) -> Any:
            for old in names.keys() & keywords.keys():
                if names[old] in keywords:
                    raise TypeError(
                        f"{function.__qualname__}: {old} is the old name of {names[old]}; give one of them."
                    )
                warn_of_old_name(f"{function.__qualname__}({old}=…)", f"{names[old]}=")
                keywords[names[old]] = keywords.pop(old)
            return function(*args, **keywords)

        return accepting

    return wrap


def warn_of_old_name(old: str, new: str) -> None:
    """Say that `old` is called `new` now, at the place of the caller's caller."""
    warnings.warn(f"{old} is called {new} now; the old name goes with the next release.", FutureWarning, stacklevel=3)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # an import hook that refuses it
        return False


def _parts() -> set[str]:
    return {part.name for part in pkgutil.iter_modules(__path__) if not part.name.startswith("_")}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        setattr(sys.modules[__name__], name, value)
        return value
    if name in _parts():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'fakit' has no {name!r}. It has the names {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_parts()})
