"""What the command line says of an error: one sentence for inputs and machines, the traceback for a bug;
never unsafe advice.
"""

import errno

import pytest
import torch
from safetensors import SafetensorError

from fakit import __main__ as command
from fakit.__main__ import in_a_sentence


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "the memory is used up"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "the memory is used up: CUDA out of memory",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "training.batch_size"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a/model.safetensors"),
            "the disk is full (a/model.safetensors)",
        ),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "the disk is full",
        ),
        (
            RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file data/3"),
            "disk is full",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.yaml"), "No such file or directory: a.yaml"),
        (OSError("It is a pickle. Pass `weights_only=False` if you trust it."), "It is a pickle."),
        (ModuleNotFoundError("No module named 'plotly'", name="plotly"), "'plotly' is needed"),
        (ValueError("layer 7 was requested"), "layer 7 was requested"),
        (RuntimeError("shape '[2]' is invalid"), None),
        (KeyError("labels"), None),
        (TypeError("f() takes no arguments"), None),
    ],
)
def test_one_sentence_or_the_traceback(error, said):
    found = in_a_sentence(error)
    assert found is None if said is None else said in found
    assert "weights_only" not in (found or "")


def raising(error):
    def report(args):
        raise error

    report.__doc__ = "Stands in for a command."
    return report


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capsys):
    monkeypatch.setattr(command, "report", raising(KeyboardInterrupt()))
    assert command.main(["report", "runs"]) == 130
    assert capsys.readouterr().err.startswith("fakit: stopped by Ctrl-C.")
    with pytest.raises(KeyboardInterrupt):
        command.main(["report", "runs", "--debug"])


def test_a_bug_keeps_its_traceback_and_asks_for_a_report(monkeypatch):
    monkeypatch.setattr(command, "report", raising(KeyError("labels")))
    with pytest.raises(KeyError) as found:
        command.main(["report", "runs"])
    assert "please report it" in found.value.__notes__[0]


def test_the_traceback_can_be_asked_for_by_the_environment(monkeypatch, capsys):
    monkeypatch.setattr(command, "report", raising(ValueError("wrong")))
    assert command.main(["report", "runs"]) == 2 and capsys.readouterr().err == "fakit: wrong\n"
    monkeypatch.setenv("FAKIT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wrong"):
        command.main(["report", "runs"])


def test_each_of_several_processes_says_which_it_is(monkeypatch, capsys):
    monkeypatch.setattr(command, "report", raising(ValueError("wrong")))
    monkeypatch.setenv("RANK", "3")
    assert command.main(["report", "runs"]) == 2 and capsys.readouterr().err == "fakit (process 3): wrong\n"
