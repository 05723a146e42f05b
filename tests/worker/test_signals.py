import subprocess
import sys

SIGNALS = """
import os, signal
from worker.bell import Bell
from worker.lifecycle import Stop
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does
bell = Bell()
stop = Stop(bell)
bell.on_stop = lambda: print("asked", flush=True)
stop.install()
os.kill(os.getpid(), signal.{first})
print(bell.is_stopping, stop.signal, flush=True)
os.kill(os.getpid(), signal.{second})
print("not reached", flush=True)
"""


def run(first: str, second: str) -> "subprocess.CompletedProcess[str]":
    script = SIGNALS.format(first=first, second=second)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)


def test_the_first_signal_asks_and_the_second_ends_the_process() -> None:
    ran = run("SIGTERM", "SIGINT")

    assert ran.stdout.split() == ["asked", "True", "15"]
    assert ran.returncode == 130
    assert "once more" in ran.stderr


def test_a_closed_terminal_is_a_polite_stop() -> None:
    ran = run("SIGHUP", "SIGTERM")

    assert ran.stdout.split() == ["asked", "True", "1"]
    assert ran.returncode == 143
