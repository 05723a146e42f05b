"""What can go wrong with the database.

StorageError
├── JobNotFound             no job has this number (or it is still being loaded)
├── EmptyJob                a job must have at least one request
├── InvalidTransition       the job's state does not allow what was asked
│   └── NothingToRetry      no request of the job can be run again
├── ClaimLost               this worker's lease was taken from it: what it holds belongs to others now
├── LoadLost                the job was swept away while it was still being loaded
├── IntegrityBroken         the rows contradict each other; names both sides
└── DatabaseUnreachable     the database cannot be used at all
    ├── DatabaseLocked      another process kept it locked for longer than the busy timeout
    ├── DatabaseReadOnly    the file or its directory cannot be written
    ├── DatabaseFull        no room left on the disk
    ├── DatabaseMisnamed    a URL, password or path that cannot lead to a database
    ├── NotADatabase        the file is something else, or damaged
    ├── UnsafeFilesystem    SQLite on a network file system
    └── SchemaTooNew        a newer overnight made it

The texts are for people: what is wrong, where, and what to do.
"""


class StorageError(Exception):
    """Any failure of the storage room."""


class JobNotFound(StorageError):
    """No visible job has this number."""

    def __init__(self, job_id: int) -> None:
        super().__init__(f"There is no job {job_id}. `overnight status` lists the jobs there are.")
        self.job_id = job_id


class EmptyJob(StorageError):
    """A job without a single request was to be created."""


class InvalidTransition(StorageError):
    """The state of the job does not allow what was asked; the sentence says why."""


class NothingToRetry(InvalidTransition):
    """No request of the job has failed or was cancelled in a way that another run could change."""


class ClaimLost(StorageError):
    """The worker's row was stopped or expired: its requests may be somebody else's by now."""

    def __init__(self, worker_id: int) -> None:
        super().__init__(
            f"Worker {worker_id} lost its lease: another process took its requests back. "
            "Nothing is lost; the worker has to register again."
        )
        self.worker_id = worker_id


class LoadLost(StorageError):
    """A job disappeared while its rows were being inserted."""


class IntegrityBroken(StorageError):
    """Two sides that must be equal are not; every broken law is listed."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("The database contradicts itself:\n" + "\n".join(faults))
        self.faults = faults


class DatabaseUnreachable(StorageError):
    """The database cannot be opened, read or written."""

    may_pass = True
    """Whether waiting can help: a lock is released, a disk gets room, a server comes back."""


class DatabaseLocked(DatabaseUnreachable):
    """Another process held the lock for longer than the busy timeout."""


class DatabaseReadOnly(DatabaseUnreachable):
    """The database file, or the directory that must hold its journal, cannot be written."""

    may_pass = False


class DatabaseFull(DatabaseUnreachable):
    """The disk has no room left for the database or its journal."""


class DatabaseMisnamed(DatabaseUnreachable):
    """The URL, its password or its path cannot lead to a database, however long one waits."""

    may_pass = False


class NotADatabase(DatabaseUnreachable):
    """The file is not an overnight database, or it is damaged."""

    may_pass = False


class UnsafeFilesystem(DatabaseUnreachable):
    """SQLite would lie on a network file system, whose locks cannot be trusted."""

    may_pass = False


class SchemaTooNew(DatabaseUnreachable):
    """The schema is of a version that this program does not know."""

    may_pass = False
