"""Files are read as they stand: literal cells in, the same cells out; what does not fit is named with file and line."""

import csv
import gzip
import json

import pandas
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fakit.tasks import load_task, task_from
from fakit.tasks.reading import read_file


def columns(path, content: str | bytes, encoding: str = "utf-8", **options) -> dict:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return read_file(path, **options).to_dict()


def many(header: str, rows: list[str], times: int = 10) -> str:
    """A file long enough for a task: texts numbered so that none repeats."""
    return "\n".join([header, *(row.format(i=i) for i in range(times) for row in rows), ""])


def test_cells_are_text(tmp_path):
    content = "id,text,label\n00014,1e5,01\n3,NA,\n,null,2\n4,None,1.0\n 5,  two  blanks ,true\n"
    assert columns(tmp_path / "d.csv", content) == {
        "id": ["00014", "3", None, "4", " 5"],
        "text": ["1e5", "NA", "null", "None", "  two  blanks "],
        "label": ["01", None, "2", "1.0", "true"],
    }


def test_labels_and_texts_keep_their_zeros_beside_an_empty_cell(tmp_path):
    rows = ["00{i:03}7,00014", "01{i:03}7,0003", "02{i:03}7,"]
    (tmp_path / "d.csv").write_text(many("text,label", rows))
    task = load_task(tmp_path / "d.csv")
    assert task.label_names == ["0003", "00014"]
    assert {row["text"]: task.label_names[row["label"]] for row in task.train}["000037"] == "00014"
    assert len(task.pool) == 10 and set(task.pool["text"]) == {f"02{i:03}7" for i in range(10)}
    assert task.dropped == {}


def test_no_column_is_taken_as_an_index(tmp_path):
    with pytest.raises(
        ValueError, match=r"d.csv cannot be read as csv: the row at line 2 has 3 cells, the header has 2 .*7 \| a \| 1"
    ):
        columns(tmp_path / "d.csv", "text,label\n7,a,1\n8,b,0\n")
    # what pandas writes for its index is a column without a name
    assert columns(tmp_path / "d.csv", ",text,label\n7,a,1\n8,b,0\n") == {"text": ["a", "b"], "label": ["1", "0"]}


def test_lines_are_counted_through_quoted_cells_and_blank_lines(tmp_path):
    content = 'text,label\r\n"two\r\nlines, ""quoted""",1\r\n\r\na,0\r\nb\r\n'
    with pytest.raises(ValueError, match="the row at line 6 has 1 cells"):
        columns(tmp_path / "d.csv", content)
    assert columns(tmp_path / "d.csv", content[:-3]) == {"text": ['two\r\nlines, "quoted"', "a"], "label": ["1", "0"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\na,1\n"b" c,0\n', "the row at line 3: ',' expected after '\"'"),
        ('text,label\na,1\n"b,0\nc,1\n', "the row at line 3: unexpected end of data"),
        ("text,label,text\na,1,b\n", "the name 'text' stands twice in text, label, text"),
        ("text,label\n", r"a header \(text, label\) and no row"),
        ("\n \n", "the file is empty"),
        ("text;label\na;1\n", "one cell, 'text;label', with semicolons in it"),
        ("text\tlabel\na\t1\n", "with tabs in it; .csv has commas"),
    ],
)
def test_broken_tables(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"d\.csv cannot be read as csv: .*{message}"):
        columns(tmp_path / "d.csv", content)


def test_tsv_keeps_quotes_that_are_text(tmp_path):
    content = 'sentence\tlabel\n"wow" he said\t1\nhe said "\t0\n"Wholly quoted."\t1\na 5" disk\t0\n'
    cells = {"sentence": ['"wow" he said', 'he said "', '"Wholly quoted."', 'a 5" disk'], "label": ["1", "0", "1", "0"]}
    assert columns(tmp_path / "d.tsv", content) == cells
    # an opening and a closing quote in different rows: one cell for who believes in quotes
    assert columns(tmp_path / "d.tsv", 'a\tb\n"it began\t1\nand ended"\t2\n') == {
        "a": ['"it began', 'and ended"'],
        "b": ["1", "2"],
    }


def test_tsv_that_was_written_with_quotes(tmp_path):
    cells = {"sentence": ["a\ttab", 'a "quote"', "two\nlines", "plain"], "label": ["1", "0", "1", "0"]}
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        pandas.DataFrame(cells).to_csv(tmp_path / "d.tsv", sep="\t", index=False, quoting=quoting)
        assert columns(tmp_path / "d.tsv", (tmp_path / "d.tsv").read_bytes()) == cells
    simple = {"sentence": ["a", 'say "x"'], "label": ["1", "0"]}  # a doubled quote alone shows it
    pandas.DataFrame(simple).to_csv(tmp_path / "d.tsv", sep="\t", index=False)
    assert columns(tmp_path / "d.tsv", (tmp_path / "d.tsv").read_bytes()) == simple


def test_long_cells_are_read_and_the_limit_of_the_csv_module_stays(tmp_path):
    before = csv.field_size_limit()
    assert columns(tmp_path / "d.csv", f"text\n{'x' * 200_000}\n") == {"text": ["x" * 200_000]}
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz", "d.jsonl", "d.json"])
def test_a_byte_order_mark_is_believed(tmp_path, name, encoding):
    rows = [{"text": "naïve — 和", "label": "a"}, {"text": "\U0001f642", "label": "b"}]
    table = "text,label\r\n" + "".join(f"{row['text']},{row['label']}\r\n" for row in rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = {"d.jsonl": lines, "d.json": json.dumps(rows, ensure_ascii=False, indent=1)}.get(name, table)
    content = text.encode(encoding)
    expected = {column: [row[column] for row in rows] for column in ("text", "label")}
    assert columns(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content) == expected


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl"])
def test_other_encodings_are_named_with_their_line(tmp_path, name):
    text = {"d.csv": "text,label\na,1\ncafé,0\n", "d.tsv": "text\tlabel\na\t1\ncafé\t0\n"}.get(
        name, '{"text": "a"}\n\n{"text": "é"}'
    )
    with pytest.raises(ValueError, match=rf"{name} cannot be read as .*line 3 is not UTF-8 \(byte 0xe9.*iconv"):
        columns(tmp_path / name, text, "latin-1")
    with pytest.raises(ValueError, match="line 1 holds a NUL character, as UTF-16 without a byte-order mark"):
        columns(tmp_path / name, text.replace("é", "e"), "utf-16-le")


def test_arrays_and_lines_of_objects(tmp_path):
    rows = [{"text": "a\u2028b", "label": 1}, {"label": None, "text": "c"}, {"text": "d", "more": {"x": [1]}}]
    expected = {"text": ["a\u2028b", "c", "d"], "label": [1, None, None], "more": [None, None, {"x": [1]}]}
    for name, content in (
        ("d.json", json.dumps(rows, indent=2)),
        ("d.json", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        ("d.jsonl", "\r\n".join(map(json.dumps, rows))),
    ):
        assert columns(tmp_path / name, content) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a"}\n{"text": "b"\n',
            "line 2, column 13: Expecting ',' delimiter.*one object a line, or one array",
        ),
        ('[{"text": "a"},\n {"text": }]', "line 2, column 11: Expecting value"),
        ('{"text": "a"}\n["b"]\n', r'line 2 holds \["b"\]; each row is an object'),
        ('[{"text": "a"}, 3]', "object 2 holds 3"),
        ('{"text": "a", "text": "b"}', "line 1: the name 'text' stands twice"),
        ("[" * 100_000, "the array is nested too deeply"),
        ("[]", "there is no row in it"),
        ('{"text": "a"}\n{"text": true}', r"column 'text' mixes text \(line 1\), true or false \(line 2\)"),
        ('{"text": "a"}\n{"text": ["b"]}', r"column 'text' mixes text \(line 1\), a list \(line 2\)"),
        ('{"text": "a"}\n{"text": "\\ud83d"}', r"line 2: column 'text' holds half a character"),
    ],
)
def test_broken_json(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"d\.json cannot be read as json: {message}"):
        columns(tmp_path / "d.json", content, wanted=["text"])


def test_a_column_that_nobody_asked_for_stops_nothing(tmp_path):
    content = '{"text": "a", "meta": [1], "id": 18446744073709551617}\n{"text": "b", "meta": {"x": 2}, "id": 1}'
    assert columns(tmp_path / "d.jsonl", content, wanted=["text"]) == {
        "text": ["a", "b"],
        "id": ["18446744073709551617", "1"],
    }


def test_labels_as_numbers_and_as_text_are_one_class_and_truth_values_are_not_numbers(tmp_path):
    rows = [{"text": f"t{i}", "label": [1, "1", 0, "0"][i % 4]} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task(tmp_path / "d.jsonl")
    assert task.label_names == ["0", "1"]
    assert all(task.label_names[row["label"]] == str(1 - int(row["text"][1:]) % 4 // 2) for row in task.train)
    rows[5]["label"] = True
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ValueError, match=r"'label' mixes a number \(line 1\), text \(line 2\), true or false \(line 6\)"
    ):
        load_task(tmp_path / "d.jsonl")


def test_classes_that_are_numbers_are_numbered_by_size(tmp_path):
    (tmp_path / "d.csv").write_text(many("text,label", [f"{c} {{i}},{c}.0" for c in range(12)]))
    assert load_task(tmp_path / "d.csv").label_names == [str(c) for c in range(12)]
    (tmp_path / "d.csv").write_text(many("text,label", ["a {i},0.5", "b {i},2", "c {i},-1e-1"]))
    task = load_task(tmp_path / "d.csv")
    assert task.kind == "regression" and {-0.1, 0.5, 2.0} == set(task.train["label"])
    asked = load_task(tmp_path / "d.csv", kind="sequence-classification")
    assert asked.label_names == ["2", "-1e-1", "0.5"]
    (tmp_path / "d.csv").write_text(many("text,label", ["a {i},0.5", "b {i},inf"]))
    with pytest.raises(ValueError, match=r"'label' holds inf; a regression needs finite scores"):
        load_task(tmp_path / "d.csv", kind="regression")


def test_blanks_around_a_label_make_no_class_and_case_alone_is_said(tmp_path, caplog):
    (tmp_path / "d.csv").write_text(many("text, label", ["a {i}, good", "b {i},good ", "c {i},Bad", "d {i},bad"]))
    assert load_task(tmp_path / "d.csv").label_names == ["Bad", "bad", "good"]
    assert "the labels 'Bad' and 'bad' are two classes; they differ by case alone" in caplog.text


def test_bytes_are_text_or_refused(tmp_path):
    texts = [f"naïve {i}".encode() for i in range(20)]
    frame = pandas.DataFrame({"text": texts, "label": [b"no", b"yes"] * 10})
    frame.to_parquet(tmp_path / "d.parquet")
    task = load_task(tmp_path / "d.parquet")
    assert task.label_names == ["no", "yes"] and all(text.startswith("naïve ") for text in task.train["text"])
    frame.assign(text=[b"caf\xe9 %d" % i for i in range(20)]).to_parquet(tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d.parquet: column 'text' holds b'caf\\xe9 0', bytes that are not UTF-8"):
        load_task(tmp_path / "d.parquet")


def test_parquet_keeps_class_names_and_categories(tmp_path):
    rows = Dataset.from_dict(
        {"text": [f"t {i}" for i in range(20)], "label": [0, 1] * 10},
        features=Features({"text": Value("string"), "label": ClassLabel(names=["spam", "ham"])}),
    )
    rows.to_parquet(tmp_path / "d.parquet")
    assert load_task(tmp_path / "d.parquet").label_names == ["spam", "ham"]
    frame = pandas.DataFrame(
        {"text": rows["text"][:], "label": pandas.Categorical(["x", "y"] * 10)}, index=range(5, 25)
    )
    frame.to_parquet(tmp_path / "d.parquet")
    assert load_task(tmp_path / "d.parquet").label_names == ["x", "y"]


def test_a_damaged_directory_is_refused(tmp_path):
    Dataset.from_dict({"text": list("abcdef"), "label": [0, 1] * 3}).save_to_disk(tmp_path / "d")
    arrow = next((tmp_path / "d").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(ValueError, match="it is damaged or not whole"):
        load_task(tmp_path / "d")
    arrow.unlink()
    with pytest.raises(ValueError, match="it is damaged or not whole"):
        load_task(tmp_path / "d")


def test_every_row_that_goes_is_counted_with_its_reason(caplog):
    train = {
        "text": ["a", "A", "a", "held", "", " ", "b", "c", "d", "e", "pool", "POOL", "Held"],
        "label": [0, 0, 1, 1, 1, None, 1, 0, 1, 0, None, None, None],
    }
    test = {"text": ["held", "held", "x", "z"], "label": [0, 0, 1, None]}
    task = task_from({"train": Dataset.from_dict(train), "test": Dataset.from_dict(test)}, name="toy", validation=1)
    assert task.dropped == {
        "train: no text": 2,
        "test: no label": 1,
        "train: repeats a text": 1,
        "train: repeats a text with another label": 1,
        "train: the text is held out": 1,
        "pool: repeats a text": 1,
        "pool: the text is held out": 1,
    }
    assert len(task.teacher_train) + len(task.validation) == 5 and task.pool["text"][:] == ["pool"]
    assert len(task.test) == 3 and "toy: left out are 8 rows (train: no text 2, " in caplog.text


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Ｆｕｌｌ width", "full WIDTH", True),
        ("cafe\u0301", "CAFÉ", True),
        ("oﬃce", "OFFICE", True),
        ("STRASSE", "straße", True),
        ("1+1", "1-1", False),
        ("x² + 1", "x2 + 1", False),
        ("CO₂", "CO2", False),
        ("if (a <= b)", "if (a < b)", False),
        ("a\nb", "a b", False),
        ("कि", "की", False),
        ("กา", "กี", False),
        ("שָׁלוֹם", "שלום", False),
        ("👍", "👎", False),
        ("👍🏽", "👍", False),
        ("really?", "really!", False),
        ("f(x)", "f x", False),
        ("don't", "dont", False),
    ],
)
def test_texts_are_the_same_after_nfkc_and_case_alone(one, other, same):
    rows = [
        *({"source": one, "target": str(i)} for i in range(2)),
        *({"source": f"row {i}", "target": ""} for i in range(3)),
    ]
    data = {"train": Dataset.from_list([*rows, *({"source": f"fill {i}", "target": "y"} for i in range(9))])}
    data["test"] = Dataset.from_list([{"source": other, "target": "x"}])
    task = task_from(data, name="toy", validation=1)
    assert (one in task.train["source"][:] or one in task.validation["source"][:]) is not same
    assert task.dropped.get("train: the text is held out", 0) == (2 if same else 0)


def test_the_two_texts_of_a_pair_are_told_apart():
    rows = [{"text": "a\nb", "other": "c", "label": 0}, {"text": "a", "other": "b\nc", "label": 1}]
    rows += [{"text": f"t {i}", "other": "c", "label": i % 2} for i in range(10)]
    assert task_from(Dataset.from_list(rows), name="toy", text_pair="other").dropped == {}
