"""JSON that is always valid, also of what a database of an earlier version may hold."""

import json


def json_text(value: object, *, indent: int | None = None) -> str:
    """``value`` as JSON, its characters as they are; a NaN or an infinity, which JSON does not have, by its name."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        return json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def finite(value: object) -> object:
    """``value`` as it would be read back, with the name of each number that is none: ``"Infinity"``."""
    return json.loads(json.dumps(value), parse_constant=str)
