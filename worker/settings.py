"""Where things are and how patient we are: flags over ``OVERNIGHT_*`` over ``overnight.toml``."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.urls import without_password
from worker.errors import SettingsError
from worker.given import DEFAULT_REDIS, Given, sqlite_url
from worker.limits import CEILINGS, DEFAULT_LIMITS, NAMES, Limits

__all__ = ["Settings", "SettingsError", "load_settings", "without_password"]

TOML_NAME = "overnight.toml"
KEYS = (
    *("database", "redis", "models", "spill", "queue"),
    *("max_wait_s", "scan_s", "lease_s", "patience_s", "backoff_s", "log_level"),
    *NAMES,
)
"""What flags, ``OVERNIGHT_<KEY>`` and ``overnight.toml`` may say; ``home`` besides, but not in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a process needs to know that is not about one job."""

    home: Path
    """The folder that holds all state, 0700."""
    # Neither URL is part of the repr: each may hold a password.
    database_url: str = field(repr=False)
    """SQLAlchemy URL; a plain path means SQLite."""
    redis_url: str = field(repr=False)
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
    limits: Limits = DEFAULT_LIMITS
    """How large a row of a dataset may be."""


def load_settings(flags: Mapping[str, object], environ: Mapping[str, str], toml_path: Path | None = None) -> Settings:
    """Settings from ``flags`` (None: not given) over ``OVERNIGHT_*`` in ``environ`` over ``overnight.toml``.

    Flags and the file use the names in ``KEYS``; ``home`` is a flag or ``OVERNIGHT_HOME`` only, since the file lies
    there. Relative paths in the file are meant from its folder. Nothing is created on disk.

    Raises:
        SettingsError: names the flag, variable or key, and what it should look like.
    """
    here = Path.cwd()
    _check_names(environ)
    home = _home(flags, environ, here)
    given = _from_toml(toml_path or home / TOML_NAME)
    for key in KEYS:
        if value := environ.get(f"OVERNIGHT_{key.upper()}"):
            given[key] = Given(value, f"OVERNIGHT_{key.upper()}", here)
    for key, flag in flags.items():
        if key not in (*KEYS, "home"):
            raise SettingsError(f"{key!r} is not a setting; there are: home, {', '.join(KEYS)}")
        if flag is not None:
            given[key] = Given(flag, f"--{key.replace('_', '-')}", here)
    default = Settings(home=home, database_url="", redis_url="", models_dir=home, spill_dir=home)
    return Settings(
        home=home,
        database_url=given["database"].database() if "database" in given else sqlite_url(home / "overnight.db"),
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
        limits=_limits(given),
    )


def _check_names(environ: Mapping[str, str]) -> None:
    """A slip in a variable's name must not be without effect in silence; one that is like none may be another's."""
    known = {f"OVERNIGHT_{key.upper()}" for key in (*KEYS, "home")}
    for name in environ:
        if name.startswith("OVERNIGHT_") and name not in known:
            import difflib

            if near := difflib.get_close_matches(name, known, n=1, cutoff=0.9):
                raise SettingsError(f"{name} is not a setting; did you mean {near[0]}?")


def _limits(given: Mapping[str, Given]) -> Limits:
    values: dict[str, Any] = {}
    for name in (name for name in NAMES if name in given):
        if name.endswith("_bytes"):
            values[name] = given[name].size(CEILINGS.get(name))
        elif name.endswith("_s"):
            values[name] = given[name].seconds()
        else:
            values[name] = given[name].count(CEILINGS.get(name))
    return Limits(**values)


def _home(flags: Mapping[str, object], environ: Mapping[str, str], here: Path) -> Path:
    if (flag := flags.get("home")) is not None:
        return Given(flag, "--home", here).path()
    if value := environ.get("OVERNIGHT_HOME"):
        return Given(value, "OVERNIGHT_HOME", here).path()
    import platformdirs

    return platformdirs.user_data_path("overnight", appauthor=False)


def _from_toml(path: Path) -> dict[str, Given]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        raise SettingsError(f"{path.parent} is no folder; name one with OVERNIGHT_HOME") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from error
    for key in values:
        if key not in KEYS:
            raise SettingsError(f"{key!r} in {path} is not a setting; there are: {', '.join(KEYS)}")
    return {key: Given(value, f"{key!r} in {path}", path.parent) for key, value in values.items()}
