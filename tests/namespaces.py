"""Commands in namespaces of their own: a read-only mount, process ids that begin at 1."""

import shutil
import subprocess
from functools import cache

import pytest


@cache
def _prefix(*kinds: str) -> tuple[str, ...] | None:
    """What to write before a command; as root, else as root of a namespace of ours; None: neither is allowed here."""
    if shutil.which("unshare") is None:
        return None
    for prefix in (("unshare", *kinds), ("unshare", "--map-root-user", *kinds)):
        if subprocess.run([*prefix, "true"], capture_output=True, timeout=30).returncode == 0:
            return prefix
    return None


def unshared(*kinds: str) -> list[str]:
    """``unshare`` with these options; skips the test where the system does not allow it."""
    prefix = _prefix(*kinds)
    if prefix is None:
        pytest.skip(f"`unshare {' '.join(kinds)}` is not allowed here")
    return list(prefix)
