"""Ranges, seeded requests, and what they cost at least."""

import pytest

from benchmarks.shapes import BOS, NUM_SPECIAL, Flops, shape_of
from benchmarks.workload import Range, Workload, as_text

TINY = shape_of("tiny")


def workload(task: str = "generate", prompt: str = "3-9", out: str = "2-5", seed: int = 0) -> Workload:
    return Workload(task=task, prompt=Range.parse(prompt), out=Range.parse(out), vocabulary=TINY.vocab_size, seed=seed)


@pytest.mark.parametrize(("text", "low", "high"), [("512", 512, 512), ("32-1024", 32, 1024), ("7-7", 7, 7)])
def test_a_length_is_one_number_or_a_range(text: str, low: int, high: int) -> None:
    assert Range.parse(text) == Range(low, high)
    assert Range.parse(str(Range.parse(text))) == Range.parse(text)


@pytest.mark.parametrize("text", ["", "0", "-5", "5-", "a", "9-3", "0-4", "1-2-3", "1.5", "²"])
def test_what_is_no_length_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="is not a length"):
        Range.parse(text)


def test_lengths_spread_over_their_ranges_and_depend_only_on_the_seed() -> None:
    items = workload().items(200)
    assert items == workload().items(200)
    assert items[:50] == workload().items(50)  # a peer takes fewer: the same from the beginning
    assert items != workload(seed=1).items(200)
    assert {len(item.prompt) for item in items} == set(range(3, 10))
    assert {len(item.continuation) for item in items} == set(range(2, 6))


def test_prompts_begin_with_the_bos_and_hold_no_other_special_token() -> None:
    for item in workload().items(50):
        assert item.prompt[0] == BOS
        assert min(item.prompt[1:] + item.continuation) >= NUM_SPECIAL
        assert item.prompt_text == as_text(item.prompt[1:])


def test_the_work_of_a_generation_counts_every_product_once() -> None:
    flops = Flops(per_token=100.0, per_row=10.0, per_pair=1.0)
    (item,) = workload(prompt="3", out="4").items(1)
    work = workload(prompt="3", out="4").work([item], flops)
    assert (work.num_out, work.prefill_tokens, work.decode_tokens) == (4, 3, 3)
    assert work.prefill_flops == 3 * 100 + 10 + (1 + 2 + 3)
    assert work.decode_flops == 3 * 110 + (4 + 5 + 6)  # the last token's own place is never computed


def test_the_work_of_a_score_is_one_prefill_with_a_row_a_scored_token() -> None:
    flops = Flops(per_token=100.0, per_row=10.0, per_pair=1.0)
    (item,) = workload("score", prompt="3", out="2").items(1)
    work = workload("score", prompt="3", out="2").work([item], flops)
    assert (work.num_out, work.prefill_tokens, work.decode_tokens, work.decode_flops) == (2, 4, 0, 0.0)
    assert work.prefill_flops == 4 * 100 + 2 * 10 + (1 + 2 + 3 + 4)


def test_the_passes_of_a_run_share_all_of_its_work() -> None:
    items = workload().items(20)
    work = workload().work(items, Flops.of(TINY))
    half = work.prefill_tokens // 2
    parts = work.pass_flops(half, 0), work.pass_flops(work.prefill_tokens - half, 7)
    assert sum(parts) + work.pass_flops(0, work.decode_tokens - 7) == pytest.approx(work.flops)


def test_products_are_two_operations_a_weight() -> None:
    flops = Flops.of(shape_of("opt-1.3b"))
    assert flops.per_token == pytest.approx(2 * 1.208e9, rel=0.001)  # without embedding and biases
    assert flops.per_row == 2 * 50272 * 2048
