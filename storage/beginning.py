"""How a job began: what its first rows have in common."""

from sqlalchemy import and_, or_, select

from storage.database import Database
from storage.schema import jobs, outputs, requests
from storage.states import OPEN_JOBS, RequestState, requests_before


def begins_with_errors(db: Database, job_id: int, code: str, number: int) -> bool:
    """Whether the first `number` requests of an unfinished job all are errors of this code, and none has a result.

    First by index, so that neither a restart nor how long each request takes changes the answer: while one of them has
    no output, it is no. Not counted are those with another error, which says nothing of this one, and those that wait
    to run apart from all others after a crash.
    """
    with_output = and_(outputs.c.job_id == requests.c.job_id, outputs.c.index == requests.c.index)
    waits_apart = and_(requests.c.state.in_(requests_before(RequestState.CLAIMED)), requests.c.crash_group.is_not(None))
    first = (
        select(outputs.c.error_code)
        .select_from(requests.join(jobs, jobs.c.id == requests.c.job_id).outerjoin(outputs, with_output))
        .where(
            requests.c.job_id == job_id,
            or_(outputs.c.error_code.is_(None), outputs.c.error_code == code),
            ~waits_apart,
            jobs.c.state.in_(OPEN_JOBS),
            jobs.c.num_done == 0,
        )
        .order_by(requests.c.index)
        .limit(number)
    )
    with db.read() as connection:
        found = connection.execute(first).scalars().all()
    return len(found) == number and set(found) == {code}
