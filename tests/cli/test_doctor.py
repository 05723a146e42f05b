import json
import sqlite3
from pathlib import Path

from tests.cli.conftest import Command, Run


def by_name(text: str) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(text)["checks"]}


def test_on_a_fresh_machine_nothing_is_broken_and_nothing_is_made(home: Path, command: Command) -> None:
    done = command("doctor", "--json")
    checks = by_name(done.stdout)
    assert done.returncode == 0
    assert {check["status"] for check in checks.values()} <= {"ok", "warn"}
    assert checks["redis"]["status"] == "warn"
    assert "redis-server" in checks["redis"]["remedy"]
    assert "journal mode" in checks["sqlite"]["detail"]
    assert not home.exists()


def test_for_people_each_line_says_ok_or_what_to_do(with_redis: Path, run: Run) -> None:
    done = run("doctor")
    assert done.exit_code == 0
    assert "ok    redis" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_database_that_cannot_be_used_is_told_with_its_code(home: Path, run: Run) -> None:
    Path("notes.db").write_bytes(b"these are my notes, not a database" * 100)
    done = run("doctor", "--json", "--database", "notes.db")
    assert done.exit_code == 4
    assert by_name(done.stdout)["database"]["status"] == "fail"
    assert Path("notes.db").read_bytes().startswith(b"these are my notes")


def test_a_good_database_is_told_with_its_schema(home: Path, run: Run) -> None:
    sqlite3.connect("d.db").close()
    done = run("doctor", "--json", "--database", "d.db")
    assert done.exit_code == 0
    assert "schema" in by_name(done.stdout)["database"]["detail"]


def test_a_home_that_others_can_read_is_a_warning(home: Path, run: Run) -> None:
    home.mkdir(mode=0o755)
    home.chmod(0o755)
    check = by_name(run("doctor", "--json").stdout)["home"]
    assert (check["status"], "chmod 700" in check["remedy"]) == ("warn", True)
