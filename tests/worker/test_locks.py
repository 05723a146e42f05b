import stat
import subprocess
import sys
from pathlib import Path

import pytest

from worker.errors import DeviceBusy
from worker.locks import device_lock

HOLDER = """
import sys
from pathlib import Path
from worker.locks import device_lock
with device_lock(Path(sys.argv[1]), "cuda:0"):
    print("held", flush=True)
    input()
"""


def test_a_gpu_has_one_worker(tmp_path: Path) -> None:
    with (
        device_lock(tmp_path, "cuda:0") as is_ours,
        pytest.raises(DeviceBusy, match="cuda:0"),
        device_lock(tmp_path, "cuda:0"),
    ):
        pass

    assert is_ours


def test_another_gpu_is_free(tmp_path: Path) -> None:
    with device_lock(tmp_path, "cuda:0"), device_lock(tmp_path, "cuda:1") as is_ours:
        assert is_ours


def test_the_cpu_may_be_shared(tmp_path: Path) -> None:
    with device_lock(tmp_path, "cpu") as first, device_lock(tmp_path, "cpu") as second:
        assert (first, second) == (True, False)


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(DeviceBusy, match=str(holder.pid)), device_lock(tmp_path, "cuda:0"):
        pass

    holder.kill()
    holder.communicate()

    with device_lock(tmp_path, "cuda:0") as is_ours:
        assert is_ours


def test_its_files_are_private(tmp_path: Path) -> None:
    with device_lock(tmp_path, "cpu"):
        assert stat.S_IMODE((tmp_path / "locks").stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "locks" / "cpu.lock").stat().st_mode) == 0o600
