"""Ours, timed: where it puts the layers that are to lie where the planner finds best."""

from dataclasses import replace
from pathlib import Path

from benchmarks.checkpoints import make_checkpoint
from benchmarks.jobs import Job
from benchmarks.ours import run
from benchmarks.shapes import shape_of
from benchmarks.workload import Range, Workload
from engine.dtypes import DType
from engine.planner.profiles import load_hardware, profile_json
from engine.units import MIB


def test_planned_layers_take_the_memory_that_is_left(tmp_path: Path) -> None:
    t4 = load_hardware("t4-gcp")
    matmul = {DType.FLOAT32: t4.matmul[DType.FLOAT16]}
    machine = replace(t4, device="cpu", shares_host_memory=True, host_attention=None, matmul=matmul)
    checkpoint = make_checkpoint("tiny", "float32", tmp_path, lambda text: None)
    job = Job(
        role="ours", shape="tiny", dtype="float32", device="cpu", weights="planned", num_requests=2,
        folder=str(checkpoint.folder), model_dir=str(checkpoint.model_dir),
        workload=Workload(task="generate", prompt=Range(5, 9), out=Range(3, 3), vocabulary=shape_of("tiny").vocab_size),
        device_memory=16 * MIB, profile=profile_json(machine),
    )  # fmt: skip
    found = run(job)
    assert found["num_tokens"] == 6
    assert found["plan"]["layers"] == {"device": 3, "host": 0, "disk": 0}
    # Device and host are one memory: what the job may take is not there twice.
    assert found["plan"]["budgets"]["host"] == 0
    assert run(replace(job, weights="disk", profile=None))["plan"]["layers"] == {"device": 0, "host": 0, "disk": 3}
