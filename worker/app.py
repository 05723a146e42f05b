"""The Celery application: one handler, JSON only, nothing kept in Redis that anyone would miss.

The database is the truth; a message is a hint that may be lost, doubled or late. Each setting below closes one of the
ways in which a queue that believes its messages goes wrong (docs/decisions/0003-celery-is-the-doorbell.md).
"""

import ssl
from collections.abc import Callable
from urllib.parse import parse_qs, urlencode, urlsplit

from celery import Celery

from worker.doorbell import HANDLER, KEY_PREFIX, queue_name
from worker.settings import Settings
from worker.strangers import amqp_class


def make_app(
    settings: Settings,
    on_ring: Callable[[int], None] | None = None,
    on_stray: Callable[[str], None] | None = None,
) -> Celery:
    """The application for ``settings``; ``on_ring`` is called with a job's id for each message.

    ``on_ring`` runs on the pool's one thread and should return at once; ``on_stray`` is told of each message that is
    dropped. Nothing is connected to yet.
    """
    url = broker_url(settings.redis_url)
    app = Celery("overnight", broker=url, amqp=amqp_class(on_stray or (lambda _: None)), set_as_current=False)
    app.conf.update(
        # JSON only: a message can name a handler and a number, never run code.
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        # Results live in the database; Redis keeps none.
        task_ignore_result=True,
        result_backend=None,
        task_default_queue=queue_name(settings.queue),
        task_create_missing_queues=False,
        # Acknowledged on arrival, one at a time: nothing is in flight for longer than it takes to set an event, so
        # Celery's redelivery of long tasks never happens.
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_pool="threads",
        worker_concurrency=1,
        worker_send_task_events=False,
        # Redis may go away for a night: the drain does without it, the consumer keeps knocking.
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_transport_options={
            "global_keyprefix": KEY_PREFIX,
            "health_check_interval": 25,
            "socket_keepalive": True,
            "socket_connect_timeout": 5,
            "socket_timeout": 30,
        },
        # The drain owns stopping and logging.
        worker_soft_shutdown_timeout=0,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
    )
    if urlsplit(settings.redis_url).scheme == "rediss" and "ssl_cert_reqs" not in settings.redis_url:
        app.conf.broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED}

    # Not shared: Celery would otherwise hand this handler, with this on_ring, to every application of the process.
    @app.task(name=HANDLER, ignore_result=True, shared=False)  # type: ignore[untyped-decorator]
    def handle_ring(job_id: int) -> None:
        if on_ring is not None:
            on_ring(job_id)

    return app


def broker_url(redis_url: str) -> str:
    """``redis_url`` as kombu wants it: ``unix://`` becomes ``redis+socket://``."""
    parts = urlsplit(redis_url)
    if parts.scheme != "unix":
        return redis_url
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if "db" in query:
        query["virtual_host"] = query.pop("db")
    return f"redis+socket://{parts.netloc}{parts.path}{'?' + urlencode(query) if query else ''}"
