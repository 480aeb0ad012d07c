"""benchmarks/online.py: its table is of what the runs hold, and its arithmetic that of our own sums.

The runs are planted ones; the real ones take minutes.
"""

import json
import sys
from pathlib import Path

import pytest
import report_runs

from benchmarks import online
from common.cli import UserError
from loop import online_plan, plan

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_has_the_seconds_of_both_runs(tmp_path):
    entry = {"sending": 0.5, "sampling": 9.0, "waiting": 1.0, "scoring": 0.25, "reference": 0.1, "kl": 0.05}
    entry |= {"training": 2.1, "all": 4.0}
    rounds = [{"round": n, "seconds": entry} for n in range(3)]
    report_runs.write(tmp_path / "online/online/rounds.jsonl", rounds)
    folder = report_runs.make_run(tmp_path / "loop", iterations=1, evaluated=False)
    for name, counts in (("generated", {"engine_seconds": 4.0}), ("rewarded", {"scoring_seconds": 2.0})):
        held = {"counts": counts, "complete": True}
        (folder / f"iter1/{name}.manifest.json").write_text(json.dumps(held))
    metrics = {"train_runtime": 5.0, "eval_runtime": 1.0}
    held = {"counts": {}, "metrics": metrics, "complete": True}
    (folder / "iter1/model.manifest.json").write_text(json.dumps(held))

    parts = {"online": online.of_online(tmp_path / "online"), "loop": online.of_loop(folder)}
    assert parts["loop"] == {"waiting": 4.0, "scoring": 2.0, "training": 6.0}
    spent = {"online": {"wall": 30.0, "cpu": 60.0}, "loop": {"wall": 42.0, "cpu": 90.0}}
    lines = online.table(online.Arguments(rounds=3, prompts_per_round=10), spent, parts).splitlines()
    assert "3 rounds of 10 " in lines[0] and "one iteration of 30 " in lines[0]
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (x.split("|") for x in lines)}
    assert rows["in all"] == ["30.0", "10.0", "42.0", "14.0"]
    assert rows["starts"] == ["18.0", "6.0", "30.0", "10.0"]  # 30 − 3 × 4; 42 − 12
    assert rows["sending"] == ["1.5", "0.5", "–", "–"]
    assert rows["training"] == ["6.3", "2.1", "6.0", "2.0"]
    assert rows["CPU seconds of all processes"] == ["60.0", "20.0", "90.0", "30.0"]
    whole = online.of_whole(spent).splitlines()
    assert whole[2:] == ["| clock | 30 | 42 | 0.71 |", "| CPU seconds of all processes | 60 | 90 | 0.67 |"]


def test_the_arithmetic_is_that_of_check(monkeypatch, capsys, tmp_path):
    """The hours of both drivers' --check for the recipe's configurations on 8 × A100."""
    text = online.arithmetic()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    more = ["--run_dir", str(tmp_path / "run"), "--num_gpus", "8", "--gpu_memory_gib", "80"]
    once = ["--training_args.num_train_epochs", "1"]  # as online
    for planner, config, wanted, own in (
        (online_plan, "online", "online, staleness 1, 4 + 4 GPUs", []),
        (plan, "loop", "a loop's iteration, 8 GPUs, its starts apart", once),
    ):
        given = ["check", f"configs/{config}_llama3_8b.yaml", *more, *own]
        monkeypatch.setattr(sys, "argv", ["plan.py", *given])
        planner.main()
        told = capsys.readouterr().err
        [row] = [line for line in text.splitlines() if wanted in line]
        hours = row.split("|")[3].strip()
        if config == "online":
            assert f"time: about {hours} in all" in told
        else:  # three iterations of 20,000 prompts, where the row has 48,000
            assert minutes(hours) == pytest.approx(
                minutes(told.split("time: about ")[1].split()[0]) * 48000 / 60000, rel=0.01
            )


def minutes(text):
    hours, rest = text.split("h")
    return 60 * int(hours) + int(rest.removesuffix("m"))


def test_more_prompts_than_there_are_are_refused(built, tmp_path):
    online.write_prompts(tmp_path / "some.jsonl", 300)
    lines = (tmp_path / "some.jsonl").read_text().split("\n")
    assert len(lines) == 301 and len(set(lines)) == 301
    with pytest.raises(UserError, match="are 676 prompts, the tiny task has 675"):
        online.write_prompts(tmp_path / "all.jsonl", 676)
