import base64
import json
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from worker.app import broker_url, make_app
from worker.doorbell import HANDLER, RedisUnreachable, client_url, message_for, ping, queue_name, ring
from worker.private_redis import PrivateRedis
from worker.settings import Settings

KEY = "overnight:overnight.default"


def waiting(settings: Settings) -> list[dict[str, Any]]:
    with redis.Redis.from_url(settings.redis_url) as client:
        return [json.loads(message) for message in client.lrange(KEY, 0, -1)]


def test_our_message_is_the_one_that_celery_would_have_sent(settings: Settings) -> None:
    app = make_app(settings)
    # On a connection of its own: Celery's pool is the process's, and closed for good once it has been closed.
    with app.connection_for_write() as connection:
        app.send_task(
            HANDLER, args=[7], queue=queue_name("default"), expires=60, ignore_result=True, connection=connection
        )
    (theirs,) = waiting(settings)

    ours = message_for(7, queue_name("default"), now=datetime.now(UTC))

    def comparable(message: dict[str, Any]) -> dict[str, Any]:
        changing = {"id", "root_id", "expires", "origin", "correlation_id", "reply_to", "delivery_tag"}
        plain = {
            part: {k: v for k, v in message[part].items() if k not in changing} for part in ("headers", "properties")
        }
        return {**message, **plain, "body": json.loads(base64.b64decode(message["body"]))}

    assert comparable(ours) == comparable(theirs)
    assert ours["headers"].keys() == theirs["headers"].keys()
    assert ours["properties"].keys() == theirs["properties"].keys()


def test_a_real_celery_worker_hears_the_ring(settings: Settings) -> None:
    heard: list[int] = []
    got_it = threading.Event()

    def on_ring(job_id: int) -> None:
        heard.append(job_id)
        got_it.set()

    app = make_app(settings, on_ring)
    ring(settings, 41)
    with app.connection_for_read() as connection, app.amqp.TaskConsumer(connection) as consumer:
        messages: list[Any] = []
        consumer.on_message = messages.append
        connection.drain_events(timeout=240)
        (message,) = messages
        message.ack()
    assert message.headers["task"] == HANDLER
    args, _, _ = message.decode()
    app.tasks[message.headers["task"]](*args)

    assert heard == [41]
    assert waiting(settings) == []


def test_a_queue_that_nobody_drains_stays_short_and_goes_away(settings: Settings) -> None:
    for job_id in range(25):
        ring(settings, job_id)

    kept = [json.loads(base64.b64decode(message["body"]))[0] for message in waiting(settings)]
    assert kept == [[job_id] for job_id in range(24, 14, -1)]
    with redis.Redis.from_url(settings.redis_url) as client:
        assert 0 < client.ttl(KEY) <= 60


def test_a_message_carries_ids_only(settings: Settings) -> None:
    ring(settings, 5)

    (message,) = waiting(settings)
    assert json.loads(base64.b64decode(message["body"]))[:2] == [[5], {}]
    assert message["content-type"] == "application/json"


def test_each_queue_has_its_own_bell(settings: Settings) -> None:
    ring(settings, 5, queue="nightly")

    assert waiting(settings) == []
    with redis.Redis.from_url(settings.redis_url) as client:
        assert client.llen("overnight:overnight.nightly") == 1


@pytest.mark.parametrize("url", ["redis://:secret@127.0.0.1:1/0", "unix:///nowhere/redis.sock"])
def test_a_redis_that_is_off_is_named_without_its_password(url: str) -> None:
    with pytest.raises(RedisUnreachable) as caught:
        ping(url, timeout=1.0)

    assert "OVERNIGHT_REDIS" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_redis_that_ended_is_noticed_at_once() -> None:
    with PrivateRedis() as server:
        url = server.url
        ping(url)
    with pytest.raises(RedisUnreachable):
        ping(url)


def test_both_spellings_of_a_socket_are_understood() -> None:
    assert broker_url("unix:///run/r.sock?db=2") == "redis+socket:///run/r.sock?virtual_host=2"
    assert client_url("redis+socket:///run/r.sock?virtual_host=2") == "unix:///run/r.sock?db=2"
    assert broker_url("unix:///run/r.sock") == "redis+socket:///run/r.sock"
    assert client_url("redis://host:1/2") == broker_url("redis://host:1/2") == "redis://host:1/2"
