"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.units import GIB, KIB, MIB, TIB, align_up, div_ceil, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0), ("123", 123), ("123B", 123), ("4GiB", 4 * GIB), ("4gib", 4 * GIB), (" 4 GiB ", 4 * GIB),
        ("500MB", 500_000_000), ("1.5KiB", 1536), ("0.5mib", MIB // 2), ("2TiB", 2 * TIB), ("3kb", 3000),
        ("1gb", 10**9), ("1tb", 10**12), ("7KiB", 7 * KIB),
        ("0.1kb", 100), ("2.30kb", 2300), ("9007199254740993", 2**53 + 1),
    ],
)  # fmt: skip
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", " ", "GiB", "-1", "-4GiB", "4 XB", "four", "4GiB5", "1e9", "1.", ".5GiB", "1,5GB", "inf", "9" * 400]
)  # fmt: skip
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write for example 4GiB") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@given(st.integers(0, 2**80))
def test_plain_bytes_are_exact(num_bytes: int) -> None:
    assert parse_bytes(str(num_bytes)) == num_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3435973837, "3.2 GiB"),
        (5 * TIB, "5.0 TiB"),
        (-MIB, "-1.0 MiB"),
    ],
)
def test_sizes_are_written(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@given(st.integers(0, 2**60))
def test_what_is_written_reads_back_nearly(num_bytes: int) -> None:
    assert abs(parse_bytes(format_bytes(num_bytes)) - num_bytes) <= 0.05 * num_bytes


@given(st.integers(0, 2**64), st.integers(1, 2**40))
def test_rounding_up_is_exact(value: int, step: int) -> None:
    assert (div_ceil(value, step) - 1) * step < value <= div_ceil(value, step) * step
    assert align_up(value, step) % step == 0
    assert value <= align_up(value, step) < value + step
