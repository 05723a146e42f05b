"""Products with weights, with what follows them done in the same kernel where there is one that does."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.process import LARGEST_KEPT
from engine.units import MIB, align_up, div_ceil

WIDEST_BYTES = LARGEST_KEPT - MIB
"""Bytes of one result, at most: larger ones go back to the system at once when they are freed."""
_FEW_ROWS = 256
_CAST = 512
"""Rows, and outputs whose weights, that are cast at a time: few enough that the processor still has them cached."""
_FEWEST_CAST = 16
"""Rows from which casting weights costs less than it saves."""
_STEPS = 16, 32
"""Few rows are padded to a multiple of the first, the height of a matrix unit's tile; more, to one of the second."""
_GPU_STEP = 64
_TURNED_ROWS = 64
"""Rows up to which a matrix unit is given the weight as its left operand."""


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, relu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, then ``max(0, ·)`` if asked: ``[T, O]``.

    A weight whose rows are padded may be wider than ``x``; what is behind its end counts for nothing.
    """
    x_TI = _as_wide(x_TI, weight_OI)
    if _is_cast(x_TI):
        return _by_float32(x_TI, weight_OI, bias_O, x_TI.dtype, relu=relu)
    if _is_turned(x_TI):
        turned_TO = _turned(x_TI, weight_OI, bias_O)
        return torch.relu_(turned_TO) if relu else turned_TO
    if _is_fused(x_TI):
        # addmm would first write the bias over the whole result, then read it again to add to it, and a ReLU of its own
        # would do so once more: together a sixth of the time of a prompt's products.
        after = "relu" if relu else "none"
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, after, [], "")
        return fused
    out_TO = F.linear(x_TI, weight_OI, bias_O)
    return torch.relu_(out_TO) if relu else out_TO  # in place: the widest tensor of a layer need not exist twice


def add_linear_(out_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> None:
    """``out += x @ weight.T + bias``, in one kernel if there is no bias: see ``linear``."""
    if bias_O is not None or _is_cast(x_TI) or _is_fused(x_TI):
        out_TO.add_(linear(x_TI, weight_OI, bias_O))
    else:
        out_TO.addmm_(_as_wide(x_TI, weight_OI), weight_OI.mT)


def logits(x_TI: Tensor, table_VI: Tensor) -> Tensor:
    """``x @ table.T`` in float32: ``[T, V]``; see ``linear`` for a table whose rows are padded."""
    x_TI = _as_wide(x_TI, table_VI)
    if _is_cast(x_TI):
        return _by_float32(x_TI, table_VI, None, torch.float32)
    if _is_turned(x_TI):
        return _turned(x_TI, table_VI, None).float()
    return F.linear(x_TI, table_VI).float()


def row_parts(x_TI: Tensor, widest: int) -> int:
    """In how many equal parts rows should go through a block whose widest tensor has ``widest`` values a row.

    On the CPU, so that this tensor is memory that was used a moment ago, not fresh pages; and no more parts than that
    takes, since small products run at less speed. A GPU's memory is always there.
    """
    if x_TI.device.type != "cpu":
        return 1
    return max(1, div_ceil(x_TI.shape[0] * widest * x_TI.element_size(), WIDEST_BYTES))


def padded_rows(num_rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows a product should have that needs ``num_rows``.

    oneDNN compiles a kernel for each number of rows it meets, which took 8 ms with AMX and keeps 0.7 MB; packed passes
    would meet a thousand of them. A GPU's allocator finds memory again that has the same size. Elsewhere every number
    is as good.
    """
    if device.type == "cuda":
        return align_up(num_rows, _GPU_STEP)
    if dtype != torch.bfloat16 or device.type != "cpu" or not has_products(dtype):
        return num_rows
    return align_up(num_rows, _STEPS[0] if num_rows <= _FEW_ROWS else _STEPS[1])


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of this type as fast as float32: for 16 bits, if oneDNN knows how."""
    if dtype == torch.float32:
        return True
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return hasattr(torch.ops.mkldnn, "_linear_pointwise") and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


@cache
def has_matrix_units() -> bool:
    """Whether this processor multiplies tiles of numbers (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def _as_wide(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """With columns of zeros up to the weight's width. The other way, a weight cut to the width of ``x``, would be a
    view with gaps, for which oneDNN takes a kernel that is a thousand times slower."""
    missing = weight_OI.shape[1] - x_TI.shape[1]
    return F.pad(x_TI, (0, missing)) if missing else x_TI


def _is_fused(x_TI: Tensor) -> bool:
    """Whether oneDNN's own operator is best."""
    return x_TI.dtype == torch.bfloat16 and x_TI.device.type == "cpu" and has_products(x_TI.dtype)


def _is_turned(x_TI: Tensor) -> bool:
    """Whether to compute the transpose instead.

    A matrix unit wants its right operand with pairs of rows interleaved, and oneDNN rearranges it so at every call. For
    few rows that takes as long again as reading the weight; the other way round it is the rows that are rearranged.
    """
    return x_TI.shape[0] <= _TURNED_ROWS and has_matrix_units() and _is_fused(x_TI)


def _turned(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """``(weight @ x.T + bias).T``: the same sums, rounded once."""
    if bias_O is None:
        out_OT: Tensor = torch.ops.mkldnn._linear_pointwise(weight_OI, x_TI, None, "none", [], "")
    else:
        bias_OT = bias_O[:, None].expand(-1, x_TI.shape[0]).contiguous()
        out_OT = torch.ops.mkldnn._linear_pointwise.binary(weight_OI, bias_OT, x_TI, None, "add")
    return out_OT.T.contiguous()


def _is_cast(x_TI: Tensor) -> bool:
    return x_TI.device.type == "cpu" and x_TI.shape[0] >= _FEWEST_CAST and not has_products(x_TI.dtype)


def _by_float32(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype, *, relu: bool = False
) -> Tensor:
    """The product in float32, for processors that are slow in 16 bits; only its result is rounded, to ``dtype``.

    All weights in float32 would take twice the memory, so a few are cast at a time, and no more for more rows.
    """
    bias_O = None if bias_O is None else bias_O.float()
    out_TO = torch.empty(x_TI.shape[0], weight_OI.shape[0], dtype=dtype)
    for first in range(0, weight_OI.shape[0], _CAST):
        outputs = slice(first, first + _CAST)
        weight_oI, bias_o = weight_OI[outputs].float(), None if bias_O is None else bias_O[outputs]
        for x_tI, out_tO in zip(torch.split(x_TI, _CAST), torch.split(out_TO, _CAST), strict=True):
            out_to = F.linear(x_tI.float(), weight_oI, bias_o)
            out_tO[:, outputs] = torch.relu_(out_to) if relu else out_to
    return out_TO
