"""How deep JSON is nested, found without recursion: Python's own reader and writer of JSON recurse."""

import re

_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
"""A string, closed or not, or a bracket; each byte is looked at once."""


def text_is_deeper(text: bytes, most: int) -> bool:
    """Whether lists and objects lie in each other more than ``most`` deep, as far as the text is JSON."""
    if text.count(b"[") + text.count(b"{") <= most:
        return False
    depth = 0
    for token in _TOKEN.finditer(text):
        first = token[0][:1]
        if first in b"[{":
            depth += 1
            if depth > most:
                return True
        elif first in b"]}":
            depth -= 1
    return False


def value_is_deeper(value: object, most: int) -> bool:
    """The same of a value that was read."""
    level = [value]
    for _ in range(most):
        level = [child for each in level for child in _children(each)]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
