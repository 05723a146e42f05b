"""Whether one row keeps to the limits: its number of fields, and its id."""

import json
from collections.abc import Mapping

from cli.nesting import value_is_deeper
from cli.templates import RowFault
from worker.limits import Limits


def check_fields(fields: Mapping[str, object], limits: Limits) -> None:
    """Refuses a row of too many fields.

    Raises:
        RowFault: names the limit.
    """
    if len(fields) > limits.row_fields:
        raise RowFault("over_limit", f"the row has {len(fields):,} fields: {limits.told('row_fields')}")


def checked_id(fields: Mapping[str, object], limits: Limits) -> object:
    """The row's id, any JSON value of moderate size; None where there is none.

    Raises:
        RowFault: it is nested too deep or too long to be carried along.
    """
    row_id = fields.get("id")
    if row_id is None:
        return None
    if value_is_deeper(row_id, limits.id_depth):
        raise RowFault("bad_id", f"the field 'id' is nested too deep: {limits.told('id_depth')}")
    if len(json.dumps(row_id, ensure_ascii=False).encode()) > limits.id_bytes:
        raise RowFault("bad_id", f"the field 'id' is too long: {limits.told('id_bytes')}")
    return row_id
