"""OpenMP's idle threads, and how long they hold a core that others could use. No torch: this must come before it."""

import os
from collections.abc import MutableMapping

SPIN_COUNT = "10000"
"""Rounds that an idle thread waits actively, some tens of microseconds: enough to be there for the next product of a
layer, too little to take a core from the threads that attend to segments between the products."""


def limit_spinning(environ: MutableMapping[str, str] = os.environ) -> None:
    """Call before torch is imported; where it was, or where the user has chosen (GOMP_SPINCOUNT), nothing changes.

    GNU's OpenMP spins for milliseconds by default. Decode passes of 16 sequences took 107 ms with that and 61 ms with
    this, on two cores.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
