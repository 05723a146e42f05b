"""What every room's tests share: a clean environment, a real Redis, a database, and a tiny model that is really run."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from storage.database import Database
from worker.private_redis import PrivateRedis
from worker.settings import Settings, load_settings

# A suite in the background (`make test &` in a script) ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure of the code under test.
hypothesis.settings.register_profile(
    "overnight", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("overnight")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of this machine's user reaches a test, and all state goes into the test's own folder."""
    for name in list(os.environ):
        if name.startswith(("OVERNIGHT_", "_OVERNIGHT_", "HF_", "CELERY_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OVERNIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Tests share few cores with the worker processes they start: threads that spin for work would starve them.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[PrivateRedis]:
    """One real Redis for the session, without a TCP port; use ``redis_url``, which finds it empty."""
    with PrivateRedis() as server:
        yield server


@pytest.fixture
def redis_url(redis_server: PrivateRedis) -> str:
    """The URL of a running, empty Redis."""
    import redis

    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def settings(redis_url: str) -> Settings:
    """Settings whose state lies in the test's folder and whose doorbell is the session's Redis."""
    return load_settings({"redis": redis_url}, os.environ)


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """The open, empty database of ``settings``."""
    with Database.open(settings.database_url) as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: OPT with random float32 weights, 2 layers of 32, 128 positions, a byte-level tokenizer."""
    from tests.engine.checkpoints import make_checkpoint

    folder = tmp_path_factory.mktemp("tiny") / "tiny-opt"
    make_checkpoint(
        folder,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        max_position_embeddings=128,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as a model directory."""
    from engine.weights.importing import import_checkpoint

    folder = tmp_path_factory.mktemp("models") / "tiny-opt"
    import_checkpoint(tiny_checkpoint, folder)
    return folder
