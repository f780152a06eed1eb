"""What the command line says of an error: one sentence for an input or a machine that does not do, nothing for a bug, which keeps its traceback."""

from __future__ import annotations

import errno
import re

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|Unable to allocate|bad_alloc|bad allocation", re.IGNORECASE
)
_NO_SPACE = re.compile(
    r"No space left on device|PytorchStreamWriter failed|os error 28|Disk quota exceeded", re.IGNORECASE
)
MEMORY = (
    "the memory is used up: {said} Lower training.batch_size (and raise training.accumulation by as much), training.max_length or the student's "
    "size, or give teacher.quantize; `fakit plan` says beforehand what fits."
)
DISK = (
    "the disk is full{where}: free space, or name another folder (--out, out:); with training.save_every set, --resume goes on from the last "
    "whole checkpoint."
)


def in_a_sentence(error: BaseException) -> str | None:
    """The sentence for an error, notes included; None for one that nobody foresaw: a bug, to be shown with its traceback."""
    said = _said(error)
    if said is None:
        return None
    return "\n".join([said, *getattr(error, "__notes__", [])])


def _said(error: BaseException) -> str | None:
    text = str(error)
    # the message of a library that met the full disk or memory first; both may stand below an error of another kind
    if isinstance(error, MemoryError) or (_OUT_OF_MEMORY.search(text) and not isinstance(error, ValueError)):
        return MEMORY.format(said=_first_line(text))
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _NO_SPACE.search(text):
        file = getattr(error, "filename", None)
        return DISK.format(where=f" ({file})" if file else "")
    if isinstance(error, ValueError):
        return text
    if isinstance(error, OSError):
        if error.strerror and error.filename:
            return f"{error.strerror}: {error.filename}"
        return _safe(error) if text else f"the system refused a file ({type(error).__name__})."
    if isinstance(error, ImportError) and error.name and not error.name.startswith("fakit"):
        return (
            f"the package {error.name!r} is needed for this and not installed: pip install {error.name.split('.')[0]}."
        )
    if type(error).__name__ == "BrokenProcessPool":
        return (
            "a worker process ended without a word, as where the system kills one that takes too much memory; lower --workers. What is recorded "
            "stays, and the same command goes on from there."
        )
    return None


def _first_line(text: str) -> str:
    line = next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "")
    return f"{line[:200].rstrip('.')}." if line else ""


def _safe(error: BaseException) -> str:
    from fakit.models.pretrained import first_sentence

    return first_sentence(error)
