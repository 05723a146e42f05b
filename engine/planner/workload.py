"""The lengths of the requests that wait, as a histogram: what a plan is made for."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from engine.kvcache.cache import ROOM_OF_TOKENS, SequenceRoom
from engine.units import align_up, div_ceil

MORE_MAY_COME = 4
"""How many times the requests that a plan was made for it is still good for; its KV cache has room for them."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """So many requests of one length."""

    prompt: int
    """Tokens of the prompt."""
    generated: int
    """Tokens generated, the first of them by the pass that ends the prompt."""
    requests: int

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.generated < 1 or self.requests < 1:
            raise ValueError(f"lengths and number of requests must be at least 1, not {self}")

    @property
    def reserved(self) -> int:
        """Tokens of KV cache reserved from admission to the end: the last token's keys are never read."""
        return self.prompt + self.generated - 1

    @property
    def decode_steps(self) -> int:
        """Passes that compute one generated token."""
        return self.generated - 1

    @property
    def attended(self) -> int:
        """KV tokens that decode attention reads, over all steps; a step sees its own token, too."""
        return self.decode_steps * self.prompt + self.decode_steps * (self.decode_steps + 1) // 2


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests by length, in the order of the dataset as far as anybody knows: well mixed."""

    lengths: tuple[Lengths, ...]
    per_row: float = 1
    """Requests that a row of the dataset is, in the mean: one for each choice, where it is to choose."""

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("a workload needs at least one request")

    @classmethod
    def uniform(cls, prompt: int, generated: int, requests: int) -> "Workload":
        """All of one length."""
        return cls((Lengths(prompt, generated, requests),))

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]], most: int = 16) -> "Workload":
        """From ``(prompt, generated)`` of each request, gathered into at most ``most`` lengths.

        Neighbours by generated, then prompt length are gathered, each group as its mean rounded up.
        """
        counts = sorted(Counter(pairs).items(), key=lambda item: (item[0][1], item[0][0]))
        if len(counts) <= most:
            return cls(tuple(Lengths(prompt, generated, number) for (prompt, generated), number in counts))
        total = sum(number for _, number in counts)
        groups: list[list[tuple[tuple[int, int], int]]] = [[] for _ in range(most)]
        seen = 0
        for item in counts:
            groups[seen * most // total].append(item)
            seen += item[1]
        return cls(tuple(_mean(group) for group in groups if group))

    def of_at_most(self, tokens: int) -> "Workload | None":
        """Those of its requests that reserve no more tokens of KV cache than these; ``None``: there are none."""
        lengths = tuple(each for each in self.lengths if each.reserved <= tokens)
        return replace(self, lengths=lengths) if lengths else None

    def is_like(self, other: "Workload") -> bool:
        """Whether a plan for the other is good for this one: lengths as before, and not many more requests."""
        pairs = [
            (workload.mean(lambda each: each.prompt), workload.mean(lambda each: each.generated), workload.longest)
            for workload in (self, other)
        ]
        are_near = all(max(mine, its) <= 1.25 * min(mine, its) for mine, its in zip(*pairs, strict=True))
        return are_near and self.requests <= MORE_MAY_COME * other.requests

    @property
    def longest(self) -> int:
        """KV tokens that the longest request reserves."""
        return max(each.reserved for each in self.lengths)

    def reserved_tokens(self, unit: int, room: SequenceRoom = ROOM_OF_TOKENS) -> int:
        """KV tokens that all requests together reserve, each in whole units of as many tokens."""
        return sum(align_up(room.of(each.reserved), unit) * each.requests for each in self.lengths)

    def times(self, factor: float) -> "Workload":
        """So many times the requests, of the same lengths; at least one of each."""
        lengths = (replace(each, requests=max(1, round(factor * each.requests))) for each in self.lengths)
        return replace(self, lengths=tuple(lengths))

    @property
    def requests(self) -> int:
        """How many in all."""
        return sum(each.requests for each in self.lengths)

    @property
    def rows(self) -> float:
        """Rows of the dataset."""
        return self.requests / self.per_row

    @property
    def generated(self) -> int:
        """Tokens that they will generate together."""
        return sum(each.requests * each.generated for each in self.lengths)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(each.requests * each.prompt for each in self.lengths)

    def mean(self, what: Callable[[Lengths], float]) -> float:
        """The mean over all requests of anything that follows from their lengths."""
        return sum(each.requests * what(each) for each in self.lengths) / self.requests


def _mean(group: list[tuple[tuple[int, int], int]]) -> Lengths:
    number = sum(count for _, count in group)
    prompt = sum(pair[0] * count for pair, count in group)
    generated = sum(pair[1] * count for pair, count in group)
    # Rounded up, both together may be more than any of them has, and than the model takes.
    longest = max(sum(pair) for pair, _ in group)
    mean_prompt = div_ceil(prompt, number)
    return Lengths(mean_prompt, min(div_ceil(generated, number), longest - mean_prompt), number)
