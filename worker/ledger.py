"""What is in the engine, and what has come out of it since the last commit."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from engine.request import Output
from storage.results import PassTotals, RequestResult
from worker.rows import Row, RowKey, to_row

if TYPE_CHECKING:
    from engine.passes import PassReport, PassStats


class Ledger:
    """Counts claimed rows by job, and gathers results and passes for one transaction at a time.

    Its size is bounded by what the engine holds and by what one second brings forth, never by the dataset.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._claimed: Counter[int] = Counter()
        self._jobs: set[int] = set()
        self._results: list[RequestResult] = []
        self._passes: list[PassStats] = []
        self._started_at: float | None = None

    @property
    def jobs(self) -> frozenset[int]:
        """The jobs with claimed rows that have no result yet."""
        return frozenset(self._claimed)

    def claim(self, keys: Sequence[RowKey]) -> None:
        """Rows were claimed, for the engine."""
        self._claimed.update(key.job_id for key in keys)
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
            self._add(_key(output), to_row(output), output.prompt_tokens, output.completion_tokens)

    def forget(self, job_ids: Collection[int]) -> None:
        """Nothing more will come of these jobs."""
        for job_id in job_ids:
            self._claimed.pop(job_id, None)

    def take(self) -> tuple[list[RequestResult], PassTotals | None]:
        """The results and the sums of the passes since the last call, which are then forgotten."""
        results, self._results = self._results, []
        passes, self._passes = self._passes, []
        started_at, self._started_at = self._started_at, None
        job_ids, self._jobs = sorted(self._jobs), set(self._claimed)
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

    def _add(self, key: RowKey, row: Row, prompt_tokens: int, completion_tokens: int) -> None:
        self._claimed[key.job_id] -= 1
        if self._claimed[key.job_id] <= 0:
            del self._claimed[key.job_id]
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


def _key(output: Output) -> RowKey:
    assert isinstance(output.key, RowKey)
    return output.key


def _lanes(passes: Sequence["PassStats"]) -> list[str]:
    return sorted({lane for stats in passes for lane in (*stats.lane_bytes, *stats.lane_seconds)})
