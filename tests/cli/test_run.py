"""`run` and `demo` as processes, with their real Redis, worker and engine."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from cli.errors import WorkerDied
from cli.main import main
from cli.progress import LineProgress, Snapshot
from cli.serving import OwnWorker
from engine.devices.host import HostDevice
from engine.dtypes import DType
from engine.measure import identity_of
from engine.planner.plan import PlanOptions
from engine.planner.profiles import load_hardware
from engine.planner.resolve import MICRO_BATCH_TOKENS
from engine.profile import store_profile
from storage.database import Database
from storage.jobs import Job, list_jobs
from storage.results import list_passes
from tests.cli.conftest import ROOT, Command, Run, write_rows
from worker.errors import RedisUnavailable
from worker.settings import Settings

Start = Callable[..., "subprocess.Popen[str]"]

PATIENCE_S = 240.0
"""Of a busy machine: what has not come by then will not come. pytest ends a test after 300 s in any case."""
GENERATE = ("--task", "generate", "--device", "cpu", "--device-memory", "256MiB")
SLOW = ("--max-new-tokens", "120", "--micro-batch", "1", "--micro-batches", "1")
"""Passes of one token each: more of them for 60 rows than can be computed between two looks at the job."""


@pytest.fixture
def model(home: Path, run: Run, checkpoint: Path) -> str:
    """The tiny model, imported."""
    assert run("import", str(checkpoint)).exit_code == 0
    return "tiny"


def only_job(home: Path) -> Job | None:
    if not (home / "overnight.db").exists():
        return None
    with Database.open(f"sqlite:///{home / 'overnight.db'}") as database:
        return next(iter(list_jobs(database)), None)


def until(what: str, condition: Callable[[], object]) -> None:
    """Other processes can only be watched from outside."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.05)


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    """The command in the background; killed at the end if the test did not see to its end."""
    started: list[subprocess.Popen[str]] = []
    # What is started heeds Ctrl-C, also where whoever runs the tests ignores it, as shells do behind &.
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)

    def begin(*words: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cli", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    signal.signal(signal.SIGINT, heeded)
    for process in started:
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def children(pid: int) -> list[int]:
    return [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextmanager
def job_begun(home: Path) -> Iterator[None]:
    """While it lasts, the job has begun and cannot end: nobody else can write to the database."""
    until("the job to run", lambda: (job := only_job(home)) is not None and job.state != "queued")
    with Database.open(f"sqlite:///{home / 'overnight.db'}") as database, database.write() as connection:
        states = connection.exec_driver_sql("SELECT state FROM jobs").all()
        assert [state for (state,) in states] == ["running"], "it was too quick to be caught in the middle"
        yield


def worker_of(pid: int) -> int:
    """The worker of a `run`, whose other child is its Redis."""
    return next(pid for pid in children(pid) if b"redis-server" not in Path(f"/proc/{pid}/cmdline").read_bytes())


def test_a_dataset_goes_in_and_a_file_comes_out(home: Path, command: Command, model: str) -> None:
    dataset = write_rows(Path("d.jsonl"), *({"id": f"r{i}", "prompt": "ab" * i} for i in range(9)))
    done = command("run", dataset, "--model", model, *GENERATE, "--max-new-tokens", "5", "-o", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [(row["index"], row["id"], row["status"]) for row in rows] == [(i, f"r{i}", "ok") for i in range(9)]
    assert all(row["usage"]["completion_tokens"] <= 5 for row in rows)
    assert "done: 100%" in done.stderr
    plan = r"^tiny: all 2 layers in memory; KV cache up to \S+ MiB in memory; float32; 1 x 2,048 tokens a pass$"
    assert re.search(plan, done.stderr, re.MULTILINE)
    assert re.search(
        r"^job 1: \S+ tokens/s generated, \S+ tokens/s in all, bound by [a-z_]+$", done.stderr, re.MULTILINE
    )
    assert "\x1b" not in done.stderr
    job = only_job(home)
    assert job is not None
    assert (job.state, job.num_done) == ("done", 9)


def test_four_bits_are_told_wherever_the_plan_is(home: Path, command: Command, run: Run, model: str) -> None:
    dataset = write_rows(Path("d.jsonl"), {"prompt": "ab"})
    assert run("import", model, "four", "--weight-format", "int4").exit_code == 0
    done = command("run", dataset, "--model", "four", *GENERATE, "--kv-format", "int4", "-o", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "; float32; weights in int4; KV cache in int4; 1 x 2,048 tokens a pass" in done.stderr
    document = json.loads(run("status", "1", "--json").stdout)
    assert document["formats"] == {"weights": "int4", "kv": "int4", "dtype": "float32"}
    refused = run("run", dataset, "--model", model, *GENERATE, "--exact", "--kv-format", "int4", "-o", "no.jsonl")
    assert refused.exit_code == 2
    assert "--exact and --kv-format int4: a cache in four bits is not exact" in refused.stderr
    assert not Path("no.jsonl").exists()


def test_rows_too_long_for_the_model_are_error_rows_with_both_lengths(home: Path, command: Command, model: str) -> None:
    dataset = write_rows(Path("d.jsonl"), {"prompt": "short"}, {"prompt": "x" * 500})
    done = command("run", dataset, "--model", model, *GENERATE, "--max-new-tokens", "5", "-o", "-")
    assert done.returncode == 1
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["status"], second["status"]) == ("ok", "error")
    assert "128" in second["error"]["message"]
    assert "50" in second["error"]["message"]
    assert "1 failed request of 2" in done.stderr


@pytest.mark.parametrize(
    ("spoil", "code", "word"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), 3, "not a model"),
        (lambda folder: next(folder.glob("*layer*")).write_bytes(b"\0" * 10), 3, "bytes instead of"),
        (lambda folder: _flip_a_byte(next(folder.glob("*layer*"))), 1, "checksum"),
    ],
)
def test_a_damaged_model_is_named_and_no_output_is_touched(
    home: Path, command: Command, model: str, spoil: Callable[[Path], object], code: int, word: str
) -> None:
    spoil(home / "models" / model)
    Path("out.jsonl").write_text("old")
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    done = command("run", dataset, "--model", str(home / "models" / model), *GENERATE, "-o", "out.jsonl")
    assert done.returncode == code
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert Path("out.jsonl").read_text() == "old"


def test_a_plan_that_does_not_fit_is_refused_before_there_is_a_job(home: Path, command: Command, model: str) -> None:
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    words = ("--model", model, "--task", "generate", "--device", "cpu", "--device-memory", "1KiB", "-o", "out")
    done = command("run", dataset, *words, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the plan does not fit: it needs ")
    assert "the smallest that fits: --device-memory " in done.stderr
    assert not Path("out").exists()
    assert only_job(home) is None


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--host-memory", "900TiB", "--host-memory asks for 900.0 TiB"),
        ("--device-memory", "900TiB", "--device-memory asks for 900.0 TiB"),
        ("--disk-space", "900TiB", "--disk-space asks for 900.0 TiB"),
        ("--disk-dir", "/dev/null/x", "the folder for spill files /dev/null/x cannot be made"),
    ],
)
def test_what_the_machine_has_not_is_refused_before_there_is_a_job(
    option: str, value: str, said: str, home: Path, run: Run, model: str
) -> None:
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    done = run("run", dataset, "--model", model, "--task", "generate", "--device", "cpu", option, value, "-o", "out")
    assert done.exit_code == 2
    assert said in done.stderr
    assert only_job(home) is None


@pytest.mark.parametrize("fixed", [[], ["--weights", "0/0/100"]], ids=["free", "streamed"])
def test_a_worker_loads_the_plan_that_was_told(fixed: list[str], home: Path, command: Command, model: str) -> None:
    """Once this machine was measured, both search, for the same rows."""
    t4 = load_hardware("t4-gcp")
    matmul = {DType.FLOAT32: t4.matmul[DType.FLOAT16]}
    identity = identity_of(HostDevice(), home) | {"threads": "1"}  # as the worker has, which tests keep to one core
    machine = replace(t4, device="cpu", shares_host_memory=True, host_attention=None, matmul=matmul, identity=identity)
    store_profile(home, machine)
    dataset = write_rows(Path("d.jsonl"), *({"prompt": "ab" * i} for i in range(1, 20)))
    placement = ("--device", "cpu", "--device-memory", "256MiB", *fixed)
    told = command(
        "plan", "--model", model, "--dataset", dataset, "--gen-len", "5", *placement, "--no-advice", "--json"
    )
    assert told.returncode == 0, told.stderr
    words = ("--task", "generate", "--max-new-tokens", "5", *placement, "-o", "out.jsonl")
    done = command("run", dataset, "--model", model, *words)
    assert done.returncode == 0, done.stderr
    job = only_job(home)
    assert job is not None
    assert job.plan == json.loads(told.stdout)["plan"]
    assert job.plan["micro_batch"] < MICRO_BATCH_TOKENS, "what rules would take: more than all rows have tokens"


def test_a_plan_that_fits_costs_no_import_of_torch(
    home: Path, run: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = []
    monkeypatch.setattr("cli.fitting.exact_facts", exact.append)
    monkeypatch.setattr("cli.serving.work_off", lambda database, settings, job, *_, **__: job)
    run("run", write_rows(Path("d.jsonl"), {"prompt": "a"}), "--model", model, *GENERATE, "-o", "out")
    assert only_job(home) is not None
    assert exact == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--model", "other"), "--model"),
        (("--task", "score", "--prompt", "x"), "--task, --prompt"),
        (("--name", "n"), "--name"),
        (("--max-new-tokens", "5", "--stop", "x"), "--max-new-tokens, --stop"),
        (("--priority", "0"), "--priority"),  # its default, but given
        (("--keep-going",), "--keep-going"),
        (("--choices", "a,b", "--seed", "0"), "--choices, --seed"),
    ],
)
def test_what_a_job_keeps_cannot_be_given_to_go_on_with_it(
    home: Path, run: Run, words: tuple[str, ...], named: str
) -> None:
    done = run("run", "--resume", "1", *words, "-o", "out")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {named} cannot be changed with --resume")
    assert run("run", "--resume", "1", "--device", "cpu", "-o", "out").exit_code == 3  # only the job is missing


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--device-memory", "1KiB", "does not fit"), ("--kv-format", "int4", "--exact and --kv-format int4")],
)
def test_a_resumed_job_whose_plan_does_not_do_for_it_stays_as_it_is(
    option: str, value: str, says: str, home: Path, run: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    with monkeypatch.context() as patched:
        patched.setattr("cli.serving.work_off", lambda database, settings, job, *_, **__: job)
        run("run", dataset, "--model", model, *GENERATE, "--exact", "-o", "out")
        done = run("run", "--resume", "1", "--device", "cpu", option, value, "-o", "out")
    assert (done.exit_code, says in done.stderr) == (2, True)
    job = only_job(home)
    assert job is not None
    assert job.state == "queued"


def test_the_dataset_is_refused_as_output_before_anything_starts(home: Path, run: Run, model: str) -> None:
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    done = run("run", dataset, "--model", model, *GENERATE, "-o", dataset)
    assert done.exit_code == 2
    assert only_job(home) is None


def test_ctrl_c_keeps_what_is_done_and_resume_finishes_it(
    home: Path, command: Command, start: Start, model: str
) -> None:
    dataset = write_rows(Path("d.jsonl"), *({"id": i, "prompt": "ab"} for i in range(300)))
    process = start("run", dataset, "--model", model, *GENERATE, *SLOW, "-o", "out.jsonl")
    with job_begun(home):
        log = Path(f"/proc/{worker_of(process.pid)}/fd/2").readlink()
        process.send_signal(signal.SIGINT)
        until("the worker to hear of it", lambda: "stopping after this pass" in log.read_text())
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stdout) == (130, "")
    assert "overnight run --resume 1 -o out.jsonl" in stderr
    assert "Traceback" not in stderr
    assert not Path("out.jsonl").exists()
    job = only_job(home)
    assert job is not None
    assert not job.is_finished
    done = command("run", "--resume", "1", *GENERATE[2:], "-o", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["id"] for line in Path("out.jsonl").read_text().splitlines()] == list(range(300))


MEASURING = """
import os, signal, sys, time
from storage.claims import Doing, heartbeat, register_worker, stop_worker
from storage.database import Database
from storage.jobs import fail_job
from worker.presence import host_name, process_of

database = Database.open(os.environ["OVERNIGHT_DATABASE"])

def stop(*_):
    if sys.argv[2] == "fails":
        fail_job(database, 1, "the disk is gone", now=time.time())
    stop_worker(database, number, now=time.time())
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
number = register_worker(database, hostname=host_name(), pid=os.getpid(), queue=sys.argv[1], device="cpu",
                         now=time.time(), lease_s=60.0, process=process_of(os.getpid()))
heartbeat(database, number, now=time.time(), lease_s=60.0, doing=Doing("measuring"))
time.sleep(60)
"""


@pytest.mark.parametrize("how", ["stops", "fails"])
def test_ctrl_c_while_the_machine_is_measured_ends_it_and_says_what_is_left(
    home: Path, run: Run, model: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(worker: OwnWorker, redis_url: str) -> list[str]:
        return [sys.executable, "-c", MEASURING, worker._queue, how]

    monkeypatch.setattr(OwnWorker, "_command", fake)
    told = threading.Event()

    class Told(LineProgress):
        def update(self, snapshot: Snapshot, now: float) -> None:
            super().update(snapshot, now)
            if snapshot.standstill == "measuring this machine, once":
                told.set()

    monkeypatch.setattr("cli.progress.LineProgress", Told)

    def interrupt() -> None:
        if told.wait(60):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    done = run("run", write_rows(Path("d.jsonl"), {"prompt": "a"}), "--model", model, *GENERATE, "-o", "out")
    thread.join()
    assert done.exit_code == 130
    assert "job 1 queued: 0% | 0/1 requests | measuring this machine, once\nstopping: " in done.stderr
    last = "job 1 failed: the disk is gone; when that is mended: overnight retry 1"
    if how == "stops":
        last = "job 1 keeps the outputs it has; go on with: overnight run --resume 1 -o out"
    assert done.stderr.split("\n")[-4:] == [last, "", "error: interrupted", ""]  # the empty one is click's


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made; its path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="o") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_redis_and_worker_end_with_their_owner_on_kill_9_and_the_next_run_sweeps(
    home: Path, run: Run, start: Start, model: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_rows(Path("d.jsonl"), *({"prompt": "ab"} for _ in range(300)))
    process = start("run", dataset, "--model", model, *GENERATE, *SLOW, "-o", "out.jsonl")
    with job_begun(home):
        family = children(process.pid)
        process.kill()
    assert len(family) == 2
    process.communicate(timeout=PATIENCE_S)
    until("the children to end", lambda: not any(map(is_running, family)))
    assert len(list(scratch.glob("overnight-*"))) == 2

    def no_server() -> NoReturn:
        raise RedisUnavailable("none here")

    monkeypatch.setattr("worker.private_redis.find_redis_server", no_server)
    assert run("run", "--resume", "1", *GENERATE[2:], "-o", "out.jsonl").exit_code == 4
    assert list(scratch.glob("overnight-*")) == []


def test_a_worker_that_is_killed_is_started_again(home: Path, start: Start, model: str) -> None:
    dataset = write_rows(Path("d.jsonl"), *({"prompt": "ab"} for _ in range(60)))
    process = start("run", dataset, "--model", model, *GENERATE, *SLOW, "-o", "out.jsonl", "--trace", "trace.json")
    until("a pass", lambda: Path("trace.json").exists() and '"pass 1"' in Path("trace.json").read_text())
    with job_begun(home):
        os.kill(worker_of(process.pid), signal.SIGKILL)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr
    assert "signal 9; it is started again" in stderr
    assert [json.loads(line)["status"] for line in Path("out.jsonl").read_text().splitlines()] == ["ok"] * 60
    assert len(json.loads(Path("trace.json").read_text())) > 20, "a whole array, as far as it has come"


def test_a_worker_that_only_dies_is_not_started_for_ever(settings: Settings) -> None:
    class Doomed(OwnWorker):
        def _command(self, redis_url: str) -> list[str]:
            return [sys.executable, "-c", "import os; print('error: no luck'); os.kill(os.getpid(), 9)"]

    with Doomed(settings, "run-x", PlanOptions()) as worker:
        for _ in range(11):
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
            assert "started again" in str(worker.check(ended=1))
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(WorkerDied, match="signal 9: no luck"):
            worker.check(ended=1)


def test_a_trace_tells_what_lanes_and_passes_did(home: Path, command: Command, model: str) -> None:
    dataset = write_rows(Path("d.jsonl"), *({"prompt": "ab" * i} for i in range(1, 6)))
    words = ("--max-new-tokens", "5", "--weights", "0/0/100", "-o", "out.jsonl", "--trace", "trace.json")
    done = command("run", dataset, "--model", model, *GENERATE, *words)
    assert done.returncode == 0, done.stderr
    assert "trace in trace.json" in done.stderr
    events = json.loads(Path("trace.json").read_text())
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    rows = {name: [event for event in events if threads[event["tid"]] == name] for name in threads.values()}
    passes = [event["args"] for event in rows["passes"] if event["name"].startswith("pass ")]
    with Database.open(f"sqlite:///{home / 'overnight.db'}") as database:
        recorded = [row.totals for row in list_passes(database)]
    assert len(passes) == sum(totals.num_passes for totals in recorded)
    for tokens in ("prefill_tokens", "decode_tokens"):
        assert sum(each[tokens] for each in passes) == sum(getattr(totals, tokens) for totals in recorded) > 0
    assert {event["name"] for event in rows["device_compute"]} >= {"layer.0", "layer.1", "head"}
    assert any(event.get("args", {}).get("bytes") for event in rows["disk_read"])


@pytest.mark.parametrize(("trace", "code"), [("d.jsonl", 2), ("out.jsonl", 2), (".", 2), ("no/trace.json", 3)], ids=str)
def test_a_trace_that_would_be_in_the_way_is_refused_before_anything_starts(
    home: Path, run: Run, model: str, trace: str, code: int
) -> None:
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    content = Path(dataset).read_text()
    done = run("run", dataset, "--model", model, *GENERATE, "-o", "out.jsonl", "--trace", trace)
    assert done.exit_code == code
    assert "--trace" in done.stderr
    assert only_job(home) is None
    assert Path(dataset).read_text() == content


def test_a_folder_named_like_our_package_is_not_taken_for_it(home: Path, command: Command, model: str) -> None:
    Path("cli").mkdir()
    Path("cli/__init__.py").write_text("raise SystemExit('the wrong package')")
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    done = command("run", dataset, "--model", model, *GENERATE, "--max-new-tokens", "1", "-o", "-")
    assert done.returncode == 0, done.stderr


def test_the_demo_ends_with_its_accuracy(
    home: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path("shipped")
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    labels = ["positive", "negative"] * 4
    rows = [{"id": i, "text": f"film {i}", "label": label} for i, label in enumerate(labels)]
    write_rows(folder / "sample.jsonl", *rows)
    monkeypatch.setattr("cli.demo.shipped_folder", folder.absolute)
    for words in (["demo"], ["demo", "--json"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
    people, _, machines = capfd.readouterr().out.partition("{")
    result = json.loads("{" + machines)
    assert result["rows"] == len(rows)
    assert result["accuracy"] == result["correct"] / len(rows)
    assert people.splitlines()[-1] == f"accuracy {result['accuracy']:.3f} ({result['correct']} of 8)"
    for word in ("tokens/s", "layers in memory", str(home / "overnight.db"), "overnight fetch 1"):
        assert word in people


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
