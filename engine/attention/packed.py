"""Attention of many sequences in one call: queries packed one sequence after another, keys wherever they lie in a pool.

Each sequence's queries are the last of its keys, and each sees the keys up to its own.

Shapes: B sequences, T query tokens of all of them, S key tokens of the pool, N query heads, K key/value heads, H head
size. ``kv_S2KH`` is such a pool, and a sequence's tokens lie in it one behind the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from engine.attention.kernels import attend
from engine.attention.table import HEAD_STEP, LARGEST_HEAD, Kernel, takes_heads
from engine.errors import EngineError
from engine.units import align_up

_LSE_STEP = 32
"""The memory-efficient kernel writes a row of log-sum-exps for each sequence; a row is as long as the longest sequence
needs, rounded up to a multiple of this (``kAlignLSE``)."""
_NO_MASK, _BOTTOM_RIGHT = 0, 2
"""The memory-efficient kernel's names for masks; the second is causal and ends at the last query and the last key."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where some sequences' queries and keys lie, in whole numbers: on the host, as the scheduler knows them."""

    lengths: Sequence[int]
    """Queries of each sequence."""
    starts: Sequence[int]
    """Each one's first key in the pool."""
    used: Sequence[int]
    """How many keys each has, those of its queries included."""

    def check(self, num_keys: int) -> None:
        """Raise ``EngineError`` unless every sequence has queries, keys for each of them, and lies in the pool.

        No kernel looks: what is wrong here reads other sequences' keys, or other memory.
        """
        for length, start, used in zip(self.lengths, self.starts, self.used, strict=True):
            if not (0 < length <= used and start >= 0 and start + used <= num_keys):
                raise EngineError(f"{length} queries of keys {start} + {used} do not fit into a pool of {num_keys}")


@dataclass(frozen=True, slots=True)
class Folding:
    """Query heads that share a key/value head as something else that a kernel knows, so that nothing but queries and
    outputs is copied."""

    sequences: int = 1
    """By how much the number of sequences is multiplied; all that come from one share its keys."""
    queries: int = 1
    """By how much the queries of a sequence are multiplied, if it had one: none of them is masked."""

    @property
    def times(self) -> int:
        """How many query heads become one."""
        return self.sequences * self.queries


NO_FOLDING = Folding()


@dataclass(frozen=True, slots=True)
class Ragged:
    """``Places`` as kernels take them, on the device: the same in every layer, so made once a pass."""

    cu_q: Tensor
    """First row of each sequence's queries, and the end of the last's: int32 ``[B + 1]``."""
    starts: Tensor
    """First key of each; one more that nobody reads: int32 ``[B + 1]``."""
    used: Tensor
    """Keys of each: int32 ``[B]``."""
    lse_at: Tensor
    """Where the memory-efficient kernel leaves the log-sum-exp of each query, int32: only for ``attend_part``."""
    max_q: int
    max_k: int
    folding: Folding = NO_FOLDING


def ragged_numbers(places: Places, folding: Folding = NO_FOLDING, *, is_part: bool = False) -> list[int]:
    """All of a ``Ragged``'s numbers in one list, to be uploaded with others. ``is_part``: it is for ``attend_part``."""
    lengths = [length * folding.queries for length in places.lengths] * folding.sequences
    starts, used = (list(values) * folding.sequences for values in (places.starts, places.used))
    numbers = [0, *accumulate(lengths), *starts, 0, *used]
    if is_part:
        step = align_up(max(lengths), _LSE_STEP)
        numbers += [row * step + query for row, length in enumerate(lengths) for query in range(length)]
    return numbers


def ragged_of(places: Places, numbers: Tensor, folding: Folding = NO_FOLDING) -> Ragged:
    """A ``Ragged`` over its uploaded numbers."""
    count = len(places.lengths) * folding.sequences
    sizes = [count + 1, count + 1, count, len(numbers) - 3 * count - 2]
    cu_q, starts, used, lse_at = torch.split(numbers, sizes)
    return Ragged(cu_q, starts, used, lse_at, max(places.lengths) * folding.queries, max(places.used), folding)


class Foldings(NamedTuple):
    """What a kernel takes of a model's heads."""

    of_prompts: Folding
    of_decodes: Folding
    """Where each sequence has one query."""

    @property
    def differ(self) -> bool:
        """Whether decode tokens need a call of their own."""
        return self.of_prompts != self.of_decodes

    def of(self, lengths: Sequence[int]) -> Folding:
        """The one for sequences with these numbers of queries."""
        return self.of_decodes if max(lengths) == 1 else self.of_prompts


def foldings_of(kernel: Kernel, num_heads: int, num_kv_heads: int) -> Foldings:
    """How query heads that share a key/value head are given to a kernel."""
    group = num_heads // num_kv_heads
    if kernel is Kernel.EFFICIENT:
        return Foldings(*[Folding(sequences=group)] * 2)  # it knows no groups
    # Flash does, but reads a head's keys once for each of its queries.
    return Foldings(NO_FOLDING, Folding(queries=group))


def attend_packed(kernel: Kernel, q_TNH: Tensor, kv_S2KH: Tensor, ragged: Ragged, out_TNH: Tensor) -> None:
    """Attend, into ``out``. Query heads that share a key/value head are N / K consecutive ones."""
    k_SKH, v_SKH = kv_S2KH[:, 0], kv_S2KH[:, 1]
    folding = ragged.folding
    q = fold(q_TNH, folding)
    if kernel is Kernel.EFFICIENT:
        check_arguments(kernel, q, k_SKH, v_SKH, ragged)
        unfold(_efficient(q, k_SKH, v_SKH, ragged, causal=True)[0], folding, out_TNH)
        return
    out = out_TNH if folding.times == 1 else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check_arguments(kernel, q, k_SKH, v_SKH, ragged, out)
    _flash(q, k_SKH, v_SKH, ragged, out)
    if folding.times > 1:
        unfold(out, folding, out_TNH)


def attend_part(
    kernel: Kernel, q_TNH: Tensor, kv_S2KH: Tensor, ragged: Ragged, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence to some of its keys, ``out [N, T, H]``, and ``lse [N, T]``, to be merged with others.

    Without ``causal``, all queries see all these keys.
    """
    k_SKH, v_SKH = kv_S2KH[:, 0], kv_S2KH[:, 1]
    assert ragged.folding.queries == 1, "there are many queries, and groups are best left to the kernel"
    q = fold(q_TNH, ragged.folding)
    check_arguments(kernel, q, k_SKH, v_SKH, ragged)
    if kernel is Kernel.FLASH:
        out_TNH, lse_NT = _flash_part(q, k_SKH, v_SKH, ragged, causal=causal)
        return out_TNH.transpose(0, 1), lse_NT
    _need(len(ragged.lse_at) == len(q), "places of log-sum-exps")
    found, lse_KQ = _efficient(q, k_SKH, v_SKH, ragged, causal=causal, with_lse=True)
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    unfold(found, ragged.folding, out_TNH)
    return out_TNH.transpose(0, 1), lse_KQ.view(q_TNH.shape[1], len(q_TNH))


def fold(q_TNH: Tensor, folding: Folding) -> Tensor:
    """The places in a group of query heads as rows: all of one place after another, ``[times T, N / times, H]``, or the
    places of one row after another."""
    if folding.times == 1:
        return q_TNH
    q_TKGH = q_TNH.view(len(q_TNH), -1, folding.times, q_TNH.shape[2])
    return (q_TKGH.movedim(2, 0) if folding.sequences > 1 else q_TKGH.transpose(1, 2)).flatten(0, 1)


def unfold(folded: Tensor, folding: Folding, out_TNH: Tensor) -> None:
    """What ``fold`` did, back into ``out``."""
    num_rows, times, rest = len(out_TNH), folding.times, folded.shape[1:]
    out_TKGH = out_TNH.view(num_rows, -1, times, rest[1])
    if folding.sequences > 1:
        out_TKGH.copy_(folded.view(times, num_rows, *rest).movedim(0, 2))
    else:
        out_TKGH.copy_(folded.view(num_rows, times, *rest).transpose(1, 2))


def _flash(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, out: Tensor) -> None:
    scale, causal = q.shape[-1] ** -0.5, ragged.folding.queries == 1
    if q.device.type == "cpu":
        torch.ops.overnight.attend_packed(q, k, v, ragged.cu_q, ragged.starts, ragged.used, causal, out, None)
        return
    lies = (ragged.cu_q, ragged.starts, ragged.max_q, ragged.max_k)
    public = _varlen()
    if public is None:
        out.copy_(_flash_part(q, k, v, ragged, causal=causal)[0])
    else:
        public.varlen_attn_out(
            out, q, k, v, *lies, scale=scale, window_size=(-1, 0 if causal else -1),
            enable_gqa=q.shape[1] != k.shape[1], seqused_k=ragged.used,
        )  # fmt: skip


def _flash_part(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, ``[N, T]``."""
    if q.device.type == "cpu":
        return _reference(q, k, v, ragged, causal=causal)
    out, lse_NT = torch.ops.aten._flash_attention_forward(
        q, k, v, ragged.cu_q, ragged.starts, ragged.max_q, ragged.max_k, 0.0, causal, False,
        scale=q.shape[-1] ** -0.5, seqused_k=ragged.used,
    )[:2]  # fmt: skip
    return out, lse_NT


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, *, causal: bool, with_lse: bool = False
) -> tuple[Tensor, Tensor]:
    """Output and, if asked for, log-sum-exp, ``[K, folded queries]``."""
    if q.device.type == "cpu":
        return _reference(q, k, v, ragged, causal=causal)
    mask = _BOTTOM_RIGHT if causal else _NO_MASK
    found = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, ragged.cu_q, ragged.starts, ragged.max_q, ragged.max_k, 0.0, mask,
        with_lse, scale=q.shape[-1] ** -0.5, seqlen_k=ragged.used,
    )  # fmt: skip
    if not with_lse:
        return found[0][0], found[1]
    # Of each sequence, as long a row as the longest has queries, and somewhat more.
    return found[0][0], found[1].transpose(0, 1).flatten(1).index_select(1, ragged.lse_at)


def _reference(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, *, causal: bool) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse_NT = torch.empty(q.shape[1], q.shape[0])
    torch.ops.overnight.attend_packed(q, k, v, ragged.cu_q, ragged.starts, ragged.used, causal, out, lse_NT)
    return out, lse_NT


@cache
def _varlen() -> ModuleType | None:
    """PyTorch's public face of flash attention for sequences of any length; from 2.13 on it writes where it is told."""
    try:
        module = import_module("torch.nn.attention.varlen")
    except ImportError:
        return None
    return module if hasattr(module, "varlen_attn_out") else None


def check_arguments(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, ragged: Ragged, out: Tensor | None = None) -> None:
    """Raise ``EngineError`` for what a kernel would refuse, or would not notice.

    Fake tensors accept anything, so this stands before every call, wherever it is computed. From PyTorch's
    ``aten/src/ATen/native/transformers/cuda``: ``mha_varlen_fwd`` in ``flash_attn/flash_api.cpp`` (number types, last
    dimensions, shapes, int32 starts of B + 1, head sizes up to 256 in steps of 8) and ``_efficient_attention_forward``
    in ``attention.cu`` (equal numbers of heads, no float64; ``mem_eff_attention/kernel_forward.h``,
    ``check_supported``: rows that are aligned to 16 bytes). ``Places.check`` has what lies in the numbers.
    """
    num_heads, num_kv_heads, head_size = q.shape[1], k.shape[1], q.shape[2]
    half = (torch.float16, torch.bfloat16)
    _need(q.dtype in (half if kernel is Kernel.FLASH else (*half, torch.float32)), f"{kernel} has no {q.dtype}")
    given = (q, k, v) if out is None else (q, k, v, out)
    _need(all(x.dtype == q.dtype for x in given), "queries, keys, values and outputs are of one number type")
    index = (ragged.cu_q, ragged.starts, ragged.used, ragged.lse_at)
    _need(all(x.device == q.device for x in (*given, *index)), "all lies on one device")
    _need(all(x.stride(-1) == 1 for x in given), "values of a head are neighbours")
    step = 16 // q.element_size()
    _need(
        all(offset % step == 0 for x in (q, k, v) for offset in (x.storage_offset(), x.stride(0), x.stride(1))),
        "heads begin at 16 bytes",
    )
    _need(takes_heads(head_size), f"heads of {HEAD_STEP}, 16 or so on up to {LARGEST_HEAD} values, not {head_size}")
    _need(k.shape == v.shape and k.shape[2] == head_size, "keys and values are of one shape")
    _need(num_heads % num_kv_heads == 0, "as many query heads for each key/value head")
    _need(kernel is Kernel.FLASH or num_heads == num_kv_heads, f"{kernel} knows no groups")
    _need(out is None or out.shape == q.shape, "an output for each query")
    count = len(ragged.used)
    _need(count > 0, "there are sequences")
    _need(len(ragged.cu_q) == len(ragged.starts) == count + 1, "starts of each sequence, and one more")
    _need(
        all(x.dtype == torch.int32 and x.is_contiguous() for x in index), "starts and lengths are int32, in one piece"
    )


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise EngineError(f"attention was called without this: {what}")


_LIBRARY = torch.library.Library("overnight", "DEF")  # type: ignore[no-untyped-call]
"""The reference is one operator to whoever watches, as a kernel is: it reads the numbers when it runs, not before."""
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "attend_packed(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor starts, Tensor used, bool causal, Tensor(a!) out, "
    "Tensor(b!)? lse) -> ()"
)


def _attend_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, starts: Tensor, used: Tensor, causal: bool, out: Tensor,
    lse: Tensor | None,
) -> None:  # fmt: skip
    """The same, sequence by sequence; for devices that are simulated."""
    borders = cu_q.tolist()
    for first, end, start, count in zip(borders, borders[1:], starts.tolist(), used.tolist(), strict=False):
        rows, keys = slice(first, end), slice(start, start + count)
        found, its_lse = attend(
            q[rows].transpose(0, 1), k[keys].transpose(0, 1), v[keys].transpose(0, 1), causal=causal
        )
        out[rows] = found.transpose(0, 1)
        if lse is not None:
            lse[:, rows] = its_lse


_LIBRARY.impl("attend_packed", _attend_on_cpu, "CPU")  # type: ignore[no-untyped-call]
