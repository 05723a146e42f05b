import os
from pathlib import Path

import pytest

from cli.atomic import check_output, open_output
from cli.errors import FileAbsent, OutputNotWritten, OutputRefused


def test_a_file_appears_when_it_is_whole_and_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with open_output(str(path)) as stream:
        stream.write(b"half")
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def write_half() -> None:
        with open_output(str(path)) as stream:
            stream.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_file_keeps_its_permissions_and_a_link_stays_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "out", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o644)
    link.symlink_to(path)
    with open_output(str(link)) as stream:
        stream.write(b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_device_is_written_and_not_replaced() -> None:
    with open_output(os.devnull) as stream:
        stream.write(b"gone")
    assert Path(os.devnull).is_char_device()


def test_a_full_disk_is_one_sentence() -> None:
    def fill() -> None:
        with open_output("/dev/full") as stream:
            stream.write(b"x")

    with pytest.raises(OutputNotWritten, match="No space left"):
        fill()


def test_the_dataset_is_never_the_output_by_whatever_name(tmp_path: Path) -> None:
    dataset, link = tmp_path / "data.jsonl", tmp_path / "link"
    dataset.write_bytes(b"{}")
    link.symlink_to(dataset)
    for name in (dataset, link, tmp_path / "." / "x" / ".." / "data.jsonl"):
        if name.parent.exists():
            with pytest.raises(OutputRefused, match="overwrite"):
                check_output(str(name), keep=[dataset])
    check_output(str(tmp_path / "other"), keep=[dataset])
    check_output("-", keep=[dataset])


def test_a_folder_and_an_absent_folder_are_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(OutputRefused, match="is a folder"):
        check_output(str(tmp_path), keep=[])
    with pytest.raises(FileAbsent, match="does not exist"):
        check_output(str(tmp_path / "no" / "out"), keep=[])
