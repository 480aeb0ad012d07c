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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

np = pytest.importorskip("numpy")
pytest.importorskip("plotly")

import report_runs as runs

from common import trackers
from common.cli import UserError
from evaluation import measures, run_metrics
from report import charts, figures, make_report, page, run_data, samples, troubles
from report.definitions import DEFINITIONS

EVIL = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def read(folder, **more):
    run = run_data.read_run(folder, **more)
    return run, figures.of_iterates(run), figures.of_trainings(run)


def names(folder, bounds=None):
    run, iterates, trainings = read(folder)
    return {trouble.name for trouble in troubles.find(run, iterates, trainings, bounds)}


# ---- Reading -----------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_files(tmp_path):
    """Everything the page says of iterate 2, once more from the JSONL files."""
    folder = runs.make_run(tmp_path / "run", judge=lambda i: 0.3 * i)
    run, iterates, trainings = read(folder)
    raw = {
        i: [
            json.loads(line)
            for line in (folder / f"iter{i}/heldout_sampled.rewarded.jsonl").read_text().splitlines()
        ]
        for i in (0, 2)
    }
    got = iterates[2]["sampled"]
    means = [statistics.fmean(row["rewards"]) for row in raw[2]]
    assert got["reward"][0] == pytest.approx(statistics.fmean(means))
    error = statistics.pstdev(means) / math.sqrt(len(means))
    assert got["reward"][1:] == pytest.approx(
        (statistics.fmean(means) - 1.96 * error, statistics.fmean(means) + 1.96 * error), abs=0.2 * error
    )
    golds = [float(text.split("gold=")[1].split()[0]) for row in raw[2] for text in row["responses"]]
    assert got["gold"][0] == pytest.approx(statistics.fmean(golds))
    assert got["length"] == statistics.fmean(n for row in raw[2] for n in row["num_tokens"])
    versus = iterates[2]["versus"]["start"]["sampled"]
    assert versus["reward"][0] == pytest.approx(
        statistics.fmean(means) - statistics.fmean(statistics.fmean(row["rewards"]) for row in raw[0])
    )
    won = statistics.fmean(
        float(y > x) for old, new in zip(raw[0], raw[2]) for x in old["rewards"] for y in new["rewards"]
    )
    assert versus["reward_win"][0] == pytest.approx(won)
    assert got["best_of"][-1] == pytest.approx(statistics.fmean(max(row["rewards"]) for row in raw[2]))
    assert trainings[0]["margin"] == pytest.approx(
        statistics.fmean(
            max(row["rewards"]) - min(row["rewards"])
            for row in map(json.loads, (folder / "iter1/rewarded.jsonl").read_text().splitlines())
        )
    )
    assert iterates[2]["sampled"]["judge"] is not None and "judge_win" in versus


def steps_of(folder):
    return {(row["policy"], row["step"]): row for row in figures.of_steps(run_data.read_run(folder))}


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
    answers = [
        run_data.read_answers(path).lengths.sum() for path in folder.glob("iter2/heldout*rewarded.jsonl")
    ]
    assert rows[2, "sample"]["tokens_per_second"] == pytest.approx(sum(answers) / 10)
    runs.manifest(folder / "iter1/heldout_sampled.judged", counts={"scoring_seconds": 0.5})
    runs.manifest(folder / "iter1/divergence", counts={"seconds": 1.0})
    assert steps_of(folder)[1, "measure"]["work"] == 1.5
    (folder / "iter2/rewarded.manifest.json").write_text('{"counts": {"scoring_seconds": "4"}}')
    assert steps_of(folder)[1, "annotate"]["work"] is None


def test_gpus_are_those_of_a_step(tmp_path):
    folder = runs.make_run(tmp_path / "run")
    for path in folder.glob("iter*/*.manifest.json"):
        held = json.loads(path.read_text()) | {"versions": {"torch": "2.13.0"}}
        held["num_processes"] = 8 if path.name.startswith("model.") else None
        runs.write_json(path, held | {"merged": {"num_datasets": 4}} if ".generated" in path.name else held)
    rows = steps_of(folder)
    assert rows[0, "train"]["gpu_hours"] == pytest.approx(8 * 12 / 3600)
    assert rows[2, "sample"]["gpus"] == 4 and rows[0, "annotate"]["gpus"] == 1
    assert rows[2, "annotate"]["gpus"] is None  # nothing tells


def test_damaged_lines_are_counted_and_named(tmp_path):
    folder = runs.make_run(tmp_path / "run")
    path = folder / "iter1" / "heldout_sampled.rewarded.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    odd = [
        b'{"id": "x"}\n',
        b"[1]\n",
        b"\xff\xfe\n",
        b'{"prompt": [1], "responses": ["a"], "rewards": [1]}\n',
    ]
    path.write_bytes(b"".join(odd + lines[:-1]) + lines[-1][:50])
    run, iterates, _ = read(folder)
    assert "iter1/heldout_sampled.rewarded.jsonl: 5 lines cannot be read" in run.missing
    assert iterates[1]["sampled"]["prompts"] == 59
    (folder / "iter2" / "metrics.json").write_text("{half")
    (folder / "iter2" / "heldout_greedy.rewarded.jsonl").write_text("")
    (folder / "loop.yaml").write_text("a: [")
    run, _, _ = read(folder)
    assert any("iter2/metrics.json cannot be read" in text for text in run.missing) and any(
        "the settings" in text for text in run.missing
    )


def test_the_sample_is_the_same_for_every_file_and_order():
    rng, keys = random.Random(0), [f"k{i}" for i in range(500)]
    first = run_data.Sample(20)
    for key in keys:
        first.add(key, key)
    rng.shuffle(keys)
    second, other = run_data.Sample(20), run_data.Sample(20, seed=1)
    for key in keys:
        second.add(key, key)
        other.add(key, key)
    assert (
        first.records() == second.records() == sorted(keys, key=run_data.sample_hash)[:20] != other.records()
    )
    none = run_data.Sample(0)
    none.add("a", "a")
    assert none.records() == []


def test_texts_held_do_not_follow_the_file(tmp_path):
    runs.rewarded(tmp_path / "r.jsonl", "p", prompts=300)
    found = run_data.read_answers(tmp_path / "r.jsonl", keep=10)
    assert len(found.kept) == 10 and len(found.ids) == 300 and len(found.rewards) == 1200


# ---- Trouble -----------------------------------------------------------------------------------------------


def test_a_healthy_run_has_no_warning(tmp_path):
    assert (
        names(runs.make_run(tmp_path / "run", iterations=3, judge=lambda i: 0.4 * i, kl=lambda i: 3.0 * i))
        == set()
    )


def _length(i):
    return {"shift": 0.0, "gold": 0.5, "words": 30 + 12 * i, "reward_of_length": 0.1}


@pytest.mark.parametrize(
    "name, more",
    [
        ("length_growth", {"plan": _length}),
        ("length_only", {"plan": lambda i: _length(i) | {"words": 30 + 2 * i}, "prompts": 150}),
        ("over_optimised", {"plan": lambda i: {"shift": i, "gold": [0.4, 0.5, 0.35][i]}}),
        ("over_optimised", {"judge": lambda i: -0.8 * i}),
        ("only_training_reward", {"judge": lambda i: 0.0}),
        ("ties", {"training": lambda i: {"ties": True}}),
        ("collapsed", {"training": lambda i: {"ties": True}}),
        ("saturated", {"training": lambda i: {"saturated": True}}),
        ("kl", {"kl": lambda i: 40.0 * i}),
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
    found = {}
    for name, step in (("long", 2), ("short", -2)):
        plan = [
            {"shift": 0.0, "gold": 0.5, "words": 40 + step * i, "reward_of_length": math.copysign(0.1, step)}
            for i in range(3)
        ]
        run, iterates, trainings = read(
            runs.make_run(tmp_path / name, prompts=100, plan=plan.__getitem__), gold=False
        )
        for what, settings in (
            (name, {}),
            (f"{name} function", {"annotation": {"reward_function": "f.py:f"}}),
            (f"{name} ppo", {"backend": "small"}),
        ):
            run.settings = settings
            [found[what]] = [t for t in troubles.find(run, iterates, trainings) if t.name == "length_only"]
    assert (
        "length alone" in found["long"].title
        and "likes long answers" in found["long"].todo
        and "length_penalty" in found["long"].todo
    )
    assert (
        "brevity alone" in found["short"].title
        and "likes short answers" in found["short"].todo
        and "penalty" not in found["short"].todo
    )
    assert (
        "correct the reward for length" in found["long"].todo
        and "change the reward function" not in found["long"].todo
    )
    assert (
        "change the reward function" in found["long function"].todo
        and "reward model" not in found["long function"].todo
    )
    assert "pairs" not in found["long ppo"].todo
    assert " 4" in found["short"].figure and "→" in found["short"].figure


@pytest.mark.parametrize(
    "known, text",
    [({"dpo", "model"}, "a, b, or d"), ({"ppo", "model"}, "a, or d"), ({"ppo", "function"}, "a, c, or d")],
)
def test_advice_is_what_fits_a_run(known, text):
    assert troubles.advice(["a", ("dpo", "b"), ("function", "c"), "d"], known) == text


def test_the_terminal_says_how_many_warnings_there_are_and_where(tmp_path):
    folder = runs.make_run(tmp_path / "run", kl=lambda i: 40.0 * i)
    assert run_metrics.warnings(folder) == []
    make_report.make(make_report.Arguments(runs=[str(folder)]))
    lines, page = run_metrics.warnings(folder), folder / "report" / "index.html"
    assert lines[0] == f"2 warnings, with what to try on the page {page}:" and lines[1:] == [
        "  The policy is far from the reference (2 times)"
    ]
    assert page.read_text().count('<li data-name="') == 2
    make_report.make(make_report.Arguments(runs=[str(folder)], bounds={"kl": 1000, "kl_per_token": 100}))
    assert run_metrics.warnings(folder) == [f"no warnings; the page: {page}"]
    (folder / "report" / "index.warnings.json").write_text("{half")
    assert run_metrics.warnings(folder) == []


def test_shrinking_spread_is_a_collapse(tmp_path):
    folder = runs.make_run(tmp_path / "run", iterations=2)
    rows = [json.loads(line) for line in (folder / "iter2/rewarded.jsonl").read_text().splitlines()]
    runs.write(
        folder / "iter2/rewarded.jsonl",
        [row | {"rewards": [5 + r / 50 for r in row["rewards"]]} for row in rows],
    )
    assert names(folder) == {"collapsed"}


def test_a_rising_mean_that_loses_most_prompts_is_named(tmp_path):
    folder = runs.make_run(tmp_path / "run", iterations=1, plan=lambda i: {"shift": 0.0, "gold": 0.4})
    for kind in ("sampled", "greedy"):
        rows = [
            json.loads(line)
            for line in (folder / f"iter0/heldout_{kind}.rewarded.jsonl").read_text().splitlines()
        ]
        changed = [
            row | {"rewards": [r + (9 if n % 4 == 0 else -0.9) for r in row["rewards"]]}
            for n, row in enumerate(rows)
        ]
        runs.write(folder / f"iter1/heldout_{kind}.rewarded.jsonl", changed)
    assert "win_rate_falls" in names(folder)


def test_a_slow_fall_of_gold_is_named_against_the_best_before(tmp_path):
    """Each step is within chance and the end above the start; only the way down from the peak shows it."""
    gold = [0.4, 0.5, 0.493, 0.486, 0.479, 0.472]
    folder = runs.make_run(tmp_path / "run", iterations=5, plan=lambda i: {"shift": i, "gold": gold[i]})
    run, iterates, trainings = read(folder)
    assert not any(
        troubles.falls(row["versus"].get(against, {}).get("sampled", {}).get("gold"))
        for row in iterates
        for against in ("start", "previous")
    )
    found = [t for t in troubles.find(run, iterates, trainings) if t.name == "over_optimised"]
    assert (
        found
        and all(t.where.endswith("against iterate 1, the best before") for t in found)
        and found[-1].where.startswith("iterate 5")
    )
    assert "5 against 1 (best before)" in build(folder, target=tmp_path / "page.html")


def test_a_fall_that_chance_may_have_made_is_none():
    """A run is looked at many times, so that a fall is one at 99%: 1.31 times the 95% interval."""
    assert troubles.falls((-1.0, -1.9, -0.1)) is False and troubles.falls((-1.0, -1.7, -0.3)) is True
    assert (
        troubles.rises((1.0, 0.1, 1.9)) is True
        and not troubles.falls(None)
        and not troubles.rises((1.0, None, None))
    )


def test_bounds_can_be_set(tmp_path):
    folder = runs.make_run(tmp_path / "run", kl=lambda i: 40.0 * i)
    assert "kl" not in names(folder, troubles.Bounds(kl=100, kl_per_token=10))
    run, iterates, trainings = read(folder)
    [trouble] = [
        t for t in troubles.find(run, iterates, trainings) if t.name == "kl" and t.where == "iterate 2"
    ]
    assert "80.0 nats per response (bound 50)" in trouble.figure and "beta" in trouble.todo


# ---- Half-finished, PPO, several ---------------------------------------------------------------------------


def build(*folders, target, **more):
    args = make_report.Arguments(runs=[str(f) for f in folders], output_dir=str(target), **more)
    make_report.make(args)
    return Path(target).read_text(encoding="utf-8")


def test_half_finished_runs(tmp_path):
    folder = runs.make_run(tmp_path / "run", iterations=3, upto=1)
    text = build(folder, target=tmp_path / "a.html")
    assert "iterates 2 to 3 have not been evaluated" in text and "iterate 1 has not" not in text
    assert "KL to the reference (iterN/divergence.json)" in text and "a second judge" in text
    for name in ("heldout_sampled.rewarded.jsonl", "heldout_greedy.rewarded.jsonl"):
        (folder / "iter1" / name).unlink()
    runs.write_json(
        folder / "iter1/metrics.json",
        {"sampled": {"reward": 1.5, "reward_se": 0.1, "gold": 0.5, "length": 40.0}, "greedy": {}},
    )
    run, iterates, _ = read(folder)
    assert iterates[1]["sampled"]["reward"] == (1.5, 1.5 - 0.196, 1.5 + 0.196)
    assert "the sampled and greedy held-out answers of iterate 1" in build(folder, target=tmp_path / "b.html")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "loop.yaml").write_text("iterations: 2\n")
    text = build(bare, target=tmp_path / "c.html")
    assert "iterate 0 has not been evaluated" in text and "no step has finished" in text
    (bare / "iter1").mkdir()
    build(bare, target=tmp_path / "c.html")


def test_a_ppo_run(tmp_path):
    folder = runs.make_run(tmp_path / "run", iterations=1, kind="ppo")
    run, iterates, trainings = read(folder)
    assert run.kind == "ppo" and iterates[1]["kl"] == 4.0 and trainings[0]["ppo"]["step"] == 20
    assert names(folder) == set()
    text = build(folder, target=tmp_path / "a.html")
    assert (
        "PPO: reward" in text
        and "dpo_loss" not in text
        and "PPO&#39;s log" not in text.split("Notes: what")[0]
    )
    rows = [json.loads(line) for line in (folder / "iter1/model.log.jsonl").read_text().splitlines()]
    runs.write(
        folder / "iter1/model.log.jsonl",
        [row | {"entropy": 1 / (1 + row["step"]), "kl": 9.0 * row["step"]} for row in rows],
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


def test_what_was_run_stands_at_the_top(tmp_path):
    """Of two runs that differ in beta alone, and of PPO."""
    one, ppo = runs.make_run(tmp_path / "one"), runs.make_run(tmp_path / "ppo", 1, kind="ppo")
    held = json.loads((one / "loop.yaml").read_text())
    more = {"training_args": held["training_args"] | {"beta": 0.3}, "run_dir": held["run_dir"]}
    two = runs.make_run(tmp_path / "two", settings=more | {"gold_function": held["gold_function"]})
    text = build(one, two, ppo, target=tmp_path / "a.html")
    places = [text.index(part) for part in ("What was run", "What differs between", 'id="troubles"')]
    assert places == sorted(places)
    found = cells(text, "What was run")
    assert found == {
        "setting": ["one", "two", "ppo"],
        "policy": ["tiny"] * 3,
        "reward model": ["judge"] * 3,
        "prompts": ["60 × 2", "60 × 2", "640"],
        "pairs": ["50 × 2", "50 × 2", "–"],
        "held-out prompts": ["60"] * 3,
        "iterations": ["2", "2", "–"],
        "K": ["4", "4", "2"],
        "temperature": ["1.0"] * 3,
        "beta": ["0.1", "0.3", "–"],
        "KL coefficient": ["–", "–", "0.05"],
        "learning rate": ["0.0003", "0.0003", "1e-05"],
        "loss": ["sigmoid", "sigmoid", "–"],
        "choice of pairs": ["max_min", "max_min", "–"],
        "epochs": ["2.0", "2.0", "1"],
        "seed": ["0"] * 3,
    }
    text = build(one, two, target=tmp_path / "b.html")
    assert cells(text, "What differs between the runs") == {
        "setting": ["one", "two"],
        "training_args.beta": ["0.1", "0.3"],
    }
    assert cells(text, "All settings")["generation.K"] == ["4", "4"]


def test_several_runs(tmp_path):
    one, two = runs.make_run(tmp_path / "one"), runs.make_run(tmp_path / "two", settings={"seed": 7})
    text = build(one, two, target=tmp_path / "a.html")
    assert "one, iterate 0" in text and "two, iterate 2" in text
    found = cells(text, "What differs between the runs")
    assert found["seed"] == ["0", "7"] and not any("temperature" in key for key in found)
    assert list(cells(text, "The end of each training")) == ["run", "one", "two"]
    with pytest.raises(UserError, match="say where the page goes"):
        make_report.check(make_report.Arguments(runs=[str(one), str(two)]))


def test_differences_of_settings():
    got = figures.differing([{"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5, "d": 3}, "e": [1]}])
    assert got == {"b.c": [2, 5], "e": [None, [1]]}
    assert [figures.sizes(counts) for counts in ([500] * 3, [500, 400], [0, 1000], [])] == [
        "500 × 3",
        "500, 400",
        "1,000",
        "",
    ]


def test_a_run_that_is_not_evaluated(tmp_path):
    folder = runs.make_run(tmp_path / "run", evaluated=False)
    run, iterates, _ = read(folder)
    assert iterates == [] and run.missing == [] and names(folder) == set()
    text = build(folder, target=tmp_path / "a.html")
    assert "DPO, not evaluated: heldout_prompts is null" in text and "have not been evaluated" not in text
    assert cells(text, "What was run")["held-out prompts"] == ["none: not evaluated"]
    assert {"0 sample", "0 annotate", "0 train", "all"} <= cells(text, "Steps").keys()
    assert "dpo_loss" in text and "time in all" in text
    ppo = runs.make_run(tmp_path / "ppo", iterations=1, kind="ppo", evaluated=False)
    assert "PPO, not evaluated" in build(ppo, target=tmp_path / "b.html")


# ---- The page ----------------------------------------------------------------------------------------------


def test_every_heading_and_chart_has_its_definition(tmp_path):
    run, iterates, trainings = read(
        runs.make_run(tmp_path / "run", judge=lambda i: 0.1 * i, kl=lambda i: float(i))
    )
    tables = [(run, iterates, trainings, figures.of_steps(run))]
    plain = {"run", "prompts", "K", "GPUs", "setting", "package", run.name}
    for _, one in page.tables_of(tables):
        for key, heading in one["columns"]:
            assert key in DEFINITIONS if key else heading in plain, heading
    made = charts.of_runs(tables)
    assert len({chart["key"] for _, chart in made}) == len(made) > 15
    assert all(chart["definition"] in DEFINITIONS for _, chart in made)
    assert all(key in DEFINITIONS for key, *_ in figures.in_short(*tables[0][:2], tables[0][3]))


def test_text_of_a_model_stays_in_its_block(tmp_path):
    folder = runs.make_run(tmp_path / EVIL.replace("/", "∕"))
    path = folder / "iter2" / "heldout_greedy.rewarded.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    runs.write(
        path,
        [
            row | {"responses": [EVIL + "\u2028 gold=0.5 end"], "prompt": [{"role": EVIL, "content": EVIL}]}
            for row in rows
        ],
    )
    text = build(folder, target=tmp_path / "a.html")
    assert "<img src=x" not in text and "</script><img" not in text and "\u2028" not in text
    blocks = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', text, re.DOTALL)
    assert [name for name, _ in blocks] == ["charts-data", "samples-data"]
    for _, block in blocks:
        assert not re.search(r"[<>&]", block) and block.isascii()
        json.loads(block)
    shown = json.loads(dict(blocks)["samples-data"])
    assert any(
        EVIL in answer["t"][0]
        for entry in shown["heldout"]
        for column in entry["a"]
        for answer in column["r"]
    )


def test_nothing_in_the_page_is_fetched(tmp_path):
    text = build(runs.make_run(tmp_path / "run"), target=tmp_path / "a.html")
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?!#|data:)', own) and "url(" not in own and "@import" not in own
    assert text.count("* plotly.js v") == 1
    assert "default-src 'none'" in html.unescape(text)


def test_samples_fit_their_room_and_pairs_are_marked(tmp_path):
    folder = runs.make_run(tmp_path / "run", prompts=80)
    run = run_data.read_run(folder)
    found = samples.collect([run], 40, 6.0)
    assert len(found["heldout"]) == 40 and len(found["training"]) == 40 and found["left_out"] == 0
    for entry in found["training"]:
        [[chosen, rejected, margin]] = entry["pairs"]
        values = [one["r"] for one in entry["r"]]
        assert values[chosen] == max(values) and values[rejected] == min(values)
        assert margin == pytest.approx(max(values) - min(values), abs=2e-4)
    assert all(
        [a["col"] for a in entry["a"] if a["kind"] == "greedy"] == [0, 1, 2] for entry in found["heldout"]
    )
    small = samples.collect([run], 40, 0.05)
    assert 0 < len(json.dumps(small)) < 0.055e6 and small["left_out"] > 0
    assert {entry["i"] for entry in small["training"]} == {1, 2}
    assert samples.cut("x" * 5000) == ["x" * 4000, 1000]


def test_the_command(tmp_path):
    folder = runs.make_run(tmp_path / "run", plan=_length)

    def script(*arguments):
        command = [sys.executable, str(ROOT / "report" / "make_report.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    code, out, err = script(folder)
    assert (
        (code, err) == (0, "")
        and "warning: run, iterate 2: the answers grow" in out
        and "not there: run: KL" in out
    )
    assert (folder / "report" / "index.html").is_file() and not list((folder / "report").glob("*.tmp"))
    cases = [
        ((), "no run was given"),
        ((tmp_path / "no",), "no such run"),
        ((tmp_path,), "no run's folder; there is"),
        ((folder, folder), "given twice"),
        ((folder, "--bounds", '{"lenght_growth": 2}'), "did you mean 'length_growth'"),
        ((folder, "--sample", "3"), "did you mean '--samples'"),
        ((folder, "--output_dir", tmp_path), "is a folder"),
        ((folder, "--samples", "-1"), "must not be negative"),
    ]
    for arguments, message in cases:
        code, out, err = script(*arguments)
        assert code == 2 and out == "" and err.count("\n") == 1 and message in err, err


# ---- What is of another kind than it should be -------------------------------------------------------------


@pytest.mark.parametrize(
    "file, change",
    [
        ("loop.yaml", {"iterations": "three", "generation": 5, "gold_function": 3.5, "note": "half \ud800"}),
        ("loop.yaml", {"iterations": 10**400, "prompts": {"a": 1}, "heldout_prompts": "x" * 5000}),
        ("iter0/metrics.json", {"files": [1], "judge": -1, "sampled": True, "gold_function": 1e309}),
        (
            "iter1/metrics.json",
            {
                "files": {"sampled": {"a": 1}},
                "judge": {"sampled": 1e308, "greedy": [1]},
                "greedy": {"reward": "x"},
            },
        ),
        ("iter1/divergence.json", {"kl": "x", "kl_se": [1], "kl_per_token": 10**400}),
        (
            "iter1/model.manifest.json",
            {
                "counts": 7,
                "versions": 10**400,
                "metrics": {"loss": [1], "num_tokens": 5, "train_runtime": {"a": 1}},
            },
        ),
        ("iter1/model.manifest.json", {"counts": {"eval_pairs": "x<b>"}, "num_processes": "two"}),
        ("iter1/model.trainer_state.json", {"log_history": -1}),
        (
            "iter1/model.trainer_state.json",
            {"log_history": [{"step": "x", "loss": 0.5}, {"step": float("nan"), "loss": [1]}, 3]},
        ),
    ],
)
def test_values_of_another_type_are_passed_over(tmp_path, file, change):
    folder = runs.make_run(tmp_path / "run", prompts=6)
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    runs.write_json(path, (json.loads(path.read_text()) if path.is_file() else {}) | change)
    made(folder, tmp_path)


def made(folder, tmp_path):
    target, _, missing = make_report.make(
        make_report.Arguments(runs=[str(folder)], output_dir=str(tmp_path / "page.html"))
    )
    return target.read_text(encoding="utf-8"), [text for _, text in missing]


def test_records_that_are_no_text_or_no_numbers(tmp_path):
    folder = runs.make_run(tmp_path / "run", prompts=6)
    path = folder / "iter1" / "heldout_sampled.rewarded.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    del rows[0]["id"]
    rows[0] |= {"prompt": "half \ud800", "responses": ["\udfff", "a", "b", "c"]}
    rows[1]["rewards"] = [10**400, 1, 2, 3]
    rows[2]["prompt"] = ["no message"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = folder / "iter1" / "pairs.jsonl"
    first = json.loads(pairs.read_text().splitlines()[0])
    runs.write(pairs, [first | {"chosen_index": 1e309, "chosen_num_tokens": 10**400}])
    with open(folder / "stages.jsonl", "a") as file:
        file.write(
            '{"policy": [1], "step": {}, "seconds": 1}\n{"policy": 1, "step": "train", "seconds": 1'
            + "0" * 400
            + "}\n"
        )
    text, missing = made(folder, tmp_path)
    assert any("heldout_sampled.rewarded.jsonl: 1 lines" in one for one in missing)


def trackers_are_told(folder, monkeypatch):
    """The settings that a tracker gets, as text."""
    told = []
    monkeypatch.setattr(trackers, "log_rows", lambda name, rows, where, settings, *_: told.append(settings))
    run_metrics.log(folder, [{"iterate": 0}], ["wandb"])
    return str(told)


def test_passwords_and_tokens_do_not_reach_the_page(tmp_path, monkeypatch):
    secrets = ["hf_" + "A1b2" * 8, "sk-" + "x9Y8" * 6, "plainpassword", "swordfish77", "0123abcd4567"]
    folder = runs.make_run(
        tmp_path / "run",
        prompts=6,
        settings={
            "hub_token": "plainpassword",
            "setup_command": f"export WANDB_API_KEY=0123abcd4567; export HF_TOKEN={secrets[0]}",
            "annotation": {"urls": [f"https://me:swordfish77@host/{secrets[1]}"]},
            "training_args": {"pad_token": "<pad>", "max_new_tokens": 32},
        },
    )
    text, _ = made(folder, tmp_path)
    told = trackers_are_told(folder, monkeypatch)
    assert not [secret for secret in secrets if secret in text or secret in told]
    assert "&lt;pad&gt;" in text and "<pad>" in told and "https://(hidden)@host/" in text


def test_one_prompt_with_more_answers_does_not_stand_for_all():
    values = {i: np.array([float(i), i + 1.0]) for i in range(20)} | {"long": np.array([100.0, 200.0, 300.0])}
    assert measures.best_of(values) == pytest.approx([10.0, 10.5])


def test_in_the_middle_of_training_the_last_checkpoints_log_is_read(tmp_path):
    folder = runs.make_run(tmp_path / "run", prompts=6)
    state = folder / "iter2/model.trainer_state.json"
    (folder / "iter2/model/checkpoint-20").mkdir(parents=True)
    state.rename(folder / "iter2/model/checkpoint-20/trainer_state.json")
    run, _, _ = read(folder)
    assert run.trainings[2].history == run.trainings[1].history != []


def test_what_has_not_begun_is_one_line(tmp_path):
    folder = runs.make_run(tmp_path / "run", prompts=6, settings={"iterations": 500})
    _, missing = made(folder, tmp_path)
    assert [text for text in missing if "evaluated" in text] == ["iterates 3 to 500 have not been evaluated"]


def test_an_iterate_that_answers_as_the_one_before_is_named(tmp_path):
    """On the page and in the terminal; a few equal answers are no matter."""
    folder = runs.make_run(tmp_path / "run", iterations=2)
    for path in folder.glob("iter*/metrics.json"):
        path.write_text(
            json.dumps(
                json.loads(path.read_text()) | {kind: {"reward": 0.0} for kind in ("sampled", "greedy")}
            )
        )
    assert "alike" not in names(folder)
    for kind in ("sampled", "greedy"):
        shutil.copy(
            folder / f"iter1/heldout_{kind}.rewarded.jsonl", folder / f"iter2/heldout_{kind}.rewarded.jsonl"
        )
    run, iterates, trainings = read(folder)
    [trouble] = [t for t in troubles.find(run, iterates, trainings) if t.name == "alike"]
    assert (
        trouble.where == "iterate 2 against iterate 1"
        and "100.0% of the sampled answers, 100.0% of the greedy answers" in trouble.figure
    )
    [line] = run_metrics.alike(run_metrics.rows(folder))
    assert line.startswith(
        "warning: iterate 2 answers as iterate 1 did, 100% word for word: training changes too little"
    )
    assert ", raise learning_rate, " in trouble.todo
    path = folder / "iter2/heldout_sampled.rewarded.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:10]:  # of 60: beyond the bound
        row["responses"] = [text + " now" for text in row["responses"]]
    runs.write(path, rows)
    (folder / "iter2/heldout_greedy.rewarded.jsonl").unlink()
    assert "alike" not in names(folder) and not list(run_metrics.alike(run_metrics.rows(folder)))


def test_empty_answers_and_a_kl_of_other_tokens_are_warned_of(tmp_path):
    folder = runs.make_run(tmp_path / "run", iterations=1)
    path = folder / "iter1/heldout_greedy.rewarded.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:6]:
        row["responses"] = [" \n" for _ in row["responses"]]
    runs.write(path, rows)
    runs_kl = {
        "kl": 0.5,
        "kl_se": 0.1,
        "kl_per_token": 0.01,
        "retokenised": 40,
        "responses": 60,
        "exact": False,
    }
    (folder / "iter1/divergence.json").write_text(json.dumps(runs_kl))
    run, iterates, trainings = read(folder)
    found = {t.name: t for t in troubles.find(run, iterates, trainings)}
    assert (
        "10.0% have no text" in found["empty"].figure
        and "greedy" in found["empty"].where
        and "drop_empty" in found["empty"].todo
    )
    assert (
        "40 of 60 responses" in found["kl_guessed"].figure
        and "response_token_ids" in found["kl_guessed"].todo
    )
