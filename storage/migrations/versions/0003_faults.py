"""Jobs with a name and an origin; rows that were in a crash; machines that leave a model alone."""

import json
from typing import Literal

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns and the table; where a job's rows came from moves out of its sampling parameters."""
    # SQLite alone can, and must, rebuild a table so that it looks as if it had been made this way.
    rebuild: Literal["always", "never"] = "always" if op.get_bind().dialect.name == "sqlite" else "never"
    with op.batch_alter_table("jobs", recreate=rebuild, table_kwargs={"sqlite_autoincrement": True}) as batch:
        batch.add_column(sa.Column("name", sa.Text(), nullable=True))
        batch.add_column(sa.Column("origin", sa.Text(), nullable=True))
    with op.batch_alter_table("workers", recreate=rebuild, table_kwargs={"sqlite_autoincrement": True}) as batch:
        batch.add_column(sa.Column("process", sa.Text(), nullable=True))
        batch.add_column(sa.Column("message", sa.Text(), nullable=True))
        batch.add_column(sa.Column("retry_at", sa.Double(), nullable=True))
    with op.batch_alter_table("requests", recreate=rebuild) as batch:
        batch.add_column(sa.Column("crashes", sa.Integer(), server_default="0", nullable=False))
        batch.add_column(sa.Column("crash_group", sa.Integer(), nullable=True))
    suspected = sa.text("crash_group IS NOT NULL")
    op.create_index("ix_requests_crash_group", "requests", ["crash_group"], sqlite_where=suspected)
    op.create_table(
        "faults",
        sa.Column("machine", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("happened_at", sa.Double(), nullable=False),
        sa.Column("retry_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("machine", "model", "kind", name="pk_faults"),
    )
    _move_origins(op.get_bind())


def _move_origins(connection: sa.Connection) -> None:
    jobs = sa.table("jobs", sa.column("id", sa.Integer), sa.column("params", sa.Text), sa.column("origin", sa.Text))
    for job_id, text in connection.execute(sa.select(jobs.c.id, jobs.c.params)).all():
        params = json.loads(text)
        if "dataset" in params:
            origin = {"dataset": params.pop("dataset")}
            values = {"params": json.dumps(params), "origin": json.dumps(origin)}
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(values))
