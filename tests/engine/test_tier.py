"""The budget law: what is held never exceeds the budget, and the books add up at every moment."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from engine.errors import EngineError, TierFull
from engine.memory.aligned import aligned_empty
from engine.memory.tier import Block, MemoryTier, Tier
from engine.tiers import TierName
from engine.units import GIB, TIB


class TierBooks(RuleBasedStateMachine):
    """Any order of allocations and releases, beside a plain list of what is held."""

    blocks = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.tier = MemoryTier(TierName.HOST, 1000, aligned_empty)
        self.held: list[Block] = []
        self.most = 0

    @rule(target=blocks, size=st.integers(0, 600), what=st.sampled_from(["weights", "KV cache", "activations"]))
    def allocate(self, size: int, what: str) -> object:
        before = sum(block.data.numel() for block in self.held)
        if before + size > 1000:
            with pytest.raises(TierFull, match=f"host memory is full: {what} needs"):
                self.tier.allocate(size, what)
            return multiple()
        block = self.tier.allocate(size, what)
        assert block.data.shape == (size,)
        assert block.data.dtype == torch.uint8
        self.held.append(block)
        self.most = max(self.most, before + size)
        return block

    @rule(block=consumes(blocks), times=st.integers(1, 2))
    def release(self, block: Block, times: int) -> None:
        self.held.remove(block)
        for _ in range(times):
            block.release()
        with pytest.raises(EngineError, match="was released"):
            _ = block.data

    @invariant()
    def books_add_up(self) -> None:
        self.tier.check_integrity()
        assert self.tier.used == sum(block.data.numel() for block in self.held) <= self.tier.budget
        assert self.tier.peak == self.most


TestTierBooks = TierBooks.TestCase
TestTierBooks.settings = settings(max_examples=40, stateful_step_count=30)


def test_a_full_tier_says_what_is_left() -> None:
    tier = Tier(TierName.DEVICE, 4 * GIB)
    tier.take(3 * GIB, "weights")
    with pytest.raises(
        TierFull, match=r"device memory is full: KV cache needs 2\.0 GiB, 1\.0 GiB of 4\.0 GiB are left"
    ):
        tier.take(2 * GIB, "KV cache")
    assert tier.used == tier.peak == 3 * GIB
    tier.check_integrity()


def test_giving_back_more_than_is_held_is_refused() -> None:
    tier = Tier(TierName.HOST, 100)
    tier.take(60, "weights")
    with pytest.raises(EngineError, match="KV cache gives back 1 bytes and holds 0"):
        tier.give(1, "KV cache")
    with pytest.raises(EngineError, match="weights gives back 61 bytes and holds 60"):
        tier.give(61, "weights")
    tier.check_integrity()


@given(st.integers(0, 50), st.integers(-50, 50).filter(bool))
def test_books_that_do_not_add_up_are_found(held: int, error: int) -> None:
    tier = Tier(TierName.HOST, 100)
    tier.take(held, "weights")
    tier.used += error
    with pytest.raises(EngineError, match=f"used {held + error}, held {held} "):
        tier.check_integrity()


def test_a_machine_with_less_memory_than_the_budget_promises() -> None:
    tier = MemoryTier(TierName.HOST, 1 << 62, aligned_empty)
    with pytest.raises(TierFull, match=r"the machine has no .* TiB left for weights.*lower --host-memory"):
        tier.allocate(1 << 60, "weights")
    assert tier.used == 0
    tier.check_integrity()


def test_a_failed_allocation_is_not_counted() -> None:
    def fails(num_bytes: int) -> torch.Tensor:
        raise RuntimeError("the driver is gone")

    tier = MemoryTier(TierName.DEVICE, TIB, fails)
    with pytest.raises(RuntimeError, match="the driver is gone"):
        tier.allocate(GIB, "weights")
    assert tier.used == 0
    tier.check_integrity()
