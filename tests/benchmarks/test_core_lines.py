"""Which files the path of a pass is, and that each of them is there."""

from benchmarks.core_lines import CORE, ENGINE, count


def test_the_path_is_counted_whole_and_nothing_twice() -> None:
    lines = count()
    assert {"engine.py", "executor.py", "weights/stream.py", "memory/ring.py", "model/opt.py"} <= set(lines)
    assert not [name for name in lines if name.startswith(("model/llama", "planner/", "measure/"))]
    assert lines["stage.py"] == len((ENGINE / "stage.py").read_text().splitlines())
    assert [pattern for pattern in CORE if not list(ENGINE.glob(pattern))] == []
