"""Idle OpenMP threads: limited, unless the user has chosen."""

import pytest

from engine.openmp import SPIN_COUNT, limit_spinning


@pytest.mark.parametrize(
    ("chosen", "count"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_spinning_is_limited_unless_the_user_chose(chosen: dict[str, str], count: str | None) -> None:
    environ = dict(chosen)
    limit_spinning(environ)
    assert environ.get("GOMP_SPINCOUNT") == count
