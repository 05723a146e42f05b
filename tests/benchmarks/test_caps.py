"""Memory groups that the kernel enforces. Real processes, real groups."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.caps import Cap, CapUnavailable, cap, explain, forget_cached, run
from engine.units import MIB

LIMIT = 64 * MIB
TAKE = "import sys; block = bytearray(int(sys.argv[1])); block[::4096] = b'x' * len(block[::4096]); print(len(block))"
READ = "import sys; print(sum(len(piece) for piece in iter(lambda: sys.stdin.buffer.read(1 << 20), b'')))"


@pytest.fixture
def group() -> Iterator[Cap]:
    try:
        with cap(LIMIT) as made:
            yield made
    except CapUnavailable as error:
        pytest.skip(str(error))


def take(num_bytes: int) -> list[str]:
    return [sys.executable, "-S", "-c", TAKE, str(num_bytes)]


def test_a_process_over_the_cap_is_killed_and_the_report_says_why(group: Cap, tmp_path: Path) -> None:
    ended = run(take(3 * LIMIT), group, cwd=tmp_path, log=tmp_path / "log", timeout_s=240)
    assert ended.over_cap
    assert ended.code == -9
    assert "memory cap of 64.0 MiB" in (explain(ended, LIMIT) or "")


def test_a_process_within_the_cap_is_left_alone(group: Cap, tmp_path: Path) -> None:
    ended = run(take(LIMIT // 4), group, cwd=tmp_path, log=tmp_path / "log", timeout_s=240)
    assert explain(ended, LIMIT) is None
    assert (tmp_path / "log").read_text().split() == [str(LIMIT // 4)]


def test_page_cache_counts_but_gives_way(group: Cap, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(2 * LIMIT))
    forget_cached([tmp_path])
    command = ["/bin/sh", "-c", f'exec "{sys.executable}" -S -c "{READ}" < "{large}"']
    ended = run(command, group, cwd=tmp_path, log=tmp_path / "log", timeout_s=240)
    assert explain(ended, LIMIT) is None
    assert (tmp_path / "log").read_text().split() == [str(2 * LIMIT)]


def test_the_group_is_gone_afterwards() -> None:
    try:
        with cap(LIMIT) as made:
            folder = Path(made.wrap(["true"])[3]).parent
            assert folder.is_dir()
    except CapUnavailable as error:
        pytest.skip(str(error))
    assert not folder.exists()


def test_without_a_cap_a_failure_is_told_by_its_exit_code(tmp_path: Path) -> None:
    ended = run(
        [sys.executable, "-S", "-c", "raise SystemExit(3)"], None, cwd=tmp_path, log=tmp_path / "log", timeout_s=240
    )
    assert explain(ended, None) == "ended with exit code 3"


def test_what_runs_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    command = ["/bin/sh", "-c", f'exec 3>"{held}"; sleep 600 & wait']
    ended = run(command, None, cwd=tmp_path, log=tmp_path / "log", timeout_s=0.2)
    assert ended.timed_out
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b"", "the end comes when nobody holds the pipe any more"
    os.close(reader)
    assert explain(ended, None) == "still running at the time limit"
