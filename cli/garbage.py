"""How often Python collects garbage: seldom in a command that ends in a moment, as usual in one that works on.

What imports make stays until the process ends, which frees all memory at once. Looking through it again at every
700 objects took a seventh of the time of `overnight status`, and looking through it at the end a quarter.
"""

import atexit
import gc

_USUAL = gc.get_threshold()
_SELDOM = 100_000


def collect_seldom() -> None:
    """For the whole process, until `collect_as_usual`: seldom while it works, and not at its end.

    What has a life of its own (a file, a database connection) is closed by its owner, never by the garbage collector.
    """
    gc.set_threshold(_SELDOM, *_USUAL[1:])
    atexit.register(gc.freeze)


def collect_as_usual() -> None:
    """For a process that may have large garbage."""
    gc.set_threshold(*_USUAL)
    atexit.unregister(gc.freeze)
