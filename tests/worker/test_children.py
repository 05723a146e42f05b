import signal
import subprocess
import sys

from tests.worker.test_private_redis import until_gone
from worker import children

WAITS = "import signal; signal.pause()"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); {WAITS}"
OWNER = f"""
import signal, sys
from worker import children
child = children.spawn([sys.executable, "-c", "{WAITS}"])
print(child.pid, flush=True)
signal.pause()
"""


def test_a_child_ends_when_asked() -> None:
    child = children.spawn([sys.executable, "-c", WAITS])

    assert children.stop(child, grace_s=240) == -signal.SIGTERM


def test_a_child_that_does_not_listen_is_killed() -> None:
    child = children.spawn([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"

    assert children.stop(child, grace_s=0.1) == -signal.SIGKILL
    child.stdout.close()


def test_a_child_that_ended_by_itself_keeps_its_status() -> None:
    child = children.spawn([sys.executable, "-c", "raise SystemExit(7)"])
    child.wait()

    assert children.stop(child, grace_s=1) == 7


def test_a_child_ends_with_an_owner_that_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())

    owner.kill()
    owner.wait()
    owner.stdout.close()

    assert until_gone(pid)


def test_the_environment_is_what_was_given() -> None:
    child = children.spawn(
        [sys.executable, "-c", "import os; print(os.environ['A'], len(os.environ) < 5)"],
        environ={"A": "1"},
        stdout=subprocess.PIPE,
    )

    assert child.communicate()[0] == b"1 True\n"
