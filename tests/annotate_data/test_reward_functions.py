"""Reward functions of the user's own, weighted sums with models, several processes, flat memory."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rewarding import armorm, command, generated, launch, outcome, read, write
from rewarding import reference as bradley_terry

from common import cli

pytestmark = pytest.mark.env("vllm")

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

def fragile(messages, response):
    import os
    if "Question 3" in messages[-1]["content"] and not os.path.exists(__file__.replace("f.py", "mended")):
        raise OSError("no server")
    return len(response)

def slow(messages, response):
    import time
    time.sleep(0.05)
    return 1.0
"""


@pytest.fixture
def function(tmp_path):
    (tmp_path / "f.py").write_text(FUNCTIONS)
    return lambda name: f"{tmp_path / 'f.py'}:{name}"


@pytest.fixture
def by(annotate, function):
    """Annotates by a function alone; its file is the output's name."""
    return lambda name: annotate(target=f"{name}.jsonl", reward_function=function(name))


def rewards(records):
    return [record["rewards"] for record in records]


def test_a_function_cannot_reach_the_next_call_nor_the_summary(tmp_path, by):
    rows = generated(tmp_path / "gen.jsonl", 3)
    rows[1]["num_tokens"] = 3  # another tool's field of that name
    rows[2]["num_tokens"] = ["a", "b", "c", "d"]
    write(tmp_path / "gen.jsonl", rows)
    out = by("careless")
    assert rewards(out) == [[len(r["prompt"]) + 1 + 100 * (r["number"] + 1)] * 4 for r in rows]
    assert [r["num_tokens"] for r in out[1:]] == [3, ["a", "b", "c", "d"]]
    assert rewards(by("huge"))[0] == [None] * 4


def test_a_function_alone_needs_no_model(tmp_path, annotate, by):
    rows = generated(tmp_path / "gen.jsonl", 7)
    out = by("length")
    assert rewards(out) == [[pytest.approx(len(x) / 10) for x in r["responses"]] for r in rows]
    assert [{k: v for k, v in r.items() if k != "rewards"} for r in out] == rows
    assert rewards(by("tagged")) == [[r["number"] + len(r["prompt"]) * 100.0] * 4 for r in rows]
    assert rewards(by("optional"))[0] == [0.0] * 4
    expected = [[None if len(x) % 2 else len(x) for x in r["responses"]] for r in rows]
    assert rewards(by("sometimes")) == expected
    # its file is an input like a model's folder
    (tmp_path / "f.py").write_text(FUNCTIONS + "\n# other\n")
    with pytest.raises(cli.UserError, match="f.py\\) has changed"):
        annotate(target="length.jsonl", reward_function=f"{tmp_path / 'f.py'}:length")


def test_what_is_wrong_with_a_function_is_one_line(tmp_path, refused, function):
    rows = generated(tmp_path / "gen.jsonl", 7)
    assert "Question 3" in rows[3]["prompt"][-1]["content"]
    (tmp_path / "bad.py").write_text("import nothing_of_that_name")
    for spec, told in {
        function("nowhere"): "f.py has no function nowhere",
        function("broken"): "gen.jsonl record 4: the reward function ",
        "f.py": "give FILE.py:NAME",
        f"{tmp_path / 'g.py'}:f": "no such reward function file",
        f"{tmp_path / 'bad.py'}:f": "bad.py does not import: ModuleNotFoundError",
    }.items():
        assert told in refused(reward_function=spec)


def test_a_weighted_sum_of_three_kinds(models, annotate, refused, tmp_path, function):
    rows, kinds = generated(tmp_path / "gen.jsonl", 5), (models["bt"], models["armorm"])
    names = [*map(str, kinds), function("sometimes")]
    out = annotate(*kinds, reward_function=names[2], reward_weights=[0.7, -0.3, 2], chunk_records=2)
    for record, row in zip(out, rows, strict=True):
        parts = record["reward_parts"]
        assert list(parts) == names
        for k, text in enumerate(row["responses"]):
            a, b = (of(kind, row["prompt"], text) for of, kind in zip((bradley_terry, armorm), kinds))
            assert [parts[names[0]][k], parts[names[1]][k]] == pytest.approx([a, b], abs=1e-4)
            if len(text) % 2:
                assert parts[names[2]][k] is None and record["rewards"][k] is None
            else:
                assert record["rewards"][k] == pytest.approx(0.7 * a - 0.3 * b + 2 * len(text), abs=2e-4)
    inputs = json.loads((tmp_path / "out.manifest.json").read_text())["inputs"]
    second = "reward_name_or_path 2"
    assert set(inputs) == {"dataset_name_or_path", "reward_name_or_path", second, "reward_function"}
    told = refused(*kinds, reward_function=names[2], reward_weights=[0.7, -0.3, 1])
    assert "reward_weights was [0.7, -0.3, 2.0] and is now [0.7, -0.3, 1.0]" in told
    # annotated anew, the fields of the earlier annotation go
    again = annotate(models["bt"], source="out.jsonl", target="again.jsonl")
    assert "reward_parts" not in again[0] and again[0]["rewards"] == out[0]["reward_parts"][names[0]]


def test_sums_that_make_no_sense_are_refused(models, refused, tmp_path):
    generated(tmp_path / "gen.jsonl", 2)
    bt, other = models["bt"], models["armorm"]
    assert "2 scorers need --reward_weights" in refused(bt, other)
    assert "3 numbers in --reward_weights for 2" in refused(bt, other, reward_weights=[1, 2, 3])
    assert "finite numbers other than 0" in refused(bt, other, reward_weights=[1, "nan"])
    assert "named twice" in refused(bt, bt, reward_weights=[1, 2])
    told = refused(bt, other, reward_weights=[1, 2], reward_type=["auto"] * 3)
    assert "3 in --reward_type for 2 reward models" in told
    assert not list(tmp_path.glob("out*"))


def test_a_run_of_two_scorers_is_continued_by_two_processes(models, refused, tmp_path, function):
    """Stopped in the second scorer: what is saved is not scored again, by however many processes."""
    rows, target = generated(tmp_path / "gen.jsonl", 12), tmp_path / "out.jsonl"
    settings = {"reward_function": function("fragile"), "reward_weights": [1, 0.5]}
    told = refused(models["bt"], **settings, chunk_records=2)
    assert "record 4: the reward function" in told and "OSError: no server" in told
    saved = [json.loads(line)["id"] for line in Path(f"{target}.partial").read_text().splitlines()]
    assert saved[0] == "records"
    assert sorted(saved[1:]) in ([*range(14)], [*range(15)])  # 12 + i: the function on record i
    (tmp_path / "mended").touch()
    argv = command(tmp_path / "gen.jsonl", target, models["bt"], **settings)
    code, out, err = outcome(launch(argv, processes=2))
    assert code == 0, err
    assert (
        out.count("scoring ") == 1
        and "2 × cpu" in out
        and out.count(f"scored {25 - len(saved)} records") == 1
    )
    for record, row in zip(read(target), rows, strict=True):
        expected = [bradley_terry(models["bt"], row["prompt"], x) + len(x) / 2 for x in row["responses"]]
        assert record["rewards"] == pytest.approx(expected, abs=1e-4)
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_an_error_of_one_process_is_told_once_and_at_once(tmp_path, function):
    generated(tmp_path / "gen.jsonl", 40)
    settings = {"chunk_records": 8, "reward_function": function("broken")}
    argv = command(tmp_path / "gen.jsonl", tmp_path / "out.jsonl", **settings)
    code, out, err = outcome(launch(argv, processes=2))
    told = [
        line for line in err.splitlines() if line.startswith("error: ") and "record 4: the reward" in line
    ]
    assert code != 0 and len(told) == 1


@pytest.mark.parametrize("processes", [0, 2])
def test_ctrl_c_says_how_to_go_on(processes, tmp_path, function):
    generated(tmp_path / "gen.jsonl", 300)
    target = tmp_path / "out.jsonl"
    argv = command(tmp_path / "gen.jsonl", target, reward_function=function("slow"))
    process = launch(argv, processes=processes, start_new_session=True)
    partial, deadline = Path(f"{target}.partial"), time.monotonic() + 90
    while not (partial.exists() and partial.stat().st_size > 300) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count("stopped; start the same command again to continue") == 1, err
    assert not target.exists() and partial.stat().st_size > 300


def peak(tmp_path, count):
    """MB at the peak of a run over `count` records, as the kernel counts its one child."""
    source, target, rng = tmp_path / f"{count}.jsonl", tmp_path / f"{count}.out.jsonl", random.Random(0)
    with open(source, "w", encoding="utf-8") as file:
        for i in range(count):
            responses = [f"{rng.random()} some text" * 32 for _ in range(4)]
            record = {
                "id": f"r{i}",
                "prompt": f"question {i}",
                "responses": responses,
                "num_tokens": [5, 6, 7, 8],
            }
            file.write(json.dumps(record) + "\n")
    (tmp_path / "f.py").write_text("def f(messages, response):\n    return float(response[:9])\n")
    code = (
        "import resource as r, subprocess as s, sys; s.run(sys.argv[1:], check=True, stdout=s.DEVNULL);"
        "print(r.getrusage(r.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    argv = command(source, target, reward_function=f"{tmp_path / 'f.py'}:f")
    measure = [sys.executable, "-c", code, sys.executable, *argv]
    answer = subprocess.run(measure, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert len(read(target)) == count
    return float(answer.stdout)


def test_memory_does_not_grow_with_the_records(tmp_path):
    few, many = peak(tmp_path, 1000), peak(tmp_path, 12000)
    assert many < few + 15, (few, many)  # places of saved records are held; the texts alone have 40 MB
