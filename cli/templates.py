"""Prompt templates: sandboxed, strict Jinja2 over the fields of a row.

A field that a row lacks, or has as null, is an error instead of an empty or "None" prompt; `{{ x or "" }}` says that
absence is meant.
"""

from pathlib import Path

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cli.errors import FileAbsent, TemplateFault

DEFAULT = "{{ prompt }}"


class RowFault(Exception):
    """One row cannot be made into a request; becomes an error row."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        """`missing_field`, `bad_field` or `template_error`."""


class _Missing(StrictUndefined):
    """Speaks of the row's field instead of Python's objects."""

    @property
    def _undefined_message(self) -> str:
        return str(self._undefined_name)


class _NullField(Exception):
    """The template printed a null."""


def _refuse_null(value: object) -> object:
    if value is None:
        raise _NullField
    return value


def read_template(text: str) -> str:
    """``@FILE`` as the file's text without the line end that an editor puts at its end; anything else as it is.

    Raises:
        FileAbsent, TemplateFault: there is no such file, or it cannot be read as UTF-8.
    """
    if not text.startswith("@"):
        return text
    path = Path(text[1:])
    try:
        return _without_line_end(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise FileAbsent(f"there is no template file {path} (--prompt {text})") from None
    except UnicodeDecodeError:
        raise TemplateFault(f"the template file {path} is not UTF-8 text; convert it first") from None
    except OSError as error:
        raise TemplateFault(f"the template file {path} cannot be read: {error.strerror}") from error


def _without_line_end(text: str) -> str:
    """Without one; more of them are meant."""
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


class PromptTemplate:
    """A compiled template."""

    def __init__(self, source: str) -> None:
        """Compiles the template.

        Raises:
            TemplateFault: a syntax error, with its line.
        """
        environment = ImmutableSandboxedEnvironment(
            undefined=_Missing, keep_trailing_newline=True, autoescape=False, finalize=_refuse_null
        )
        try:
            self._names = meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise TemplateFault(
                f"the prompt template has an error in its line {error.lineno}: {error.message}"
            ) from None
        except TemplateError as error:
            raise TemplateFault(f"the prompt template cannot be used: {error}") from None

    def render(self, fields: dict[str, object]) -> str:
        """The prompt of one row; the whole row is also there as ``row``.

        Raises:
            RowFault: names the field that is missing or null, or says how the template failed.
        """
        try:
            text = self._template.render({"row": fields, **fields})
            text.encode()
        except UndefinedError as error:
            there = ", ".join(map(str, fields)) or "none"
            raise RowFault("missing_field", f"no field {error.message!r} for the template; there: {there}") from None
        except _NullField:
            null = sorted(name for name in self._names if name in fields and fields[name] is None)
            what = f"the field {null[0]!r} is null" if null else "the template prints a null"
            raise RowFault("missing_field", f"{what}; give it a value, or write {{{{ … or '' }}}}") from None
        except UnicodeEncodeError:
            raise RowFault(
                "template_error", "the prompt holds half of a surrogate pair, which is no character"
            ) from None
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise RowFault("template_error", f"the template fails: {error}") from None
        except (RecursionError, MemoryError):
            raise RowFault("template_error", "the template fails: it grows without end") from None
        return text
