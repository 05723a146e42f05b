"""URLs as they may be shown: no password in them, whatever form they have; and errors that may quote a URL."""

import re
from urllib.parse import unquote_plus

HIDDEN = "***"

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)", re.DOTALL
)
_BARE = re.compile(r"[A-Za-z0-9_./-]*(:\d+)?(/\d*)?")
_HOST = re.compile(r"([A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]*\])(:\d*)?")
_PLAIN = re.compile(r"(db|virtual_host|timeout)=\d{1,9}")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")


def without_password(url: str) -> str:
    """``url`` as it may be shown: whatever could be a password in it is replaced by ``***``. Never raises.

    Shown are the scheme, a user that is set apart from its password, a host that is one, the path, and numbers in the
    query. Where an ``@`` stands behind the host it may belong to a password, so nothing behind the scheme is shown.
    """
    match = _URL.fullmatch(url)
    if match is None:
        return url if _BARE.fullmatch(url) else HIDDEN
    scheme, path, rest = match["scheme"], match["path"], match["rest"]
    if "@" in path or "@" in rest:
        return f"{scheme}://{HIDDEN}"
    userinfo, at, host = match["authority"].rpartition("@")
    user, colon, _ = userinfo.partition(":")
    shown = f"{user}:{HIDDEN}@" if colon else f"{HIDDEN}@" if at else ""
    return f"{scheme}://{shown}{host if _HOST.fullmatch(host) else HIDDEN}{path}{_without_values(rest)}"


def hide_passwords(text: str) -> str:
    """A text of somebody else's that may quote URLs, such as a log line: each of them without its password."""
    return _IN_TEXT.sub(lambda match: without_password(match[0]), text) if "://" in text else text


def shown_error(error: BaseException, url: str) -> str:
    """What a library said of ``url``; only the kind of the error where its text holds a part that must not be shown."""
    text = str(error).strip()
    hidden = [form for part in _hidden_parts(url) for form in (part, unquote_plus(part))]
    pieces = {piece for form in hidden for piece in (form, *re.split(r"[\s/?#@:&=]+", form)) if piece}
    return text if text and not any(piece in text for piece in pieces) else type(error).__name__


def _without_values(rest: str) -> str:
    """A query and a fragment: the names alone, with the values of those that are known to be harmless."""
    query, hash_sign, _ = rest.removeprefix("?").partition("#")
    shown = "&".join(map(_without_value, query.split("&")))
    return (f"?{shown}" if query else "") + (f"#{HIDDEN}" if hash_sign else "")


def _without_value(pair: str) -> str:
    name, equals, _ = pair.partition("=")
    if _PLAIN.fullmatch(pair):
        return pair
    return f"{name}={HIDDEN}" if equals and re.fullmatch(r"[a-z_]{1,40}", name) else HIDDEN


def _hidden_parts(url: str) -> list[str]:
    """The stretches of ``url`` that `without_password` leaves out."""
    match = _URL.fullmatch(url)
    if match is None:
        return [] if _BARE.fullmatch(url) else [url]
    if "@" in match["path"] or "@" in match["rest"]:
        return [match["authority"] + match["path"] + match["rest"]]
    userinfo, _, host = match["authority"].rpartition("@")
    pairs = [pair for pair in re.split("[?#&]", match["rest"]) if not _PLAIN.fullmatch(pair)]
    hidden = [userinfo.partition(":")[2] or userinfo, *(pair.partition("=")[2] or pair for pair in pairs)]
    return hidden if _HOST.fullmatch(host) else [*hidden, host]
