import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import redis

from worker.private_redis import PrivateRedis, RedisUnavailable, find_redis_server

OWNER = """
import signal
from worker.private_redis import PrivateRedis
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it, as shells do behind &
with PrivateRedis() as server:
    print(server.pid, server.url, flush=True)
    signal.pause()
"""


def is_gone(pid: int) -> bool:
    """Whether a process has ended, though its parent may not have asked yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until_gone(pid: int) -> bool:
    """A process of another parent can only be polled for; one that stays is ended by the test's own time limit."""
    while not is_gone(pid):
        time.sleep(0.02)
    return True


def test_it_answers_on_a_socket_that_is_ours_alone_and_on_no_port(redis_server: PrivateRedis) -> None:
    assert stat.S_IMODE(redis_server.socket.stat().st_mode) == 0o700
    assert stat.S_IMODE(redis_server.socket.parent.stat().st_mode) == 0o700
    listening = [c for c in psutil.Process(redis_server.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == []
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.config_get("port") == {"port": "0"}


def test_it_leaves_nothing_behind() -> None:
    with PrivateRedis() as server:
        folder, pid = server.socket.parent, server.pid
        with redis.Redis.from_url(server.url) as client:
            client.set("a", 1)

    assert not folder.exists()
    assert until_gone(pid)


def test_it_ends_with_an_owner_that_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline().split()[0])
    assert psutil.pid_exists(pid)

    owner.kill()
    owner.wait()
    owner.stdout.close()

    assert until_gone(pid)


def test_a_ctrl_c_at_the_terminal_reaches_the_owner_first(redis_server: PrivateRedis) -> None:
    assert os.getsid(redis_server.pid) != os.getsid(0)


def test_stopping_twice_is_harmless() -> None:
    server = PrivateRedis().start()
    pid, folder = server.pid, server.socket.parent
    assert not is_gone(pid)
    for _ in range(2):
        server.stop()
        assert is_gone(pid)
        assert not folder.exists()


def test_a_server_on_the_path_goes_before_the_one_in_the_wheel(tmp_path: Path) -> None:
    mine = tmp_path / "redis-server"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)

    assert find_redis_server(str(tmp_path)) == mine
    assert find_redis_server(str(tmp_path / "empty")) != mine


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\necho no memory left\nexit 3\n")
    broken.chmod(0o755)

    with pytest.raises(RedisUnavailable, match="no memory left"):
        PrivateRedis(broken).start()
    with pytest.raises(RedisUnavailable, match="cannot start"):
        PrivateRedis(tmp_path / "absent").start()


def test_signals_of_the_owner_still_work_with_a_server_running() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert owner.stdout is not None
    pid, url = owner.stdout.readline().split()

    owner.send_signal(signal.SIGINT)
    owner.wait()
    owner.stdout.close()

    assert until_gone(int(pid))
    assert not Path(url.removeprefix("unix://")).parent.exists()
