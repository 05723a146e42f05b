"""Jobs that are only for workers that round nothing to four bits."""

from typing import Literal

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; jobs of before never asked for that."""
    # SQLite alone can, and must, rebuild a table so that it looks as if it had been made this way.
    rebuild: Literal["always", "never"] = "always" if op.get_bind().dialect.name == "sqlite" else "never"
    with op.batch_alter_table("jobs", recreate=rebuild, table_kwargs={"sqlite_autoincrement": True}) as batch:
        batch.add_column(sa.Column("exact", sa.Boolean(), server_default=sa.false(), nullable=False))
