"""The exit codes, and the one table from an error's class to its code.

The table holds names instead of classes, so that `overnight status` need not import what another command may raise.
"""

OK = 0
FAILED = 1
"""The job failed, was cancelled or has failed requests; or an output could not be written."""
USAGE = 2
"""The command line, a setting or the dataset cannot be understood."""
NOT_FOUND = 3
"""A named job, model or file is absent."""
UNREACHABLE = 4
"""Redis or the database cannot be used."""
INTERRUPTED = 130
"""Ctrl-C."""

CODES = {
    "cli.errors.DatasetFault": USAGE,
    "cli.errors.TemplateFault": USAGE,
    "cli.errors.FileAbsent": NOT_FOUND,
    "cli.errors.OutputRefused": USAGE,
    "cli.errors.OutputNotWritten": FAILED,
    "cli.errors.JobUnfinished": FAILED,
    "cli.errors.WorkerDied": FAILED,
    "cli.errors.CliError": FAILED,
    "storage.errors.JobNotFound": NOT_FOUND,
    "storage.errors.DatabaseUnreachable": UNREACHABLE,
    "storage.errors.SchemaTooNew": UNREACHABLE,
    "storage.errors.UnsafeFilesystem": UNREACHABLE,
    "storage.errors.InvalidTransition": USAGE,
    "storage.errors.StorageError": FAILED,
    "worker.errors.SettingsError": USAGE,
    "worker.errors.ModelNotFound": NOT_FOUND,
    "worker.errors.RedisUnreachable": UNREACHABLE,
    "worker.errors.RedisRefused": UNREACHABLE,
    "worker.errors.RedisUnavailable": UNREACHABLE,
    "worker.errors.WorkerError": FAILED,
    "engine.errors.CheckpointError": NOT_FOUND,
    "engine.errors.DeviceUnavailable": USAGE,
    "engine.errors.DeviceFailed": FAILED,
    "engine.errors.HardwareAbsent": NOT_FOUND,
    "engine.errors.HardwareError": USAGE,
    "engine.errors.PlanDoesNotFit": USAGE,
    "engine.errors.EngineError": FAILED,
}
"""The nearest class in the error's inheritance decides."""


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error a person can mend; None for a fault of ours, which deserves its traceback."""
    told = getattr(error, "worker_exit_code", None)
    if told in (USAGE, NOT_FOUND, UNREACHABLE):
        return int(told)
    for kind in type(error).__mro__:
        code = CODES.get(f"{kind.__module__}.{kind.__qualname__}")
        if code is not None:
            return code
    return None
