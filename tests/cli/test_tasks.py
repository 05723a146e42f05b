from collections.abc import Iterable

import pytest

from cli.datasets import BadLine, Row
from cli.errors import DatasetFault
from cli.tasks import TaskSpec, requests, split_choices
from cli.templates import PromptTemplate
from storage.jobs import NewRequest


def spec(task: str, choices: tuple[str, ...] = ()) -> TaskSpec:
    return TaskSpec(task, PromptTemplate("{{ prompt }}"), choices)


def made(task: TaskSpec, rows: Iterable[Row | BadLine], *, keep_going: bool = False) -> list[NewRequest]:
    return list(requests(iter(rows), task, label="d.jsonl", keep_going=keep_going))


def test_each_task_stores_what_the_worker_reads() -> None:
    fields: dict[str, object] = {"id": "a", "prompt": "p", "continuation": " c", "choices": ["x ", " y"]}
    payloads = [made(spec(task), [Row(1, fields)])[0].payload for task in ("generate", "score", "choose")]
    assert payloads == [
        {"prompt": "p"},
        {"context": "p", "continuation": " c"},
        {"prompt": "p", "choices": ["x ", " y"]},
    ]


def test_choices_of_the_command_line_go_before_the_rows_own() -> None:
    fields: dict[str, object] = {"prompt": "p", "choices": ["x", "y"]}
    assert made(spec("choose", ("a", "b")), [Row(1, fields)])[0].payload == {"prompt": "p", "choices": ["a", "b"]}


def test_a_row_id_may_be_any_value_and_may_be_absent() -> None:
    rows = [Row(1, {"prompt": "p", "id": {"n": 1}}), Row(2, {"prompt": "p"})]
    assert [(r.index, r.row_id) for r in made(spec("generate"), rows)] == [(0, {"n": 1}), (1, None)]


def test_choices_are_split_at_commas_without_the_spaces_around() -> None:
    assert split_choices("positive, very negative ") == ("positive", "very negative")


@pytest.mark.parametrize(("text", "word"), [("a", "only one"), ("a,,b", "empty"), ("a,b,a", "twice"), (" ,b", "empty")])
def test_choices_that_cannot_decide_anything_are_refused(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        split_choices(text)


@pytest.mark.parametrize(
    ("task", "fields", "code", "word"),
    [
        ("generate", {}, "missing_field", "'prompt'"),
        ("score", {"prompt": "p"}, "missing_field", "'continuation'"),
        ("score", {"prompt": "p", "continuation": 5}, "bad_field", "not text"),
        ("choose", {"prompt": "p"}, "missing_field", "--choices"),
        ("choose", {"prompt": "p", "choices": ["a"]}, "bad_field", "only one"),
        ("choose", {"prompt": "p", "choices": [1, 2]}, "bad_field", "list of texts"),
        ("choose", {"prompt": "p", "choices": {}}, "bad_field", "list of texts"),
    ],
)
def test_the_content_of_a_row_refuses_the_first_and_marks_a_later_one(
    task: str, fields: dict[str, object], code: str, word: str
) -> None:
    good: dict[str, object] = {"prompt": "p", "continuation": "c", "choices": "a,b"}
    bad = {"id": 9, **fields}
    with pytest.raises(DatasetFault, match=r"row 0 \(line 4\)"):
        made(spec(task), [Row(4, bad), Row(5, good)])
    later = made(spec(task), [Row(4, good), Row(5, bad)])[1]
    assert later.payload is None
    assert later.row_id == 9
    assert later.error is not None
    assert later.error[0] == code
    assert "row 1 (line 5)" in later.error[1]
    assert word in later.error[1]
    assert made(spec(task), [Row(4, bad)], keep_going=True)[0].error is not None


def test_a_bad_line_refuses_everything_unless_it_may_be_an_error_row() -> None:
    rows: list[Row | BadLine] = [Row(1, {"prompt": "p"}), BadLine(2, "it is broken"), Row(3, {"prompt": "q"})]
    with pytest.raises(DatasetFault, match=r"d\.jsonl, line 2: it is broken.*--keep-going"):
        made(spec("generate"), rows)
    kept = made(spec("generate"), rows, keep_going=True)
    assert [request.index for request in kept] == [0, 1, 2]
    assert kept[1].error == ("bad_line", "line 2: it is broken")
