"""From a stored payload to an engine request, and from an engine output to a stored row."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from engine.request import (
    Choice,
    Choose,
    Generate,
    Generation,
    Output,
    Rejection,
    Request,
    SamplingParams,
    Score,
    Scoring,
)
from worker.payloads import (
    TASKS,
    ChooseOutput,
    ChoosePayload,
    GenerateOutput,
    GeneratePayload,
    ScoredToken,
    ScoreOutput,
    ScorePayload,
)


@dataclass(frozen=True, slots=True)
class RowKey:
    """The name under which the engine knows a claimed row."""

    job_id: int
    index: int
    attempt: int
    """The epoch of the claim: a row claimed twice is two requests."""


@dataclass(frozen=True, slots=True)
class JobKeys:
    """All keys of some jobs, as a container for ``Engine.drop``."""

    job_ids: Collection[int]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, RowKey) and key.job_id in self.job_ids


@dataclass(frozen=True, slots=True)
class Row:
    """A result as it is stored: ``output`` or ``error`` (code, message), never both."""

    output: Mapping[str, Any] | None
    error: tuple[str, str] | None


def to_request(
    key: RowKey, task: str, payload: Mapping[str, Any] | None, params: Mapping[str, Any], seed: int
) -> Request:
    """The request that a claimed row stands for; ``payload`` holds rendered texts, ``params`` the job's sampling.

    Raises:
        ValueError: the row or the job's parameters cannot be a request; the text is for people.
    """
    if payload is None:
        raise ValueError("the row has no payload")
    try:
        if task == "generate":
            sampling = SamplingParams(**{**params, "stop": tuple(params.get("stop", ())), "seed": seed})
            return Request(key, Generate(cast(GeneratePayload, payload)["prompt"], sampling, sample_index=key.index))
        if task == "score":
            score = cast(ScorePayload, payload)
            return Request(key, Score(score["context"], score["continuation"]))
        if task == "choose":
            choose = cast(ChoosePayload, payload)
            return Request(key, Choose(choose["prompt"], tuple(choose["choices"])))
    except KeyError as error:
        raise ValueError(f"the row has no {error.args[0]!r}, which the task {task!r} needs") from error
    except TypeError as error:
        raise ValueError(f"the job's parameters do not fit the task {task!r}: {error}") from error
    raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")


def to_row(output: Output) -> Row:
    """What is stored of an engine output, in the shapes that ``fetch`` hands out.

    Its numbers are finite, as JSON's are: the engine rejects what has others.
    """
    result = output.result
    if isinstance(result, Generation):
        return Row(GenerateOutput(text=result.text, finish_reason=str(result.finish_reason)), None)
    if isinstance(result, Scoring):
        tokens = [ScoredToken(id=token.id, text=token.text, logprob=token.logprob) for token in result.tokens]
        return Row(ScoreOutput(logprob=result.logprob, is_greedy=result.is_greedy, tokens=tokens), None)
    if isinstance(result, Choice):
        return Row(ChooseOutput(label=result.label, logprobs=dict(result.logprobs)), None)
    assert isinstance(result, Rejection)
    return Row(None, (result.code, result.message))
