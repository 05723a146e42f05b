"""Child processes that end with their owner, also when the owner is killed with SIGKILL."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1


def spawn(
    command: Sequence[str | Path],
    *,
    environ: Mapping[str, str] | None = None,
    stdin: IO[bytes] | int | None = subprocess.DEVNULL,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | int | None = None,
    death_signal: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start ``command`` in a session of its own, to be sent ``death_signal`` when its owner ends, however it ends.

    Its own session keeps a Ctrl-C at the terminal from the child, so that the owner can end its children in order.
    The kernel watches the *thread* that starts the child: call this from one that lives as long as the owner.
    On systems other than Linux a child may outlive an owner that was killed.
    """
    return subprocess.Popen(
        [str(word) for word in command],
        env=None if environ is None else dict(environ),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=_die_with_parent(death_signal),  # noqa: PLW1509 (it makes two system calls and nothing else)
    )


def stop(child: subprocess.Popen[bytes], *, grace_s: float) -> int:
    """Ask ``child`` to end (SIGTERM), kill it after ``grace_s`` seconds, and return its exit status."""
    if child.poll() is None:
        child.terminate()
    try:
        return child.wait(timeout=grace_s)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _die_with_parent(death_signal: signal.Signals) -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    # Loaded here: between fork and exec only the calls themselves are safe.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    owner = os.getpid()

    def ask_the_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != owner:  # it ended before we asked, so the signal will never come
            os._exit(1)

    return ask_the_kernel
