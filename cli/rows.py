"""One row of a dataset, from its text: what is no row becomes a `BadLine` that says why."""

import json
import math
import re
from dataclasses import dataclass
from typing import NoReturn

from cli.nesting import text_is_deeper
from worker.limits import Limits

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the dataset."""

    line: int
    fields: dict[str, object]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no row, and why."""

    line: int
    reason: str


def csv_row(line: int, names: list[str], cells: list[str]) -> Row | BadLine:
    """The cells of one row under the names of the header; surrogates stand for bytes that are no UTF-8."""
    if len(cells) != len(names):
        return BadLine(line, f"it has {len(cells)} cells where the header names {len(names)} fields")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return BadLine(line, "it is not valid UTF-8")
    return Row(line, dict(zip(names, cells, strict=True)))


def json_row(number: int, line: bytes, limits: Limits) -> Row | BadLine:
    """One line of JSON, with or without its end."""
    if text_is_deeper(line, limits.row_depth):
        return BadLine(number, f"it is nested too deep: {limits.told('row_depth')}")
    try:
        # Without its line end, so that a fault at the end of the line has a column of this line.
        value = _DECODER.decode(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return BadLine(number, f"it is not valid UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        hint = "; it looks like a JSON array: write one object a line" if line.lstrip()[:1] == b"[" else ""
        return BadLine(number, f"it is not JSON ({error.msg}, column {error.colno}){hint}")
    except ValueError as error:
        return BadLine(number, f"it is not JSON ({error})")
    if not isinstance(value, dict):
        return BadLine(number, f'it is {_kind(value)}, not a JSON object such as {{"prompt": "…"}}')
    if _SURROGATE_ESCAPE.search(line) and not _is_unicode(value):
        return BadLine(number, "it holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return Row(number, value)


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ValueError(f"a number has {len(digits)} digits; write it as a string") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large; write it as a string")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value; write null or a number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_whole, parse_float=_finite)


def _is_unicode(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "an array"}
    return kinds[type(value)]
