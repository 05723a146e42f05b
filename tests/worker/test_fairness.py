from hypothesis import given
from hypothesis import strategies as st

from worker.fairness import Waiting, choose_model

NOW = 10_000.0
MAX_WAIT_S = 1800.0


def job(model: str, *, job_id: int = 1, priority: int = 0, age_s: float = 0.0, is_served: bool = False) -> Waiting:
    return Waiting(job_id, model, priority, NOW - age_s, is_served)


def choose(*jobs: Waiting, resident: str | None = None, left_at: dict[str, float] | None = None) -> str | None:
    return choose_model(jobs, resident=resident, left_at=left_at or {}, now=NOW, max_wait_s=MAX_WAIT_S)


def test_nothing_waits() -> None:
    assert choose() is None
    assert choose(resident="a") is None


def test_priority_goes_before_age() -> None:
    assert choose(job("old", age_s=100), job("young", age_s=1)) == "old"
    assert choose(job("old", age_s=100), job("dear", priority=5, age_s=1)) == "dear"


def test_the_resident_model_is_kept_while_it_has_work() -> None:
    assert choose(job("a", age_s=1), job("b", priority=9, age_s=MAX_WAIT_S), resident="a") == "a"


def test_a_job_that_has_waited_too_long_is_served() -> None:
    assert choose(job("a"), job("b", age_s=MAX_WAIT_S + 1), resident="a") == "b"


def test_a_resident_model_without_work_holds_nobody_up() -> None:
    assert choose(job("b", age_s=1), resident="a") == "b"


def test_a_job_that_another_worker_serves_is_not_waiting() -> None:
    assert choose(job("a"), job("b", age_s=9_000, is_served=True), resident="a") == "a"


def test_two_models_with_endless_work_take_turns() -> None:
    endless = (job("a", age_s=9_000), job("b", age_s=9_000))

    assert choose(*endless, resident="a", left_at={"b": NOW - MAX_WAIT_S - 1}) == "b"
    assert choose(*endless, resident="b", left_at={"a": NOW - 60}) == "b"
    assert choose(*endless, resident="b", left_at={"a": NOW - MAX_WAIT_S - 1}) == "a"
    served = (job("a", age_s=9_000, is_served=True), job("b", age_s=9_000))
    assert choose(*served, resident="b", left_at={"a": NOW - MAX_WAIT_S - 1}) == "b", "another worker is at it"


jobs = st.lists(
    st.builds(
        Waiting,
        st.integers(1, 50),
        st.sampled_from("abc"),
        st.integers(-2, 2),
        st.floats(0, NOW),
        st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.job_id,
)
residents = st.none() | st.sampled_from("abcd")


@given(jobs, residents)
def test_the_choice_has_work_whenever_there_is_work(waiting: list[Waiting], resident: str | None) -> None:
    choice = choose(*waiting, resident=resident)

    assert (choice is None) == (not waiting)
    assert choice is None or choice in {each.model for each in waiting}


@given(jobs, residents, st.randoms())
def test_the_choice_does_not_depend_on_the_order_of_rows(
    waiting: list[Waiting], resident: str | None, random: "object"
) -> None:
    shuffled = list(waiting)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    assert choose(*shuffled, resident=resident) == choose(*waiting, resident=resident)


@given(jobs, st.sampled_from("abc"))
def test_leaving_the_resident_model_needs_someone_who_waited_too_long(waiting: list[Waiting], resident: str) -> None:
    choice = choose(*waiting, resident=resident)

    if choice != resident and any(each.model == resident for each in waiting):
        assert any(
            each.model == choice and not each.is_served and NOW - each.created_at > MAX_WAIT_S for each in waiting
        )
