"""Attention of decode tokens on the host, over pages of keys and values: page by page, then merged by sequence.

So that Python's part does not grow with the number of sequences, a page is what is computed together with others, not a
sequence: each page is multiplied with its own sequence's query, neighbours in memory in one batched product, and
softmax over each page is merged over the pages of a sequence (Milakov & Gimelshein 2018, arXiv:1805.02867).

Keys and values are converted to float32 in a workspace first, a head's one after another: processors multiply half
precision over keys that lie token by token at a tenth of that speed. Memory is read in the order in which it lies, into
a block that caches hold, and only that is read head by head: three times as fast as doing both at once.

Shapes: R rows, n pages, b pages of a block, p tokens of a page, N query heads, K key/value heads, G = N / K of them,
H head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention.int4_pages import PackedPages, WindowedPages
from engine.attention.int4_rows import PackedRows
from engine.attention.int4_window_rows import WindowRows
from engine.attention.stored import StoredRows


@dataclass(frozen=True, slots=True)
class Block:
    """Pages that are computed together."""

    entries: slice
    """Their places in the page table."""
    first_page: int | None
    """Where they are neighbours, the first; ``None``: they are not."""
    opened: tuple[Tensor, Tensor] | None = None
    """Which of its pages, int64 ``[m]``, are the windows of the rows' own tokens, and the rows of the pool with their
    plain keys, int64 ``[m, beside]``: see ``int4_windows``."""


@dataclass(frozen=True, slots=True)
class PageTable:
    """Which pages the rows of a micro-batch attend to, the same in every layer; in order of where the pages lie."""

    pages: Tensor
    """Int64 ``[n]``."""
    owners: Tensor
    """The row that each page belongs to: int64 ``[n]``."""
    hidden: Tensor
    """Added to scores: minus infinity where a page has no token yet, else 0; float32 ``[n, 1, p]``."""
    blocks: tuple[Block, ...]


def page_table(
    pages: Sequence[Sequence[int]],
    num_tokens: Sequence[int],
    page_tokens: int,
    most: int,
    opened: Sequence[Sequence[int]] = (),
) -> PageTable:
    """A table for rows with these pages and this many tokens each, in blocks of at most ``most`` pages.

    ``opened``: rows of the pool with the plain keys of each one's last page, where keys are packed by windows.
    """
    entries = sorted(
        (page, row, min(page_tokens, count - index * page_tokens), (index + 1) * page_tokens >= count)
        for row, (its, count) in enumerate(zip(pages, num_tokens, strict=True))
        for index, page in enumerate(its)
        if index * page_tokens < count
    )
    places, owners, used, is_last = np.array(entries, dtype=np.int64).T
    is_unused = np.arange(page_tokens) >= used[:, None]
    blocks = []
    for first in range(0, len(places), most):
        end = min(first + most, len(places))
        together = places[end - 1] - places[first] == end - 1 - first
        last = [place for place in range(first, end) if opened and is_last[place]]
        plain = None
        if last:
            rows = [opened[owners[place]] for place in last]
            plain = torch.tensor(last, dtype=torch.int64) - first, torch.tensor(rows, dtype=torch.int64)
        blocks.append(Block(slice(first, end), int(places[first]) if together else None, plain))
    return PageTable(
        pages=torch.from_numpy(places.copy()),
        owners=torch.from_numpy(owners.copy()),
        hidden=torch.from_numpy(np.where(is_unused[:, None], np.float32("-inf"), np.float32(0))),
        blocks=tuple(blocks),
    )


def attend_pages(
    q_RNH: Tensor, pool: Tensor, stored: StoredRows, table: PageTable, staged: Tensor, work: Tensor, out_RNH: Tensor
) -> None:
    """One token of each row attends to all of its sequence, into ``out``.

    Args:
        q_RNH: queries, in any number type.
        pool: one layer's rows, of whole pages; where nobody has written a page yet, it holds some number.
        stored: how a token lies in a row.
        table: where the rows' keys are.
        staged: bytes for the pages of a block, one after the other.
        work: float32 values: of a block's keys, of every page and of every row; see ``host_attention_bytes``.
        out_RNH: receives the result.
    """
    num_heads, head_size = q_RNH.shape[1:]
    page_tokens = table.hidden.shape[2]
    pool_P = pool.view(-1, page_tokens, *pool.shape[1:])
    read = _pages_of(stored, pool)
    scaled_RNH = q_RNH.float() * head_size**-0.5
    count, size = len(table.pages), num_heads * head_size
    taken = (count * num_heads, count * num_heads, count * size)
    best_nN, sum_nN, out_n, rest = torch.split(work, [*taken, len(work) - sum(taken)])
    best_nN, sum_nN = best_nN.view(count, num_heads), sum_nN.view(count, num_heads)
    out_nNH = out_n.view(count, num_heads, head_size)
    wide_RNH, block = rest[: q_RNH.numel()].view(q_RNH.shape), rest[q_RNH.numel() :]
    for each in table.blocks:
        entries, number = each.entries, each.entries.stop - each.entries.start
        rows_bp = stored.view(staged[: number * pool_P[0].nbytes]).view(number, *pool_P.shape[1:])
        _stage(pool_P, table.pages[entries], each, rows_bp)
        read.stage(rows_bp, block, each.opened)
        scores_bNp = read.scores(scaled_RNH[table.owners[entries]])
        scores_bNp += table.hidden[entries]
        torch.amax(scores_bNp, -1, out=best_nN[entries])
        scores_bNp.sub_(best_nN[entries][..., None]).exp_()
        torch.sum(scores_bNp, -1, out=sum_nN[entries])
        read.weigh(scores_bNp, out_nNH[entries])
    _merge(table, best_nN, sum_nN, out_nNH, wide_RNH.zero_())
    out_RNH.copy_(wide_RNH)


class PlainPages:
    """Pages of rows ``[k|v, K, H]``; keys and values are multiplied as float32."""

    def stage(self, rows_bp2KH: Tensor, work: Tensor, opened: tuple[Tensor, Tensor] | None = None) -> None:
        """These are next; ``work``: float32 values."""
        del opened
        self._k_bKpH, self._v_bKpH = rows_bp2KH.permute(2, 0, 3, 1, 4)
        self._wide_bKpH = work[: self._k_bKpH.numel()].view(self._k_bKpH.shape)

    def scores(self, q_bNH: Tensor) -> Tensor:
        """Queries times keys, ``[b, N, p]``."""
        number, num_kv_heads, page_tokens, head_size = self._wide_bKpH.shape
        self._wide_bKpH.copy_(self._k_bKpH)
        q = q_bNH.view(number * num_kv_heads, -1, head_size)
        return torch.bmm(q, self._wide_bKpH.flatten(0, 1).mT).view(number, -1, page_tokens)

    def weigh(self, weights_bNp: Tensor, out_bNH: Tensor) -> None:
        """Values times weights, into ``out``."""
        number, num_kv_heads, page_tokens, head_size = self._wide_bKpH.shape
        self._wide_bKpH.copy_(self._v_bKpH)
        weights = weights_bNp.view(number * num_kv_heads, -1, page_tokens)
        out = out_bNH.view(number * num_kv_heads, -1, head_size)
        torch.bmm(weights, self._wide_bKpH.flatten(0, 1), out=out)


def _pages_of(stored: StoredRows, pool: Tensor) -> PlainPages | PackedPages:
    if isinstance(stored, WindowRows):
        return WindowedPages(stored, pool)
    return PackedPages(stored) if isinstance(stored, PackedRows) else PlainPages()


def _stage(pool_P: Tensor, pages: Tensor, block: Block, staged_b: Tensor) -> None:
    """The pages of a block next to each other."""
    if block.first_page is not None:
        staged_b.copy_(pool_P[block.first_page : block.first_page + len(pages)])
    else:
        torch.index_select(pool_P, 0, pages, out=staged_b)


def _merge(table: PageTable, best_nN: Tensor, sum_nN: Tensor, out_nNH: Tensor, wide_RNH: Tensor) -> None:
    """Softmax over the union of a row's pages."""
    num_rows, num_heads, _ = wide_RNH.shape
    highest_RN = torch.full((num_rows, num_heads), float("-inf"))
    highest_RN.scatter_reduce_(0, table.owners[:, None].expand_as(best_nN), best_nN, "amax")
    weights_nN = best_nN.sub_(highest_RN[table.owners]).exp_()
    sums_RN = torch.zeros(num_rows, num_heads).index_add_(0, table.owners, sum_nN.mul_(weights_nN))
    wide_RNH.index_add_(0, table.owners, out_nNH.mul_(weights_nN[..., None])).div_(sums_RN[..., None])
