import os
from pathlib import Path

import pytest

from worker.limits import Limits
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


def test_the_repr_of_the_settings_holds_no_url(tmp_path: Path) -> None:
    url = "redis://h/0?password=secret"
    settings = load(tmp_path, OVERNIGHT_REDIS=url, OVERNIGHT_DATABASE="postgresql://me:secret@h/d")
    assert settings.redis_url == url
    assert "secret" not in repr(settings)


@pytest.mark.parametrize("redis", ["redis://[::1", "redis://:secret@h:port/0", "redis://me:secret@h:99999999/0"])
def test_a_redis_url_without_a_sound_host_is_refused_without_its_password(tmp_path: Path, redis: str) -> None:
    with pytest.raises(SettingsError, match="OVERNIGHT_REDIS must be a Redis URL") as caught:
        load(tmp_path, OVERNIGHT_REDIS=redis)
    assert "secret" not in str(caught.value)


def test_a_url_in_a_list_is_not_shown_either(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="must be a text, not a list") as caught:
        load(tmp_path, toml='redis = ["redis://:secret@h"]')
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("models", "~nosuch/x"), ("models", "a\\u0000b"), ("database", "~nosuch/q")]
)
def test_a_path_that_cannot_be_is_named(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(SettingsError, match=key):
        load(tmp_path, toml=f'{key} = "{value}"')


def test_limits_are_settings_like_the_others(tmp_path: Path) -> None:
    assert load(tmp_path).limits == Limits()
    toml = 'row_bytes = "2MiB"\nrow_fields = 7\nrender_s = 0.5\nid_depth = 3'
    given = load(tmp_path, toml=toml, OVERNIGHT_ROW_FIELDS="9", OVERNIGHT_PROMPT_BYTES="100").limits
    assert given == Limits(row_bytes=2 << 20, row_fields=9, render_s=0.5, id_depth=3, prompt_bytes=100)
    assert load(tmp_path, flags={"row_choices": 5}).limits.row_choices == 5


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("row_bytes", "many", "a size such as 4MiB"),
        ("row_bytes", "0", "a size"),
        ("row_bytes", "1GiB", "at most 64.0 MiB"),
        ("prompt_bytes", "1GiB", "at most 64.0 MiB"),
        ("row_depth", "500", "at most 200"),
        ("row_depth", "1.5", "a whole number"),
        ("row_fields", "-1", "at least 1"),
        ("row_choices", "9" * 5000, "a whole number"),
        ("render_s", "0", "seconds above 0"),
    ],
)
def test_a_limit_that_makes_no_sense_is_named(tmp_path: Path, name: str, value: str, word: str) -> None:
    with pytest.raises(SettingsError, match=word) as caught:
        load(tmp_path, **{f"OVERNIGHT_{name.upper()}": value})
    assert f"OVERNIGHT_{name.upper()}" in str(caught.value)


def test_a_limit_says_where_it_is_set() -> None:
    assert Limits().told("row_bytes") == "the limit is 1.0 MiB (OVERNIGHT_ROW_BYTES, or row_bytes in overnight.toml)"
    assert "the limit is 2 s (OVERNIGHT_RENDER_S" in Limits().told("render_s")
    assert "the limit is 1,000 (OVERNIGHT_ROW_FIELDS" in Limits().told("row_fields")


def test_home_comes_from_the_platform_when_nobody_says() -> None:
    assert load_settings({}, {"HOME": os.environ.get("HOME", "/")}).home.name == "overnight"


@pytest.mark.parametrize(("name", "meant"), [("DATABSE", "DATABASE"), ("LEASE", "LEASE_S"), ("DB", None)])
def test_a_variable_with_a_slip_in_its_name_is_refused(tmp_path: Path, name: str, meant: str | None) -> None:
    environ = {"OVERNIGHT_HOME": str(tmp_path), f"OVERNIGHT_{name}": "x"}
    if meant is None:
        assert load_settings({}, environ).home == tmp_path
        return
    with pytest.raises(SettingsError, match=f"OVERNIGHT_{name} is not a setting; did you mean OVERNIGHT_{meant}"):
        load_settings({}, environ)
