"""How to start a Redis, as one command: for this machine alone, leaving no file behind."""

from urllib.parse import urlsplit

_HERE = ("127.0.0.1", "localhost")
_DEFAULT_PORT = 6379


def start_command(redis_url: str) -> str | None:
    """A command that starts a Redis at ``redis_url``; None where it is elsewhere, or needs more than that."""
    try:
        parts = urlsplit(redis_url)
        port = parts.port or _DEFAULT_PORT
    except ValueError:
        return None
    if parts.scheme != "redis" or parts.hostname not in _HERE or parts.password or parts.query:
        return None
    elsewhere = "" if port == _DEFAULT_PORT else f" --port {port}"
    return f"redis-server --daemonize yes --bind 127.0.0.1 --save ''{elsewhere}"
