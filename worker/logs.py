"""Log lines: a sentence, then ``action``, ``job`` and ``worker`` where they are known. Never a prompt or an output."""

import logging
import sys
import time
from collections.abc import Mapping, MutableMapping
from typing import Any

from storage.urls import hide_passwords
from worker.printable import printable

LOGGER = "overnight"
_FIELDS = ("action", "job", "worker", "model")


class SentenceFormatter(logging.Formatter):
    """One line a record; a traceback only where ``tracebacks`` is set.

    Libraries log here, too: no password of a URL and no control character of theirs gets through.
    """

    converter = staticmethod(time.gmtime)
    default_msec_format = ""

    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ")
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, plus its traceback where that is wanted."""
        plain = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None, "stack_info": None})
        fields = [f"{name}={getattr(record, name)}" for name in _FIELDS if hasattr(record, name)]
        line = printable(" ".join([super().format(plain).replace("\n", " "), *fields]))
        if record.exc_info and self._tracebacks:
            line += "\n" + printable(self.formatException(record.exc_info), keep="\n\t")
        return hide_passwords(line)


class BoundLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger that adds its fields to every record; fields of the single call win."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Merge the bound fields with those of the call."""
        kwargs["extra"] = {**(self.extra or {}), **kwargs.get("extra", {})}
        return msg, kwargs


def get_logger(fields: Mapping[str, object] | None = None) -> BoundLogger:
    """The worker's logger."""
    return BoundLogger(logging.getLogger(LOGGER), dict(fields or {}))


def configure(level: str) -> None:
    """Send this process's log to stderr; Celery's own chatter only from warnings up, unless at ``debug``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SentenceFormatter(tracebacks=level == "debug"))
    logging.basicConfig(level=logging.WARNING if level != "debug" else logging.DEBUG, handlers=[handler], force=True)
    logging.getLogger(LOGGER).setLevel(level.upper())
    if level != "debug":
        # Each try to reach a Redis that is away is an error to Celery. The worker has said once that it does without.
        logging.getLogger("celery.worker.consumer.consumer").setLevel(logging.CRITICAL)
