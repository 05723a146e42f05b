import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import redis

from worker.private_redis import find_redis_server
from worker.redis_hint import start_command


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret@127.0.0.1:6379/0", "redis://10.0.0.7:6379/0", "rediss://127.0.0.1:6379/0",
        "unix:///run/redis.sock", "redis://127.0.0.1:6379/0?db=3", "redis://[::1", "redis://127.0.0.1:x/0",
    ],
)  # fmt: skip
def test_elsewhere_nothing_is_promised(url: str) -> None:
    assert start_command(url) is None


def test_the_default_needs_no_port() -> None:
    assert start_command("redis://127.0.0.1:6379/0") == "redis-server --daemonize yes --bind 127.0.0.1 --save ''"


def test_the_command_starts_a_redis_for_this_machine_alone(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = start_command(f"redis://localhost:{port}/0")
    assert command is not None
    words = shlex.split(command)
    assert words[0] == "redis-server"
    server = shutil.which("redis-server") or str(find_redis_server())
    subprocess.run([server, *words[1:]], check=True, cwd=tmp_path, capture_output=True, timeout=30)
    with redis.Redis(port=port) as client:
        for _ in range(200):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.02)
        assert client.config_get("bind") == {"bind": "127.0.0.1"}
        assert client.config_get("save") == {"save": ""}
        client.shutdown(nosave=True)
    assert list(tmp_path.iterdir()) == []
