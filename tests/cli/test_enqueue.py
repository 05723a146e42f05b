import json
import sqlite3
from pathlib import Path

import pytest

from cli.job_options import GENERATION_DEFAULTS
from engine.request import SamplingParams
from storage.database import Database
from storage.jobs import list_jobs
from tests.cli.conftest import Command, Run, work, write_rows

GENERATE = ("--task", "generate")


def jobs_in(home: Path) -> int:
    """How many jobs there are, invisible ones included."""
    path = home / "overnight.db"
    if not path.exists():
        return 0
    with sqlite3.connect(path) as connection:
        (count,) = connection.execute("SELECT count(*) FROM jobs").fetchone()
    connection.close()
    return int(count)


def test_the_id_alone_is_on_stdout_and_the_hint_beside_it(with_redis: Path, run: Run, model: str) -> None:
    done = run("enqueue", write_rows(Path("d.jsonl"), {"prompt": "a"}, {"prompt": "b"}), "--model", model, *GENERATE)
    assert (done.exit_code, done.stdout) == (0, "1\n")
    assert "overnight status 1 --watch" in done.stderr


def test_json_says_id_and_requests(with_redis: Path, run: Run, model: str) -> None:
    done = run("enqueue", "-", "--model", model, *GENERATE, "--json", stdin=b'{"prompt": "a"}\n{"prompt": "b"}\n')
    assert json.loads(done.stdout) == {"id": 1, "requests": 2}


def test_everything_asked_for_is_stored(with_redis: Path, run: Run, model: str) -> None:
    dataset = write_rows(Path("d.jsonl"), {"id": "x", "prompt": "a"})
    sampling = ("--max-new-tokens", "9", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "3", "--seed", "11")
    more = ("--stop", "\n", "--stop", "END", "--priority", "-2", "--queue", "night")
    assert run("enqueue", dataset, "--model", model, *GENERATE, *sampling, *more).exit_code == 0
    with Database.open(f"sqlite:///{with_redis / 'overnight.db'}") as database:
        (job,) = list_jobs(database)
    assert job.params == {
        "max_new_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop": ["\n", "END"],
        "ignore_eos": False,
    }
    assert job.origin == {"dataset": str(Path("d.jsonl").resolve()), "prompt": "{{ prompt }}", "choices": None}
    assert (job.seed, job.priority, job.queue, job.task, job.model) == (11, -2, "night", "generate", model)


def test_the_defaults_are_the_engines_own() -> None:
    engine = SamplingParams()
    assert {name: getattr(engine, name) for name in GENERATION_DEFAULTS} == GENERATION_DEFAULTS


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (("--task", "score", "--temperature", "1"), "--temperature has no effect with --task score"),
        (("--task", "choose", "--choices", "a,b", "--seed", "1"), "--seed has no effect with --task choose"),
        ((*GENERATE, "--top-p", "0.5"), "--top-p has no effect while --temperature is 0"),
        ((*GENERATE, "--choices", "a,b"), "--choices has no effect with --task generate"),
    ],
)
def test_an_option_that_changes_nothing_is_a_warning(
    with_redis: Path, run: Run, model: str, words: tuple[str, ...], warning: str
) -> None:
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a", "continuation": "b"})
    done = run("enqueue", dataset, "--model", model, *words)
    assert done.exit_code == 0
    assert warning in done.stderr


@pytest.mark.parametrize(
    ("prompt", "task", "warned"),
    [
        ("{{ text }}: ", "choose", True),
        ("@p.txt", "choose", False),
        ("@two.txt", "choose", True),
        ("{{ text }}:", "choose", False),
        ("{{ text }}: ", "generate", False),
    ],
)
def test_white_space_before_choices_is_warned_of(
    with_redis: Path, run: Run, model: str, prompt: str, task: str, warned: bool
) -> None:
    Path("p.txt").write_text("{{ text }}:\n")
    Path("two.txt").write_text("{{ text }}:\n\n")
    choices = ("--choices", "a,b") if task == "choose" else ()
    dataset = write_rows(Path("d.jsonl"), {"text": "x"})
    done = run("enqueue", dataset, "--model", model, "--task", task, "--prompt", prompt, *choices)
    assert done.exit_code == 0
    assert ("warning: the prompt ends in white space" in done.stderr) is warned


BAD_NUMBERS = [
    ("--max-new-tokens", "0"), ("--max-new-tokens", "-1"), ("--max-new-tokens", "1.5"), ("--temperature", "-0.1"),
    ("--temperature", "nan"), ("--temperature", "inf"), ("--top-p", "0"), ("--top-p", "1.1"), ("--top-p", "nan"),
    ("--top-k", "-1"), ("--seed", "-1"), ("--seed", "x"), ("--priority", "1e3"), ("--stop", ""), ("--choices", "one"),
    ("--choices", "a,,b"), ("--queue", "no spaces"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), BAD_NUMBERS)
def test_a_value_that_makes_no_sense_is_refused_by_name(
    with_redis: Path, run: Run, model: str, option: str, value: str
) -> None:
    done = run("enqueue", write_rows(Path("d.jsonl"), {"prompt": "a"}), "--model", model, *GENERATE, option, value)
    assert done.exit_code == 2
    assert option in done.stderr
    assert jobs_in(with_redis) == 0


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 3, ["d.jsonl", "no file"]),
        (b"", 2, ["d.jsonl", "empty"]),
        (b'{"prompt": "a"}\n[1]\n', 2, ["d.jsonl", "line 2", "array"]),
        ('{"prompt": "a"}\n'.encode("utf-16"), 2, ["d.jsonl", "UTF-16", "iconv"]),
        (b'{"prompt": "a"}\n{"prompt": "\\ud800"}\n', 2, ["line 2", "surrogate"]),
        (b'{"text": "a"}\n', 2, ["row 0", "line 1", "'prompt'", "text"]),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', 2, ["line 2", "UTF-8"]),
    ],
)
def test_a_dataset_at_fault_leaves_no_job(
    with_redis: Path, run: Run, model: str, content: bytes | None, code: int, words: list[str]
) -> None:
    if content is not None:
        Path("d.jsonl").write_bytes(content)
    done = run("enqueue", "d.jsonl", "--model", model, *GENERATE)
    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert [word for word in words if word not in done.stderr] == []
    assert jobs_in(with_redis) == 0


def test_an_error_far_down_leaves_no_job_and_no_row(with_redis: Path, run: Run, model: str) -> None:
    lines = ['{"prompt": "a"}'] * 5000
    lines[4321] = "{"
    Path("d.jsonl").write_text("\n".join(lines))
    done = run("enqueue", "d.jsonl", "--model", model, *GENERATE)
    assert done.exit_code == 2
    assert "line 4322" in done.stderr
    assert jobs_in(with_redis) == 0


def test_faults_of_content_and_with_keep_going_of_lines_are_error_rows(with_redis: Path, run: Run, model: str) -> None:
    Path("d.jsonl").write_text(
        '{"id": "a", "prompt": "p"}\n{"id": "b", "text": "q"}\nbroken\n{"id": "d", "prompt": "r"}\n'
    )
    assert run("enqueue", "d.jsonl", "--model", model, *GENERATE, "--keep-going").exit_code == 0
    work(with_redis, 1)
    rows = [json.loads(line) for line in run("fetch", "1").stdout.splitlines()]
    assert [(row["id"], row["status"], (row["error"] or {}).get("code")) for row in rows] == [
        ("a", "ok", None),
        ("b", "error", "missing_field"),
        (None, "error", "bad_line"),
        ("d", "ok", None),
    ]
    assert "row 1 (line 2)" in rows[1]["error"]["message"]
    assert "'prompt'" in rows[1]["error"]["message"]


def test_choose_without_choices_anywhere_is_refused(with_redis: Path, run: Run, model: str) -> None:
    done = run("enqueue", write_rows(Path("d.jsonl"), {"prompt": "a"}), "--model", model, "--task", "choose")
    assert done.exit_code == 2
    assert "--choices" in done.stderr
    assert jobs_in(with_redis) == 0


def test_an_unknown_model_names_those_that_are_known(with_redis: Path, run: Run) -> None:
    done = run("enqueue", write_rows(Path("d.jsonl"), {"prompt": "a"}), "--model", "nope", *GENERATE)
    assert done.exit_code == 3
    assert "nope" in done.stderr
    assert "none yet" in done.stderr


def test_a_half_written_model_is_absent_before_anything_is_stored(with_redis: Path, run: Run, model: str) -> None:
    assert run("import", model, "half").exit_code == 0
    (with_redis / "models" / "half" / "layer.1.bin").unlink()
    done = run("enqueue", write_rows(Path("d.jsonl"), {"prompt": "a"}), "--model", "half", *GENERATE)
    assert done.exit_code == 3
    assert "layer.1.bin is missing; import the model again" in done.stderr
    assert jobs_in(with_redis) == 0


@pytest.mark.parametrize("template", ["{{ broken", "{{ text | nofilter }}"])
def test_a_template_that_cannot_be_compiled_is_refused(with_redis: Path, run: Run, model: str, template: str) -> None:
    done = run("enqueue", write_rows(Path("d.jsonl"), {"text": "a"}), "--model", model, *GENERATE, "--prompt", template)
    assert done.exit_code == 2
    assert "template" in done.stderr
    assert jobs_in(with_redis) == 0


def test_a_template_file_is_used(with_redis: Path, run: Run, model: str) -> None:
    Path("p.txt").write_text("Say {{ text }}:")
    dataset = write_rows(Path("d.jsonl"), {"text": "a"})
    assert run("enqueue", dataset, "--model", model, *GENERATE, "--prompt", "@p.txt").exit_code == 0
    with sqlite3.connect(with_redis / "overnight.db") as connection:
        assert connection.execute("SELECT payload FROM requests").fetchall() == [('{"prompt":"Say a:"}',)]
    connection.close()
    assert run("enqueue", dataset, "--model", model, *GENERATE, "--prompt", "@gone.txt").exit_code == 3


def test_redis_off_means_no_job(home: Path, run: Run, model: str) -> None:
    done = run("enqueue", write_rows(Path("d.jsonl"), {"prompt": "a"}), "--model", model, *GENERATE)
    assert done.exit_code == 4
    assert "Redis" in done.stderr
    command = "redis-server --daemonize yes --bind 127.0.0.1 --save ''"
    assert done.stderr.endswith(f"to start one here: {command} --port 1\n")
    assert f"start one: {command} --port 1" in run("doctor").stdout
    assert not home.exists()


def test_a_newer_schema_is_unreachable(with_redis: Path, run: Run, model: str) -> None:
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    assert run("enqueue", dataset, "--model", model, *GENERATE).exit_code == 0
    connection = sqlite3.connect(with_redis / "overnight.db")
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    done = run("enqueue", dataset, "--model", model, *GENERATE)
    assert done.exit_code == 4
    assert "9999" in done.stderr
    assert run("status").exit_code == 4


def test_the_database_may_be_named_before_and_after_the_command(with_redis: Path, run: Run, model: str) -> None:
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    assert run("--database", "one.db", "enqueue", dataset, "--model", model, *GENERATE).exit_code == 0
    assert run("enqueue", dataset, "--model", model, *GENERATE, "--database", "two.db").exit_code == 0
    assert Path("one.db").exists()
    assert Path("two.db").exists()
    assert not (with_redis / "overnight.db").exists()


def test_a_csv_dataset_gives_its_columns_to_the_template(with_redis: Path, run: Run, model: str) -> None:
    Path("d.csv").write_text("id,text\n1,hello\n")
    done = run("enqueue", "d.csv", "--model", model, *GENERATE, "--prompt", "{{ text }}", "--json")
    assert json.loads(done.stdout)["requests"] == 1


def test_no_traceback_and_no_heavy_module_in_a_real_process(with_redis: Path, command: Command, model: str) -> None:
    write_rows(Path("d.jsonl"), {"prompt": "a"})
    words = [*["enqueue", "d.jsonl", "--task", "generate", "--model"], model]
    environ = {"PYTHONPROFILEIMPORTTIME": "1"}
    done = command(*words, environ=environ)
    assert done.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "storage.loading" in imported
    assert imported & {"torch", "transformers", "numpy", "celery", "tokenizers", "rich", "alembic", "pydantic"} == set()


@pytest.mark.parametrize("prompt", ["", "prompt.txt", "no field"])
def test_a_prompt_that_is_the_same_for_all_rows_is_a_warning(
    with_redis: Path, run: Run, model: str, prompt: str
) -> None:
    Path("prompt.txt").write_text("Review: {{ text }}")
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    done = run("enqueue", dataset, "--model", model, *GENERATE, "--prompt", prompt)
    assert done.exit_code == 0
    assert "names no field" in done.stderr
    assert ("--prompt @prompt.txt" in done.stderr) == (prompt == "prompt.txt")


def test_a_job_that_is_to_be_exact_is_stored_so(with_redis: Path, run: Run, model: str) -> None:
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    for more in ((), ("--exact",)):
        assert run("enqueue", dataset, "--model", model, *GENERATE, *more).exit_code == 0
    documents = json.loads(run("status", "--json").stdout)["jobs"]
    assert [(job["id"], job["exact"], job["formats"]) for job in documents] == [(2, True, None), (1, False, None)]
    assert "only workers that round nothing to four bits take it" in run("status", "2").stdout


def test_a_model_in_four_bits_is_never_exact(with_redis: Path, run: Run, model: str) -> None:
    assert run("import", model, "four", "--weight-format", "int4").exit_code == 0
    dataset = write_rows(Path("d.jsonl"), {"prompt": "a"})
    refused = run("enqueue", dataset, "--model", "four", *GENERATE, "--exact")
    assert refused.exit_code == 2
    assert "has its weights in int4, so no worker could run the job" in refused.stderr
    assert jobs_in(with_redis) == 0
    assert run("enqueue", dataset, "--model", "four", *GENERATE).exit_code == 0
