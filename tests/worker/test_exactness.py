"""Jobs that are to be exact: a worker that rounds leaves them to others, and says so."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.formats.int4_sizes import Int4
from engine.planner.plan import PlanOptions
from engine.weights.importing import import_checkpoint
from tests.worker.bench import Bench
from worker.exactness import why_not_exact
from worker.residency import Residency


def of_format(bench: Bench, kv_format: str | None) -> None:
    """The bench's worker with a KV cache in that format."""
    placement = bench.placement = replace(bench.placement, kv_format=kv_format)
    bench.residency.unload()
    bench.residency = Residency(bench.load, bench.clock, lambda model_dir: why_not_exact(model_dir, placement))
    bench.new_worker()


@pytest.mark.parametrize("kv_format", ["int4", "auto"])
def test_a_worker_that_rounds_leaves_what_is_to_be_exact_to_others(
    kv_format: str, bench: Bench, tiny_model: Path
) -> None:
    exact = bench.enqueue(tiny_model, [{"prompt": "abc"}], exact=True)
    other = bench.enqueue(tiny_model, [{"prompt": "abc"}])
    of_format(bench, kv_format)
    while bench.drain.step():
        pass
    assert (bench.job(exact).num_done, bench.job(other).num_done) == (0, 1)
    plan = bench.job(other).plan
    assert plan is not None
    assert (plan["weight_format"], plan["kv_format"]) == ("plain", "int4" if kv_format == "int4" else "plain")
    bench.bell.ring()
    bench.drain._idle()
    said = f"leaves job {exact} to others, which is to be exact: this worker runs with --kv-format {kv_format}"
    assert bench.told[-1].message == said
    of_format(bench, None)
    while bench.drain.step():
        pass
    assert bench.job(exact).state == "done"
    assert bench.job(exact).exact
    bench.bell.ring()
    bench.drain._idle()
    assert bench.told[-1].message is None


def test_weights_in_four_bits_are_not_exact(bench: Bench, tiny_model: Path, tmp_path: Path) -> None:
    import_checkpoint(tiny_model, tmp_path / "four", matrices=Int4())
    exact = bench.enqueue(tmp_path / "four", [{"prompt": "abc"}], exact=True)
    other = bench.enqueue(tmp_path / "four", [{"prompt": "abc"}])
    of_format(bench, "plain")
    while bench.drain.step():
        pass
    assert (bench.job(exact).num_done, bench.job(other).num_done) == (0, 1)
    plan = bench.job(other).plan
    assert plan is not None
    assert (plan["weight_format"], plan["kv_format"]) == ("int4", "plain")
    assert why_not_exact(tmp_path / "four", PlanOptions()) == f"{tmp_path / 'four'} has its weights in int4"
    assert why_not_exact(tmp_path / "not there yet", PlanOptions()) is None
