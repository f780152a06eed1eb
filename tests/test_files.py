"""Files are whole or absent: short writes, full disks, kills; and a folder that one run has to itself."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fakit import files
from fakit.experiments.store import RunStore
from fakit.training.session.record import Record


@pytest.fixture
def full_after(monkeypatch):
    """A disk that takes so many bytes more, some at a time, then none."""

    def arm(room: int, piece: int = 7):
        write, left = os.write, [room]

        def short(file, content):
            if not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            taken = write(file, bytes(content[: min(piece, left[0])]))
            left[0] -= taken
            return taken

        monkeypatch.setattr(files.os, "write", short)

    return arm


def test_short_writes_are_carried_on(full_after, tmp_path):
    full_after(10_000)
    files.write_whole(tmp_path / "a.json", "x" * 100)
    files.append_whole(tmp_path / "b.jsonl", "one\n" * 20)
    files.append_whole(tmp_path / "b.jsonl", b"two\n")
    assert (tmp_path / "a.json").read_text() == "x" * 100
    assert (tmp_path / "b.jsonl").read_text() == "one\n" * 20 + "two\n"


@pytest.mark.parametrize("room", [0, 5, 60])
def test_a_full_disk_leaves_what_was_there(room, full_after, tmp_path):
    (tmp_path / "a.json").write_text("before")
    (tmp_path / "b.jsonl").write_text("before\n")
    full_after(room)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(tmp_path / "a.json", "after " * 50)
    with pytest.raises(OSError, match="No space left"):
        files.append_whole(tmp_path / "b.jsonl", "after\n" * 50)
    assert (tmp_path / "a.json").read_text() == "before"
    assert (tmp_path / "b.jsonl").read_text() == "before\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.jsonl"]


def test_a_record_that_a_full_disk_cuts_is_absent_and_can_be_written_again(full_after, tmp_path, monkeypatch):
    store = RunStore.open(tmp_path)
    store.append_run({"run_id": "a", "score": 0.5})
    with monkeypatch.context() as patched:
        write = os.write
        patched.setattr(
            files.os,
            "write",
            lambda file, content: write(file, bytes(content[:9])) if len(content) > 20 else _no_space(),
        )
        with pytest.raises(OSError, match="No space left"):
            store.append_run({"run_id": "b", "score": 0.25})
    assert [record["run_id"] for record in RunStore(tmp_path).records()] == ["a"]  # and no warning of a cut line
    store.append_run({"run_id": "b", "score": 0.25})
    assert [record["run_id"] for record in RunStore(tmp_path).records()] == ["a", "b"]


def _no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_session_record_is_whole_or_the_one_before(full_after, tmp_path):
    record = Record()
    record.note(1, "first")
    record.write(tmp_path)
    record.note(2, "second " * 40)
    full_after(50)
    with pytest.raises(OSError, match="No space left"):
        record.write(tmp_path)
    assert json.loads((tmp_path / "session.json").read_text())["log"] == [[1, "first"]]


def test_a_folder_that_cannot_be_written_or_is_full_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/student, where checkpoints would go, cannot be written to"):
        files.check_room(tmp_path / "file" / "student", 0, "checkpoints")

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(files.tempfile, "TemporaryFile", read_only)
        with pytest.raises(ValueError, match=r"cannot be written to \(Read-only file system\); choose another folder"):
            files.check_room(tmp_path / "student", 0, "checkpoints")
    with pytest.raises(ValueError, match=r"free on its disk, and about 1000000000\.0 GB are needed"):
        files.check_room(tmp_path / "student", 10**18, "checkpoints")
    files.check_room(tmp_path / "student", 1000, "checkpoints")
    assert list((tmp_path / "student").iterdir()) == []


_HOLD = """
import sys, time
from fakit.files import claimed
with claimed(sys.argv[1], "the student"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_claim_is_refused_while_it_is_held_and_ends_with_its_process(tmp_path):
    path = tmp_path / "run.lock"
    with (
        files.claimed(path, "runs/student"),
        pytest.raises(
            ValueError, match=r"runs/student is being written by another run at this moment \(it holds .*run\.lock\)"
        ),
        files.claimed(path, "runs/student"),
    ):
        pass
    assert not path.exists()
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another run"), files.claimed(path, "the student"):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with files.claimed(path, "the student"):
        assert path.exists()


_COUNT = """
import sys
from pathlib import Path
from fakit.files import locked
count = Path(sys.argv[1])
for _ in range(50):
    with locked(count.with_suffix(".lock")):
        count.write_text(str(int(count.read_text()) + 1))
"""


def test_locked_waits_for_its_turn_and_leaves_no_file(tmp_path):
    count = tmp_path / "count.txt"
    count.write_text("0")
    command = [sys.executable, "-c", _COUNT, str(count)]
    writers = [subprocess.Popen(command, cwd=Path(__file__).parents[1]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert count.read_text() == "150"  # two at once would lose counts
    assert [path.name for path in tmp_path.iterdir()] == ["count.txt"]


def test_a_file_is_named_only_once_it_is_whole(tmp_path):
    path = tmp_path / "weights.bin"
    with files.whole(path) as partial:
        partial.write_bytes(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"
    with pytest.raises(KeyError), files.whole(path) as partial:
        partial.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"all of it"
    assert [file.name for file in tmp_path.iterdir()] == ["weights.bin"]
