import time
from collections.abc import Iterable

import pytest

from cli.datasets import BadLine, Row
from cli.errors import DatasetFault
from cli.tasks import TaskSpec, requests, split_choices
from cli.templates import PromptTemplate
from storage.jobs import NewRequest
from worker.limits import Limits


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


DEEP: object = "x"
for _ in range(9):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"id": DEEP}, "bad_id", "'id' is nested too deep: the limit is 8 (OVERNIGHT_ID_DEPTH"),
        ({"id": "x" * 1023}, "bad_id", "'id' is too long: the limit is 1.0 KiB (OVERNIGHT_ID_BYTES"),
        ({"id": 10**1100}, "bad_id", "too long"),
        ({f"f{i}": 1 for i in range(1000)}, "over_limit", "1,001 fields: the limit is 1,000 (OVERNIGHT_ROW_FIELDS"),
        ({"choices": ["a"] * 1001}, "over_limit", "1,001 choices: the limit is 1,000 (OVERNIGHT_ROW_CHOICES"),
        ({"choices": "a," * 1000 + "b"}, "over_limit", "1,001 choices"),
    ],
)
def test_a_row_above_a_limit_is_an_error_row_wherever_it_stands(
    fields: dict[str, object], code: str, words: str
) -> None:
    good: dict[str, object] = {"prompt": "p", "choices": "a,b"}
    bad = {"prompt": "p", **fields}
    for rows in ([Row(1, bad), Row(2, good)], [Row(1, good), Row(2, bad)]):
        made_rows = made(spec("choose"), rows)
        (refused,) = [row for row in made_rows if row.error]
        assert refused.error is not None
        assert refused.error[0] == code
        assert words in refused.error[1]
        assert refused.row_id is None
        assert refused.payload is None


def test_what_is_at_a_limit_is_a_row() -> None:
    fields: dict[str, object] = {f"f{i}": 1 for i in range(997)}
    row = Row(1, {"id": "x" * 1022, "prompt": "p", "choices": [str(i) for i in range(1000)], **fields})
    assert made(spec("choose"), [row])[0].error is None
    assert isinstance(DEEP, list)
    assert made(spec("generate"), [Row(1, {"id": DEEP[0], "prompt": "p"})])[0].row_id == DEEP[0]


def test_choices_are_compared_in_time_in_proportion_to_their_number() -> None:
    many = TaskSpec("choose", PromptTemplate("p"), (), Limits(row_choices=10**6))
    choices: list[object] = [str(i) for i in range(200_000)]
    before = time.process_time()
    assert made(many, [Row(1, {"choices": choices})])[0].error is None
    (refused,) = made(many, [Row(1, {"choices": [*choices, "7"]})], keep_going=True)
    assert refused.error is not None
    assert "the choice '7' is there twice" in refused.error[1]
    assert time.process_time() - before < 5
