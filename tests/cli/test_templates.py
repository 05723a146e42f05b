import gc
import os
import resource
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cli.errors import FileAbsent, TemplateFault
from cli.sandbox import Bounds, OutOfTime
from cli.templates import PromptTemplate, RowFault, read_template
from tests.alone import alone
from worker.limits import Limits

BRIEF = Limits(render_s=0.2)


def fault_of(template: str, **fields: object) -> RowFault:
    with pytest.raises(RowFault) as caught:
        PromptTemplate(template).render(fields)
    return caught.value


@pytest.mark.parametrize(
    ("template", "fields", "prompt"),
    [
        ("{{ prompt }}", {"prompt": "a"}, "a"),
        ("Review: {{ text }}\n", {"text": "<b>&"}, "Review: <b>&\n"),
        ("{{ row['two words'] }}", {"two words": "x"}, "x"),
        ("{{ note or '' }}{{ gone | default('-') }}", {"note": None}, "-"),
        ("{% for c in items %}{{ c }};{% endfor %}", {"items": [1, "b"]}, "1;b;"),
        ("{{ meta.title }}", {"meta": {"title": "t"}}, "t"),
        ("no field at all", {}, "no field at all"),
    ],
)
def test_a_template_sees_the_fields_and_keeps_every_character(
    template: str, fields: dict[str, object], prompt: str
) -> None:
    assert PromptTemplate(template).render(fields) == prompt


@pytest.mark.parametrize(
    "template", ["{{ text }}", "{{ text | upper }}", "{% if text %}x{% endif %}", "{{ row['text'] }}"]
)
def test_a_missing_field_is_named_with_those_that_are_there(template: str) -> None:
    fault = fault_of(template, id=1, body="b")
    assert fault.code == "missing_field"
    assert "'text'" in str(fault)
    assert "id, body" in str(fault)


def test_a_null_never_becomes_the_word_none() -> None:
    fault = fault_of("Review: {{ text }}", text=None)
    assert fault.code == "missing_field"
    assert "'text' is null" in str(fault)


@pytest.mark.parametrize(
    "template",
    [
        "{{ x + 1 }}",
        "{{ 1 / 0 }}",
        "{{ x.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{{ items.append(1) }}",
        "{{ '\ud800' }}".encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass"),
    ],
)
def test_a_template_that_fails_or_reaches_out_of_the_sandbox_is_the_rows_fault(template: str) -> None:
    assert fault_of(template, x="text", items=[]).code in ("template_error", "missing_field")


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(TemplateFault, match="line 2"):
        PromptTemplate("fine\n{{ broken")


def test_an_unknown_filter_is_refused_before_any_row() -> None:
    with pytest.raises(TemplateFault, match="shout"):
        PromptTemplate("{{ text | shout }}")


@pytest.mark.parametrize(
    ("content", "template"),
    [
        ("\ufeffé {{ text }}", "é {{ text }}"),
        ("a\n", "a"),
        ("a\r\n", "a"),
        ("a\n\n", "a\n"),
        ("a\r\n\r\n", "a\r\n"),
        ("a\n ", "a\n "),
        ("a\r", "a\r"),
        ("\n", ""),
    ],
)
def test_one_line_end_at_the_end_of_a_template_file_is_no_part_of_it(
    tmp_path: Path, content: str, template: str
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(content.encode())
    assert read_template(f"@{path}") == template


def test_a_template_on_the_command_line_is_taken_as_it_is() -> None:
    assert read_template("plain @ text\n") == "plain @ text\n"


def test_a_template_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileAbsent, match="none"):
        read_template(f"@{tmp_path / 'none'}")
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(TemplateFault, match="UTF-8"):
        read_template(f"@{tmp_path / 'latin'}")
    with pytest.raises(TemplateFault, match="cannot be read"):
        read_template(f"@{tmp_path}")


SLOW = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{{ ([[1]] * 99999) | sum(start=[]) | length }}",
    "{{ lipsum(n=99999) }}",
]
"""Templates that would compute for minutes, or for ever."""


@pytest.mark.parametrize("template", SLOW)
def test_a_template_that_takes_too_long_is_stopped_and_names_the_limit(template: str) -> None:
    before = time.process_time()
    with pytest.raises((RowFault, TemplateFault), match=r"takes too long: the limit is 0\.2 s \(OVERNIGHT_RENDER_S"):
        PromptTemplate(template, BRIEF).render({})
    assert time.process_time() - before < 2


@pytest.mark.parametrize("template", ["{{ range(9999) | batch(1) | list | length }}", SLOW[2]])
def test_nobody_elses_garbage_is_collected_meanwhile(template: str) -> None:
    """A finalizer would swallow what ends a template, and be left half done by it."""
    collected: list[str] = []
    gc.callbacks.append(lambda phase, _: collected.append(phase) if phase == "start" else None)
    try:
        prompt = PromptTemplate(template, BRIEF)
        gc.collect()
        collected.clear()
        with suppress(RowFault, TemplateFault):
            prompt.render({})
        assert collected == []
    finally:
        gc.callbacks.pop()
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 1100000000 }}", "more than 1,048,576 parts"),
        ("{{ 1100000000 * [0] }}", "more than 1,048,576 parts"),
        ("{{ 10 ** 5000 }}", "more than 4,300 digits"),
        ("{{ 10 ** (10 ** 10) }}", "more than 4,300 digits"),
        ("{% set n = namespace(x=10) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}", "4,300 digits"),
        (
            "{% for i in range(99999) %}{{ long }}{% endfor %}",
            "the prompt is too long: the limit is 1.0 MiB (OVERNIGHT_PROMPT",
        ),
        ("{{ 'é' * 600000 }}", "the prompt is too long"),
        ("{{ long | truncate(-1) }}", "the template fails: expected length"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{% include 'x' %}", "the template fails: "),
    ],
)
def test_a_template_that_takes_too_much_fails_at_once_with_its_reason(template: str, reason: str) -> None:
    check_refused(template, reason)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' | center(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'x'.ljust(size) }}",
        "{{ (long | replace('x', long)) | length }}",
        "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    ],
)
@alone
def test_a_template_that_takes_too_much_memory_fails_at_once(template: str) -> None:
    check_refused(template, "more memory than 256.0 MiB")


def check_refused(template: str, reason: str) -> None:
    before = time.process_time()
    fault = fault_of(template, long="x" * 100_000, size=10**9)
    assert fault.code == "template_error"
    assert reason in str(fault)
    assert time.process_time() - before < 2


def test_moderate_sums_products_and_powers_are_as_ever() -> None:
    template = "{{ 2 ** 10 }} {{ 'ab' * 3 }} {{ 3 * [1] }} {{ 1.5 * 2 }} {{ 2 ** -1 }} {{ -2 * 'x' }} {{ n * 2 }}"
    assert PromptTemplate(template).render({"n": 4}) == "1024 ababab [1, 1, 1] 3.0 0.5  8"
    assert (
        PromptTemplate("{{ [1, 2] | sum }} {{ x | sum('a', 10) }} {{ [] | sum }}").render({"x": [{"a": 1}, {"a": 2}]})
        == "3 13 0"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{{ " + "[" * 200 + "]" * 200 + " }}",
        "{% if 1 %}" * 300 + "{% endif %}" * 300,
        "{{ " + "not " * 5000 + "1 }}",
    ],
)
def test_a_template_that_is_nested_too_deep_is_one_sentence(template: str) -> None:
    with pytest.raises(TemplateFault, match="nested too deep"):
        PromptTemplate(template)


@alone
def test_what_is_computed_as_a_template_is_compiled_is_bounded_too() -> None:
    with pytest.raises(TemplateFault, match="nested too deep"):
        PromptTemplate("{{ 'x' | center(120000000) }}")


@alone
def test_bounds_leave_signals_timers_and_limits_as_they_were() -> None:
    def state() -> tuple[object, ...]:
        handler = signal.getsignal(signal.SIGPROF)
        return handler, signal.getitimer(signal.ITIMER_PROF), resource.getrlimit(resource.RLIMIT_AS)

    def endless() -> None:
        while True:
            pass

    before = state()
    bounds = Bounds(seconds=0.05, memory=1 << 28)
    assert bounds.run(lambda: 7) == 7
    assert state() == before
    with pytest.raises(OutOfTime):
        bounds.run(endless)
    assert state() == before
    with pytest.raises(MemoryError):
        bounds.run(lambda: bytearray(1 << 30))
    assert state() == before
    with pytest.raises(OutOfTime):
        Bounds(seconds=1e-6, memory=1 << 28).run(endless)
    assert state() == before
    assert len(bytearray(1 << 29)) == 1 << 29, "no template of before has left its limit"


@alone
def test_a_process_that_grows_by_itself_takes_nothing_from_its_templates() -> None:
    bounds = Bounds(seconds=2, memory=1 << 28)
    assert bounds.run(lambda: len(bytearray(1 << 27))) == 1 << 27
    grown = bytearray(1 << 29)
    assert bounds.run(lambda: len(bytearray(1 << 27))) == 1 << 27
    with pytest.raises(MemoryError):
        bounds.run(lambda: bytearray(len(grown)))


def test_an_exception_that_the_template_drops_does_not_stop_the_clock() -> None:
    def deaf() -> None:
        while True:
            try:
                while True:
                    pass
            except BaseException as error:
                if time.process_time() > deadline:
                    raise error from None

    deadline = time.process_time() + 0.3
    with pytest.raises(OutOfTime):
        Bounds(seconds=0.05, memory=1 << 28).run(deaf)


def test_other_threads_render_within_the_memory_limit_alone() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(PromptTemplate("{{ x }}").render({"x": "y"})))
    thread.start()
    thread.join()
    assert found == ["y"]


def test_a_template_file_is_a_regular_file_of_moderate_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(TemplateFault, match="is not a regular file"):
            read_template(f"@{name}")
    (tmp_path / "long").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(TemplateFault, match="more than 1024 KiB; shorten it"):
        read_template(f"@{tmp_path / 'long'}")


def test_a_row_of_many_fields_does_not_fill_a_message() -> None:
    fault = fault_of("{{ text }}", **{f"field{i}": 1 for i in range(5000)})
    assert len(str(fault)) < 300
