"""``python -m benchmarks.claims``: run every claim that is for this machine, and say which lines are met.

Exit code 1 where a line is missed that is not recorded as missed, or a command fails.
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
from pathlib import Path
from typing import Any

from benchmarks.caps import CapUnavailable, cap
from benchmarks.claims import results as kept
from benchmarks.claims.claim import Claim, Machine, Need
from benchmarks.claims.listed import CLAIMS
from benchmarks.machine import describe_machine
from engine.units import GIB

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("only", nargs="*", metavar="NAME", help="claims to run, * allowed (default: all)")
    parser.add_argument("--list", action="store_true", help="run nothing: say what there is")
    asked = parser.parse_args(arguments)
    chosen = [claim for claim in CLAIMS if not asked.only or any(fnmatch.fnmatch(claim.name, n) for n in asked.only)]
    if not chosen:
        parser.error(f"no claim is called {' or '.join(asked.only)}; see --list")
    about = describe_machine(ROOT)
    machine = kind_of(about)
    runnable = {claim.name: why_not(claim, machine) for claim in chosen}
    if asked.list:
        for claim in chosen:
            print(f"{claim.name:28} {runnable[claim.name] or claim.line_for(machine)!s:32} {claim.sentence}")
        return 0
    documents: dict[tuple[str, ...], Mapping[str, Any] | str] = {}
    stored = kept.read()
    here = stored.setdefault(title_of(about, machine), kept.MachineResults(machine, {}))
    is_good = True
    for claim in chosen:
        if (reason := runnable[claim.name]) is not None:
            print(f"{claim.name:28} not for this machine: {reason}", flush=True)
            continue
        load = os.getloadavg()[0]
        if claim.command not in documents:
            documents[claim.command] = run(claim.command)
        value, why = figure_of(claim, documents[claim.command])
        here.results[claim.name] = kept.Result(value, datetime.date.today().isoformat(), commit(), round(load, 2))
        line = claim.line_for(machine)
        is_met = value is not None and line is not None and line.is_met(value)
        is_good &= is_met or (value is not None and machine in claim.missed)
        shown = why if value is None else f"{value:.4g} ({line}): {claim.sentence}"
        print(f"{claim.name:28} {'met' if is_met else 'MISSED'}  {shown}", flush=True)
        kept.write(stored, CLAIMS)  # at once: the next one may take an hour
    return 0 if is_good else 1


def kind_of(about: Mapping[str, object]) -> Machine:
    """Which lines hold for a machine."""
    if about["gpu"]:
        return Machine.CUDA
    units = about["matrix_units"]
    return Machine.AMX if isinstance(units, list) and "amx_bf16" in units else Machine.CPU


def title_of(about: Mapping[str, object], machine: Machine) -> str:
    """A machine in a line."""
    gpu = about["gpu"] or "no GPU"
    memory = about["memory_bytes"]
    assert isinstance(memory, int)
    units = {Machine.AMX: " with AMX", Machine.CPU: " without AMX"}.get(machine, "")
    return f"{about['cores']} cores of {about['cpu']}{units}, {memory / GIB:.0f} GiB, {gpu}"


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
    return None


def run(command: tuple[str, ...]) -> Mapping[str, Any] | str:
    """The JSON document of a command, or why there is none. Its progress goes to standard error."""
    print(f"  python -m {' '.join(command)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="overnight-claims-") as home:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "OVERNIGHT_HOME": home},
        )
    try:
        # Exit code 1 says that a line of the command's own is missed: what it measured is there all the same.
        document = json.loads(done.stdout)
    except ValueError:
        return f"python -m {' '.join(command)} ended with {done.returncode} and no report"
    return document if isinstance(document, dict) else f"python -m {' '.join(command)} reported no object"


def figure_of(claim: Claim, document: Mapping[str, Any] | str) -> tuple[float | None, str]:
    """The figure, or None and why there is none."""
    if isinstance(document, str):
        return None, document
    try:
        return claim.read(document), ""
    except KeyError as error:
        return None, f"the report has no figure {error}"


def commit() -> str:
    """The commit that is measured, with a ``+`` where files were changed since."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
