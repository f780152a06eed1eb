"""Checked dataclasses that read and write plain mappings: what a YAML file may hold, and an answer to what it may not.

A `Section` is a frozen dataclass whose type hints are the schema. However it is built, by keyword in a notebook or by
`from_dict` from a file, every value is checked at once, and an error names the key with its path, what was found and
what is allowed:

    outputs.loss: 'foward_kl' is not one of forward_kl, reverse_kl, jsd, logit_mse. Did you mean 'forward_kl'?
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from fakit import warn_of_old_name
from fakit.files import write_whole


def option(default: Any = dataclasses.MISSING, *, choices=None, at_least=None, above=None, at_most=None, below=None):
    """A dataclass field with the values it may take."""
    rules = {"choices": choices, "at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {name: rule for name, rule in rules.items() if rule is not None}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Section:
    """Base of every configuration dataclass. `section` is the path its keys have in a file, "" at the top."""

    section: ClassVar[str] = ""
    old_names: ClassVar[Mapping[str, str]] = {}  # of keys and of chosen values; accepted with a warning for one release

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            path = self._path(field.name)
            value = coerce(getattr(self, field.name), hints[field.name], path)
            if isinstance(value, str) and value in self.old_names and field.metadata.get("choices"):
                warn_of_old_name(f"{path}: {value}", self.old_names[value])
                value = self.old_names[value]
            _check_rules(value, field.metadata, path)
            object.__setattr__(self, field.name, value)  # frozen for everyone else: 1 becomes 1.0, a list a tuple
        self._check()

    def _check(self) -> None:
        """Rules that concern several keys at once; raises ValueError."""

    @classmethod
    def _path(cls, key: str) -> str:
        return f"{cls.section}.{key}" if cls.section else key

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from a plain mapping. Raises ValueError that names the key, what was found and what is allowed."""
        where = cls.section or "the top level"
        if not isinstance(data, Mapping):
            raise ValueError(f"{where}: found {describe(data)}, expected a mapping with keys {', '.join(cls.keys())}.")
        data = cls._by_current_names(data)
        for key in data:
            if key not in cls.keys():  # noqa: SIM118 — keys() is ours
                raise ValueError(
                    f"{cls._path(str(key))}: unknown key at {where}; the keys are {', '.join(cls.keys())}."
                    + did_you_mean(key, cls.keys())
                )
        missing = [f.name for f in dataclasses.fields(cls) if _is_required(f) and f.name not in data]
        if missing:
            raise ValueError(
                f"{cls._path(missing[0])}: missing at {where}; found {', '.join(map(str, data)) or 'no key'}."
            )
        return cls(**data)

    @classmethod
    def _by_current_names(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        current = {}
        for key, value in data.items():
            name = cls.old_names.get(str(key), key)
            if name != key:
                warn_of_old_name(cls._path(key), cls._path(name))
            if name in current or (name != key and name in data):
                raise ValueError(f"{cls._path(key)}: is the old name of {cls._path(name)}; give one of them.")
            current[name] = value
        return current

    @classmethod
    def keys(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, lists and scalars: what JSON and YAML hold. `from_dict` gives back an equal object."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

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
                raise ValueError(
                    f"{self._path(key)}: unknown key; the keys are {', '.join(self.keys())}."
                    + did_you_mean(head, self.keys())
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
        return dataclasses.replace(self, **own)

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


def coerce(value: Any, hint: Any, path: str) -> Any:
    """`value` as `hint` asks for it (YAML's 5e-4 is text, 1 is no float, a sequence is a list), or ValueError."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and types.NoneType in arms:
        return None
    for arm in arms:
        found = _as(value, arm)
        if found is not _NO:
            return found
    expected = " or ".join(_words(arm) for arm in arms)
    off = types.NoneType in arms and str(value).lower() in ("none", "off", "no", "false")
    cure = " Write null to leave it out." if off else ""
    raise ValueError(f"{path}: found {describe(value)}, expected {expected}.{cure}")


def describe(value: Any) -> str:
    """A value and its kind, in few words: "'yes' (text)"."""
    kinds = {bool: "yes/no", str: "text", int: "whole number", float: "number", type(None): "nothing"}
    return f"{value!r:.80} ({kinds.get(type(value), type(value).__name__)})"


def did_you_mean(found: Any, allowed: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for a near miss, else an empty string."""
    near = difflib.get_close_matches(str(found), [str(name) for name in allowed], n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


_NO = object()  # "this hint does not take the value", where None is itself a value


def _as(value: Any, hint: Any) -> Any:
    """`value` as one hint (a Section, bool, int, float, str, dict, tuple[X, ...], tuple[X, Y]); `_NO` if it is none."""
    origin = typing.get_origin(hint) or hint
    if issubclass(origin, Section):
        return value if isinstance(value, origin) else origin.from_dict(value) if isinstance(value, Mapping) else _NO
    if origin is bool or origin is str:
        return value if isinstance(value, origin) else _NO
    if origin is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _NO
    if origin is float:
        try:
            number = _NO if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            return _NO
        return number if number is not _NO and math.isfinite(number) else _NO
    if origin is dict:
        return dict(value) if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) else _NO
    if origin is tuple and isinstance(value, list | tuple):
        arms = typing.get_args(hint)
        inner = [arms[0]] * len(value) if arms[-1] is Ellipsis else list(arms)
        if len(inner) != len(value):
            return _NO
        items = tuple(_as(item, arm) for item, arm in zip(value, inner, strict=True))
        return _NO if any(item is _NO for item in items) else items
    return _NO


def _words(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    if hint in names:
        return names[hint]
    origin = typing.get_origin(hint) or hint
    if origin is dict:
        return "a mapping"
    if origin is tuple:
        inner = typing.get_args(hint)[0]
        kinds = {int: "whole numbers", str: "names"}
        return f"a list of {kinds.get(inner, 'pairs of whole numbers' if typing.get_args(inner) else 'mappings')}"
    return f"a mapping with keys {', '.join(hint.keys())}"


def _check_rules(value: Any, rules: Mapping[str, Any], path: str) -> None:
    if value is None:
        return
    choices = rules.get("choices")
    if choices is not None and isinstance(value, str) and value not in choices:
        raise ValueError(f"{path}: {value!r} is not one of {', '.join(choices)}.{did_you_mean(value, choices)}")
    if not isinstance(value, int | float):
        return
    if abs(value) >= 2**63:
        raise ValueError(f"{path}: found {value:.3g}, and nothing here counts that far.")
    bounds = {
        "at_least": (lambda bound: value >= bound, "at least"),
        "above": (lambda bound: value > bound, "above"),
        "at_most": (lambda bound: value <= bound, "at most"),
        "below": (lambda bound: value < bound, "below"),
    }
    for name, (holds, words) in bounds.items():
        if name in rules and not holds(rules[name]):
            raise ValueError(f"{path}: found {value}, expected a value {words} {rules[name]}.")


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


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
