"""From a dataset and its options to a job in the database: whole, or not at all."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.datasets import Dataset
from cli.job_options import JobOptions
from cli.sizes import Sizes
from cli.tasks import TaskSpec, requests
from cli.templates import PromptTemplate, read_template

if TYPE_CHECKING:
    from engine.planner.workload import Workload
    from storage.database import Database
    from storage.jobs import NewRequest
    from worker.models import ModelRef
    from worker.settings import Settings


class RowsAhead:
    """Requests that can be looked at before they are taken; each is made once."""

    def __init__(self, rows: "Iterator[NewRequest]") -> None:
        self._rows = rows
        self._seen: deque[NewRequest] = deque()

    def peek(self, number: int) -> "list[NewRequest]":
        """The next ones, or as many as there are."""
        self._seen.extend(itertools.islice(self._rows, max(0, number - len(self._seen))))
        return list(itertools.islice(self._seen, number))

    def __iter__(self) -> "Iterator[NewRequest]":
        while self._seen:
            yield self._seen.popleft()
        yield from self._rows


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that is ready to be stored: everything that can be checked from its first row has been."""

    options: JobOptions
    model: "ModelRef"
    dataset: Dataset
    prompt: str
    """The template itself, also where it was given as a file."""
    template: PromptTemplate
    rows: RowsAhead
    """Read once, as it is stored."""

    def warnings(self) -> list[str]:
        """What a person should know before the job is stored."""
        sentences = []
        if not self.template.names:
            file = f"; the file of that name is meant by --prompt @{self.prompt}" if _is_file(self.prompt) else ""
            sentences.append(f"the prompt names no field of the rows, so it is the same for all of them{file}")
        end = self.prompt[len(self.prompt.rstrip()) :]
        if self.options.task == "choose" and end:
            sentences.append(
                f"the prompt ends in white space ({end!r}), so the choices follow it without the space that else "
                "stands before them; labels may get worse: leave it out unless the model was made for it"
            )
        return sentences

    def workload(self, sizes: Sizes) -> "Workload | None":
        """Lengths of the first rows, as the job's worker will see them; ``None``: no row can be computed.

        Raises:
            DatasetFault: a line among them is at fault.
            CheckpointError: the model's tokenizer is absent or damaged.
        """
        from engine.lengths import workload_for
        from worker.sample import ROWS, requests_of

        rows = [(row.index, 0, row.payload) for row in self.rows.peek(ROWS) if row.payload is not None]
        seed = self.options.seed or 0
        return workload_for(
            sizes.shape,
            sizes.folder or self.model.path,
            requests_of(0, self.options.task, self.options.params(), seed, rows),
        )

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
            model=self.model.reference,
            task=self.options.task,
            params=self.options.params(),
            seed=self.options.seed or 0,
            priority=self.options.priority,
            queue=queue,
            name=self.options.name,
            origin=origin,
            exact=self.options.exact,
        )
        return create_job(database, job, _then(iter(self.rows), before_commit), now=time.time())


def _is_file(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_file()
    except (OSError, ValueError):
        return False


def prepare(dataset_name: str, options: JobOptions, settings: "Settings") -> Submission:
    """Checks template, model and the dataset up to its first row; nothing is stored.

    Raises:
        FileAbsent, DatasetFault, TemplateFault, ModelNotFound: what is wrong, and where.
        CheckpointError: the model directory is half-written, or its files have other sizes than it says.
        UsageError: the job is to be exact, and the model is not.
    """
    from engine.formats.sizes import Plain
    from engine.weights.checks import check_units
    from engine.weights.importers.tokenizer_present import check_tokenizer
    from engine.weights.manifest import read_manifest
    from worker.models import resolve_model

    limits = settings.limits
    dataset = Dataset(dataset_name, limits)
    dataset.check()
    prompt = read_template(options.prompt)
    template = PromptTemplate(prompt, limits)
    spec = TaskSpec(options.task, template, options.choices or (), limits)
    model = resolve_model(options.model, settings)
    if model.is_imported:
        manifest = read_manifest(model.path)
        check_units(manifest, model.path)  # the tokenizer takes longer: the worker looks at it
        stored = manifest.weight_format
        if options.exact and stored != Plain.name:
            raise click.UsageError(
                f"--exact: {model.path} has its weights in {stored}, so no worker could run the job; name the model "
                "that it was made of, or leave --exact out"
            )
    else:
        check_tokenizer(model.path)
    rows = requests(dataset.rows(), spec, label=dataset.label, keep_going=options.keep_going)
    ahead = RowsAhead(rows)
    ahead.peek(1)
    return Submission(options, model, dataset, prompt, template, ahead)


def _then(rows: "Iterator[NewRequest]", last: Callable[[], None] | None) -> "Iterator[NewRequest]":
    yield from rows
    if last is not None:
        last()
