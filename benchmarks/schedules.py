"""``python -m benchmarks.schedules``: mixed passes against FlexGen's two phases, by the same engine, in turn."""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from benchmarks.turns import RunFailed, in_turn, positive, run_module

ROOT = Path(__file__).resolve().parent.parent
RUN = (
    *("--shape", "opt-1.3b", "--requests", "48", "--prompt-len", "512", "--gen-len", "12"),
    *("--weights", "disk", "--memory-cap", "3GiB", "--peers", "none", "--json"),
)


def main() -> int:
    """Print the speeds and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules", description=__doc__)
    parser.add_argument("--repeat", type=positive, default=2, help="of each (default: %(default)s)")
    asked = parser.parse_args()
    speeds: dict[str, list[float]] = {"mixed": [], "block": []}
    cap_missing: str | None = None
    try:
        for schedule in in_turn(tuple(speeds), asked.repeat):
            report = json.loads(run_module(ROOT, "benchmarks.generate", *RUN, "--schedule", schedule))
            speeds[schedule].append(report["ours"]["tok_s"])
            cap_missing = cap_missing or report["cap_missing"]
    except RunFailed as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    ratio = median(speeds["mixed"]) / median(speeds["block"])
    print(json.dumps({"tok_s": speeds, "ratio": ratio, "cap_missing": cap_missing}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
