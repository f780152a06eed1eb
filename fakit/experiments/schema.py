"""Checked models that read and write plain mappings: what a YAML file may hold, and an answer to what it may not.

A `Section` is a frozen pydantic model, so its type hints are the schema. However it is built, by keyword in a notebook
or by `from_dict` from a file, every value is checked at once. pydantic finds what is wrong; `Section` says it by the
key's path, with what was found and what is allowed:

    outputs.loss: 'foward_kl' is not one of forward_kl, reverse_kl, jsd, logit_mse. Did you mean 'forward_kl'?
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fakit import warn_of_old_name
from fakit.files import write_whole


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic reads it as 1 or 0
        raise ValueError
    return value


Whole = Annotated[int, Field(strict=True, lt=2**63)]
Number = Annotated[float, BeforeValidator(_no_truth), Field(allow_inf_nan=False)]  # YAML's 5e-4 is text
Truth = Annotated[bool, Field(strict=True)]
Count = Annotated[Whole, Field(ge=1)]
Natural = Annotated[Whole, Field(ge=0)]
Weight = Annotated[Number, Field(ge=0.0)]


class Section(BaseModel):
    """Base of every configuration. `section` is the path its keys have in a file, "" at the top."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    section: ClassVar[str] = ""
    shorthands: ClassVar[tuple[str, ...]] = ()  # keys that stand for others, beside those of the fields
    old_names: ClassVar[Mapping[str, str]] = {}  # of keys and of chosen values; accepted with a warning for one release

    def __init__(self, *values: Any, **by_key: Any):
        given = self._by_current_names(dict(zip(self.keys(), values, strict=False)) | by_key)
        if len(values) > len(self.keys()):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.keys())}; found {len(values)} values.")
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise ValueError(self._answer(error, given)) from None

    @model_validator(mode="after")
    def _checked(self) -> Self:
        self._check()
        return self

    def _check(self) -> None:
        """Rules that concern several keys at once; raises ValueError."""

    @classmethod
    def _answer(cls, error: ValidationError, given: Mapping[str, Any]) -> str:
        """The first thing that is wrong, in a sentence; unknown keys first."""
        found = sorted(error.errors(include_url=False), key=lambda wrong: wrong["type"] != "extra_forbidden")
        kind, where = found[0]["type"], cls.section or "the top level"
        if not found[0]["loc"]:  # of `_check`
            return str(found[0]["ctx"]["error"])
        key = str(found[0]["loc"][0])
        path = cls._path(key)
        if kind == "extra_forbidden":
            keys = [*cls.shorthands, *cls.keys()]
            return f"{path}: unknown key at {where}; the keys are {', '.join(keys)}.{did_you_mean(key, keys)}"
        if kind == "missing" and key not in given:
            return f"{path}: missing at {where}; found {', '.join(given) or 'no key'}."
        of_key = [wrong for wrong in found if wrong["loc"][0] == key]
        value, kinds = given[key], kinds_of(cls.model_fields[key])
        for wrong in of_key:
            if wrong["type"] == "value_error" and str(wrong["ctx"]["error"]):  # of a section below, or of a validator
                return str(wrong["ctx"]["error"])
            if wrong["type"] in _BOUNDS and len(wrong["loc"]) <= 2:
                ((_, bound),) = wrong["ctx"].items()
                if bound == 2**63:
                    return f"{path}: found {value:.3g}, and nothing here counts that far."
                return f"{path}: found {value}, expected a value {_BOUNDS[wrong['type']]} {bound}."
        choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
        if isinstance(value, str) and choices:
            return f"{path}: {value!r} is not one of {', '.join(choices)}.{did_you_mean(value, choices)}"
        expected = " or ".join(_words(kind) for kind in kinds if kind is not types.NoneType or len(kinds) == 1)
        off = types.NoneType in kinds and str(value).lower() in ("none", "off", "no", "false")
        return f"{path}: found {describe(value)}, expected {expected}.{' Write null to leave it out.' if off else ''}"

    @classmethod
    def _path(cls, key: str) -> str:
        return f"{cls.section}.{key}" if cls.section else key

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from a plain mapping. Raises ValueError that names the key, what was found and what is allowed."""
        if not isinstance(data, Mapping):
            where = cls.section or "the top level"
            raise ValueError(f"{where}: found {describe(data)}, expected a mapping with keys {', '.join(cls.keys())}.")
        return cls(**{str(key): value for key, value in data.items()})

    @classmethod
    def _by_current_names(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        current = {}
        for key, value in data.items():
            name = cls.old_names.get(key, key)
            if name != key:
                warn_of_old_name(cls._path(key), cls._path(name))
            if name in current or (name != key and name in data):
                raise ValueError(f"{cls._path(key)}: is the old name of {cls._path(name)}; give one of them.")
            if isinstance(value, str) and value in cls.old_names:
                warn_of_old_name(f"{cls._path(key)}: {value}", cls.old_names[value])
                value = cls.old_names[value]
            if isinstance(value, Mapping) and name in cls.model_fields and _is_section(cls.model_fields[name]):
                value = {str(key): of_key for key, of_key in value.items()}
            current[name] = value
        return current

    @classmethod
    def keys(cls) -> list[str]:
        return list(cls.model_fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, lists and scalars: what JSON and YAML hold. `from_dict` gives back an equal object."""
        return {key: _plain(getattr(self, key)) for key in self.keys()}

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file. Raises ValueError naming the file for a missing file, bad YAML, wrong keys or values."""
        return from_file(path, cls.from_dict)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The YAML text; also written to `path` when one is given."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        if path is not None:
            write_whole(path, text)
        return text

    def replace(self, **changes: Any) -> Self:
        """A checked copy with some keys changed; keys may be dotted.

        Example:
            >>> config.replace(seed=3, features=None, **{"training.steps": 50})
        """
        own: dict[str, Any] = {}
        nested: dict[str, dict[str, Any]] = {}
        for key, value in self._by_current_names(changes).items():
            head, _, rest = key.partition(".")
            if head not in self.keys():
                known = [*self.shorthands, *self.keys()]
                raise ValueError(
                    f"{self._path(key)}: unknown key; the keys are {', '.join(known)}." + did_you_mean(head, known)
                )
            if rest:
                nested.setdefault(head, {})[rest] = value
            else:
                own[head] = value
        for head, inner in nested.items():
            current = own.get(head, getattr(self, head))
            if not isinstance(current, Section):
                raise ValueError(
                    f"{self._path(head)}: is {current!r}, so its keys {', '.join(inner)} cannot be changed one by one; "
                    f"give the whole of it: replace({head}={{...}})."
                )
            own[head] = current.replace(**inner)
        return type(self)(**{key: getattr(self, key) for key in self.keys()} | own)

    def _repr_markdown_(self) -> str:
        return f"```yaml\n{self.to_yaml()}```"


def from_file(path: str | Path, build):
    """`build(mapping)` of a YAML file; every ValueError gets the file's name in front."""
    path = Path(path)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        beside = ", ".join(sorted(p.name for p in folder.glob("*.y*ml"))) if folder.is_dir() else ""
        what = "is a folder, where a YAML file was expected" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {what}. YAML files in {folder}: {beside or 'none'}.")
    try:
        return build(_read_yaml(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {_yaml_error(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


LARGEST = 1_000_000
"""Bytes, and values after anchors are filled in, of a configuration: what is larger is no configuration."""


def _read_yaml(path: Path) -> Any:
    """What a YAML file holds, read safely. Raises ValueError, or a YAMLError with its line."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(
            f"{size:,} bytes are no configuration (at most {LARGEST:,}); give the YAML file, not its data."
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = (
            "UTF-16"
            if content[:2] in (b"\xff\xfe", b"\xfe\xff")
            else f"byte {content[error.start]:#04x} at {error.start}"
        )
        raise ValueError(f"is no text in UTF-8 (found {found}); save it as UTF-8, or give the YAML file.") from error
    return _plain_yaml(text)


def _plain_yaml(text: str) -> Any:
    try:
        _check_nodes(yaml.compose(text, Loader=yaml.SafeLoader), {})
    except RecursionError as error:
        raise ValueError("is nested too deeply to be a configuration.") from error
    return yaml.safe_load(text)


def settings(pairs: Iterable[str]) -> dict[str, Any]:
    """`KEY=VALUE` of a command line as what `Section.replace` takes: the key dotted, the value as YAML reads it.

    Raises:
        ValueError: no `=`, no key, a key given twice, or a value that is no YAML.

    Example:
        >>> settings(["training.steps=50", "features=null"])
        {'training.steps': 50, 'features': None}
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {pair!r}: found no KEY=VALUE; write --set training.steps=50.")
        if key in found:
            raise ValueError(f"--set {key}: given twice; keep one.")
        try:
            found[key] = _plain_yaml(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {key}: {_yaml_error(error)}") from error
        except ValueError as error:
            raise ValueError(f"--set {key}: {error}") from error
    return found


def _yaml_error(error: yaml.YAMLError) -> str:
    """YAML's complaint in one line: where, what, and for the usual slip its cure."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    cure = "; YAML is indented with spaces, not tabs" if "\\t" in problem else ""
    context = f" {error.context}" if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: no valid YAML{context}: {problem}{cure}."


def describe(value: Any) -> str:
    """A value and its kind, in few words: "'yes' (text)"."""
    kinds = {bool: "yes/no", str: "text", int: "whole number", float: "number", type(None): "nothing"}
    return f"{value!r:.80} ({kinds.get(type(value), type(value).__name__)})"


def did_you_mean(found: Any, allowed: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for a near miss, else an empty string."""
    near = difflib.get_close_matches(str(found), [str(name) for name in allowed], n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


_BOUNDS = {
    "greater_than_equal": "at least",
    "greater_than": "above",
    "less_than_equal": "at most",
    "less_than": "below",
}
"""pydantic's kinds of errors, in words."""


def kinds_of(hint: Any) -> list[Any]:
    """The kinds of value that a field takes, of `A | B` each, without what is said of them beside."""
    hint = getattr(hint, "annotation", hint)
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [kind for arm in typing.get_args(hint) for kind in kinds_of(arm)]
    return [hint]


def _is_section(hint: Any) -> bool:
    return any(isinstance(kind, type) and issubclass(kind, Section) for kind in kinds_of(hint))


def _words(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    origin, inside = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind in names:
        return names[kind]
    if origin is Literal:
        return ", ".join(inside)
    if origin is dict:
        return "a mapping"
    if origin is tuple:
        inner = kinds_of(inside[0])[0]
        kinds = {int: "whole numbers", str: "names"}
        return f"a list of {kinds.get(inner, 'pairs of whole numbers' if typing.get_args(inner) else 'mappings')}"
    return f"a mapping with keys {', '.join(kind.keys())}"


def _check_nodes(node: yaml.Node | None, sizes: dict[int, int]) -> int:
    """Refuse what YAML would take without a word, and what would fill the memory; the number of values below a node.

    `safe_load` keeps the last of two equal keys, reads 010 as 8 and 1:30 as 90, and fills in an anchor as often as it
    is named: also inside itself, and nine times nine times.

    Args:
        sizes: of the nodes seen so far, by id; 0 while a node is being looked at.
    """
    if node is None:
        return 0
    line = node.start_mark.line + 1
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ValueError(
                f"line {line}: this value holds itself, by an anchor (&) named again inside (*); write it out."
            )
        return sizes[id(node)]
    sizes[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            place = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {place}: a key is a list or a mapping; keys are names.")
            if key.value in seen:
                raise ValueError(f"{key.value}: given twice, in lines {seen[key.value]} and {place}; keep one.")
            seen[key.value] = place
            total += _check_nodes(value, sizes)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_check_nodes(item, sizes) for item in node.value)
    elif node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and re.match(r"[-+]?0_*\d|.*:", node.value):
        raise ValueError(
            f"line {line}: YAML reads {node.value} as a number to base 8 or 60; write it plainly, or in quotes for "
            "text."
        )
    if total > LARGEST:
        raise ValueError(
            f"line {line}: with its anchors (&, *) filled in this is more than {LARGEST:,} values; write out what is "
            "meant."
        )
    sizes[id(node)] = total
    return total


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError for what is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: found {value!r}, expected a whole number, at least {least}.")
