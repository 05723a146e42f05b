"""JSON that is always valid, also of what a database of an earlier version may hold."""

import json


def json_text(value: object, *, indent: int | None = None) -> str:
    """``value`` as JSON, its characters as they are; a NaN or an infinity, which JSON does not have, by its name."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        named = json.loads(json.dumps(value), parse_constant=str)
        return json.dumps(named, ensure_ascii=False, allow_nan=False, indent=indent)
