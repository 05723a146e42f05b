import pytest

from storage.errors import DatabaseFull, DatabaseLocked, DatabaseUnreachable, NotADatabase, SchemaTooNew
from worker.patience import Patience


class Time:
    """Passes while somebody pauses."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Away:
    """A database that answers after a number of refusals."""

    def __init__(self, refusals: int, error: Exception) -> None:
        self.left = refusals
        self.error = error

    def __call__(self) -> str:
        if self.left:
            self.left -= 1
            raise self.error
        return "answer"


@pytest.mark.parametrize("error", [DatabaseLocked("locked"), DatabaseFull("full"), DatabaseUnreachable("away")])
def test_what_may_pass_is_waited_out_with_growing_pauses(error: Exception) -> None:
    time = Time()
    assert Patience(3600.0, time.pause, clock=time)(Away(12, error)) == "answer"
    assert time.pauses[:4] == [0.25, 0.5, 1.0, 2.0]
    assert max(time.pauses) == 15.0


def test_patience_has_an_end() -> None:
    time = Time()
    with pytest.raises(DatabaseLocked):
        Patience(60.0, time.pause, clock=time)(Away(10**6, DatabaseLocked("locked")))
    assert 60.0 < time.now <= 75.0


@pytest.mark.parametrize("error", [NotADatabase("no"), SchemaTooNew("new"), ValueError("ours")])
def test_what_waiting_cannot_mend_is_told_at_once(error: Exception) -> None:
    time = Time()
    with pytest.raises(type(error)):
        Patience(3600.0, time.pause, clock=time)(Away(1, error))
    assert time.pauses == []


def test_who_stops_waits_no_longer() -> None:
    time = Time()
    with pytest.raises(DatabaseLocked):
        Patience(3600.0, time.pause, is_over=lambda: time.now > 3, clock=time)(Away(10**6, DatabaseLocked("locked")))
    assert 3 < time.now < 10


def test_it_says_that_it_waits_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    time = Time()
    with caplog.at_level("WARNING", logger="overnight"):
        Patience(3600.0, time.pause, clock=time)(Away(20, DatabaseLocked("locked")))
    assert time.now > 180
    assert 2 <= len(caplog.records) <= time.now / 60 + 1
