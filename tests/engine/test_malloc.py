"""What the C library keeps of freed memory, in processes of their own: the setting is a process's."""

import os
import platform
import subprocess
import sys

import pytest

from engine.memory.malloc import keep_freed_memory

PAGES = """
import ctypes, resource, sys
from engine.memory.malloc import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
blocks = [None] * 6
def layer():
    for index in range(6):
        blocks[index] = libc.malloc(16 << 20)
        libc.memset(blocks[index], 1, 16 << 20)
    for index in reversed(range(6)):
        libc.free(blocks[index])
for _ in range(10):  # the library adapts its own thresholds, and the heap finds its shape
    layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    layer()
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
    left_alone = run("leave")[1]
    assert int(faults) * 10 < int(left_alone)


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_chose_stays(name: str) -> None:
    assert keep_freed_memory({name: "1"}) is False
