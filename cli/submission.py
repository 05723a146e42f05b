"""From a dataset and its options to a job in the database: whole, or not at all."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cli.datasets import Dataset
from cli.job_options import JobOptions
from cli.tasks import TaskSpec, requests
from cli.templates import PromptTemplate, read_template

if TYPE_CHECKING:
    from storage.database import Database
    from storage.jobs import NewRequest
    from worker.settings import Settings


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that is ready to be stored: everything that can be checked from its first row has been."""

    options: JobOptions
    model: str
    """The name, or the absolute path."""
    dataset: Dataset
    prompt: str
    """The template itself, also where it was given as a file."""
    rows: "Iterator[NewRequest]"
    """Read once, as it is stored."""

    def store(self, database: "Database", queue: str, *, before_commit: Callable[[], None] | None = None) -> int:
        """Makes the job and returns its id; ``before_commit`` may still refuse after the last row was read.

        Raises:
            DatasetFault: a line is at fault; no job is left behind.
        """
        from storage.jobs import NewJob, create_job

        path = self.dataset.path
        origin = {
            "dataset": None if path is None else str(path.resolve()),
            "prompt": self.prompt,
            "choices": None if self.options.choices is None else list(self.options.choices),
        }
        job = NewJob(
            model=self.model,
            task=self.options.task,
            params=self.options.params(),
            seed=self.options.seed or 0,
            priority=self.options.priority,
            queue=queue,
            origin=origin,
        )
        return create_job(database, job, _then(self.rows, before_commit), now=time.time())


def prepare(dataset_name: str, options: JobOptions, settings: "Settings") -> Submission:
    """Checks template, model and the dataset up to its first row; nothing is stored.

    Raises:
        FileAbsent, DatasetFault, TemplateFault, ModelNotFound: what is wrong, and where.
        CheckpointError: the model directory is half-written, or its files have other sizes than it says.
    """
    from engine.weights.checks import check_units
    from engine.weights.manifest import read_manifest
    from worker.models import resolve_model

    limits = settings.limits
    dataset = Dataset(dataset_name, limits)
    dataset.check()
    prompt = read_template(options.prompt)
    spec = TaskSpec(options.task, PromptTemplate(prompt, limits), options.choices or (), limits)
    model = resolve_model(options.model, settings)
    if model.is_imported:
        check_units(read_manifest(model.path), model.path)  # the tokenizer takes longer: the worker looks at it
    rows = requests(dataset.rows(), spec, label=dataset.label, keep_going=options.keep_going)
    first = next(rows)
    return Submission(options, model.reference, dataset, prompt, itertools.chain([first], rows))


def _then(rows: "Iterator[NewRequest]", last: Callable[[], None] | None) -> "Iterator[NewRequest]":
    yield from rows
    if last is not None:
        last()
