"""How often Python looks for garbage: seldom in a command that is over in a moment, as usual in one that works on.

What imports make stays. Looking through it again at every 700 objects took a seventh of the time of `overnight status`.
"""

import gc

_USUAL = gc.get_threshold()
_SELDOM = 100_000


def collect_seldom() -> None:
    """For the whole process, until `collect_as_usual`."""
    gc.set_threshold(_SELDOM, *_USUAL[1:])


def collect_as_usual() -> None:
    """For a process that may have large garbage."""
    gc.set_threshold(*_USUAL)
