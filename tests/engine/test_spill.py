"""The spill file: what is written comes back; it is private, nameless, and claimed before it is used."""

import errno
import os
import random
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import Generate, PlanOptions, Request, SamplingParams, Shares
from engine.errors import DiskFull, LaneFailed, TierFull
from engine.loading import load_engine
from engine.memory.spill import PAGE, DiskTier
from engine.units import MIB


def random_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    opened = DiskTier(64 * PAGE, tmp_path / "spill")
    yield opened
    opened.close()


def test_what_is_written_comes_back(tier: DiskTier) -> None:
    """Extents of many sizes, taken and given back in random order, each keeping its own bytes."""
    rng = random.Random(0)
    held = []
    for _ in range(200):
        if held and (rng.random() < 0.4 or tier.used + 9 * PAGE > tier.budget):
            extent, content = held.pop(rng.randrange(len(held)))
            found = torch.zeros_like(content)
            extent.place(0).read(found)
            assert torch.equal(found, content)
            extent.release()
            extent.release()
        else:
            content = random_bytes(rng.randrange(1, 8 * PAGE))
            try:
                extent = tier.allocate(len(content), "KV cache")
            except TierFull:
                continue
            middle = rng.randrange(len(content))  # in two pieces, the last first
            extent.place(0).write(middle, content[middle:])
            extent.place(0).write(0, content[:middle])
            held.append((extent, content))
        tier.check_integrity()
    for extent, content in held:
        piece = torch.empty(min(100, len(content)), dtype=torch.uint8)
        extent.place(len(content) - len(piece)).read(piece)
        assert torch.equal(piece, content[len(content) - len(piece) :])
        extent.release()
    assert tier.used == 0
    assert tier.allocate(tier.budget, "all of it").size == tier.budget


def test_the_file_is_private_and_has_no_name(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "spill"
    old = os.umask(0o000)  # even then
    try:
        tier = DiskTier(PAGE, directory)
        assert not directory.exists(), "nothing is made before it is needed"
        tier.allocate(1, "KV cache")
    finally:
        os.umask(old)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert list(directory.iterdir()) == []
    links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]  # noqa: PTH208
    (spill,) = [link for link in links if link.is_symlink() and str(directory) in str(link.readlink())]
    assert str(spill.readlink()).endswith(".spill (deleted)")
    found = spill.stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_nlink == 0
    assert found.st_blocks * 512 >= PAGE, "claimed at allocation"
    tier.close()
    tier.close()
    assert not spill.exists()


def test_the_budget_is_in_whole_pages(tier: DiskTier) -> None:
    extents = [tier.allocate(1, "KV cache") for _ in range(64)]
    assert tier.used == 64 * PAGE
    with pytest.raises(TierFull, match="disk memory is full"):
        tier.allocate(1, "KV cache")
    extents[3].release()
    extents[60].release()
    with pytest.raises(TierFull, match=r"in one piece, 8\.0 KiB"):
        tier.allocate(PAGE + 1, "KV cache")
    tier.check_integrity()
    assert tier.allocate(PAGE, "KV cache").offset == 3 * PAGE


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB: a tmpfs where one may be mounted, else /dev/shm filled up but for 1 MiB by a file."""
    where = tmp_path / "small"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)], capture_output=True)
    if mounted.returncode == 0:
        yield where
        subprocess.run(["umount", str(where)], check=True)
        return
    shm = Path("/dev/shm")
    free = os.statvfs(shm).f_bavail * os.statvfs(shm).f_frsize if shm.is_dir() else 0
    if not MIB < free <= 256 * MIB:  # as containers have it; more is other people's memory
        pytest.skip(
            f"no tmpfs may be mounted here ({mounted.stderr.decode().strip()}) and /dev/shm has {free} bytes free"
        )
    filler = os.open(shm, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.posix_fallocate(filler, 0, free - MIB)
    yield shm
    os.close(filler)


def test_a_full_file_system_is_found_at_allocation(small_file_system: Path) -> None:
    tier = DiskTier(64 * MIB, small_file_system)
    first = tier.allocate(MIB // 2, "KV cache")
    with pytest.raises(DiskFull, match=r"no space left for spill files in .*which hold 512\.0 KiB;.*--disk-dir"):
        tier.allocate(2 * MIB, "KV cache")
    assert tier.used == first.size
    tier.check_integrity()
    content = random_bytes(MIB // 2)
    first.place(0).write(0, content)  # what was promised is still there
    found = torch.zeros_like(content)
    first.place(0).read(found)
    assert torch.equal(found, content)
    second = tier.allocate(MIB // 4, "KV cache")
    assert second.offset == first.size
    tier.close()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tier = DiskTier(PAGE, tmp_path / "file" / "spill")
    with pytest.raises(LaneFailed, match=r"spill file in .*file/spill: Not a directory"):
        tier.allocate(1, "KV cache")
    assert tier.used == 0


@pytest.mark.parametrize("others_run", [True, False])
def test_sequences_wait_for_each_others_room_on_a_full_file_system(
    others_run: bool, small_file_system: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget promises 64 MiB, the file system has 1: a few sequences run at a time; if none can, it is an error."""
    # Somebody else took the rest after the plan was made.
    monkeypatch.setattr("engine.planner.plan_input.free_disk_space", lambda folder: 64 * MIB)
    greedy = SamplingParams(max_new_tokens=100, ignore_eos=True)
    requests = [Request(index, Generate("abc", greedy)) for index in range(24)]
    chosen = PlanOptions(
        device="cpu", device_memory=32 * MIB, weights=Shares(100, 0, 0), kv=Shares(0, 0, 100), disk_space=64 * MIB,
        disk_dir=small_file_system,
    )  # fmt: skip
    with load_engine(tiny_model, chosen) as engine:
        if others_run:
            reports = list(engine.passes(iter(requests)))
            assert sorted(output.key for report in reports for output in report.outputs) == list(range(24))  # type: ignore[type-var]
            assert 1 < max(report.stats.num_sequences for report in reports) < 24
        else:
            filler = small_file_system / "filler"
            with filler.open("wb") as file:
                free = os.statvfs(small_file_system).f_bavail * os.statvfs(small_file_system).f_frsize
                os.posix_fallocate(file.fileno(), 0, free)
            with pytest.raises(DiskFull, match="--disk-dir"):
                list(engine.run(requests))
            filler.unlink()
            assert len(list(engine.run(requests[:3]))) == 3, "nothing was lost by it"
        engine.check_integrity()


def test_what_was_claimed_in_vain_is_given_back(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems keep what they could give before they were full, and others need it: the database, logs."""
    kept = tier.allocate(PAGE, "KV cache")
    claim = os.posix_fallocate

    def claim_half(fd: int, offset: int, size: int) -> None:
        claim(fd, offset, size // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", claim_half)
    with pytest.raises(DiskFull):
        tier.allocate(32 * PAGE, "KV cache")
    assert tier._fd is not None
    assert os.fstat(tier._fd).st_size == PAGE
    assert tier.used == PAGE
    kept.release()
