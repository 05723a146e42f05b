import io
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.datasets import BadLine, Dataset, Row
from cli.errors import DatasetFault, FileAbsent
from cli.nesting import text_is_deeper, value_is_deeper
from worker.limits import Limits

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def read(path: Path, content: bytes) -> list[Row | BadLine]:
    path.write_bytes(content)
    return list(Dataset(str(path)).rows())


def only_fault(path: Path, content: bytes) -> BadLine:
    (fault,) = [row for row in read(path, content) if isinstance(row, BadLine)]
    return fault


@settings(max_examples=50)
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
        (b"[" * 100_000, "nested too deep: the limit is 64 (OVERNIGHT_ROW_DEPTH"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "nested too deep"),
        (b'{"a": 1e400}', "the number 1e400 is too large; write it as a string"),
        (b'{"id": -1e999}', "too large"),
        (b'{"a": -Infinity}', "no JSON value"),
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


SMALL = Limits(row_bytes=20, row_depth=3)


def small(path: Path, content: bytes) -> list[Row | BadLine]:
    path.write_bytes(content)
    return list(Dataset(str(path), SMALL).rows())


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_line_above_the_limit_is_a_bad_line_and_the_next_is_read(tmp_path: Path, end: bytes) -> None:
    exact, above = b'{"a": "' + b"x" * 11 + b'"}', b'{"a": "' + b"x" * 12 + b'"}'
    rows = small(tmp_path / "d.jsonl", end.join([exact, above, b"y" * 200_000, b'{"a": 4}', above]))
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert [isinstance(row, BadLine) for row in rows] == [False, True, True, False, True]
    assert isinstance(rows[1], BadLine)
    assert rows[1].reason.startswith("it is too long for a row: the limit is 20 B (OVERNIGHT_ROW_BYTES, or row_bytes")


def test_a_line_that_never_ends_is_refused_without_reading_it_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        read_bytes = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            buffer[:] = b"x" * len(buffer)
            self.read_bytes += len(buffer)
            return len(buffer)

    endless = Endless()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(endless)))
    assert isinstance(next(Dataset("-", SMALL).rows()), BadLine)
    assert endless.read_bytes < 100_000


def test_csv_rows_and_headers_above_the_limit_are_told_and_the_next_row_is_read(tmp_path: Path) -> None:
    content = [
        b"id,text",
        b"1," + b"x" * 500,
        b"2,a",
        b'3,"' + b"x\n" * 40 + b'"',  # of 41 lines
        b"44,b",
        b'45,"' + b'x""' * 100_000 + b"\n" + b"y" * 100_000 + b'"',
        b"47,c",
        b'48,"' + b"x\n" * 40,  # without an end
    ]
    rows = small(tmp_path / "d.csv", b"\n".join(content))
    assert [(row.line, row.fields["text"]) for row in rows if isinstance(row, Row)] == [(3, "a"), (45, "b"), (48, "c")]
    bad = [row for row in rows if isinstance(row, BadLine)]
    assert [row.line for row in bad] == [2, 4, 46, 49]
    assert all("too long for a row: the limit is 20 B" in row.reason for row in bad)
    with pytest.raises(DatasetFault, match="header that is too long"):
        small(tmp_path / "h.csv", b"a," * 50 + b"b\n1,2\n")


@given(JSON_VALUES, st.integers(1, 6))
def test_depth_is_counted_alike_in_text_and_in_values_and_ignores_strings(value: object, most: int) -> None:
    def depth(of: object) -> int:
        inner = of.values() if isinstance(of, dict) else of if isinstance(of, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    assert text_is_deeper(json.dumps(value).encode(), most) == value_is_deeper(value, most) == (depth(value) > most)


@pytest.mark.parametrize(
    "text", [b'"' + b'\\"' * 200_000 + b"[[", b'"[[[' * 100_000, b'{"a":"' + b"[" * 400_000, b"[]," * 150_000]
)
def test_depth_takes_time_in_proportion_to_the_text(text: bytes) -> None:
    before = time.process_time()
    assert not text_is_deeper(text, text.count(b"[") - 1)
    assert time.process_time() - before < 2


def test_as_many_blank_lines_as_one_likes_take_no_memory(tmp_path: Path) -> None:
    rows = read(tmp_path / "d.jsonl", b'{"a": 1}\n\n\n{"a": 2}\n\n')
    assert [(row.line, type(row)) for row in rows] == [(1, Row), (2, BadLine), (3, BadLine), (4, Row)]


def test_a_pipe_is_read_and_one_that_nobody_writes_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.datasets.PATIENCE_S", 0.05)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DatasetFault, match=r"pipe that nobody wrote to for 0\.05 s; start its writer"):
        list(Dataset(str(tmp_path / "pipe")).rows())
    reading, writing = os.pipe()
    silent = threading.Timer(0.3, lambda: (os.write(writing, b'{"a": 1}\n'), os.close(writing)))
    silent.start()  # a writer who is there, and takes longer than our patience
    assert list(Dataset(f"/dev/fd/{reading}").rows()) == [Row(1, {"a": 1})]
    silent.join()
    os.close(reading)


def test_a_device_is_no_dataset() -> None:
    for name in ("/dev/zero", "/dev/urandom", "/dev/null"):
        with pytest.raises(DatasetFault, match=f"{name} is a device"):
            list(Dataset(name).rows())


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
