"""Execute the notebook sequence and write it as a report: `reports/index.html` and one page a notebook.

Each notebook runs in its own kernel, in its own folder, with `PROFILE` set; a failing one does not stop the others: its
page ends with the traceback, and `exit_status` is then 1.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from fakit.files import shipped, write_whole
from fakit.teaching.results import NotebookResult
from fakit.training.environment import cores, environment

PROFILES = ("quick", "workshop", "full")
EVERY = 15.0  # seconds between two progress lines of one notebook


def find_notebooks(folder: str | Path, only: Iterable[str] | str | None = None) -> list[Path]:
    """Numbered notebooks (`NN_name.ipynb`) of a folder in order; `only` keeps some by number ("02,05") or name.

    Raises:
        ValueError: no such folder, no numbered notebook in it, or an `only` that matches none.
    """
    folder = Path(folder)
    found = sorted(path for path in folder.glob("*.ipynb") if re.match(r"\d\d_", path.name))
    if not found:
        raise ValueError(f"no numbered notebook (NN_name.ipynb) in {folder}: name the folder that holds the sequence")
    if not only:
        return found
    wanted = [part.strip() for part in (only.split(",") if isinstance(only, str) else only)]
    chosen = {
        part: [path for path in found if part in (path.name[:2], str(int(path.name[:2])), path.stem)] for part in wanted
    }
    if missing := [part for part, paths in chosen.items() if not paths]:
        have = ", ".join(path.stem for path in found)
        raise ValueError(f"no notebook {', '.join(missing)} in {folder}; it holds {have}: ask by number, e.g. 02,05")
    return [path for path in found if any(path in paths for paths in chosen.values())]


def read_notebook(path: Path, profile: str) -> NotebookNode:
    """The notebook with `PROFILE` injected in a cell right after the one tagged `parameters`.

    Raises:
        ValueError: a file that is no notebook, or one without such a cell.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises its own, json's and jsonschema's errors
        raise ValueError(f"{path} is not a readable notebook: {error}") from error
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    if not tagged:
        raise ValueError(
            f"{path.name} has no cell tagged 'parameters': tag the cell that sets PROFILE, so that it can be changed"
        )
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    injected = nbformat.v4.new_code_cell(f"PROFILE = {profile!r}", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(tagged[0] + 1, injected)
    return notebook


def describe(notebook: NotebookNode, path: Path, profile: str) -> NotebookResult:
    """Number, title and question of a notebook, from its name and its first markdown cell."""
    text = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    heading = re.search(r"^#\s+(.+)$", text, re.MULTILINE)
    asked = re.search(r"\bQuestion\b\W*(.+?)(?:\n\s*\n|\n\s*[-*|#]|\Z)", text, re.DOTALL | re.IGNORECASE)
    asked = asked or re.search(r"^([^#\n][^\n]*\?)", text, re.MULTILINE)
    title = _plain(heading[1]) if heading else path.stem[3:].replace("_", " ")
    title = re.sub(rf"^{path.name[:2]}\s*[·:.—–-]?\s*", "", title)
    question = _plain(asked[1]) if asked else ""
    return NotebookResult(path.name[:2], path.stem, title, question, profile=profile, page=f"{path.stem}.html")


def told_seconds(notebook: NotebookNode) -> float:
    """How long the header says that the notebook runs ("about 90 s", "about 2 minutes"); 0 where it does not say."""
    text = next((cell.source for cell in notebook.cells if cell.cell_type == "markdown"), "")
    told = re.search(r"\babout (\d+) (s|seconds|min|minutes)\b", text)
    return 0.0 if told is None else float(told[1]) * (1 if told[2].startswith("s") else 60)


def _plain(text: str) -> str:
    """Markdown emphasis, code marks and links removed; one line."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"[*_`|]+(?=\s|\W|$)|(?<!\w)[*_`|]+", "", text).split())


def kernel_environment(jobs: int) -> dict[str, str]:
    """The kernel's environment: threads = cores / jobs, so that notebooks side by side do not fight for cores."""
    threads = str(max(1, cores() // jobs))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}


def execute(
    notebook: NotebookNode,
    result: NotebookResult,
    folder: Path,
    *,
    timeout: float | None = None,
    environment: dict[str, str] | None = None,
    report: Callable[[str], None] = print,
) -> NotebookResult:
    """Run all cells in place; failures are recorded in `result` and not raised.

    Args:
        notebook: as `read_notebook` gives it; it holds outputs (and a traceback) afterwards.
        result: filled in and returned.
        folder: the kernel's working directory.
        timeout: seconds a cell may take; None is no limit.
        environment: the kernel's environment.
        report: takes one line of progress.
    """
    start = time.perf_counter()
    spoken = start

    def tell(cell: NotebookNode, cell_index: int) -> None:
        nonlocal spoken
        if time.perf_counter() - spoken > EVERY:
            spoken = time.perf_counter()
            report(f"{result.name:24} cell {cell_index + 1} of {len(notebook.cells)}, {spoken - start:.0f} s")

    client = NotebookClient(
        notebook,
        timeout=None if timeout is None else int(timeout),
        kernel_name="python3",
        startup_timeout=300,
        resources={"metadata": {"path": str(folder)}},
        store_widget_state=False,
        extra_arguments=[
            "--IPKernelApp.log_level=40"
        ],  # else each kernel warns on our terminal that loopback is not encrypted
        on_cell_start=tell,
    )
    report(f"{result.name:24} start")
    try:
        client.execute(env=environment)
        result.status = "ok"
    except CellExecutionError as error:
        result.status, result.error = "failed", f"{error.ename}: {error.evalue}"[:400]
    except CellTimeoutError:
        result.status, result.error = "failed", f"a cell took longer than {timeout:g} s"
    except DeadKernelError:
        result.status, result.error = "failed", "the kernel died (out of memory?)"
    except Exception as error:
        result.status, result.error = "failed", f"the notebook could not be run: {type(error).__name__}: {error}"[:400]
    if result.status == "failed":
        result.cell = _failing_cell(notebook)
    result.seconds = time.perf_counter() - start
    return result


def _failing_cell(notebook: NotebookNode) -> int | None:
    """The code cell that raised, else the last that was started; counted from 1, without the injected one."""
    code = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    started = [i for i, cell in enumerate(code, 1) if cell.metadata.get("execution")]
    raised = [i for i, cell in enumerate(code, 1) if any(o.output_type == "error" for o in cell.outputs)]
    return (raised or started or [None])[-1]


def machine() -> dict[str, str]:
    """Versions and machine, for the report."""
    found = environment()
    versions, machine = found["versions"], found["machine"]
    return {
        "Python": versions["python"],
        **{name: versions[name] or "not installed" for name in ("torch", "transformers", "fakit")},
        "machine": f"{machine['system']}, {machine['processor']}, {machine['cores']} cores",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def run_notebooks(
    notebooks_dir: str | Path | None = None,
    out: str | Path = "reports",
    profile: str = "quick",
    only: Iterable[str] | str | None = None,
    jobs: int = 2,
    timeout: float | None = 1200,
) -> list[NotebookResult]:
    """Execute the notebooks, `jobs` at a time, and write their pages and the index to `out`; with their outputs,
    to `out`/executed.

    Args:
        notebooks_dir: the folder of `NN_name.ipynb`; the kit's own by default.
        out: where pages go; made if missing. Pages of notebooks that are not run now stay.
        profile: "quick", "workshop" or "full".
        only: numbers or names, "02,05" or a list; all by default.
        jobs: notebooks at a time; each gets cores / jobs threads. Those start first whose header says that they run
            longest, so that none runs on alone at the end.
        timeout: seconds a cell may take, None for no limit.

    Returns:
        One result a notebook that was run, in order; see `exit_status`.

    Raises:
        ValueError: before anything runs: an unknown profile, no such notebook, or one without a parameters cell.
    """
    from fakit.teaching import pages

    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is not known: use one of {', '.join(PROFILES)}")
    if jobs < 1:
        raise ValueError(f"jobs = {jobs}: at least one notebook has to run at a time")
    folder, out = Path(notebooks_dir or shipped("notebooks")).resolve(), Path(out)
    every, chosen = find_notebooks(folder), find_notebooks(folder, only)
    notebooks = {path.stem: read_notebook(path, profile) for path in chosen}
    recorded = _recorded(out)
    results: dict[str, NotebookResult] = {}
    for path in every:
        if path.stem in notebooks:
            results[path.stem] = describe(notebooks[path.stem], path, profile)
        else:
            results[path.stem] = recorded.get(path.stem) or describe(nbformat.read(path, as_version=4), path, "")
    assets, executed = out / "assets", out / "executed"
    for made in (assets, executed):
        made.mkdir(parents=True, exist_ok=True)
    _copy_plotly(assets / "plotly.min.js")
    linked = [result for result in results.values() if result.name in notebooks or result.status != "not run"]
    lock = Lock()

    def report(line: str) -> None:
        with lock:
            print(line, file=sys.stdout, flush=True)

    def run(path: Path) -> None:
        notebook, result = notebooks[path.stem], results[path.stem]
        execute(notebook, result, folder, timeout=timeout, environment=kernel_environment(jobs), report=report)
        nbformat.write(notebook, executed / path.name)  # before the page rewrites its outputs
        thumbnail = pages.centerpiece(notebook)
        with lock:  # pages of two notebooks are not drawn at once: matplotlib's settings are global
            if thumbnail:
                write_whole(assets / f"{path.stem}.svg", thumbnail)
            beside = Path(os.path.relpath(folder, out.resolve())).as_posix()
            page = pages.notebook_page(notebook, result, linked, beside)
            write_whole(out / result.page, page)
        report(str(result))

    with ThreadPoolExecutor(max_workers=min(jobs, len(chosen))) as pool:
        longest_first = sorted(chosen, key=lambda path: -told_seconds(notebooks[path.stem]))
        for done in [pool.submit(run, path) for path in longest_first]:
            done.result()
    thumbnails = {
        name: (assets / f"{name}.svg").read_text(encoding="utf-8")
        for name in results
        if (assets / f"{name}.svg").exists()
    }
    index = pages.index_page(list(results.values()), thumbnails, profile, machine())
    write_whole(out / "index.html", index)
    _record(out, results.values())
    finished = [results[path.stem] for path in chosen]
    failed = [result for result in finished if result.status != "ok"]
    report(f"{len(finished) - len(failed)} of {len(finished)} notebooks ran through; report: {out / 'index.html'}")
    return finished


def exit_status(results: Iterable[NotebookResult]) -> int:
    """0 where every notebook ran through, else 1."""
    return int(any(result.status != "ok" for result in results))


def _copy_plotly(target: Path) -> None:
    """plotly.min.js out of the installed package, once."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    if not target.exists() or target.stat().st_size != len(source.encode()):
        write_whole(target, source)


def _record(out: Path, results: Iterable[NotebookResult]) -> None:
    rows: list[dict[str, Any]] = [asdict(result) for result in results]
    write_whole(out / "results.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def _recorded(out: Path) -> dict[str, NotebookResult]:
    """Results of earlier runs whose pages still stand, so that `only` adds to a report instead of replacing it."""
    try:
        rows = json.loads((out / "results.json").read_text(encoding="utf-8"))
        found = {row["name"]: NotebookResult(**row) for row in rows}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {name: result for name, result in found.items() if result.page and (out / result.page).exists()}
