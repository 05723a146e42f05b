"""Five rounds of the campaign of faults; `python -m benchmarks.chaos` runs it for as long as one likes."""

from pathlib import Path

import pytest

from benchmarks.chaos import ChaosFound, Load, Outputs, chaos_round, make_models, run_round, run_undisturbed, same

LOAD = Load(rows=120, new_tokens=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"), lambda _: None)


@pytest.fixture(scope="module")
def undisturbed(models: Path) -> Outputs:
    return run_undisturbed(models, LOAD)


@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (3, 4, 5))])
def test_a_round_of_faults_loses_doubles_and_changes_nothing(models: Path, undisturbed: Outputs, seed: int) -> None:
    _, counts = run_round(models, seed, LOAD, undisturbed, faults=4, patience_s=200.0)
    assert sum(count for name, count in counts.items() if not name.startswith("message: ")) == 4


def test_the_campaign_finds_an_output_that_was_changed(models: Path, undisturbed: Outputs) -> None:
    with chaos_round(models, 1, LOAD) as one:
        one.wait()
        one.check(undisturbed)
        changed = """UPDATE outputs SET output = '{"text": "x"}' WHERE job_id = 1 AND "index" = 7"""
        with one.database.write() as connection:
            connection.exec_driver_sql(changed)
        with pytest.raises(ChaosFound, match="job 1, row 7"):
            one.check(undisturbed)


def test_equal_is_exact_but_for_the_last_digits_of_numbers() -> None:
    row = {"logprob": -1.5, "is_greedy": True, "tokens": [{"id": 3, "logprob": -0.5}]}
    assert same(row, {**row, "logprob": -1.50001})
    assert not same(row, {**row, "logprob": -1.501})
    assert not same(row, {**row, "is_greedy": False})
    assert not same(row, {**row, "tokens": []})
    assert not same({"text": "a"}, {"text": "b"})
    assert not same("crashed", {"text": "b"})
