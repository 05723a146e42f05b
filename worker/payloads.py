"""The tasks, and what is stored of a row for each.

The command line writes the payload and the worker reads it; the output goes the other way.
"""

from typing import TypedDict


class GeneratePayload(TypedDict):
    """A text to continue."""

    prompt: str


class ScorePayload(TypedDict):
    """A text, and the one after it whose log-probability is wanted."""

    context: str
    continuation: str


class ChoosePayload(TypedDict):
    """A text, and the labels that may follow it."""

    prompt: str
    choices: list[str]


class GenerateOutput(TypedDict):
    """The text that was generated, and why it ended: ``stop`` or ``length``."""

    text: str
    finish_reason: str


class ScoredToken(TypedDict):
    """One token of the continuation; natural logarithms."""

    id: int
    text: str
    logprob: float


class ScoreOutput(TypedDict):
    """The sum over the tokens, and whether each was the likeliest."""

    logprob: float
    is_greedy: bool
    tokens: list[ScoredToken]


class ChooseOutput(TypedDict):
    """The likeliest label, and the log-probability of each."""

    label: str
    logprobs: dict[str, float]


OUTPUT_KEYS = {
    "generate": tuple(GenerateOutput.__annotations__),
    "score": tuple(ScoreOutput.__annotations__),
    "choose": tuple(ChooseOutput.__annotations__),
}
"""The keys of a task's output; in a table its columns, where a nested value is JSON."""
TASKS = tuple(OUTPUT_KEYS)
