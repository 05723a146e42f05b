"""``python -m benchmarks.before_after BEFORE``: two commits side by side, each in a tree of its own.

Their outputs (`benchmarks.outputs`) must be equal: ids, texts, labels, finish reasons and usage to the byte,
log-probabilities to 1e-5. With ``--speed`` they are timed in turn, too (`benchmarks.generate`), as medians of ratios.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoints import default_cache
from benchmarks.machine import default_dtype
from benchmarks.outputs import differences
from benchmarks.turns import RunFailed, in_turn, positive, run_module

ROOT = Path(__file__).resolve().parent.parent
FIRST = "the one that added benchmarks/outputs.py"
LINE = 0.97
"""The new commit's speed over the old one's, at least."""
RUNS: dict[str, tuple[str, ...]] = {
    "opt-125m in memory, 512 → 32": (
        *("--shape", "opt-125m", "--requests", "32", "--prompt-len", "512", "--gen-len", "32", "--weights", "device"),
    ),
    "opt-1.3b from disk, 512 → 12": (
        *("--shape", "opt-1.3b", "--requests", "8", "--prompt-len", "512", "--gen-len", "12", "--weights", "disk"),
        *("--device-memory", "2GiB"),
    ),
    "opt-125m in memory, scoring 512 + 4": (
        *("--shape", "opt-125m", "--requests", "16", "--prompt-len", "512", "--gen-len", "4", "--weights", "device"),
        *("--task", "score"),
    ),
}


@contextmanager
def tree_of(commit: str) -> Iterator[Path]:
    """A checkout of a commit, gone when the block ends.

    Raises:
        RunFailed: git knows no such commit.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def compare_outputs(trees: tuple[Path, Path]) -> list[str]:
    """Where the outputs of two trees differ."""
    records: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for index, tree in enumerate(trees):
            file = Path(folder) / f"{index}.json"
            run_module(tree, "benchmarks.outputs", str(file))
            records.append(json.loads(file.read_text()))
    return list(differences(*records))


def compare_speed(trees: tuple[Path, Path], names: Sequence[str], repeat: int) -> dict[str, float]:
    """Tokens per second after, over before, of these ``RUNS``: the median over pairs of neighbouring runs.

    A machine that others use is slower at one time than at another, for both of a pair alike. Each tree has models of
    its own, made by itself: neither need read what the other writes.
    """
    ratios: dict[str, float] = {}
    default_cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=default_cache()) as folder:
        for name in names:
            speeds: tuple[list[float], list[float]] = ([], [])
            for side in in_turn((0, 1), repeat):
                more = ("--dtype", default_dtype(), "--peers", "none", "--json", "--cache-dir", f"{folder}/{side}")
                report = json.loads(run_module(trees[side], "benchmarks.generate", *RUNS[name], *more))
                speeds[side].append(report["ours"]["tok_s"])
            ratios[name] = median(after / before for before, after in zip(*speeds, strict=True))
            of_medians = median(speeds[1]) / median(speeds[0])  # far from it: too few runs, or a restless machine
            said = f"{name}: {ratios[name]:.3f}, of medians {of_medians:.3f} ({speeds[0]} before, {speeds[1]} after)"
            print(said, file=sys.stderr, flush=True)
    return ratios


def _git(*words: str) -> None:
    if subprocess.run(["git", "-C", str(ROOT), *words], check=False).returncode:
        raise RunFailed(f"git {' '.join(words)} failed")


def main() -> int:
    """0 if the outputs are equal and nothing became slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before_after", description=__doc__)
    parser.add_argument("before", help="a commit")
    parser.add_argument("after", nargs="?", default="HEAD")
    parser.add_argument("--speed", action="store_true", help="time both, too")
    parser.add_argument("--repeat", type=positive, default=5, help="of each timing (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="time runs with this in their name alone")
    parser.add_argument("--no-outputs", action="store_true", help="time alone")
    asked = parser.parse_args()
    names = [name for name in RUNS if asked.only in name]
    if not names:
        parser.error(f"no run has {asked.only!r} in its name; there are: {'; '.join(RUNS)}")
    if not asked.speed and (asked.only or asked.no_outputs):
        parser.error("--only and --no-outputs are for --speed: without it, there would be nothing to compare")
    try:
        with tree_of(asked.before) as before, tree_of(asked.after) as after:
            found = [] if asked.no_outputs else compare_outputs((before, after))
            ratios = compare_speed((before, after), names, asked.repeat) if asked.speed else {}
    except RunFailed as error:
        print(f"benchmarks: {error}; commits before {FIRST} cannot be compared", file=sys.stderr)
        return 2
    shown = {"differences": len(found), "first": found[:10], "ratios": ratios, "at_least": LINE}
    print(json.dumps(shown, indent=1, ensure_ascii=False))
    return 0 if not found and all(ratio >= LINE for ratio in ratios.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
