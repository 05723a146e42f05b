"""A home of its own for each test, a tiny checkpoint, a real Redis, and the command in this process or another."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cli.main import main
from engine.model.registry import family_for
from worker.private_redis import PrivateRedis

ROOT = Path(__file__).resolve().parents[2]
NOBODY = "redis://127.0.0.1:1/0"
"""A port where nothing listens."""
CONFIG = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "torch_dtype": "float32",
    "vocab_size": 320,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 64,
    "max_position_embeddings": 128,
    "do_layer_norm_before": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
}

Run = Callable[..., Result]
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def make_checkpoint(folder: Path) -> Path:
    """A Hugging Face folder with random weights, small enough to import in no time."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    random = numpy.random.default_rng(0)
    tensors = {}
    for unit in family_for(CONFIG).units():
        for tensor in unit.tensors:
            rows = tensor.shape[0] // len(tensor.sources)
            for name in tensor.sources:
                shape = (rows, *tensor.shape[1:])
                tensors[f"model.{name}"] = (random.standard_normal(shape) * 0.3).astype(numpy.float32)
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "<pad>", "</s>", "<unk>", *alphabet]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:4])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face folder."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real server."""
    with PrivateRedis() as redis:
        yield redis.url


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """OVERNIGHT_HOME, not yet made; no other setting; the test stands in ``tmp_path``."""
    for name in [name for name in os.environ if name.startswith("OVERNIGHT_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "home"
    monkeypatch.setenv("OVERNIGHT_HOME", str(path))
    monkeypatch.setenv("OVERNIGHT_REDIS", NOBODY)
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def with_redis(home: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``home`` with a Redis that answers."""
    monkeypatch.setenv("OVERNIGHT_REDIS", redis_url)
    return home


@pytest.fixture
def run(home: Path) -> Run:
    """``run("status", "--json")``: the command within this process."""

    def invoke(*words: str, stdin: bytes | None = None) -> Result:
        return CliRunner().invoke(main, list(words), input=stdin)

    return invoke


@pytest.fixture
def command(home: Path) -> Command:
    """``command("status")``: the command as a process of its own."""

    def invoke(
        *words: str, environ: Mapping[str, str] | None = None, **more: Any
    ) -> "subprocess.CompletedProcess[str]":
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 240, **more}
        return subprocess.run(
            [sys.executable, "-P", "-m", "cli", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
            check=False,
            **options,
        )

    return invoke


def write_rows(path: Path, *rows: object) -> str:
    """JSON lines; returns the path as a word for the command line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def model(home: Path, checkpoint: Path) -> str:
    """The tiny checkpoint, as a word for --model."""
    return str(checkpoint)


def work(home: Path, job_id: int, *, failing: frozenset[int] = frozenset(), limit: int = 1000) -> None:
    """What a worker does with a job, without an engine: claims up to ``limit`` requests and records outputs."""
    from storage.claims import claim, register_worker, stop_worker
    from storage.database import Database
    from storage.results import RequestResult, record

    def result(index: int, attempt: int) -> RequestResult:
        error = ("too_long", "the prompt has 900 tokens, the model 128 positions") if index in failing else None
        output = None if error else {"text": f"=text {index}", "finish_reason": "stop"}
        return RequestResult(job_id, index, attempt, output, error, 3, 2)

    with Database.open(f"sqlite:///{home / 'overnight.db'}") as db:
        worker_id = register_worker(db, hostname="h", pid=1, queue="default", device="cpu", now=1000.0, lease_s=60)
        claimed = claim(db, worker_id, job_id, limit, now=1001.0)
        record(db, worker_id, [result(row.index, row.attempt) for row in claimed], None, now=1003.0)
        stop_worker(db, worker_id, now=1004.0)
