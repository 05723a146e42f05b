"""PyTorch and oneDNN compile a kernel for every size that they meet: the engine lets them meet few."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import engine.formats.linear as linear_module
from engine.attention.kernels import CAUSAL_ROWS, KERNEL_STEP, _causal_blocks
from engine.formats.linear import padded_rows

CPU = torch.device("cpu")


@given(st.integers(1, 3000), st.integers(0, 3000))
def test_causal_blocks_cover_the_queries_and_come_in_few_sizes(num_queries: int, past: int) -> None:
    num_keys = past + num_queries
    blocks = list(_causal_blocks(num_queries, num_keys))

    assert [row for first, end in blocks for row in range(first, end)] == list(range(num_queries))
    for first, end in blocks:
        assert end - first <= CAUSAL_ROWS
        if end - first >= KERNEL_STEP:  # fewer queries are computed without compiling anything
            assert (end - first) % KERNEL_STEP == (past + end) % KERNEL_STEP == 0


@given(st.integers(0, 4096))
def test_products_come_in_few_sizes(num_rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_module, "has_products", lambda dtype: True)
        padded = padded_rows(num_rows, torch.bfloat16, CPU)

        assert num_rows <= padded < num_rows + 32
        assert padded % (16 if num_rows <= 256 else 32) == 0
        assert padded_rows(num_rows, torch.float32, CPU) == num_rows
        on_gpu = padded_rows(num_rows, torch.float16, torch.device("cuda:0"))
        assert num_rows <= on_gpu < num_rows + 64
        assert on_gpu % 64 == 0
