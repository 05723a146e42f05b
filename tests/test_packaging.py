"""What is shipped: the wheel, the pinned versions, the Makefile, the container files."""

import configparser
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import cli
from cli import exit_codes
from tests.namespaces import unshared

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("cli", "engine", "storage", "worker")
_PIN = re.compile(r"(?P<name>[a-z0-9]+(-[a-z0-9]+)*)==(?P<version>[0-9][A-Za-z0-9.]*)")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ROOT],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    matches = [_PIN.fullmatch(line) for line in lines]
    assert [line for line, match in zip(lines, matches, strict=True) if not match] == []  # exact, and no addresses
    return {match["name"]: Version(match["version"]) for match in matches if match}


# The wheel


def test_the_wheel_holds_every_module_of_the_rooms(wheel: zipfile.ZipFile) -> None:
    expected = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if name.split("/")[0] in ROOMS} == expected
    assert any(re.match(r"storage/migrations/versions/.+\.py", name) for name in expected)


def test_the_wheel_holds_the_demo(wheel: zipfile.ZipFile) -> None:
    shipped = {PurePosixPath(n).name for n in wheel.namelist() if n.startswith("examples/reviews/")}
    assert shipped >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", "sample.jsonl"}


def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {*ROOMS, "examples", f"overnight-{cli.__version__}.dist-info"}
    assert {n.split("/")[1] for n in wheel.namelist() if n.startswith("examples/")} == {"reviews"}
    assert [n for n in wheel.namelist() if "__pycache__" in n or "/tests/" in n or n.endswith(".db")] == []


def test_the_wheel_is_small_enough_to_download_without_thinking(wheel: zipfile.ZipFile) -> None:
    assert sum(info.compress_size for info in wheel.infolist()) < 12_000_000


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    folder = f"overnight-{cli.__version__}.dist-info"
    metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Version"] == cli.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert b"Apache License" in wheel.read(f"{folder}/licenses/LICENSE")
    assert b"overnight = cli.main:main" in wheel.read(f"{folder}/entry_points.txt")


# Versions


def test_the_versions_of_everything_that_make_venv_installs_are_pinned(pins: dict[str, Version]) -> None:
    wanted = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["dependency-groups"]["dev"], "pip"]
    wanted += PYPROJECT["project"]["optional-dependencies"]["postgres"]
    assert sorted(closure(wanted) - set(pins)) == []


def test_the_pinned_versions_are_within_the_declared_ranges(pins: dict[str, Version]) -> None:
    declared = [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]
    outside = {str(r): str(pins[r.name.lower()]) for r in declared if not r.specifier.contains(pins[r.name.lower()])}
    assert outside == {}


def test_the_oracle_is_not_a_dependency() -> None:
    assert "transformers" not in closure(PYPROJECT["project"]["dependencies"])


def closure(requirements: list[str]) -> set[str]:
    """The names of all packages that these requirements bring into this environment, as far as it has them."""
    found: set[str] = set()
    queue = [(Requirement(text), "") for text in requirements]
    while queue:
        requirement, extra = queue.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        # torch itself pins the CUDA libraries of its CUDA builds.
        if name.startswith(("nvidia-", "cuda-")) or name == "triton":
            continue
        known = name in found
        found.add(name)
        try:
            below = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        extras = requirement.extras if known else {"", *requirement.extras}
        queue += [(Requirement(text), extra) for text in below for extra in extras]
    return found


# Make


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**inherited, **environment},
    )


def test_make_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    listed = [line.split()[1] for line in make("help").stdout.splitlines()]
    assert sorted(listed) == sorted(phony[1].split())
    assert {"help", "venv", "demo", "test", "lint"} <= set(listed)


def test_make_without_a_target_explains_itself() -> None:
    assert make().stdout == make("help").stdout


def test_make_venv_without_a_usable_python_says_what_to_install(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # what a Python before 3.11, or a version manager's empty shim, answers
    old.chmod(0o755)
    ran = make("venv", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert ran.returncode != 0
    assert "Python 3.11 or later" in ran.stderr
    assert "make venv PYTHON=" in ran.stderr
    assert not (tmp_path / "venv").exists()


def test_continuous_integration_runs_what_a_contributor_runs() -> None:
    script = ROOT / ".ci" / "run"
    lines = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert os.access(script, os.X_OK)
    assert lines[0] == "set -euo pipefail"
    assert lines[-1] == "exec make test"


# Containers


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert isinstance(document, dict)
    return document


def test_compose_is_accepted_by_docker(tmp_path: Path) -> None:
    try:
        present = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=240).returncode == 0
    except FileNotFoundError:
        present = False
    if not present:
        pytest.skip("docker compose is not installed here")
    command = ["docker", "compose", "--profile", "postgres", "config", "--quiet"]
    without = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    with_password = {**os.environ, "REDIS_PASSWORD": "secret", "POSTGRES_PASSWORD": "secret"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=with_password)
    assert ran.returncode == 0, ran.stderr
    assert "REDIS_PASSWORD" in without.stderr


def test_no_port_is_published(compose: dict[str, Any]) -> None:
    assert [name for name, service in compose["services"].items() if "ports" in service] == []
    assert [name for name, service in compose["services"].items() if service.get("network_mode") == "host"] == []


def test_the_queue_is_on_a_network_of_its_own(compose: dict[str, Any]) -> None:
    assert compose["services"]["redis"]["networks"] == ["queue"]
    assert compose["services"]["postgres"]["networks"] == ["queue"]
    assert compose["networks"]["queue"]["internal"] is True


def test_redis_needs_a_password_and_keeps_what_it_was_given(compose: dict[str, Any]) -> None:
    redis = compose["services"]["redis"]
    options = dict(zip(redis["command"][1::2], redis["command"][2::2], strict=True))
    assert re.fullmatch(r"\$\{REDIS_PASSWORD:\?[^}]+\}", options["--requirepass"])  # no default: refuses to start
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert "redis:/data" in redis["volumes"]
    assert "PONG" in redis["healthcheck"]["test"][1]


def test_redis_is_a_version_without_known_holes(compose: dict[str, Any]) -> None:
    image, _, tag = compose["services"]["redis"]["image"].partition(":")
    assert (image, Version(tag) >= Version("8.6.3")) == ("redis", True)


def test_passwords_come_only_from_the_environment() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    values = re.findall(r"^\s+[A-Z_]*(?:PASSWORD|AUTH): (.+)$", text, re.MULTILINE)
    values += re.findall(r"://[^:\s]*:([^@\s]*(?:\{[^}]*\})?)@", text)
    assert len(values) >= 3
    assert [value for value in values if not value.startswith(("${", "$POSTGRES_PASSWORD"))] == []


def test_the_worker_has_a_device_a_database_and_time_to_stop(compose: dict[str, Any]) -> None:
    worker = compose["services"]["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == [["gpu"]] or device["capabilities"] == ["gpu"]
    targets = {volume.split(":")[1] for volume in worker["volumes"]}
    assert targets == {worker["environment"]["OVERNIGHT_HOME"], worker["environment"]["OVERNIGHT_HOME"] + "/models"}
    assert worker["depends_on"]["redis"]["condition"] == "service_healthy"
    assert worker["stop_grace_period"] == "3m"


def test_every_named_volume_is_declared_and_used(compose: dict[str, Any]) -> None:
    used = {volume.split(":")[0] for service in compose["services"].values() for volume in service["volumes"]}
    assert used == set(compose["volumes"])


def test_postgres_starts_only_when_asked_for(compose: dict[str, Any]) -> None:
    started = [name for name, service in compose["services"].items() if "profiles" not in service]
    assert sorted(started) == ["redis", "worker"]
    assert compose["services"]["worker"]["depends_on"]["postgres"]["required"] is False


def test_the_image_runs_as_nobody_in_particular() -> None:
    last_stage = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    user = re.search(r"^USER (\S+)$", last_stage, re.MULTILINE)
    assert user
    assert user[1] not in {"root", "0"}
    assert "OVERNIGHT_HOME=/var/lib/overnight" in last_stage


HEALTH = """
import json, os, subprocess, sys, time
from storage.claims import register_worker, stop_worker
from storage.database import Database
from worker.presence import host_name, process_of

check = json.loads(sys.argv[1])
codes = {}

def ask(name):
    codes[name] = subprocess.run([sys.executable, *check[1:]], stderr=subprocess.DEVNULL).returncode

def register(pid, lease_s, hostname=None):
    return register_worker(database, hostname=hostname or host_name(), pid=pid, queue="default", device="cpu",
                           now=time.time(), lease_s=lease_s, process=process_of(pid))

assert os.getpid() < 5 and "#" in host_name(), "not in a namespace of its own"
ask("no database")
with Database.open(os.environ["OVERNIGHT_DATABASE"]) as database:
    ask("nobody")
    register(os.getpid(), 60.0, "another-machine")
    ask("another machine")
    register(os.getpid(), -1.0)
    ask("expired")
    gone = subprocess.Popen(["sleep", "60"])
    register(gone.pid, 60.0)
    gone.kill(); gone.wait()
    ask("killed")
    number = register(os.getpid(), 60.0)
    ask("alive")
    stop_worker(database, number, now=time.time())
    ask("stopped")
print(json.dumps(codes))
"""


def test_a_container_is_healthy_while_its_worker_holds_a_lease(tmp_path: Path) -> None:
    """The image's own command, among process ids of their own, as in a container."""
    check = re.search(r"^HEALTHCHECK .*\\\n +CMD (\[.+\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert check
    assert json.loads(check[1])[0] == "python"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OVERNIGHT_DATABASE": str(tmp_path / "overnight.db")}
    prefix = unshared("--pid", "--fork", "--mount-proc")
    ran = subprocess.run(
        [*prefix, sys.executable, "-c", HEALTH, check[1]], capture_output=True, text=True, timeout=120, env=environ
    )
    assert ran.returncode == 0, ran.stderr
    codes = json.loads(ran.stdout)
    assert {name for name, code in codes.items() if code == 0} == {"alive"}
    assert set(codes.values()) == {0, 1}


def test_the_image_is_built_only_from_what_docker_may_see() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines  # everything else, with whatever secrets lie about, stays out
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {source for line in copied for source in line.split()} == allowed
    assert [source for source in allowed if not (ROOT / source).exists()] == []


# systemd


@pytest.fixture(scope="module")
def unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(ROOT / "examples" / "overnight-worker.service")
    return parser


def test_the_unit_restarts_a_worker_that_failed_and_gives_it_time_to_stop(unit: configparser.RawConfigParser) -> None:
    service = unit["Service"]
    assert (service["Restart"], service["RestartSec"]) == ("on-failure", "10")
    assert service["TimeoutStopSec"] == "3min"
    assert service["KillMode"] == "mixed"  # SIGTERM for the worker itself; it ends its children in order
    assert service["ExecStart"].endswith("/overnight worker")
    assert service["Environment"] == f"OVERNIGHT_HOME=/var/lib/{service['StateDirectory']}"
    assert service["StateDirectoryMode"] == "0700"
    assert service["User"] not in {"root", "0"}
    assert unit["Install"]["WantedBy"] == "multi-user.target"
    # A mistake that a restart does not mend; an interrupt that somebody meant.
    assert service["RestartPreventExitStatus"] == str(exit_codes.USAGE)
    assert service["SuccessExitStatus"] == str(exit_codes.INTERRUPTED)


def test_the_unit_keeps_no_gpu_away(unit: configparser.RawConfigParser) -> None:
    service = unit["Service"]
    # These hide the devices, ProtectClock by its own list of them; kernels are compiled into memory at run time.
    harmful = {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock", "MemoryDenyWriteExecute"}
    assert harmful & set(service) == set()
    assert {service[name] for name in ("NoNewPrivileges", "ProtectHome", "PrivateTmp")} == {"yes"}
    assert service["ProtectSystem"] == "strict"


def test_the_unit_is_accepted_by_systemd(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here")
    text = (ROOT / "examples" / "overnight-worker.service").read_text()
    here = tmp_path / "overnight-worker.service"
    here.write_text(text.replace("/opt/overnight/bin/overnight", shutil.which("true") or "/bin/true"))
    ran = subprocess.run(["systemd-analyze", "verify", str(here)], capture_output=True, text=True, timeout=60)
    complaints = [line for line in ran.stderr.splitlines() if "overnight-worker" in line]
    assert (ran.returncode, complaints) == (0, [])


# Documentation


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = re.findall(r"\]\((\d{4}-[a-z0-9-]+\.md)\)", (folder / "README.md").read_text())
    assert index == sorted(path.name for path in folder.glob("[0-9]*.md"))
