"""What is right in four bits, on any device: the tests on a GPU ask for it, and those of devices that only seem one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.int4_rows import PackedRows
from engine.attention.int4_sizes import WINDOW, head_group
from engine.attention.int4_window_rows import WindowRows
from engine.attention.stored import PlainRows
from engine.dtypes import DType
from engine.formats.int4 import pack, quantised_columns, unpack
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain
from engine.loading import load_engine
from engine.memory.device import Device
from engine.memory.tensors import torch_dtype
from engine.planner.plan import PlanOptions
from engine.weights.importing import import_checkpoint
from tests.engine.test_int4_rotary import BY_WINDOWS
from tests.engine.test_int4_weights import round_model
from tests.gpu.on_gpu import Model, check, llama_model, opt_model, results

SHAPES = ((1, 64), (7, 200), (48, 4096), (300, 1024))
"""Rows and width of matrices; the second is padded."""
HEADS = (32, 64, 80, 128)
TOKENS = 300
SELDOM = 0.01
"""How many bytes of packed keys and values may be others on another device: it divides in another way, and a value that
lies in the middle between two codes may get either."""
CACHE_ERROR = {DType.FLOAT32: 0.1, DType.FLOAT16: 0.1, DType.BFLOAT16: 0.3}
"""How far summed log-probabilities may be from those of a plain cache of rounded keys: where sums are rounded in
another order, some codes are others. Those of a cache that does not round are farther off."""


def raw_matrix(stored: Int4, shape: tuple[int, int]) -> Tensor:
    """The bytes of a random matrix whose groups differ in size, and one of which has equal values."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(shape, generator=generator) * torch.logspace(-3, 1, shape[0])[:, None]
    values[-1, : stored.group] = 0.5
    return torch.cat([part.flatten().view(torch.uint8) for part in pack(stored, values)])


def check_unpacking(device: Device, dtype: DType, shape: tuple[int, int], stored: Int4) -> None:
    """To the bit what the CPU makes of the same bytes."""
    raw = raw_matrix(stored, shape)
    expected = torch.empty(stored.unpacked_shape(shape), dtype=torch_dtype(dtype))
    unpack(stored, raw, expected)
    with torch.inference_mode(), device.computing():
        found = torch.full_like(expected, float("nan"), device=device.torch_device)
        unpack(stored, device.upload(raw), found)
        assert torch.equal(device.download(found), expected)


def check_rows(device: Device, dtype: DType, head_size: int) -> None:
    """Packed there, keys and values are nearly the CPU's bytes; unpacked there, the very numbers, gaps or none."""
    heads = 3
    stored = PackedRows(heads, head_size, Int4(head_group(head_size)))
    qkv = torch.randn(TOKENS, 3 * heads, head_size, generator=torch.Generator().manual_seed(2)).to(torch_dtype(dtype))
    kv = qkv[:, heads:].view(TOKENS, 2, heads, head_size)
    with torch.inference_mode(), device.computing():
        there = device.upload(qkv)
        rows_there = stored.rounded(there[:, heads:].view(kv.shape))
        out_there = torch.full_like(there[:, heads:].contiguous(), float("nan")).view(kv.shape)
        stored.unpack(rows_there, out_there)
        rows, found, rounded = device.download(rows_there), device.download(out_there), device.download(there)
    assert (rows != stored.pack(kv)).float().mean() <= SELDOM
    expected = torch.empty(kv.shape, dtype=kv.dtype)
    stored.unpack(rows, expected)
    assert torch.equal(found, expected)
    assert torch.equal(rounded[:, heads:].view(kv.shape), expected)
    assert torch.equal(rounded[:, :heads], qkv[:, :heads])


def packed_weights(folder: Path, dtype: DType) -> Model:
    """A model whose layers are in four bits; its oracle has the weights that these stand for in ``dtype``."""
    made = opt_model(folder, torch_dtype(dtype))
    manifest = import_checkpoint(made.folder, folder / "int4", matrices=Int4())
    round_model(manifest, folder / "int4", made.oracle.model, dtype)
    return replace(made, folder=folder / "int4")


def cache_model(folder: Path, dtype: DType, head_size: int, **changes: Any) -> Model:
    """A plain model of two layers: where a code is another one, few that follow can be others for it."""
    size = 4 * head_size
    sizes = {"num_hidden_layers": 2, "hidden_size": size, "word_embed_proj_dim": size, "ffn_dim": 2 * size}
    return opt_model(folder, torch_dtype(dtype), **sizes, **changes)


def round_cache(model: Model, head_size: int) -> None:
    """Let the oracle round keys and values as a cache in four bits does, to numbers of float32."""
    stored = PackedRows(1, head_size, Int4(head_group(head_size)))

    def rounded(_module: object, _given: object, heads: Tensor) -> Tensor:
        some = heads.reshape(-1, 2, 1, head_size).clone()  # each by itself, whichever head of whichever token it is
        stored.rounded(some)
        return some.view(heads.shape)

    oracle: Any = model.oracle.model
    for layer in oracle.model.decoder.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.register_forward_hook(rounded)


def rotary_model(folder: Path, dtype: DType) -> Model:
    """A plain model of two layers whose keys positions turn; its oracle rounds values and full windows of keys."""
    made = llama_model(folder, "llama, grouped queries", torch_dtype(dtype), num_hidden_layers=2)
    made.oracle.model.set_attn_implementation(BY_WINDOWS)
    return made


IN_PARTS = {"micro_batch": 64, "group_tokens": 1}
"""Options with which sequences of some hundred tokens are longer than a buffer."""
LONG = (1, 400, 900)


def check_windows(device: Device, dtype: DType, head_size: int) -> None:
    """Packed there, keys of windows are nearly the CPU's, and unpacked there the very numbers that the CPU unpacks."""
    heads, number = 3, 4
    rows = WindowRows(heads, head_size, Int4(head_group(head_size, turned=True)), torch_dtype(dtype))
    generator = torch.Generator().manual_seed(3)
    keys_nwKH = torch.randn(number, WINDOW, heads, head_size, generator=generator).to(torch_dtype(dtype))
    slots = torch.randperm(number * WINDOW, generator=generator)
    pool = torch.zeros(number * WINDOW, rows.row_bytes, dtype=torch.uint8)
    with torch.inference_mode(), device.computing():
        there, to = device.upload(pool), device.upload(slots)
        rows.put_windows(there, to, quantised_columns(device.upload(keys_nwKH).transpose(1, 2)))
        out = torch.full((len(slots), 2, heads, head_size), float("nan"), dtype=keys_nwKH.dtype)
        found_there = device.upload(out)
        rows.unpack(there.index_select(0, to), found_there)
        packed_there, found = device.download(there), device.download(found_there)
    rows.put_windows(pool, slots, quantised_columns(keys_nwKH.transpose(1, 2)))
    assert (packed_there != pool).float().mean() <= SELDOM
    expected = torch.empty_like(out)
    rows.unpack(packed_there[slots], expected)
    assert torch.equal(found[:, 0], expected[:, 0])
    assert found[:, 0].isfinite().all()


def check_outputs(
    model: Model, options: PlanOptions, device: Device, some: Sequence[str], within: DType | None = None
) -> None:
    """The oracle's, as nearly as other placements must be; ``within``: as in this number type."""
    with load_engine(model.folder, options, device=device) as engine:
        assert "int4" in (engine.plan.weight_format, engine.plan.kv_format.name)
        found = results(engine, some)
        engine.check_integrity()
        for tier in engine.tiers.values():
            assert tier.peak <= tier.budget
    check(found, model, some, within or engine.plan.dtype)


def check_cache(
    model: Model,
    options: PlanOptions,
    open_device: Callable[[], Device],
    some: Sequence[str],
    patch: pytest.MonkeyPatch,
) -> None:
    """What a plain cache gives of rounded keys and values: in half precision, no oracle has the same codes."""

    def rounded(self: PlainRows, kv_S2KH: Tensor) -> Tensor:
        heads, head_size = kv_S2KH.shape[2:]
        PackedRows(heads, head_size, Int4(head_group(head_size))).rounded(kv_S2KH)
        return kv_S2KH

    scores = []
    for kv_format in (Int4.name, Plain.name):
        with load_engine(model.folder, replace(options, kv_format=kv_format), device=open_device()) as engine:
            assert engine.plan.kv_format.name == kv_format
            scores.append({key: value for key, value in results(engine, some).items() if isinstance(value, float)})
            engine.check_integrity()
        patch.setattr(PlainRows, "rounded", rounded)
    assert len(scores[0]) == len(some)
    assert scores[0] == pytest.approx(scores[1], abs=CACHE_ERROR[engine.plan.dtype])
