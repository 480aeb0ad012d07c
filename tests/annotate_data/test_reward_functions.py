"""Reward functions of the user's own, weighted sums with models, several processes, and memory that does not
grow.
"""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
from rewarding import annotate, armorm, generated, launch, outcome, read, refused, write
from rewarding import reference as bradley_terry

from common import cli

pytestmark = pytest.mark.env("vllm")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: micro models gain nothing from threads


FUNCTIONS = """
def length(messages, response):
    return len(response) / 10

def tagged(messages, response, record):
    return record["number"] + len(messages) * 100

def optional(messages, response, strict=False):
    return float(strict)

def sometimes(messages, response):
    return float("nan") if len(response) % 2 else len(response)

def broken(messages, response):
    if "Question 3" in messages[-1]["content"]:
        raise KeyError("who")
    return 0

def careless(messages, response, record):
    messages.append({"role": "user", "content": "z"})
    record["number"] += 1
    return len(messages) + 100 * record["number"]

def huge(messages, response):
    return 1e308

def slow(messages, response):
    import time
    time.sleep(0.05)
    return 1.0
"""


@pytest.fixture
def function(tmp_path):
    (tmp_path / "f.py").write_text(FUNCTIONS)
    return lambda name: f"{tmp_path / 'f.py'}:{name}"


def by_function(monkeypatch, tmp_path, spec, *more, target="out.jsonl"):
    monkeypatch.setattr(sys, "argv", ["x"])
    arguments = [
        "--dataset_name_or_path",
        str(tmp_path / "gen.jsonl"),
        "--output_dir",
        str(tmp_path / target),
    ]
    from annotate_data import get_rewards

    monkeypatch.setattr(
        sys, "argv", ["get_rewards.py", *arguments, "--reward_function", spec, *map(str, more)]
    )
    get_rewards.main()
    return read(tmp_path / target)


def test_a_function_cannot_reach_the_next_call_nor_the_summary(tmp_path, monkeypatch, function):
    rows = generated(tmp_path / "gen.jsonl", 3)
    rows[1]["num_tokens"] = 3  # another tool's field of that name
    rows[2]["num_tokens"] = ["a", "b", "c", "d"]
    write(tmp_path / "gen.jsonl", rows)
    out = by_function(monkeypatch, tmp_path, function("careless"))
    assert [r["rewards"] for r in out] == [[len(r["prompt"]) + 1 + 100 * (r["number"] + 1)] * 4 for r in rows]
    assert [r["num_tokens"] for r in out[1:]] == [3, ["a", "b", "c", "d"]]
    assert by_function(monkeypatch, tmp_path, function("huge"), target="b.jsonl")[0]["rewards"] == [None] * 4


def test_a_function_alone_needs_no_model(tmp_path, monkeypatch, function):
    rows = generated(tmp_path / "gen.jsonl", 7)
    out = by_function(monkeypatch, tmp_path, function("length"))
    assert [r["rewards"] for r in out] == [[pytest.approx(len(x) / 10) for x in r["responses"]] for r in rows]
    assert [{k: v for k, v in r.items() if k != "rewards"} for r in out] == rows
    out = by_function(monkeypatch, tmp_path, function("tagged"), target="b.jsonl")
    assert [r["rewards"] for r in out] == [[r["number"] + len(r["prompt"]) * 100.0] * 4 for r in rows]
    assert (
        by_function(monkeypatch, tmp_path, function("optional"), target="c.jsonl")[0]["rewards"] == [0.0] * 4
    )
    out = by_function(monkeypatch, tmp_path, function("sometimes"), target="d.jsonl")
    assert [r["rewards"] for r in out] == [
        [None if len(x) % 2 else len(x) for x in r["responses"]] for r in rows
    ]
    # its file is an input like a model's folder
    (tmp_path / "f.py").write_text(FUNCTIONS + "\n# other\n")
    with pytest.raises(cli.UserError, match="f.py\\) has changed"):
        by_function(monkeypatch, tmp_path, function("length"))


def test_a_partial_file_of_single_responses_is_refused(tmp_path, monkeypatch, function):
    """Earlier versions saved response by response: their numbers mean something else."""
    generated(tmp_path / "gen.jsonl", 3)
    by_function(monkeypatch, tmp_path, function("length"))
    (tmp_path / "out.jsonl").unlink()
    entries = [{"id": "started"}, {"id": 11, "reward": 1.0, "cut": 0}]
    write(tmp_path / "out.jsonl.partial", entries)
    with pytest.raises(cli.UserError, match="of an earlier version of this script; give --overwrite"):
        by_function(monkeypatch, tmp_path, function("length"))
    gc.collect()
    assert len(by_function(monkeypatch, tmp_path, function("length"), "--overwrite")) == 3


def test_what_is_wrong_with_a_function_is_one_line(tmp_path, monkeypatch, function):
    generated(tmp_path / "gen.jsonl", 7)
    with pytest.raises(cli.UserError, match="f.py has no function nowhere"):
        by_function(monkeypatch, tmp_path, function("nowhere"))
    rows = read(tmp_path / "gen.jsonl")
    with pytest.raises(
        cli.UserError, match="gen.jsonl record 4: the reward function .*:broken fails: KeyError"
    ):
        by_function(monkeypatch, tmp_path, function("broken"))
    assert "Question 3" in rows[3]["prompt"][-1]["content"]
    for spec, said in (
        ("f.py", "give FILE.py:NAME"),
        (str(tmp_path / "g.py") + ":f", "no such reward function file"),
    ):
        with pytest.raises(cli.UserError, match=said):
            by_function(monkeypatch, tmp_path, spec)
    (tmp_path / "bad.py").write_text("import nothing_of_that_name")
    with pytest.raises(cli.UserError, match="bad.py does not import: ModuleNotFoundError"):
        by_function(monkeypatch, tmp_path, f"{tmp_path / 'bad.py'}:f")


def test_a_weighted_sum_of_three_kinds(models, tmp_path, monkeypatch, function):
    rows = generated(tmp_path / "gen.jsonl", 5)
    names = [str(models["bt"]), str(models["armorm"]), function("sometimes")]
    out = annotate(
        monkeypatch,
        tmp_path / "gen.jsonl",
        tmp_path / "out.jsonl",
        names[0],
        names[1],
        "--reward_function",
        names[2],
        "--reward_weights",
        0.7,
        -0.3,
        2,
        "--chunk_records",
        2,
    )
    for record, row in zip(out, rows, strict=True):
        parts = record["reward_parts"]
        assert list(parts) == names
        for k, text in enumerate(row["responses"]):
            a, b = (
                bradley_terry(models["bt"], row["prompt"], text),
                armorm(models["armorm"], row["prompt"], text),
            )
            assert parts[names[0]][k] == pytest.approx(a, abs=1e-4) and parts[names[1]][k] == pytest.approx(
                b, abs=1e-4
            )
            if len(text) % 2:
                assert parts[names[2]][k] is None and record["rewards"][k] is None
            else:
                assert record["rewards"][k] == pytest.approx(0.7 * a - 0.3 * b + 2 * len(text), abs=2e-4)
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert set(manifest["inputs"]) == {
        "dataset_name_or_path",
        "reward_name_or_path",
        "reward_name_or_path 2",
        "reward_function",
    }
    message = refused(
        monkeypatch,
        tmp_path / "gen.jsonl",
        tmp_path / "out.jsonl",
        names[0],
        names[1],
        "--reward_function",
        names[2],
        "--reward_weights",
        0.7,
        -0.3,
        1,
    )
    assert "reward_weights was [0.7, -0.3, 2.0] and is now [0.7, -0.3, 1.0]" in message
    # annotated anew, the fields of the earlier annotation go
    again = annotate(monkeypatch, tmp_path / "out.jsonl", tmp_path / "again.jsonl", models["bt"])
    assert "reward_parts" not in again[0] and again[0]["rewards"] == out[0]["reward_parts"][names[0]]


def test_sums_that_make_no_sense_are_refused(models, tmp_path, monkeypatch, function):
    generated(tmp_path / "gen.jsonl", 2)
    files, bt, other = (tmp_path / "gen.jsonl", tmp_path / "out.jsonl"), models["bt"], models["armorm"]
    assert "2 scorers need --reward_weights" in refused(monkeypatch, *files, bt, other)
    assert "3 numbers in --reward_weights for 2" in refused(
        monkeypatch, *files, bt, other, "--reward_weights", 1, 2, 3
    )
    assert "finite numbers other than 0" in refused(
        monkeypatch, *files, bt, other, "--reward_weights", 1, "nan"
    )
    assert "named twice" in refused(monkeypatch, *files, bt, bt, "--reward_weights", 1, 2)
    message = refused(
        monkeypatch, *files, bt, other, "--reward_weights", 1, 2, "--reward_type", "auto", "auto", "auto"
    )
    assert "3 in --reward_type for 2 reward models" in message
    assert "--max_length must be" in refused(monkeypatch, *files, bt, "--max_length", 0)
    assert not list(tmp_path.glob("out*"))


def test_a_run_of_two_scorers_is_continued_by_two_processes(models, tmp_path, monkeypatch, function):
    """Stopped in the second scorer: what is saved is not scored again, by however many processes."""
    rows = generated(tmp_path / "gen.jsonl", 12)
    name, files = str(models["bt"]), (tmp_path / "gen.jsonl", tmp_path / "out.jsonl")
    fragile = function("fragile")
    (tmp_path / "f.py").write_text(
        FUNCTIONS
        + f"""
def fragile(messages, response):
    import os
    if "Question 3" in messages[-1]["content"] and not os.path.exists({str(tmp_path / "mended")!r}):
        raise OSError("no server")
    return len(response)
"""
    )
    arguments = ["--reward_function", fragile, "--reward_weights", 1, 0.5]
    message = refused(monkeypatch, *files, name, *arguments, "--chunk_records", 2)
    assert "record 4: the reward function" in message and "OSError: no server" in message
    saved = [json.loads(line)["id"] for line in Path(f"{files[1]}.partial").read_text().splitlines()]
    assert (
        sorted(saved[1:]) in ([*range(14)], [*range(15)]) and saved[0] == "records"
    )  # 12 + i: the function on record i
    (tmp_path / "mended").touch()
    gc.collect()  # the refusal's traceback still holds the lock on the output
    code, out, err = outcome(
        launch(
            "--dataset_name_or_path",
            files[0],
            "--output_dir",
            files[1],
            "--reward_name_or_path",
            name,
            *arguments,
            processes=2,
        )
    )
    assert code == 0, err
    assert out.count("scoring ") == 1 and f"scored {25 - len(saved)} records" in out
    for record, row in zip(read(files[1]), rows, strict=True):
        expected = [bradley_terry(models["bt"], row["prompt"], x) + len(x) / 2 for x in row["responses"]]
        assert record["rewards"] == pytest.approx(expected, abs=1e-4)
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_an_error_of_one_process_is_told_once_and_at_once(tmp_path, function):
    generated(tmp_path / "gen.jsonl", 40)
    arguments = [
        "--dataset_name_or_path",
        tmp_path / "gen.jsonl",
        "--output_dir",
        tmp_path / "out.jsonl",
        "--chunk_records",
        8,
    ]
    code, out, err = outcome(launch(*arguments, "--reward_function", function("broken"), processes=2))
    assert code != 0 and err.count("error: ") >= 1
    assert (
        len(
            [
                line
                for line in err.splitlines()
                if line.startswith("error: ") and "record 4: the reward function" in line
            ]
        )
        == 1
    )


@pytest.mark.parametrize("processes", [0, 2])
def test_ctrl_c_says_how_to_go_on(processes, tmp_path, function):
    generated(tmp_path / "gen.jsonl", 300)
    target = tmp_path / "out.jsonl"
    arguments = [
        "--dataset_name_or_path",
        tmp_path / "gen.jsonl",
        "--output_dir",
        target,
        "--reward_function",
        function("slow"),
    ]
    process = launch(*arguments, processes=processes, start_new_session=True)
    partial, deadline = Path(f"{target}.partial"), time.monotonic() + 90
    while not (partial.exists() and partial.stat().st_size > 300) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count("stopped; start the same command again to continue") == 1, (
        err
    )
    assert not target.exists() and partial.stat().st_size > 300


# ---- Memory ------------------------------------------------------------------------------------------------


def peak(tmp_path, count):
    """MB at the peak of a run over `count` records, as the kernel counts its one child."""
    source, rng = tmp_path / f"{count}.jsonl", random.Random(0)
    with open(source, "w", encoding="utf-8") as file:
        for i in range(count):
            responses = [f"{rng.random()} some text" * 3 for _ in range(4)]
            record = {
                "id": f"r{i}",
                "prompt": f"question {i}",
                "responses": responses,
                "num_tokens": [5, 6, 7, 8],
            }
            file.write(json.dumps(record) + "\n")
    (tmp_path / "f.py").write_text("def f(messages, response):\n    return float(response[:9])\n")
    script = str(ROOT / "annotate_data" / "get_rewards.py")
    arguments = ["--dataset_name_or_path", source, "--output_dir", tmp_path / f"{count}.out.jsonl"]
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    command = [sys.executable, script, *arguments, "--reward_function", f"{tmp_path / 'f.py'}:f"]
    answer = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert sum(1 for _ in open(tmp_path / f"{count}.out.jsonl", "rb")) == count
    return float(answer.stdout)


def test_memory_does_not_grow_with_the_records(tmp_path):
    few, many = peak(tmp_path, 2000), peak(tmp_path, 60000)
    print(f"{few:.0f} MB with 2,000 records, {many:.0f} MB with 60,000")
    # SQLite's two tables may fill 16 MiB of pages each; 58,000 records of 4 responses held in memory take 100
    # MB
    assert many < few + 25, (few, many)
