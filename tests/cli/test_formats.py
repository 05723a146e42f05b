import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from cli.formats import format_of, write_rows
from storage.results import OutputRow
from storage.states import OutputStatus
from tests.cli.conftest import Run


def ok(index: int, output: dict[str, Any], row_id: object = None) -> OutputRow:
    return OutputRow(index, row_id, OutputStatus.OK, output, None, None, 3, 2, 0.0)


ERROR = OutputRow(1, "b", OutputStatus.ERROR, None, "too_long", "prompt of 9 tokens", 9, 0, 0.0)


def written(rows: list[OutputRow], file_format: str, task: str = "generate") -> str:
    stream = io.BytesIO()
    assert write_rows(iter(rows), stream, file_format=file_format, task=task) == len(rows)
    return stream.getvalue().decode()


def test_a_json_row_has_the_shape_of_the_contract() -> None:
    first, second = map(
        json.loads, written([ok(0, {"text": "é", "finish_reason": "stop"}), ERROR], "jsonl").splitlines()
    )
    assert first == {
        "id": None,
        "index": 0,
        "status": "ok",
        "output": {"text": "é", "finish_reason": "stop"},
        "error": None,
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    assert second == {
        "id": "b",
        "index": 1,
        "status": "error",
        "output": None,
        "error": {"code": "too_long", "message": "prompt of 9 tokens"},
        "usage": {"prompt_tokens": 9, "completion_tokens": 0},
    }


def test_a_line_end_in_a_text_does_not_end_the_row() -> None:
    text = "one\ntwo\u2028three\r"
    (line,) = written([ok(0, {"text": text, "finish_reason": "stop"})], "jsonl").split("\n")[:-1]
    assert json.loads(line)["output"]["text"] == text


STARTS = [
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
    " =",
    "\n=",
    "\t @",
    "\u3000-",
    "\u200b+",
    "\ufeff=",
    "＝",
    "＋",
    " －",
    "＠",
]


@pytest.mark.parametrize("start", STARTS)
def test_a_csv_cell_is_never_a_formula(start: str) -> None:
    text = f"{start}1+1"
    rows = list(csv.reader(io.StringIO(written([ok(0, {"text": text, "finish_reason": "stop"})], "csv"), newline="")))
    assert rows[1][3] == f"'{text}"


def test_numbers_in_csv_stay_numbers() -> None:
    rows = list(
        csv.DictReader(
            io.StringIO(written([ok(0, {"logprob": -1.5, "is_greedy": True, "tokens": []})], "csv", "score"))
        )
    )
    assert (rows[0]["logprob"], rows[0]["is_greedy"], rows[0]["tokens"]) == ("-1.5", "true", "[]")


def test_text_that_is_no_formula_is_left_alone() -> None:
    for text in ("a=1", " a", "1-1", "＃=", "_=", "'=1"):
        rows = list(
            csv.reader(io.StringIO(written([ok(0, {"text": text, "finish_reason": "stop"})], "csv"), newline=""))
        )
        assert rows[1][3] == text


@pytest.mark.parametrize("file_format", ["jsonl", "csv"])
def test_an_id_beyond_all_numbers_of_an_older_database_is_its_name(file_format: str) -> None:
    output = {"text": "t", "finish_reason": "stop"}
    text = written([ok(0, output, float("inf")), ok(1, output, [float("nan"), 1e400])], file_format)
    if file_format == "csv":
        rows = list(csv.reader(io.StringIO(text)))
        assert [row[0] for row in rows[1:]] == ["Infinity", '["NaN", "Infinity"]']
    else:

        def never(name: str) -> None:
            raise AssertionError(name)

        ids = [json.loads(line, parse_constant=never)["id"] for line in text.splitlines()]
        assert ids == ["Infinity", ["NaN", "Infinity"]]


def test_csv_has_a_header_even_without_rows_and_errors_in_columns() -> None:
    assert written([], "csv", "choose").startswith("id,index,status,label,logprobs,error_code,error_message")
    (row,) = csv.DictReader(io.StringIO(written([ERROR], "csv", "choose")))
    assert (row["label"], row["error_code"], row["error_message"]) == ("", "too_long", "prompt of 9 tokens")


def test_the_choices_of_a_job_have_a_column_each() -> None:
    output = {"label": "=b", "logprobs": {"a": -2.5, "=b": -0.5}}
    stream = io.BytesIO()
    rows = [ok(0, output), ERROR]
    assert write_rows(rows, stream, file_format="csv", task="choose", choices=["a", "=b"]) == 2
    first, second = csv.DictReader(io.StringIO(stream.getvalue().decode()))
    assert (first["label"], first["logprob_a"], first["logprob_=b"]) == ("'=b", "-2.5", "-0.5")
    assert "logprobs" not in first
    assert (second["logprob_a"], second["error_code"], second["prompt_tokens"]) == ("", "too_long", "9")


def test_rows_with_choices_of_their_own_keep_them_in_one_column() -> None:
    (row,) = csv.DictReader(io.StringIO(written([ok(0, {"label": "a", "logprobs": {"a": -1.0}})], "csv", "choose")))
    assert json.loads(row["logprobs"]) == {"a": -1.0}


@pytest.mark.parametrize(
    ("output", "given", "wanted"),
    [
        ("x.csv", None, "csv"),
        ("a.b/X.CSV", None, "csv"),
        ("x.jsonl", None, "jsonl"),
        ("x.json", None, "jsonl"),
        ("x.csv", "jsonl", "jsonl"),
        ("x.txt", "csv", "csv"),
        ("x.txt", None, "jsonl"),
        ("-", None, "jsonl"),
        (".csv", None, "jsonl"),
    ],
)
def test_the_format_is_as_asked_for_else_as_the_name_ends(output: str, given: str | None, wanted: str) -> None:
    assert format_of(output, given) == wanted


@pytest.mark.parametrize("command", ["fetch", "run"])
def test_a_format_that_is_not_written_is_refused_before_any_work(command: str, run: Run, tmp_path: Path) -> None:
    words = ["fetch", "1"] if command == "fetch" else ["run", "absent.jsonl", "--model", "m", "--task", "generate"]
    done = run(*words, "-o", str(tmp_path / "labels.Parquet"))
    assert done.exit_code == 2
    assert ".Parquet is not written; name a file that ends in .jsonl or .csv, or say --format" in done.stderr
    assert format_of("labels.parquet", "csv") == "csv"
