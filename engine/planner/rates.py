"""Figures and rates of a machine, each with where it comes from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One number, and why it should be believed."""

    value: float
    source: str
    fitted: bool = False
    """Adjusted until a model agreed with measurements, rather than measured or published by itself."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.value < 0:
            raise ValueError(f"a figure must be a number of 0 or more, not {self.value}")


@dataclass(frozen=True, slots=True)
class Rate:
    """A throughput as a curve over the size of what is done at once: tokens of a product, bytes of a transfer.

    Between two points the logarithm of the rate is linear in that of the size. Below the first point time no longer
    falls with the size (the rate is in proportion to it); above the last the rate stays.
    """

    points: tuple[tuple[float, float], ...]
    """``(size, units per second)``, sizes ascending."""
    source: str
    fitted: bool = False
    busy_share: float = 1.0
    """What is left of the rate while every other lane works, too: memory and links are shared."""

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if not sizes or sizes != sorted(set(sizes)) or not all(_positive(*point) for point in self.points):
            raise ValueError(f"a rate needs points of positive size and rate, sizes ascending, not {self.points}")
        if not 0 < self.busy_share <= 1:
            raise ValueError(f"busy_share must be above 0 and at most 1, not {self.busy_share}")

    @classmethod
    def constant(cls, value: float, source: str, *, fitted: bool = False, busy_share: float = 1.0) -> "Rate":
        """The same at any size of at least one."""
        return cls(((1.0, value),), source, fitted, busy_share)

    def at(self, size: float) -> float:
        """Units per second at a size, with no other lane busy."""
        first, last = self.points[0], self.points[-1]
        if size <= first[0]:
            return first[1] * size / first[0]
        if size >= last[0]:
            return last[1]
        index = next(i for i, point in enumerate(self.points) if point[0] >= size)
        (size_a, rate_a), (size_b, rate_b) = self.points[index - 1], self.points[index]
        weight = math.log(size / size_a) / math.log(size_b / size_a)
        return math.exp((1 - weight) * math.log(rate_a) + weight * math.log(rate_b))

    @property
    def fastest(self) -> float:
        """Units per second at the size that is best."""
        return max(rate for _, rate in self.points)

    def seconds(self, amount: float, size: float) -> float:
        """Time for ``amount`` units in pieces of ``size``; nothing takes none."""
        return amount / self.at(size) if amount > 0 else 0.0


def between(curves: Mapping[int, Rate], size: int) -> Rate:
    """The curve for a size from those of others: nearest where it is beyond all, else the logarithm in between."""
    if size in curves or len(curves) == 1:
        return curves.get(size) or next(iter(curves.values()))
    low = max((each for each in curves if each < size), default=None)
    high = min((each for each in curves if each > size), default=None)
    if low is None or high is None:
        return curves[low or high or size]
    weight = math.log(size / low) / math.log(high / low)
    below, above = curves[low], curves[high]
    sizes = sorted({point[0] for rate in (below, above) for point in rate.points})
    points = tuple((each, below.at(each) ** (1 - weight) * above.at(each) ** weight) for each in sizes)
    share = below.busy_share ** (1 - weight) * above.busy_share**weight
    return Rate(points, f"between the curves of {low} and {high}", below.fitted or above.fitted, share)


def _positive(size: float, rate: float) -> bool:
    return math.isfinite(size) and math.isfinite(rate) and size > 0 and rate > 0
