"""Segments side by side: fair shares, every item once, failures reach the caller."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import Generate, PlanOptions, Request, SamplingParams, Shares
from engine.attention.balanced import balanced
from engine.attention.workers import AttentionWorkers
from engine.loading import load_engine
from engine.weights.importing import import_checkpoint
from tests.engine.checkpoints import make_checkpoint


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 8))
def test_groups_hold_every_item_once_and_none_is_far_above_the_mean(costs: list[int], num_groups: int) -> None:
    groups = balanced(costs, num_groups)
    assert sorted(index for group in groups for index in group) == list(range(len(costs)))
    assert len(groups) <= num_groups
    # Greedy placement exceeds the mean by less than one item.
    heaviest = max((sum(costs[index] for index in group) for group in groups), default=0)
    assert heaviest <= sum(costs) / num_groups + max(costs, default=0)


def test_every_item_is_done_once_on_one_core_each() -> None:
    done: list[tuple[int, int]] = []
    workers = AttentionWorkers(3)
    mine = torch.get_num_threads()
    workers.each(lambda item: done.append((item, torch.get_num_threads())), [list(range(7)), list(range(7, 20)), []])
    workers.close()
    assert sorted(done) == [(item, 1) for item in range(20)]
    assert torch.get_num_threads() == mine


def test_anothers_failure_reaches_the_caller() -> None:
    workers = AttentionWorkers(2)
    caller = threading.get_ident()
    done: list[int] = []

    def work(item: int) -> None:
        if threading.get_ident() != caller:
            raise ValueError("another's")
        done.append(item)

    with pytest.raises(ValueError, match="another's"):
        workers.each(work, [[0], [1]])
    assert len(done) == 1
    workers.close()


def test_the_callers_own_failure_waits_for_the_others() -> None:
    workers = AttentionWorkers(2)
    failed, gate = threading.Event(), threading.Event()
    found: list[object] = []

    def call() -> None:
        caller, mine = threading.get_ident(), torch.get_num_threads()

        def work(item: int) -> None:
            if threading.get_ident() == caller:
                failed.set()
                raise ValueError("the caller's")
            gate.wait()
            found.append("the other ended")

        try:
            workers.each(work, [[0], [1]])
        except ValueError as error:
            found.append(str(error))
        found.append(torch.get_num_threads() == mine)

    calling = threading.Thread(target=call)
    calling.start()
    failed.wait()
    calling.join(timeout=0.2)  # whoever does not wait for the other has ended by then
    assert calling.is_alive()
    gate.set()
    calling.join()
    assert found == ["the other ended", "the caller's", True]
    workers.close()


def test_outputs_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "model")
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    requests = [Request(i, Generate("ab" * (3 + 17 * i), sampling)) for i in range(6)]
    # Prompts are cut at micro-batches, and longer than an extent; some live on disk.
    options = PlanOptions(
        device="cpu", kv=Shares(50, 0, 50), disk_dir=tmp_path, micro_batch=40, micro_batches=3, extent_tokens=32
    )
    found = []
    for num_threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        with load_engine(tmp_path / "model", options) as engine:
            torch.set_num_threads(before)
            found.append({output.key: output.result for output in engine.run(requests)})
    assert found[0] == found[1]
