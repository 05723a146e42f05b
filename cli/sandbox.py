"""Where prompt templates run: no way out of it, and an end in time and memory.

A template is the user's own, and can still be a mistake: two nested loops over ``range(99999)``, or a filter that pads
to a billion characters, must not hold up a night's work. Python cannot stop one computation from outside, so time is
watched by a signal and memory by the limit of the process's address space; what neither could stop, numbers of
millions of digits, is refused before it is computed.
"""

import gc
import resource
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from jinja2 import pass_environment
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MOST_DIGITS, _MOST_BITS = 4300, 14_285
"""Digits and bits of the largest whole number: those that Python can still write in decimal."""
_AGAIN_S = 0.05
"""The signal repeats, should Python have dropped the first one's exception (in a destructor)."""
_STATM = Path("/proc/self/statm")
_MEASURE_EVERY = 256
"""Calls between two looks at the size of the address space, which cost more than most templates."""

Result = TypeVar("Result")


class OutOfTime(Exception):
    """The computation was stopped."""


class _Expired(BaseException):
    """Raised within the computation; no handler of a template's own filters may take it for an error of theirs."""


class SandboxEnvironment(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox without products and powers that would take all memory, or for ever."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, *, most_items: int, **options: Any) -> None:
        """``most_items``: what a repeated text or list may hold."""
        super().__init__(**options)
        self.filters["sum"] = _sum
        self._most_items = most_items

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The product or power of two values.

        Raises:
            OverflowError: it would be too large.
        """
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MOST_BITS:
                raise OverflowError(f"{operator} makes a number of more than {_MOST_DIGITS:,} digits")
        elif operator == "*":
            for repeated, times in ((left, right), (right, left)):
                if isinstance(times, int) and hasattr(repeated, "__len__") and len(repeated) * times > self._most_items:
                    raise OverflowError(f"* makes a text or a list of more than {self._most_items:,} parts")
        return super().call_binop(context, operator, left, right)


@pass_environment
def _sum(
    environment: SandboxEnvironment, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0
) -> Any:
    """Jinja2's filter, step by step: Python's own `sum` of many lists could not be stopped on its way."""
    total = start
    for item in iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable):
        total = total + item
    return total


class Bounds:
    """Runs computations, one at a time, each within a time and an amount of memory.

    Only the main thread can be stopped in time (Python runs signal handlers there), and what Python does in one step
    (one large sort) is stopped at its end. Only Linux limits memory.
    """

    def __init__(self, *, seconds: float, memory: int) -> None:
        """``seconds`` of computing; ``memory`` in bytes, on top of what the process has already."""
        self._seconds = seconds
        self.memory = memory
        self._space = 0
        self._calls = 0
        self._running = False

    def run(self, compute: Callable[[], Result]) -> Result:
        """What ``compute`` returns; it may be called twice.

        Raises:
            OutOfTime, MemoryError: it went beyond its bounds.
        """
        is_fresh = self._calls % _MEASURE_EVERY == 0
        self._calls += 1
        if is_fresh:
            self._space = _address_space()
        try:
            return self._run_in_memory(compute)
        except MemoryError:
            if is_fresh:
                raise
        self._space = _address_space()  # the process itself may have grown meanwhile
        return self._run_in_memory(compute)

    def _run_in_memory(self, compute: Callable[[], Result]) -> Result:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = self._space + self.memory
        limited = self._space > 0 and (soft == resource.RLIM_INFINITY or most < soft)
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        try:
            if threading.current_thread() is threading.main_thread():
                return self._run_in_time(compute)
            return compute()
        finally:
            if limited:
                resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def _run_in_time(self, compute: Callable[[], Result]) -> Result:
        # The time that is computed, not that of a clock: a busy or a sleeping machine is nobody's fault.
        before = signal.signal(signal.SIGPROF, self._expire)
        # Nor is anybody's garbage this row's: its finalizers would swallow what the signal raises, and end half done.
        collects = gc.isenabled()
        gc.disable()
        try:
            # The signal may come anywhere between these lines: then the outer one catches it.
            try:
                self._running = True
                signal.setitimer(signal.ITIMER_PROF, self._seconds, _AGAIN_S)
                return compute()
            finally:
                self._running = False
        except _Expired:
            self._running = False
            raise OutOfTime from None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
            if collects:
                gc.enable()

    def _expire(self, number: int, frame: FrameType | None) -> None:
        if self._running:
            raise _Expired


def _address_space() -> int:
    """The size of this process's address space, in bytes; 0 where the system does not tell."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 0
