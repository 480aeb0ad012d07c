"""evaluation/metrics.py: figures against independent computations, pairing, the table, refusals.

Needs numpy, no torch.
"""

import itertools
import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import UserError
from evaluation import metrics

ROOT = Path(__file__).resolve().parents[2]
GOLD = """
def gold_score(messages, response):
    return len(response) / 10

def bad(messages, response):
    return float("nan")
"""


def rewarded(path, prompts=40, K=4, shift=0.0, seed=0):
    """A rewarded file; a prompt's difficulty is shared by all seeds, so that pairing matters.

    Returns its records.
    """
    rng, rows = random.Random(f"{seed} {K}"), []
    for i in range(prompts):
        hard = random.Random(f"prompt {i}").gauss(0, 5)
        responses = ["x\u2028" * rng.randrange(1, 9) for _ in range(K)]
        rows.append(
            {
                "id": f"p{i}",
                "prompt": [{"role": "user", "content": f"{i}"}],
                "responses": responses,
                "rewards": [hard + shift + rng.gauss(0, 1) for _ in range(K)],
                "num_tokens": [len(r) for r in responses],
                "finish_reasons": [rng.choice(["stop", "stop", "length"]) for _ in range(K)],
            }
        )
    write(path, rows)
    return rows


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture
def script(monkeypatch, capsys):
    """Start the script in this process; gives what it says."""

    def start(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["metrics.py", *map(str, arguments)])
        metrics.main()
        return capsys.readouterr().out

    return start


def test_measure_against_plain_sums(tmp_path):
    rows = rewarded(tmp_path / "s.jsonl")
    rows[0]["rewards"][1], rows[1]["rewards"] = None, [None] * 4
    write(tmp_path / "s.jsonl", rows)
    got = metrics.measure(metrics.read_rewarded(tmp_path / "s.jsonl"), lambda messages, text: len(text))
    finite = [own for r in rows if (own := [x for x in r["rewards"] if x is not None])]
    means = [sum(v) / len(v) for v in finite]
    spread = math.sqrt(sum((m - sum(means) / 39) ** 2 for m in means) / 38)
    gold = [sum(map(len, r["responses"])) / 4 for r in rows]
    expected = {
        "prompts": 40,
        "K": 4,
        "null_rewards": 5,
        "reward": sum(means) / 39,
        "reward_se": spread / math.sqrt(39),
        "best_of_k": sum(map(max, finite)) / 39,
        "length": sum(n for r in rows for n in r["num_tokens"]) / 160,
        "truncated": sum(f == "length" for r in rows for f in r["finish_reasons"]) / 160,
        "empty": 0.0,
        "gold": sum(gold) / 40,
        "gold_se": statistics.stdev(gold) / math.sqrt(40),
    }
    assert got == pytest.approx(expected, abs=1e-6)


def test_measure_says_none_for_what_the_file_does_not_tell(tmp_path):
    write(tmp_path / "g.jsonl", [{"prompt": "q", "responses": ["a"], "rewards": [2.0]}])
    got = metrics.measure(metrics.read_rewarded(tmp_path / "g.jsonl"))
    none = {"reward_se": None, "length": None, "truncated": None}  # and no best of one
    assert got == {"prompts": 1, "K": 1, "null_rewards": 0, "reward": 2.0, "empty": 0.0} | none


def test_bootstrap_interval_is_that_of_the_normal():
    rng = random.Random(1)
    a = {i: rng.gauss(0, 5) for i in range(200)}
    b = {i: a[i] + rng.gauss(0.3, 1) for i in reversed(range(-50, 200)) if i in a} | {"only here": 1e9}
    difference, low, high = metrics.paired_bootstrap(a, b)
    own = [b[i] - a[i] for i in range(200)]
    assert difference == pytest.approx(statistics.fmean(own))
    error = statistics.pstdev(own) / math.sqrt(200)
    assert low == pytest.approx(difference - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(difference + 1.96 * error, abs=0.15 * error)
    assert metrics.paired_bootstrap(a, b) == (difference, low, high)
    assert metrics.paired_bootstrap(a, b, seed=1) != (difference, low, high)
    with pytest.raises(UserError, match="no prompt in common"):
        metrics.paired_bootstrap({1: 1.0}, {2: 1.0})


def test_bootstrap_interval_is_that_of_all_resamples():
    """Six prompts have 6**6 resamples: their exact percentiles, where the normal interval is far off."""
    values = [0.1, 0.3, 0.2, 5.0, 0.7, 1.1]
    means = sorted(sum(pick) / 6 for pick in itertools.product(values, repeat=6))
    exact = [means[round(q * (len(means) - 1))] for q in (0.025, 0.975)]
    zeros = dict.fromkeys(range(6), 0.0)
    _, low, high = metrics.paired_bootstrap(zeros, dict(enumerate(values)), samples=40000)
    assert (low, high) == pytest.approx(tuple(exact), abs=0.02 * (exact[1] - exact[0]))


def test_load_gold(tmp_path):
    (tmp_path / "gold.py").write_text(GOLD)
    assert metrics.load_gold(f"{tmp_path}/gold.py:gold_score")([], "12345") == 0.5
    with pytest.raises(UserError, match="did you mean 'gold_score'"):
        metrics.load_gold(f"{tmp_path}/gold.py:gold_scor")
    record = {"id": "p7", "prompt": [], "responses": ["a"]}
    with pytest.raises(UserError, match="gives nan for p7"):
        metrics.gold_scores(record, metrics.load_gold(f"{tmp_path}/gold.py:bad"))
    with pytest.raises(UserError, match="fails on p7: ZeroDivisionError"):
        metrics.gold_scores(record, lambda messages, response: 1 / 0)


def test_table_is_aligned_and_leaves_out_empty_columns():
    sampled = {"reward": -1.25, "reward_se": 0.1, "best_of_k": 12.5, "K": 8, "length": 9.04, "truncated": 0.0}
    rows = [{"sampled": sampled, "seconds": 12.3}, {"sampled": sampled | {"reward": 10.0}}]
    lines = metrics.format_table(rows).split("\n")
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    assert "gold" not in lines[0] and "greedy" not in lines[0]
    assert "-1.250 ±0.100" in lines[2] and "+12.500 (K=8)" in lines[2] and lines[2].endswith("12")
    assert "+10.000 ±0.100" in lines[3] and lines[3].endswith("–")


def test_the_commands(tmp_path, script):
    (tmp_path / "gold.py").write_text(GOLD)
    run = tmp_path / "run"
    for n in (0, 2, 10):
        folder = run / f"iter{n}"
        sampled = rewarded(folder / "heldout_sampled.jsonl", shift=n / 10, seed=n)
        rewarded(folder / "heldout_greedy.jsonl", K=1, shift=n / 10 + 0.5, seed=n)
        files = ["--sampled", folder / "heldout_sampled.jsonl", "--greedy", folder / "heldout_greedy.jsonl"]
        gold = ["--gold_function", f"{tmp_path}/gold.py:gold_score"]
        assert "40 prompts × 4 sampled" in script(*files, "--output_dir", folder / "metrics.json", *gold)
    got = json.loads((run / "iter10" / "metrics.json").read_text())
    assert got["files"] == {"sampled": "heldout_sampled.jsonl", "greedy": "heldout_greedy.jsonl"}
    mean = statistics.fmean(x for r in sampled for x in r["rewards"])
    assert got["sampled"]["reward"] == pytest.approx(mean, abs=1e-5)
    assert "best_of_k" not in got["greedy"]
    moved = run.rename(tmp_path / "moved")
    old_place = [
        sys.executable,
        ROOT / "report/metrics.py",
        "--run",
        moved,
    ]  # starts the script in its new one
    done = subprocess.run(old_place, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [row.split()[0] for row in done.stdout.split("\n")[2:5]] == ["0", "2", "10"]
    assert "iterate 10 − iterate 0" in done.stdout
    # the prompts' own spread is 5: only pairing sees a shift of 1 with 40 prompts
    line = r"(sampled|greedy) +(reward|gold) +(\S+) +\[(\S+), (\S+)\]"
    found = {(kind, what): tuple(map(float, own)) for kind, what, *own in re.findall(line, done.stdout)}
    assert len(found) == 4
    difference, low, high = found["sampled", "reward"]
    assert 0.7 < difference < 1.3 and 0.5 < low < difference < high < 1.5


def a_run(folder, iterates):
    """A run's folder whose iterate n has rewards shifted by `iterates[n]`."""
    for n, shift in iterates.items():
        place = folder / f"iter{n}"
        rewarded(place / "heldout_sampled.jsonl", shift=shift, seed=n)
        metrics_of = {
            "sampled": metrics.measure(metrics.read_rewarded(place / "heldout_sampled.jsonl")),
            "files": {"sampled": "heldout_sampled.jsonl"},
        }
        (place / "metrics.json").write_text(json.dumps(metrics_of))
    return folder


@pytest.mark.parametrize("width", [120, 80, 60, 20])
def test_a_narrow_table_leaves_out_what_is_missed_least(width):
    one = {"K": 4, "reward": 1.0, "reward_se": 0.1, "best_of_k": 2.0, "length": 9.0, "truncated": 0.1}
    one |= {"gold": 0.5, "gold_se": 0.01}
    row = {"sampled": one, "greedy": one, "divergence": {"kl": 1.0}, "seconds": 9.0}
    rows = metrics.format_table([row] * 2, width).split("\n")
    assert all(len(line) <= width for line in rows) or width == 20
    assert {"iterate", "reward", "gold", "KL"} <= set(rows[0].split())
    assert ("seconds" in rows[0]) == (width == 120)


def test_several_runs_stand_in_one_table(tmp_path, script):
    """As a DPO run of two iterations beside a PPO run; each interval is that of the run's own table."""
    dpo = a_run(tmp_path / "dpo", {0: 0.0, 1: 1.0, 2: 2.0})
    write(dpo / "stages.jsonl", [{"policy": 0, "step": "train", "seconds": 5}])
    ppo, start = a_run(tmp_path / "ppo", {0: 0.0, 1: -3.0}), a_run(tmp_path / "s", {0: 0.0})
    out = script("--runs", dpo, ppo, start)
    head, _, *rows = out.split("\n\n")[0].split("\n")
    names = ["dpo 0", "dpo 1", "dpo 2", "ppo 0", "ppo 1", "s 0"]
    assert [" ".join(row.split()[:2]) for row in (head, *rows)] == ["run iterate", *names]
    assert len({len(row) for row in (head, *rows)}) == 1
    parts = out.rstrip().split("\n\n")[1:]
    assert [part.split("\n")[0] for part in parts] == [
        f"{name}: iterate {n} − iterate 0, same prompts, 95% bootstrap interval"
        for name, n in (("dpo", 2), ("ppo", 1))
    ]
    alone = [script("--run", folder) for folder in (dpo, ppo)]
    for text, part in zip(alone, parts, strict=True):  # without a column of names
        assert text.split()[0] == "iterate" and text.rstrip().endswith(part.split("\n", 1)[1])
    up, down = (tuple(map(float, re.search(r"\[(\S+), (\S+)\]", part).groups())) for part in parts)
    assert 1 < up[0] < 2 < up[1] < 3 and -4 < down[0] < -3 < down[1] < -2
    # two folders of one name go by their paths
    twin = a_run(tmp_path / "more" / "dpo", {0: 0.0})
    rows = script("--runs", dpo, twin).split("\n")[2:6]
    assert [row.split()[0] for row in rows] == [str(dpo)] * 3 + [str(twin)]


def test_bad_input_is_one_line(tmp_path, script):
    rows = rewarded(tmp_path / "s.jsonl", 3)
    cases = [
        ((), "nothing to measure"),
        (("--sampled", tmp_path / "t.jsonl"), "no such rewarded file"),
        (("--run", tmp_path / "no"), "no such folder"),
        (("--runs", tmp_path, tmp_path / "no"), "no iterN/metrics.json"),
        (("--run", "a", "--runs", "b"), "not both"),
        (("--sample", "x"), "did you mean '--sampled'"),
        (("--sampled", tmp_path / "s.jsonl", "--output_dir", tmp_path), "is a folder"),
    ]
    for name, bad, message in (
        ("no", [{k: v for k, v in r.items() if k != "rewards"} for r in rows], "has no `rewards`"),
        ("twice", [rows[0], rows[0]], "ids must be unique"),
    ):
        write(tmp_path / f"{name}.jsonl", bad)
        cases.append((("--sampled", tmp_path / f"{name}.jsonl"), message))
    for arguments, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            script(*arguments)
        assert "\n" not in str(caught.value)
