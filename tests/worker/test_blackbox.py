"""What a worker that was killed had in hand, as its successor reads it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from worker.blackbox import BlackBox, Death, deaths
from worker.rows import RowKey

DATABASE = "sqlite:////data/overnight.db"
VICTIM = """
import sys
from pathlib import Path
from worker.blackbox import BlackBox
from worker.rows import RowKey
box = BlackBox(Path(sys.argv[1]), sys.argv[2], 7)
{body}
print("ready", flush=True)
input()
"""


def killed(home: Path, body: str) -> None:
    """A process that opens the black box of worker 7, does something, and is killed."""
    script = VICTIM.format(body=body)
    command = [sys.executable, "-c", script, str(home), DATABASE]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert list(deaths(home, DATABASE)) == [], "it lives"
    child.send_signal(signal.SIGKILL)
    child.communicate()


@pytest.mark.parametrize(
    ("body", "death"),
    [
        ("", Death(7, None, ())),
        ("box.loads('opt-30b ü')", Death(7, "opt-30b ü", ())),
        ("box.loads('opt'); box.loads(None)", Death(7, None, ())),
        (
            "box.begins(RowKey(1, 0, 1)); box.begins(RowKey(1, 5, 2)); box.ends([RowKey(1, 0, 1), RowKey(9, 9, 9)])",
            Death(7, None, (RowKey(1, 5, 2),)),
        ),
        ("box.begins(RowKey(1, 0, 1)); box.clear(); box.begins(RowKey(2, 0, 1))", Death(7, None, (RowKey(2, 0, 1),))),
    ],
)
def test_a_killed_worker_is_told_of_once(tmp_path: Path, body: str, death: Death) -> None:
    killed(tmp_path, body)

    assert list(deaths(tmp_path, "sqlite:////data/another.db")) == [], "worker numbers belong to a database"
    assert list(deaths(tmp_path, DATABASE)) == [death]
    assert list(deaths(tmp_path, DATABASE)) == []


def test_who_is_interrupted_while_it_learns_is_told_again(tmp_path: Path) -> None:
    killed(tmp_path, "box.begins(RowKey(1, 0, 1))")
    interrupted = deaths(tmp_path, DATABASE)
    assert next(interrupted).running
    interrupted.close()  # type: ignore[attr-defined]

    assert [death.worker_id for death in deaths(tmp_path, DATABASE)] == [7]


def test_an_end_that_somebody_asked_for_is_nobodys_crash(tmp_path: Path) -> None:
    killed(tmp_path, "box.begins(RowKey(1, 0, 1)); box.forgive(); box.begins(RowKey(1, 1, 1))")
    assert list(deaths(tmp_path, DATABASE)) == []


def test_a_runs_own_worker_is_told_apart(tmp_path: Path) -> None:
    killed(tmp_path, "box.close(); box = BlackBox(Path(sys.argv[1]), sys.argv[2], 8, is_alone=True); box.loads('m')")
    assert list(deaths(tmp_path, DATABASE)) == [Death(8, "m", (), is_alone=True)]


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    killed(tmp_path, "box.begins(RowKey(1, 3, 1))")
    (path,) = (tmp_path / "inflight").iterdir()
    strays = [path.with_name(path.name + end) for end in (".bak", "x", "9" * 40)]
    for stray in strays:
        stray.write_bytes(b"+ 1 99999999999999999999 1")
    path.write_bytes(path.read_bytes() + b"+ 1 99999999999999999999 1")
    assert [death.running for death in deaths(tmp_path, DATABASE)] == [(RowKey(1, 3, 1),)]
    assert sorted((tmp_path / "inflight").iterdir()) == sorted(strays)


def test_an_orderly_end_leaves_nothing(tmp_path: Path) -> None:
    box = BlackBox(tmp_path, DATABASE, 7)
    box.begins(RowKey(1, 0, 1))
    assert list(deaths(tmp_path, DATABASE)) == []
    box.close()
    box.close()
    assert list(deaths(tmp_path, DATABASE)) == []
    assert list((tmp_path / "inflight").iterdir()) == []


def test_it_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    box = BlackBox(tmp_path, DATABASE, 7)
    kept = RowKey(1, 10**9, 1)
    box.begins(kept)
    for index in range(60_000):
        box.begins(RowKey(1, index, 1))
        box.ends([RowKey(1, index, 1)])
    (path,) = (tmp_path / "inflight").iterdir()
    assert path.stat().st_size < 2 * 2**20
    assert box.running == (kept,)
    box.close()


def test_a_damaged_file_blames_whom_it_can(tmp_path: Path) -> None:
    killed(tmp_path, "box.begins(RowKey(1, 3, 1))")
    (path,) = (tmp_path / "inflight").iterdir()
    path.write_bytes(b"\xff\xfe garbage\n+ 1\n+ a b c\nload\n" + path.read_bytes() + b"+ 1 4")
    assert [death.running for death in deaths(tmp_path, DATABASE)] == [(RowKey(1, 3, 1),)]


def test_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    """/dev/full takes nothing: then nobody will be blamed."""
    box = BlackBox(tmp_path, DATABASE, 7)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, box._file)
    os.close(full)
    box.begins(RowKey(1, 0, 1))
    box.loads("opt")
    assert box.running == (RowKey(1, 0, 1),)
    box.close()
