"""SQL that differs between SQLite and PostgreSQL."""

from sqlalchemy import Connection, Insert, Table, func, select


def insert_once(connection: Connection, table: Table) -> Insert:
    """INSERT .. ON CONFLICT DO NOTHING, in the database's own words."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as postgresql_insert

        return postgresql_insert(table).on_conflict_do_nothing()
    from sqlalchemy.dialects.sqlite import insert as sqlite_insert

    return sqlite_insert(table).on_conflict_do_nothing()


def one_at_a_time(connection: Connection, what: int) -> None:
    """Within a write transaction: nobody else is past this call with the same number until it ends.

    SQLite's write lock already lets only one in; PostgreSQL needs to be asked.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(what)))
