"""The tables, typed: `jobs.c.id` is a Column[int] to a type checker and an ordinary column at run time.

These are SQLAlchemy's typed Core tables and not ORM classes: nothing here needs a unit of work, and importing the ORM
would cost a quarter of the time that `overnight status` may take.
Times are unix seconds. JSON is kept as text, exactly as written (SQLite would turn a JSON number into a float).
"""

import json
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Double,
    Enum,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Named,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    TypedColumns,
    TypeDecorator,
    false,
)

from storage.states import JobState, OutputStatus, RequestState

#: Every revision of the schema, oldest first; the last is the one this program speaks (a test holds it to the files).
REVISIONS = ("0001", "0002", "0003", "0004")
HEAD = REVISIONS[-1]

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def to_json(value: object) -> str:
    """JSON in one line of ASCII, so that even a lone surrogate survives the way through the database.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def value_of(text: str | None) -> Any:
    """A JSON value as it was stored; None where it cannot be read, so that one damaged row costs nothing but itself."""
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return None


def object_of(text: str | None) -> dict[str, Any] | None:
    """A JSON object as it was stored; None for anything else."""
    value = value_of(text)
    return value if isinstance(value, dict) else None


class JsonText(TypeDecorator[Any]):
    """Any JSON value as text; Python's None is SQL's NULL."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else to_json(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


class MessageText(TypeDecorator[str]):
    """A text for people that may quote a row: what no database stores (lone surrogates, NUL) is spelt out."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.encode(errors="backslashreplace").decode().replace("\0", "\\x00")


def _state(kind: type[StrEnum]) -> Enum:
    return Enum(kind, native_enum=False, length=16, values_callable=lambda e: [member.value for member in e])


def _one_of(column: str, kind: type[StrEnum]) -> CheckConstraint:
    values = ", ".join(f"'{member.value}'" for member in kind)
    return CheckConstraint(f"{column} IN ({values})", name=column)


class _JobColumns(TypedColumns):
    id: Named[int] = Column(Integer, primary_key=True)
    created_at: Named[float] = Column(Double)
    started_at: Named[float | None] = Column(Double)  # the first claim
    finished_at: Named[float | None] = Column(Double)
    loaded_at: Named[float] = Column(Double)  # when the last rows arrived: tells a dead enqueue from a slow one
    state: Named[JobState] = Column(_state(JobState))
    visible: Named[bool] = Column(Boolean)  # false while loaded or pruned: no query shows it
    model: Named[str] = Column(Text)  # absolute path, or name
    task: Named[str] = Column(Text)
    params: Named[dict[str, Any]] = Column(JsonText)
    seed: Named[int] = Column(BigInteger)
    priority: Named[int] = Column(Integer)  # higher first
    queue: Named[str] = Column(Text)
    num_requests: Named[int] = Column(Integer)
    num_done: Named[int] = Column(Integer)  # = outputs that are ok
    num_failed: Named[int] = Column(Integer)  # = outputs that are errors
    prompt_tokens: Named[int] = Column(BigInteger)  # sums over the outputs
    generated_tokens: Named[int] = Column(BigInteger)
    message: Named[str | None] = Column(MessageText)  # why the whole job failed
    plan: Named[dict[str, Any] | None] = Column(JsonText)  # what its rows were last computed under
    name: Named[str | None] = Column(MessageText)  # what its owner calls it
    origin: Named[dict[str, Any] | None] = Column(JsonText)  # what its rows were made from, for people: see `jobs.Job`
    exact: Named[bool] = Column(Boolean, server_default=false())  # only for workers that round nothing to four bits


jobs = Table("jobs", metadata, _JobColumns, _one_of("state", JobState), sqlite_autoincrement=True)
Index(None, jobs.c.queue, jobs.c.state)


class _WorkerColumns(TypedColumns):
    # A row a process, never used again: its id is what fences a writer that was thought dead.
    id: Named[int] = Column(Integer, primary_key=True)
    hostname: Named[str] = Column(Text)
    pid: Named[int] = Column(Integer)
    queue: Named[str] = Column(Text)
    device: Named[str] = Column(Text)
    model: Named[str | None] = Column(Text)  # what it holds in memory
    started_at: Named[float] = Column(Double)
    heartbeat_at: Named[float] = Column(Double)
    lease_until: Named[float] = Column(Double)
    stopped_at: Named[float | None] = Column(Double)  # set once; after that the worker can neither claim nor record
    state: Named[str] = Column(Text)  # free text for people, "stopped" or "expired" at the end
    process: Named[str | None] = Column(Text)  # tells this process from a later one of the same number
    message: Named[str | None] = Column(MessageText)  # what it waits for, or leaves alone, and why
    retry_at: Named[float | None] = Column(Double)  # when it tries again what it leaves alone


workers = Table("workers", metadata, _WorkerColumns, sqlite_autoincrement=True)


class _RequestColumns(TypedColumns):
    job_id: Named[int] = Column(Integer, ForeignKey("jobs.id"), primary_key=True, autoincrement=False)
    index: Named[int] = Column(Integer, primary_key=True, autoincrement=False)
    row_id: Named[Any] = Column(JsonText, nullable=True)  # the dataset's own name of the row
    payload: Named[dict[str, Any] | None] = Column(JsonText)  # null: refused at enqueue, it can never run
    state: Named[RequestState] = Column(_state(RequestState))
    worker_id: Named[int | None] = Column(Integer, ForeignKey("workers.id"))
    attempt: Named[int] = Column(Integer)  # one more at each claim: the epoch of the claim
    crashes: Named[int] = Column(Integer, server_default="0")  # how many processes died while the row was in a pass
    crash_group: Named[int | None] = Column(Integer)  # runs apart, with the rows of its group: see `storage.crashes`


requests = Table(
    "requests",
    metadata,
    _RequestColumns,
    _one_of("state", RequestState),
    CheckConstraint("(state = 'claimed') = (worker_id IS NOT NULL)", name="claimed_by_one"),
)
Index(None, requests.c.job_id, requests.c.state, requests.c.index)
# Partial where it matters; naming PostgreSQL's twin of this option would import its dialect (50 ms) everywhere.
Index(None, requests.c.worker_id, sqlite_where=requests.c.worker_id.is_not(None))
Index(None, requests.c.crash_group, sqlite_where=requests.c.crash_group.is_not(None))


class _OutputColumns(TypedColumns):
    job_id: Named[int] = Column(Integer, primary_key=True, autoincrement=False)
    index: Named[int] = Column(Integer, primary_key=True, autoincrement=False)
    status: Named[OutputStatus] = Column(_state(OutputStatus))
    output: Named[dict[str, Any] | None] = Column(JsonText)
    error_code: Named[str | None] = Column(MessageText)
    error_message: Named[str | None] = Column(MessageText)
    prompt_tokens: Named[int] = Column(BigInteger)
    completion_tokens: Named[int] = Column(BigInteger)
    finished_at: Named[float] = Column(Double)


outputs = Table(
    "outputs",
    metadata,
    _OutputColumns,
    ForeignKeyConstraint(["job_id", "index"], ["requests.job_id", "requests.index"]),
    _one_of("status", OutputStatus),
    CheckConstraint("(status = 'error') = (error_code IS NOT NULL)", name="error_has_code"),
)


class _PassColumns(TypedColumns):
    # One row a commit of outputs: sums over the engine's passes since the row before.
    id: Named[int] = Column(Integer, primary_key=True)
    worker_id: Named[int] = Column(Integer, ForeignKey("workers.id"))
    model: Named[str] = Column(Text)
    job_ids: Named[list[int]] = Column(JsonText)
    started_at: Named[float] = Column(Double)
    num_passes: Named[int] = Column(Integer)
    seconds: Named[float] = Column(Double)
    prefill_tokens: Named[int] = Column(BigInteger)
    decode_tokens: Named[int] = Column(BigInteger)
    weight_bytes: Named[int] = Column(BigInteger)
    lane_bytes: Named[dict[str, int]] = Column(JsonText)
    lane_seconds: Named[dict[str, float]] = Column(JsonText)


passes = Table("passes", metadata, _PassColumns)


class _FaultColumns(TypedColumns):
    # Why one machine leaves one model alone for a while; gone once the model has worked there.
    machine: Named[str] = Column(Text, primary_key=True)  # as workers.hostname
    model: Named[str] = Column(Text, primary_key=True)  # as jobs.model
    kind: Named[str] = Column(Text, primary_key=True)  # what was done: each has a history of its own
    count: Named[int] = Column(Integer)  # faults in a row
    message: Named[str] = Column(MessageText)
    happened_at: Named[float] = Column(Double)
    retry_at: Named[float] = Column(Double)


faults = Table("faults", metadata, _FaultColumns)

# Alembic's own table, declared here so that opening a database needs no Alembic; it is not part of `metadata`.
alembic_version = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
