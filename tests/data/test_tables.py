"""Reading one table: formats, encodings, row numbers, and what is said of a file that can't be read."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from penchant.data.diagnose import scan_records
from penchant.data.tables import ROW, TableOptions, open_table, table_of_frame
from penchant.errors import DataError

ROWS = [("u", "1", "5"), ("ü", "2", "6"), ("😀", "3", "7")]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(path: Path, **options: object) -> pl.DataFrame:
    """All columns of the table, with the row numbers last."""
    with open_table(path, TableOptions.model_validate(options)) as table:
        frame = table.collect({name: name for name in table.columns})
    return frame.select(pl.exclude(ROW), ROW)


def error_of(path: Path, **options: object) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert caught.value.where is not None
    assert caught.value.where.startswith(str(path))
    assert caught.value.remedy
    return caught.value


def delimited(mark: str) -> str:
    return "".join(mark.join(row) + "\n" for row in [("a", "b", "c"), *ROWS])


def test_csv_columns_are_texts_and_rows_count_the_header(tmp_path: Path) -> None:
    frame = read(write(tmp_path / "t.csv", delimited(",")))
    assert frame.dtypes[:3] == [pl.String] * 3
    assert frame.rows() == [(*ROWS[0], 2), (*ROWS[1], 3), (*ROWS[2], 4)]


def test_tsv_needs_no_separator(tmp_path: Path) -> None:
    assert read(write(tmp_path / "t.tsv", delimited("\t")))["a"].to_list() == ["u", "ü", "😀"]


@pytest.mark.parametrize("separator", ["|", ";", "::", "\\t", "tab", "~"])
def test_a_separator_makes_a_file_of_any_name_delimited_text(tmp_path: Path, separator: str) -> None:
    mark = "\t" if separator in ("\\t", "tab") else separator
    frame = read(write(tmp_path / "u.item", delimited(mark)), separator=separator)
    assert frame.drop(ROW).rows() == ROWS


def test_a_wide_separator_is_found_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.data.transcode._CHUNK", 7)
    frame = read(write(tmp_path / "u.dat", delimited("::")), separator="::")
    assert frame.drop(ROW).rows() == ROWS


def test_a_wide_separator_within_quotes_is_text(tmp_path: Path) -> None:
    frame = read(write(tmp_path / "u.dat", 'a::b\n1::"Alien::Covenant"\n2::Heat\n'), separator="::")
    assert frame["b"].to_list() == ["Alien::Covenant", "Heat"]
    lines = read(write(tmp_path / "u.jsonl", '{"a": "Alien::Covenant"}\n'), separator="::")
    assert lines["a"].to_list() == ["Alien::Covenant"]


@pytest.mark.parametrize("name", ["t.csv.gz", "t.tsv.gz", "t.jsonl.gz"])
def test_gzipped_text_is_read(tmp_path: Path, name: str) -> None:
    frame = pl.DataFrame(ROWS, schema=["a", "b", "c"], orient="row")
    out = io.BytesIO()
    if "jsonl" in name:
        frame.write_ndjson(out)
    else:
        frame.write_csv(out, separator="\t" if "tsv" in name else ",")
    assert read(write(tmp_path / name, gzip.compress(out.getvalue(), mtime=0))).drop(ROW).rows() == ROWS


def test_parquet_keeps_its_types_and_rows_start_at_one(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pl.DataFrame({"a": [1, 2], "b": [["x"], []]}).write_parquet(path)
    frame = read(path)
    assert frame.schema["a"] == pl.Int64
    assert frame[ROW].to_list() == [1, 2]


def test_json_keys_may_come_late_and_be_of_several_kinds(tmp_path: Path) -> None:
    lines = ['{"a": 1}\n'] * 500 + ['{"a": "x", "late": true}\n']
    frame = read(write(tmp_path / "t.ndjson", "".join(lines)))
    assert frame.row(-1) == ("x", True, 501)
    assert frame["a"][0] == "1"


def test_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert read(write(tmp_path / "t.jsonl", b'\xef\xbb\xbf{"a": 1}\n')).columns == ["a", ROW]


def test_an_explicit_format_wins_over_the_name(tmp_path: Path) -> None:
    assert read(write(tmp_path / "t.txt", '{"a": 1}\n'), format="jsonl").rows() == [(1, 1)]


def test_headerless_files_take_the_names_given_and_ignore_further_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "u.csv", "1,x,9,9\n2,y,9,\n")
    assert read(path, columns=["id", "name"]).rows() == [("1", "x", 1), ("2", "y", 2)]


def test_more_names_than_columns_is_an_error(tmp_path: Path) -> None:
    error = error_of(write(tmp_path / "u.csv", "1,x\n"), columns=["id", "name", "more"])
    assert "3 column names" in error.what
    assert "2 fields" in error.what


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-8-sig", "utf-16-le"])
@pytest.mark.parametrize("chunk", [3, 1 << 22])
def test_any_encoding_is_transcoded(tmp_path: Path, encoding: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penchant.data.transcode._CHUNK", chunk)
    path = write(tmp_path / "t.csv", "name,n\nÅsa,1\nJosé,2\n".encode(encoding))
    assert read(path, encoding=encoding)["name"].to_list() == ["Åsa", "José"]


def test_the_temporary_copy_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    read(write(tmp_path / "t.csv", "a,b\né,1\n".encode("latin-1")), encoding="latin-1")
    assert list(temporary.iterdir()) == []


FULL_DISK = """
import resource, sys
from penchant.data.tables import TableOptions, open_table
from penchant.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with open_table(sys.argv[1], TableOptions()):
        sys.exit(3)
except StorageError as error:
    sys.exit(0 if "TMPDIR" in error.remedy else 4)
"""


def test_no_room_for_the_temporary_copy_is_a_storage_error(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv.gz", gzip.compress(b"a,b\n" * 10_000, mtime=0))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert done.returncode == 0, done.stderr
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("where", ["header", "body"])
def test_a_wrong_encoding_names_byte_line_and_remedy(tmp_path: Path, where: str) -> None:
    text = b"titl\xe9,n\nx,1\n" if where == "header" else b"title,n\nx,1\n\xe9,2\n"
    error = error_of(write(tmp_path / "t.csv", text))
    offset, line = (4, 1) if where == "header" else (12, 3)
    assert f"byte 0xe9 at byte offset {offset}, line {line}" in error.what
    assert "--encoding latin-1" in str(error.remedy)


@pytest.mark.parametrize("chunk", [1, 2, 5, 1 << 22])
def test_a_bad_byte_is_placed_right_wherever_the_pieces_end(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penchant.data.diagnose._CHUNK", chunk)
    monkeypatch.setattr("penchant.data.transcode._CHUNK", chunk)
    body = "a,b\n😀é,1\n".encode() + b"x\xff,2\n"
    place = f"byte 0xff at byte offset {body.index(0xFF)}, line 3"
    assert place in error_of(write(tmp_path / "t.csv", body)).what
    assert place in error_of(write(tmp_path / "t.csv.gz", gzip.compress(body, mtime=0))).what


def test_utf16_is_recognised_in_the_remedy(tmp_path: Path) -> None:
    error = error_of(write(tmp_path / "t.csv", "a,b\n1,2\n".encode("utf-16")))
    assert "--encoding utf-16" in str(error.remedy)


def test_utf16_without_its_mark_is_an_error(tmp_path: Path) -> None:
    error = error_of(write(tmp_path / "t.csv", "a,b\n1,2\n".encode("utf-16-be")), encoding="utf-16")
    assert "utf-16" in error.what


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", b"", "empty"),
        ("t.csv", b"\n\n", "empty"),
        ("t.jsonl", b"", "empty"),
        ("t.parquet", b"", "empty"),
        ("t.csv.gz", gzip.compress(b"", mtime=0), "empty"),
        ("t.csv.gz", gzip.compress(b"a,b\n" * 1000, mtime=0)[:30], "torn"),
        ("t.parquet", b"hello", "not a readable Parquet file"),
        ("t.csv", b"a,b,a\n1,2,3\n", "two columns are called 'a'"),
        ("t.csv", b"a,b\r1,2\r", "carriage return"),
        ("t.data", b"a\tb\n1\t2\n", "cannot tell the format"),
        ("t.jsonl", b'{"a": 1}\n{"a": \n', "not a JSON object"),
        ("t.jsonl", b'{"a": 1}\n[1]\n', "it is a list"),
        ("t.jsonl", b'{"a": "\xe9"}\n', "not utf-8 text"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    assert said in error_of(write(tmp_path / name, content)).what


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    assert "no such file" in error_of(tmp_path / "nope.csv").what
    assert "not a file" in error_of(tmp_path).what


def test_bad_json_names_the_line(tmp_path: Path) -> None:
    assert str(error_of(write(tmp_path / "t.jsonl", '{"a": 1}\n{"a": 2}\n{"a"\n')).where).endswith("row 3")


@pytest.mark.parametrize(
    ("body", "row", "fields"),
    [("1,2,3\n1,2\n", 3, 2), ("1,2,3\n1,2,3,4\n", 3, 4), ("x\n1,2,3\n", 2, 1), ('"a\nb",2,3\n\n1,2\n', 4, 2)],
)
def test_ragged_rows_name_the_row(tmp_path: Path, body: str, row: int, fields: int) -> None:
    error = error_of(write(tmp_path / "t.csv", "a,b,c\n" + body))
    assert error.what.startswith(f"{fields} field")
    assert re.search(rf"row {row}\b", str(error.where))


def test_a_row_after_text_with_line_breaks_names_its_line_too(tmp_path: Path) -> None:
    error = error_of(write(tmp_path / "t.csv", 'a,b,c\n"x\ny",2,3\n1,2\n'))
    assert "row 3 (line 4)" in str(error.where)


def test_an_unclosed_quote_says_where_it_opens(tmp_path: Path) -> None:
    error = error_of(write(tmp_path / "t.csv", 'a,b\n1,2\n3,"x\n4,5\n'))
    assert "never closed" in error.what
    assert "row 3" in str(error.where)
    assert "--no-quote" in str(error.remedy)


def test_quotes_can_be_plain_text(tmp_path: Path) -> None:
    frame = read(write(tmp_path / "t.tsv", 'a\tb\n1\t5" disk\n'), quote=None)
    assert frame.rows() == [("1", '5" disk', 2)]


def test_blank_lines_are_skipped_and_empty_last_fields_are_not(tmp_path: Path) -> None:
    frame = read(write(tmp_path / "t.csv", "a,b\r\n1,2\r\n\r\n3,\r\n\r\n"))
    assert frame.rows() == [("1", "2", 2), ("3", None, 4)]


@pytest.mark.parametrize("start", ["\n\n", "\r\n\r\n", "\ufeff\n\n"])
@pytest.mark.parametrize("header", [True, False])
def test_blank_lines_at_the_beginning_count_as_rows(tmp_path: Path, start: str, header: bool) -> None:
    path = write(tmp_path / "t.csv", start + ("a,b\n" if header else "") + "1,2\n3,\n\n5,6\n")
    frame = read(path, **({} if header else {"columns": ["a", "b"]}))
    assert frame.rows() == [("1", "2", 3 + header), ("3", None, 4 + header), ("5", "6", 6 + header)]


def test_null_values(tmp_path: Path) -> None:
    assert read(write(tmp_path / "t.csv", "a,b\nNA,1\n"), null_values=["NA"]).rows() == [(None, "1", 2)]


@pytest.mark.parametrize(
    "options",
    [
        {"separator": ""},
        {"separator": "\n"},
        {"separator": "·"},
        {"quote": "''"},
        {"encoding": "hex"},
        {"encoding": "nonsense"},
        {"columns": []},
        {"columns": ["a", "a"]},
        {"format": "xlsx"},
        {"unknown": 1},
    ],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TableOptions.model_validate(options)


def test_every_option_says_what_it_is() -> None:
    assert all(field.description for field in TableOptions.model_fields.values())


def test_a_frame_is_a_table(tmp_path: Path) -> None:
    table = table_of_frame(pl.DataFrame({"x": ["a", "b"]}), "interactions")
    assert table.collect({"y": "x"}).rows() == [(1, "a"), (2, "b")]
    with pytest.raises(DataError, match="interactions: the frame has no rows"):
        table_of_frame(pl.DataFrame({"x": []}), "interactions")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.text('ab,"\n\r é', max_size=4), min_size=1, max_size=4), min_size=1, max_size=6),
    st.integers(1, 9),
)
def test_records_are_counted_as_the_csv_module_counts_them(tmp_path: Path, rows: list[list[str]], chunk: int) -> None:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(["x", *row] for row in rows)
    path = write(tmp_path / "t.csv", out.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penchant.data.diagnose._CHUNK", chunk)
        found = {record.number: record for record in scan_records(path, ",", '"')}
    line = 1
    for number, row in enumerate(csv.reader(io.StringIO(out.getvalue(), newline="")), start=1):
        if number == 1 or len(row) != len(rows[0]) + 1:
            assert (found[number].fields, found[number].line) == (len(row), line)
        else:
            assert number not in found
        line += 1 + sum(field.count("\n") for field in row)


@pytest.mark.parametrize("chunk", [1, 3, 64, 1 << 22])
def test_records_are_counted_alike_whatever_the_pieces(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penchant.data.diagnose._CHUNK", chunk)
    text = 'a,b\n1,"x,\n""y"""\n\n1\n\r\n1,2,3\n1,2\n4,"open'
    found = [
        (r.number, r.line, r.fields, r.blank, r.open_quote)
        for r in scan_records(write(tmp_path / "t.csv", text), ",", '"')
    ]
    assert found == [
        (1, 1, 2, False, False),
        (3, 4, 1, True, False),
        (4, 5, 1, False, False),
        (5, 6, 1, True, False),
        (6, 7, 3, False, False),
        (8, 9, 2, False, True),
    ]
