"""report/: planted trouble is named and a healthy run has none, half-finished and damaged runs, PPO, several
runs, and what stands in the page. What the figures are computed by is in tests/evaluation/test_measures.py.
"""

import html
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("plotly")

import report_runs as runs

from common import trackers
from common.cli import UserError
from evaluation import measures, run_metrics
from report import charts, figures, make_report, page, run_data, samples, troubles
from report.definitions import DEFINITIONS

ROOT = Path(__file__).resolve().parents[2]
EVIL = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
SAMPLED, GREEDY = "heldout_sampled.rewarded.jsonl", "heldout_greedy.rewarded.jsonl"


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(measures, "resamples", lambda prompts: 1000)


def read(folder, **more):
    return figures.of_run(run_data.read_run(folder, **more))


def found(folder, bounds=None):
    return troubles.find(read(folder), bounds)


def names(folder):
    return {trouble.name for trouble in found(folder)}


def held(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def change(path, edit, rows=None):
    """Write the records of a file again, each (or the first `rows`) as `edit` makes it."""
    runs.write(path, [edit(row) if rows is None or n < rows else row for n, row in enumerate(held(path))])


def build(*folders, target, **more):
    """(the page, what it says is not there)."""
    args = make_report.Arguments(runs=[str(f) for f in folders], output_dir=str(target), **more)
    _, _, missing = make_report.make(args)
    return Path(target).read_text(encoding="utf-8"), [text for _, text in missing]


# ---- Reading -----------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_files(tmp_path):
    """Everything the page says of iterate 2, once more from the JSONL files."""
    folder = runs.make_run(tmp_path / "run", judge=lambda i: 0.3 * i)
    of = read(folder)
    start, last = (held(folder / f"iter{i}" / SAMPLED) for i in (0, 2))
    means = [statistics.fmean(row["rewards"]) for row in last]
    mean, error = statistics.fmean(means), statistics.pstdev(means) / math.sqrt(len(means))
    got, versus = of.iterates[2]["sampled"], of.iterates[2]["versus"]["start"]["sampled"]
    assert got["reward"] == pytest.approx((mean, mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)
    golds = [float(text.split("gold=")[1].split()[0]) for row in last for text in row["responses"]]
    assert got["gold"][0] == pytest.approx(statistics.fmean(golds))
    assert got["length"] == statistics.fmean(n for row in last for n in row["num_tokens"])
    assert got["best_of"][-1] == pytest.approx(statistics.fmean(max(row["rewards"]) for row in last))
    before = statistics.fmean(statistics.fmean(row["rewards"]) for row in start)
    assert versus["reward"][0] == pytest.approx(mean - before)
    won = [y > x for old, new in zip(start, last) for x in old["rewards"] for y in new["rewards"]]
    assert versus["reward_win"][0] == pytest.approx(statistics.fmean(won))
    margins = [max(row["rewards"]) - min(row["rewards"]) for row in held(folder / "iter1/rewarded.jsonl")]
    assert of.trainings[0]["margin"] == pytest.approx(statistics.fmean(margins))
    assert got["judge"] is not None and "judge_win" in versus


def steps_of(folder):
    return {(row["policy"], row["step"]): row for row in read(folder).steps}


def test_steps_say_what_was_working(tmp_path):
    folder = runs.make_run(tmp_path / "run", judge=lambda i: 0.0)
    with open(folder / "stages.jsonl", "a") as file:
        file.write('{"policy": 2, "step": "sample", "seconds": 10, "finished": ""}\nhalf a li')
    rows = steps_of(folder)
    sampled = rows[0, "sample"]  # 6 and 4 s for held-out answers, 5 s for the next policy's responses
    assert (sampled["seconds"], sampled["work"], sampled["waiting"]) == (20, 15, 0.25)
    assert (rows[2, "sample"]["seconds"], rows[2, "sample"]["work"]) == (30, 10)  # taken up again
    assert (rows[1, "annotate"]["work"], rows[2, "annotate"]["work"]) == (7.5, 4.5)
    assert rows[0, "measure"]["work"] is None  # a judge's rewards without a manifest
    trained = rows[1, "train"]
    assert (trained["work"], trained["waiting"], trained["tokens_per_second"]) == (6, 0.5, 1000)
    assert (trained["gpus"], trained["gpu_hours"]) == (0, 0)
    tokens = sum(
        sum(row["num_tokens"]) for name in (SAMPLED, GREEDY) for row in held(folder / "iter2" / name)
    )
    assert rows[2, "sample"]["tokens_per_second"] == pytest.approx(tokens / 10)
    runs.manifest(folder / "iter1/heldout_sampled.judged", counts={"scoring_seconds": 0.5})
    runs.manifest(folder / "iter1/divergence", counts={"seconds": 1.0})
    (folder / "iter2/rewarded.manifest.json").write_text('{"counts": {"scoring_seconds": "4"}}')
    rows = steps_of(folder)
    assert (rows[1, "measure"]["work"], rows[1, "annotate"]["work"]) == (1.5, None)


def test_gpus_are_those_of_a_step(tmp_path):
    folder = runs.make_run(tmp_path / "run")
    for path in folder.glob("iter*/*.manifest.json"):
        known = json.loads(path.read_text()) | {"versions": {"torch": "2.13.0"}}
        known["num_processes"] = 8 if path.name.startswith("model.") else None
        runs.write_json(path, known | {"merged": {"num_datasets": 4}} if ".generated" in path.name else known)
    rows = steps_of(folder)
    assert rows[0, "train"]["gpu_hours"] == pytest.approx(8 * 12 / 3600)
    assert rows[2, "sample"]["gpus"] == 4 and rows[0, "annotate"]["gpus"] == 1
    assert rows[2, "annotate"]["gpus"] is None  # nothing tells


def test_damaged_lines_are_counted_and_named(tmp_path):
    folder = runs.make_run(tmp_path / "run")
    path, text = (
        folder / "iter1" / SAMPLED,
        '{"id": "x"}\n[1]\n{"prompt": [1], "responses": ["a"], "rewards": [1]}\n',
    )
    path.write_text(text + path.read_text() + path.read_text().split("\n")[0])
    (folder / "iter2" / SAMPLED).write_bytes((folder / "iter2" / SAMPLED).read_bytes()[:-50])
    (folder / "iter2" / GREEDY).write_bytes(b"\xff\xfe\n")
    (folder / "iter1/metrics.json").write_text("{half")
    of = read(folder)
    assert f"iter1/{SAMPLED}: 4 lines cannot be read, or repeat an id" in of.run.missing
    assert [of.iterates[i]["sampled"]["prompts"] for i in (1, 2)] == [60, 59]
    for part in ("line 60 is torn", "is UTF-16 text", "iter1/metrics.json cannot be read"):
        assert any(part in one for one in of.run.missing), part
    (folder / "loop.yaml").write_text("a: [")
    assert any("the settings" in text for text in read(folder).run.missing)


def test_the_sample_is_the_same_for_every_file_and_order(tmp_path):
    keys = [f"k{i}" for i in range(500)]
    first, second, other = run_data.Sample(20), run_data.Sample(20), run_data.Sample(20, seed=1)
    for key in keys:
        first.add(key, key)
    for key in random.Random(0).sample(keys, 500):
        second.add(key, key)
        other.add(key, key)
    assert first.records() == second.records() == sorted(keys, key=run_data.sample_hash)[:20]
    assert first.records() != other.records()
    runs.rewarded(tmp_path / "r.jsonl", "p", prompts=300)  # texts held do not follow the file
    answers = run_data.read_answers(tmp_path / "r.jsonl", keep=10)
    assert (len(answers.kept), len(answers.ids), len(answers.rewards)) == (10, 300, 1200)


# ---- Trouble -----------------------------------------------------------------------------------------------


def test_a_healthy_run_has_no_warning(tmp_path):
    made = runs.make_run(tmp_path / "run", iterations=3, judge=lambda i: 0.4 * i, kl=lambda i: 3.0 * i)
    assert names(made) == set()


def test_the_last_rounds_of_online_training_are_looked_at(tmp_path):
    """Their ties and their length; their KL where no policy was measured; and their curves are drawn."""
    entries = [
        {"round": n, "prompts": 20, "ties": 15 if n > 9 else 0, "length": 10.0 + n, "margin": 0.1}
        | {"kl": 4.0 * n, "kl_per_token": 0.2, "reward": 0.0, "best": 1.0, "staleness": 0}
        | {"seconds": {"all": 1.0, "waiting": 0.5, "sampling": 0.5}}
        for n in range(16)
    ]
    far = {"evaluated": False, "settings": {"online": {"rounds": 16}}}
    for kl, more, expected in (
        (60.0, far, {"kl", "collapsed", "length_growth"}),
        (60.0, {"kl": lambda i: 3.0 * i}, {"collapsed", "length_growth"}),
        (2.0, far, {"collapsed", "length_growth"}),
    ):
        folder = runs.make_run(tmp_path / f"run{kl}{len(more)}", **more)
        runs.write(folder / "online/rounds.jsonl", entries[:-1] + [entries[-1] | {"kl": kl}])
        told = {trouble.name: trouble for trouble in found(folder)}
        assert told.keys() == expected and told["collapsed"].where.startswith("rounds 7 to 16")
        assert "45.0%" in told["collapsed"].figure
        runs.write(folder / "online/rounds.jsonl", entries[:9])
        assert not {"collapsed", "kl"} & {trouble.name for trouble in found(folder)}
    make_report.make(make_report.Arguments(runs=[str(folder)]))
    page = (folder / "report/index.html").read_text(encoding="utf-8")
    assert "Online: KL to the start" in page and "Online: implicit margin" in page


def _length(i):
    return {"shift": 0.0, "gold": 0.5, "words": 30 + 12 * i, "reward_of_length": 0.1}


@pytest.mark.parametrize(
    "name, more",
    [
        ("length_growth", {"plan": _length}),
        ("over_optimised", {"plan": lambda i: {"shift": i, "gold": [0.4, 0.5, 0.35][i]}}),
        ("over_optimised", {"judge": lambda i: -0.8 * i}),
        ("only_training_reward", {"judge": lambda i: 0.0}),
        ("ties", {"training": lambda i: {"ties": True}}),
        ("collapsed", {"training": lambda i: {"ties": True}}),
        ("saturated", {"training": lambda i: {"saturated": True}}),
        ("truncated", {"plan": lambda i: {"shift": i, "gold": 0.4 + i / 10, "cut": 0.4 if i == 2 else 0}}),
        ("eval_accuracy", {"accuracy": 0.4}),
        ("few_distinct", {"plan": lambda i: {"shift": i, "gold": 0.4 + i / 10, "same": i == 2}}),
        ("looping", {"plan": lambda i: {"shift": i, "gold": 0.4, "loops": i == 2}}),
    ],
)
def test_planted_trouble_is_named(tmp_path, name, more):
    assert name in names(runs.make_run(tmp_path / "run", **more))


def test_advice_fits_the_direction_and_what_scores(tmp_path):
    """A gain by length, by brevity, with a reward function, and in a run of PPO, which has no pairs to
    choose.
    """
    told = {}
    for name, step in (("long", 2), ("short", -2)):
        slope = math.copysign(0.1, step)
        plan = [{"shift": 0.0, "words": 40 + step * i, "reward_of_length": slope} for i in range(3)]
        of = read(runs.make_run(tmp_path / name, prompts=100, plan=plan.__getitem__), gold=False)
        for what, settings in (
            (name, {}),
            (f"{name} function", {"annotation": {"reward_function": "f.py:f"}}),
            (f"{name} ppo", {"backend": "small"}),
        ):
            of.run.settings.clear()
            of.run.settings.update(settings)
            [told[what]] = [t for t in troubles.find(of) if t.name == "length_only"]
    assert "length alone" in told["long"].title and "brevity alone" in told["short"].title
    for what, there, absent in (
        ("long", ("likes long answers", "length_penalty", "correct the reward for"), "reward function"),
        ("short", ("likes short answers",), "penalty"),
        ("long function", ("change the reward function",), "correct the reward"),
        ("long ppo", ("likes long answers",), "pairs"),
    ):
        assert all(part in told[what].todo for part in there) and absent not in told[what].todo
    assert " 4" in told["short"].figure and "→" in told["short"].figure
    assert troubles.advice("a; dpo: b; function: c; d", {"dpo", "model"}) == "a, b, or d"


def test_the_terminal_says_how_many_warnings_there_are_and_where(tmp_path):
    folder = runs.make_run(tmp_path / "run", kl=lambda i: 40.0 * i)
    assert run_metrics.warnings(folder) == []
    make_report.make(make_report.Arguments(runs=[str(folder)]))
    page = folder / "report" / "index.html"
    assert run_metrics.warnings(folder) == [
        f"2 warnings, with what to try on the page {page}:",
        "  The policy is far from the reference (2 times)",
    ]
    text = page.read_text()
    assert text.count('<li data-name="') == 2 and "80.0 nats per response (bound 50)" in text
    make_report.make(make_report.Arguments(runs=[str(folder)], bounds={"kl": 1000, "kl_per_token": 100}))
    assert run_metrics.warnings(folder) == [f"no warnings; the page: {page}"]
    (folder / "report" / "index.warnings.json").write_text("{half")
    assert run_metrics.warnings(folder) == []


def test_trouble_that_is_planted_in_the_files(tmp_path):
    folder = runs.make_run(tmp_path / "spread", iterations=2)
    change(folder / "iter2/rewarded.jsonl", lambda row: row | {"rewards": [r / 50 for r in row["rewards"]]})
    assert names(folder) == {"collapsed"}
    # the mean rises by a quarter of the prompts, and most are lost
    folder = runs.make_run(tmp_path / "wins", iterations=1, plan=lambda i: {"shift": 0.0, "gold": 0.4})
    for name in (SAMPLED, GREEDY):
        rows = held(folder / "iter0" / name)
        for n, row in enumerate(rows):
            row["rewards"] = [r + (9 if n % 4 == 0 else -0.9) for r in row["rewards"]]
        runs.write(folder / "iter1" / name, rows)
    assert "win_rate_falls" in names(folder)
    # a tenth of the greedy answers says nothing, and the KL is of other tokens
    folder = runs.make_run(tmp_path / "empty", iterations=1)
    change(folder / "iter1" / GREEDY, lambda row: row | {"responses": [" \n"]}, rows=6)
    estimates = {"kl": 0.5, "kl_se": 0.1, "kl_per_token": 0.01, "retokenised": 40, "responses": 60}
    runs.write_json(folder / "iter1/divergence.json", estimates)
    told = {trouble.name: trouble for trouble in found(folder)}
    assert "10.0% have no text" in told["empty"].figure and "greedy" in told["empty"].where
    assert "40 of 60 responses" in told["kl_guessed"].figure
    # prompts that the policy cannot answer
    change(folder / "iter0" / GREEDY, lambda row: row | {"responses": ["Good question!"]}, rows=50)
    [told] = [trouble for trouble in found(folder) if trouble.name == "one_answer"]
    assert "83.3% of the answers are one text" in told.figure and told.where == "iterate 0, greedy answers"


def test_a_slow_fall_of_gold_is_named_against_the_best_before(tmp_path):
    """Each step is within chance and the end above the start; only the way down from the peak shows it."""
    gold = [0.4, 0.5, 0.493, 0.486, 0.479, 0.472]
    folder = runs.make_run(tmp_path / "run", iterations=5, plan=lambda i: {"shift": i, "gold": gold[i]})
    of = read(folder)
    for row in of.iterates:
        for against in ("start", "previous"):
            versus = row["versus"].get(against, {}).get("sampled", {})
            assert not troubles.falls(versus.get("gold"))
    told = [trouble.where for trouble in troubles.find(of) if trouble.name == "over_optimised"]
    assert told and all(where.endswith("against iterate 1, the best before") for where in told)
    assert told[-1].startswith("iterate 5")
    assert "5 against 1 (best before)" in build(folder, target=tmp_path / "page.html")[0]


def test_greedy_gold_that_falls_while_the_sampled_reward_rises_is_named():
    """The tiny run's last iterate: the greedy reward stands still, since it is at its best already."""
    sampled = {"reward": (0.927, 0.824, 1.032), "gold": (0.0, -0.01, 0.01)}
    greedy = {"reward": (0.01, -0.1, 0.12), "gold": (-0.029, -0.047, -0.010)}
    row = {"iterate": 3, "sampled": {}, "versus": {"previous": {"sampled": sampled, "greedy": greedy}}}
    [told] = troubles.over_optimised([row])
    assert told.name == "over_optimised" and told.where == "iterate 3 against the previous one"
    assert "sampled answers: reward +0.927" in told.figure and "greedy answers: gold -0.029" in told.figure
    sampled["reward"] = (0.1, -0.2, 0.4)
    assert troubles.over_optimised([row]) == []


def test_a_fall_that_chance_may_have_made_is_none():
    """A run is looked at many times, so that a fall is one at 99%: 1.31 times the 95% interval."""
    assert not troubles.falls((-1.0, -1.9, -0.1)) and troubles.falls((-1.0, -1.7, -0.3))
    assert troubles.rises((1.0, 0.1, 1.9)) and not troubles.rises((1.0, None, None))
    assert not troubles.falls(None)


def test_an_iterate_that_answers_as_the_one_before_is_named(tmp_path):
    """On the page and in the terminal; a few equal answers are no matter."""
    folder = runs.make_run(tmp_path / "run", iterations=2)
    for path in folder.glob("iter*/metrics.json"):
        averages = {kind: {"reward": 0.0} for kind in ("sampled", "greedy")}
        runs.write_json(path, json.loads(path.read_text()) | averages)
    assert "alike" not in names(folder)
    for name in (SAMPLED, GREEDY):
        shutil.copy(folder / "iter1" / name, folder / "iter2" / name)
    [trouble] = [trouble for trouble in found(folder) if trouble.name == "alike"]
    assert trouble.where == "iterate 2 against iterate 1" and ", raise learning_rate, " in trouble.todo
    assert "100.0% of the sampled answers, 100.0% of the greedy answers" in trouble.figure
    [line] = run_metrics.alike(run_metrics.rows(folder))
    assert line.startswith(
        "warning: iterate 2 answers as iterate 1 did, 100% word for word: training changes"
    )
    (folder / "iter2" / GREEDY).unlink()
    other = [f"other {k}" for k in range(4)]
    change(folder / "iter2" / SAMPLED, lambda row: row | {"responses": other}, rows=10)  # of 60
    assert "alike" not in names(folder) and not list(run_metrics.alike(run_metrics.rows(folder)))


# ---- Half-finished, PPO, several ---------------------------------------------------------------------------


def test_half_finished_runs(tmp_path):
    folder = runs.make_run(tmp_path / "run", iterations=3, upto=1)
    text, missing = build(folder, target=tmp_path / "a.html")
    assert [one for one in missing if "evaluated" in one] == ["iterates 2 to 3 have not been evaluated"]
    assert "KL to the reference (iterN/divergence.json)" in text and "a second judge" in text
    for name in (SAMPLED, GREEDY):
        (folder / "iter1" / name).unlink()
    averages = {"sampled": {"reward": 1.5, "reward_se": 0.1, "gold": 0.5, "length": 40.0}, "greedy": {}}
    runs.write_json(folder / "iter1/metrics.json", averages)
    assert read(folder).iterates[1]["sampled"]["reward"] == (1.5, 1.5 - 0.196, 1.5 + 0.196)
    text, _ = build(folder, target=tmp_path / "a.html")
    assert "the sampled and greedy held-out answers of iterate 1" in text
    bare = tmp_path / "bare"
    (bare / "iter1").mkdir(parents=True)
    (bare / "loop.yaml").write_text("iterations: 2\n")
    text, _ = build(bare, target=tmp_path / "a.html")
    assert "iterate 0 has not been evaluated" in text and "no step has finished" in text


def test_in_the_middle_of_training_the_last_checkpoints_log_is_read(tmp_path):
    folder = runs.make_run(tmp_path / "run", prompts=6)
    (folder / "iter2/model/checkpoint-20").mkdir(parents=True)
    log = folder / "iter2/model/checkpoint-20/trainer_state.json"
    (folder / "iter2/model.trainer_state.json").rename(log)
    trainings = read(folder).run.trainings
    assert trainings[2].history == trainings[1].history != []


def test_a_ppo_run(tmp_path):
    folder = runs.make_run(tmp_path / "run", iterations=1, kind="ppo")
    of = read(folder)
    assert of.run.kind == "ppo" and of.iterates[1]["kl"] == 4.0 and of.trainings[0]["ppo"]["step"] == 20
    assert names(folder) == set()
    text, missing = build(folder, target=tmp_path / "a.html")
    assert "PPO: reward" in text and "dpo_loss" not in text and not [one for one in missing if "PPO" in one]
    change(
        folder / "iter1/model.log.jsonl",
        lambda row: row | {"entropy": 1 / (1 + row["step"]), "kl": 9.0 * row["step"]},
    )
    assert {"entropy", "kl"} <= names(folder)


def cells(text, caption):
    """{first cell of a row: the others} of a table, by an independent parser."""

    class Tables(HTMLParser):
        found, caption, row, inside = {}, "", None, ""

        def handle_starttag(self, tag, attrs):
            self.inside = tag if tag in ("caption", "th", "td") else self.inside
            if tag == "table":
                self.caption = ""
            if tag == "tr":
                self.row = []
            if tag in ("th", "td"):
                self.row.append("")

        def handle_endtag(self, tag):
            self.inside = "" if tag in ("caption", "th", "td") else self.inside
            if tag == "tr" and self.row:
                self.found.setdefault(self.caption, {})[self.row[0]] = self.row[1:]

        def handle_data(self, data):
            if self.inside == "caption":
                self.caption += data
            elif self.inside:
                self.row[-1] += data.strip()

    parser = Tables()
    parser.feed(re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))
    return parser.found[caption]


def test_several_runs_and_what_was_run_at_the_top(tmp_path):
    """Of two runs that differ in beta alone, and of PPO."""
    one, ppo = runs.make_run(tmp_path / "one"), runs.make_run(tmp_path / "ppo", 1, kind="ppo")
    known = json.loads((one / "loop.yaml").read_text())
    more = {key: known[key] for key in ("run_dir", "gold_function")}
    more["training_args"] = known["training_args"] | {"beta": 0.3}
    two = runs.make_run(tmp_path / "two", settings=more)
    text, _ = build(one, two, ppo, target=tmp_path / "a.html")
    places = [text.index(part) for part in ("What was run", "What differs between", 'id="troubles"')]
    assert places == sorted(places) and "one, iterate 0" in text and "two, iterate 2" in text
    asked = cells(text, "What was run")
    of_online = {"rounds", "rounds behind"}
    assert list(asked) == ["setting", *(key for key in figures.HEAD if key not in of_online)]
    assert asked["setting"] == ["one", "two", "ppo"]
    for key, values in {
        "policy": ["tiny"] * 3,
        "prompts": ["60 × 2", "60 × 2", "640"],
        "pairs": ["50 × 2", "50 × 2", "–"],
        "held-out prompts": ["60"] * 3,
        "K": ["4", "4", "2"],
        "beta": ["0.1", "0.3", "–"],
        "learning rate": ["0.0003", "0.0003", "1e-05"],
        "choice of pairs": ["max_min", "max_min", "–"],
    }.items():
        assert asked[key] == values
    text, _ = build(one, two, target=tmp_path / "b.html")
    differs = {"setting": ["one", "two"], "training_args.beta": ["0.1", "0.3"]}
    assert cells(text, "What differs between the runs") == differs
    assert cells(text, "All settings")["generation.K"] == ["4", "4"]
    assert list(cells(text, "The end of each training")) == ["run", "one", "two"]
    assert figures.differing([{"a": 1}, {"a": 1, "b": {}, "e": [1]}]) == {"b": [None, {}], "e": [None, [1]]}
    counts = ([500] * 3, [500, 400], [0, 1000], [])
    assert [figures.sizes(own) for own in counts] == ["500 × 3", "500, 400", "1,000", ""]


def test_a_run_that_is_not_evaluated(tmp_path):
    folder = runs.make_run(tmp_path / "run", evaluated=False)
    assert read(folder).iterates == [] and names(folder) == set()
    text, missing = build(folder, target=tmp_path / "a.html")
    assert "DPO, not evaluated: heldout_prompts is null" in text and missing == []
    assert cells(text, "What was run")["held-out prompts"] == ["none: not evaluated"]
    assert {"0 sample", "0 annotate", "0 train", "all"} <= cells(text, "Steps").keys()
    assert "dpo_loss" in text and "time in all" in text
    ppo = runs.make_run(tmp_path / "ppo", iterations=1, kind="ppo", evaluated=False)
    assert "PPO, not evaluated" in build(ppo, target=tmp_path / "b.html")[0]


# ---- The page ----------------------------------------------------------------------------------------------


def test_every_heading_and_chart_has_its_definition(tmp_path):
    of = read(runs.make_run(tmp_path / "run", judge=lambda i: 0.1 * i, kl=lambda i: float(i)))
    plain = {"run", "prompts", "K", "setting", "package", of.run.name}
    for _, one in page.tables_of([of]):
        for key, heading in one["columns"]:
            assert key in DEFINITIONS if key else heading in plain, heading
    made = charts.of_runs([of])
    assert len({chart["key"] for _, chart in made}) == len(made) > 15
    assert all(chart["definition"] in DEFINITIONS for _, chart in made)
    assert all(key in DEFINITIONS for key, *_ in figures.in_short(of))


def test_text_of_a_model_stays_in_its_block_and_nothing_is_fetched(tmp_path):
    folder = runs.make_run(tmp_path / EVIL.replace("/", "∕"))
    evil = {"responses": [EVIL + "\u2028 gold=0.5 end"], "prompt": [{"role": "user", "content": EVIL}]}
    change(folder / "iter2" / GREEDY, lambda row: row | evil)
    text, _ = build(folder, target=tmp_path / "a.html")
    assert "<img src=x" not in text and "</script><img" not in text and "\u2028" not in text
    blocks = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', text, re.DOTALL)
    assert [name for name, _ in blocks] == ["charts-data", "samples-data"]
    for _, block in blocks:
        assert not re.search(r"[<>&]", block) and block.isascii()
    shown = json.loads(dict(blocks)["samples-data"])["heldout"]
    assert any(EVIL in one["t"][0] for entry in shown for own in entry["a"] for one in own["r"])
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?!#|data:)', own) and "url(" not in own and "@import" not in own
    assert text.count("* plotly.js v") == 1 and "default-src 'none'" in html.unescape(text)


def test_samples_fit_their_room_and_pairs_are_marked(tmp_path):
    run = run_data.read_run(runs.make_run(tmp_path / "run", prompts=80))
    all_of_it = samples.collect([run], 40, 6.0)
    assert [len(all_of_it[key]) for key in ("heldout", "training")] == [40, 40] and not all_of_it["left_out"]
    for entry in all_of_it["training"]:
        [[chosen, rejected, margin]] = entry["pairs"]
        values = [one["r"] for one in entry["r"]]
        assert values[chosen] == max(values) and values[rejected] == min(values)
        assert margin == pytest.approx(max(values) - min(values), abs=2e-4)
    for entry in all_of_it["heldout"]:
        assert [a["col"] for a in entry["a"] if a["kind"] == "greedy"] == [0, 1, 2]
    small = samples.collect([run], 40, 0.05)
    assert 0 < len(json.dumps(small)) < 0.055e6 and small["left_out"] > 0
    assert {entry["i"] for entry in small["training"]} == {1, 2}
    assert samples.cut("x" * 5000) == ["x" * 4000, 1000]


def test_a_response_of_a_mixture_says_which_part_it_is_of():
    record = {"responses": ["a", "b"], "rewards": [1.0, 0.0]}
    sources = [{"temperature": 0.7, "system_prompt": None}, "by hand"]
    shown = samples.responses(record | {"response_sources": sources})
    assert [answer["s"] for answer in shown] == ["temperature 0.7", "by hand"]
    for odd in ({}, {"response_sources": None}, {"response_sources": "x"}):
        assert "s" not in samples.responses(record | odd)[0]


def test_the_command(tmp_path):
    folder = runs.make_run(tmp_path / "run", plan=_length)
    command = [sys.executable, ROOT / "report/make_report.py", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "warning: run, iterate 2: the answers grow" in done.stdout and "not there: run: KL" in done.stdout
    assert (folder / "report" / "index.html").is_file() and not list((folder / "report").glob("*.tmp"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "no run was given"),
        ("no", "no such run"),
        (".", "no run's folder; there is"),
        ("run run", "given twice"),
        ("run other", "say where the page goes"),
        ('run --bounds {"lenght_growth":2}', "did you mean 'length_growth'"),
        ("run --sample 3", "did you mean '--samples'"),
        ("run --output_dir .", "is a folder"),
        ("run --samples -1", "must not be negative"),
    ],
)
def test_refusals(tmp_path, monkeypatch, arguments, message):
    runs.make_run(tmp_path / "run", prompts=2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        make_report.make(make_report.arguments(arguments.split()))


# ---- What is of another kind than it should be -------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {
            "loop.yaml": {
                "iterations": "three",
                "generation": 5,
                "gold_function": 3.5,
                "note": "half \ud800",
            },
            "iter0/metrics.json": {"files": [1], "judge": -1, "sampled": True, "gold_function": 1e309},
            "iter1/divergence.json": {"kl": "x", "kl_se": [1], "kl_per_token": 10**400},
            "iter1/model.manifest.json": {"counts": 7, "versions": 10**400, "metrics": {"loss": [1]}},
            "iter1/model.trainer_state.json": {"log_history": -1},
        },
        {
            "loop.yaml": {"iterations": 10**400, "prompts": {"a": 1}, "heldout_prompts": "x" * 5000},
            "iter1/metrics.json": {
                "files": {"sampled": {"a": 1}},
                "judge": {"sampled": 1e308},
                "greedy": [1],
            },
            "iter1/model.manifest.json": {"counts": {"eval_pairs": "x<b>"}, "num_processes": "two"},
            "iter1/model.trainer_state.json": {
                "log_history": [{"step": "x", "loss": 0.5}, {"step": float("nan"), "loss": [1]}, 3]
            },
        },
    ],
)
def test_values_of_another_type_are_passed_over(tmp_path, changes):
    folder = runs.make_run(tmp_path / "run", prompts=6)
    for file, values in changes.items():
        known = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        runs.write_json(folder / file, known | values)
    build(folder, target=tmp_path / "page.html")


def test_records_that_are_no_text_or_no_numbers(tmp_path):
    folder = runs.make_run(tmp_path / "run", prompts=6)
    path = folder / "iter1" / SAMPLED
    rows = held(path)
    del rows[0]["id"]
    rows[0] |= {"prompt": "half \ud800", "responses": ["\udfff", "a", "b", "c"]}
    rows[1]["rewards"], rows[1]["num_tokens"] = [10**400, 1, 2, 3], [10**400, -1, None, 3]
    rows[2]["prompt"] = ["no message"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pair = held(folder / "iter1/pairs.jsonl")[0]
    runs.write(folder / "iter1/pairs.jsonl", [pair | {"chosen_index": 1e309, "chosen_num_tokens": 10**400}])
    with open(folder / "stages.jsonl", "a") as file:
        file.write('{"policy": [1], "step": {}, "seconds": 1}\n')
        file.write('{"policy": 1, "step": "train", "seconds": 1' + "0" * 400 + "}\n")
    _, missing = build(folder, target=tmp_path / "page.html")
    assert f"iter1/{SAMPLED}: 2 lines cannot be read, or repeat an id" in missing


def test_passwords_and_tokens_do_not_reach_the_page(tmp_path, monkeypatch):
    secrets = ["hf_" + "A1b2" * 8, "sk-" + "x9Y8" * 6, "plainpassword", "swordfish77", "0123abcd4567"]
    settings = {
        "hub_token": "plainpassword",
        "setup_command": f"export WANDB_API_KEY=0123abcd4567; export HF_TOKEN={secrets[0]}",
        "annotation": {"urls": [f"https://me:swordfish77@host/{secrets[1]}"]},
        "training_args": {"pad_token": "<pad>", "max_new_tokens": 32},
    }
    folder = runs.make_run(tmp_path / "run", prompts=6, settings=settings)
    text, _ = build(folder, target=tmp_path / "page.html")
    told = []
    monkeypatch.setattr(trackers, "log_rows", lambda name, rows, where, settings, *_: told.append(settings))
    run_metrics.log(folder, [{"iterate": 0}], ["wandb"])
    assert not [secret for secret in secrets if secret in text or secret in str(told)]
    assert "&lt;pad&gt;" in text and "<pad>" in str(told) and "https://(hidden)@host/" in text
