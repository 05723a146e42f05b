"""What once ended in a traceback, or in no end at all, is one sentence and an exit code."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, Command, Run, work

ENQUEUE = ("enqueue", "d.jsonl", "--task", "generate", "--model", "MODEL")
PROMPT = (*ENQUEUE, "--prompt")
CASES: list[tuple[str, tuple[str, ...], int, str]] = [
    ("model of nobody", ("enqueue", "d.jsonl", "--task", "generate", "--model", "~nosuch/x"), 3, "user that does not"),
    ("import to nobody", ("import", "MODEL", "~nosuch/x"), 3, "user that does not exist"),
    ("import from nobody", ("import", "~nosuch/x"), 3, "user that does not exist"),
    ("database of nobody", ("--database", "~nosuch/q.db", "status"), 2, "user that does not exist"),
    ("database url of nobody", ("--database", "sqlite:///~nosuch/q.db", *ENQUEUE), 4, "cannot be used"),
    ("database option", ("--database", "sqlite:////tmp/overnight-q.db?timeout=x", *ENQUEUE), 4, "timeout=***"),
    ("database password", ("--database", "sqlite://:hunter2@h/q.db?password=hunter2", *ENQUEUE), 4, "cannot be used"),
    ("redis address", ("--redis", "redis://:hunter2@[::1", *ENQUEUE), 2, "--redis must be a Redis URL"),
    ("redis address, worker", ("--redis", "redis://[::1", "worker"), 2, "--redis must be a Redis URL"),
    ("redis option", ("--redis", "redis://h/0?nosuch=1&password=hunter2", *ENQUEUE), 4, "not a Redis URL that can be"),
    ("redis option, worker", ("--redis", "redis://h/0?nosuch=1", "worker"), 4, "not a Redis URL that can be used"),
    ("redis name", ("--redis", f"redis://:hunter2@{'x' * 300}", *ENQUEUE), 4, "not a Redis URL that can be used"),
    ("redis name, worker", ("--redis", f"redis://{'x' * 300}", "worker"), 4, "not a Redis URL that can be used"),
    ("truncate", (*PROMPT, "{{ prompt|truncate(-1) }}"), 2, "the template fails: expected length"),
    ("power", (*PROMPT, "{{ 10**5000 }}"), 2, "4,300 digits"),
    ("product", (*PROMPT, "{{ 'x' * 1100000000 }}"), 2, "more than 1,048,576 parts"),
    ("parentheses", (*PROMPT, "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"), 2, "nested too deep"),
    ("lists", (*PROMPT, "{{ " + "[" * 200 + "]" * 200 + " }}"), 2, "nested too deep"),
    ("ifs", (*PROMPT, "{% if 1 %}" * 300 + "{% endif %}" * 300), 2, "nested too deep"),
    (
        "loops",
        (*PROMPT, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        2,
        "too long",
    ),
    ("template device", (*PROMPT, "@/dev/zero"), 2, "not a regular file"),
    ("template pipe", (*PROMPT, "@pipe"), 2, "not a regular file"),
    ("dataset device", ("enqueue", "/dev/zero", "--task", "generate", "--model", "MODEL"), 2, "is a device"),
    ("dataset pipe", ("enqueue", "pipe", "--task", "generate", "--model", "MODEL"), 2, "nobody wrote to"),
    (
        "deep id",
        ("enqueue", "deep.jsonl", "--task", "generate", "--model", "MODEL"),
        2,
        "line 2: it is nested too deep",
    ),
    ("infinity", ("enqueue", "inf.jsonl", "--task", "generate", "--model", "MODEL"), 2, "line 1: it is not JSON"),
]


@pytest.mark.parametrize(("words", "code", "sentence"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_mistake_is_one_sentence_and_an_exit_code(
    with_redis: Path,
    run: Run,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    code: int,
    sentence: str,
) -> None:
    monkeypatch.setattr("cli.datasets.PATIENCE_S", 0.05)
    if "range" in words[-1]:
        monkeypatch.setenv("OVERNIGHT_RENDER_S", "0.2")
    os.mkfifo("pipe")
    good = '{"prompt": "a"}\n'
    Path("d.jsonl").write_text(good)
    Path("deep.jsonl").write_text(good + '{"prompt": "a", "id": ' + "[" * 960 + "]" * 960 + "}\n")
    Path("inf.jsonl").write_text('{"prompt": "a", "id": 1e400}\n')
    done = run(*(model if word == "MODEL" else word for word in words))
    assert done.exit_code == code, done.output
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr
    assert isinstance(done.exception, SystemExit)  # a traceback would be another one


def test_a_real_process_shows_no_traceback_either(with_redis: Path, command: Command, model: str) -> None:
    Path("d.jsonl").write_text('{"prompt": "a"}\n')
    prompt = "{{ " + "[" * 200 + "]" * 200 + " }}"
    done = command("enqueue", "d.jsonl", "--task", "generate", "--model", model, "--prompt", prompt)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_what_is_above_a_limit_never_stops_a_job_and_never_enters_it(with_redis: Path, run: Run, model: str) -> None:
    deep: object = "x"
    for _ in range(40):
        deep = [deep]
    rows = [{"prompt": "p", "id": deep}, {"prompt": "p", "id": 2}, {"prompt": "p" * (1 << 20), "id": 3}]
    lines = [*map(json.dumps, rows), '{"prompt": "p", "id": ' + "[" * 960 + "]" * 960 + "}", '{"id": NaN}']
    Path("d.jsonl").write_text("\n".join(lines))
    done = run("enqueue", "d.jsonl", "--task", "generate", "--model", model, "--keep-going")
    assert done.exit_code == 0, done.stderr
    work(with_redis, 1)
    found = [json.loads(line) for line in run("fetch", "1").stdout.splitlines()]
    assert [(row["id"], (row["error"] or {}).get("code")) for row in found] == [
        (None, "bad_id"),
        (2, None),
        (None, "bad_line"),
        (None, "bad_line"),
        (None, "bad_line"),
    ]
    assert "row 0 (line 1)" in found[0]["error"]["message"]
    with sqlite3.connect(with_redis / "overnight.db") as connection:
        stored = connection.execute("SELECT row_id, payload FROM requests").fetchall()
    connection.close()
    assert [row for row in stored if row != (None, None)] == [("2", '{"prompt":"p"}')]


_WITHIN_A_GIB = """
import resource, sys
from pathlib import Path
from cli.main import main
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    main(sys.argv[1:])
finally:
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    print(peak, file=sys.stderr)
"""


def test_rows_of_60_mb_take_little_memory(with_redis: Path, model: str) -> None:
    with Path("d.jsonl").open("wb") as stream:
        for index in range(4):
            stream.write(b'{"prompt": "' + (b"x" * 60_000_000 if index % 2 else b"short") + b'"}\n')
    words = ("enqueue", "d.jsonl", "--task", "generate", "--model", model, "--keep-going", "--json")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _WITHIN_A_GIB, *words], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"id": 1, "requests": 4}
    assert int(done.stderr.split()[-2]) < 300 * 1024  # KiB
