"""How long requests are in tokens: what a plan is made for."""

from collections.abc import Iterable
from pathlib import Path

from engine.model.registry import sizes_for
from engine.planner.workload import Workload
from engine.request import Output, Request
from engine.shape import ModelShape
from engine.tasks import begin
from engine.tokenizer import Tokenizer
from engine.weights.manifest import TOKENIZER_NAME, read_manifest


def workload_of(model_dir: Path, requests: Iterable[Request]) -> Workload | None:
    """Lengths of the requests that a model can take; ``None``: of none.

    Scored sequences count as prompts that generate one token: the planner keeps room for keys and values that most of
    them will not need.

    Raises:
        CheckpointError: the model directory is absent or damaged.
    """
    return workload_for(sizes_for(read_manifest(model_dir).config).shape, model_dir, requests)


def workload_for(shape: ModelShape, folder: Path, requests: Iterable[Request]) -> Workload | None:
    """The same of a model known by its shape alone; ``folder`` holds its tokenizer.

    Raises:
        CheckpointError: the tokenizer is absent or damaged.
    """
    tokenizer = Tokenizer.of_model(folder / TOKENIZER_NAME, shape)
    pairs: list[tuple[int, int]] = []
    for request in requests:
        started = begin(request, tokenizer, shape)
        if isinstance(started, Output):
            continue
        for sequence in started.sequences:
            generated = 1 if sequence.is_scored else sequence.max_tokens - sequence.num_prompt_tokens
            prompt = min(sequence.num_to_compute, shape.max_positions - generated)
            if prompt > 0 and generated > 0:
                pairs.append((prompt, generated))
    return Workload.of(pairs) if pairs else None
