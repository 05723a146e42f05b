"""What the C library keeps of freed memory, in processes of their own: the setting is a process's."""

import os
import platform
import subprocess
import sys

import pytest

from engine.memory.malloc import keep_freed_memory

PAGES = """
import resource, sys
from engine.memory.malloc import keep_freed_memory
import torch
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
torch.set_num_threads(1)
def faults():
    # As a layer does: something wide, then two of its parts' results, all gone before the next layer.
    wide = torch.ones(24 << 20, dtype=torch.uint8)
    results = [torch.ones(16 << 20, dtype=torch.uint8) for _ in range(2)]
for _ in range(10):  # the heap finds its shape in four to six rounds
    faults()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    faults()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(how: str, **environ: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environ
    command = [sys.executable, "-c", PAGES, how]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is the GNU C library's")
def test_freed_memory_is_used_again() -> None:
    kept, faults = run("keep")
    assert kept == "True"
    assert int(faults) < 14_336  # the pages of one round, of ten


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_chose_stays(name: str) -> None:
    assert keep_freed_memory({name: "1"}) is False
