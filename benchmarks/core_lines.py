"""``python -m benchmarks.core_lines``: how many lines of code a reader of one pass may have before them.

All lines count, blank ones and comments, too, of every file that a pass goes through or that is told with it. Model
families other than the first, and formats other than plain, are what the path is ready for, and no part of it.
"""

import argparse
import json
import sys
from pathlib import Path

ENGINE = Path(__file__).resolve().parents[1] / "engine"
CORE = (
    "engine.py", "stage.py", "executor.py", "activations.py", "sequence.py", "weights/stream.py",
    "schedule/*.py", "kvcache/*.py", "attention/*.py", "memory/*.py", "devices/*.py", "model/*.py", "formats/*.py",
)  # fmt: skip
OTHERS = ("model/llama", "formats/int", "attention/int4")


def main(arguments: list[str] | None = None) -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core_lines", description=__doc__)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    lines = count()
    if asked.json:
        print(json.dumps({"lines": sum(lines.values()), "files": lines}))
        return 0
    for name, number in sorted(lines.items(), key=lambda item: item[1]):
        print(f"{number:6,} {name}")
    print(f"{sum(lines.values()):6,} in all")
    return 0


def count() -> dict[str, int]:
    """Lines by file, below ``engine/``."""
    paths = {path.relative_to(ENGINE).as_posix(): path for pattern in CORE for path in ENGINE.glob(pattern)}
    return {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in sorted(paths.items())
        if not name.startswith(OTHERS)
    }


if __name__ == "__main__":
    sys.exit(main())
