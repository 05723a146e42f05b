import os
from pathlib import Path

import pytest

from worker.settings import Settings, SettingsError, load_settings, without_password


def load(tmp_path: Path, *, flags: dict[str, object] | None = None, toml: str = "", **environ: str) -> Settings:
    (tmp_path / "overnight.toml").write_text(toml)
    return load_settings(flags or {}, {"OVERNIGHT_HOME": str(tmp_path), **environ})


def test_everything_lies_under_home_by_default(tmp_path: Path) -> None:
    settings = load(tmp_path)

    assert settings.home == tmp_path
    assert settings.database_url == f"sqlite:///{tmp_path}/overnight.db"
    assert settings.models_dir == tmp_path / "models"
    assert settings.spill_dir == tmp_path / "spill"
    assert settings.redis_url == "redis://127.0.0.1:6379/0"
    assert settings.queue == "default"


def test_nothing_is_created_by_looking(tmp_path: Path) -> None:
    load_settings({}, {"OVERNIGHT_HOME": str(tmp_path / "new")})

    assert not (tmp_path / "new").exists()


def test_flags_go_before_variables_before_the_file(tmp_path: Path) -> None:
    toml = 'queue = "from-file"\nmax_wait_s = 7'

    assert load(tmp_path, toml=toml).queue == "from-file"
    assert load(tmp_path, toml=toml).max_wait_s == 7
    assert load(tmp_path, toml=toml, OVERNIGHT_QUEUE="from-variable").queue == "from-variable"
    both = load(tmp_path, toml=toml, flags={"queue": "from-flag"}, OVERNIGHT_QUEUE="from-variable")
    assert both.queue == "from-flag"


def test_a_flag_that_was_not_given_and_an_empty_variable_say_nothing(tmp_path: Path) -> None:
    settings = load(tmp_path, flags={"queue": None}, OVERNIGHT_QUEUE="")

    assert settings.queue == "default"


def test_paths_in_the_file_are_meant_from_its_folder_and_flags_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    settings = load(tmp_path, toml='models = "../shelf"', flags={"database": "jobs.db"})

    assert settings.models_dir == tmp_path.parent / "shelf"
    assert settings.database_url == f"sqlite:///{here}/jobs.db"


def test_a_database_url_is_taken_as_it_is(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:secret@db/overnight"

    assert load(tmp_path, OVERNIGHT_DATABASE=url).database_url == url


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"OVERNIGHT_REDIS": "localhost:6379"}, ["OVERNIGHT_REDIS", "Redis URL", "redis://"]),
        ({"OVERNIGHT_REDIS": "http://localhost"}, ["OVERNIGHT_REDIS"]),
        ({"OVERNIGHT_QUEUE": "two words"}, ["OVERNIGHT_QUEUE", "queue name"]),
        ({"OVERNIGHT_LEASE_S": "soon"}, ["OVERNIGHT_LEASE_S", "number of seconds", "soon"]),
        ({"OVERNIGHT_LEASE_S": "0"}, ["OVERNIGHT_LEASE_S"]),
        ({"OVERNIGHT_LEASE_S": "nan"}, ["OVERNIGHT_LEASE_S"]),
        ({"OVERNIGHT_LOG_LEVEL": "loud"}, ["OVERNIGHT_LOG_LEVEL", "debug"]),
    ],
)
def test_a_bad_variable_is_named_with_what_it_should_be(
    tmp_path: Path, given: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, **given)

    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("quue = 'x'", ["'quue'", "overnight.toml", "queue"]),
        ("queue = 3", ["'queue'", "overnight.toml", "3"]),
        ("lease_s = true", ["'lease_s'", "True"]),
        ("queue = ", ["overnight.toml"]),
        ("[queue]\nname = 'x'", ["'queue'"]),
    ],
)
def test_a_bad_key_is_named_with_its_file(tmp_path: Path, toml: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, toml=toml)

    for word in words:
        assert word in str(caught.value)


def test_a_flag_is_named_as_it_was_typed(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--redis"):
        load(tmp_path, flags={"redis": "nowhere"})
    with pytest.raises(SettingsError, match="'colour' is not a setting"):
        load(tmp_path, flags={"colour": "red"})


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    assert without_password("redis://:secret@host:6379/0") == "redis://:***@host:6379/0"
    assert without_password("redis://me:secret@host/0") == "redis://me:***@host/0"
    assert without_password("unix:///run/redis.sock") == "unix:///run/redis.sock"
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, OVERNIGHT_REDIS="http://:secret@host/0")
    assert "secret" not in str(caught.value)


def test_home_comes_from_the_platform_when_nobody_says() -> None:
    assert load_settings({}, {"HOME": os.environ.get("HOME", "/")}).home.name == "overnight"
