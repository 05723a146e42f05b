"""How much is measured."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.errors import Interrupted
from engine.units import KIB, MIB

SOURCE = "measured on this machine"
Points = tuple[tuple[float, float], ...]
"""The points of a curve: ``(size, units per second)``, sizes ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How large and how often: what is measured is the same."""

    widths: tuple[tuple[int, int], ...] = ((768, 12), (2048, 8))
    """Hidden sizes of the layers whose products are measured (feed-forward blocks are four times as wide), and how many
    of them have weights of their own: 170 MB as the narrow model has them, 800 MB, which no cache holds."""
    head_size: int = 64
    vocabulary: int = 50272
    tokens: tuple[int, ...] = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
    few_tokens: tuple[int, ...] = (1, 64, 512)
    """Tokens, for dtypes other than the machine's best."""
    rows: tuple[int, ...] = (1, 16, 64, 256)
    """Rows of logits computed together."""
    few_rows: tuple[int, ...] = (1, 64)
    lengths: tuple[int, ...] = (16, 64, 256, 512, 1024, 2000)
    """Tokens of sequences whose attention is measured."""
    spilled: tuple[int, ...] = (64, 512)
    """The same, of sequences in a spill file."""
    sequences: int = 32
    """Sequences that decode side by side."""
    cached_tokens: int = 16384
    """Tokens in the KV cache of each of these layers, at most: as with the weights, more than caches hold."""
    cached_layers: int = 4
    streamed_bytes: int = 384 * MIB
    """Bytes of the files of each width that are read from the disk, more or less."""
    small_transfer: int = 4 * MIB
    copies: tuple[int, ...] = (32 * KIB, 512 * KIB, 4 * MIB, 32 * MIB, 96 * MIB)
    """Bytes of a piece that is copied to the device, or back."""
    most_streamed_width: int = 2048
    """The widest layers that are read from the disk while others are computed: of wider ones, a few are gigabytes."""
    small_layers: tuple[int, int] = (4, 16)
    """Depths of two models that are too small to compute anything: what differs is the overhead of a layer."""
    small_steps: int = 24
    figure_s: float = 0.3
    """Seconds one figure may take in all its turns, more or less; slow work takes up to a few times as many."""
    busy_s: float = 2.0
    stopped: Callable[[], bool] = lambda: False
    """Whether the measurement was told to stop."""

    def pause(self) -> None:
        """Called between small steps.

        Raises:
            Interrupted: the measurement was told to stop.
        """
        if self.stopped():
            raise Interrupted("measuring this machine was interrupted; it begins anew when a plan next needs it")

    def smaller(self) -> "Effort":
        """About half the memory, down to what still tells something: the same figures, of less data."""
        return replace(
            self,
            widths=tuple((width, max(min(number, 2), number // 2)) for width, number in self.widths),
            vocabulary=_halved(self.vocabulary, 8192),
            cached_tokens=_halved(self.cached_tokens, 2 * max(self.lengths)),
            streamed_bytes=_halved(self.streamed_bytes, 64 * MIB),
            copies=tuple(sorted({size if size <= 4 * MIB else _halved(size, 4 * MIB) for size in self.copies})),
        )


def _halved(value: int, least: int) -> int:
    return max(min(value, least), value // 2)


FULL = Effort()
ON_GPU = replace(FULL, widths=((768, 12), (2048, 8), (4096, 4), (8192, 2)))
"""A GPU that models of that width are streamed to."""
QUICK = Effort(
    widths=((64, 2), (128, 2)), head_size=16, vocabulary=512, tokens=(1, 32), few_tokens=(1, 32), rows=(1, 4),
    few_rows=(1,), lengths=(8, 16), spilled=(8,), sequences=2, cached_tokens=64, cached_layers=2,
    streamed_bytes=MIB, small_transfer=MIB // 16, copies=(32 * KIB, MIB),
    small_layers=(2, 4), small_steps=4, figure_s=0.001, busy_s=0.02,
)  # fmt: skip
"""For tests."""
