"""Claims: what their lines say, and how they are run and kept."""

import importlib.util
import json
import subprocess
from collections.abc import Callable
from math import inf, nan
from pathlib import Path

import pytest

from benchmarks.claims import __main__ as runner
from benchmarks.claims import results as kept
from benchmarks.claims.claim import AtLeast, AtMost, Claim, Machine, Missed
from benchmarks.claims.listed import CLAIMS
from benchmarks.outputs import differences

HERE = "a machine"
RunClaims = Callable[..., tuple[int, str, list[kept.Result]]]


def claim(path: Path, **changes: object) -> Claim:
    values: dict[str, object] = {
        "name": "speed", "sentence": "times as fast", "command": ("json.tool", str(path)), "figure": "ratio.peer",
        "line": AtLeast(2.0),
    }  # fmt: skip
    return Claim(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"ratio": {"peer": 2.5, "absent": None, "word": "fast"}, "equal": True}))
    return path


@pytest.fixture
def run_claims(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunClaims:
    """Runs claims on a CPU without matrix units; gives exit code, page, and what was kept of the claim `speed`."""
    stored, shown = tmp_path / "results.json", tmp_path / "RESULTS.md"
    monkeypatch.setattr(runner, "kind_of", lambda about: Machine.CPU)
    monkeypatch.setattr(runner, "title_of", lambda about, machine: HERE)
    add, show = kept.add, kept.show
    monkeypatch.setattr(kept, "add", lambda *values: add(*values, path=stored))
    monkeypatch.setattr(kept, "show", lambda claims: show(claims, stored=stored, shown=shown))

    def run(*claims: Claim, words: tuple[str, ...] = ()) -> tuple[int, str, list[kept.Result]]:
        monkeypatch.setattr(runner, "CLAIMS", claims)
        code = runner.main(words)
        found = kept.read(stored)
        page = shown.read_text() if shown.exists() else ""
        return code, page, found[HERE].results.get("speed", []) if HERE in found else []

    return run


@pytest.mark.parametrize(
    ("gpu", "units", "compared_in", "kind"),
    [
        ("NVIDIA L4", ["avx2"], "bfloat16", Machine.CUDA),
        (None, ["amx_bf16", "avx2"], "bfloat16", Machine.AMX),
        (None, ["avx512_bf16", "avx2"], "bfloat16", Machine.CPU),
        (None, ["avx2"], "float32", Machine.FLOAT32),
    ],
)
def test_each_machine_has_its_lines_and_says_what_it_is(
    gpu: str | None, units: list[str], compared_in: str, kind: Machine
) -> None:
    about = {
        "gpu": gpu,
        "matrix_units": units,
        "compared_in": compared_in,
        "cores": 2,
        "cpu": "X",
        "memory_bytes": 2**34,
    }
    assert runner.kind_of(about) is kind
    assert ("float32" in runner.title_of(about, kind)) == (compared_in == "float32")


def test_every_claim_has_a_name_a_command_that_exists_and_a_line() -> None:
    names = [claim.name for claim in CLAIMS]
    assert len(set(names)) == len(names)
    for each in CLAIMS:
        assert importlib.util.find_spec(each.command[0]), each.command
        assert any(each.line_for(machine) for machine in Machine)
        assert all(each.line_for(machine) for machine in each.missed)


def test_the_page_of_results_is_what_is_kept() -> None:
    """`python -m benchmarks.claims --page` writes it anew."""
    assert kept.SHOWN.read_text(encoding="utf-8") == kept.to_markdown(kept.read(), CLAIMS)


def test_figures_are_found_by_their_keys(report: Path) -> None:
    document = json.loads(report.read_text())
    assert claim(report).read(document) == 2.5
    assert claim(report, figure="equal").read(document) == 1.0
    for figure in ("ratio.absent", "ratio.other", "ratio.peer.deeper", "nothing", "ratio", "ratio.word"):
        with pytest.raises(ValueError, match=f"{figure} is .* and must be a number"):
            claim(report, figure=figure).read(document)
    for value in (inf, nan):
        with pytest.raises(ValueError, match="must be a number"):
            claim(report, figure="it").read({"it": value})


def test_a_figure_is_worth_nothing_where_the_report_does_not_say_what_it_must(report: Path) -> None:
    document = json.loads(report.read_text())
    assert claim(report, requires={"equal": True}).read(document) == 2.5
    with pytest.raises(ValueError, match="equal is True in the report, and must be False"):
        claim(report, requires={"equal": False}).read(document)


def test_a_line_is_met_at_its_value_and_beyond() -> None:
    assert [AtLeast(2.0).is_met(value) for value in (1.9, 2.0, 2.1)] == [False, True, True]
    assert [AtMost(2.0).is_met(value) for value in (1.9, 2.0, 2.1)] == [True, True, False]


def test_a_claim_that_is_met_is_kept_with_its_commit(
    run_claims: RunClaims, report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, page, (result,) = run_claims(claim(report))
    assert code == 0
    assert (result.value, result.commit) == (2.5, runner.commit(runner.ROOT))
    assert f"| `speed` | 2.5 | times as fast | ≥ 2 | met | {result.load:.1f} | {result.date} |" in page
    assert "torch" in result.packages
    assert "speed" in capsys.readouterr().out


def test_the_last_figures_stay_with_the_newest(run_claims: RunClaims, report: Path) -> None:
    for value in (9.0, 3.0, 2.5, 4.0, 2.0, 2.25):
        report.write_text(json.dumps({"ratio": {"peer": value}}))
        _, page, results = run_claims(claim(report))
    assert [result.value for result in results] == [3.0, 2.5, 4.0, 2.0, 2.25]
    assert "| 2.25 (2–4 of 5) |" in page


def test_a_missed_line_is_an_error_unless_it_is_recorded_and_no_worse(run_claims: RunClaims, report: Path) -> None:
    code, page, _ = run_claims(claim(report, line=AtLeast(3.0)))
    assert code == 1
    assert "| ≥ 3 | **missed** |" in page
    assert "- `speed`: not explained yet" in page
    for floor, expected in ((2.4, 0), (2.6, 1)):
        missed = {Machine.CPU: Missed("the disk is slow", AtLeast(floor))}
        code, page, _ = run_claims(claim(report, line=AtLeast(3.0), missed=missed))
        assert code == expected
        assert "- `speed`: the disk is slow" in page


@pytest.mark.parametrize("fault", ["no report", "no figure", "it crashed"])
def test_a_command_that_fails_is_a_miss_even_where_one_is_recorded(
    fault: str, run_claims: RunClaims, report: Path, tmp_path: Path
) -> None:
    missed = {Machine.CPU: Missed("the disk is slow", AtLeast(0.0))}
    broken = {
        "no report": claim(tmp_path / "absent.json", missed=missed),
        "no figure": claim(report, figure="ratio.other", missed=missed),
        "it crashed": claim(report, command=("tests.benchmarks.crashes", str(report)), missed=missed),
    }
    code, page, (result,) = run_claims(broken[fault])
    assert code == 1
    assert result.value is None
    assert "| failed | times as fast | ≥ 2 | **missed** |" in page


def test_what_is_not_for_this_machine_is_said_and_not_run(
    run_claims: RunClaims, report: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for_others = claim(report, line={Machine.CUDA: AtLeast(3.0)})
    assert run_claims(for_others, claim(report, name="another"))[::2] == (0, [])
    assert "not for this machine: it has no line for cpu" in capsys.readouterr().out
    assert run_claims(for_others)[0] == 1, "nothing of what was asked for could be run"


def test_an_unknown_name_is_refused(run_claims: RunClaims, report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("no-such-claim",), ("speed", "no-such-claim")):
        with pytest.raises(SystemExit, match="2"):
            run_claims(claim(report), words=words)
        assert "no claim is called no-such-claim" in capsys.readouterr().err
    assert run_claims(claim(report), words=("sp*",))[0] == 0


def test_a_commit_is_marked_where_files_differ_but_for_the_results(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    (tmp_path / "benchmarks").mkdir()
    for name in ("benchmarks/results.json", "benchmarks/RESULTS.md", "code.py"):
        (tmp_path / name).write_text("")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    at = runner.commit(tmp_path)
    assert len(at) == 7
    (tmp_path / "benchmarks/results.json").write_text("{}")
    assert runner.commit(tmp_path) == at
    (tmp_path / "new.py").write_text("")
    assert runner.commit(tmp_path) == f"{at}+"


def test_records_differ_by_anything_but_rounding() -> None:
    before = {"a": [1.0, 2, "x"], "b": True}
    assert list(differences(before, {"a": [1.0 + 5e-6, 2, "x"], "b": True})) == []
    for other in (
        {"a": [1.0001, 2, "x"], "b": True},
        {"a": [nan, 2, "x"], "b": True},
        {"a": [1.0, 2.0, "x"], "b": True},
        {"a": [1.0, 2, "y"], "b": True},
        {"a": [1.0, 2], "b": True},
        {"a": [1.0, 2, "x"], "b": 1},
        {"a": [1.0, 2, "x"]},
    ):
        assert list(differences(before, other))
    assert list(differences({"a": nan}, {"a": nan})) == []
