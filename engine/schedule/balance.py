"""How many prompt tokens a pass should carry, learned from the passes before it."""

from collections import deque
from statistics import median_high
from typing import TYPE_CHECKING

from engine.memory.lane import LaneName

if TYPE_CHECKING:
    from engine.schedule.passes import PassStats

MIN_PROMPT_TOKENS = 64
"""A pass carries at least these: prompts must not starve where decoding alone takes as long as the links."""
RECENT = 3
"""Passes by which the links, and all compute but prompts, are judged: what one of them says is not believed alone."""
PROMPTS = 9
"""Passes with prompts by which a prompt token's compute is judged; a change is believed after more than half of them.

On a GPU a pass may be told of before its compute has ended, and then seems to take a fraction of it."""


class Balance:
    """Makes compute of a pass take as long as its weights take to come.

    A pass lasts as long as the longer of the two. Prompt tokens beyond the balance make it longer; with fewer, compute
    waits for weights, while the same prompts will cost time of their own in another pass.

    Each number is a median, so a pass that tells nonsense changes nothing. A prompt token's compute contains a part of
    everything else that was computed beside it: it is too high rather than too low, and so the next passes approach
    the balance from one side, in smaller steps, instead of jumping over it.
    """

    def __init__(self) -> None:
        self._links_s: deque[float] = deque(maxlen=RECENT)
        self._passes: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._prompt_token_s: deque[float] = deque(maxlen=PROMPTS)

    @property
    def prompt_tokens(self) -> int | None:
        """Prompt tokens of the next pass; ``None``: all there are, since nothing is streamed or nothing is known."""
        if not self._prompt_token_s or not (links_s := median_high(self._links_s)):
            return None
        prompt_token_s = median_high(self._prompt_token_s)
        if not prompt_token_s:
            return None
        other_s = median_high(compute_s - tokens * prompt_token_s for tokens, compute_s in self._passes)
        return max(MIN_PROMPT_TOKENS, int((links_s - other_s) / prompt_token_s))

    def learn(self, stats: "PassStats") -> None:
        """Take a pass into account."""
        compute_s = stats.lane_seconds.get(LaneName.DEVICE_COMPUTE, 0.0)
        links = [seconds for lane, seconds in stats.lane_seconds.items() if lane != LaneName.DEVICE_COMPUTE]
        self.learn_pass(stats.prefill_tokens, compute_s, max(links, default=0.0))

    def learn_pass(self, prompt_tokens: float, compute_s: float, links_s: float) -> None:
        """The same, of a pass that was computed or predicted; ``links_s`` is of the busiest link."""
        self._links_s.append(links_s)
        self._passes.append((prompt_tokens, compute_s))
        if prompt_tokens >= MIN_PROMPT_TOKENS:
            self._prompt_token_s.append(compute_s / prompt_tokens)
