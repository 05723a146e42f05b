import sqlite3
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import exc

from storage.database import Database
from storage.errors import DatabaseUnreachable, ValueTooBig
from storage.translation import translate
from storage.urls import hide_passwords, shown_error, without_password

MARK = "Zq7"
"""In every secret here, and in nothing else of a URL."""
SECRETS = st.text(st.sampled_from("aZ9/?#@:&=%[] .+é"), max_size=12).map(lambda text: f"{MARK}{text}{MARK}")
SCHEMES = st.sampled_from(["redis", "rediss", "unix", "redis+socket", "postgresql+psycopg", "sqlite", "mysql"])
FORMS = st.sampled_from(
    [
        "{scheme}://:{secret}@h:6379/0",
        "{scheme}://me:{secret}@h/db",
        "{scheme}://{secret}@h/db",
        "{scheme}://h/0?password={secret}",
        "{scheme}://h/0?db=1&password={secret}&timeout=3",
        "{scheme}://h/0?user=a&passwd={secret}#x",
        "{scheme}:///run/r.sock?password={secret}",
        "{scheme}://:{secret}",
        "{scheme}://me:{secret}/0",
        "{scheme}://me:{secret}@[::1",
        "{scheme}://me:{secret}@h:port/0",
        "{scheme}:/me:{secret}@h",
        "{scheme}:me:{secret}@h",
        "me:{secret}@h",
        "://:{secret}@h",
        "{scheme}://h/0#{secret}",
        "{scheme}://h/0?{secret}",
    ]
)


@given(FORMS, SCHEMES, SECRETS, st.booleans())
@example("{scheme}://:{secret}@h:6379/0", "redis", f"{MARK}/?#@{MARK}", False)
@example("{scheme}://me:{secret}/0", "redis", f"{MARK}a/&{MARK}", False)
@example("{scheme}://me:{secret}/0", "redis", f"{MARK}%/{MARK}", False)
@example("{scheme}://h/0?password={secret}", "redis", f"{MARK}@{MARK}", False)
def test_no_password_is_shown_whatever_form_the_url_has(form: str, scheme: str, secret: str, escaped: bool) -> None:
    if "{secret}@" not in form and "?" not in form:
        secret = secret.replace("@", "")  # what follows an @ is a host, where no other is named
    if "//{secret}@" in form:
        secret = secret.replace(":", "")  # what goes before it is a user
    url = form.format(scheme=scheme, secret=quote(secret, safe="") if escaped else secret)

    assert MARK not in without_password(url)
    assert MARK not in hide_passwords(f"cannot reach {without_password(url)}: no")


@given(st.text())
def test_any_text_can_be_shown(text: str) -> None:
    without_password(text)
    hide_passwords(text)
    shown_error(ValueError(text), text)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:6379/0", "redis://:***@host:6379/0"),
        ("postgresql+psycopg://me:secret@db/night", "postgresql+psycopg://me:***@db/night"),
        ("unix:///run/r.sock?db=2&password=x", "unix:///run/r.sock?db=2&password=***"),
        ("rediss://[::1]:6379/0?ssl_cert_reqs=none", "rediss://[::1]:6379/0?ssl_cert_reqs=***"),
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("localhost:6379", "localhost:6379"),
        ("redis://:p@ss/w@host/0", "redis://***"),
    ],
)
def test_what_is_no_password_is_still_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_a_librarys_sentence_is_kept_unless_it_quotes_a_part_that_is_hidden() -> None:
    url = "redis://:p%40ss:x@h/0?timeout=5"
    assert shown_error(OSError("connection refused"), url) == "connection refused"
    assert shown_error(ValueError("invalid literal for int(): 'ss'"), url) == "ValueError"
    assert shown_error(ValueError("bad p@ss:x"), url) == "ValueError"


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("sqlite:///{}/q.db?timeout=Zq7", "timeout=***"),
        ("sqlite:///{}/q.db?check_same_thread=Zq7", "check_same_thread=***"),
        ("sqlite:///~nosuch/q.db", "home"),
        ("sqlite://:Zq7@h/q.db", "cannot be used"),
        ("sqlite://?password=Zq7", "not a file"),
        ("nosuch://me:Zq7@h/d?password=Zq7", "nosuch://me:***@h/d"),
        ("postgresql+psycopg://me:pw@h:Zq7/d", "cannot be used"),
    ],
)
def test_a_database_url_that_cannot_be_used_is_one_sentence_and_makes_no_file(
    tmp_path: Path, url: str, word: str
) -> None:
    with pytest.raises(DatabaseUnreachable) as caught:
        Database.open(url.format(tmp_path))

    assert word in str(caught.value)
    assert MARK not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_too_big_for_the_database_is_a_sentence(db: Database, path: Path) -> None:
    def store_more_than(limit: int) -> None:
        with db.write() as connection:
            raw = connection.connection.driver_connection
            assert isinstance(raw, sqlite3.Connection)
            usual = raw.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limit)
            try:
                connection.exec_driver_sql("SELECT ?", ("x" * 2 * limit,))
            finally:
                raw.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, usual)

    with pytest.raises(ValueTooBig, match="OVERNIGHT_PROMPT_BYTES"):
        store_more_than(1000)


def test_what_a_driver_says_of_a_server_never_holds_its_password() -> None:
    said = exc.OperationalError("SELECT 1", {}, Exception(f"connection to me:{MARK}@h failed"))
    translated = translate(said, "postgresql://me:***@h/d", f"postgresql://me:{MARK}@h/d")
    assert str(translated) == "Cannot reach the database postgresql://me:***@h/d: Exception"
