"""Files: what ships with the kit, files that are whole or absent, and folders that one run has to itself."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


def shipped(name: str) -> Path:
    """The folder `data`, `notebooks`, `configs` or `docs` of the kit: inside an installed wheel,
    or beside `fakit/` in a clone.
    """
    package = Path(__file__).parent
    inside = package / "_shipped" / name  # setup.py puts it there
    return inside if inside.is_dir() else package.parent / name


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """The name to write a file under: it is synced and renamed to `path` at the end, and removed after an error."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file under another name, sync it, and rename it: `path` holds all of `content`, or what it held before.

    Raises:
        OSError: it cannot be written, or only in part (a full disk); nothing is left behind.
    """
    with whole(path) as partial:
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write(file, _bytes(content), Path(path))
        finally:
            os.close(file)


def append_whole(path: str | Path, content: str | bytes) -> None:
    """Append to a file and sync it; where that fails halfway, the file is cut back to what it held.

    Raises:
        OSError: it cannot be written, or only in part.
    """
    path = Path(path)
    is_new = not path.exists()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(file).st_size
        try:
            _write(file, _bytes(content), path)
            os.fsync(file)
        except BaseException:
            os.ftruncate(file, before)
            raise
    finally:
        os.close(file)
    if is_new:
        sync(path.parent)


def sync(path: str | Path) -> None:
    """Have a file, or the names in a folder, reach the disk."""
    path = Path(path)
    if path.is_dir() and os.name != "posix":  # Windows opens no folders
        return
    file = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sha256(path: str | Path) -> str:
    """Of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_room(folder: str | Path, needed: int, what: str) -> None:
    """Make `folder`, and refuse one that cannot be written to, or whose disk has no room for `needed` bytes.

    Raises:
        ValueError: which folder, what it is for, and what was found.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{folder}, where {what} would go, cannot be written to ({error.strerror or error}); choose another folder."
        ) from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder}, where {what} would go, has {_size(free)} free on its disk, and about {_size(needed)} are "
            "needed; free some space, or choose a folder on another disk."
        )


@contextmanager
def locked(path: str | Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock file `path` while open. The lock ends with the process, however it ends; the file is removed.

    Args:
        timeout: seconds to wait for another process (or thread) that holds it; -1 waits until it is free.

    Raises:
        filelock.Timeout: it was not free in time.
    """
    lock = FileLock(path)
    lock.acquire(timeout)
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows removes it after the release
            # while it is held: whoever waits sees that its file has no name any more, and makes a new one
            Path(path).unlink(missing_ok=True)
        lock.release()


@contextmanager
def claimed(path: str | Path, what: str) -> Iterator[None]:
    """`locked`, for what a second run must not wait for.

    Raises:
        ValueError: another process (or thread) holds it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(locked(path, timeout=0))
        except Timeout:
            raise ValueError(
                f"{what} is being written by another run at this moment (it holds {path}); "
                "wait until it has finished, or choose another folder."
            ) from None
        yield


def _write(file: int, content: bytes, path: Path) -> None:
    """All of `content`: a write may be short without an error, and the next one says why."""
    left = memoryview(content)
    while left:
        written = os.write(file, left)
        if written <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        left = left[written:]


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
