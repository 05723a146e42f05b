import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from engine.planner.profiles import load_hardware, profile_json
from engine.planner.rates import Figure
from tests.cli.conftest import CONFIG, Command, Run, write_rows

ADVISED = ("plan", "--hardware", "t4-gcp", "--requests", "300")
T4 = (*ADVISED, "--no-advice")


def planned(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def one_sentence(done: Result, exit_code: int) -> str:
    assert done.exit_code == exit_code, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_machine_and_a_model_that_are_not_here(run: Run) -> None:
    document = planned(run(*T4, "--model", "facebook/opt-30b", "--json"))
    assert {"plan", "predicted", "memory", "advice"} <= set(document)
    predicted = document["predicted"]
    assert {"generated_per_s", "total_per_s", "bound_by"} <= set(predicted)
    assert predicted["total_per_s"] == pytest.approx(predicted["generated_per_s"] * (512 + 32) / 32)
    assert predicted["seconds"] == pytest.approx(300 * 32 / predicted["generated_per_s"])
    assert predicted["generated_per_s"] <= predicted["steady_generated_per_s"] * 1.02
    assert predicted["steady_generated_per_s"] <= predicted["lane_ceiling_per_s"]
    assert predicted["generated_per_s"] < predicted["product_ceiling_per_s"]
    assert set(document["memory"]) == {"device", "host", "disk"}
    assert all(0 <= tier["used"] <= tier["budget"] for tier in document["memory"].values())
    assert sum(document["plan"]["layers"].values()) == 48


def test_advice_helps_and_the_best_comes_first(run: Run) -> None:
    document = planned(run(*ADVISED, "--model", "opt-175b", "--json"))
    gains = [each["gain"] for each in document["advice"]]
    assert 1 <= len(gains) <= 5
    assert gains == sorted(gains, reverse=True)
    assert min(gains) >= 0.01
    now = document["predicted"]["generated_per_s"]
    for each in document["advice"]:
        assert each["generated_per_s"] == pytest.approx(now * (1 + each["gain"]))
    plain = planned(run(*T4, "--model", "opt-175b", "--json"))
    assert plain == document | {"advice": []}


def test_for_people_the_placement_the_lane_and_the_time_are_told(run: Run) -> None:
    done = run(*ADVISED, "--model", "opt-175b")
    assert done.exit_code == 0
    assert done.stderr == ""
    for word in ("device", "host", "disk", "BUDGET", "bound by", "300 requests in", "products alone", "advice"):
        assert word in done.stdout, word
    without = run(*T4, "--model", "opt-175b").stdout
    assert done.stdout.startswith(without)
    assert "advice" not in without


def test_where_four_bits_gain_nothing_that_is_said(run: Run) -> None:
    """Kept plain, OPT-30B finds room in host memory, and the host attends beside products that bound it as much."""
    words = (*ADVISED, "--model", "facebook/opt-30b", "--host-attention", "on")
    words += ("--weights", "0/100/0", "--micro-batch", "1024", "--micro-batches", "2")
    assert planned(run(*words, "--json"))["four_bits_in_vain"] == ["weights", "kv"]
    told = run(*words).stdout
    assert told.endswith("\n          four bits would gain nothing for weights or for the KV cache\n")
    assert "four bits (" not in told


def test_the_flags_that_are_told_give_the_same_plan(run: Run) -> None:
    document = planned(run(*T4, "--model", "opt-6.7b", "--json"))
    again = planned(run(*T4, "--model", "opt-6.7b", "--json", *document["flags"].split()))
    assert again["plan"] == document["plan"]


def test_what_is_fixed_stays(run: Run) -> None:
    words = ("--weights", "50/50/0", "--micro-batch", "512", "--micro-batches", "2", "--device-memory", "8GiB")
    plan = planned(run(*T4, "--model", "opt-1.3b", "--json", *words))["plan"]
    assert plan["layers"] == {"device": 12, "host": 12, "disk": 0}
    assert (plan["micro_batch"], plan["micro_batches"]) == (512, 2)
    assert plan["budgets"]["device"] == 8 * 2**30


def test_a_block_is_slower_than_mixed_passes(run: Run) -> None:
    mixed, block = (
        planned(run(*T4, "--model", "opt-1.3b", "--json", "--device-memory", "2GiB", "--schedule", schedule))
        for schedule in ("mixed", "block")
    )
    assert block["plan"]["schedule"] == "block"
    assert block["predicted"]["generated_per_s"] < mixed["predicted"]["generated_per_s"]


@pytest.mark.parametrize(
    ("tier", "model"),
    [("device-memory", "opt-175b"), pytest.param("host-memory", "opt-30b", marks=pytest.mark.soak)],
)
def test_a_sweep_never_falls(run: Run, tier: str, model: str) -> None:
    document = planned(run(*T4, "--model", model, "--sweep", tier, "--json"))
    points = document["points"]
    sizes = [point["bytes"] for point in points]
    rates = [point["generated_per_s"] or 0.0 for point in points]
    assert document["sweep"] == tier
    assert sizes == sorted(sizes)
    assert rates == sorted(rates)
    assert rates[-1] > rates[0]


def test_a_sweep_for_people_is_a_table_that_says_what_does_not_fit(run: Run, model: str) -> None:
    lengths = ("--prompt-len", "64", "--gen-len", "32")
    done = run(*T4, "--model", model, *lengths, "--sweep", "device-memory", "--device-memory", "3MiB")
    assert done.exit_code == 0
    assert "DEVICE-MEMORY" in done.stdout
    assert "does not fit" in done.stdout
    assert "tokens/s" in done.stdout


def test_a_folder_of_hugging_face_is_planned_for_as_it_is(run: Run, model: str) -> None:
    document = planned(run(*T4, "--model", model, "--json", "--prompt-len", "20", "--gen-len", "4"))
    assert sum(document["plan"]["layers"].values()) == CONFIG["num_hidden_layers"]
    assert document["plan"]["dtype"] == "float32"


def test_a_model_directory_is_as_large_as_the_folder_it_came_from(run: Run, model: str) -> None:
    assert run("import", model, "tiny").exit_code == 0
    words = ("--json", "--prompt-len", "20", "--gen-len", "4")
    imported, folder = (planned(run(*T4, "--model", name, *words)) for name in ("tiny", model))
    assert imported == folder


def test_a_dataset_gives_number_and_lengths_by_the_models_tokenizer(run: Run, model: str) -> None:
    rows = [{"prompt": "x" * length} for length in (10, 20, 30, 500)]
    done = run(
        "plan", "--hardware", "t4-gcp", "--model", model, "--json", "--dataset", write_rows(Path("d.jsonl"), *rows)
    )
    document = planned(done)
    assert "1 of 4 prompts" in done.stderr
    predicted = document["predicted"]
    assert predicted["requests"] == 3
    # A byte is a token, and one more begins each text.
    assert predicted["total_per_s"] / predicted["generated_per_s"] == pytest.approx((63 + 3 * 32) / (3 * 32))


def test_without_a_tokenizer_characters_are_counted_and_that_is_said(run: Run) -> None:
    name = write_rows(Path("d.jsonl"), *[{"text": "word " * 80}] * 7)
    done = run(
        "plan", "--hardware", "t4-gcp", "--model", "opt-1.3b", "--json", "--dataset", name, "--prompt", "{{ text }}"
    )  # fmt: skip
    document = planned(done)
    assert "4 characters" in done.stderr
    predicted = document["predicted"]
    assert predicted["requests"] == 7
    assert predicted["total_per_s"] / predicted["generated_per_s"] == pytest.approx((100 + 32) / 32)


@pytest.mark.parametrize(
    ("words", "exit_code", "said"),
    [
        (["--model", "no-such"], 3, "facebook/opt-30b"),
        (["--model", "opt-30b", "--hardware", "t5"], 3, "t4-gcp"),
        (["--model", "opt-30b", "--hardware", "."], 2, "is no file"),
        (["--model", "opt-30b", "--hardware", "/dev/zero"], 2, "is no file"),
        (["--model", "opt-30b", "--disk-speed", "1KiB"], 2, "too slow for a disk"),
        (["--model", "opt-30b", "--dtype", "bfloat16"], 2, "bfloat16"),
        (["--model", "opt-30b", "--device", "cpu"], 2, "--device cpu"),
        (["--model", "opt-30b", "--dataset", "no.jsonl"], 3, "no.jsonl"),
        (["--model", "opt-30b", "--dataset", "."], 2, "folder"),
        (["--model", "opt-30b", "--dataset", "d", "--requests", "3"], 2, "--requests"),
        (["--model", "opt-30b", "--dataset", "d", "--prompt-len", "3"], 2, "--prompt-len"),
        (["--model", "opt-30b", "--prompt", "@no.txt", "--dataset", "d"], 3, "no.txt"),
        (["--model", "opt-30b", "--prompt", "{{ text }}"], 2, "--dataset"),
        (["--model", "opt-30b", "--prompt-len", "0"], 2, "--prompt-len"),
        (["--model", "opt-30b", "--gen-len", "x"], 2, "--gen-len"),
        (["--model", "opt-30b", "--requests", "-1"], 2, "--requests"),
        (["--model", "opt-30b", "--sweep", "disk"], 2, "--sweep"),
        (["--model", "opt-30b", "--weights", "50/60/0"], 2, "--weights"),
        (["--model", "opt-30b", "--kv", "1/2"], 2, "--kv"),
        (["--model", "opt-30b", "--schedule", "blok"], 2, "--schedule"),
        (["--model", "opt-30b", "--host-memory", "lots"], 2, "--host-memory"),
        (["--model", "opt-30b", "--hardwear", "t4-gcp"], 2, "--hardware"),
        ([], 2, "--model"),
    ],
)
def test_what_cannot_be_understood_is_one_sentence(run: Run, words: list[str], exit_code: int, said: str) -> None:
    Path("d").write_text('{"prompt": "x"}\n')
    done = run("plan", *(["--hardware", "t4-gcp"] if "--hardware" not in words else []), *words)
    assert said in one_sentence(done, exit_code)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not JSON"), ("{}", "format"), ('{"format": "overnight hardware profile", "version": 9}', "version 9")],
)
def test_a_damaged_profile_is_named(run: Run, text: str, said: str) -> None:
    Path("machine.json").write_text(text)
    done = run("plan", "--hardware", "machine.json", "--model", "opt-30b")
    assert said in one_sentence(done, 2)
    assert "machine.json" in done.stderr


@pytest.mark.parametrize(
    ("lines", "said"),
    [("", "empty"), ("[1]\n", "line 1"), ('{"prompt": "x"}\nnonsense\n', "line 2"), ("{}\n", "prompt")],
)
def test_a_dataset_that_enqueue_would_refuse_is_refused(run: Run, lines: str, said: str) -> None:
    Path("d.jsonl").write_text(lines)
    assert said in one_sentence(run(*T4[:3], "--model", "opt-30b", "--dataset", "d.jsonl"), 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device-memory", "0"], "--device-memory 4.5GiB with --weights 0/0/100 --micro-batch 256"),
        (["--weights", "100/0/0"], "GiB short"),
        (["--host-memory", "0", "--weights", "0/100/0"], "--host-memory"),
        (["--prompt-len", "3000"], "--prompt-len 2016 --gen-len 32"),
        (["--prompt-len", "1", "--gen-len", "5000"], "--prompt-len 1 --gen-len 2047"),
    ],
)  # fmt: skip
def test_what_is_impossible_is_one_line_with_the_nearest_that_is_not(run: Run, words: list[str], said: str) -> None:
    sentence = one_sentence(run(*T4, "--model", "opt-30b", *words), 2)
    assert said in sentence
    assert "that fits: --" in sentence


def test_doing_what_the_sentence_says_gives_a_plan(run: Run) -> None:
    for words in (["--device-memory", "1"], ["--weights", "100/0/0"], ["--prompt-len", "4000"]):
        sentence = one_sentence(run(*T4, "--model", "opt-30b", *words), 2)
        flags = sentence.rpartition("that fits: ")[2].replace(" with ", " ").split()
        planned(run(*T4, "--model", "opt-30b", "--json", *flags))


def test_a_model_larger_than_the_disk_says_by_how_much(run: Run) -> None:
    small = profile_json(load_hardware("t4-gcp"))
    small["capacity"]["disk"]["value"] = 100e9  # type: ignore[index]
    Path("small.json").write_text(json.dumps(small))
    sentence = one_sentence(run("plan", "--hardware", "small.json", "--model", "opt-175b"), 2)
    assert "GiB short" in sentence


def test_every_prompt_too_long_is_refused(run: Run, model: str) -> None:
    name = write_rows(Path("d.jsonl"), {"prompt": "x" * 500})
    assert "shorten" in one_sentence(run(*T4[:3], "--model", model, "--dataset", name), 2)


def test_a_machine_that_was_not_measured_says_how(run: Run) -> None:
    assert "doctor --measure" in one_sentence(run("plan", "--model", "opt-30b"), 3)


def test_a_damaged_profile_of_this_machine_says_how_to_mend_it(home: Path, run: Run) -> None:
    home.mkdir()
    (home / "profile-cpu.json").write_text("{")
    assert "not JSON" in (said := one_sentence(run("plan", "--model", "opt-30b"), 2))
    assert said.endswith("measure this machine again: overnight doctor --measure\n")


def test_the_profile_of_the_device_that_is_asked_for(home: Path, run: Run) -> None:
    """However the other was measured since; and one that was not measured is not taken for another."""
    home.mkdir()
    hardware = load_hardware("t4-gcp")
    of_cpu = {"device": "cpu", "shares_host_memory": True, "host_attention": None, "name": "the processor"}
    for number, (name, change) in enumerate({"cpu": of_cpu, "cuda-0": {"name": "the GPU"}}.items()):
        path = home / f"profile-{name}.json"
        path.write_text(json.dumps(profile_json(hardware) | change))
        os.utime(path, (number, number))
    plan = ("plan", "--model", "opt-125m", "--no-advice", "--json", "--prompt-len", "20", "--gen-len", "4")
    for flags, name in [((), "the GPU"), (("--device", "cpu"), "the processor"), (("--device", "cuda"), "the GPU")]:
        assert planned(run(*plan, *flags))["machine"]["name"] == name
    said = one_sentence(run(*plan, "--device", "cuda:1"), 3)
    assert "doctor --measure --device cuda:1" in said


def test_on_this_machine_budgets_are_of_what_is_free_now(home: Path, run: Run) -> None:
    home.mkdir()
    hardware = load_hardware("t4-gcp")
    more_than_any = {tier: Figure(2.0**60, "a test") for tier in hardware.capacity}
    profile = profile_json(replace(hardware, capacity=more_than_any)) | {
        "device": "cpu",
        "shares_host_memory": True,
        "host_attention": None,
    }
    (home / "profile-cpu.json").write_text(json.dumps(profile))
    document = planned(
        run("plan", "--model", "opt-125m", "--no-advice", "--json", "--prompt-len", "20", "--gen-len", "4")
    )
    # Not more than is installed; what is free may be another figure by now.
    assert document["memory"]["device"]["budget"] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert document["memory"]["host"]["budget"] == 0
    assert "one memory" in one_sentence(run("plan", "--model", "opt-125m", "--sweep", "host-memory"), 2)


def test_another_kind_of_model_is_refused(run: Run, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, "other")
    (Path("other") / "config.json").write_text(json.dumps(CONFIG | {"model_type": "gpt_neox"}))
    assert "'gpt_neox'" in one_sentence(run(*T4, "--model", "./other"), 3)
    (Path("other") / "config.json").write_text("{")
    assert "config.json" in one_sentence(run(*T4, "--model", "./other"), 3)


def test_planning_loads_no_torch(command: Command) -> None:
    done = command(*T4, "--model", "opt-125m", "--json", environ={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    assert "scipy" in done.stderr
    assert " torch\n" not in done.stderr


def test_machines_are_compared_in_one_table_the_fastest_first(run: Run) -> None:
    words = ("plan", "--model", "opt-1.3b", "--requests", "300")
    document = planned(run(*words, "--hardware", "t4-gcp,h100-80g,l4", "--json"))
    rates = [each["predicted"]["rows_per_s"] for each in document["machines"]]
    assert rates == sorted(rates, reverse=True)
    assert document["machines"][0]["machine"]["name"] == "h100-80g"
    assert len(rates) == 3
    shown = run(*words, "--hardware", "t4-gcp,h100-80g").stdout.splitlines()
    assert [line.split()[0] for line in shown] == ["MACHINE", "h100-80g", "t4-gcp"]
    alone = planned(run(*words, "--hardware", "h100-80g", "--no-advice", "--json"))
    assert alone == document["machines"][0]


def test_a_machine_that_the_model_does_not_fit_says_why_below_the_table(run: Run) -> None:
    words = ("plan", "--model", "opt-30b", "--requests", "300", "--host-memory", "1GiB", "--disk-space", "0", "--json")
    document = planned(run(*words, "--hardware", "t4-gcp,h100-80g"))
    assert [each["machine"]["name"] for each in document["machines"]] == ["h100-80g"]
    assert [each["name"] for each in document["refused"]] == ["t4-gcp"]
    assert all(each["why"] for each in document["refused"])
    nowhere = run(*words, "--hardware", "t4-gcp,l4")
    assert nowhere.exit_code == 2
    assert [each["name"] for each in json.loads(nowhere.stdout)["refused"]] == ["t4-gcp", "l4"]


def test_a_machine_that_nobody_knows_is_absent_among_others_too(run: Run) -> None:
    said = one_sentence(run("plan", "--model", "opt-1.3b", "--hardware", "t4-gcp,nosuch"), 3)
    assert "'nosuch' is neither a file nor a hardware preset" in said


def test_a_model_that_a_large_gpu_can_hold_is_there_whole(run: Run) -> None:
    document = planned(run("plan", "--model", "opt-30b", "--hardware", "h100-80g", "--no-advice", "--json"))
    assert document["plan"]["layers"] == {"device": 48, "host": 0, "disk": 0}


def test_a_row_of_choices_is_a_sequence_for_each(run: Run) -> None:
    words = (*T4, "--model", "opt-1.3b", "--json", "--prompt-len", "100")
    choose = planned(run(*words, "--task", "choose", "--choices", "good,bad,unknown"))["predicted"]
    assert (choose["rows"], choose["requests"]) == (300, 900)
    assert choose["rows_per_s"] == pytest.approx(300 / choose["seconds"])
    score = planned(run(*words, "--task", "score", "--gen-len", "20"))["predicted"]
    assert score["rows"] == score["requests"] == 300
    for wrong in (
        ("--task", "choose"),
        ("--choices", "a,b"),
        ("--task", "choose", "--choices", "a,b", "--gen-len", "3"),
    ):
        one_sentence(run(*words, *wrong), 2)


def test_rows_with_labels_of_their_own_are_as_many_sequences(run: Run) -> None:
    rows = ({"prompt": "a" * 400, "choices": ["good", "bad"]}, {"prompt": "b" * 400, "choices": ["x", "y", "z", "w"]})
    write_rows(Path("d.jsonl"), *rows)
    done = planned(
        run(*T4[:3], "--no-advice", "--model", "opt-1.3b", "--json", "--task", "choose", "--dataset", "d.jsonl")
    )
    assert (done["predicted"]["rows"], done["predicted"]["requests"]) == (2, 6)


def test_a_default_prompt_is_no_longer_than_the_model_takes(home: Path, run: Run, checkpoint: Path) -> None:
    done = run(*T4, "--model", str(checkpoint), "--dtype", "float16")
    assert done.exit_code == 0, done.stderr
    assert "prompts of 96 tokens, 32 generated" in done.stdout


def test_a_faster_disk_helps_where_it_is_the_bound(run: Run) -> None:
    slow, fast = (
        planned(run(*T4, "--model", "opt-175b", "--json", "--disk-speed", speed))["predicted"]
        for speed in ("1GB", "3GB")
    )
    assert slow["bound_by"] == "disk_read"
    assert fast["rows_per_s"] > 1.5 * slow["rows_per_s"]
    one_sentence(run(*T4, "--model", "opt-175b", "--disk-speed", "5"), 2)


def test_four_bits_are_planned_for_as_if_a_model_were_stored_so(run: Run) -> None:
    words = (
        "plan",
        "--model",
        "facebook/opt-175b",
        "--hardware",
        "t4-gcp",
        "--no-advice",
        "--json",
        "--requests",
        "64",
    )
    plain, four = planned(run(*words)), planned(run(*words, "--weight-format", "int4"))
    assert plain["formats"] == {"weights": "plain", "kv": "plain", "dtype": "float16"}
    assert four["formats"] == {"weights": "int4", "kv": "plain", "dtype": "float16"}
    assert four["predicted"]["generated_per_s"] > 2 * plain["predicted"]["generated_per_s"]
    both = planned(run(*words, "--weight-format", "int4", "--kv-format", "int4"))
    assert both["formats"]["kv"] == "int4"
    told = run(*(word for word in words if word != "--json"), "--weight-format", "int4").stdout
    assert "facebook/opt-175b, float16 with weights in int4, 96 layers" in told


def test_a_model_that_is_stored_in_four_bits_is_planned_for_so(home: Path, run: Run, checkpoint: Path) -> None:
    assert run("import", str(checkpoint), "--weight-format", "int4").exit_code == 0
    words = (*T4, "--model", "tiny-int4", "--json", "--prompt-len", "20", "--gen-len", "4")
    assert planned(run(*words))["formats"]["weights"] == "int4"
    assert planned(run(*words, "--weight-format", "plain"))["formats"]["weights"] == "plain"


def test_a_rotary_model_has_a_cache_in_four_bits(run: Run) -> None:
    words = (*T4, "--model", "Qwen/Qwen2.5-7B", "--json")
    plain, four = (planned(run(*words, "--kv-format", name)) for name in ("plain", "int4"))
    assert (plain["formats"]["kv"], four["formats"]["kv"]) == ("plain", "int4")
    # Whole windows, and the plain keys of one: heads of 128 values take 114 rows for these.
    assert four["plan"]["kv_room"] == {"window": 64, "beside": 114}
    assert plain["plan"]["kv_room"] == {"window": 1, "beside": 0}
