"""Attention over pages: what attention over whole sequences gives, whatever lies in the rest of the memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.pages import attend_pages, page_table
from engine.attention.stored import PlainRows
from tests.engine.plain_attention import attend_plainly

PAGE, HEAD = 4, 8


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int]:
    """Pages and tokens of each row, and how many pages there are."""
    counts = draw(st.lists(st.integers(1, 21), min_size=1, max_size=7))
    needed = [-(-count // PAGE) + draw(st.integers(0, 1)) for count in counts]
    total = sum(needed) + draw(st.integers(0, 5))
    places = draw(st.permutations(range(total))) if draw(st.booleans()) else list(range(total))
    found, taken = [], 0
    for number in needed:
        found.append(list(places[taken : taken + number]))
        taken += number
    return found, counts, total


def behind_last(pages: list[int], count: int) -> list[int]:
    """Tokens of a row's last page that are not its own: whatever number lies there."""
    page, used = pages[(count - 1) // PAGE], (count - 1) % PAGE + 1
    return [page * PAGE + token for token in range(used, PAGE)]


@settings(max_examples=80, deadline=None)
@given(
    rows(), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(1, 5), st.integers(0, 1 << 30),
)  # fmt: skip
def test_each_row_attends_to_its_own_tokens(
    drawn: tuple[list[list[int]], list[int], int], heads: tuple[int, int], dtype: torch.dtype, most: int, seed: int
) -> None:
    pages, counts, total = drawn
    generator = torch.Generator().manual_seed(seed)
    pool = torch.full((total * PAGE, 2, heads[1], HEAD), float("nan"), dtype=dtype)
    behind = [slot for its, count in zip(pages, counts, strict=True) for slot in behind_last(its, count)]
    pool[behind] = 1000.0
    q = torch.randn(len(counts), heads[0], HEAD, generator=generator).to(dtype)
    expected = []
    for row, (its, count) in enumerate(zip(pages, counts, strict=True)):
        kv = torch.randn(count, 2, heads[1], HEAD, generator=generator).to(dtype)
        slots = [its[token // PAGE] * PAGE + token % PAGE for token in range(count)]
        pool[torch.tensor(slots)] = kv
        keys, values = (kv[:, which].transpose(0, 1).repeat_interleave(heads[0] // heads[1], 0) for which in (0, 1))
        expected.append(attend_plainly(q[row][:, None], keys, values, causal=False)[0][:, 0])
    out = torch.empty_like(q)
    table = page_table(pages, counts, PAGE, most)
    work = torch.empty(len(table.pages) * heads[0] * (HEAD + 2) + q.numel() + most * heads[1] * PAGE * HEAD)
    stored = PlainRows(heads[1], HEAD, dtype)
    staged = torch.full((most * PAGE * pool[0].nbytes,), 255, dtype=torch.uint8)
    attend_pages(q, pool, stored, table, staged, work.fill_(float("nan")), out)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out, torch.stack(expected), atol=tolerance, rtol=tolerance)


def test_neighbouring_pages_are_computed_together() -> None:
    table = page_table([[0, 1], [3, 2], [7]], [8, 7, 1], PAGE, 4)
    assert [(block.entries, block.first_page) for block in table.blocks] == [(slice(0, 4), 0), (slice(4, 5), 7)]
    assert table.owners.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("count", [1, 4])
def test_pages_behind_the_last_token_are_left_out(count: int) -> None:
    assert page_table([[5, 6]], [count], PAGE, 8).pages.tolist() == [5]
