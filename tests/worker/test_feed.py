from collections.abc import Sequence
from itertools import islice

from engine.request import Request, Score
from worker.feed import MAX_BLOCK, MIN_BLOCK, Feed
from worker.rows import JobKeys, RowKey


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Store:
    """Rows that wait, and the limits with which they were asked for."""

    def __init__(self, num_rows: int, *, job_id: int = 1) -> None:
        self.rows = [Request(RowKey(job_id, index, 1), Score("a", "b")) for index in range(num_rows)]
        self.asked: list[int] = []
        self.is_over = False

    def __call__(self, limit: int) -> Sequence[Request] | None:
        self.asked.append(limit)
        if self.is_over:
            return None
        taken, self.rows = self.rows[:limit], self.rows[limit:]
        return taken


def test_rows_come_in_order_and_then_nothing_at_the_moment() -> None:
    store = Store(100)
    feed = Feed(store, Clock())

    got = list(islice(feed, 101))

    assert [request.key.index for request in got[:100] if request] == list(range(100))  # type: ignore[attr-defined]
    assert got[100] is None


def test_an_idle_queue_is_not_asked_after_every_pass() -> None:
    clock, store = Clock(), Store(0)
    feed = Feed(store, clock)

    assert [next(feed) for _ in range(50)] == [None] * 50
    assert len(store.asked) == 1
    clock.now += 0.3
    next(feed)
    assert len(store.asked) == 2


def test_blocks_grow_while_they_are_used_up_quickly_and_shrink_when_they_last() -> None:
    clock, store = Clock(), Store(10_000)
    feed = Feed(store, clock)

    for _ in islice(feed, 3 * MAX_BLOCK):
        pass
    assert store.asked[:4] == [MIN_BLOCK, 2 * MIN_BLOCK, 4 * MIN_BLOCK, MAX_BLOCK]
    assert feed.block == MAX_BLOCK
    for _ in range(6):
        clock.now += 20
        for _ in islice(feed, feed.block):
            pass
    assert feed.block == MIN_BLOCK


def test_each_request_is_told_of_just_before_it_is_handed_out() -> None:
    told: list[object] = []
    feed = Feed(Store(3), Clock(), begins=lambda request: told.append(request.key))
    assert told == []
    first = next(feed)
    assert first is not None
    assert told == [first.key]


def test_the_end_is_the_end() -> None:
    store = Store(10)
    feed = Feed(store, Clock())
    next(feed)
    store.is_over = True

    assert len(list(feed)) == 9
    assert next(feed, "over") == "over"
    assert len(store.asked) == 2


def test_a_cancelled_jobs_rows_are_forgotten() -> None:
    store = Store(10)
    feed = Feed(store, Clock())
    next(feed)

    assert feed.forget(JobKeys([2])) == 0
    assert feed.forget({RowKey(1, 3, 1), RowKey(1, 4, 2)}) == 1
    assert feed.forget(JobKeys([1])) == 8
    assert next(feed) is None
