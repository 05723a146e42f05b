"""`overnight import`: a checkpoint becomes a model directory."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from cli.context import App
from cli.display import colour_wanted, emit, printable, say, warn
from cli.options import PathName, settings_options
from engine.dtypes import DType
from engine.formats.sizes import TENSOR_FORMATS, Plain

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@click.command("import", short_help="Make a model directory from a Hugging Face folder.")
@click.argument("source", metavar="SRC", type=PathName())
@click.argument("destination", metavar="[DEST]", required=False, type=PathName())
@click.option(
    "--dtype",
    type=click.Choice([str(dtype) for dtype in DType]),
    help="How weights are stored. Default: as the checkpoint has them.",
)
@click.option(
    "--weight-format",
    type=click.Choice(TENSOR_FORMATS),
    default=Plain.name,
    help="int4: the layers' matrices take 4.5 bits a weight, and answers change a little. Default: plain.",
)
@click.option(
    "--quantize-embeddings",
    is_flag=True,
    help="With int4, the token tables, too: a smaller file, no less memory, and answers change more.",
)
@settings_options
@click.pass_obj
def command(
    app: App, source: str, destination: str | None, dtype: str | None, weight_format: str, quantize_embeddings: bool
) -> None:
    """Make a model directory from SRC, a Hugging Face folder or the name of one on the hub.

    With --weight-format int4, SRC may be a model directory, too, or the name of one in the model folder.

    DEST is a path, or a name in the model folder; by default the name of SRC, with -int4 behind it for that format. It
    appears when it is whole.

    \b
    Examples:
      overnight import ~/checkpoints/opt-1.3b
      overnight import facebook/opt-125m small --dtype float32
      overnight import opt-1.3b --weight-format int4
    """
    from cli.errors import FileAbsent, OutputRefused

    is_packed = weight_format != Plain.name
    if quantize_embeddings and not is_packed:
        raise click.UsageError("--quantize-embeddings needs --weight-format int4")
    folder = _expanded(source)
    if not folder.exists() and "/" not in source and (app.settings.models_dir / source).is_dir():
        folder = app.settings.models_dir / source
    name = folder.resolve().name if folder.is_dir() else source.rpartition("/")[2]
    name += f"-{weight_format}" if is_packed else ""
    target = model_path(app, destination or name)
    if not target.name.isprintable() or target.name != target.name.strip():
        raise click.UsageError(
            f"{target.name!r} is no name for a model: it has control characters, or blanks at its ends; give another "
            "as DEST"
        )
    if target.exists():
        raise OutputRefused(f"{target} exists already; remove it, or give the new model another name as DEST")
    with ExitStack() as stack:
        if not folder.is_dir():
            if folder.exists():
                raise click.UsageError(f"{folder} is a file; SRC is the folder that holds config.json and the weights")
            if not _HUB_NAME.fullmatch(source):
                raise FileAbsent(
                    f"there is no folder {folder}, and {source!r} is no name on the hub (organisation/model)"
                )
            folder = _download(source, stack)
        make_model(app, folder, target, dtype, is_packed=is_packed, packs_tables=quantize_embeddings)
    say(f"use it: overnight run DATASET --model {destination or name} --task generate|score|choose -o FILE")
    emit(str(target))


def model_path(app: App, destination: str) -> Path:
    """A path as it is; a plain name is meant in the model folder."""
    if "/" in destination or destination.startswith((".", "~")):
        return _expanded(destination).absolute()
    return app.settings.models_dir / destination


def _expanded(path: str) -> Path:
    from cli.errors import FileAbsent

    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileAbsent(f"there is no folder {path}: it begins with a user that does not exist") from None


def make_model(
    app: App,
    folder: Path,
    target: Path,
    dtype: str | None,
    *,
    is_packed: bool = False,
    packs_tables: bool = False,
) -> None:
    """Imports ``folder`` as ``target``, with progress on stderr.

    Raises:
        CheckpointError, DiskFull: nothing is left behind.
    """
    from cli.errors import OutputRefused
    from engine.formats.int4_sizes import Int4
    from engine.units import format_bytes
    from engine.weights.importing import import_checkpoint

    app.make_home()
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputRefused(
            f"the folder {target.parent} cannot be made: {error.strerror or error}; name another place as DEST"
        ) from error
    with _bytes_progress(f"importing {folder.name}") as report:
        manifest = import_checkpoint(
            folder,
            target,
            DType(dtype) if dtype else None,
            matrices=Int4() if is_packed else None,
            tables=packs_tables,
            on_progress=report,
            warn=warn,
        )
    kind = f"4-bit and {manifest.dtype}" if is_packed else manifest.dtype
    say(f"{folder.name}: {format_bytes(manifest.num_bytes)} of {kind} weights in {target}")


def _download(name: str, stack: ExitStack) -> Path:
    from engine.weights.hub import download
    from worker.scratch import scratch_folder, sweep

    sweep()
    say(f"downloading {name}")
    return download(name, stack.enter_context(scratch_folder("hub-")))


@contextmanager
def _bytes_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, no_color=not colour_wanted())) as bars:
        # No bar before something is written: what is wrong with the folder is found first.
        task = bars.add_task(printable(title), total=None, visible=False)
        yield lambda done, total: bars.update(task, completed=done, total=total, visible=True)
