"""`make bench` compares ways that compute the same, and counts what autograd keeps."""

from __future__ import annotations

import pytest
import torch

from benchmarks.__main__ import attention_kl, compare, kept_mebibytes, main


def test_kept_memory_is_that_of_the_saved_tensors():
    x = torch.ones(2**18, requires_grad=True)  # 1 MiB
    assert kept_mebibytes(lambda: (x * 2).sum()) == 0
    assert kept_mebibytes(lambda: x.exp().sum()) == 1  # the result
    assert kept_mebibytes(lambda: (x * x).sum()) == 1  # x, once


def test_ways_that_differ_are_refused():
    with pytest.raises(ValueError, match="differ"):
        compare(lambda: torch.tensor(1.0), lambda: torch.tensor(2.0), repeats=1)


def test_the_streamed_loss_keeps_less_than_the_maps():
    whole, streamed = compare(*attention_kl(tokens=128), repeats=1)
    maps = 2 * 12 * 128 * 128 * 4 / 2**20  # (B, H, T, T) in float32
    assert whole.mebibytes > 2 * maps
    assert streamed.mebibytes < maps


def test_the_table_has_every_length(capsys):
    main(["--tokens", "16", "32", "--repeats", "1"])
    said = capsys.readouterr().out
    for title in ("attention KL", "layer 4 of 12"):
        for tokens in (16, 32):
            (line,) = [line for line in said.splitlines() if title in line and f"T={tokens} " in line]
            plain, ours, ratio = (float(part) for part in line.split(f"T={tokens}")[1].replace(" s", "").split())
            assert plain > 0 and ours > 0 and ratio > 0
