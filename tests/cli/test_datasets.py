import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.datasets import BadLine, Dataset, Row
from cli.errors import DatasetFault, FileAbsent

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def read(path: Path, content: bytes) -> list[Row | BadLine]:
    path.write_bytes(content)
    return list(Dataset(str(path)).rows())


def only_fault(path: Path, content: bytes) -> BadLine:
    (fault,) = [row for row in read(path, content) if isinstance(row, BadLine)]
    return fault


@given(st.lists(st.dictionaries(st.text(), JSON_VALUES), min_size=1, max_size=5))
def test_every_json_object_comes_back_as_it_was_written(rows: list[dict[str, object]]) -> None:
    stream = io.TextIOWrapper(io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stream)
        found = list(Dataset("-").rows())
    assert [row.fields for row in found if isinstance(row, Row)] == rows
    assert [row.line for row in found] == list(range(1, len(rows) + 1))


def test_a_byte_order_mark_crlf_and_blank_lines_at_the_end_are_accepted(tmp_path: Path) -> None:
    rows = read(tmp_path / "d.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n\r\n  \n')
    assert rows == [Row(1, {"a": 1}), Row(2, {"a": 2})]


def test_a_last_line_without_a_line_end_is_a_row(tmp_path: Path) -> None:
    assert read(tmp_path / "d.jsonl", b'{"a": 1}') == [Row(1, {"a": 1})]


def test_a_blank_line_in_the_middle_is_named(tmp_path: Path) -> None:
    fault = only_fault(tmp_path / "d.jsonl", b'{"a": 1}\n\n{"a": 2}\n')
    assert (fault.line, "blank" in fault.reason) == (2, True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "not JSON"),
        (b'["a"]', "an array"),
        (b'"text"', "a string"),
        (b"3", "a number"),
        (b"null", "null"),
        (b"true", "true or false"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": "\xff"}', "UTF-8 (byte 8"),
        (b'{"a": "\\ud83d"}', "surrogate"),
        (b'{"a": {"b": ["\\uDE00"]}}', "surrogate"),
        (b"[" * 100_000, "not JSON (nested too deep)"),
        (b'{"a": 1', "column 8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits; write it as a string"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_its_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    fault = only_fault(tmp_path / "d.jsonl", b'{"a": 1}\n{"a": 2}\n' + line + b'\n{"a": 4}\n')
    assert fault.line == 3
    assert reason in fault.reason


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    assert read(tmp_path / "d.jsonl", b'{"a": "\\ud83d\\ude00"}') == [Row(1, {"a": "\U0001f600"})]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"\n \n\n", ["is empty"]),
        ('{"a": 1}\n'.encode("utf-16"), ["UTF-16", "iconv"]),
        ('{"a": 1}\n'.encode("utf-16-be"), ["UTF-16", "zero bytes"]),
        ('{"a": 1}\n'.encode("utf-32"), ["UTF-32"]),
        (b"\x1f\x8b\x08\x00", ["gzip", "gunzip"]),
        (b"PAR1....", ["Parquet"]),
    ],
)
def test_a_file_of_another_kind_is_refused_with_a_remedy(tmp_path: Path, content: bytes, words: list[str]) -> None:
    with pytest.raises(DatasetFault) as caught:
        read(tmp_path / "d.jsonl", content)
    assert [word for word in [*words, "d.jsonl"] if word not in str(caught.value)] == []


def test_a_line_that_never_ends_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.datasets.MAX_LINE_BYTES", 100)
    with pytest.raises(DatasetFault, match="a line of more than"):
        read(tmp_path / "d.jsonl", b'{"a": "' + b"x" * 200 + b'"}')


def test_a_file_that_is_absent_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileAbsent, match=r"no file .*none\.jsonl"):
        Dataset(str(tmp_path / "none.jsonl")).check()
    with pytest.raises(DatasetFault, match="folder"):
        Dataset(str(tmp_path)).check()


def test_csv_rows_carry_their_line_and_quoted_line_ends(tmp_path: Path) -> None:
    rows = read(tmp_path / "d.CSV", b'\xef\xbb\xbfid,text\n1,"two\nlines, one cell"\n2,plain\n')
    assert rows == [Row(2, {"id": "1", "text": "two\nlines, one cell"}), Row(4, {"id": "2", "text": "plain"})]


@pytest.mark.parametrize(
    ("row", "reason"),
    [(b"1,b,c", "3 cells"), (b"1", "1 cells"), (b"1,\xff", "UTF-8"), (b'1,"a"b', "CSV")],
)
def test_a_csv_row_at_fault_does_not_end_the_reading(tmp_path: Path, row: bytes, reason: str) -> None:
    rows = read(tmp_path / "d.csv", b"id,text\n0,a\n" + row + b"\n2,c\n")
    assert [type(r) for r in rows] == [Row, BadLine, Row]
    assert isinstance(rows[1], BadLine)
    assert rows[1].line == 3
    assert reason in rows[1].reason


@pytest.mark.parametrize(("content", "word"), [(b"", "no rows"), (b"a,b\n", "no rows"), (b"a,a\n1,2\n", "twice")])
def test_a_csv_without_rows_or_with_a_doubled_field_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    with pytest.raises(DatasetFault, match=word):
        read(tmp_path / "d.csv", content)
