"""Ending things: every one of them, whatever the others do."""

from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from contextlib import suppress

from engine.errors import EngineError
from engine.memory.lane import Event


def run_all(steps: Iterable[Callable[[], object]]) -> None:
    """Take every step, in order.

    Raises:
        BaseException: the first error of a step, after the last step was taken.
    """
    first: BaseException | None = None
    for step in steps:
        try:
            step()
        except BaseException as error:  # noqa: BLE001  raised below
            first = first or error
    if first is not None:
        raise first


def settle(event: Event) -> None:
    """Wait until nothing is under way any more; if it failed, whoever needed it was told."""
    with suppress(EngineError, CancelledError):
        event.wait()
