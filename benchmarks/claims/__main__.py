"""``python -m benchmarks.claims``: run every claim that is for this machine, and say which lines are met.

Exit code 1 where a line is missed that is not recorded as missed, a command fails, or nothing of what was asked for can
be run here.
"""

import argparse
import datetime
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import smollm2
from benchmarks.caps import CapUnavailable, cap
from benchmarks.claims import results as kept
from benchmarks.claims.claim import Claim, Machine, Need
from benchmarks.claims.listed import CLAIMS
from benchmarks.machine import describe_machine
from engine.units import GIB

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 4 * 3600
"""For one command."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that was run, and under which circumstances: as they were when it began."""

    document: Mapping[str, Any] | str
    """Its report, or why there is none."""
    date: str
    commit: str
    load: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument(
        "only",
        nargs="*",
        metavar="NAME",
        help="claims to run, * allowed, and with each those of the same command (default: all)",
    )
    parser.add_argument("--list", action="store_true", help="run nothing: say what there is")
    parser.add_argument("--page", action="store_true", help="run nothing: write RESULTS.md anew from what is kept")
    asked = parser.parse_args(arguments)
    for pattern in asked.only:
        if not any(fnmatch.fnmatch(claim.name, pattern) for claim in CLAIMS):
            parser.error(f"no claim is called {pattern}; see --list")
    if asked.page:
        kept.show(CLAIMS)
        return 0
    named = [claim for claim in CLAIMS if not asked.only or any(fnmatch.fnmatch(claim.name, n) for n in asked.only)]
    # A command that runs for one claim tells the figures of all that are its.
    commands = {claim.command for claim in named}
    chosen = named if asked.list else [claim for claim in CLAIMS if claim.command in commands]
    about = describe_machine(ROOT)
    machine = kind_of(about)
    reasons = {claim.name: why_not(claim, machine) for claim in chosen}
    if asked.list:
        for claim in chosen:
            print(f"{claim.name:28} {reasons[claim.name] or claim.line_for(machine)!s:12} {claim.sentence}")
        return 0
    ran: dict[tuple[str, ...], Ran] = {}
    is_good = any(reason is None for reason in reasons.values())
    for claim in chosen:
        if (reason := reasons[claim.name]) is not None:
            print(f"{claim.name:28} not for this machine: {reason}", flush=True)
            continue
        if claim.command not in ran:
            ran[claim.command] = run(claim.command)
        is_good &= judge(claim, machine, title_of(about, machine), packages_of(about), ran[claim.command])
    return 0 if is_good else 1


def judge(claim: Claim, machine: Machine, title: str, packages: str, ran: Ran) -> bool:
    """Keep and print one figure; whether it is as it should be, or as bad as is known."""
    line = claim.line_for(machine)
    assert line is not None
    value, why = figure_of(claim, ran.document)
    # At once: the next one may take an hour.
    kept.add(title, machine, claim.name, kept.Result(value, ran.date, ran.commit, ran.load, packages))
    kept.show(CLAIMS)
    known = claim.missed.get(machine)
    if value is None:
        print(f"{claim.name:28} FAILED  {why}", flush=True)
        return False
    shown = f"{value:.4g} ({line}) {claim.sentence}"
    if line.is_met(value):
        print(f"{claim.name:28} met     {shown}" + ("; it is recorded as missed" if known else ""), flush=True)
        return True
    is_known = known is not None and known.yet.is_met(value)
    print(f"{claim.name:28} MISSED  {shown}" + (f"; known: {known.why}" if known and is_known else ""), flush=True)
    return is_known


def kind_of(about: Mapping[str, object]) -> Machine:
    """Which lines hold for a machine."""
    if about["gpu"]:
        return Machine.CUDA
    if about["compared_in"] == "float32":
        return Machine.FLOAT32
    units = about["matrix_units"]
    return Machine.AMX if isinstance(units, list) and "amx_bf16" in units else Machine.CPU


def title_of(about: Mapping[str, object], machine: Machine) -> str:
    """A machine in a line."""
    memory = about["memory_bytes"]
    assert isinstance(memory, int)
    units = {
        Machine.AMX: " with AMX",
        Machine.CPU: " without AMX",
        Machine.FLOAT32: " without products in bfloat16 (compared in float32)",
    }.get(machine, "")
    return f"{about['cores']} cores of {about['cpu']}{units}, {memory / GIB:.0f} GiB, {about['gpu'] or 'no GPU'}"


def packages_of(about: Mapping[str, object]) -> str:
    """Versions in a line."""
    packages = about["packages"]
    assert isinstance(packages, dict)
    return ", ".join([f"Python {about['python']}", *(f"{name} {version}" for name, version in packages.items())])


def why_not(claim: Claim, machine: Machine) -> str | None:
    """Why a claim cannot be run here; None: it can."""
    if claim.line_for(machine) is None:
        return f"it has no line for {machine}"
    if Need.MEMORY_CAP in claim.needs:
        try:
            with cap(GIB):
                pass
        except CapUnavailable as error:
            return f"it needs {Need.MEMORY_CAP}: {error}"
    if Need.SMOLLM2 in claim.needs and (missing := smollm2.why_not_here()) is not None:
        return f"it needs {Need.SMOLLM2}: {missing}"
    return None


def run(command: tuple[str, ...]) -> Ran:
    """Run a command. Its progress goes to standard error."""
    words = f"python -m {' '.join(command)}"
    print(f"  {words}", file=sys.stderr, flush=True)
    date, at, load = datetime.date.today().isoformat(), commit(ROOT), round(os.getloadavg()[0], 2)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OVERNIGHT_")}
    with tempfile.TemporaryDirectory(prefix="overnight-claims-") as home:
        try:
            done = subprocess.run(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
                timeout=TIMEOUT_S,
                env={**environ, "OVERNIGHT_HOME": home},
            )
        except subprocess.TimeoutExpired:
            return Ran(f"{words} took longer than {TIMEOUT_S} s", date, at, load)
    # Exit code 1 says that a line of the command's own is missed: what it measured is there all the same.
    if done.returncode not in (0, 1):
        return Ran(f"{words} ended with {done.returncode}", date, at, load)
    try:
        document = json.loads(done.stdout)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        return Ran(f"{words} ended with {done.returncode} and no report", date, at, load)
    return Ran(document, date, at, load)


def figure_of(claim: Claim, document: Mapping[str, Any] | str) -> tuple[float | None, str]:
    """The figure, or None and why there is none."""
    if isinstance(document, str):
        return None, document
    try:
        return claim.read(document), ""
    except ValueError as error:
        return None, str(error)


def commit(root: Path) -> str:
    """The commit of a tree, with a ``+`` where files differ from it, but for the results that this writes itself."""
    git = ["git", "-C", str(root)]
    done = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode:
        return "unknown"
    own = [f":(exclude,top)benchmarks/{path.name}" for path in (kept.STORED, kept.SHOWN)]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ":/", *own], capture_output=True, text=True, check=True
    )
    return done.stdout.strip() + ("+" if changed.stdout.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
