"""How many prompt tokens a pass should carry, learned from the passes before it."""

from engine.memory.lane import LaneName
from engine.passes import PassStats

MIN_PROMPT_TOKENS = 64
"""A pass carries so many in any case: prompts must not starve where decoding alone takes as long as the links."""
_LEARNING = 0.5
"""Weight of the newest pass."""


class Balance:
    """Makes compute of a pass take as long as its weights take to come.

    A pass lasts as long as the longer of the two. Prompt tokens beyond the balance make it longer; with fewer, compute
    waits for weights, while the same prompts will cost time of their own in another pass.
    """

    def __init__(self) -> None:
        self._links_s = 0.0
        self._prompt_token_s: float | None = None
        self._other_s = 0.0

    @property
    def prompt_tokens(self) -> int | None:
        """For the next pass; ``None``: as many as there are, since nothing is streamed or nothing known."""
        if not self._links_s or not self._prompt_token_s:
            return None
        return max(MIN_PROMPT_TOKENS, int((self._links_s - self._other_s) / self._prompt_token_s))

    def learn(self, stats: PassStats) -> None:
        """Take a pass into account."""
        compute_s = stats.lane_seconds.get(LaneName.DEVICE_COMPUTE, 0.0)
        links = [seconds for lane, seconds in stats.lane_seconds.items() if lane != LaneName.DEVICE_COMPUTE]
        self._links_s = _blend(self._links_s, max(links, default=0.0))
        if stats.prefill_tokens >= MIN_PROMPT_TOKENS:
            # The least that was seen is nearest to the truth, for it is what a pass without anything else would take.
            # Too high a value only makes the next passes approach the balance in smaller steps.
            seen = compute_s / stats.prefill_tokens
            self._prompt_token_s = min(seen, self._prompt_token_s or seen)
        self._other_s = _blend(self._other_s, compute_s - stats.prefill_tokens * (self._prompt_token_s or 0.0))


def _blend(old: float, new: float) -> float:
    return old + _LEARNING * (new - old) if old else new
