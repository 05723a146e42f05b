"""What reaches Celery from Redis: rings and harmless questions. All else is counted and dropped before it is read.

Anybody who can write to Redis can write anything, and Celery trusts what it finds there: a body that is no JSON, or a
``shutdown`` to all, would end the worker. What is ours is told by its shape alone: nothing here runs what it reads.
"""

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.transport import redis as kombu_redis

from worker.doorbell import HANDLER, message_for

QUESTIONS = frozenset({"ping", "stats", "active", "registered", "reserved", "scheduled", "hello", "clock"})
"""Remote control commands that only ask (``celery inspect ping``); none of them changes the worker."""

_OF_ONE_RING = frozenset({"id", "root_id", "expires", "origin", "argsrepr", "lang"})
"""Headers whose values differ from ring to ring."""

Report = Callable[[str], None]
"""Called with the reason why a message was dropped."""


class Strays:
    """Counts dropped messages, and says so at most once a minute."""

    def __init__(self, say: Report, clock: Callable[[], float]) -> None:
        self._say = say
        self._clock = clock
        self._next_at = clock()
        self.count = 0

    def __call__(self, why: str) -> None:
        """Count one message more."""
        self.count += 1
        if (now := self._clock()) >= self._next_at:
            self._next_at = now + 60.0
            self._say(f"dropped what was not for this worker: messages so far {self.count}, the last one since {why}")


def amqp_class(on_stray: Report) -> type[Any]:
    """Celery's AMQP with a Redis transport that drops strangers' messages; ``on_stray`` is told of each."""

    class Channel(kombu_redis.Channel):
        def _brpop_read(self, **options: Any) -> Any:
            try:
                return super()._brpop_read(**options)  # type: ignore[no-untyped-call]
            except (ValueError, TypeError, RecursionError):  # what was popped is no JSON; the connection is in order
                on_stray("it is no JSON")
                return True

    class Transport(kombu_redis.Transport):
        def _deliver(self, message: Any, queue: str) -> None:
            why = what_is_wrong(message, is_control=queue.endswith(".pidbox"))
            if why is None:
                super()._deliver(message, queue)  # type: ignore[no-untyped-call]
            else:
                on_stray(why)

    Transport.Channel = Channel

    class OurConnection(Connection):
        def get_transport_cls(self) -> Any:
            return Transport

    class OurAMQP(AMQP):  # type: ignore[misc]
        pass

    OurAMQP.Connection = OurConnection
    return OurAMQP


def what_is_wrong(message: object, *, is_control: bool) -> str | None:
    """Why a message in kombu's envelope may not pass; None if it may."""
    if not isinstance(message, dict):
        return "it is no JSON object"
    properties, headers = message.get("properties"), message.get("headers")
    if not isinstance(properties, dict) or not isinstance(properties.get("delivery_tag"), str):
        return "it has no delivery tag"
    if not isinstance(properties.get("delivery_info"), dict) or not isinstance(headers, dict):
        return "its envelope is of another form"
    if message.get("content-type") != "application/json" or message.get("content-encoding") != "utf-8":
        return "its content is not JSON"
    if headers.get("compression") is not None:
        return "it is compressed"
    try:
        body = _body(message.get("body"), properties.get("body_encoding"))
    except (ValueError, TypeError, RecursionError):
        return "its body cannot be read"
    if is_control:
        method = body.get("method") if isinstance(body, dict) else None
        asks = isinstance(method, str) and method in QUESTIONS and isinstance(body.get("arguments") or {}, dict)
        return None if asks else "it is a command, not a question"
    return None if _is_ring(headers, body) else "it is no ring"


def _body(text: object, encoding: object) -> Any:
    if not isinstance(text, str):
        raise TypeError
    raw = base64.b64decode(text, validate=True) if encoding == "base64" else text.encode()
    return json.loads(raw.decode())


def _is_ring(headers: dict[str, Any], body: object) -> bool:
    """A message as ``doorbell.message_for`` makes it, with one number in it."""
    ours = message_for(0, "", now=datetime.fromtimestamp(0, UTC))["headers"]
    if any(name not in ours or (name not in _OF_ONE_RING and ours[name] != value) for name, value in headers.items()):
        return False
    try:
        datetime.fromisoformat(headers["expires"])
    except (KeyError, TypeError, ValueError):
        return False
    if not isinstance(headers.get("id"), str) or headers.get("task") != HANDLER:
        return False
    if not isinstance(body, list) or len(body) != 3 or not isinstance(body[2], dict):
        return False
    args, kwargs, embedded = body
    is_number = isinstance(args, list) and len(args) == 1 and type(args[0]) is int
    return is_number and kwargs == {} and not any(embedded.values())
