"""Files of rows: formats, encodings, and what a file that is none of them is told."""

import gzip
import json

import pytest

from reft_edge.errors import ReftEdgeError
from reft_edge.rows.given import parse_columns, row_source
from reft_edge.rows.reading import load_rows, read_rows

ROWS = [{"prompt": 'Who, "you"?', "completion": "a\nb"}, {"prompt": "é 漢", "completion": "Yes; no\ttab"}]


def rows_of(path, **options):
    return load_rows(row_source(path, **options), lambda row: row)[0]


def places(path):
    return [str(place) for place, _ in read_rows(path, lambda row: row)]


def csv_text(delimiter):
    cells = [["prompt", "completion"], *([row["prompt"], row["completion"]] for row in ROWS)]
    quoted = ([f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in line] for line in cells)
    return "".join(delimiter.join(line) + "\n" for line in quoted)


FORMATS = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "rows.json": json.dumps(ROWS, indent=2),
    "array.jsonl": json.dumps(ROWS),
    "rows.csv": csv_text(","),
    "semicolons.csv": csv_text(";"),
    "tabs.csv": csv_text("\t"),
    "rows.tsv": csv_text("\t"),
    "pipes.CSV": csv_text("|"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    for content in (
        FORMATS[name].encode(),
        b"\xef\xbb\xbf" + FORMATS[name].encode(),
        gzip.compress(FORMATS[name].encode()),
    ):
        path.write_bytes(content)
        assert rows_of(path) == ROWS
    path.write_bytes(FORMATS[name].replace("\n", "\r\n").encode())
    assert [row["prompt"] for row in rows_of(path)] == [row["prompt"] for row in ROWS]
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(FORMATS[name].encode()))
    assert rows_of(packed) == ROWS


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path, name, encoding):
    path = tmp_path / name
    path.write_bytes(FORMATS[name].replace("漢", "x").encode(encoding))
    with pytest.raises(ReftEdgeError, match=rf"{name} is {encoding[:6].upper()} text; save it as UTF-8"):
        rows_of(path)
    path.write_bytes(FORMATS[name].encode().replace("é".encode(), b"\xe9"))
    if "\\u" not in FORMATS[name]:
        with pytest.raises(ReftEdgeError, match=r"is not UTF-8 text: line .* has the byte 0xe9"):
            rows_of(path)


def test_parquet_with_nested_messages(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    messages = [
        [
            {"role": "user", "content": "a", "weight": None},
            {"role": "assistant", "content": "b", "weight": 0},
        ],
        [
            {"role": "user", "content": "c", "weight": None},
            {"role": "assistant", "content": "d", "weight": None},
        ],
    ]
    parquet.write_table(pyarrow.table({"messages": messages, "n": [1, None]}), tmp_path / "x.parquet")
    first, second = rows_of(tmp_path / "x.parquet")
    assert first["messages"][1] == {"role": "assistant", "content": "b", "weight": 0}
    assert second == {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    (tmp_path / "y.data").write_bytes((tmp_path / "x.parquet").read_bytes())
    assert rows_of(tmp_path / "y.data") == [first, second]
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:200])
    with pytest.raises(ReftEdgeError, match=r"cannot read .*cut.parquet as Parquet"):
        rows_of(tmp_path / "cut.parquet")
    assert places(tmp_path / "x.parquet")[1].endswith("x.parquet row 2")


def test_parquet_without_its_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ReftEdgeError, match=r"pip install 'reft-edge\[data\]'"):
        rows_of(tmp_path / "x.parquet")


def test_places_are_lines_where_there_are_lines(tmp_path):
    (tmp_path / "x.csv").write_text('prompt,completion\n"a\nb",c\n\nd,e\n')
    assert [text.rpartition("x.csv ")[2] for text in places(tmp_path / "x.csv")] == ["line 2", "line 5"]
    (tmp_path / "x.json").write_text('[{"a": 1},\n\n{"a": 2}]')
    assert places(tmp_path / "x.json")[1].endswith("x.json row 2")
    (tmp_path / "x.jsonl").write_text('\n{"a": 1}\n')
    assert places(tmp_path / "x.jsonl")[0].endswith("x.jsonl line 2")


def test_cells_are_text_and_empty_ones_stay(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(",text,label,text2\n0,good,1,\n1,,007,b\n")
    assert rows_of(path) == [{"text": "good", "label": "1"}, {"text": "", "label": "007", "text2": "b"}]
    path.write_text("text;label\n" + "a" * 200_000 + ";1\n")
    assert len(rows_of(path)[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a,b,a\n1,2,3\n", r"has the columns \['a'\] twice; give each a name of its own"),
        (
            "x.csv",
            "a,b\n1,2\n1,2,3\n",
            "x.csv line 3: it has 3 cells, and the header 2; put cells with a ','",
        ),
        ("x.csv", "a,b\n1\n", "x.csv line 2: it has 1 cells, and the header 2"),
        ("x.csv", 'a,b\n1,2\n1,"2\n', r"x.csv line 3: not valid CSV \(unexpected end of data\)"),
        ("x.csv", 'a,b\n"1"x,2\n', "x.csv line 2: not valid CSV"),
        (
            "x.json",
            '{\n"data": [{"a": 1}]\n}',
            r"is one JSON object with the fields \['data'\]; expected an array",
        ),
        ("x.json", '[{"a": 1},\n{"a": }]', "begins as a JSON array, but is not valid JSON"),
        ("x.jsonl", '{"a": 1}\n{"a": \n', "x.jsonl line 2: not valid JSON"),
        ("x.jsonl", "prompt,completion\na,b\n", "x.jsonl line 1: not valid JSON"),
        ("x.xlsx", "PK\x03\x04...", "is a ZIP archive or an Excel file; unpack it, or save it as CSV"),
        ("x.parquet", "text", "x.parquet is no Parquet file"),
        ("x.jsonl.gz", "\x1f\x08", "line 1: not valid JSON"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ReftEdgeError, match=message):
        rows_of(path)


def test_a_cut_gzip_file_is_named(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    with pytest.raises(ReftEdgeError, match=r"x.jsonl.gz is a damaged gzip file"):
        rows_of(path)


def test_columns_can_be_renamed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question": "a", "prompt": "old", "answer": "b", "id": 1}\n')
    columns = parse_columns("prompt=question, completion=answer")
    assert rows_of(path, columns=columns) == [{"prompt": "a", "completion": "b", "id": 1}]
    with pytest.raises(
        ReftEdgeError, match=r"line 1: it has no column 'x' to rename; found \['answer', 'id'"
    ):
        rows_of(path, columns={"prompt": "x"})
    assert parse_columns(None) == {}
    for wrong in ("prompt", "=x", "a=", "a=b,a=c", ""):
        with pytest.raises(ReftEdgeError, match="cannot read the column"):
            parse_columns(wrong)


def test_splits_are_for_datasets(tmp_path):
    for options in ({"split": "train"}, {"config": "x"}):
        (name,) = options
        with pytest.raises(ReftEdgeError, match=f"{name} is for a dataset of the Hub, or a folder"):
            row_source(tmp_path / "x.jsonl", **options)
