"""What may pass from Redis to Celery. (That no attack ends a worker is shown with real ones, in tests/e2e.)"""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from benchmarks.strangers import ATTACKS
from worker.app import make_app
from worker.doorbell import client_url, message_for, ring
from worker.settings import Settings
from worker.strangers import QUESTIONS, Strays, what_is_wrong

KEY = "overnight:overnight.default"
IN_THE_QUEUE = [
    name
    for name in ATTACKS
    if name.startswith(("a body", "no ", "an ", "a task", "a text for", "a time", "a limit", "a header", "a callback"))
    and name not in ("no JSON", "an index of another type", "an unknown command")
] + ["two arguments", "a named argument", "20 MB", "pickle", "an empty object", "another object", "a list", "null"]


def test_our_own_ring_passes() -> None:
    assert what_is_wrong(message_for(7, "overnight.default", now=datetime.now(UTC)), is_control=False) is None


def test_what_celery_itself_sends_passes(settings: Settings) -> None:
    app = make_app(settings)
    with app.connection_for_write() as connection:
        asked = {"queue": "overnight.default", "expires": 60, "ignore_result": True}
        app.send_task("overnight.ring", args=[7], connection=connection, **asked)
    with redis.Redis.from_url(client_url(settings.redis_url)) as client:
        (theirs,) = client.lrange(KEY, 0, -1)
    assert what_is_wrong(json.loads(theirs), is_control=False) is None


@pytest.mark.parametrize("name", IN_THE_QUEUE)
def test_nothing_else_passes_the_queue(settings: Settings, name: str) -> None:
    with redis.Redis.from_url(client_url(settings.redis_url)) as client:
        ATTACKS[name](client, settings)
        (forged,) = client.lrange(KEY, 0, -1)
    assert isinstance(what_is_wrong(json.loads(forged), is_control=False), str)


def control(method: object, **body: Any) -> dict[str, Any]:
    message = message_for(1, "q", now=datetime.now(UTC))
    return {**message, "headers": {}, "body": json.dumps({"method": method, "arguments": {}, **body})} | {
        "properties": {**message["properties"], "body_encoding": None}
    }


@pytest.mark.parametrize("method", sorted(QUESTIONS))
def test_a_question_may_be_asked(method: str) -> None:
    assert what_is_wrong(control(method), is_control=True) is None


@pytest.mark.parametrize("method", ["shutdown", "pool_restart", "cancel_consumer", "revoke", None, ["ping"], {}])
def test_a_command_is_not_for_strangers(method: object) -> None:
    assert what_is_wrong(control(method), is_control=True) is not None


def test_strays_are_counted_and_told_at_most_once_a_minute() -> None:
    said: list[str] = []
    now = 100.0
    strays = Strays(said.append, lambda: now)
    for _ in range(5):
        strays("it is no ring")
    assert said == ["dropped what was not for this worker: messages so far 1, the last one since it is no ring"]
    now += 60.0
    strays("it is no JSON")
    assert said[-1] == "dropped what was not for this worker: messages so far 6, the last one since it is no JSON"
    assert len(said) == 2


def test_a_ring_that_is_heard_is_gone(settings: Settings) -> None:
    dropped: list[str] = []
    app = make_app(settings, on_stray=dropped.append)
    with redis.Redis.from_url(client_url(settings.redis_url)) as client:
        client.lpush(KEY, "{not json")
        client.lpush(KEY, "[]")
        ring(settings, 3)
        heard: list[Any] = []
        with app.connection_for_read() as connection, app.amqp.TaskConsumer(connection) as consumer:
            consumer.on_message = heard.append
            while not heard:
                connection.drain_events(timeout=240)
            heard[0].ack()
        assert client.llen(KEY) == 0
    assert dropped == ["it is no JSON", "it is no JSON object"]
