"""Claims: what their lines say, and how they are run and kept."""

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.claims import __main__ as runner
from benchmarks.claims import results as kept
from benchmarks.claims.claim import AtLeast, AtMost, Claim, Machine
from benchmarks.claims.listed import CLAIMS

HERE = "a machine"


def claim(path: Path, **changes: object) -> Claim:
    values: dict[str, object] = {
        "name": "speed", "sentence": "times as fast", "command": ("json.tool", str(path)), "figure": "ratio.peer",
        "line": AtLeast(2.0),
    }  # fmt: skip
    return Claim(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"ratio": {"peer": 2.5, "absent": None}, "equal": True}))
    return path


@pytest.fixture
def run_claims(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "object":
    """Runs some claims on a CPU without matrix units; returns exit code and what was kept."""
    monkeypatch.setattr(kept, "STORED", tmp_path / "results.json")
    monkeypatch.setattr(runner, "kind_of", lambda about: Machine.CPU)
    monkeypatch.setattr(runner, "title_of", lambda about, machine: HERE)
    stored, shown = tmp_path / "results.json", tmp_path / "RESULTS.md"
    read, write = kept.read, kept.write
    monkeypatch.setattr(kept, "read", lambda: read(stored))
    monkeypatch.setattr(kept, "write", lambda results, claims: write(results, claims, stored=stored, shown=shown))

    def run(*claims: Claim) -> tuple[int, str, dict[str, kept.Result]]:
        monkeypatch.setattr(runner, "CLAIMS", claims)
        code = runner.main([])
        found = read(stored)
        return code, shown.read_text() if shown.exists() else "", found[HERE].results if HERE in found else {}

    return run


def test_every_claim_has_a_name_a_command_that_exists_and_a_line() -> None:
    names = [claim.name for claim in CLAIMS]
    assert len(set(names)) == len(names)
    for each in CLAIMS:
        assert importlib.util.find_spec(each.command[0]), each.command
        assert any(each.line_for(machine) for machine in Machine)
        assert set(each.missed) <= set(Machine)


def test_the_page_of_results_is_what_is_kept() -> None:
    assert kept.SHOWN.read_text(encoding="utf-8") == kept.to_markdown(kept.read(), CLAIMS)


def test_figures_are_found_by_their_keys(report: Path) -> None:
    document = json.loads(report.read_text())
    assert claim(report).read(document) == 2.5
    assert claim(report, figure="equal").read(document) == 1.0
    for figure in ("ratio.absent", "ratio.other", "ratio.peer.deeper", "nothing"):
        with pytest.raises(KeyError, match=figure):
            claim(report, figure=figure).read(document)


def test_a_line_is_met_at_its_value_and_beyond() -> None:
    assert [AtLeast(2.0).is_met(value) for value in (1.9, 2.0, 2.1)] == [False, True, True]
    assert [AtMost(2.0).is_met(value) for value in (1.9, 2.0, 2.1)] == [True, True, False]


def test_a_claim_that_is_met_is_kept_with_its_commit(run_claims, report: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    code, page, results = run_claims(claim(report))
    assert code == 0
    assert results["speed"].value == 2.5
    assert results["speed"].commit == runner.commit()
    assert f"| `speed` | times as fast | ≥ 2 | 2.5 | met | {results['speed'].date} |" in page
    assert "speed" in capsys.readouterr().out


def test_a_missed_line_is_an_error_unless_it_is_recorded_with_its_reason(run_claims, report: Path) -> None:  # type: ignore[no-untyped-def]
    code, page, _ = run_claims(claim(report, line=AtLeast(3.0)))
    assert code == 1
    assert "| 2.5 | **missed** |" in page
    assert "- `speed`: not explained yet" in page
    code, page, _ = run_claims(claim(report, line=AtLeast(3.0), missed={Machine.CPU: "the disk is slow"}))
    assert code == 0
    assert "| 2.5 | **missed** |" in page
    assert "- `speed`: the disk is slow" in page


def test_a_command_that_fails_is_a_miss_even_where_one_is_recorded(run_claims, report: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    broken = claim(tmp_path / "absent.json", missed={Machine.CPU: "the disk is slow"})
    for each in (broken, claim(report, figure="ratio.other", missed={Machine.CPU: "the disk is slow"})):
        code, page, results = run_claims(each)
        assert code == 1
        assert results["speed"].value is None
        assert "| failed | **missed** |" in page


def test_what_is_not_for_this_machine_is_said_and_not_run(run_claims, report: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    code, _, results = run_claims(claim(report, line={Machine.CUDA: AtLeast(3.0)}))
    assert (code, results) == (0, {})
    assert "not for this machine: it has no line for cpu" in capsys.readouterr().out


def test_an_unknown_name_is_refused(capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit, match="2"):
        runner.main(["no-such-claim"])
    assert "no claim is called no-such-claim" in capsys.readouterr().err
