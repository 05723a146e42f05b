"""The stream of requests that the engine pulls from: blocks of claimed rows, over all jobs of one model."""

from collections import deque
from collections.abc import Callable, Container, Hashable, Iterator, Sequence

from engine.request import Request

MIN_BLOCK = 64
MAX_BLOCK = 512
_SHORT_S = 1.0
_LONG_S = 10.0
_EMPTY_PAUSE_S = 0.25

Refill = Callable[[int], Sequence[Request] | None]
"""Claims at most that number of requests; an empty list: none at the moment; None: no more in this run."""


class Feed(Iterator[Request | None]):
    """An iterator for ``Engine.passes``: a request, None for "nothing at the moment", or its end.

    Rows are claimed a block at a time: large enough that claiming costs little, small enough that another worker, or a
    job of higher priority, does not wait behind rows that are claimed but not begun. A block that is used up within a
    second doubles the next one, one that lasts longer than ten halves it.
    """

    def __init__(
        self, refill: Refill, clock: Callable[[], float], begins: Callable[[Request], None] | None = None
    ) -> None:
        """``begins`` is told of each request just before the engine gets it."""
        self._refill = refill
        self._clock = clock
        self._begins = begins
        self._claimed: deque[Request] = deque()
        self._block = MIN_BLOCK
        self._refilled_at: float | None = None
        self._empty_until: float | None = None
        self._is_over = False

    @property
    def block(self) -> int:
        """How many rows the next claim asks for, at most."""
        return self._block

    def forget(self, keys: Container[Hashable]) -> int:
        """Drop the claimed requests with these keys; returns how many."""
        kept = [request for request in self._claimed if request.key not in keys]
        dropped = len(self._claimed) - len(kept)
        self._claimed = deque(kept)
        return dropped

    def __next__(self) -> Request | None:
        if not self._claimed and not self._is_over:
            self._claim()
        if self._claimed:
            request = self._claimed.popleft()
            if self._begins is not None:
                self._begins(request)
            return request
        if self._is_over:
            raise StopIteration
        return None

    def _claim(self) -> None:
        now = self._clock()
        # The engine asks after every pass, which may be every few milliseconds: an idle queue is not asked that often.
        if self._empty_until is not None and now < self._empty_until:
            return
        if self._refilled_at is not None:
            lasted_s = now - self._refilled_at
            if lasted_s < _SHORT_S:
                self._block = min(2 * self._block, MAX_BLOCK)
            elif lasted_s > _LONG_S:
                self._block = max(self._block // 2, MIN_BLOCK)
        requests = self._refill(self._block)
        if requests is None:
            self._is_over = True
        elif requests:
            self._claimed.extend(requests)
            self._refilled_at, self._empty_until = now, None
        else:
            self._refilled_at, self._empty_until = None, now + _EMPTY_PAUSE_S
