"""Two workers on one job: equal outputs, nothing computed twice, and what the second is worth: ``python -m
benchmarks.two_workers``.

Each worker has one thread. Both wait idle before the job is there, so that no start-up is counted.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.chaos import Round, make_models, same
from benchmarks.checkpoints import default_cache, make_checkpoint
from storage.claims import list_workers
from storage.jobs import NewJob, NewRequest, create_job, get_job
from storage.results import list_passes


def run(models: Path, model: str, num_workers: int, rows: int, new_tokens: int) -> dict[str, Any]:
    """One job with ``num_workers`` workers: seconds, outputs, and tokens as the engines counted them."""
    with tempfile.TemporaryDirectory(prefix="two-workers-") as folder:
        place = Round(Path(folder), models, Random(0))
        place.begin_empty()
        try:
            for _ in range(num_workers):
                place.add_worker("--model", model, micro_batch=256)
            while sum(worker.state == "idle" for worker in list_workers(place.database)) < num_workers:
                time.sleep(0.05)
            new = NewJob(model, "generate", {"max_new_tokens": new_tokens, "ignore_eos": True}, 0, 0, "default")
            prompts = (" ".join(f"w{10 + (7 * i + step) % 80}" for step in range(16 + i % 48)) for i in range(rows))
            requests = (NewRequest(i, i, {"prompt": prompt}) for i, prompt in enumerate(prompts))
            place.job_ids = [create_job(place.database, new, requests, now=time.time())]
            place.ring(place.job_ids[0])
            place.wait(3600.0)
            job = get_job(place.database, place.job_ids[0])
            passes = [row.totals for row in list_passes(place.database, job_id=job.id)]
            workers = {row.worker_id for row in list_passes(place.database, job_id=job.id)}
            return {
                "seconds": (job.finished_at or 0.0) - (job.started_at or 0.0),
                "outputs": place.outputs()[0],
                "workers": len(workers),
                "done": job.num_done,
                "prefill_tokens": sum(totals.prefill_tokens for totals in passes),
                "decode_tokens": sum(totals.decode_tokens for totals in passes),
                "prompt_tokens": job.prompt_tokens,
                # The token that a prompt's last one yields needs no decode, and the last one is not fed back.
                "decoded_once": job.generated_tokens - job.num_done,
            }
        finally:
            place.end()


def main() -> int:
    """Exit code 1 when outputs differ or tokens were computed twice."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_workers", description=__doc__)
    parser.add_argument("--model", default="opt-125m", help="a shape of benchmarks.shapes, or tiny")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=24)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="two-workers-models-") as folder:
        if asked.model == "tiny":
            models = make_models(Path(folder), lambda text: print(text, file=sys.stderr))
        else:
            checkpoint = make_checkpoint(asked.model, "float32", default_cache(), lambda t: print(t, file=sys.stderr))
            models = Path(folder)
            (models / asked.model).symlink_to(checkpoint.model_dir)
        ran = {number: run(models, asked.model, number, asked.rows, asked.new_tokens) for number in (1, 2)}
    one, two = ran[1], ran[2]
    report = {
        "one_s": round(one["seconds"], 2),
        "two_s": round(two["seconds"], 2),
        "second_is_worth": round(one["seconds"] / two["seconds"], 3),
        "workers_that_computed": two["workers"],
        "all_done": all(len(each["outputs"]) == asked.rows and each["done"] == asked.rows for each in (one, two)),
        "outputs_equal": all(same(one["outputs"][index], two["outputs"][index]) for index in one["outputs"]),
        "nothing_twice": all(
            each["prefill_tokens"] == each["prompt_tokens"] and each["decode_tokens"] == each["decoded_once"]
            for each in (one, two)
        ),
    }
    print(json.dumps(report, indent=1))
    return 0 if report["all_done"] and report["outputs_equal"] and report["nothing_twice"] else 1


if __name__ == "__main__":
    sys.exit(main())
