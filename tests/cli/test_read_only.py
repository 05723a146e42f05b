"""`status`, `fetch` and `wait` on a mount that nobody can write to, not even root."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.cli.conftest import ROOT, Run, work, write_rows
from tests.namespaces import unshared


def test_what_is_there_can_be_looked_at_where_nothing_can_be_written(with_redis: Path, run: Run, model: str) -> None:
    home = with_redis
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"}, {"prompt": "b"})
    run("enqueue", dataset, "--model", model, "--task", "generate")
    work(home, 1)
    python = f"{shlex.quote(sys.executable)} -P -m cli"
    folder = shlex.quote(str(home))
    script = f"""
        mount --bind {folder} {folder} && mount -o remount,ro,bind {folder} || exit 99
        touch {folder}/x 2>&- && exit 98
        for words in "status --json" "fetch 1" "wait 1" "prune --dry-run --older-than 0m" "doctor" "cancel 1"; do
            {python} $words
            echo "code $?"
        done
    """
    done = subprocess.run(
        [*unshared("--mount"), "sh", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    status, fetched, waited, pruned, doctor, _ = done.stdout.split("code ")[:6]
    assert [job["state"] for job in json.loads(status)["jobs"]] == ["done"]
    code, *rows = fetched.splitlines()
    assert code == "0"
    assert [json.loads(row)["index"] for row in rows] == [0, 1]
    assert (waited, pruned) == ("0\n", "0\n")
    assert "would prune 1 job" in done.stderr
    assert f"{home} cannot be written" in doctor
    assert done.stdout.endswith("code 4\n")
    assert "cannot be written" in done.stderr.splitlines()[-1]
