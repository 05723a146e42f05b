"""The plan that a job's rows were computed under."""

from typing import Literal

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; jobs of earlier versions have none."""
    # SQLite alone can, and must, rebuild a table so that it looks as if it had been made this way.
    rebuild: Literal["always", "never"] = "always" if op.get_bind().dialect.name == "sqlite" else "never"
    with op.batch_alter_table("jobs", recreate=rebuild, table_kwargs={"sqlite_autoincrement": True}) as batch:
        batch.add_column(sa.Column("plan", sa.Text(), nullable=True))
