"""The kit as others install it: an sdist, a wheel of it, and environments outside of the clone that hold the wheel.

What an environment may import beside the wheel is linked from the one that runs the tests, so nothing is fetched: in
`bare` what `pip install fakit` brings, in `full` all of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.readme import blocks, lay_out

ROOT = Path(__file__).parents[2]
# where a notebook has loaded what ships: data and teacher, or recorded runs
LOADED = re.compile(r"load_task\(|session\.load\(|RunStore\.open\(")


def call(*command: str | Path, **how) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **how)


def checked(*command: str | Path, **how) -> str:
    done = call(*command, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, what it unpacks to, and the wheel built from that."""
    out = tmp_path_factory.mktemp("built")
    source = out / "source"  # a build leaves files behind
    left = {".git", ".venv", "build", "dist", "fakit.egg-info", "reports", "runs"}
    shutil.copytree(
        ROOT, source, ignore=lambda folder, names: left if Path(folder) == ROOT else {"__pycache__"} & {*names}
    )
    build = "import sys, setuptools.build_meta as backend; backend.build_{}(sys.argv[1])"
    checked(sys.executable, "-c", build.format("sdist"), out, cwd=source)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    checked(sys.executable, "-c", build.format("wheel"), out, cwd=out / sdist.name.removesuffix(".tar.gz"))
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (found,) = built.glob("*.whl")
    return found


def environment(folder: Path, wheel: Path, *packages: str | Path) -> Path:
    """The Python of a new environment: the wheel installed by pip, and the folders `packages` to import from."""
    checked(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    options = ("--no-deps", "--no-index", "--no-compile", "--quiet")
    checked(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    site = Path(checked(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # only now, so that pip does not meet the clone's own install; a path in a .pth file is read without the .pth files
    # there
    (site / "packages.pth").write_text("".join(f"{folder}\n" for folder in packages))
    return python


def core(wheel: Path) -> set[str]:
    """The distributions that `pip install fakit` brings, those that they need too."""
    (about,) = [folder for folder in zipfile.Path(wheel).iterdir() if folder.name.endswith(".dist-info")]
    lines = importlib.metadata.PathDistribution(about).requires
    queue = [Requirement(line) for line in lines if "extra ==" not in line]
    found: set[str] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name in found or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(needed)
    return found


def link(distributions: set[str], folder: Path) -> None:
    """The modules of installed distributions, and what says that they are installed, into `folder`."""
    folder.mkdir()
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files if ".." not in file.parts}:
            source = Path(distribution.locate_file(top))
            if source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Path:
    """Python where `pip install fakit` was typed."""
    folder = tmp_path_factory.mktemp("bare")
    packages = folder / "site-packages"  # dill tells by this name what is no module of one's own
    link(core(wheel), packages)
    return environment(folder / "environment", wheel, packages)


@pytest.fixture(scope="module")
def full(wheel, tmp_path_factory) -> Path:
    """Python where `pip install "fakit[all]"` was typed."""
    site = [path for path in sys.path if path.endswith("site-packages")]
    return environment(tmp_path_factory.mktemp("full") / "environment", wheel, *site)


def outside(**more: str) -> dict[str, str]:
    """An environment that knows nothing of the clone; nbconvert's templates lie where the tests' packages do."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FAKIT_DATA")}
    return kept | {"JUPYTER_PATH": str(Path(sys.prefix) / "share/jupyter")} | more


# --- sdist and wheel -------------------------------------------------------------------------------------------------


def test_the_sdist_holds_all_that_make_needs(built):
    (folder,) = (path for path in built.glob("fakit-*") if path.is_dir())
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "environment.yml", "CHANGELOG.md", "CITATION.cff"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    for part in ("tests/browser/find.py", "scripts/train_teacher.py", "benchmarks/__main__.py", "docs/scaling.md"):
        assert (folder / part).is_file()


def test_the_wheel_holds_the_kit_its_notebooks_and_what_they_read(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fakit/py.typed", "fakit/layer_maps.py"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert all(top == "fakit" or top.endswith(".dist-info") for top in tops), tops
    for folder in ("configs", "data", "docs", "notebooks"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and not {"__pycache__", ".ipynb_checkpoints", "runs"} & {*path.parts}:
                assert f"fakit/_shipped/{path.relative_to(ROOT).as_posix()}" in names
    assert not [name for name in names if "__pycache__" in name]
    assert wheel.stat().st_size < 40e6


def test_what_the_notebooks_point_to_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    pointed = set()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        pointed |= set(re.findall(r"\.\./([\w./]+)", path.read_text(encoding="utf-8")))
    assert pointed
    for target in pointed:
        assert any(name.startswith(f"fakit/_shipped/{target.rstrip('./')}") for name in names), target


# --- pip install fakit -----------------------------------------------------------------------------------------------

REFUSED = """
import torch

import fakit
from fakit import *  # every public name
from fakit import evaluation, planner, similarity
from fakit.tasks import load_task

print(fakit.__file__, trainer.state.global_step, planner.plan.__name__, len(load_task("reviews").test))
trace = capture(teacher, task.collator(tokenizer)([task.encode("train", tokenizer)[0]]), [0, 4], [1])
print(*trace.hidden_states, *trace.attention_maps(1).shape)
for needs_more in (
    lambda: load_teacher("my-teacher", task="sequence-classification", quantize="8bit"),
    lambda: evaluation.f1([0, 1], [0, 1]),
    lambda: evaluation.cer(["a"], ["a"]),
    lambda: __import__("fakit.figures"),
    lambda: __import__("fakit.experiments.store"),
    lambda: __import__("fakit.widgets.cockpit"),
    lambda: __import__("fakit.teaching.runner"),
):
    try:
        print("not refused:", needs_more())
    except ImportError as error:
        print(error)
"""


def test_the_core_runs_the_readme_and_each_missing_part_is_answered_with_the_line_to_type(bare, tmp_path):
    lay_out(tmp_path)
    said = checked(bare, "-W", "ignore", "-c", blocks()[0] + REFUSED, cwd=tmp_path, env=outside()).splitlines()[-9:]
    place, steps, plan, texts = said[0].rsplit(maxsplit=3)
    assert Path(place).is_relative_to(bare.parents[1])
    assert int(steps) > 0 and plan == "plan" and int(texts) > 100
    assert (tmp_path / "my-student/config.json").is_file()
    assert said[1].startswith("0 4 1 2 ")
    extras = ["quantize", "eval", "eval", "study", "study", "lab", "lab"]
    assert [line.rpartition(": ")[2] for line in said[2:]] == [f'pip install "fakit[{extra}]"' for extra in extras]
    assert said[2].startswith("bitsandbytes is needed here and not installed")


def test_a_command_of_a_missing_part_ends_in_that_line(bare, tmp_path):
    done = call(bare.with_name("fakit"), "run", cwd=tmp_path, env=outside())
    assert done.returncode == 2
    assert re.fullmatch(r'fakit: nbclient, .+ needed here and not installed: pip install "fakit\[lab\]"\n', done.stderr)


# --- pip install "fakit[all]" ----------------------------------------------------------------------------------------


def test_fakit_run_finds_the_notebooks_that_were_installed(full, tmp_path):
    """They are cut after the cell that loads data, teacher or recorded runs:
    the whole sequence is run by tests/browser.
    """
    code = "from fakit.files import shipped; print(shipped('notebooks'))"
    folder = Path(checked(full, "-c", code, cwd=tmp_path, env=outside()).strip())
    assert folder.is_relative_to(full.parents[1])
    names = ["00_start_here", "06_results_analysis"]
    for name in names:
        notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
        code_cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
        (end, *_) = [i for i in code_cells if LOADED.search(notebook.cells[i].source)]
        notebook.cells = notebook.cells[: end + 1]
        nbformat.write(notebook, folder / f"{name}.ipynb")
    done = call(full.with_name("fakit"), "run", "--only", "00,06", cwd=tmp_path, env=outside())
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "reports/results.json").read_text())
    assert {row["name"] for row in results if row["status"] == "ok"} == {*names}
    assert (tmp_path / "reports/00_start_here.html").is_file()
