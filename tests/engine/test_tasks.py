"""From requests to sequences and back: joining, limits, ends, and what is counted. No model is run."""

import math
from dataclasses import replace

import pytest

from engine.request import (
    Choice,
    Choose,
    FinishReason,
    Generate,
    Generation,
    Output,
    Rejection,
    Request,
    SamplingParams,
    Score,
    Scoring,
)
from engine.shape import ModelShape
from engine.tasks import Generating, InProgress, Scored, begin
from engine.tokenizer import Tokenizer
from tests.engine.checkpoints import make_tokenizer

BOS, EOS = 0, 2  # of the tests' tokenizer: "<s>" and "</s>"
SHAPE = ModelShape(
    num_layers=1, hidden_size=8, num_heads=1, num_kv_heads=1, head_size=8, ffn_size=8, vocab_size=512, max_positions=16,
    bos_token_id=BOS, eos_token_ids=(EOS,), workspace_values=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.load(folder / "tokenizer.json", BOS)


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.load(folder / "tokenizer.json", None)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Without BOS: the letters of these tests are one token each."""
    return tokenizer.encode(text)[1:]


def started(work: Generate | Score | Choose, tokenizer: Tokenizer, shape: ModelShape = SHAPE) -> InProgress:
    progress = begin(Request("key", work), tokenizer, shape)
    assert not isinstance(progress, Output), progress
    return progress


def generating(tokenizer: Tokenizer, prompt: str, shape: ModelShape = SHAPE, **sampling: object) -> Generating:
    progress = started(Generate(prompt, SamplingParams(**sampling), 5), tokenizer, shape)  # type: ignore[arg-type]
    assert isinstance(progress, Generating)
    return progress


def refused(work: Generate | Score | Choose, tokenizer: Tokenizer, shape: ModelShape = SHAPE) -> Rejection:
    output = begin(Request(("any", "key"), work), tokenizer, shape)
    assert isinstance(output, Output)
    assert (output.key, output.prompt_tokens, output.completion_tokens) == (("any", "key"), 0, 0)
    assert isinstance(output.result, Rejection)
    return output.result


def say(progress: Generating, token_ids: list[int]) -> tuple[Output, int]:
    """Feed tokens until the generation ends; the output and how many it took."""
    for count, token in enumerate(token_ids, 1):
        progress.advance(progress.sequence, None, ())  # a pass of prefill chunks brings nothing
        assert not progress.sequence.finished
        progress.advance(progress.sequence, token, ())
        if progress.sequence.finished:
            return progress.output(), count
    raise AssertionError("it did not end")


def generated(output: Output) -> Generation:
    assert isinstance(output.result, Generation)
    return output.result


# Generation


def test_a_generation_begins_with_bos_once(tokenizer: Tokenizer) -> None:
    for prompt in ("abc", "<s>abc"):
        sequence = generating(tokenizer, prompt).sequence
        assert sequence.tokens == [BOS, *ids(tokenizer, "abc")]
        assert (sequence.num_prompt_tokens, sequence.sample_index) == (4, 5)
    assert generating(tokenizer, "").sequence.tokens == [BOS]


def test_the_token_limit_ends_it(tokenizer: Tokenizer) -> None:
    output, count = say(generating(tokenizer, "abc", max_new_tokens=3), ids(tokenizer, "defgh"))
    assert count == 3
    assert generated(output) == Generation("def", FinishReason.LENGTH, tuple(ids(tokenizer, "def")))
    assert (output.key, output.prompt_tokens, output.completion_tokens) == ("key", 4, 3)


@pytest.mark.parametrize(("num_prompt", "num_new"), [(16, 1), (15, 2), (14, 3), (1, 16)])
def test_the_models_positions_end_it(num_prompt: int, num_new: int, tokenizer: Tokenizer) -> None:
    """The last token needs no position of its own: one that fills all positions still has a successor."""
    progress = generating(tokenizer, "a" * (num_prompt - 1), max_new_tokens=100)
    assert progress.sequence.num_kv_tokens == 16
    output, count = say(progress, ids(tokenizer, "b") * 100)
    assert (count, generated(output).finish_reason) == (num_new, FinishReason.LENGTH)
    assert (output.prompt_tokens, output.completion_tokens) == (num_prompt, num_new)


def test_a_prompt_too_long_is_told_both_lengths(tokenizer: Tokenizer) -> None:
    rejection = refused(Generate("a" * 16, SamplingParams()), tokenizer)
    assert rejection.code == "too_long"
    assert "17 tokens" in rejection.message
    assert "at most 16" in rejection.message


def test_eos_ends_it_and_is_counted_but_not_said(tokenizer: Tokenizer) -> None:
    output, count = say(generating(tokenizer, "a"), [*ids(tokenizer, "xy"), EOS, 9])
    assert count == 3
    assert generated(output) == Generation("xy", FinishReason.STOP, (*ids(tokenizer, "xy"), EOS))
    assert output.completion_tokens == 3


def test_eos_may_be_one_of_several_or_none(tokenizer: Tokenizer) -> None:
    both = replace(SHAPE, eos_token_ids=(EOS, 300))
    assert say(generating(tokenizer, "a", shape=both), [9, 300])[1] == 2
    none = replace(SHAPE, eos_token_ids=())
    assert say(generating(tokenizer, "a", shape=none, max_new_tokens=4), [EOS, 300, 9, 9])[1] == 4


def test_eos_as_the_last_token_allowed_is_a_stop(tokenizer: Tokenizer) -> None:
    output, _ = say(generating(tokenizer, "a", max_new_tokens=1), [EOS])
    assert generated(output) == Generation("", FinishReason.STOP, (EOS,))


def test_eos_can_be_ignored(tokenizer: Tokenizer) -> None:
    output, count = say(
        generating(tokenizer, "a", max_new_tokens=4, ignore_eos=True), [EOS, *ids(tokenizer, "x"), EOS, EOS]
    )
    assert (count, generated(output).finish_reason, generated(output).text) == (4, FinishReason.LENGTH, "x")


@pytest.mark.parametrize(
    ("stop", "said", "text", "count"),
    [
        (("STOP",), "abSTOPcd", "ab", 6),
        (("q", "STOP"), "abSTOPq", "ab", 6),
        (("b", "ab"), "xabc", "x", 3),  # both end at the same token: the earlier begin wins
        (("aab",), "aaabx", "a", 4),  # begins inside a failed match
        (("x",), "x", "", 1),
        (("é",), "caféx", "caf", 5),  # two bytes, two tokens
        (("\n\n",), "a\nb\n\nc", "a\nb", 5),
    ],
)
def test_stop_strings_end_it_across_tokens(
    stop: tuple[str, ...], said: str, text: str, count: int, tokenizer: Tokenizer
) -> None:
    token_ids = ids(tokenizer, said)
    assert len(token_ids) == len(said.encode()), "one byte a token, so that every border is inside a stop string"
    output, taken = say(generating(tokenizer, "p", stop=stop), token_ids)
    assert generated(output) == Generation(text, FinishReason.STOP, tuple(token_ids[:count]))
    assert taken == output.completion_tokens == count


def test_a_stop_string_in_the_prompt_does_not_count(tokenizer: Tokenizer) -> None:
    output, _ = say(generating(tokenizer, "aST", stop=("STOP",), max_new_tokens=4), ids(tokenizer, "OPxx"))
    assert generated(output).text == "OPxx"


def test_a_stop_string_that_the_last_token_completes_is_a_stop(tokenizer: Tokenizer) -> None:
    output, _ = say(generating(tokenizer, "a", stop=("yz",), max_new_tokens=3), ids(tokenizer, "xyz"))
    assert generated(output) == Generation("x", FinishReason.STOP, tuple(ids(tokenizer, "xyz")))


def test_a_text_is_decoded_whole(tokenizer: Tokenizer) -> None:
    """A character of several tokens, and one that the limit cut off."""
    output, _ = say(generating(tokenizer, "a", max_new_tokens=5), ids(tokenizer, "é→x"))
    assert generated(output).text == "é→"
    output, _ = say(generating(tokenizer, "a", max_new_tokens=3), ids(tokenizer, "é→"))
    assert generated(output).text == "é\ufffd"


# Scoring


def scored(progress: InProgress, *logprobs: list[float], greedy: bool = True) -> Output:
    """Hand each sequence its log-probabilities, in two pieces."""
    assert isinstance(progress, Scored)
    for sequence, values in zip(progress.sequences, logprobs, strict=True):
        middle = len(values) // 2
        for piece in (values[:middle], values[middle:]):
            assert not sequence.finished
            progress.advance(sequence, None, tuple((value, greedy) for value in piece))
        assert sequence.finished
    return progress.output()


def test_a_score_is_of_the_continuation(tokenizer: Tokenizer) -> None:
    progress = started(Score("abc", "de"), tokenizer)
    (sequence,) = progress.sequences
    assert sequence.tokens == [BOS, *ids(tokenizer, "abcde")]
    assert (sequence.score_from, sequence.num_to_compute, sequence.is_scored) == (4, 5, True)
    output = scored(progress, [-0.5, -1.25])
    assert isinstance(output.result, Scoring)
    assert output.result.logprob == -1.75
    assert output.result.is_greedy
    assert [(token.text, token.logprob) for token in output.result.tokens] == [("d", -0.5), ("e", -1.25)]
    assert [token.id for token in output.result.tokens] == ids(tokenizer, "de")
    assert (output.prompt_tokens, output.completion_tokens) == (4, 2)


def test_one_token_that_is_not_greedy_makes_the_score_not_greedy(tokenizer: Tokenizer) -> None:
    progress = started(Score("a", "bc"), tokenizer)
    progress.advance(progress.sequences[0], None, ((-1.0, True), (-1.0, False)))
    assert progress.sequences[0].finished
    result = progress.output().result
    assert isinstance(result, Scoring)
    assert not result.is_greedy


def test_sums_of_finite_numbers_are_finite(tokenizer: Tokenizer) -> None:
    """The engine looks at the float32 of each token alone: their sum, which has more range, cannot overflow."""
    roomy = replace(SHAPE, max_positions=100_002)
    lowest = [-3.4028234663852886e38] * 100_000
    score = scored(started(Score("a", "b" * len(lowest)), tokenizer, roomy), lowest).result
    choice = scored(started(Choose("a", ("b" * len(lowest),)), tokenizer, roomy), [-1.0, *lowest]).result
    assert isinstance(score, Scoring)
    assert isinstance(choice, Choice)
    assert all(math.isfinite(logprob) for logprob in (score.logprob, *choice.logprobs.values()))


def test_an_empty_context_is_bos(tokenizer: Tokenizer, without_bos: Tokenizer) -> None:
    (sequence,) = started(Score("", "ab"), tokenizer).sequences
    assert sequence.tokens == [BOS, *ids(tokenizer, "ab")]
    assert sequence.score_from == 1
    assert refused(Score("", "ab"), without_bos).code == "empty_prompt"
    assert refused(Generate("", SamplingParams()), without_bos).code == "empty_prompt"


def test_an_empty_continuation_is_refused(tokenizer: Tokenizer) -> None:
    assert refused(Score("abc", ""), tokenizer).code == "empty_continuation"


def test_a_score_may_use_every_position(tokenizer: Tokenizer) -> None:
    """16 positions compute 16 tokens, and the last predicts a 17th."""
    (sequence,) = started(Score("a" * 10, "b" * 6), tokenizer).sequences
    assert (len(sequence.tokens), sequence.num_to_compute) == (17, 16)
    rejection = refused(Score("a" * 10, "b" * 7), tokenizer)
    assert rejection.code == "too_long"
    assert "18 tokens" in rejection.message
    assert "at most 17" in rejection.message


# Choices


@pytest.mark.parametrize(
    ("prompt", "choice", "joined"),
    [
        ("Is it?", "yes", "Is it? yes"),
        ("Is it? ", "yes", "Is it? yes"),
        ("Is it?\n", "yes", "Is it?\nyes"),
        ("Is it?", " yes", "Is it? yes"),
        ("Is it?", "\nyes", "Is it?\nyes"),
        ("Is it? ", " yes", "Is it?  yes"),
        ("Is it?\u00a0", "yes", "Is it?\u00a0yes"),
    ],
)
def test_a_choice_is_joined_by_one_space(prompt: str, choice: str, joined: str, tokenizer: Tokenizer) -> None:
    progress = started(Choose(prompt, (choice, "other")), tokenizer, replace(SHAPE, max_positions=100))
    sequence = progress.sequences[0]
    assert tokenizer.decode(sequence.tokens) == joined
    assert tokenizer.decode(sequence.tokens[: sequence.score_from]) == prompt.rstrip(), "white space is scored"
    assert sequence.tokens[0] == BOS
    assert sequence.tokens.count(BOS) == 1


def test_the_likeliest_choice_is_the_label_as_given(tokenizer: Tokenizer) -> None:
    progress = started(Choose("a", ("x", " yy", "z")), tokenizer)
    output = scored(progress, [-1.0, -2.0], [-0.25, -0.25, -0.25], [-3.0, -1.0])
    assert output.result == Choice(" yy", {"x": -3.0, " yy": -0.75, "z": -4.0})
    assert (output.prompt_tokens, output.completion_tokens) == (2, 7), "the prompt counts once"


def test_ties_go_to_the_first(tokenizer: Tokenizer) -> None:
    output = scored(started(Choose("a", ("x", "y", "z")), tokenizer), [-2.0, -2.0], [-1.5, -0.5], [-0.5, -1.5])
    assert isinstance(output.result, Choice)
    assert output.result.label == "y"


def test_choices_that_cannot_be_chosen_from(tokenizer: Tokenizer) -> None:
    assert refused(Choose("a", ()), tokenizer).code == "no_choices"
    assert refused(Choose("a", ("x", "y", "x")), tokenizer).code == "duplicate_choices"
    assert refused(Choose("a", ("x", "y" * 20)), tokenizer).code == "too_long"


@pytest.mark.parametrize(
    "work", [Generate("a\ud800", SamplingParams()), Score("a", "\udfff"), Choose("a", ("b", "\ud800"))]
)  # fmt: skip
def test_a_lone_surrogate_is_named(work: Generate | Score | Choose, tokenizer: Tokenizer) -> None:
    rejection = refused(work, tokenizer)
    assert rejection.code == "invalid_text"
    assert "U+D" in rejection.message


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"stop": ("a", "")}, "a stop string must not be empty"),
    ],
)
def test_sampling_that_means_nothing_is_refused(sampling: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SamplingParams(**sampling)  # type: ignore[arg-type]
