"""What goes into the engine and what comes out: plain frozen values."""

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, and when a sequence ends."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the output; never part of it."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if any(not text for text in self.stop):
            raise ValueError("a stop string must not be empty")


@dataclass(frozen=True, slots=True)
class Generate:
    """Prompt to text."""

    prompt: str
    sampling: SamplingParams
    sample_index: int = 0
    """Together with the seed, it selects this request's stream of random numbers."""


@dataclass(frozen=True, slots=True)
class Score:
    """Log-probability of a continuation."""

    context: str
    continuation: str


@dataclass(frozen=True, slots=True)
class Choose:
    """The likeliest of several continuations of a prompt."""

    prompt: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One row of work; ``key`` is the caller's name for it and comes back on the output."""

    key: Hashable
    work: Generate | Score | Choose


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Generation:
    """Generated text."""

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token of a scored continuation, with its natural-log probability."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Scoring:
    """A scored continuation: the sum over its tokens, and whether greedy decoding would have said it."""

    logprob: float
    is_greedy: bool
    tokens: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """The likeliest choice and every choice's summed log-probability; ties go to the first."""

    label: str
    logprobs: dict[str, float]


@dataclass(frozen=True, slots=True)
class Rejection:
    """The request's own content is at fault: an error row, never a dead job."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Output:
    """The result of one request."""

    key: Hashable
    result: Generation | Scoring | Choice | Rejection
    prompt_tokens: int
    completion_tokens: int
