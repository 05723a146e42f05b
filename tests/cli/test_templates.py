from pathlib import Path

import pytest

from cli.errors import FileAbsent, TemplateFault
from cli.templates import PromptTemplate, RowFault, read_template


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
