"""``python -m worker.health``: exit code 0 while a worker of this container holds its lease, else 1 and a sentence.

That it holds its lease says that its process lives and reaches the database; not how quickly its rows move.
"""

import os
import sys
import time

from storage.claims import list_workers
from storage.database import Database
from storage.errors import StorageError
from worker.errors import WorkerError
from worker.presence import host_name, is_dead
from worker.settings import load_settings


def is_healthy(database: Database, *, now: float) -> bool:
    """Whether a worker registered from here is alive; ``now`` in unix seconds.

    Raises:
        DatabaseUnreachable: nobody can tell.
    """
    here = host_name()
    return any(
        worker.hostname == here and not is_dead(worker.hostname, worker.pid, worker.process)
        for worker in list_workers(database, now)
    )


def main() -> int:
    """The exit code; a sentence on stderr where it is not 0."""
    try:
        with Database.open_for_reading(load_settings({}, os.environ).database_url) as database:
            if is_healthy(database, now=time.time()):
                return 0
        print(f"no worker of {host_name()} holds a lease", file=sys.stderr)  # noqa: T201
    except (StorageError, WorkerError) as error:
        print(error, file=sys.stderr)  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main())
