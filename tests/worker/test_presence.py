import os
import subprocess
import sys
import time

from worker.presence import host_name, is_dead


def test_this_process_is_alive() -> None:
    assert not is_dead(host_name(), os.getpid(), time.time())


def test_a_process_that_ended_is_dead_also_before_its_parent_has_noticed() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started_at = time.time()
    assert not is_dead(host_name(), child.pid, started_at)

    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(host_name(), child.pid, started_at)
    child.communicate()
    assert is_dead(host_name(), child.pid, started_at)


def test_a_younger_process_with_the_same_number_proves_the_death() -> None:
    assert is_dead(host_name(), os.getpid(), started_at=time.time() - 1e6)


def test_another_hosts_process_is_left_to_its_lease() -> None:
    assert not is_dead("elsewhere", 2**22 - 1, time.time())
