"""Cores that attend to segments side by side on the CPU.

A segment's attention is a handful of short operations. Left to one thread after another, each operation would be split
over all cores and end in a barrier, which costs more than it saves; so each core takes whole segments instead.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def one_core() -> Iterator[None]:
    """The calling thread's operations are not split over cores, so that none waits for a core that others use."""
    all_cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(all_cores)


class AttentionWorkers:
    """The calling thread and others, one for each further core, each computing on its core alone.

    The caller takes part because it would have to find its core again otherwise: the product after the attention took
    half as long again.
    """

    def __init__(self, num_threads: int) -> None:
        """``num_threads``: the caller's included; more than one."""
        self.num_threads = num_threads
        # The setting is the calling thread's own: compute elsewhere keeps all cores.
        self._pool = ThreadPoolExecutor(
            num_threads - 1,
            thread_name_prefix="overnight-attention",
            initializer=torch.set_num_threads,
            initargs=(1,),
        )

    def each(self, work: Callable[[T], None], shares: Sequence[Sequence[T]]) -> None:
        """Do ``work`` on every item of every share; returns when all is done, raises the first failure.

        A single item is left to all cores together.
        """
        if sum(map(len, shares)) < 2:
            for share in shares:
                for item in share:
                    work(item)
            return

        def run(share: Sequence[T]) -> None:
            with torch.inference_mode():
                for item in share:
                    work(item)

        own, *others = shares
        futures = [self._pool.submit(run, share) for share in others]
        try:
            with one_core():
                run(own)
        finally:
            wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
