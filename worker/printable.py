"""Text of others as a terminal may see it."""

import re

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, keep: str = "") -> str:
    """``text`` with every character spelt out (``\\u001b``) that would command a terminal instead of being shown.

    These are control characters, line ends among them, those that turn the direction of writing, and halves of
    surrogate pairs; ``keep`` names those that are meant. Spelt out within JSON, they are the same JSON.
    """
    return _UNSAFE.sub(lambda match: match[0] if match[0] in keep else f"\\u{ord(match[0]):04x}", text)
