"""Rows of CSV, TSV, JSON and parquet files as they stand there: cells are text, nothing is guessed,
what does not fit is named with its line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
# UTF-32's mark begins with UTF-16's, so it is looked for first.
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
# Text in which quotes stand only where RFC 4180 has them: around whole cells, and doubled inside these.
QUOTED_TSV = re.compile(r'(?:(?:"(?:[^"]++|"")*+"|[^"\t\r\n]*+)(?:\t|\r\n?|\n|\Z))*+')
ESCAPED_QUOTE = re.compile(r'(?:^|\t)"(?:[^"\t\r\n]++|"")*?""(?:[^"\t\r\n]++|"")*+"(?:\t|\r|\n|\Z)', re.MULTILINE)


def suffix_of(path: Path) -> str:
    """A file's suffix in small letters, below .gz where it is compressed."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def format_of(path: Path) -> str:
    """The suffix that says how a file is read, below .gz where it is compressed.

    Raises:
        ValueError: a suffix that is not read.
    """
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise ValueError(f"{path.name}: files that end in {path.suffix!r} are not read; {', '.join(SUFFIXES)} are.")
    return suffix


def read_file(path: Path, wanted: Collection[str] = ()) -> Dataset:
    """The rows of a file; an empty cell, a JSON null and a key that an object lacks are None.

    Cells of CSV and TSV stay the text they are ("00014", "NA"). A column of JSON that mixes text and numbers is text.

    Args:
        path: .csv, .tsv, .jsonl, .json, each also with .gz, or .parquet.
        wanted: columns that have to be read. Others are left out where no column of one type can hold them.

    Raises:
        ValueError: a file that cannot be read as what its name says; with the line, and what stands there.
    """
    suffix = format_of(path)
    try:
        if suffix == ".parquet":
            return _parquet(path)
        text = text_of(path)
        if suffix in (".json", ".jsonl"):
            return _from_objects(_objects(text), wanted)
        return _from_table(_csv(text) if suffix == ".csv" else _tsv(text))
    except (ValueError, OSError, EOFError, zlib.error) as error:  # parser errors of pyarrow are ValueErrors
        raise ValueError(f"{path} cannot be read as {suffix[1:]}: {error}") from error


def text_of(path: Path) -> str:
    """A file's text, by its byte-order mark or as UTF-8. Raises ValueError with the line that is something else."""
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        content = gzip.decompress(content)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].decode(encoding, "ignore").count("\n")
        raise ValueError(
            f"line {line} is not {encoding.upper()} (byte 0x{content[error.start]:02x}: {error.reason}). Latin-1, "
            "Windows-1252 and UTF-16 without a byte-order mark are not guessed; save the file as UTF-8 (iconv -f "
            f"LATIN1 -t UTF-8 {path.name})."
        ) from error
    if "\0" in text:
        line = 1 + text[: text.index("\0")].count("\n")
        raise ValueError(
            f"line {line} holds a NUL character, as UTF-16 without a byte-order mark and binary files do; save the "
            "file as UTF-8."
        )
    text = text.lstrip("\ufeff")
    if not text.strip():
        raise ValueError("the file is empty.")
    return text


# CSV and TSV: (line, cells) of every row, the header first


def _csv(text: str) -> list[tuple[int, list[str]]]:
    return _checked(list(_rows(text, delimiter=",")))


def _tsv(text: str) -> list[tuple[int, list[str]]]:
    """Tab-separated cells, in which a quote is a character like any other (GLUE),
    unless the file quotes cells as spreadsheets do.

    It does where every quote stands as RFC 4180 has it, and either the rows fit the header in no other way, or a quoted
    header or a doubled quote inside a quoted cell shows it.
    """
    quoted = '"' in text and QUOTED_TSV.fullmatch(text) is not None
    plain = list(_rows(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    if quoted and (text.startswith('"') or ESCAPED_QUOTE.search(text) or _misfit(plain)):
        return _checked(list(_rows(text, delimiter="\t")))
    return _checked(plain)


def _rows(text: str, **dialect) -> Iterator[tuple[int, list[str]]]:
    with _long_cells():
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
        start = 1
        try:
            for cells in reader:
                if cells:  # a blank line is no row
                    yield start, cells
                start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"the row at line {start}: {error}. A cell with quotes is quoted as a whole, and each quote in it "
                "doubled."
            ) from error


@contextmanager
def _long_cells() -> Iterator[None]:
    """A cell may hold a whole document; the csv module refuses more than 131,072 characters by default."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _misfit(rows: list[tuple[int, list[str]]]) -> tuple[int, list[str]] | None:
    """The first row with another number of cells than the header."""
    return next((row for row in rows if len(row[1]) != len(rows[0][1])), None)


def _checked(rows: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    header = rows[0][1]
    if misfit := _misfit(rows):
        line, cells = misfit
        raise ValueError(
            f"the row at line {line} has {len(cells)} cells, the header has {len(header)} ({', '.join(header)}): "
            f"{_short(cells)}. No column is taken as an index; a separator inside a cell needs quotes around the cell."
        )
    marks = {";": "semicolons", "\t": "tabs", ",": "commas"}
    if len(header) == 1 and (found := [name for mark, name in marks.items() if mark in header[0]]):
        raise ValueError(
            f"the header is one cell, {header[0]!r}, with {found[0]} in it; .csv has commas, .tsv has tabs."
        )
    if len(rows) == 1:
        raise ValueError(f"there is a header ({', '.join(header)}) and no row below it.")
    return rows


def _short(cells: list[str]) -> str:
    shown = " | ".join(cells)
    return shown if len(shown) <= 80 else f"{shown[:80]}…"


def _from_table(rows: list[tuple[int, list[str]]]) -> Dataset:
    from datasets import Dataset, Features, Value

    names = _unique([name.strip() for name in rows[0][1]])
    # a column without a name is what pandas writes for its index; nothing can ask for it
    columns = {name: [cells[number] or None for _, cells in rows[1:]] for number, name in enumerate(names) if name}
    return Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, Value("string"))))


def _unique(names: list[str]) -> list[str]:
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(f"the name {', '.join(map(repr, twice))} stands twice in {', '.join(names)}; rename one.")
    return names


# JSON: (place, object) of every row


def _objects(text: str) -> list[tuple[str, dict[str, Any]]]:
    """One array of objects, or one object a line."""
    if text.lstrip().startswith("["):
        rows = [(f"object {number}", row) for number, row in enumerate(_parse(text, ""), 1)]
    else:
        lines = text.split("\n")  # not splitlines: U+2028 and its kin may stand in JSON's strings
        rows = [(f"line {n}", _parse(line, f"line {n}")) for n, line in enumerate(lines, 1) if line.strip()]
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f'{place} holds {_short([json.dumps(row)])}; each row is an object such as {{"text": …}}.')
    if not any(row for _, row in rows):
        raise ValueError("there is no row in it.")
    return rows


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"{place}, column {error.colno}" if place else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}: {error.msg}. It takes one object a line, or one array of objects.") from error
    except RecursionError as error:
        raise ValueError(f"{place or 'the array'} is nested too deeply to be read.") from error
    except ValueError as error:
        raise ValueError(f"{place or 'the array'}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _unique([name for name, _ in pairs])
    return dict(pairs)


def _from_objects(rows: list[tuple[str, dict[str, Any]]], wanted: Collection[str]) -> Dataset:
    from datasets import Dataset

    columns = {}
    for name in dict.fromkeys(name for _, row in rows for name in row):
        try:
            columns[name] = _column(name, rows)
        except ValueError:
            if name in wanted:
                raise
    return Dataset.from_dict(columns)


def _column(name: str, rows: list[tuple[str, dict[str, Any]]]):
    """The column as an Arrow array of one type."""
    import pyarrow

    values = [row.get(name) for _, row in rows]
    first = {}  # the first place of each type
    for (place, _), value in zip(rows, values, strict=True):
        first.setdefault(_KINDS[type(value)], place)
    first.pop("nothing", None)
    if set(first) == {"text", "a number"}:
        values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    elif len(first) > 1:
        found = ", ".join(f"{kind} ({place})" for kind, place in first.items())
        raise ValueError(f"column {name!r} mixes {found}; give it values of one kind.")
    try:
        return pyarrow.array(values)
    except UnicodeEncodeError as error:
        place = next(place for (place, _), value in zip(rows, values, strict=True) if _has_surrogate(value))
        raise ValueError(
            f"{place}: column {name!r} holds half a character (a lone surrogate such as \\ud83d)."
        ) from error
    except OverflowError:  # whole numbers beyond 64 bits
        return pyarrow.array([None if value is None else json.dumps(value) for value in values])
    except pyarrow.ArrowException as error:
        raise ValueError(f"column {name!r} holds values that one column cannot: {error}") from error


_KINDS = {
    type(None): "nothing", str: "text", int: "a number", float: "a number", bool: "true or false",
    list: "a list", dict: "an object",
}  # fmt: skip


def _has_surrogate(value: Any) -> bool:
    return isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)


def _parquet(path: Path) -> Dataset:
    """A parquet file, class names of `datasets` included; categories of pandas become their values."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.table import InMemoryTable

    table = pyarrow.parquet.read_table(path)
    _unique(table.column_names)
    for number, field in enumerate(table.schema):
        if pyarrow.types.is_dictionary(field.type):
            table = table.set_column(number, field.name, table.column(number).cast(field.type.value_type))
    if table.num_rows == 0:
        raise ValueError(f"it has columns ({', '.join(table.column_names)}) and no row.")
    return Dataset(InMemoryTable(table))
