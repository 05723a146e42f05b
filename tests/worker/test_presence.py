import os
import subprocess
import sys

import pytest

from worker.presence import host_name, is_dead, process_of


def test_this_process_is_alive() -> None:
    assert not is_dead(host_name(), os.getpid(), process_of(os.getpid()))
    assert not is_dead(host_name(), os.getpid(), None), "one that did not say more than its number"


def test_a_process_that_ended_is_dead_also_before_its_parent_has_noticed() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = process_of(child.pid)
    assert process is not None
    assert not is_dead(host_name(), child.pid, process)

    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(host_name(), child.pid, process)
    child.communicate()
    assert is_dead(host_name(), child.pid, process)


def test_another_process_with_the_same_number_proves_the_death() -> None:
    process = process_of(os.getpid())
    assert process is not None
    boot, _, start = process.partition("/")
    assert is_dead(host_name(), os.getpid(), f"{boot}/{int(start) - 1}")


@pytest.mark.parametrize("hostname", ["elsewhere", None])
def test_a_process_of_another_host_or_boot_is_left_to_its_lease(hostname: str | None) -> None:
    assert not is_dead(hostname or host_name(), 2**22 - 1, "another-boot/123")
