import json
import sqlite3
from functools import partial
from pathlib import Path

import pytest

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


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures next to nothing, in no time."""
    import engine.measure as measuring

    monkeypatch.setattr(measuring, "measure", partial(measuring.measure, effort=measuring.QUICK))


def test_a_measured_machine_is_kept_and_told(home: Path, run: Run, little: None) -> None:
    done = run("doctor", "--measure", "--device", "cpu", "--json")
    assert done.exit_code == 0
    profile = json.loads((home / "profile-cpu.json").read_text())
    assert profile["device"] == "cpu"
    check = by_name(done.stdout)["profile"]
    assert (check["status"], "cpu on" in check["detail"]) == ("ok", True)
    assert "measuring disk" in done.stderr
    assert list((home / "spill").iterdir()) == []


def test_a_profile_of_another_machine_is_a_warning_that_says_what_to_do(home: Path, run: Run, little: None) -> None:
    run("doctor", "--measure", "--device", "cpu")
    path = home / "profile-cpu.json"
    profile = json.loads(path.read_text())
    profile["identity"]["cores"] = "1024"
    path.write_text(json.dumps(profile))
    check = by_name(run("doctor", "--json").stdout)["profile"]
    assert check["status"] == "warn"
    assert check["remedy"] == "overnight doctor --measure --device cpu"
    path.write_text("{")
    check = by_name(run("doctor", "--json").stdout)["profile"]
    assert (check["status"], "not JSON" in check["detail"]) == ("warn", True)


@pytest.mark.parametrize("where", ["/sys/overnight", "/sys/kernel"], ids=["absent", "there"])
def test_a_home_that_cannot_be_written_is_one_sentence(
    where: str, home: Path, run: Run, little: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVERNIGHT_HOME", where)  # not even root may write there
    done = run("doctor", "--measure", "--device", "cpu")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert where in done.stderr.splitlines()[-1]


def test_a_folder_that_cannot_be_made_is_one_sentence(
    home: Path, run: Run, little: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("notes").write_text("")
    monkeypatch.setenv("OVERNIGHT_SPILL", str(Path("notes").resolve()))
    done = run("doctor", "--measure", "--device", "cpu")
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "notes" in done.stderr
    assert not home.exists()


def test_a_device_is_named_only_to_measure_it(home: Path, run: Run) -> None:
    done = run("doctor", "--device", "cpu")
    assert done.exit_code == 2
    assert "--measure" in done.stderr
