"""Pieces of one block: never two in the same place, lowest first, all of it given back."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule

from engine.errors import EngineError, TierFull
from engine.memory.aligned import aligned_empty
from engine.memory.arena import Arena, Piece
from engine.memory.tier import MemoryTier
from engine.tiers import TierName


class ArenaBooks(RuleBasedStateMachine):
    """Any order of allocations and releases; each piece keeps what only its owner writes."""

    pieces = Bundle("pieces")

    def __init__(self) -> None:
        super().__init__()
        self.tier = MemoryTier(TierName.HOST, 300, aligned_empty)
        self.arena = Arena(self.tier, 200, "KV cache")
        self.held: dict[Piece, int] = {}

    @rule(target=pieces, size=st.integers(1, 120), mark=st.integers(1, 255))
    def allocate(self, size: int, mark: int) -> object:
        try:
            piece = self.arena.allocate(size)
        except TierFull:
            assert sum(piece.data.numel() for piece in self.held) + size > 200 or self.held
            return multiple()
        assert piece.data.shape == (size,)
        piece.data.fill_(mark)
        self.held[piece] = mark
        return piece

    @rule(piece=consumes(pieces), times=st.integers(1, 2))
    def release(self, piece: Piece, times: int) -> None:
        assert piece.data.eq(self.held.pop(piece)).all(), "somebody else wrote here"
        for _ in range(times):
            piece.release()
        with pytest.raises(EngineError, match="released"):
            _ = piece.data

    def teardown(self) -> None:
        for piece, mark in self.held.items():
            assert piece.data.eq(mark).all()
            piece.release()
        whole = self.arena.allocate(200)
        whole.release()
        assert self.tier.used == 200
        self.arena.close()
        self.arena.close()
        assert self.tier.used == 0


TestArenaBooks = ArenaBooks.TestCase
TestArenaBooks.settings = settings(max_examples=40, stateful_step_count=30)


def test_memory_that_was_used_is_used_again() -> None:
    arena = Arena(MemoryTier(TierName.HOST, 100, aligned_empty), 100, "KV cache")
    first, second = arena.allocate(30), arena.allocate(30)
    at = first.data.data_ptr()
    first.release()
    assert arena.allocate(20).data.data_ptr() == at
    second.release()


def test_a_full_arena_says_what_is_missing() -> None:
    arena = Arena(MemoryTier(TierName.DEVICE, 100, aligned_empty), 100, "KV cache")
    arena.allocate(60)
    with pytest.raises(TierFull, match=r"device memory: no contiguous 50 B are left for KV cache"):
        arena.allocate(50)
