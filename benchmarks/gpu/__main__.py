"""``python -m benchmarks.gpu``: test and measure this machine's GPU, step after step, and write docs/gpu.md.

It stops at the first step that fails. All that the steps print is kept in a file, too, whose name is said at the end.

Exit code 3 where there is no GPU that PyTorch can use, 1 where a step failed.
"""

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims.__main__ import commit
from benchmarks.gpu import page
from benchmarks.gpu.card import this_card, why_not
from benchmarks.gpu.steps import ROOT, STEPS, Step, run_in_turn

FAILED, NO_GPU = 1, 3
PAGE = ROOT / "docs" / "gpu.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps, write the page, and return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    names = ", ".join(step.name for step in STEPS)
    parser.add_argument("--steps", type=_chosen, default=STEPS, metavar="A,B", help=f"some of {names} (default: all)")
    asked = parser.parse_args(arguments)
    if (reason := why_not()) is not None:
        print(f"make gpu: {reason}", file=sys.stderr)
        return NO_GPU
    now, home = datetime.datetime.now(), home_folder()
    log = home / f"gpu-{now:%Y%m%d-%H%M%S}.log"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        ran = run_in_turn(asked.steps, file, home)
    PAGE.write_text(page.text(this_card(), now.date(), commit(ROOT), asked.steps, ran), encoding="utf-8")
    if ran[-1].code:
        print(
            f"make gpu: the step {ran[-1].step.name} failed; please send us {log}, which has everything that was "
            "printed, and tell us which machine this is",
            file=sys.stderr,
        )
        return FAILED
    print(f"make gpu: all is well; {PAGE} says what was run, and {log} has everything that was printed")
    return 0


def home_folder() -> Path:
    """Where all state goes: ``OVERNIGHT_HOME``, else a folder in this tree that git ignores."""
    return Path(os.environ.get("OVERNIGHT_HOME") or ROOT / ".overnight").absolute()


def _chosen(text: str) -> tuple[Step, ...]:
    """``tests,demo`` as steps, in the order in which they are run."""
    wanted, known = text.split(","), [step.name for step in STEPS]
    for name in wanted:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not a step; they are {', '.join(known)}")
    return tuple(step for step in STEPS if step.name in wanted)


if __name__ == "__main__":
    sys.exit(main())
