"""Fetching from the hub: from a server that speaks as much of its protocol as is needed, and from none at all."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from engine.weights.hub import has_tokenizer, wanted_files

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0" * 40
FILES = {
    "config.json": b'{"model_type": "opt"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same again",
    "flax_model.msgpack": b"and again",
    "tokenizer.json": b"{}",
    "README.md": b"a card",
}


class Hub(BaseHTTPRequestHandler):
    """Serves one repository, tiny/opt, and the list of another, tiny/mute; any other is unknown."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/tiny/opt/resolve/{COMMIT}/"):
            content = FILES[path.rpartition("/")[2]]
            self.answer(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        elif path.startswith("/api/models/tiny/opt/tree/"):
            tree = [{"type": "file", "path": n, "size": len(c), "oid": COMMIT} for n, c in FILES.items()]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith("/api/models/tiny/mute"):
            names = [{"rfilename": name} for name in FILES if not name.startswith("tokenizer")]
            self.answer(200, json.dumps({"id": "tiny/mute", "sha": COMMIT, "siblings": names}).encode())
        elif path.startswith("/api/models/tiny/opt"):
            info = {"id": "tiny/opt", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            self.answer(200, json.dumps(info).encode())
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def download(name: str, destination: Path, **environment: str) -> str:
    """In a process of its own: the library reads its environment when it is imported."""
    program = """
        import sys
        from pathlib import Path
        from engine.errors import CheckpointError
        from engine.weights.hub import download
        try:
            print("downloaded", download(sys.argv[1], Path(sys.argv[2])))
        except CheckpointError as error:
            print("refused", error)
    """
    env = {"PATH": os.environ["PATH"], "HF_HOME": str(destination.parent / "hf"), "HF_HUB_DISABLE_XET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), name, str(destination)],
        cwd=ROOT, env={**env, **environment}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_only_what_an_import_needs_is_downloaded(hub: str, tmp_path: Path) -> None:
    assert download("tiny/opt", tmp_path / "opt", HF_ENDPOINT=hub) == f"downloaded {tmp_path / 'opt'}\n"
    found = {path.name: path.read_bytes() for path in (tmp_path / "opt").iterdir() if path.is_file()}
    assert found == {name: FILES[name] for name in ("config.json", "model.safetensors", "tokenizer.json")}


def test_a_repository_without_a_tokenizer_is_refused_before_its_weights_come(hub: str, tmp_path: Path) -> None:
    message = download("tiny/mute", tmp_path / "opt", HF_ENDPOINT=hub)
    assert message.startswith("refused tiny/mute on the Hugging Face hub holds no tokenizer: ")
    assert not (tmp_path / "opt").exists()


def test_an_unknown_repository(hub: str, tmp_path: Path) -> None:
    message = download("tiny/none", tmp_path / "opt", HF_ENDPOINT=hub)
    assert message.startswith("refused tiny/none is no local folder, and fetching it")
    assert "or give a folder that holds the checkpoint" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_no_network(environment: dict[str, str], tmp_path: Path) -> None:
    message = download("facebook/opt-125m", tmp_path / "opt", **environment)
    assert message.startswith("refused facebook/opt-125m is no local folder")
    assert "give a folder that holds the checkpoint" in message
    assert not (tmp_path / "opt").exists()


def test_a_mistyped_path_is_no_hub_name(tmp_path: Path) -> None:
    assert "which look like facebook/opt-1.3b" in download("./models/opt/", tmp_path / "opt")


def test_which_files_are_wanted() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    bins = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    assert wanted_files(["config.json", *shards, *bins, "x.msgpack"]) == ["config.json", *shards]
    assert wanted_files([*bins, "vocab.json", "merges.txt", "training_args.bin"]) == [*bins, "vocab.json", "merges.txt"]
    assert wanted_files(["config.json", "tf_model.h5"]) == []


def test_a_tokenizer_is_known_by_its_files() -> None:
    assert has_tokenizer(["tokenizer.json"])
    assert has_tokenizer(["merges.txt", "vocab.json"])
    assert not has_tokenizer(["vocab.json", "tokenizer_config.json"])
