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
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

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

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            path = self._path(field.name)
            value = coerce(getattr(self, field.name), hints[field.name], path)
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
        for key, value in changes.items():
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
        beside = ", ".join(sorted(p.name for p in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else ""
        raise ValueError(f"{path}: no such file. YAML files in {path.parent}: {beside or 'none'}.")
    text = path.read_text(encoding="utf-8")
    try:
        _refuse_duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        return build(yaml.safe_load(text))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


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
    bounds = {
        "at_least": (lambda bound: value >= bound, "at least"),
        "above": (lambda bound: value > bound, "above"),
        "at_most": (lambda bound: value <= bound, "at most"),
        "below": (lambda bound: value < bound, "below"),
    }
    for name, (holds, words) in bounds.items():
        if name in rules and not holds(rules[name]):
            raise ValueError(f"{path}: found {value}, expected a value {words} {rules[name]}.")


def _refuse_duplicate_keys(node: yaml.Node | None) -> None:
    """YAML's safe_load keeps the last of two equal keys without a word; a study must not."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ValueError(f"{key.value}: given twice, in lines {seen[key.value]} and {line}; keep one.")
            seen[key.value] = line
            _refuse_duplicate_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicate_keys(item)


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
