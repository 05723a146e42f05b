"""What is in the engine, and what has come out of it since the last commit."""

from collections import Counter
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from engine.request import Output
from storage.results import PassTotals, RequestResult
from worker.rows import Row, RowKey, to_row

if TYPE_CHECKING:
    from engine.schedule.passes import PassReport, PassStats


class Ledger:
    """Knows the claimed rows, and gathers results and passes for one transaction at a time.

    Its size is bounded by what the engine holds and by what it computes in a second, never by the dataset.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._claimed: dict[RowKey, None] = {}
        self._by_job: Counter[int] = Counter()
        self._jobs: set[int] = set()
        self._results: list[RequestResult] = []
        self._passes: list[PassStats] = []
        self._started_at: float | None = None

    @property
    def jobs(self) -> frozenset[int]:
        """The jobs with claimed rows that have no result yet."""
        return frozenset(+self._by_job)

    @property
    def claims(self) -> frozenset[RowKey]:
        """The claimed rows that have no result yet."""
        return frozenset(self._claimed)

    def claim(self, keys: Sequence[RowKey]) -> None:
        """Rows were claimed, for the engine."""
        self._claimed.update(dict.fromkeys(keys))
        self._by_job.update(key.job_id for key in keys)
        self._jobs.update(key.job_id for key in keys)

    def refuse(self, key: RowKey, code: str, message: str) -> None:
        """A claimed row never reached the engine: its result is an error."""
        self._add(key, Row(None, (code, message)), 0, 0)

    def add(self, report: "PassReport", *, began_at: float) -> None:
        """A pass ended, which had begun at ``began_at`` (unix seconds)."""
        if self._started_at is None:
            self._started_at = began_at
        self._passes.append(report.stats)
        for output in report.outputs:
            self._add(key_of(output), to_row(output), output.prompt_tokens, output.completion_tokens)

    def forget(self, keys: Container[RowKey]) -> list[RowKey]:
        """Nothing more will come of these rows; returns those that were claimed."""
        gone = [key for key in self._claimed if key in keys]
        for key in gone:
            self._drop(key)
        return gone

    def take(self) -> tuple[list[RequestResult], PassTotals | None]:
        """The results and the sums of the passes since the last call, which are then forgotten."""
        results, self._results = self._results, []
        passes, self._passes = self._passes, []
        started_at, self._started_at = self._started_at, None
        job_ids, self._jobs = sorted(self._jobs), set(self.jobs)
        if not passes or started_at is None:
            return results, None
        return results, PassTotals(
            model=self._model,
            job_ids=tuple(job_ids),
            started_at=started_at,
            num_passes=len(passes),
            seconds=sum(stats.seconds for stats in passes),
            prefill_tokens=sum(stats.prefill_tokens for stats in passes),
            decode_tokens=sum(stats.decode_tokens for stats in passes),
            weight_bytes=sum(stats.weight_bytes for stats in passes),
            lane_bytes={lane: sum(s.lane_bytes.get(lane, 0) for s in passes) for lane in _lanes(passes)},
            lane_seconds={lane: sum(s.lane_seconds.get(lane, 0.0) for s in passes) for lane in _lanes(passes)},
        )

    def _drop(self, key: RowKey) -> None:
        if self._claimed.pop(key, 0) is None:
            self._by_job[key.job_id] -= 1

    def _add(self, key: RowKey, row: Row, prompt_tokens: int, completion_tokens: int) -> None:
        self._drop(key)
        self._jobs.add(key.job_id)
        self._results.append(
            RequestResult(
                job_id=key.job_id,
                index=key.index,
                attempt=key.attempt,
                output=row.output,
                error=row.error,
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
            )
        )


def key_of(output: Output) -> RowKey:
    """The claimed row that an output is of."""
    assert isinstance(output.key, RowKey)
    return output.key


def _lanes(passes: Sequence["PassStats"]) -> list[str]:
    return sorted({lane for stats in passes for lane in (*stats.lane_bytes, *stats.lane_seconds)})
