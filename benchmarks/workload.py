"""What is run: seeded token ids, the same for everyone. No torch here."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from benchmarks.shapes import BOS, NUM_SPECIAL, Flops


@dataclass(frozen=True, slots=True)
class Range:
    """Lengths drawn uniformly from ``low`` to ``high``, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> "Range":
        """``512`` or ``32-1024``.

        Raises:
            ValueError: with a sentence for people.
        """
        low, dash, high = text.partition("-")
        parts = [low, high] if dash else [low, low]
        if not all(part.isascii() and part.isdecimal() for part in parts):
            raise ValueError(f"{text!r} is not a length; write 512, or 32-1024 for lengths spread over a range")
        first, last = (int(part) for part in parts)
        if not 1 <= first <= last:
            raise ValueError(f"{text!r} is not a length: it must be at least 1, and the first no more than the second")
        return cls(first, last)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Item:
    """One request: what is given, and what is generated (their number) or scored (the tokens)."""

    prompt: tuple[int, ...]
    """Begins with the BOS."""
    continuation: tuple[int, ...]
    """For scoring these tokens; for generation, only as many."""

    @property
    def prompt_text(self) -> str:
        """The prompt for a tokenizer that adds the BOS itself."""
        return as_text(self.prompt[1:])


@dataclass(frozen=True, slots=True)
class Work:
    """Figures of a run that follow from its requests alone."""

    num_out: int
    """Tokens generated or scored."""
    prefill_tokens: int
    decode_tokens: int
    prefill_flops: float
    decode_flops: float

    @property
    def flops(self) -> float:
        """All of them."""
        return self.prefill_flops + self.decode_flops

    def pass_flops(self, prefill_tokens: int, decode_tokens: int) -> float:
        """The share of a pass: attention and logits are spread evenly over the tokens of their kind."""
        prefill = self.prefill_flops / self.prefill_tokens * prefill_tokens if self.prefill_tokens else 0.0
        decode = self.decode_flops / self.decode_tokens * decode_tokens if self.decode_tokens else 0.0
        return prefill + decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """An endless, seeded stream of requests; everyone takes as many as needed from its beginning."""

    task: str
    """``generate`` or ``score``."""
    prompt: Range
    out: Range
    """Tokens generated, or those of the scored continuation."""
    vocabulary: int
    seed: int = 0

    def items(self, count: int) -> list[Item]:
        """The first ``count`` requests."""
        return list(islice(self._stream(), count))

    def _stream(self) -> Iterator[Item]:
        rng = random.Random(self.seed)
        tokens = range(NUM_SPECIAL, self.vocabulary)
        while True:
            prompt = rng.randint(self.prompt.low, self.prompt.high)
            out = rng.randint(self.out.low, self.out.high)
            yield Item((BOS, *rng.choices(tokens, k=prompt - 1)), tuple(rng.choices(tokens, k=out)))

    def work(self, items: list[Item], flops: Flops) -> Work:
        """What these requests cost at least."""
        prefill_tokens = decode_tokens = 0
        prefill = decode = 0.0
        for item in items:
            given, out = len(item.prompt), len(item.continuation)
            seen = given if self.task == "generate" else given + out - 1
            rows = 1 if self.task == "generate" else out
            prefill_tokens += seen
            prefill += seen * flops.per_token + rows * flops.per_row + flops.per_pair * seen * (seen + 1) / 2
            if self.task == "generate":
                decode_tokens += out - 1
                # The k-th decode token looks at the prompt, those before it and itself.
                pairs = (out - 1) * given + (out - 1) * out / 2
                decode += (out - 1) * (flops.per_token + flops.per_row) + flops.per_pair * pairs
        num_out = sum(len(item.continuation) for item in items)
        return Work(num_out, prefill_tokens, decode_tokens, prefill, decode)


def as_text(tokens: tuple[int, ...]) -> str:
    """Token ids in the words of ``checkpoints.make_tokenizer``."""
    return " ".join(f"w{token}" for token in tokens)
