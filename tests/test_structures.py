"""The map of the code is true: every package is on it, and everything it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAP = ROOT / "docs" / "structures.md"
ROOMS = ("cli", "worker", "engine", "storage", "benchmarks", "examples", "tests")


def modules_of_the_engine() -> set[str]:
    """Packages with a slash behind their names, and the modules beside them without."""
    found = {path.parent.name + "/" for path in (ROOT / "engine").glob("*/__init__.py")}
    return found | {path.stem for path in (ROOT / "engine").glob("*.py")} - {"__init__"}


def named(text: str) -> set[str]:
    return set(re.findall(r"`([^`\s]+)`", text))


def test_every_package_is_on_the_map() -> None:
    text = MAP.read_text()
    missing = modules_of_the_engine() - named(text)
    assert not missing, f"docs/structures.md names every package of engine/: add {sorted(missing)}"
    assert all(room in text for room in ROOMS)


def test_the_map_names_nothing_that_is_not_there() -> None:
    names = {name for name in named(MAP.read_text()) if name.endswith((".py", ".md", ".toml", "/")) and "<" not in name}
    bases = [ROOT, ROOT / "engine"]
    gone = {name for name in names if not any((base / name).exists() for base in bases)}
    assert not gone
    assert len(names) > 30
