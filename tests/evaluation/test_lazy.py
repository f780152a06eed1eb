"""Importing the package is cheap, and every name that it promises is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fakit.evaluation


def test_heavy_packages_are_not_imported():
    code = (
        "import sys, fakit.evaluation\n"
        "print([m for m in ('torch', 'sklearn', 'scipy', 'captum', 'sacrebleu', 'jiwer', 'rouge_score', 'transformers')"
        " if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("name", fakit.evaluation.__all__)
def test_every_name_is_there(name):
    value = getattr(fakit.evaluation, name)
    assert value.__doc__ and value.__module__.startswith("fakit.evaluation.")


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"'bleurt'.*accuracy"):
        _ = fakit.evaluation.bleurt
