import pytest

from engine.request import (
    Choice,
    Choose,
    FinishReason,
    Generate,
    Generation,
    Output,
    Rejection,
    Score,
    Scoring,
    TokenScore,
)
from worker.rows import JobKeys, Row, RowKey, to_request, to_row

KEY = RowKey(3, 17, 2)
PARAMS = {
    "max_new_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 4,
    "stop": ["\n", "END"],
    "ignore_eos": True,
}


def test_generate_carries_the_jobs_sampling_and_the_rows_own_random_stream() -> None:
    request = to_request(KEY, "generate", {"prompt": "a"}, PARAMS, seed=9)

    assert request.key == KEY
    work = request.work
    assert isinstance(work, Generate)
    assert (work.prompt, work.sample_index) == ("a", 17)
    assert (work.sampling.seed, work.sampling.max_new_tokens, work.sampling.stop) == (9, 5, ("\n", "END"))
    assert (work.sampling.temperature, work.sampling.top_p, work.sampling.top_k) == (0.5, 0.9, 4)
    assert work.sampling.ignore_eos


def test_score_and_choose() -> None:
    score = to_request(KEY, "score", {"context": "a", "continuation": " b"}, {}, seed=0)
    choose = to_request(KEY, "choose", {"prompt": "a", "choices": ["x", "y"]}, {}, seed=0)

    assert score.work == Score("a", " b")
    assert choose.work == Choose("a", ("x", "y"))


@pytest.mark.parametrize(
    ("task", "payload", "params", "words"),
    [
        ("generate", {}, {}, "'prompt'"),
        ("score", {"context": "a"}, {}, "'continuation'"),
        ("choose", {"prompt": "a"}, {}, "'choices'"),
        ("generate", None, {}, "payload"),
        ("translate", {"prompt": "a"}, {}, "'translate'"),
        ("generate", {"prompt": "a"}, {"max_new_tokens": 0}, "max_new_tokens"),
        ("generate", {"prompt": "a"}, {"colour": 1}, "parameters"),
    ],
)
def test_a_row_that_cannot_be_a_request_says_why(
    task: str, payload: dict[str, object] | None, params: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        to_request(KEY, task, payload, params, seed=0)


@pytest.mark.parametrize(
    ("result", "row"),
    [
        (Generation("hi", FinishReason.STOP, (4, 5)), Row({"text": "hi", "finish_reason": "stop"}, None)),
        (
            Scoring(-1.5, True, (TokenScore(4, " b", -1.5),)),
            Row({"logprob": -1.5, "is_greedy": True, "tokens": [{"id": 4, "text": " b", "logprob": -1.5}]}, None),
        ),
        (Choice("x", {"x": -1.0, "y": -2.0}), Row({"label": "x", "logprobs": {"x": -1.0, "y": -2.0}}, None)),
        (Rejection("too_long", "200 tokens, 128 fit"), Row(None, ("too_long", "200 tokens, 128 fit"))),
    ],
)
def test_an_output_is_stored_in_the_contracts_shape(result: object, row: Row) -> None:
    assert to_row(Output(KEY, result, 1, 1)) == row  # type: ignore[arg-type]


def test_the_keys_of_some_jobs() -> None:
    keys = JobKeys({3})

    assert KEY in keys
    assert RowKey(4, 17, 2) not in keys
    assert "something else" not in keys
