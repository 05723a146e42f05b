"""Ringing the worker: one small Celery message with a job's id, after the job is committed.

The message is written with redis-py in the form that Celery's own producer gives it (message protocol 2 in kombu's
Redis envelope; a test compares the two): importing Celery would cost an enqueue a quarter of its time. Writing the
list ourselves also lets us keep a queue that nobody drains short and short-lived, which Celery cannot do.
"""

import base64
import json
import os
import socket
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode, urlsplit

from storage.urls import shown_error, without_password
from worker.errors import RedisRefused, RedisUnreachable
from worker.settings import Settings

if TYPE_CHECKING:
    from redis import Redis

__all__ = ["HANDLER", "KEY_PREFIX", "RedisUnreachable", "client_url", "ping", "queue_name", "ring"]

HANDLER = "overnight.ring"
"""The handler's name in Celery's registry."""
KEY_PREFIX = "overnight:"
"""Before every key of ours in Redis."""

_EXPIRES_S = 60
_MAX_WAITING = 10


def queue_name(queue: str) -> str:
    """The Celery queue that rings the workers of ``queue``."""
    return f"overnight.{queue}"


def ping(redis_url: str, timeout: float = 1.0) -> None:
    """Ask Redis for a sign of life within ``timeout`` seconds.

    Raises:
        RedisUnreachable: no answer, or no entry; the text says what to do. RedisRefused: waiting would not help.
    """
    with _Client(redis_url, timeout) as client:
        client.ping()


def ring(settings: Settings, job_id: int, *, queue: str | None = None, timeout: float = 1.0) -> None:
    """Wake the workers of ``queue`` (default: the settings' own) for ``job_id``.

    A lost or doubled ring changes nothing: the workers look for themselves every few seconds.

    Raises:
        RedisUnreachable: no answer, or no entry; the text says what to do.
    """
    name = queue_name(queue or settings.queue)
    message = json.dumps(message_for(job_id, name, now=datetime.now(UTC)))
    with _Client(settings.redis_url, timeout) as client:
        key = KEY_PREFIX + name
        with client.pipeline(transaction=True) as pipeline:
            pipeline.lpush(key, message)
            pipeline.ltrim(key, 0, _MAX_WAITING - 1)
            pipeline.expire(key, _EXPIRES_S)
            pipeline.execute()


def empty(settings: Settings, timeout: float = 5.0) -> None:
    """Remove every key of ours from Redis: rings that nobody heard, and whatever strangers put in their place.

    Raises:
        RedisUnreachable: no answer, or no entry.
    """
    with _Client(settings.redis_url, timeout) as client:
        for key in client.scan_iter(match=f"{KEY_PREFIX}*", count=1000):
            client.delete(key)


def message_for(job_id: int, queue: str, *, now: datetime) -> dict[str, Any]:
    """The message that Celery's producer would put on ``queue`` for ``HANDLER`` with ``[job_id]``."""
    message_id = str(uuid.uuid4())
    body = [[job_id], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    return {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": HANDLER,
            "id": message_id,
            "shadow": None,
            "eta": None,
            "expires": (now + timedelta(seconds=_EXPIRES_S)).isoformat(),
            "group": None,
            "group_index": None,
            "retries": 0,
            "timelimit": [None, None],
            "root_id": message_id,
            "parent_id": None,
            "argsrepr": f"[{job_id}]",
            "kwargsrepr": "{}",
            "origin": f"gen{os.getpid()}@{socket.gethostname()}",
            "ignore_result": True,
            "replaced_task_nesting": 0,
            "stamped_headers": None,
            "stamps": {},
        },
        "properties": {
            "correlation_id": message_id,
            "reply_to": "",
            "delivery_mode": 2,
            "expiration": str(_EXPIRES_S * 1000),
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }


def client_url(redis_url: str) -> str:
    """``redis_url`` as redis-py wants it: Celery's ``redis+socket://`` becomes ``unix://``."""
    parts = urlsplit(redis_url)
    if parts.scheme != "redis+socket":
        return redis_url
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if "virtual_host" in query:
        query["db"] = query.pop("virtual_host").strip("/")
    return f"unix://{parts.netloc}{parts.path}{'?' + urlencode(query) if query else ''}"


class _Client:
    """A short connection that turns redis-py's errors into one sentence."""

    def __init__(self, redis_url: str, timeout: float) -> None:
        self._redis_url = redis_url
        self._timeout = timeout
        self._client: Redis | None = None

    def __enter__(self) -> "Redis":
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        try:
            self._client = redis.Redis.from_url(
                client_url(self._redis_url),
                socket_timeout=self._timeout,
                socket_connect_timeout=self._timeout,
                retry=Retry(NoBackoff(), 0),
            )
        except (ValueError, TypeError) as error:
            raise self._wrong(error) from error
        return self._client

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        import redis

        assert self._client is not None
        self._client.close()
        denials = (redis.AuthenticationError, redis.exceptions.NoPermissionError)
        is_denied = any(words in str(error) for words in ("NOAUTH", "already authenticated", "DB index"))
        if isinstance(error, denials) or (isinstance(error, redis.RedisError) and is_denied):
            raise RedisRefused(
                f"Redis at {without_password(self._redis_url)} does not let us in "
                f"({shown_error(error, self._redis_url)}); say the right password and database with OVERNIGHT_REDIS"
            ) from error
        if isinstance(error, redis.RedisError | OSError):
            raise RedisUnreachable(
                f"Redis at {without_password(self._redis_url)} does not answer "
                f"({shown_error(error, self._redis_url)}); start it, or say with --redis or OVERNIGHT_REDIS where it is"
            ) from error
        # Options and host names reach redis-py's connection, and the resolver, only when it connects.
        if isinstance(error, TypeError | ValueError):
            raise self._wrong(error) from error

    def _wrong(self, error: Exception) -> RedisRefused:
        return RedisRefused(
            f"{without_password(self._redis_url)} is not a Redis URL that can be used "
            f"({shown_error(error, self._redis_url)}); correct it in --redis or OVERNIGHT_REDIS"
        )
