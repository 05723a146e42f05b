import importlib
import inspect

import pytest

import cli.errors
import engine.errors
import storage.errors
import worker.errors
from cli import exit_codes
from cli.errors import DatasetFault, WorkerDied
from cli.exit_codes import CODES, exit_code_of

ROOMS = (cli.errors, storage.errors, worker.errors, engine.errors)


def test_every_name_in_the_table_is_an_error_that_exists() -> None:
    for name in CODES:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), Exception), name


def test_every_error_for_people_has_an_exit_code_of_the_contract() -> None:
    for room in ROOMS:
        for name, kind in inspect.getmembers(room, inspect.isclass):
            if issubclass(kind, Exception) and kind.__module__ == room.__name__:
                codes = {CODES.get(f"{k.__module__}.{k.__qualname__}") for k in kind.__mro__}
                assert codes & {1, 2, 3, 4}, name


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DatasetFault("x"), exit_codes.USAGE),
        (storage.errors.JobNotFound(7), exit_codes.NOT_FOUND),
        (storage.errors.DatabaseLocked("x"), exit_codes.UNREACHABLE),
        (storage.errors.NothingToRetry("x"), exit_codes.USAGE),
        (worker.errors.SettingsError("x"), exit_codes.USAGE),
        (worker.errors.ModelNotFound("x"), exit_codes.NOT_FOUND),
        (worker.errors.RedisUnavailable("x"), exit_codes.UNREACHABLE),
        (engine.errors.PlanDoesNotFit("x"), exit_codes.USAGE),
        (engine.errors.DiskFull("x"), exit_codes.FAILED),
        (WorkerDied("x", 1), exit_codes.FAILED),
        (WorkerDied("x", 4), exit_codes.UNREACHABLE),
        (WorkerDied("x", -9), exit_codes.FAILED),
        (ZeroDivisionError(), None),
        (OSError(), None),
    ],
)
def test_the_nearest_class_decides(error: Exception, code: int | None) -> None:
    assert exit_code_of(error) == code
