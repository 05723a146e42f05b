"""Prompt templates: sandboxed, strict Jinja2 over the fields of a row.

A field that a row lacks, or has as null, is an error instead of an empty or "None" prompt; `{{ x or "" }}` says that
absence is meant.
"""

import re
from pathlib import Path

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError, meta

from cli.display import some_of
from cli.errors import FileAbsent, TemplateFault
from cli.sandbox import Bounds, OutOfTime, SandboxEnvironment
from cli.sources import Unreadable, read_small
from engine.units import MIB, format_bytes
from worker.limits import DEFAULT_LIMITS, Limits

DEFAULT = "{{ prompt }}"
_MOST_SOURCE_BYTES = MIB
_LEAST_MEMORY = 256 * MIB
"""What a template may take while it is rendered, or 16 times the longest prompt, if that is more."""
_DEEPEST = 90
"""Brackets and blocks within each other."""
_TOLD = 200
"""Characters of a library's sentence; it may quote a row."""


class RowFault(Exception):
    """One row cannot be made into a request; becomes an error row."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        """`missing_field`, `bad_field` or `template_error`; or `over_limit`, `bad_id`."""

    @property
    def is_of_one_row(self) -> bool:
        """Whether other rows may well be without it: what is above a limit says nothing of them."""
        return self.code in ("over_limit", "bad_id")


class _Missing(StrictUndefined):
    """Speaks of the row's field instead of Python's objects."""

    @property
    def _undefined_message(self) -> str:
        return str(self._undefined_name)


class _TooLong(Exception):
    """The prompt is longer than it may be."""


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
        return _without_line_end(read_small(path, most=_MOST_SOURCE_BYTES).decode("utf-8-sig"))
    except FileNotFoundError:
        raise FileAbsent(f"there is no template file {path} (--prompt {text})") from None
    except Unreadable as error:
        raise TemplateFault(f"the template file {path} {error}") from None
    except UnicodeDecodeError:
        raise TemplateFault(f"the template file {path} is not UTF-8 text; convert it first") from None
    except OSError as error:
        raise TemplateFault(f"the template file {path} cannot be read: {error.strerror}") from error


def _without_line_end(text: str) -> str:
    """Without one; more of them are meant."""
    return text.removesuffix("\r\n") if text.endswith("\r\n") else text.removesuffix("\n")


class PromptTemplate:
    """A compiled template."""

    def __init__(self, source: str, limits: Limits = DEFAULT_LIMITS) -> None:
        """Compiles the template.

        Raises:
            TemplateFault: a syntax error, with its line; or it is too deep, too large or too slow to compile.
        """
        self._limits = limits
        self._environment = SandboxEnvironment(
            most_items=limits.prompt_bytes,
            undefined=_Missing,
            keep_trailing_newline=True,
            autoescape=False,
            finalize=_refuse_null,
        )
        self._bounds = Bounds(seconds=limits.render_s, memory=max(_LEAST_MEMORY, 16 * limits.prompt_bytes))
        if _is_deep(source):
            raise TemplateFault("the prompt template is nested too deep, or too large; make it simpler")
        try:
            # Constant expressions are computed here already.
            self._names, self._template = self._bounds.run(lambda: self._compiled(source))
        except TemplateSyntaxError as error:
            raise TemplateFault(
                f"the prompt template has an error in its line {error.lineno}: {error.message}"
            ) from None
        except (RecursionError, SyntaxError, MemoryError):  # Python's compiler, too, has its limits
            raise TemplateFault("the prompt template is nested too deep, or too large; make it simpler") from None
        except OutOfTime:
            raise TemplateFault(f"the prompt template takes too long: {limits.told('render_s')}") from None
        except Exception as error:  # noqa: BLE001  whatever else it was, the template made it happen
            raise TemplateFault(f"the prompt template cannot be used: {_told(error)}") from None

    @property
    def names(self) -> frozenset[str]:
        """The fields that it reads, or ``row``."""
        return frozenset(self._names)

    def render(self, fields: dict[str, object]) -> str:
        """The prompt of one row; the whole row is also there as ``row``.

        Raises:
            RowFault: names the field that is missing or null, or says how the template failed.
        """
        try:
            return self._bounds.run(lambda: self._rendered(fields))
        except UndefinedError as error:
            missing = some_of([str(error.message)])
            raise RowFault(
                "missing_field", f"no field {missing!r} for the template; there: {some_of(fields)}"
            ) from None
        except _NullField:
            null = sorted(name for name in self._names if name in fields and fields[name] is None)
            what = f"the field {null[0]!r} is null" if null else "the template prints a null"
            raise RowFault("missing_field", f"{what}; give it a value, or write {{{{ … or '' }}}}") from None
        except UnicodeEncodeError:
            what = "the prompt holds half of a surrogate pair, which is no character"
        except _TooLong:
            what = f"the prompt is too long: {self._limits.told('prompt_bytes')}"
        except OutOfTime:
            what = f"the template takes too long: {self._limits.told('render_s')}"
        except RecursionError:
            what = "the template fails: it calls itself without end"
        except MemoryError:
            what = f"the template fails: it takes more memory than {format_bytes(self._bounds.memory)}"
        except Exception as error:  # noqa: BLE001  a template can call up any error of Python's
            what = f"the template fails: {_told(error)}"
        raise RowFault("template_error", what)

    def _compiled(self, source: str) -> tuple[set[str], Template]:
        names = meta.find_undeclared_variables(self._environment.parse(source))
        return names, self._environment.from_string(source)

    def _rendered(self, fields: dict[str, object]) -> str:
        pieces: list[str] = []
        length = 0
        for piece in self._template.generate({"row": fields, **fields}):
            pieces.append(piece)
            length += len(piece)
            if length > self._limits.prompt_bytes:
                raise _TooLong
        text = "".join(pieces)
        if len(text.encode()) > self._limits.prompt_bytes:
            raise _TooLong
        return text


def _is_deep(source: str) -> bool:
    """Whether its brackets or blocks are nested deeper than anybody means; a parser would run out of stack on them."""
    return _depth(re.findall(r"[][(){}]", source), "([{") > _DEEPEST or (
        _depth(re.findall(r"{%[-+]?\s*(end)?(?:if|for|macro|call|filter|with|block)\b", source), ("",)) > _DEEPEST
    )


def _depth(signs: list[str], opening: str | tuple[str, ...]) -> int:
    depth = deepest = 0
    for sign in signs:
        depth += 1 if sign in opening else -1
        deepest = max(deepest, depth)
    return deepest


def _told(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= _TOLD else f"{text[:_TOLD]}…"
