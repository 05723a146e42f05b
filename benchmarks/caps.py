"""A process under a hard limit of memory that counts its page cache: a memory cgroup of its own, version 1 or 2."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from engine.units import format_bytes

_ROOT = Path("/sys/fs/cgroup")
_NUMBER = count()


class CapUnavailable(Exception):
    """No memory cgroup can be made here; the message says why, for people."""


@dataclass(frozen=True, slots=True)
class _Names:
    limit: str
    swap: str
    kills: str
    """The file with a line ``oom_kill N``."""


_V1 = _Names("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control")
_V2 = _Names("memory.max", "memory.swap.max", "memory.events")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    code: int
    over_cap: bool
    """Killed because it wanted more memory than the cap."""
    timed_out: bool


class Cap:
    """A memory group with a limit; use ``cap`` to make one."""

    def __init__(self, group: Path, names: _Names) -> None:
        self._group = group
        self._names = names

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command line that runs ``command`` inside the group from its first instruction on."""
        script = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", script, str(self._group / "cgroup.procs"), *command]

    def num_kills(self) -> int:
        """Processes that the limit has killed."""
        for line in (self._group / self._names.kills).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0


@contextlib.contextmanager
def cap(num_bytes: int) -> Iterator[Cap]:
    """A new memory group limited to ``num_bytes``, removed at the end.

    Raises:
        CapUnavailable: not Linux, no right to make one, or the memory controller is not ours to use.
    """
    tried = []
    for parent, names in _parents():
        group = parent / f"overnight-benchmark-{os.getpid()}-{next(_NUMBER)}"
        try:
            group.mkdir()
        except OSError as error:
            tried.append(f"{parent}: {error.strerror}")
            continue
        try:
            try:
                _limit(group, names, num_bytes)
            except OSError as error:
                tried.append(f"{parent}: {error.strerror}")
                continue
            made = Cap(group, names)
            if subprocess.run(made.wrap(["true"]), capture_output=True, check=False).returncode:
                tried.append(f"{parent}: a process cannot be moved there")
                continue
            yield made
            return
        finally:
            _remove(group)
    raise CapUnavailable("no memory cgroup can be made here (" + ("; ".join(tried) or "none is mounted") + ")")


def run(command: Sequence[str], cap: Cap | None, *, cwd: Path, log: Path, timeout_s: float) -> Ended:
    """Run ``command`` to its end; what it prints goes to ``log``."""
    wrapped = cap.wrap(command) if cap else list(command)
    with (
        log.open("wb") as out,
        subprocess.Popen(wrapped, cwd=cwd, stdout=out, stderr=out, start_new_session=True) as process,
    ):
        try:
            code = process.wait(timeout_s)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
            code = _kill(process)
        except BaseException:
            _kill(process)
            raise
    return Ended(code, bool(cap and cap.num_kills()), timed_out)


def forget_cached(folders: Iterable[Path]) -> None:
    """Drop the page cache of all files in ``folders``.

    Pages that another process has read are not counted against a group that reads them again: without this, a capped
    process would read a model for nothing that was made a moment ago.
    """
    for path in (path for folder in folders for path in folder.iterdir() if path.is_file()):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def explain(ended: Ended, num_bytes: int | None) -> str | None:
    """What went wrong, for people; ``None``: nothing."""
    if ended.timed_out:
        return "still running at the time limit"
    if ended.over_cap:
        return f"killed: it needs more than the memory cap of {format_bytes(num_bytes or 0)}"
    if ended.code < 0:
        return f"killed by {signal.Signals(-ended.code).name}"
    return f"ended with exit code {ended.code}" if ended.code else None


def _parents() -> Iterator[tuple[Path, _Names]]:
    """Groups in which one could be made: this process's own, then those above it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield from ((group, _V1) for group in _upwards(_ROOT / "memory", path))
        elif not controllers:
            # In version 2 a group that holds processes cannot limit groups below it: those above may.
            yield from ((group, _V2) for group in _upwards(_ROOT, path))


def _upwards(root: Path, path: str) -> Iterator[Path]:
    group = root / path.lstrip("/")
    while group.is_relative_to(root):
        if (group / "cgroup.procs").exists():
            yield group
        group = group.parent


def _limit(group: Path, names: _Names, num_bytes: int) -> None:
    (group / names.limit).write_text(str(num_bytes))
    swap = str(num_bytes) if names is _V1 else "0"
    with contextlib.suppress(OSError):  # a kernel without swap accounting has no such file
        (group / names.swap).write_text(swap)


def _remove(group: Path) -> None:
    for _ in range(50):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.1)  # the kernel still takes leave of the last process


def _kill(process: "subprocess.Popen[bytes]") -> int:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
