"""The iterate to keep, on planted runs: which one is best is known, and so is what must not be chosen."""

import json
import math
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
import report_runs

from common.cli import UserError
from evaluation.select_iterate import Selection, choose, measured, rule_of, select

ROOT = Path(__file__).resolve().parents[2]
GOLD, KL = (0.4, 0.9, 0.7, 0.3), (0.0, 4.0, 9.0, 30.0)


@pytest.fixture
def run(tmp_path):
    """Three iterations that overdo it: reward and length rise, gold is best at 1, the judge's at 2."""
    folder = report_runs.make_run(
        tmp_path / "run",
        iterations=3,
        plan=lambda i: {"shift": 0.8 * i, "gold": GOLD[i], "words": 30 + 2 * i},
        judge=lambda i: (0.0, 0.5, 1.0, 0.2)[i],
        kl=KL.__getitem__,
    )
    settings = json.loads((folder / "loop.yaml").read_text()) | {"model_name_or_path": "hub/start"}
    (folder / "loop.yaml").write_text(json.dumps(settings))
    for i in range(4):
        path = folder / f"iter{i}/metrics.json"
        held = json.loads(path.read_text())
        held["files"] |= {"judge_sampled": "heldout_sampled.judged.jsonl"}
        path.write_text(json.dumps(held))
        if i:
            (folder / f"iter{i}/model").mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize(
    "rule, best",
    [
        ({}, 1),  # by gold, the first that the run has
        ({"by": "gold"}, 1),
        ({"by": "judge"}, 2),
        ({"by": "reward"}, 3),
        ({"by": "reward", "max_kl": 10}, 2),
        ({"by": "reward", "max_kl": 5}, 1),
        ({"by": "reward", "max_kl": 0}, 0),
        ({"by": "gold", "min_gain": 0.6}, 0),
        ({"by": "reward", "min_gain": 1.0}, 2),  # 1 is not 1.0 above 0, 2 is, 3 is not 1.0 above 2
        ({"by": "length_controlled"}, 3),
    ],
)
def test_the_rule_names_the_best(run, rule, best):
    choice = select(run, Selection(**rule))
    assert choice.iterate == best and choice.last == 3
    held = json.loads((run / "best.json").read_text())
    assert held["iterate"] == best and held["rule"] == {"by": None, "max_kl": None, "min_gain": 0.0} | rule
    if best:
        assert (run / "best").resolve() == (run / f"iter{best}/model").resolve()
        moved = run.rename(run.with_name("moved"))  # the link is relative
        assert (moved / "best").resolve() == (moved / f"iter{best}/model").resolve()
    else:
        assert not (run / "best").exists()  # the start is on the hub


def test_the_scores_and_the_interval_are_the_answers_own(run):
    """Against means and a normal approximation from the files alone."""
    choice = select(run, Selection(by="gold"))
    means = []
    for i in range(4):
        rows = [json.loads(line) for line in (run / f"iter{i}/heldout_sampled.rewarded.jsonl").open()]
        texts = [[float(text.rsplit("gold=", 1)[1].split()[0]) for text in row["responses"]] for row in rows]
        means.append([statistics.fmean(values) for values in texts])
        assert choice.scores[i] == pytest.approx(statistics.fmean(means[i]))
    differences = [a - b for a, b in zip(means[1], means[3], strict=True)]
    error = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    middle = statistics.fmean(differences)
    assert choice.interval == pytest.approx((middle, middle - error, middle + error), abs=error / 5)
    assert choice.worse and "best: iterate 1, by gold" in choice.sentence()
    assert "against the last one, iterate 3: +" in choice.sentence()


def test_what_is_given_stands_in_place_of_the_runs_own_rule(run):
    held = json.loads((run / "loop.yaml").read_text()) | {"select": {"by": "gold", "min_gain": 0.6}}
    (run / "loop.yaml").write_text(json.dumps(held))
    for given, best in (((), 0), (("--min_gain", "0"), 1), (("--min_gain", "0", "--by", "judge"), 2)):
        command = ["python", "evaluation/select_iterate.py", "--run", str(run), *given]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f"best: iterate {best}, by" in said


def test_a_rule_that_is_none_is_refused(run):
    held = json.loads((run / "loop.yaml").read_text())
    wrong = {
        "judge": r"select in .*loop.yaml is 'judge': a mapping was expected, such as {by: judge}",
        "nan": "max_kl nan: nats were expected, 0 or more",
        "endless": "min_gain inf: a number was expected",
    }
    rules = {"judge": "judge", "nan": {"max_kl": "nan"}, "endless": {"min_gain": "inf"}}
    for name, message in wrong.items():
        (run / "loop.yaml").write_text(json.dumps(held | {"select": rules[name]}))
        with pytest.raises(UserError, match=message):
            rule_of(run)
    (run / "loop.yaml").write_text("select: {by:")  # torn: the run's own rule is not known
    with pytest.raises(UserError, match="loop.yaml is not valid YAML"):
        rule_of(run)


def test_the_link_to_a_start_in_the_projects_folder_holds_from_any_folder(run, monkeypatch):
    held = json.loads((run / "loop.yaml").read_text()) | {"model_name_or_path": "evaluation"}  # some folder
    (run / "loop.yaml").write_text(json.dumps(held))
    monkeypatch.chdir(run)
    assert select(run, Selection(max_kl=0)).iterate == 0
    assert (run / "best").resolve() == ROOT / "evaluation"


def test_a_folder_in_the_links_place_is_left_and_nothing_beside_it(run, capsys):
    (run / "best").mkdir()
    select(run, Selection())
    assert "no link" in capsys.readouterr().out and not (run / ".best.new").is_symlink()


def test_an_iterate_without_weights_is_left_out(run):
    (run / "iter1/model.pruned").touch()
    choice = select(run, Selection(by="gold"))
    assert choice.iterate == 2 and choice.left_out == {1: "its weights were removed"}


def test_an_unknown_distance_is_too_far(run):
    (run / "iter1/divergence.json").unlink()
    choice = select(run, Selection(by="gold", max_kl=100))
    assert choice.iterate == 2 and choice.left_out == {1: "its KL to the start is not known"}


def test_an_iterate_that_lacks_the_measure_is_left_out(run):
    """All answers of the last one are longer than the start's: nothing is known of it at equal lengths."""
    path = run / "iter3/heldout_sampled.rewarded.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    report_runs.write(path, [row | {"num_tokens": [500] * len(row["num_tokens"])} for row in records])
    choice = select(run, Selection(by="length_controlled"))
    assert choice.iterate == 2 and not choice.worse and 3 not in choice.scores
    told = "iterate 3, was left out: nearly all its answers are longer, or shorter, than the start's"
    assert choice.sentence().endswith(told)
    assert re.match(r"best: iterate 2, by win rate over the start .* \d\d\.\d%;", choice.sentence())


def test_what_was_not_measured_is_named(run):
    for i in range(4):
        path = run / f"iter{i}/metrics.json"
        held = json.loads(path.read_text()) | {"gold_function": None}
        held["files"].pop("judge_sampled")
        path.write_text(json.dumps(held))
    with pytest.raises(UserError, match="cannot be chosen from by judge: it has length_controlled, reward"):
        select(run, Selection(by="judge"))
    shutil.rmtree(run / "iter3")
    assert select(run, Selection(by="reward")).last == 2
    with pytest.raises(UserError, match="no iterate is left to choose from: iterate 0: gone"):
        choose(measured(run)[:1], Selection(), {0: "gone"})
    assert choose([{"iterate": 0, "kl": None}], Selection()) is None


def test_chance_is_not_worse():
    """The last of three differs from the best by noise alone, which lies in the interval."""
    rewards = [{f"p{k}": math.sin(k) + 0.1 * math.cos(k * (3 + i)) for k in range(40)} for i in range(3)]
    choice = choose([{"iterate": i, "kl": 1.0, "reward": own} for i, own in enumerate(rewards)], Selection())
    assert choice.iterate != 2 and choice.interval[1] < 0 < choice.interval[2] and not choice.worse


@pytest.mark.parametrize("rule, stops", [("worse", True), ("", False)])
def test_a_loop_that_gets_worse_ends_where_it_is_told_to(run, rule, stops):
    """By the driver's own function, behind the last policy and no other; the best one is not pruned."""
    assert select(run, Selection(by="gold")).worse
    (run / "iter3/model.manifest.json").write_text('{"complete": true}')
    (run / "best").unlink()  # as on a file system without links
    words = f"""source envs.sh; source loop/launch.sh
        plan=([stop_when]={rule} [run_dir]={run} [keep_iterates]=1 [heldout_prompts]=x)
        plan[model_name_or_path]=hub/start
        for i in 0 2 3; do got_worse $i && echo ends $i; done; prune 3"""
    end = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert [line for line in end.stdout.splitlines() if line.startswith("ends")] == ["ends 3"] * stops
    assert ("stop_when" in end.stderr) == stops
    assert [i for i in (1, 2, 3) if (run / f"iter{i}/model").is_dir()] == [1, 3]
    made = ["python", "evaluation/run_metrics.py", "--run", str(run)]
    said = [subprocess.run(made, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in "12"]
    assert said[0] == said[1] and "best: iterate 1, by gold" in said[0]
    page = ["python", "report/make_report.py", str(run)]
    subprocess.run(page, cwd=ROOT, capture_output=True, check=True)
    assert "1 (best)" in (run / "report/index.html").read_text()
