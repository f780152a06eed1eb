"""The bars that libraries draw, switched off while a run draws its own."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_side_bars() -> Iterator[None]:
    """No progress bars of loading, tokenizing and writing, which take moments here and would run through the run's
    own.
    """
    import datasets
    from transformers.utils import logging

    were_on = datasets.is_progress_bar_enabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on[0]:
            datasets.enable_progress_bars()
        if were_on[1]:
            logging.enable_progress_bar()
