"""From a request to the sequences that answer it, and from those back to its output. Knows tokens, not tensors."""

from collections.abc import Iterator
from dataclasses import dataclass

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
    TokenScore,
)
from engine.sequence import Sequence
from engine.shape import ModelShape
from engine.tokenizer import StopChecker, Tokenizer, UnencodableText


@dataclass(slots=True, eq=False)
class Generating:
    """A generation in progress."""

    request: Request
    tokenizer: Tokenizer
    sequence: Sequence
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]
    stops: StopChecker
    text: str | None = None
    reason: FinishReason = FinishReason.LENGTH

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """What must be computed."""
        return (self.sequence,)

    def advance(self, sequence: Sequence, next_token: int | None, scores: tuple[tuple[float, bool], ...]) -> None:
        """Take the next token; decide whether it was the last."""
        del scores
        if next_token is None:
            return
        sequence.tokens.append(next_token)
        if next_token in self.eos_token_ids and not self.sampling.ignore_eos:
            self._end(FinishReason.STOP, None)
        elif (text := self.stops.push(next_token)) is not None:
            self._end(FinishReason.STOP, text)
        elif len(sequence.tokens) >= sequence.max_tokens:
            self._end(FinishReason.LENGTH, None)

    def _end(self, reason: FinishReason, text: str | None) -> None:
        self.text, self.reason, self.sequence.finished = text, reason, True

    def output(self) -> Output:
        """The finished output; usage counts the EOS that ended it."""
        prompt = self.sequence.num_prompt_tokens
        generated = self.sequence.tokens[prompt:]
        text = self.text if self.text is not None else self.tokenizer.decode(generated)
        result = Generation(text, self.reason, tuple(generated))
        return Output(self.request.key, result, prompt, len(generated))


@dataclass(slots=True, eq=False)
class Scored:
    """A score or a choice in progress: given tokens whose log-probabilities are wanted."""

    request: Request
    tokenizer: Tokenizer
    sequences: tuple[Sequence, ...]

    def advance(self, sequence: Sequence, next_token: int | None, scores: tuple[tuple[float, bool], ...]) -> None:
        """Take the log-probabilities that a pass found."""
        del next_token
        sequence.scores += scores
        sequence.finished = len(sequence.scores) == len(sequence.tokens) - sequence.score_from

    def output(self) -> Output:
        """The finished output. Prompt tokens count once, however many choices share them."""
        work = self.request.work
        prompt = max(sequence.score_from for sequence in self.sequences)
        completion = sum(len(sequence.scores) for sequence in self.sequences)
        if isinstance(work, Choose):
            sums = [sum(logprob for logprob, _ in sequence.scores) for sequence in self.sequences]
            best = max(range(len(sums)), key=lambda index: sums[index])
            result: Choice | Scoring = Choice(work.choices[best], dict(zip(work.choices, sums, strict=True)))
        else:
            (sequence,) = self.sequences
            tokens = tuple(
                TokenScore(token, self.tokenizer.token_text(token), logprob)
                for token, (logprob, _) in zip(sequence.tokens[sequence.score_from :], sequence.scores, strict=True)
            )
            result = Scoring(
                sum(token.logprob for token in tokens), all(greedy for _, greedy in sequence.scores), tokens
            )
        return Output(self.request.key, result, prompt, completion)


InProgress = Generating | Scored


def begin(request: Request, tokenizer: Tokenizer, shape: ModelShape) -> InProgress | Output:
    """The sequences of a request, or at once the output that says why it cannot be run."""
    try:
        work = request.work
        if isinstance(work, Generate):
            return _begin_generation(request, work, tokenizer, shape)
        sequences = tuple(_scored_sequence(*pair, tokenizer, shape) for pair in _pairs(work))
        return Scored(request, tokenizer, sequences)
    except UnencodableText as error:
        return rejected(request, "invalid_text", str(error))
    except _Unfit as error:
        return rejected(request, error.code, str(error))


def rejected(request: Request, code: str, message: str) -> Output:
    """An output that says what is wrong with the request."""
    return Output(request.key, Rejection(code, message), 0, 0)


class _Unfit(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _begin_generation(request: Request, work: Generate, tokenizer: Tokenizer, shape: ModelShape) -> Generating:
    tokens = tokenizer.encode(work.prompt)
    if not tokens:
        raise _Unfit(
            "empty_prompt", "the prompt is empty and the model's tokenizer puts no token before it to start from"
        )
    if len(tokens) > shape.max_positions:
        raise _Unfit(
            "too_long",
            f"the prompt has {len(tokens)} tokens and the model takes at most {shape.max_positions}; shorten it",
        )
    # The last token's place is never computed, so one more fits than there are positions.
    room = shape.max_positions + 1 - len(tokens)
    sequence = Sequence(
        tokens=tokens,
        num_prompt_tokens=len(tokens),
        max_tokens=len(tokens) + min(work.sampling.max_new_tokens, room),
        sampling=work.sampling,
        sample_index=work.sample_index,
    )
    stops = tokenizer.stop_checker(work.sampling.stop)
    return Generating(request, tokenizer, sequence, work.sampling, shape.eos_token_ids, stops)


def _pairs(work: Score | Choose) -> Iterator[tuple[str, str]]:
    if isinstance(work, Score):
        yield work.context, work.continuation
        return
    if not work.choices:
        raise _Unfit("no_choices", "there are no choices to choose from")
    if len(set(work.choices)) != len(work.choices):
        raise _Unfit("duplicate_choices", "two choices are the same")
    for choice in work.choices:
        joined = work.prompt[-1:].isspace() or choice[:1].isspace() or not work.prompt
        yield work.prompt, choice if joined else f" {choice}"


def _scored_sequence(context: str, continuation: str, tokenizer: Tokenizer, shape: ModelShape) -> Sequence:
    context_ids, continuation_ids = tokenizer.encode_pair(context, continuation)
    if not continuation_ids:
        raise _Unfit("empty_continuation", "the continuation has no tokens to score")
    if not context_ids:
        raise _Unfit("empty_prompt", "the context is empty and the model has neither BOS nor EOS to start from")
    tokens = context_ids + continuation_ids
    if len(tokens) > shape.max_positions + 1:
        raise _Unfit(
            "too_long",
            f"context and continuation have {len(tokens)} tokens and the model takes at most "
            f"{shape.max_positions + 1}; shorten the context",
        )
    return Sequence(
        tokens=tokens, num_prompt_tokens=len(context_ids), max_tokens=len(tokens), score_from=len(context_ids)
    )
