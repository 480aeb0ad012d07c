"""benchmarks/baselines.py: its commands are what the drivers take, and its table is of what the runs hold.

The runs are planted ones; whole experiments take an hour.
"""

import json
import math
from pathlib import Path

import pytest
import report_runs
import yaml

from benchmarks import baselines
from common import cli
from evaluation import metrics
from loop.online_plan import OnlineSettings
from loop.settings import LoopSettings
from ppo.run import PPOSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("way", baselines.WAYS)
def test_every_way_is_a_run_that_its_driver_takes(way, tmp_path):
    bash, driver, *words = baselines.command(way, tmp_path, 3)
    assert bash == "bash" and (ROOT / driver).is_file()
    kinds = {"run_loop.sh": LoopSettings, "run_ppo.sh": PPOSettings, "run_online.sh": OnlineSettings}
    settings = cli.parse(kinds[driver], "", words)
    assert not settings.problems and settings.seed == 3 and "--seed 3" in settings.setup_command
    answered = [Path(name).name for name in settings.prompts]
    rounds = getattr(settings, "iterations", 1)
    assert way != "online" or settings.online["rounds"] * settings.online["prompts_per_round"] == 675
    assert answered == (
        ["all.jsonl"] if way in baselines.ONCE else ["iter1.jsonl", "iter2.jsonl", "iter3.jsonl"]
    )
    assert rounds == (3 if way in ("loop", "sft_loop", "online") else 1)


@pytest.mark.parametrize("freedom", range(1, len(baselines.STUDENT) + 1))
def test_the_points_are_students(freedom):
    """The density, added up from -t to t, is 0.95."""
    t, steps = baselines.STUDENT[freedom - 1], 200_000
    constant = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    width = t / steps
    middles = (width * (step + 0.5) for step in range(steps))
    inside = 2 * width * sum(constant * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in middles)
    assert inside == pytest.approx(0.95, abs=5e-5)


def test_a_row_is_of_the_last_policy_and_of_all_trainings(tmp_path):
    folder = tmp_path / "loop"
    report_runs.make_run(folder, iterations=2)
    gold = tmp_path / "gold.py"
    gold.write_text(report_runs.GOLD)
    settings = folder / "loop.yaml"
    held = yaml.safe_load(settings.read_text()) | {"gold_function": f"{gold}:gold_score", "iterations": 2}
    settings.write_text(yaml.safe_dump(held))
    for i, pairs in ((1, 20), (2, 21)):
        manifest = {"counts": {"train_pairs": pairs}, "metrics": {"step": 10 * i}}
        (folder / f"iter{i}" / "model.manifest.json").write_text(json.dumps(manifest))
    rows = [{"iterate": i, "sampled_gold": i / 10, "kl": float(i)} for i in range(3)]
    (folder / "metrics.json").write_text(json.dumps({"iterates": rows}))

    found = baselines.read_way(folder)
    assert (found["iterate"], found["sampled_gold"], found["kl"]) == (2, 0.2, 2.0)
    assert (found["pairs"], found["steps"]) == (41, 30)
    answers = metrics.read_rewarded(folder / "iter2" / "heldout_sampled.rewarded.jsonl")
    first = next(iter(answers.values()))
    scores = [float(text.rsplit("gold=", 1)[1].split()[0]) for text in first["responses"]]
    assert found["prompts"][first["id"]] == pytest.approx(sum(scores) / len(scores))

    # Online, each training's manifest counts from the start on.
    settings.write_text(yaml.safe_dump(held | {"online": {"rounds": 4}, "evaluate_every": 2}))
    assert [baselines.read_way(folder)[key] for key in ("iterate", "pairs", "steps")] == [2, 21, 20]
    settings.write_text(yaml.safe_dump(held))

    (folder / "metrics.json").write_text(json.dumps({"iterates": rows[:2]}))  # the last one is not measured
    assert baselines.read_way(folder) is None
    assert baselines.read_way(tmp_path / "none") is None


def test_differences_are_of_the_same_seed_and_prompts():
    row = {"greedy_gold": 0.5, "sampled_reward": 1.0, "sampled_length": 9.0, "kl": 1.0}
    row |= {"pairs": 10, "steps": 2}

    def of(gold, prompts):
        return row | {"sampled_gold": gold, "prompts": prompts}

    found = {
        "loop": {0: of(0.6, {"a": 0.5, "b": 0.7}), 1: of(0.5, {"a": 0.4, "b": 0.6})},
        "sft": {0: of(0.5, {"a": 0.3, "b": 0.6, "c": 1.0}), 1: of(0.5, {"b": 0.5})},
    }
    loop, sft = baselines.table(found).splitlines()[2:]
    # seed 0: (-0.2 - 0.1) / 2 = -0.15 over a and b, c has no partner; seed 1: -0.1 over b
    assert f"-0.125 ± {12.706 * 0.025:.3f}" in sft and "±" not in loop
    ppo = baselines.table({"ppo": {0: of(0.5, {}) | {"pairs": 0, "steps": 21}}})
    assert ppo.splitlines()[-1].endswith("| – |  |")
    assert "| 0.550 (0.500 to 0.600) |" in loop and "| 10 (10 to 10), 2 (2 to 2) |" in sft
