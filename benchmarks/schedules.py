"""``python -m benchmarks.schedules``: mixed passes against FlexGen's two phases, by the same engine, in turn."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RUN = (
    *("--shape", "opt-1.3b", "--requests", "48", "--prompt-len", "512", "--gen-len", "12"),
    *("--weights", "disk", "--memory-cap", "3GiB", "--peers", "none", "--json"),
)


def speed(schedule: str) -> tuple[float, str | None]:
    """Tokens per second of one run, and why its cap could not be enforced.

    Raises:
        subprocess.CalledProcessError: it failed; what it said is on standard error.
    """
    words = [sys.executable, "-m", "benchmarks.generate", *RUN, "--schedule", schedule]
    done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout)
    return float(report["ours"]["tok_s"]), report["cap_missing"]


def main() -> int:
    """Print the speeds and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules", description=__doc__)
    parser.add_argument("--repeat", type=int, default=2, help="of each (default: %(default)s)")
    asked = parser.parse_args()
    speeds: dict[str, list[float]] = {"mixed": [], "block": []}
    cap_missing: str | None = None
    for turn in range(asked.repeat):
        for schedule in ("mixed", "block") if turn % 2 == 0 else ("block", "mixed"):
            found, missing = speed(schedule)
            speeds[schedule].append(found)
            cap_missing = cap_missing or missing
    ratio = median(speeds["mixed"]) / median(speeds["block"])
    print(json.dumps({"tok_s": speeds, "ratio": ratio, "cap_missing": cap_missing}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
