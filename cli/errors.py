"""What can go wrong in the command line itself; each text is a sentence for people.

CliError
├── DatasetFault        the dataset cannot be read: encoding, emptiness, or the line that is at fault
├── TemplateFault       the prompt template has a syntax error, or fails on the first row
├── FileAbsent          a file or folder that was named does not exist
├── OutputRefused       the output would overwrite what a job needs, or is of a format that is not written
├── OutputNotWritten    the output could not be written (disk full, no permission)
├── JobUnfinished       the job failed, was cancelled or has failed requests
└── WorkerDied          the worker that `run` or `demo` had started ended before its job

`cli.exit_codes` gives each of them its exit code.
"""


class CliError(Exception):
    """Any failure that a person can mend; never shown with a traceback."""


class DatasetFault(CliError):
    """The dataset as a whole cannot be read; the text names the line where there is one."""


class TemplateFault(CliError):
    """The template cannot be compiled, or fails on the first row."""


class FileAbsent(CliError):
    """A file or folder named on the command line is not there."""


class OutputRefused(CliError):
    """Writing there would destroy something the job needs."""


class OutputNotWritten(CliError):
    """The file system refused the output."""


class JobUnfinished(CliError):
    """The job did not end well; the text says how it ended and what to do."""


class WorkerDied(CliError):
    """Our own worker ended too early; its exit code is ours where the contract gives it a meaning."""

    def __init__(self, text: str, worker_exit_code: int) -> None:
        super().__init__(text)
        self.worker_exit_code = worker_exit_code
