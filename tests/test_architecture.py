"""House rules that are machines: what each room may load, and what it may stand on.

The directions between the rooms themselves are import-linter's (``make lint``).
"""

import ast
import importlib.metadata
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import engine
from engine.model.registry import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("cli", "engine", "storage", "worker")
HEAVY = ("torch", "transformers", "pydantic")

PUBLIC_FACE = {
    "Engine", "PassReport", "PassStats", "Plan", "PlanOptions", "Shares", "load_engine",
    "Request", "Generate", "Score", "Choose", "SamplingParams",
    "Output", "Generation", "FinishReason", "Scoring", "TokenScore", "Choice", "Rejection",
    "EngineError", "PlanDoesNotFit", "TierFull", "DiskFull", "CheckpointError", "DeviceUnavailable", "LaneFailed",
}  # fmt: skip

_LOAD = """
import importlib, json, sys
heavy, names = json.loads(sys.argv[1])
for name in names:
    importlib.import_module(name)
    loaded = [module for module in heavy if module in sys.modules]
    if loaded:
        sys.exit(f"importing {name} loads {', '.join(loaded)}")
"""


def load_in_a_fresh_process(names: list[str], heavy: tuple[str, ...] = HEAVY) -> str:
    """Import ``names`` one after the other; what was wrong, or an empty string."""
    ran = subprocess.run(
        [sys.executable, "-c", _LOAD, json.dumps([heavy, names])], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    return ran.stderr.strip() if ran.returncode else ""


def modules_of(name: str) -> list[str]:
    """A module and, where it is a package, all below it; scripts that run when imported are left out."""
    folder = ROOT / name.replace(".", "/")
    if not folder.is_dir():
        return [name]
    found = [module.name for module in pkgutil.walk_packages([str(folder)], prefix=f"{name}.")]
    # Alembic imports these itself, inside a context that only it has.
    return [name, *(n for n in found if not n.endswith(".__main__") and ".migrations" not in n)]


def light_modules() -> list[str]:
    """The modules that the import-linter contracts keep free of torch, and what each model family says of sizes."""
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    sources = [
        c["source_modules"] for c in contracts if c["type"] == "forbidden" and c["forbidden_modules"] == ["torch"]
    ]
    light = [module for names in sources for name in names for module in modules_of(name)]
    return light + [f"engine.model.{family}_sizes" for family in FAMILIES]


def sources(room: str) -> Iterator[Path]:
    return (path for path in sorted((ROOT / room).rglob("*.py")) if "__pycache__" not in path.parts)


def imported_roots(path: Path) -> set[str]:
    """The top-level names that a file imports, wherever in the file."""
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    return roots


def test_the_check_itself_sees_a_heavy_import() -> None:
    assert load_in_a_fresh_process(["json", "decimal"], heavy=("decimal",)) == "importing decimal loads decimal"


def test_no_command_loads_torch_before_it_computes() -> None:
    assert load_in_a_fresh_process(modules_of("cli")) == ""


def test_what_decides_is_loaded_without_torch() -> None:
    names = light_modules()
    assert len(names) > 10, names  # the contract is read, not missed
    assert load_in_a_fresh_process(names) == ""


def test_the_public_face_of_the_engine_changes_only_on_purpose() -> None:
    assert set(engine.__all__) == PUBLIC_FACE
    assert [name for name in engine.__all__ if getattr(engine, name).__name__ != name] == []
    assert load_in_a_fresh_process(["engine"]) == ""


def test_every_library_that_is_imported_is_declared() -> None:
    declared = {_name(requirement) for requirement in PYPROJECT["project"]["dependencies"]}
    providers = importlib.metadata.packages_distributions()
    missing = {}
    for path in (path for room in ROOMS for path in sources(room)):
        for root in imported_roots(path) - set(sys.stdlib_module_names) - set(ROOMS):
            if not declared & {_name(distribution) for distribution in providers.get(root, [])}:
                missing[f"{path.relative_to(ROOT)}: {root}"] = providers.get(root)
    assert missing == {}


def test_every_folder_of_tests_is_a_package() -> None:
    # Without __init__.py, tests/engine would be imported as `engine`.
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def _name(requirement: str) -> str:
    """The normalised name at the start of a requirement."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()  # type: ignore[index]


def words_of(name: str) -> list[str]:
    """``OPTSizes.from_config`` → opt, sizes, from, config."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)]


def names_in_code(tree: ast.AST) -> Iterator[str]:
    """What a module calls things by, and the words that code compares with; texts with spaces are for people."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.alias):
            yield node.name
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\S+", node.value):
            yield node.value


def family_words() -> set[str]:
    """The families' modules and the ``model_type``s of their checkpoints, with a version's number and without."""
    names = {name for family, model_types in FAMILIES.items() for name in (family, *model_types)}
    return {word for name in names for word in (name, words_of(name)[0])}


def names_of_families(code: str) -> list[str]:
    """The names in a module's code that are, or have among their words, a family's."""
    words = family_words()
    return [name for name in names_in_code(ast.parse(code)) if words & {name.lower(), *words_of(name)}]


def test_only_its_own_files_and_the_registry_name_a_model_family() -> None:
    models = ROOT / "engine/model"
    own = {path for family in FAMILIES for path in (models / f"{family}.py", *models.glob(f"{family}_*.py"))}
    assert {models / f"{family}{half}.py" for family in FAMILIES for half in ("", "_sizes")} <= own
    found = {
        str(path.relative_to(ROOT)): names
        for room in ("cli", "engine", "worker")
        for path in sources(room)
        if path not in own and path != models / "registry.py" and (names := names_of_families(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_is_named_is_found(family: str) -> None:
    for code in (
        f"from engine.model.{family}_sizes import sizes",
        f"from engine.model import {family}",
        f"class {family.upper()}Sizes: pass",
        f"{family}_config = None",
        *(f"config['model_type'] == '{model_type}'" for model_type in FAMILIES[family]),
        f"name.startswith('somebody/{family}-')",
    ):
        assert names_of_families(code), code
    assert names_of_families(f"raise ValueError('such as a name of {family}')") == []
