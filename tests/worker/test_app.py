import pytest

from worker.app import make_app
from worker.doorbell import HANDLER
from worker.settings import Settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("accept_content", ["json"]),
        ("task_serializer", "json"),
        ("task_ignore_result", True),
        ("result_backend", None),
        ("task_acks_late", False),
        ("worker_prefetch_multiplier", 1),
        ("worker_pool", "threads"),
        ("worker_concurrency", 1),
        ("worker_send_task_events", False),
        ("broker_connection_retry_on_startup", True),
        ("broker_connection_max_retries", None),
        ("worker_soft_shutdown_timeout", 0),
        ("worker_hijack_root_logger", False),
        ("worker_redirect_stdouts", False),
        ("task_default_queue", "overnight.default"),
    ],
)
def test_every_setting_that_closes_a_trap_is_pinned(settings: Settings, setting: str, value: object) -> None:
    assert make_app(settings).conf[setting] == value


def test_nothing_of_ours_in_redis_is_without_our_prefix(settings: Settings) -> None:
    assert make_app(settings).conf.broker_transport_options["global_keyprefix"] == "overnight:"


def test_two_applications_do_not_share_their_handlers(settings: Settings) -> None:
    heard: list[tuple[str, int]] = []
    first = make_app(settings, lambda job_id: heard.append(("first", job_id)))
    second = make_app(settings, lambda job_id: heard.append(("second", job_id)))

    first.tasks[HANDLER](1)
    second.tasks[HANDLER](2)

    assert heard == [("first", 1), ("second", 2)]


def test_an_encrypted_redis_must_prove_who_it_is(settings: Settings) -> None:
    from dataclasses import replace

    app = make_app(replace(settings, redis_url="rediss://host:6380/0"))

    assert app.conf.broker_use_ssl["ssl_cert_reqs"].name == "CERT_REQUIRED"
