"""The tests of four bits on a GPU, carried out where there is none: with the kernels of a card, and copies like CUDA's.

On a card they say whether it computes so; here, that what they ask is right, and that they can be run.
"""

from pathlib import Path

import pytest

from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from tests.engine.like_cuda import CARDS, Card, LikeCuda
from tests.engine.placements import options_of, scattered
from tests.gpu.in_four_bits import (
    HEADS,
    IN_PARTS,
    LONG,
    SHAPES,
    cache_model,
    check_cache,
    check_outputs,
    check_rows,
    check_unpacking,
    check_windows,
    packed_weights,
    rotary_model,
    round_cache,
)
from tests.gpu.on_gpu import texts

LENGTHS, WINDOWS = (1, 9, 60), (9, 60, 150)
EXACT = Card((8, 0), DType.FLOAT32)


@pytest.fixture(scope="module", params=CARDS.values(), ids=list(CARDS))
def card(request: pytest.FixtureRequest) -> Card:
    found: Card = request.param
    return found


def test_weights_and_rows_are_unpacked(card: Card) -> None:
    for shape in SHAPES:
        check_unpacking(LikeCuda(card.capability), card.dtype, shape, Int4())
    for head_size in HEADS:
        check_rows(LikeCuda(card.capability), card.dtype, head_size)
        check_windows(LikeCuda(card.capability), card.dtype, head_size)


def test_outputs_are_those_of_the_unpacked_weights(card: Card, tmp_path: Path) -> None:
    model = packed_weights(tmp_path, card.dtype)
    for stay_packed, name in ((False, "split"), (True, "all-device")):
        asked = options_of(name, stay_packed=stay_packed, **scattered(tmp_path / "spill"))
        check_outputs(model, asked, LikeCuda(card.capability), texts(LENGTHS))


@pytest.mark.parametrize("head_size", [64, 80])
def test_outputs_are_those_of_rounded_keys_and_values(head_size: int, tmp_path: Path) -> None:
    made = cache_model(tmp_path, EXACT.dtype, head_size, init_std=0.05)
    round_cache(made, head_size)
    for name in ("all-device", "split"):
        asked = options_of(name, kv_format=Int4.name, **scattered(tmp_path / "spill"))
        check_outputs(made, asked, LikeCuda(EXACT.capability), texts(LENGTHS), within=DType.FLOAT16)


def test_outputs_are_those_of_keys_that_are_rounded_by_windows(tmp_path: Path) -> None:
    made = rotary_model(tmp_path, EXACT.dtype)
    for name, lengths, buffers in (
        *((name, WINDOWS, {}) for name in ("all-device", "split", "attended-on-host")), ("split", LONG, IN_PARTS)
    ):  # fmt: skip
        asked = options_of(name, kv_format=Int4.name, **{**scattered(tmp_path / "spill"), **buffers})
        check_outputs(made, asked, LikeCuda(EXACT.capability), texts(lengths), within=DType.FLOAT16)


@pytest.mark.parametrize("name", ["all-device", "kv-on-host"])
def test_a_packed_cache_gives_what_a_plain_one_gives_of_rounded_keys(
    name: str, card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = cache_model(tmp_path, card.dtype, 64)
    asked = options_of(name, **scattered(tmp_path / "spill"))
    check_cache(model, asked, lambda: LikeCuda(card.capability), texts(LENGTHS), monkeypatch)
