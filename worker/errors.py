"""What can go wrong in the worker's room.

WorkerError
├── SettingsError            a flag, variable or key of overnight.toml that makes no sense
├── ModelNotFound            ``--model`` names nothing that is there
├── RedisUnreachable         no answer from the doorbell
│   └── RedisRefused         a wrong URL or password: it will never answer
├── RedisUnavailable         no redis-server to start privately, or it did not start
├── DeviceBusy               another worker on this machine holds the device
└── TraceNotWritten          the file of ``run --trace`` cannot be written

The texts are for people: what is wrong, where, and what to do.
"""


class WorkerError(Exception):
    """Any failure of this room that a person can do something about."""


class SettingsError(WorkerError, ValueError):
    """A setting that makes no sense; names the flag, variable or key."""


class ModelNotFound(WorkerError):
    """A model that was named and is not there."""


class RedisUnreachable(WorkerError):
    """Redis does not answer, or does not let us in."""


class RedisRefused(RedisUnreachable):
    """The URL is none, or Redis does not accept the password: waiting cannot help."""


class RedisUnavailable(WorkerError):
    """There is no redis-server that could be started, or it ended at once."""


class DeviceBusy(WorkerError):
    """Another worker on this machine already uses the device."""


class TraceNotWritten(WorkerError):
    """The trace cannot be begun; later on, a trace that cannot grow only ends."""
