import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker.scratch import MARKER, ScratchFolder, scratch_folder, sweep

OWNER = """
import sys, time
from pathlib import Path
from worker.scratch import ScratchFolder
folder = ScratchFolder("log-", Path(sys.argv[1]))
(folder.path / "worker.log").write_text("words")
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A folder whose owner was killed."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    assert sweep([tmp_path]) == 0  # while its owner lives
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert (folder / "worker.log").exists()
    return folder


def test_what_a_killed_owner_left_is_swept(killed: Path) -> None:
    assert sweep([killed.parent]) == 1
    assert not killed.exists()
    assert sweep([killed.parent]) == 0


def test_nothing_else_is_touched(killed: Path, tmp_path: Path) -> None:
    living = ScratchFolder(parent=tmp_path)
    (tmp_path / "overnight-strange").mkdir()
    (tmp_path / "overnight-file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MARKER).write_text("")
    (tmp_path / "overnight-link").symlink_to(tmp_path / "other")
    (tmp_path / "overnight-linked-marker").mkdir()
    (tmp_path / "overnight-linked-marker" / MARKER).symlink_to(tmp_path / "other" / MARKER)
    assert sweep([tmp_path]) == 1
    assert not killed.exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        living.path.name, "overnight-strange", "overnight-file", "other", "overnight-link", "overnight-linked-marker",
    }  # fmt: skip
    living.remove()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of somebody else")
@pytest.mark.parametrize("name", ["", MARKER])
def test_what_belongs_to_another_user_is_left(killed: Path, name: str) -> None:
    os.chown(killed / name, 65534, 65534)
    assert sweep([killed.parent]) == 0
    assert killed.exists()


def test_a_folder_is_private_and_goes_with_its_block() -> None:
    with scratch_folder("log-") as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert sweep([folder.parent]) == 0 or folder.exists()
    assert not folder.exists()
