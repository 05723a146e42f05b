"""Four bits on a GPU: unpacked as on the CPU, and outputs that are those of the numbers that they stand for."""

from contextlib import closing
from pathlib import Path

import pytest

from engine.dtypes import DType
from engine.formats.int4_sizes import GROUPS, Int4
from tests.engine.placements import scattered
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
from tests.gpu.on_gpu import KINDS, LENGTHS, ON_A_GPU, Arithmetic, Model, options, skip_without, texts
from tests.gpu.test_parity import KV_TIERS

pytestmark = ON_A_GPU

WEIGHTS = ("all-device", "all-host", "weights-on-disk", "split", "all-host-and-attended-there")
"""Layers that stay, that are copied, that are read, and two that are open at a time."""
FLOAT32 = [kind for kind in KINDS if kind.dtype is DType.FLOAT32]


@pytest.fixture(scope="module")
def model(kind: Arithmetic, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return packed_weights(tmp_path_factory.mktemp("int4"), kind.dtype)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_unpacked_to_the_cpus_bits(shape: tuple[int, int], group: int, kind: Arithmetic) -> None:
    with closing(kind.device()) as device:
        check_unpacking(device, kind.dtype, shape, Int4(group))


@pytest.mark.parametrize("head_size", HEADS)
def test_keys_and_values_are_rounded_as_on_the_cpu(head_size: int, kind: Arithmetic) -> None:
    with closing(kind.device()) as device:
        check_rows(device, kind.dtype, head_size)


@pytest.mark.parametrize("stay_packed", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_outputs_are_those_of_the_unpacked_weights(
    name: str, stay_packed: bool, kind: Arithmetic, model: Model, tmp_path: Path
) -> None:
    asked = options(name, stay_packed=stay_packed, **scattered(tmp_path))
    check_outputs(model, asked, kind.device(), texts())


@pytest.mark.parametrize("head_size", HEADS)
@pytest.mark.parametrize("name", KV_TIERS)
@pytest.mark.parametrize("exact", FLOAT32, ids=str)
def test_outputs_are_those_of_rounded_keys_and_values(
    exact: Arithmetic, name: str, head_size: int, tmp_path: Path
) -> None:
    """In float32 alone: of half precision's keys, some are rounded otherwise than the oracle's."""
    skip_without(exact)
    made = cache_model(tmp_path, exact.dtype, head_size, init_std=0.05)
    round_cache(made, head_size)
    asked = options(name, kv_format=Int4.name, **scattered(tmp_path / "spill"))
    check_outputs(made, asked, exact.device(), texts(), within=DType.FLOAT16)


@pytest.mark.parametrize("head_size", HEADS)
def test_windows_are_rounded_as_on_the_cpu(head_size: int, kind: Arithmetic) -> None:
    with closing(kind.device()) as device:
        check_windows(device, kind.dtype, head_size)


@pytest.mark.parametrize(("lengths", "buffers"), [(LENGTHS, {}), (LONG, IN_PARTS)], ids=["whole", "in parts"])
@pytest.mark.parametrize("name", KV_TIERS)
@pytest.mark.parametrize("exact", FLOAT32, ids=str)
def test_outputs_are_those_of_keys_that_are_rounded_by_windows(
    exact: Arithmetic, name: str, lengths: tuple[int, ...], buffers: dict[str, int], tmp_path: Path
) -> None:
    """In float32 alone, as above."""
    skip_without(exact)
    asked = options(name, kv_format=Int4.name, **{**scattered(tmp_path / "spill"), **buffers})
    check_outputs(rotary_model(tmp_path, exact.dtype), asked, exact.device(), texts(lengths), within=DType.FLOAT16)


@pytest.fixture(scope="module", params=[64, 80], ids=lambda size: f"heads of {size}")
def plain(request: pytest.FixtureRequest, kind: Arithmetic, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return cache_model(tmp_path_factory.mktemp("plain"), kind.dtype, request.param)


@pytest.mark.parametrize("chunk", [None, 1], ids=["chunks as they come", "token by token"])
@pytest.mark.parametrize("name", KV_TIERS)
def test_a_packed_cache_gives_what_a_plain_one_gives_of_rounded_keys(
    name: str, chunk: int | None, kind: Arithmetic, plain: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = options(name, prefill_chunk=chunk, **scattered(tmp_path))
    some = texts(LENGTHS if chunk is None else LENGTHS[:-1])  # a pass for each token of the longest
    check_cache(plain, asked, kind.device, some, monkeypatch)
