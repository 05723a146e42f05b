"""What strangers may leave in our Redis: each name with what does it. None of it may end a worker, or change an output.

Used by the chaos campaign and by the tests of the worker, so that both know the same kinds.
"""

import base64
import copy
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from worker.app import make_app
from worker.doorbell import KEY_PREFIX, message_for, queue_name
from worker.settings import Settings

if TYPE_CHECKING:
    from redis import Redis

Attack = Callable[["Redis", Settings], object]


def _raw(data: bytes | str) -> Attack:
    return lambda client, settings: client.lpush(_key(settings), data)


def _key(settings: Settings) -> str:
    return KEY_PREFIX + queue_name(settings.queue)


def _ring(**changes: Any) -> Attack:
    """A ring in which parts are replaced, each named by its path: ``headers__task="x"``."""

    def attack(client: "Redis", settings: Settings) -> object:
        message = copy.deepcopy(message_for(1, queue_name(settings.queue), now=datetime.now(UTC)))
        for path, value in changes.items():
            *parents, last = path.replace("-", "_").split("__")
            part: Any = message
            for parent in parents:
                part = part[parent.replace("content_", "content-")]
            name = last.replace("content_", "content-")
            if value is _REMOVED:
                del part[name]
            else:
                part[name] = value
        return client.lpush(_key(settings), json.dumps(message))

    return attack


_REMOVED = object()


def _body(value: object) -> Attack:
    return _ring(body=base64.b64encode(json.dumps(value).encode()).decode())


def _embedded(**changes: Any) -> dict[str, Any]:
    return {"callbacks": None, "errbacks": None, "chain": None, "chord": None, **changes}


def _wrong_type(key: str) -> Attack:
    def attack(client: "Redis", settings: Settings) -> object:
        name = key.replace("QUEUE", queue_name(settings.queue))
        client.delete(name)
        return client.set(name, "a text where a list or a set should be")

    return attack


def _broadcast(command: str, **arguments: Any) -> Attack:
    def attack(client: "Redis", settings: Settings) -> object:  # noqa: ARG001 (Celery has a connection of its own)
        app = make_app(settings)
        with app.connection_for_write() as connection:
            return app.control.broadcast(command, arguments=arguments, reply=False, connection=connection)

    return attack


def _published(data: bytes | str) -> Attack:
    return lambda client, _: client.publish(f"{KEY_PREFIX}/0.celery.pidbox", data)


ATTACKS: Mapping[str, Attack] = {
    "no JSON": _raw("{not json"),
    "binary": _raw(b"\x80\x04\x95\xff\xfe\x00"),
    "nothing": _raw(""),
    "a list": _raw("[1,2,3]"),
    "a number": _raw("7"),
    "null": _raw("null"),
    "a text": _raw('"text"'),
    "an empty object": _raw("{}"),
    "another object": _raw('{"a":1}'),
    "100,000 brackets": _raw("[" * 100_000 + "]" * 100_000),
    "a body that is no base64": _ring(body="%%%"),
    "a body that is no text": _ring(body=17),
    "a body that is absent": _ring(body=_REMOVED),
    "a body that is no JSON": _ring(body=base64.b64encode(b"{not json").decode()),
    "a body of brackets": _ring(body=base64.b64encode(b"[" * 50_000 + b"]" * 50_000).decode()),
    "a body of another form": _body({"args": [1]}),
    "no argument": _body([[], {}, _embedded()]),
    "two arguments": _body([[1, 2], {}, _embedded()]),
    "a text for a number": _body([["1"], {}, _embedded()]),
    "a named argument": _body([[1], {"job_id": 2}, _embedded()]),
    "a callback": _body([[1], {}, _embedded(callbacks=[{"task": "os.system", "args": ["true"]}])]),
    "20 MB": _body([["x" * 20_000_000], {}, _embedded()]),
    "an unknown task": _ring(headers__task="os.system"),
    "no task": _ring(headers__task=_REMOVED),
    "no headers": _ring(headers=None),
    "a task for next year": _ring(headers__eta="2099-01-01T00:00:00+00:00"),
    "a time that is none": _ring(headers__expires="tomorrow"),
    "a limit of another form": _ring(headers__timelimit="soon"),
    "an identifier that is none": _ring(headers__id=[1]),
    "a header of somebody else": _ring(headers__compression="bzip2"),
    "pickle": _ring(content_type="application/x-python-serialize", body=base64.b64encode(b"cos\nsystem\n").decode()),
    "an unknown encoding": _ring(content_encoding="utf-7"),
    "no properties": _ring(properties=None),
    "no delivery tag": _ring(properties__delivery_tag=_REMOVED),
    "no delivery information": _ring(properties__delivery_info=None),
    "a key of another type": _wrong_type(f"{KEY_PREFIX}QUEUE"),
    "bookkeeping of another type": _wrong_type(f"{KEY_PREFIX}unacked"),
    "an index of another type": _wrong_type(f"{KEY_PREFIX}unacked_index"),
    "bindings of another type": _wrong_type(f"{KEY_PREFIX}_kombu.binding.celery.pidbox"),
    "a published text": _published("{not json"),
    "a published list": _published("[]"),
    "a published object": _published('{"body": 1}'),
    "shutdown": _broadcast("shutdown"),
    "pool_restart": _broadcast("pool_restart", reload=True),
    "cancel_consumer": _broadcast("cancel_consumer", queue="overnight.default"),
    "add_consumer": _broadcast("add_consumer", queue="elsewhere"),
    "rate_limit": _broadcast("rate_limit", task_name="overnight.ring", rate_limit="1/h"),
    "pool_shrink": _broadcast("pool_shrink", n=1),
    "an unknown command": _broadcast("rm", path="/"),
}
"""What strangers do, by name; each puts one thing into Redis, or sends one command."""
