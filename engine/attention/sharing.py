"""How the CPU's cores share the parts of a micro-batch whose keys and values they can address."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch

from engine.attention.balanced import balanced
from engine.attention.rows import Part, Rows
from engine.attention.workers import AttentionWorkers

Shares = list[list[Part]]


class Sharing(Protocol):
    """One way."""

    def share(self, parts: Sequence[Part]) -> Shares:
        """Who computes what, the same in every layer; once a pass and micro-batch."""

    def run(self, rows: Rows, shares: Shares) -> None:
        """Attend, in one layer."""

    def close(self) -> None:
        """End threads."""


class InTurn:
    """One part after the other, where there is one core."""

    def share(self, parts: Sequence[Part]) -> Shares:
        """All in one share."""
        return [list(parts)]

    def run(self, rows: Rows, shares: Shares) -> None:
        """Attend, in one layer."""
        for share in shares:
            for part in share:
                rows.attend(part)

    def close(self) -> None:
        """Nothing is held."""


class OnCores(AttentionWorkers):
    """Each core its own parts."""

    def share(self, parts: Sequence[Part]) -> Shares:
        """Shares of nearly equal cost; a prompt's heads are split, since a pass has too few prompts to share out."""
        pieces = [piece for part in parts for piece in self._split(part)]
        groups = balanced([piece.cost for piece in pieces], self.num_threads)
        return [[pieces[index] for index in group] for group in groups]

    def run(self, rows: Rows, shares: Shares) -> None:
        """Attend, in one layer."""
        self.each(rows.attend, shares)

    def _split(self, part: Part) -> list[Part]:
        if part.segment.length == 1:
            return [part]
        borders = [part.kv_heads.stop * core // self.num_threads for core in range(self.num_threads + 1)]
        heads = [slice(first, end) for first, end in pairwise(borders) if first < end]
        return [Part(part.begin, part.segment, part.kv, some) for some in heads]


def sharing() -> Sharing:
    """The one for as many cores as this process computes with."""
    return OnCores(torch.get_num_threads()) if torch.get_num_threads() > 1 else InTurn()
