"""Which lane the passes of a job kept busy, and for how long."""

from collections import defaultdict

from sqlalchemy import select

from storage.database import Database
from storage.schema import passes

_PAGE = 1000


def lane_seconds(db: Database, job_id: int, *, since: float) -> dict[str, float]:
    """Busy seconds by lane, over the passes that worked for a job; none of them began before `since` (unix seconds)."""
    total: defaultdict[str, float] = defaultdict(float)
    last = 0
    while True:
        query = (
            select(passes.c.id, passes.c.job_ids, passes.c.lane_seconds)
            .where(passes.c.id > last, passes.c.started_at >= since)
            .order_by(passes.c.id)
            .limit(_PAGE)
        )
        with db.read() as connection:
            page = connection.execute(query).all()
        for pass_id, job_ids, seconds in page:
            last = pass_id
            if job_id in job_ids:
                for lane, busy in seconds.items():
                    total[lane] += busy
        if len(page) < _PAGE:
            return dict(total)
