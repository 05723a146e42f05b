import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import cli
from cli.main import COMMANDS, main
from tests.cli.conftest import ROOT, Command, Run
from worker.settings import KEYS

FROZEN = {
    "import": "--dtype --weight-format --quantize-embeddings",
    "models": "--json",
    "plan": "--model --hardware --task --choices --prompt-len --gen-len --requests --dataset --prompt --disk-speed "
    "--weight-format --sweep --no-advice --json PLACEMENT",
    "worker": "--model --queue PLACEMENT",
    "enqueue": "JOB-OPTIONS --queue --json",
    "status": "--watch --json",
    "wait": "",
    "fetch": "--output --format --errors",
    "cancel": "",
    "retry": "",
    "prune": "--older-than --dry-run --compact --json",
    "run": "--output --format --resume --trace JOB-OPTIONS PLACEMENT",
    "demo": "--json",
    "doctor": "--measure --device --json",
    "completion": "",
}
"""Every command's options; all but `completion` also take --database and --redis."""
PLACEMENT = (
    "--device --dtype --device-memory --host-memory --disk-space --disk-dir --weights --kv --activations --micro-batch "
    "--micro-batches --schedule --host-attention --kv-format"
)
JOB = (
    "--model --task --prompt --choices --max-new-tokens --temperature --top-p --top-k --seed --stop --name --priority "
    "--keep-going --exact"
)


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        yield name, command


def options_of(command: click.Command) -> list[str]:
    return [max(p.opts, key=len) for p in command.params if isinstance(p, click.Option)]


def test_commands_and_options_change_only_on_purpose() -> None:
    for name, command in commands():
        expected = FROZEN[name].replace("PLACEMENT", PLACEMENT).replace("JOB-OPTIONS", JOB).split()
        expected += [] if name == "completion" else ["--database", "--redis"]
        assert sorted(options_of(command)) == sorted(expected), name


def test_every_command_and_option_has_help() -> None:
    for name, command in commands():
        assert command.help, name
        assert command.short_help, name
        assert len(command.short_help) < 60, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help or parameter.name == "file_format", (name, parameter.name)


def test_every_command_option_and_setting_is_in_the_guide() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    for name, command in commands():
        assert f"`overnight {name}" in guide, name
        for option in options_of(command):
            assert f"`{option}" in guide, (name, option)
    for key in ("home", *KEYS):
        assert f"`OVERNIGHT_{key.upper()}`" in guide, key


def test_the_version_is_told(run: Run) -> None:
    assert run("--version").stdout == f"overnight {cli.__version__}\n"


def test_without_a_command_the_commands_are_shown(run: Run) -> None:
    done = run()
    assert done.exit_code == 0
    assert [name for name in COMMANDS if name not in done.stdout] == []


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["statsu"], "did you mean 'status'"),
        (["xyzzy"], "the commands are"),
        (["status", "--jsno"], "--json"),
        (["enqueue"], "DATASET"),
        (["enqueue", "d"], "--model"),
        (["run", "d", "-o", "x"], "--model"),
        (["run", "-o", "x"], "--resume"),
        (["run", "d", "--resume", "1", "-o", "x"], "--resume"),
    ],
)
def test_a_wrong_word_is_usage_with_a_hint(home: Path, run: Run, words: list[str], hint: str) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert hint in done.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--weights", "50/50/50"),
        ("--weights", "20/80"),
        ("--kv", "a/b/c"),
        ("--device-memory", "4Gib8"),
        ("--device-memory", "0"),
        ("--host-memory", "-1"),
        ("--device", "tpu"),
        ("--dtype", "int4"),
        ("--activations", "cloud"),
        ("--micro-batch", "0"),
        ("--micro-batches", "-3"),
        ("--schedule", "static"),
    ],
)
def test_a_placement_that_makes_no_sense_is_refused_by_name(home: Path, run: Run, option: str, value: str) -> None:
    for words in (["worker"], ["run", "d.jsonl", "--model", "m", "--task", "generate", "-o", "x"]):
        done = run(*words, option, value)
        assert done.exit_code == 2
        assert option in done.stderr


@pytest.mark.parametrize(
    ("environ", "name"),
    [({"OVERNIGHT_REDIS": "nonsense"}, "OVERNIGHT_REDIS"), ({"OVERNIGHT_QUEUE": "a b"}, "OVERNIGHT_QUEUE")],
)
def test_a_setting_that_makes_no_sense_is_named_without_a_traceback(
    home: Path, command: Command, environ: dict[str, str], name: str
) -> None:
    done = command("status", environ=environ)
    assert done.returncode == 2
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_a_home_that_cannot_be_made_is_one_sentence(home: Path, command: Command, checkpoint: Path) -> None:
    done = command("import", str(checkpoint), environ={"OVERNIGHT_HOME": "/sys/overnight"})  # not even for root
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "/sys/overnight" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_that_is_too_long_is_one_sentence(home: Path, run: Run) -> None:
    done = run("enqueue", "x" * 5000, "--model", "m", "--task", "generate")
    assert done.exit_code == 2
    assert "too long" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["enqueue", "", "--model", "m", "--task", "generate"],
        ["run", "", "--model", "m", "--task", "generate", "-o", "x"],
        ["run", "d", "--model", "m", "--task", "generate", "-o", ""],
        ["fetch", "1", "-o", ""],
        ["import", ""],
        ["import", "d", ""],
        ["plan", "--model", "opt-1.3b", "--hardware", ""],
        ["plan", "--model", "opt-1.3b", "--hardware", "l4", "--dataset", ""],
    ],
)
def test_an_empty_name_is_not_taken_for_the_folder_that_one_is_in(home: Path, run: Run, words: list[str]) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert "'' names nothing" in done.stderr


def test_a_files_name_keeps_its_capital(home: Path, run: Run) -> None:
    Path("README.md").write_text("x")
    assert run("import", "README.md").stderr.startswith("error: README.md is a file")


@pytest.mark.parametrize("option", ["--device-memory", "--host-memory", "--disk-space"])
def test_a_size_beyond_all_machines_is_refused(home: Path, run: Run, option: str) -> None:
    done = run("plan", "--model", "opt-1.3b", "--hardware", "l4", option, "9" * 30)
    assert done.exit_code == 2
    assert f"{option}'" in done.stderr
    assert "more than any machine has" in done.stderr


@pytest.mark.parametrize("option", ["--seed", "--micro-batch", "--max-new-tokens"])
def test_a_number_beyond_all_numbers_is_refused_and_the_limit_named(home: Path, run: Run, option: str) -> None:
    done = run("run", "d.jsonl", "--model", "m", "--task", "generate", "-o", "x", option, "1" + 400 * "0")
    assert done.exit_code == 2
    limit = 2**63 - 1 if option == "--seed" else 2**31 - 1
    assert f"at most {limit};" in done.stderr


def test_a_stdout_without_room_is_named(home: Path, command: Command) -> None:
    with Path("/dev/full").open("w") as full:
        done = command("models", "--json", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: stdout cannot be used: No space left")


def test_a_closed_stdout_is_no_fault(home: Path) -> None:
    script = f"{shlex.quote(sys.executable)} -P -m cli models --json >&-"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", script], env=environ, stderr=subprocess.PIPE, text=True, check=False, timeout=240
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_accepted_by_its_shell(run: Run, shell: str) -> None:
    done = run("completion", shell)
    assert done.exit_code == 0
    assert "_OVERNIGHT_COMPLETE" in done.stdout
    if program := shutil.which(shell):
        assert subprocess.run([program, "-n"], input=done.stdout, text=True, timeout=240).returncode == 0


def test_commands_are_completed(home: Path, command: Command) -> None:
    environ = {"_OVERNIGHT_COMPLETE": "bash_complete", "COMP_WORDS": "overnight sta", "COMP_CWORD": "1"}
    assert "status" in command(environ=environ).stdout
