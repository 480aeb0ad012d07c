"""evaluation/run_metrics.py: the rows of a run against what its files say, as JSON, as CSV, and as the
trackers' own readers read them.
"""

import csv
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from common import trackers
from common.cli import UserError
from evaluation import metrics, run_metrics

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "evaluation/run_metrics.py"


def rewarded(path, seed, K, shift=0.0, prompts=12):
    rng = random.Random(seed)
    rows = [
        {
            "id": f"p{i}",
            "prompt": [{"role": "user", "content": str(i)}],
            "responses": ["x" * (k + 1) for k in range(K)],
            "rewards": [round(rng.gauss(shift, 1), 1) for _ in range(K)],
            "num_tokens": list(range(1, K + 1)),
            "finish_reasons": ["stop"] * K,
        }
        for i in range(prompts)
    ]
    rows[3]["rewards"][0] = None
    write(path, rows)


def write(path, rows, torn=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two iterations with a second reward model; the start has a KL of 0."""
    folder = tmp_path_factory.mktemp("made") / "night"
    for n in range(3):
        place, given = folder / f"iter{n}", []
        place.mkdir(parents=True)
        for i, (kind, K) in enumerate((("sampled", 4), ("greedy", 1))):
            for name, what, shift in ((kind, "rewarded", n), (f"judge_{kind}", "judged", -n)):
                path = place / f"heldout_{kind}.{what}.jsonl"
                rewarded(path, n * 10 + i + 5 * (what == "judged"), K, shift)
                given += [f"--{name}", str(path)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["metrics.py", *given, "--output_dir", str(place / "metrics.json")])
            metrics.main()
        estimates = {"kl": 1.5 * n, "kl_se": 0.1, "kl_per_token": 0.2 * n, "model": "m", "responses": 48}
        (place / "divergence.json").write_text(json.dumps(estimates))
    trained = {"metrics": {"train_loss": 0.5, "rewards/margins": 0.25, "epoch": 2.0}}
    (folder / "iter2/model.manifest.json").write_text(json.dumps(trained))
    steps = ((0, "train", 7), (0, "train", 5), (1, "measure", 3), (1, "train", 4), (2, "sample", 9))
    steps = [{"policy": i, "step": name, "seconds": n} for i, name, n in steps]
    write(folder / "stages.jsonl", steps, '{"policy": 2, "sta')
    (folder / "loop.yaml").write_text("seed: 7\n")
    return folder


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "night"))


@pytest.fixture
def save(run, monkeypatch, capsys):
    """Start the script in this process; gives what it says."""

    def start(*more):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["run_metrics.py", "--run", str(run), *more])
        run_metrics.main()
        return capsys.readouterr().out

    return start


def held(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_rows_say_what_the_files_say(run, save):
    table = save()
    found = json.loads((run / "metrics.json").read_text())
    assert found["run"] == "night" and [row["iterate"] for row in found["iterates"]] == [0, 1, 2]
    keys = [tuple(row) for row in found["iterates"]]
    assert len(set(keys)) == 1
    start, _, last = found["iterates"]
    of_two = json.loads((run / "iter2/metrics.json").read_text())
    for kind in ("sampled", "greedy"):
        assert {key: last[f"{kind}_{key}"] for key in of_two[kind]} == of_two[kind]
        assert {key: last[f"judge_{kind}_{key}"] for key in of_two["judge"][kind]} == of_two["judge"][kind]
    for prefix, name in (("sampled", "heldout_sampled.rewarded"), ("judge_greedy", "heldout_greedy.judged")):
        wins = []
        for a, b in zip(held(run / f"iter2/{name}.jsonl"), held(run / f"iter0/{name}.jsonl"), strict=True):
            pairs = [(x, y) for x in a["rewards"] for y in b["rewards"] if x is not None and y is not None]
            if pairs:
                wins.append(sum(1.0 if x > y else 0.5 if x == y else 0.0 for x, y in pairs) / len(pairs))
        assert last[f"{prefix}_win_rate"] == pytest.approx(sum(wins) / len(wins), abs=1e-6)
        assert start[f"{prefix}_win_rate"] is None
    assert last["sampled_win_rate"] > 0.8 and last["judge_sampled_win_rate"] < 0.2
    names = ("kl", "kl_se", "kl_per_token", "train_loss", "train_rewards_margins")
    assert [last[name] for name in names] == [3.0, 0.1, 0.4, 0.5, 0.25]
    # a policy's seconds are those of its own steps and of the training that made it
    names = ("seconds", "train_seconds", "sample_seconds", "measure_seconds")
    seconds = [[row.get(name) for name in names] for row in found["iterates"]]
    assert seconds == [[None] * 4, [15, 12, None, 3], [13, 4, 9, None]]
    with open(run / "metrics.csv", newline="") as file:
        rows = [
            {key: float(cell) if cell else None for key, cell in row.items()} for row in csv.DictReader(file)
        ]
    assert rows == found["iterates"]
    head = table.splitlines()[0]
    assert "judge" in head and "greedy judge" in head and "KL" in head and "3.00 ±0.10" in table
    assert table.count(" judge ") >= 3 and "  sampled judge  -" in table


def test_a_run_that_has_not_changed_is_not_computed_again(run, save, monkeypatch):
    first, before = save(), {path: path.stat().st_mtime_ns for path in run.glob("metrics.*")}
    with monkeypatch.context() as patch:
        for name in ("rows", "read_rewarded"):
            patch.setattr(run_metrics if name == "rows" else metrics, name, None)
        assert save() == first
    assert {path: path.stat().st_mtime_ns for path in run.glob("metrics.*")} == before
    (run / "metrics.csv").unlink()
    assert save() == first and (run / "metrics.csv").is_file()
    rows = held(run / "iter2/heldout_sampled.rewarded.jsonl")  # scored again
    write(run / "iter2/heldout_sampled.rewarded.jsonl", [row | {"rewards": [9.0] * 4} for row in rows])
    assert save() != first
    (run / "iter2/divergence.json").unlink()
    (run / "iter1/metrics.json").unlink()
    save()
    rows = json.loads((run / "metrics.json").read_text())["iterates"]
    assert [row["iterate"] for row in rows] == [0, 2] and rows[1]["kl"] is None


def test_tensorboard_reads_the_iterations_as_steps(run, save):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run / "iter2/metrics.json").rename(run / "later.json")
    save("--report_to", "tensorboard")
    (run / "later.json").rename(run / "iter2/metrics.json")
    # what a driver's start at a finished run leaves
    (run / "loop.yaml").write_text("seed: 7\nreport_to: [tensorboard]\n")
    assert "tensorboard: logged 1 iterate, 2 iterates had been logged before\n" in save()
    assert "tensorboard: logged 0 iterates, 3 iterates had been logged before\n" in save()
    assert "tensorboard" not in save("--report_to", "none")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = json.loads((run / "metrics.json").read_text())["iterates"]
    for key in ("sampled_reward", "kl", "judge_sampled_win_rate"):
        want = [(row["iterate"], row[key]) for row in rows if row[key] is not None]
        assert [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(key)] == want
    assert "iterate" not in events.Tags()["scalars"]


def wandb_records(data):
    """The records of an offline file, by W&B's own message type: behind 7 bytes a LevelDB log, blocks of 32
    KiB of (crc, size, kind, bytes).
    """
    from wandb.proto import wandb_internal_pb2

    at, parts = 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def test_wandb_offline_is_one_run(run):
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_PROJECT": "of the environment"}
    (run / "loop.yaml").write_text("seed: 7\nproject: nights\nrun_name: the first\n")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--run", run, "--report_to", "wandb"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=300,
    )
    assert done.returncode == 0 and "note:" not in done.stdout, done.stdout + done.stderr
    states = json.loads((run / "trackers.json").read_text())
    assert states["wandb"]["iterates"] == [0, 1, 2]
    [folder] = (run / "wandb").glob("offline-run-*")
    assert folder.name.endswith(states["wandb"]["id"])
    steps, named = {}, []
    for record in wandb_records(next(folder.glob("*.wandb")).read_bytes()):
        if record.WhichOneof("record_type") == "run":
            named.append((record.run.project, record.run.display_name))
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            items = {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in items}
            steps[items["_step"]] = [items[key] for key in ("sampled_reward", "kl")]
    assert set(named) == {("nights", "the first")}
    rows = json.loads((run / "metrics.json").read_text())["iterates"]
    assert steps == {row["iterate"]: [row["sampled_reward"], row["kl"]] for row in rows}


def test_a_tracker_that_fails_is_a_note(run, monkeypatch, capsys):
    def fails(*given):
        raise OSError("no network")

    monkeypatch.setitem(trackers.OWN_WAY, "wandb", fails)
    rows = run_metrics.rows(run)
    run_metrics.log(run, rows, ["wandb", "tensorboard"])
    assert "note: wandb was not told of this run: OSError: no network" in capsys.readouterr().out
    states = json.loads((run / "trackers.json").read_text())
    assert states["tensorboard"]["iterates"] == [0, 1, 2] and not states["wandb"]["iterates"]


def test_refusals(save):
    with pytest.raises(UserError, match="one of none, wandb"):
        save("--report_to", "wanbd")


def test_the_judges_interval_stands_beside_the_others(run):
    found = {(one["answers"], one["quantity"]): one for one in metrics.gains(metrics.read_run(run))}
    assert set(found) == {(kind, name) for kind in ("sampled", "greedy") for name in ("reward", "judge")}
    assert found["sampled", "reward"]["low"] > 0 > found["sampled", "judge"]["high"]
    assert {(one["first"], one["last"]) for one in found.values()} == {(0, 2)}


def test_a_run_that_is_not_evaluated_has_its_trainings(run, save):
    for path in [*run.glob("iter*/metrics.json"), *run.glob("iter*/divergence.json")]:
        path.unlink()
    (run / "loop.yaml").write_text("heldout_prompts: null\n")
    (run / "iter2/model.manifest.json").write_text('{"complete": true, "metrics": {"train_loss": 0.5}}')
    said = save()
    assert "not evaluated: heldout_prompts is null" in said and said.split()[:2] == ["iterate", "seconds"]
    rows = {"iterate": 2, "train_loss": 0.5, "seconds": 13, "train_seconds": 4, "sample_seconds": 9}
    assert json.loads((run / "metrics.json").read_text())["iterates"] == [rows]
    (run / "iter2/model.manifest.json").unlink()  # nothing is trained yet
    assert "not evaluated" in save()
    assert (run / "metrics.csv").read_text() == "iterate\n"


def test_greedy_answers_or_the_judge_may_be_left_out(run, save):
    for path in run.glob("iter?/metrics.json"):
        known = json.loads(path.read_text())
        known["files"] = {"sampled": known["files"]["sampled"]}
        path.write_text(json.dumps({key: known[key] for key in ("sampled", "files")}))
    table = save()
    assert "greedy" not in table and "judge" not in table and "sampled reward" in table
    row = json.loads((run / "metrics.json").read_text())["iterates"][2]
    assert row["sampled_win_rate"] > 0.8 and not [key for key in row if "greedy" in key or "judge" in key]


@pytest.mark.parametrize(
    "change", [{"files": [1]}, {"files": {"sampled": [1]}}, {"judge": {"sampled": 1e308}}, {"sampled": True}]
)
def test_metrics_of_another_form_are_refused_by_name(tmp_path, change):
    path = tmp_path / "iter0" / "metrics.json"
    path.parent.mkdir()
    path.write_text(json.dumps(change))
    with pytest.raises(UserError, match="iter0/metrics.json does not hold metrics"):
        run_metrics.rows(tmp_path)
