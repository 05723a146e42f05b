"""Work shared out evenly. No torch."""

from collections.abc import Sequence
from heapq import heappop, heappush


def balanced(costs: Sequence[int], num_groups: int) -> list[list[int]]:
    """Indexes in at most ``num_groups`` groups of nearly equal cost: the costliest first, to the lightest group."""
    loads = [(0, group) for group in range(num_groups)]
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, group = heappop(loads)
        groups[group].append(index)
        heappush(loads, (load + costs[index], group))
    return [group for group in groups if group]
