"""Alembic's revisions of the schema, inside the package so that an installed wheel can upgrade its database.

Importing this imports Alembic; `storage.database` does so only when the schema is old.
A developer makes a revision with Alembic's `revision` command on `config()`, and adds its name to `schema.REVISIONS`.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection


def config() -> Config:
    """Alembic's configuration without an ini file."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return made


def upgrade(connection: Connection, to: str = "head", *, using: Config | None = None) -> None:
    """Upgrade the schema to `to` within the transaction that `connection` is in: all revisions, or none."""
    made = using or config()
    made.attributes["connection"] = connection
    command.upgrade(made, to)
