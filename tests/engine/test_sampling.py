"""Which token comes next: who may be drawn, how often, and by what number."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engine.model.sampling import NOT_FINITE, next_tokens, score_tokens, uniform
from engine.request import SamplingParams


def drawn(logits: list[float], sampling: SamplingParams, number: float) -> int:
    return int(next_tokens(torch.tensor([logits]), [sampling], [number])[0])


def by_transformers(logits_V: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Probabilities that transformers would draw from: temperature, top-k, top-p in this order."""
    scores = logits_V.double()[None]
    ids = torch.zeros(1, 1, dtype=torch.int64)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.softmax(-1)[0]


PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.0, top_k=5),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=1.5, top_p=0.3),
    SamplingParams(temperature=1.2, top_k=12, top_p=0.7),
    SamplingParams(temperature=1.0, top_k=1000),
    SamplingParams(temperature=1.0, top_p=1e-9),
]


@pytest.mark.parametrize("sampling", PARAMS, ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_the_distribution_is_transformers(sampling: SamplingParams, seed: int) -> None:
    """Inverse transform over a grid of numbers: each token is drawn in proportion to its probability, to one step."""
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 2
    wanted = by_transformers(logits_V, sampling)
    steps = 2000
    numbers = [(step + 0.5) / steps for step in range(steps)]
    tokens = next_tokens(logits_V.expand(steps, -1), [sampling] * steps, numbers)
    share = torch.bincount(tokens, minlength=40) / steps
    assert bool((share[wanted == 0] == 0).all()), "never a token that transformers would not draw"
    torch.testing.assert_close(share.double(), wanted, atol=1.01 / steps, rtol=0)


def test_drawn_numbers_fill_the_distribution() -> None:
    """Chi-square over 20,000 numbers of the streams themselves: 99.9% of the time below its bound, and it is fixed."""
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(0))
    sampling = SamplingParams(temperature=1.0)
    count = 20_000
    numbers = [uniform(seed=7, sample_index=index, step=index % 5) for index in range(count)]
    edges = by_transformers(logits_V, sampling).sort(descending=True)
    expected = edges.values * count
    found = torch.bincount(
        torch.searchsorted(edges.values.cumsum(0), torch.tensor(numbers, dtype=torch.float64), right=True), minlength=12
    )
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert chi_square < 31.3  # 0.999 quantile, 11 degrees of freedom


def test_numbers_are_uniform_and_independent() -> None:
    numbers = torch.tensor([[uniform(1, index, step) for step in range(50)] for index in range(200)])
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
    tenths = torch.bincount((numbers.flatten() * 10).long(), minlength=10)
    assert float(((tenths - 1000) ** 2 / 1000).sum()) < 27.9  # 0.999 quantile, 9 degrees of freedom
    centred = numbers - 0.5
    for pairs in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        # Products of neighbours in a stream and over streams: mean 0, standard deviation 1/12.
        assert abs(float(pairs.mean())) < 4 / 12 / math.sqrt(pairs.numel())


@given(
    st.lists(
        st.tuples(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 5000)),
        unique=True,
        min_size=2,
        max_size=20,
    )
)
def test_seed_index_and_step_name_a_number(names: list[tuple[int, int, int]]) -> None:
    apart = {(seed % 2**64, index, step) for seed, index, step in names}
    numbers = {name: uniform(*name) for name in apart}
    assert all(0 <= number < 1 for number in numbers.values())
    assert len(set(numbers.values())) == len(apart)
    assert all(uniform(*name) == number for name, number in numbers.items())


def test_the_streams_never_change() -> None:
    """A job that is taken up again, perhaps by a newer version, must go on with the same numbers."""
    assert [uniform(*name) for name in ((0, 0, 0), (1, 2, 3), (-1, 0, 7))] == [
        0.011546754286331562,
        0.6527702009682942,
        0.6865660636114761,
    ]


def test_large_seeds_are_told_apart() -> None:
    """Neither float64 nor int64 holds these."""
    names = [(2**63 + i, 2**63 + j, 0) for i in range(3) for j in range(3)] + [
        (-1, 5, 0),
        (-2, 5, 0),
        (2**64 - 3, 5, 0),
    ]
    assert len({uniform(*name) for name in names}) == len(names)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 5))
def test_a_row_does_not_depend_on_its_neighbours(seed: int, rows: int, at: int) -> None:
    logits_RV = torch.randn(6, 30, generator=torch.Generator().manual_seed(seed))
    params = [
        SamplingParams(temperature=0.9, top_k=7),
        SamplingParams(),
        SamplingParams(temperature=2.0, top_p=0.5),
    ] * 2
    numbers = [uniform(seed, index, 3) for index in range(6)]
    together = next_tokens(logits_RV, params, numbers).tolist()
    alone = next_tokens(logits_RV[at : at + 1], params[at : at + 1], numbers[at : at + 1]).tolist()
    some = next_tokens(logits_RV[:rows], params[:rows], numbers[:rows]).tolist()
    assert together[at] == alone[0]
    assert together[:rows] == some


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert drawn([1.0, 3.0, 3.0, 2.0, 3.0], SamplingParams(), 0.999) == 1
    assert drawn([0.0] * 600, SamplingParams(), 0.5) == 0


def test_ties_are_drawn_in_order_of_their_ids() -> None:
    """And top-k keeps the first of them."""
    assert [drawn([1.0] * 4, SamplingParams(temperature=1), number) for number in (0.1, 0.3, 0.6, 0.9)] == [0, 1, 2, 3]
    assert {drawn([1.0] * 4, SamplingParams(temperature=1, top_k=2), n / 50) for n in range(50)} == {0, 1}


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_temperatures_near_zero_are_greedy(temperature: float, number: float) -> None:
    assert drawn([10.0, 80.0, -5.0], SamplingParams(temperature=temperature, top_p=0.9), number) == 1


@pytest.mark.parametrize("temperature", [1e30, 1e308, math.inf])
def test_high_temperatures_are_uniform(temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature)
    assert sorted(drawn([10.0, 80.0, -5.0, 0.0], sampling, number) for number in (0.1, 0.3, 0.6, 0.9)) == [0, 1, 2, 3]


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_range_draw_what_can_be_drawn(number: float) -> None:
    logits = [0.0, -200.0, float("-inf"), 0.1]
    assert drawn(logits, SamplingParams(temperature=1.0), number) in (0, 3)
    assert drawn([float("-inf")] * 3 + [0.0], SamplingParams(temperature=1.0), number) == 3


def test_logits_that_are_no_numbers_do_not_stop_a_run() -> None:
    """Float16 overflows; the row is lost anyway, the others must not be."""
    sampling = SamplingParams(temperature=1.0, top_k=3, top_p=0.5)
    others_RV = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    expected = next_tokens(others_RV, [sampling, SamplingParams()], [0.5, 0.5]).tolist()
    for logits in ([float("nan")] * 4, [1.0, float("inf"), 0.0, 2.0], [1.0, float("nan"), 0.0, 2.0]):
        logits_RV = torch.stack((others_RV[0], torch.tensor(logits), torch.tensor(logits), others_RV[1]))
        params = [sampling, sampling, SamplingParams(), SamplingParams()]
        first, drawn_lost, greedy_lost, last = next_tokens(logits_RV, params, [0.5] * 4).tolist()
        assert [first, last] == expected
        assert drawn_lost == greedy_lost == NOT_FINITE


def test_scores_are_log_probabilities_and_know_greedy() -> None:
    logits_RV = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)) * 3
    targets_R = torch.tensor([0, 49, int(logits_RV[2].argmax()), 7, 7])
    logprobs, greedy = score_tokens(logits_RV, targets_R)
    torch.testing.assert_close(logprobs, logits_RV.log_softmax(-1)[torch.arange(5), targets_R], atol=1e-5, rtol=0)
    assert greedy.tolist() == [False, False, True, False, False]
    tied = score_tokens(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert tied[1].tolist() == [True, False], "greedy would have said the first"
