import logging

from worker.logs import SentenceFormatter, get_logger


def record(message: str, *, error: Exception | None = None, **fields: object) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    made = logging.LogRecord("overnight", logging.INFO, "f.py", 1, message, (), info)
    made.created = 0.0
    made.__dict__.update(fields)
    return made


def test_a_line_is_a_sentence_and_its_fields() -> None:
    line = SentenceFormatter(tracebacks=False).format(record("gave back 3 rows", action="give_back", job=7, worker=2))

    assert line == "1970-01-01T00:00:00Z INFO gave back 3 rows action=give_back job=7 worker=2"


def test_a_traceback_is_for_those_who_asked() -> None:
    try:
        raise ValueError("nothing there")
    except ValueError as error:
        failure = record("it failed", error=error)

    assert "Traceback" not in SentenceFormatter(tracebacks=False).format(failure)
    assert "ValueError: nothing there" in SentenceFormatter(tracebacks=True).format(failure)


def test_a_line_stays_one_line() -> None:
    assert "\n" not in SentenceFormatter(tracebacks=False).format(record("two\nlines"))


def test_no_control_character_reaches_a_terminal_and_no_password_a_log() -> None:
    text = "cannot reach redis+socket:///r.sock?password=secret: \x1b[2J\x9b1m \u202eod\udc80"
    try:
        raise ValueError("redis://:secret@h \x1b[31m")
    except ValueError as error:
        line = SentenceFormatter(tracebacks=True).format(record(text, error=error, model="m\x07"))

    assert "secret" not in line
    assert r"\u001b[2J\u009b1m \u202eod\udc80 model=m\u0007" in line
    assert r"ValueError: redis://:***@h \u001b[31m" in line
    assert not [char for char in line if char in "\x1b\x9b\u202e\x07"]


def test_bound_fields_are_on_every_line_and_the_calls_own_win() -> None:
    logger = get_logger({"worker": 1, "job": 2})

    _, kwargs = logger.process("x", {"extra": {"job": 3, "action": "a"}})

    assert kwargs["extra"] == {"worker": 1, "job": 3, "action": "a"}
