"""One setting as a person gave it, and what it is read as."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from engine.units import format_bytes, parse_bytes
from storage.urls import shown_error, without_password
from worker.errors import SettingsError

DEFAULT_REDIS = "redis://127.0.0.1:6379/0"
LOG_LEVELS = ("debug", "info", "warning", "error")

_REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+socket")
_QUEUE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Given:
    """One value as it was given, with the words that name its place, and what relative paths are relative to."""

    value: object
    where: str
    base: Path

    def text(self) -> str:
        if isinstance(self.value, str) and not self.value.strip():
            raise SettingsError(f"{self.where} must not be empty; leave it out for the default")
        if not isinstance(self.value, str | Path):
            # A list or a table may hold the URL, and with it the password, that was meant.
            plain = isinstance(self.value, str | int | float)
            raise SettingsError(
                f"{self.where} must be a text, not {repr(self.value) if plain else 'a ' + type(self.value).__name__}"
            )
        if "\0" in str(self.value):
            raise SettingsError(f"{self.where} holds a zero character, which no name does; leave it out")
        return str(self.value)

    def path(self) -> Path:
        try:
            return (self.base / Path(self.text()).expanduser()).resolve()
        except RuntimeError:
            raise SettingsError(f"{self.where}: {self.value} begins with a user that does not exist") from None

    def seconds(self) -> float:
        try:
            seconds = float(str(self.value))
        except ValueError:
            seconds = -1.0
        if isinstance(self.value, bool) or not 0 < seconds < float("inf"):
            raise SettingsError(f"{self.where} must be a number of seconds above 0, not {self.value!r}")
        return seconds

    def size(self, ceiling: int | None) -> int:
        try:
            size = parse_bytes(str(self.value))
        except ValueError:
            size = 0
        if isinstance(self.value, bool) or size < 1:
            raise SettingsError(f"{self.where} must be a size such as 4MiB, not {self.value!r}")
        if ceiling is not None and size > ceiling:
            raise SettingsError(f"{self.where} must be at most {format_bytes(ceiling)}, not {self.value!r}")
        return size

    def count(self, ceiling: int | None) -> int:
        text = str(self.value)
        number = int(text) if re.fullmatch(r"[0-9]{1,12}", text) else 0
        if number < 1 or (ceiling is not None and number > ceiling):
            most = "" if ceiling is None else f" and at most {ceiling}"
            raise SettingsError(f"{self.where} must be a whole number of at least 1{most}, not {self.value!r}")
        return number

    def database(self) -> str:
        text = self.text()
        return text if "://" in text else sqlite_url(self.path())

    def redis(self) -> str:
        text = self.text()
        scheme, _, rest = text.partition("://")
        if scheme not in _REDIS_SCHEMES or not rest:
            raise SettingsError(
                f"{self.where} must be a Redis URL such as {DEFAULT_REDIS} or unix:///run/redis.sock, "
                f"not {without_password(text)!r}"
            )
        try:
            parts = urlsplit(text)
            _ = parts.hostname, parts.port
        except ValueError as error:
            raise SettingsError(
                f"{self.where} must be a Redis URL such as {DEFAULT_REDIS}, not {without_password(text)!r}: "
                f"{shown_error(error, text)}; write %2F, %3F, %23 and %40 for /, ?, # and @ in a password"
            ) from None
        return text

    def queue(self) -> str:
        text = self.text()
        if not _QUEUE_NAME.fullmatch(text):
            raise SettingsError(
                f"{self.where} must be a queue name of letters, digits, '.', '_' and '-', 64 at most and the first "
                f"a letter or digit, not {text!r}"
            )
        return text

    def log_level(self) -> str:
        text = self.text().lower()
        if text not in LOG_LEVELS:
            raise SettingsError(f"{self.where} must be one of {', '.join(LOG_LEVELS)}, not {text!r}")
        return text


def sqlite_url(path: Path) -> str:
    """The URL of a database file."""
    return f"sqlite:///{path}"
