"""The process's settings: changed unless the user has chosen. Each test runs in a process of its own."""

import ctypes
import os
import platform
import resource
import tempfile
from pathlib import Path

import pytest

from engine.process import tune
from tests.alone import alone

AMX = "processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile\n"
NO_AMX = "processor\t: 0\nflags\t\t: fpu amx_bf16\n"


@pytest.mark.parametrize(
    ("chosen", "count"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
@alone
def test_idle_threads_spin_less_unless_the_user_chose(chosen: dict[str, str], count: str | None) -> None:
    environ = dict(chosen)
    tune(environ)
    assert environ.get("GOMP_SPINCOUNT") == count


@pytest.mark.parametrize(
    ("flags", "chosen", "capacity"),
    [(AMX, {}, "64"), (AMX, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, "7"), (NO_AMX, {}, None), (None, {}, None)],
)
@alone
def test_few_kernels_are_kept_with_amx_unless_the_user_chose(
    flags: str | None, chosen: dict[str, str], capacity: str | None
) -> None:
    environ = dict(chosen)
    with tempfile.TemporaryDirectory() as folder:
        cpuinfo = Path(folder) / "cpuinfo"
        if flags is not None:
            cpuinfo.write_text(flags)
        tune(environ, cpuinfo)
    assert environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") == capacity


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is the GNU C library's")
@pytest.mark.parametrize("chosen", [None, "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
@alone
def test_freed_memory_is_used_again_unless_the_user_chose(chosen: str | None) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    before = page_faults()
    tune(environ if chosen is None else {**environ, chosen: "1"})
    after = page_faults()
    assert after * 10 < before if chosen is None else after * 2 > before


@alone
def test_opening_a_device_changes_no_setting() -> None:
    from engine.devices.open import open_device

    environ, before = dict(os.environ), page_faults()
    open_device("cpu").close()
    assert dict(os.environ) == environ
    assert page_faults() * 2 > before


def page_faults() -> int:
    """Pages that were got from the system, for ten times what the tensors of a layer take."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t

    def layer() -> None:
        blocks = [libc.malloc(16 << 20) for _ in range(6)]
        for block in blocks:
            libc.memset(block, 1, 16 << 20)
        for block in reversed(blocks):
            libc.free(block)

    for _ in range(10):  # the library adapts its own thresholds, and the heap finds its shape
        layer()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        layer()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
