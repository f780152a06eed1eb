"""What became of each notebook of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class NotebookResult:
    """What became of one notebook.

    Attributes:
        number: its two digits, e.g. "02".
        name: file name without suffix, e.g. "02_cka_similarity".
        title: its first heading.
        question: the question its header asks.
        status: "ok", "failed" or "not run".
        seconds: wall time.
        profile: the profile it ran with.
        page: file name of its page.
        cell: the failing code cell's number, as JupyterLab's In [n] counts after Run All; None where none failed.
        error: the failure in one line, empty where there is none.
    """

    number: str
    name: str
    title: str
    question: str
    status: str = "not run"
    seconds: float = 0.0
    profile: str = ""
    page: str = ""
    cell: int | None = None
    error: str = ""

    @property
    def label(self) -> str:
        """Short text of a link: number and title."""
        return f"{self.number} {self.title}"

    def __str__(self) -> str:
        where = f", cell {self.cell}" if self.cell else ""
        return f"{self.name:24} {self.status:7} {self.seconds:6.1f} s" + (
            f"{where}: {self.error}" if self.error else ""
        )
