"""What tests on a GPU do in a process of its own: ``python -m tests.gpu.child TASK MODEL FOLDER …``."""

import os
import sys
from collections.abc import Callable
from pathlib import Path


def say(line: str) -> None:
    """To whoever started the process, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def placements(model: Path, disk_dir: Path, *names: str) -> None:
    """Run under each placement; says each one's name when it is done."""
    from engine.loading import load_engine
    from tests.engine.placements import scattered
    from tests.gpu.on_gpu import options, results, texts

    for name in names:
        with load_engine(model, options(name, **scattered(disk_dir))) as engine:
            results(engine, texts((1, 9, 40, 130)))
        say(name)


def lost(model: Path, disk_dir: Path) -> None:
    """An assertion of a kernel fails in the middle of a run: says what the engine says of that, then ends."""
    import torch

    from engine.devices.cuda import CudaDevice
    from engine.errors import DeviceFailed
    from engine.loading import load_engine
    from tests.gpu.on_gpu import options, requests, texts

    device = CudaDevice(0)
    engine = load_engine(model, options("split", disk_dir), device=device)
    run = engine.passes(iter(requests(texts())))
    next(run)
    beyond = device.upload(torch.tensor([1 << 20]))
    try:
        with device.computing():
            torch.zeros(4, device=device.torch_device).index_select(0, beyond)
        for _ in run:
            pass
    except DeviceFailed as error:
        say(f"run: {error}")
    try:
        engine.close()
    except DeviceFailed as error:
        say(f"close: {error}")
    os._exit(0)  # a context that is lost can also fail while Python ends, and nothing is asked about that


def other_card(model: Path, disk_dir: Path) -> None:
    """Use the second card alone; says ``running`` and ``closed``, and waits for a line after each."""
    import gc
    from dataclasses import replace

    from engine.loading import load_engine
    from tests.gpu.on_gpu import options, results, texts

    with load_engine(model, replace(options("split", disk_dir), device="cuda:1")) as engine:
        results(engine, texts())
        say("running")
        sys.stdin.readline()
    del engine
    gc.collect()
    say("closed")
    sys.stdin.readline()


TASKS: dict[str, Callable[..., None]] = {"placements": placements, "lost": lost, "other-card": other_card}


if __name__ == "__main__":
    from engine.process import tune

    tune()  # as a worker does; it comes before torch
    TASKS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
