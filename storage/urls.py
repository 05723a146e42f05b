"""URLs as they may be shown: no password in them, whatever form they have; and errors that may quote a URL."""

import re
from urllib.parse import unquote_plus

HIDDEN = "***"

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)", re.DOTALL
)
_BARE = re.compile(r"[A-Za-z0-9_./-]*(:\d+)?(/\d*)?")
_HOST = re.compile(r"([A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]*\])(:\d+)?")
_PLAIN = re.compile(r"(db|virtual_host|timeout)=\d{1,9}")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")


def without_password(url: str) -> str:
    """``url`` as it may be shown: whatever could be a password in it is replaced by ``***``. Never raises.

    Shown are the scheme, a user that is set apart from its password, the host, the path, and harmless numbers of the
    query. Where what should be the host is none, or an ``@`` stands behind it, a password may have been cut by a ``/``
    or a ``?`` of its own: then nothing behind the scheme is shown.
    """
    match = _URL.fullmatch(url)
    if match is None:
        return url if _BARE.fullmatch(url) else HIDDEN
    if _is_unclear(match):
        return f"{match['scheme']}://{HIDDEN}"
    userinfo, at, host = match["authority"].rpartition("@")
    user, colon, _ = userinfo.partition(":")
    shown = f"{user}:{HIDDEN}@" if colon else f"{HIDDEN}@" if at else ""
    return f"{match['scheme']}://{shown}{host}{match['path']}{_without_values(match['rest'])}"


def hide_passwords(text: str) -> str:
    """A text of somebody else's that may quote URLs, such as a log line: each of them without its password."""
    return _IN_TEXT.sub(lambda match: without_password(match[0]), text) if "://" in text else text


def shown_error(error: BaseException, url: str) -> str:
    """What a library said of ``url``; only the kind of the error where its text holds a part that must not be shown."""
    text = str(error).strip()
    hidden = [form for part in _hidden_parts(url) for form in (part, unquote_plus(part))]
    pieces = {piece for form in hidden for piece in (form, *re.split(r"[\s/?#@:&=]+", form)) if piece}
    return text if text and not any(piece in text for piece in pieces) else type(error).__name__


def _is_unclear(url: re.Match[str]) -> bool:
    host = url["authority"].rpartition("@")[2]
    return "@" in url["path"] or "@" in url["rest"] or not _HOST.fullmatch(host)


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
    if _is_unclear(match):
        return [match["authority"] + match["path"] + match["rest"]]
    userinfo = match["authority"].rpartition("@")[0]
    pairs = [pair for pair in re.split("[?#&]", match["rest"]) if not _PLAIN.fullmatch(pair)]
    return [userinfo.partition(":")[2] or userinfo, *(pair.partition("=")[2] or pair for pair in pairs)]
