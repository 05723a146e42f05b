"""A sequence in progress: its tokens, how many are computed, and what is wanted of it."""

from dataclasses import dataclass, field

from engine.request import SamplingParams


@dataclass(slots=True, eq=False)
class Sequence:
    """One row of tokens on its way through the model."""

    tokens: list[int]
    """Prompt and what was generated so far."""
    num_prompt_tokens: int
    max_tokens: int
    """Tokens it may ever hold, prompt and output together."""
    sampling: SamplingParams | None = None
    """How a generation draws its tokens; ``None`` for a scored sequence."""
    sample_index: int = 0
    score_from: int = 0
    """Scored sequences: index of the first token whose log-probability is wanted."""
    num_computed: int = 0
    """Tokens whose keys and values exist."""
    finished: bool = False
    scores: list[tuple[float, bool]] = field(default_factory=list)
    """(log-probability, whether greedy) of the tokens from ``score_from``, as they come."""

    @property
    def is_scored(self) -> bool:
        """Whether its tokens are given and only their log-probabilities are wanted."""
        return self.sampling is None

    @property
    def is_decoding(self) -> bool:
        """Whether its prompt is computed and each pass gives one generated token."""
        return not self.is_scored and self.num_computed >= self.num_prompt_tokens

    @property
    def num_to_compute(self) -> int:
        """Tokens the model must see: all that are known, but not the last of a scored sequence."""
        return len(self.tokens) - 1 if self.is_scored else len(self.tokens)

    @property
    def num_kv_tokens(self) -> int:
        """Tokens of KV cache it needs until its end: the last token's keys are never read."""
        return self.max_tokens - 1

    def wanted_rows(self, start: int, length: int) -> range:
        """Rows of a segment whose logits are needed, relative to ``start``."""
        if self.is_scored:
            first = max(start, self.score_from - 1)
            return range(first - start, length) if first < start + length else range(0)
        last = start + length == len(self.tokens)
        return range(length - 1, length) if last else range(0)
