"""From `enqueue` to outputs through the real queue, and what happens to it when things are killed on the way."""

import contextlib
import json
import signal
import tempfile
from pathlib import Path

import pytest
import redis

from benchmarks.strangers import ATTACKS
from storage.claims import list_workers
from storage.jobs import list_jobs
from storage.results import list_passes
from tests.e2e.conftest import PATIENCE_S, SLOW, OwnRedis, Station, json_of, wait_until
from worker.doorbell import client_url, ring
from worker.settings import load_settings

NEVER = 3600
"""A scan interval at which only the doorbell can wake a worker."""


def write_dataset(folder: Path, num_rows: int) -> Path:
    path = folder / "dataset.jsonl"
    path.write_text("".join(json.dumps({"id": f"r{i}", "prompt": "ab" * (1 + i % 5)}) + "\n" for i in range(num_rows)))
    return path


def test_the_doorbell_wakes_the_worker_and_a_second_job_reads_no_weights(
    station: Station, tiny_model: Path, tmp_path: Path
) -> None:
    worker = station.start_worker(scan_s=NEVER)
    words = ("enqueue", write_dataset(tmp_path, 10), "--model", tiny_model, "--task", "generate", "--json")

    first = json_of(station.cli(*words))["id"]
    done = station.wait_done(first)
    second = json_of(station.cli(*words))["id"]
    station.wait_done(second)

    assert (done.state, done.num_done) == ("done", 10)
    fetched = [json.loads(line) for line in station.cli("fetch", str(first), "-o", "-").stdout.splitlines()]
    assert [row["id"] for row in fetched] == [f"r{i}" for i in range(10)]
    weight_bytes = {
        job_id: sum(row.totals.weight_bytes for row in list_passes(station.database, job_id=job_id))
        for job_id in (first, second)
    }
    assert weight_bytes[first] > 0
    assert weight_bytes[second] == 0
    assert station.texts(first) == station.texts(second)
    assert "prompt" not in worker.log
    assert "abab" not in worker.log


def test_a_worker_whose_cache_is_in_four_bits_leaves_an_exact_job_to_others(
    station: Station, tiny_model: Path, tmp_path: Path
) -> None:
    words = ("enqueue", write_dataset(tmp_path, 3), "--model", tiny_model, "--task", "generate", "--json")
    exact, other = (json_of(station.cli(*words, *more))["id"] for more in (["--exact"], []))
    station.start_worker("--kv-format", "int4")

    assert station.wait_done(other).num_done == 3
    says = f"leaves job {exact} to others"
    wait_until(
        "the worker to leave it alone, or not",
        lambda: station.job(exact).is_finished or any(says in str(each.message) for each in station.workers()),
    )
    assert station.job(exact).num_done == 0


def test_lost_and_doubled_messages_change_nothing(station: Station, tiny_model: Path) -> None:
    station.start_worker(scan_s=0.3)
    settings = load_settings({}, station.environ)

    job_id = station.enqueue(tiny_model, 20)  # nobody rings
    station.wait_done(job_id)
    outputs, passes = station.texts(job_id), list_passes(station.database)
    for _ in range(5):
        ring(settings, job_id)
        ring(settings, 99_999)
    with redis.Redis.from_url(settings.redis_url) as client:
        wait_until("the messages to be consumed", lambda: not client.exists("overnight:overnight.default"))
    after = station.wait_done(station.enqueue(tiny_model, 3))

    assert after.num_done == 3
    assert station.texts(job_id) == outputs
    assert list_passes(station.database, job_id=job_id) == passes
    with station.database.read() as connection:
        attempts = connection.exec_driver_sql(f"SELECT DISTINCT attempt FROM requests WHERE job_id = {job_id}")
        assert [attempt for (attempt,) in attempts] == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_in_the_middle_gives_back_what_is_not_done(
    station: Station, tiny_model: Path, number: signal.Signals
) -> None:
    num_rows = 20_000  # more than can be done in the time that a test may take
    job_id = station.enqueue(tiny_model, num_rows, max_new_tokens=60)
    worker = station.start_worker(*SLOW)
    with station.caught_in_the_middle(job_id):
        pass

    code = worker.signal(number)

    assert code == (0 if number == signal.SIGTERM else 130)
    assert "Traceback" not in worker.log
    num_done = station.job(job_id).num_done
    assert station.request_states(job_id) == {"done": num_done, "pending": num_rows - num_done}
    assert list_workers(station.database) == []


def test_a_killed_workers_job_is_finished_with_one_output_a_row_equal_to_an_undisturbed_run(
    station: Station, tiny_model: Path
) -> None:
    num_rows, new_tokens = 800, 20
    job_id = station.enqueue(tiny_model, num_rows, max_new_tokens=new_tokens)
    victim = station.start_worker(*SLOW, lease_s=3600)
    with station.caught_in_the_middle(job_id):
        victim.signal(signal.SIGKILL)

    successor = station.start_worker(scan_s=0.3, lease_s=3600)
    job = station.wait_done(job_id)
    undisturbed = station.enqueue(tiny_model, num_rows, max_new_tokens=new_tokens)
    station.wait_done(undisturbed)

    assert (job.state, job.num_done, job.num_failed) == ("done", num_rows, 0)
    assert [index for index, _ in station.texts(job_id)] == list(range(num_rows))
    assert station.texts(job_id) == station.texts(undisturbed)
    # The victim's lease runs for an hour: its claims came back because its process is gone.
    assert "took back" in successor.log
    assert job.generated_tokens == station.job(undisturbed).generated_tokens


def test_redis_may_go_and_come_back(own_redis: OwnRedis, tiny_model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    with contextlib.closing(Station(home, own_redis.url)) as station:
        worker = station.start_worker(scan_s=NEVER)
        dataset = write_dataset(tmp_path, 3)
        words = ("enqueue", dataset, "--model", tiny_model, "--task", "generate", "--json")
        own_redis.kill()

        refused = station.cli(*words)

        assert refused.returncode == 4
        assert "Redis" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert list_jobs(station.database) == []
        assert worker.process.poll() is None
        own_redis.start()
        accepted = json_of(station.cli(*words))
        assert station.wait_done(accepted["id"]).state == "done"
        assert worker.process.poll() is None
        assert worker.signal(signal.SIGTERM) == 0


def test_a_worker_works_and_stops_while_redis_is_away(own_redis: OwnRedis, tiny_model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    with contextlib.closing(Station(home, own_redis.url)) as station:
        worker = station.start_worker(scan_s=0.3)
        own_redis.kill()

        assert station.wait_done(station.enqueue(tiny_model, 5)).num_done == 5
        assert worker.signal(signal.SIGTERM) == 0
        assert list_workers(station.database) == []
        own_redis.start()


def test_a_worker_whose_redis_is_not_there_yet_works_by_its_scan(
    own_redis: OwnRedis, tiny_model: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    own_redis.kill()
    with contextlib.closing(Station(home, own_redis.url)) as station:
        worker = station.start_worker(scan_s=0.3)
        assert station.wait_done(station.enqueue(tiny_model, 3)).num_done == 3
        own_redis.start()
        assert worker.signal(signal.SIGTERM) == 0
        assert "does not answer" in worker.log
        assert "Traceback" not in worker.log


@pytest.mark.parametrize("url", ["redis://[::1", "redis://h/0?nosuch=1", "http://127.0.0.1"])
def test_a_worker_whose_redis_can_never_answer_does_not_start(station: Station, url: str) -> None:
    ran = station.cli("worker", "--redis", url)

    assert ran.returncode in (2, 4)
    assert len(ran.stderr.strip().splitlines()) == 1
    assert "Traceback" not in ran.stderr


def test_a_worker_with_a_wrong_password_does_not_start(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="overnight-test-") as folder:
        server = OwnRedis(Path(folder), "--requirepass", "right")
        server.start()
        home = tmp_path / "home"
        home.mkdir(mode=0o700)
        with contextlib.closing(Station(home, server.url)) as station:
            ran = station.cli("worker", "--redis", f"{server.url}?password=wrong")
        server.kill()
    assert ran.returncode == 4
    assert "does not let us in" in ran.stderr
    assert "wrong" not in ran.stderr.replace("WRONGPASS", "")


def test_nothing_in_redis_ends_a_worker_or_makes_it_deaf(station: Station, tiny_model: Path, tmp_path: Path) -> None:
    settings = load_settings({}, station.environ)
    worker = station.start_worker(scan_s=NEVER)
    with redis.Redis.from_url(client_url(settings.redis_url)) as client:
        for attack in ATTACKS.values():
            attack(client, settings)
        # As one would find them after a night without a worker, too: behind each other, at a start.
        late = station.start_worker(scan_s=NEVER)
        dataset = write_dataset(tmp_path, 3)
        words = ("enqueue", dataset, "--model", tiny_model, "--task", "generate", "--json")
        for _ in range(2):
            assert station.wait_done(json_of(station.cli(*words))["id"]).num_done == 3
        wait_until("the last of it to be heard", lambda: client.llen("overnight:overnight.default") == 0)
    for each in (worker, late):
        assert each.process.poll() is None, each.log
        assert each.signal(signal.SIGTERM) == 0
        assert "Traceback" not in each.log
        assert "os.system" not in each.log, "what strangers write is not logged"
    assert "dropped what was not for this worker" in worker.log


def test_a_worker_with_an_unknown_model_does_not_start(station: Station) -> None:
    ran = station.cli("worker", "--model", "no-such-model")

    assert ran.returncode == 3
    assert "no-such-model" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_drain_that_dies_takes_the_process_with_it(station: Station) -> None:
    worker = station.start_worker(scan_s=0.3)
    path = station.database.path
    assert path is not None
    station.database.close()
    with path.open("r+b") as file:
        file.write(b"this is not a database any more" * 100)

    assert worker.process.wait(PATIENCE_S) == 4
    assert "Traceback" not in worker.log
    assert str(path) in worker.log.strip().splitlines()[-1]
    path.unlink()
