"""Where things are and how patient we are: flags over ``OVERNIGHT_*`` over ``overnight.toml``."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from worker.errors import SettingsError

__all__ = ["Settings", "SettingsError", "load_settings", "without_password"]

TOML_NAME = "overnight.toml"
DEFAULT_REDIS = "redis://127.0.0.1:6379/0"
LOG_LEVELS = ("debug", "info", "warning", "error")
KEYS = (
    *("database", "redis", "models", "spill", "queue"),
    *("max_wait_s", "scan_s", "lease_s", "patience_s", "backoff_s", "log_level"),
)
"""What flags, ``OVERNIGHT_<KEY>`` and ``overnight.toml`` may say; ``home`` besides, but not in the file."""

_REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+socket")
_QUEUE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a process needs to know that is not about one job."""

    home: Path
    """The folder that holds all state, 0700."""
    database_url: str
    """SQLAlchemy URL; a plain path means SQLite."""
    redis_url: str
    """``redis://``, ``rediss://`` or ``unix:///path``."""
    models_dir: Path
    """Where model directories lie by name, and where Hugging Face folders are imported to."""
    spill_dir: Path
    """Where the disk tier puts its files, unless ``--disk-dir`` says otherwise."""
    queue: str = "default"
    """Which jobs a worker drains, and which workers a job waits for."""
    max_wait_s: float = 1800.0
    """How long a job may wait, in seconds, before a worker leaves its resident model for it."""
    scan_s: float = 10.0
    """How often a worker looks for jobs by itself, in seconds, in case the doorbell was lost."""
    lease_s: float = 60.0
    """How long a worker that stopped beating keeps its claims, in seconds."""
    patience_s: float = 4 * 3600.0
    """How long a worker waits for a database that is locked, full or away, in seconds, before it ends."""
    backoff_s: float = 60.0
    """How long a machine leaves a model alone after a fault of its own, in seconds; then 5 and 30 times as long."""
    log_level: str = "info"
    """``debug`` adds tracebacks."""


@dataclass(frozen=True, slots=True)
class _Given:
    """One value as it was given, with the words that name its place, and what relative paths are relative to."""

    value: object
    where: str
    base: Path

    def text(self) -> str:
        if not isinstance(self.value, str | Path) or not str(self.value).strip():
            raise SettingsError(f"{self.where} must be a text, not {self.value!r}")
        return str(self.value)

    def path(self) -> Path:
        return (self.base / Path(self.text()).expanduser()).resolve()

    def seconds(self) -> float:
        try:
            seconds = float(str(self.value))
        except ValueError:
            seconds = -1.0
        if isinstance(self.value, bool) or not 0 < seconds < float("inf"):
            raise SettingsError(f"{self.where} must be a number of seconds above 0, not {self.value!r}")
        return seconds

    def database(self) -> str:
        text = self.text()
        return text if "://" in text else _sqlite_url(self.path())

    def redis(self) -> str:
        text = self.text()
        scheme, _, rest = text.partition("://")
        if scheme not in _REDIS_SCHEMES or not rest:
            raise SettingsError(
                f"{self.where} must be a Redis URL such as {DEFAULT_REDIS} or unix:///run/redis.sock, "
                f"not {without_password(text)!r}"
            )
        return text

    def queue(self) -> str:
        text = self.text()
        if not _QUEUE_NAME.fullmatch(text):
            raise SettingsError(f"{self.where} must be a queue name of letters, digits, '.', '_' and '-', not {text!r}")
        return text

    def log_level(self) -> str:
        text = self.text().lower()
        if text not in LOG_LEVELS:
            raise SettingsError(f"{self.where} must be one of {', '.join(LOG_LEVELS)}, not {text!r}")
        return text


def load_settings(flags: Mapping[str, object], environ: Mapping[str, str], toml_path: Path | None = None) -> Settings:
    """Settings from ``flags`` (None: not given) over ``OVERNIGHT_*`` in ``environ`` over ``overnight.toml``.

    Flags and the file use the names in ``KEYS``; ``home`` is a flag or ``OVERNIGHT_HOME`` only, since the file lies
    there. Relative paths in the file are meant from its folder. Nothing is created on disk.

    Raises:
        SettingsError: names the flag, variable or key, and what it should look like.
    """
    here = Path.cwd()
    home = _home(flags, environ, here)
    given = _from_toml(toml_path or home / TOML_NAME)
    for key in KEYS:
        if value := environ.get(f"OVERNIGHT_{key.upper()}"):
            given[key] = _Given(value, f"OVERNIGHT_{key.upper()}", here)
    for key, flag in flags.items():
        if key not in (*KEYS, "home"):
            raise SettingsError(f"{key!r} is not a setting; there are: home, {', '.join(KEYS)}")
        if flag is not None:
            given[key] = _Given(flag, f"--{key.replace('_', '-')}", here)
    default = Settings(home=home, database_url="", redis_url="", models_dir=home, spill_dir=home)
    return Settings(
        home=home,
        database_url=given["database"].database() if "database" in given else _sqlite_url(home / "overnight.db"),
        redis_url=given["redis"].redis() if "redis" in given else DEFAULT_REDIS,
        models_dir=given["models"].path() if "models" in given else home / "models",
        spill_dir=given["spill"].path() if "spill" in given else home / "spill",
        queue=given["queue"].queue() if "queue" in given else default.queue,
        max_wait_s=given["max_wait_s"].seconds() if "max_wait_s" in given else default.max_wait_s,
        scan_s=given["scan_s"].seconds() if "scan_s" in given else default.scan_s,
        lease_s=given["lease_s"].seconds() if "lease_s" in given else default.lease_s,
        patience_s=given["patience_s"].seconds() if "patience_s" in given else default.patience_s,
        backoff_s=given["backoff_s"].seconds() if "backoff_s" in given else default.backoff_s,
        log_level=given["log_level"].log_level() if "log_level" in given else default.log_level,
    )


def without_password(url: str) -> str:
    """``url`` as it may be shown: a password in it is replaced by ``***``."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))


def _home(flags: Mapping[str, object], environ: Mapping[str, str], here: Path) -> Path:
    if (flag := flags.get("home")) is not None:
        return _Given(flag, "--home", here).path()
    if value := environ.get("OVERNIGHT_HOME"):
        return _Given(value, "OVERNIGHT_HOME", here).path()
    import platformdirs

    return platformdirs.user_data_path("overnight", appauthor=False)


def _from_toml(path: Path) -> dict[str, _Given]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from error
    for key in values:
        if key not in KEYS:
            raise SettingsError(f"{key!r} in {path} is not a setting; there are: {', '.join(KEYS)}")
    return {key: _Given(value, f"{key!r} in {path}", path.parent) for key, value in values.items()}


def _sqlite_url(path: Path) -> str:
    return f"sqlite:///{path}"
