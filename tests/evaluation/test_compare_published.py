"""evaluation/compare_published.py: the table, against intervals computed by hand; docs/reproduce.md, against
the published figures that it shows.
"""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from common.cli import UserError
from evaluation import compare_published, evaluate_benchmarks

ROOT = Path(__file__).resolve().parents[2]
HELD = yaml.safe_load((ROOT / "evaluation/published.yaml").read_text())


def cell(value, column):
    if value is None:
        return "–"
    return f"{value:.2f}" if HELD["benchmarks"][column].get("scale") else f"{value:.1f}"


def test_the_page_shows_the_published_figures():
    text = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    for table in HELD["tables"]:
        for name, figures in table["rows"].items():
            cells = [cell(*pair) for pair in zip(figures, table["columns"], strict=True)]
            assert f"| {name} | {' | '.join(cells)} |" in text
        assert f"| model | {' | '.join(table['columns'])} |" in text
    errors = []
    for name, value in compare_published.published("iterative DPO")[1].items():
        benchmark = HELD["benchmarks"][name]
        own = math.sqrt(value / 100 * (1 - value / 100) / benchmark["questions"])
        errors.append("–" if benchmark.get("scale") else f"{100 * own:.1f}")
    assert f"| standard error of iterative DPO | {' | '.join(errors)} |" in text


def test_every_column_is_a_benchmark_that_the_default_tasks_or_a_judge_measure():
    tasks = {task.partition(":")[0]: task for task in evaluate_benchmarks.Arguments().tasks}
    measured = set()
    for name in HELD["tables"][0]["columns"]:
        benchmark = HELD["benchmarks"][name]
        if "judged" in benchmark:
            assert benchmark["judged"] in compare_published.JUDGED
            continue
        task = next(iter(benchmark["tasks"]))
        assert tasks[task] == f"{task}:{benchmark['examples']}"
        measured.add(task)
    assert measured == set(tasks)


@pytest.fixture
def compare(monkeypatch, capsys):
    def start(*words):
        monkeypatch.setattr(sys, "argv", ["compare_published.py", *map(str, words)])
        compare_published.main()
        return capsys.readouterr().out

    return start


@pytest.fixture
def run(tmp_path):
    """A run whose iterate 2 has part of the benchmarks."""
    folder = tmp_path / "mine/iter2/benchmarks"
    folder.mkdir(parents=True)
    tasks = {
        "gsm8k": {
            "exact_match,strict-match": 0.7500,
            "exact_match_stderr,strict-match": 0.012,
            "examples": 8,
        },
        "mmlu": {"acc,none": 0.65, "acc_stderr,none": 0.004, "examples": 0},
        "mbpp_instruct": {"pass_at_1,extract_code": 0.6, "examples": 0},
    }
    told = {"model": "m", "limit": None, "chat_template": "{{x}}", "system_instruction": 'Say "yes".'}
    (folder / "results.json").write_text(json.dumps(told | {"tasks": tasks}))
    return tmp_path / "mine"


def row_of(told, name):
    [line] = [line for line in told.splitlines() if re.match(rf"{name} +\d", line)]
    return [float(word) for word in re.findall(r"[-+]?\d+\.\d+", line)], line


def test_differences_and_intervals(compare, run):
    told = compare(run)
    (paper, mine, by, low, high), _ = row_of(told, "GSM8K")
    error = math.sqrt(1.2**2 + 80.7 * 19.3 / 1319)  # percent
    assert (paper, mine, by) == (80.7, 75.0, -5.7)
    assert low == pytest.approx(by - 1.96 * error, abs=0.051) and high == pytest.approx(
        by + 1.96 * error, abs=0.051
    )
    assert row_of(told, "MMLU")[1].endswith("0 examples, not 5")
    (*_, low, high), line = row_of(told, "MBPP")  # the harness gave no error
    assert line.endswith("mbpp_instruct")
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt((60 * 40 + 60.8 * 39.2) / 500), abs=0.11)
    assert 'in the model\'s chat template, system prompt "Say \\"yes\\"."' in told
    assert "missing: LC AlpacaEval 2, MT-Bench, Arena-Hard, HumanEval, TruthfulQA, ARC" in told
    asked = f"--run {run} --iterate 2 --tasks humaneval:0 truthfulqa_mc2:0 arc_challenge:25 --run_code true"
    assert f"evaluate_benchmarks.sh {asked}" in told
    assert f"evaluate_judged.sh --run {run} --iterate 2 --alpaca_eval mine/alpaca_eval.json" in told


def test_the_iterate_and_the_row(compare, run):
    (run / "iter5").mkdir()
    assert "GSM8K  " not in compare(run)
    (run / "best.json").write_text('{"iterate": 2}')
    (paper, *_), _ = row_of(compare(run, "--row", "SFT"), "GSM8K")
    assert paper == 74.2
    told = compare(run, "--iterate", 2, "--row", "v2 iteration 3")
    assert row_of(told, "GSM8K")[0][0] == 85.3 and "missing: MATH, HumanEval, ARC, TruthfulQA" in told
    with pytest.raises(UserError, match="did you mean 'iterative DPO'"):
        compare(run, "--row", "iterative dpo")
    with pytest.raises(UserError, match="is not there"):
        compare(run / "no")
    other = compare(run / "iter2/benchmarks")  # of a model without a run
    assert row_of(other, "GSM8K")[0][:2] == [80.7, 75.0]
    assert "--model_name_or_path m --output_dir" in other


def test_alpaca_evals_leaderboard(compare, run):
    import csv

    folder = run / "iter2/benchmarks/alpaca_eval"
    for judge, columns in (
        ("weighted_alpaca_eval_gpt4_turbo", {"length_controlled_winrate": 30.0, "lc_standard_error": 0.5}),
        ("local", {"win_rate": 71.0, "standard_error": 1.5}),
    ):
        (folder / judge).mkdir(parents=True)
        with open(folder / judge / "leaderboard.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["", *columns])
            writer.writerow(["other", *[99.0 for _ in columns]])
            writer.writerow(["mine-iter2", *columns.values()])
    told = compare(run)
    (paper, mine, by, low, high), _ = row_of(told, "LC AlpacaEval 2")
    assert (paper, mine, by) == (31.3, 30.0, -1.3)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 + 31.3 * 68.7 / 805), abs=0.11)
    assert "alpaca_eval by local, not length-controlled: 71.00 ± 1.50" in told
    assert "LC AlpacaEval 2" in compare(run, "--generator", "third").split("missing:")[1]


def test_judgments_of_arena_hard_and_mt_bench(compare, run):
    """Against pandas: the explosion of weighted scores of arena-hard-auto's show_result.py, and FastChat's
    mean over all scores that are not -1.
    """
    generator = np.random.default_rng(0)
    weight = {"A>>B": [1] * 3, "A>B": [1], "A=B": [0.5], "B>A": [0], "B>>A": [0] * 3}
    labels, rows = list(weight), []
    for i in range(40):
        first, second = generator.choice(labels, 2)
        rows.append({"uid": i, "model": "mine-iter2", "games": [{"score": first}, {"score": second}]})
    frame = pd.DataFrame(rows)
    scores = frame.games.map(lambda g: weight[g[1]["score"]] + [1 - s for s in weight[g[0]["score"]]])
    lost = {"uid": 99, "model": "mine-iter2", "games": [None, {"score": "A>B"}]}
    other = rows[0] | {"model": "other"}
    write(run, "arena-hard-v0.1", "gpt-4-1106-preview", [*rows, lost, other])
    write(run, "arena-hard-v0.1", "local", rows[:1])
    marks = [
        {"model": "mine-iter2", "question_id": i, "turn": turn, "score": int(generator.integers(1, 11))}
        for i in range(80)
        for turn in (1, 2)
    ]
    write(run, "mt_bench", "gpt-4", [*marks, marks[0] | {"score": -1}, marks[0] | {"model": "other"}])
    told = compare(run)
    (paper, mine, *_), line = row_of(told, "Arena-Hard")
    assert paper == 29.1 and mine == pytest.approx(100 * scores.explode().astype(float).mean(), abs=0.051)
    assert line.endswith("1 without a verdict") and "arena-hard-v0.1 by local: " in told
    (paper, mine, _, low, high), _ = row_of(told, "MT-Bench")
    by_question = pd.DataFrame(marks).groupby("question_id").score.mean()
    assert paper == 8.46 and mine == pytest.approx(by_question.mean(), abs=0.0051)
    error = by_question.std(ddof=0) / math.sqrt(80)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(2) * error, abs=0.011)
    write(run, "mt_bench", "gpt-4", [{"model": "mine-iter2"}])
    with pytest.raises(UserError, match="cannot be read"):
        compare(run)


@pytest.mark.parametrize(
    "held", ["", "{", "[]", '{"tasks": []}', '{"tasks": {"gsm8k": 5}}'], ids=["empty", "torn", *"lnf"]
)
def test_a_damaged_results_file_is_named_and_not_taken_for_none(compare, run, held):
    [path] = run.rglob("results.json")
    path.write_text(held)
    with pytest.raises(UserError, match="results.json is damaged: delete it and start evaluate_benchmarks"):
        compare(run, "--iterate", path.parents[1].name.removeprefix("iter"))


def test_a_figure_that_is_no_number_is_missing(compare, run):
    [path] = run.rglob("results.json")
    held = json.loads(path.read_text())
    held["tasks"] = {"gsm8k": {"exact_match,flexible-extract": None, "exact_match,strict-match": None}}
    path.write_text(json.dumps(held))
    told = compare(run, "--iterate", path.parents[1].name.removeprefix("iter"))
    assert re.search("^missing: .*GSM8K", told, re.MULTILINE)
    with pytest.raises(UserError, match="iter9 is not there"):
        compare(run, "--iterate", "9")


def test_the_error_over_questions_is_that_of_a_bootstrap():
    generator = np.random.default_rng(1)
    weights = generator.choice([2, 4, 6], 400)
    sums = [(float(generator.binomial(w, 0.3)), int(w)) for w in weights]
    mean, error = compare_published.weighted_mean(sums)
    drawn = np.array(sums)[generator.integers(0, 400, (4000, 400))].sum(1)
    assert mean == pytest.approx(sum(s for s, _ in sums) / sum(w for _, w in sums))
    assert error == pytest.approx((drawn[:, 0] / drawn[:, 1]).std(), rel=0.06)


def write(run, bench, judge, rows):
    path = run / f"iter2/benchmarks/{bench}/judgments/{judge}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
