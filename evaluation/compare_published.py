r"""Compare the benchmarks of an iterate with published figures: paper, mine, difference and its interval.

In:  a run whose iterate was evaluated by evaluate_benchmarks.sh or evaluate_judged.sh, as far as it was; or
     the folder that these wrote for another model. Published figures are in evaluation/published.yaml.
Out: a table, and the commands for what is missing.

    python evaluation/compare_published.py runs/NAME --iterate 3
    python evaluation/compare_published.py runs/NAME --iterate 0 --row SFT

The interval is 1.96 standard errors of the difference. Mine is the harness's or the judge's own. The paper
gives none, so its figure gets the binomial one of its number of questions, sqrt(p(1-p)/n), which is too much
for scores between right and wrong (TruthfulQA, AlpacaEval); MT-Bench's gets mine. Both models answer the same
questions, so the true interval is mostly narrower; the seed of a training is not in it. Only figures by the
judge of the published ones are compared; others are listed.
"""

import csv
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.cli import UserError, arg
from common.files import nearest
from common.jsonl import BadRecord, jsonl_records
from common.records import finite
from common.run_folder import RunFolder, read_object
from evaluation.evaluate_judged import generator_of
from evaluation.judging import HOSTED, judgments_of, quoted

PUBLISHED = Path(__file__).with_name("published.yaml")
# Arena-Hard's verdict on A → share that A wins, and how often it counts.
VERDICTS = {"A>>B": (1, 3), "A>B": (1, 1), "A=B": (0.5, 1), "B=A": (0.5, 1), "A<B": (0, 1), "A<<B": (0, 3)}
VERDICTS |= {"B>>A": (0, 3), "B>A": (0, 1), "B<A": (1, 1), "B<<A": (1, 3)}
RAW = "not length-controlled"  # a win rate of AlpacaEval that compares with no published one
JUDGED = {  # benchmark → what evaluate_judged.sh asks for
    "alpaca_eval": "--alpaca_eval mine/alpaca_eval.json",
    "arena-hard-v0.1": "--arena_hard arena-hard-auto/data/arena-hard-v0.1/question.jsonl",
    "mt_bench": "--mt_bench FastChat/fastchat/llm_judge/data/mt_bench/question.jsonl",
}


@dataclass
class Arguments:
    run: str = arg(help="folder of a run, or one that holds results.json; may be given without --run")
    iterate: int | None = arg(
        None, help="which iterate; None: the one that RUN/best.json names, else the last"
    )
    row: str = arg("iterative DPO", help="row of evaluation/published.yaml")
    generator: str | None = arg(None, help="the model's name for the judges; None: RUN-iterI, or the model's")


@dataclass
class Figure:
    """A benchmark's figure in percent (MT-Bench: points of 10), its standard error, and what to say of it."""

    value: float
    error: float
    note: str = ""


def published(row: str) -> tuple[dict, dict[str, float], str]:
    """(benchmarks, {column: figure of the row that has one}, its source)."""
    held = cli.read_yaml(PUBLISHED)
    for table in held["tables"]:
        if row in table["rows"]:
            figures = dict(zip(table["columns"], table["rows"][row], strict=True))
            known = {name: value for name, value in figures.items() if value is not None}
            return held["benchmarks"], known, table["source"]
    rows = [name for table in held["tables"] for name in table["rows"]]
    raise UserError(f"--row {row!r}{nearest(row, rows)}; there are: {'; '.join(rows)}")


def chance(percent: float, questions: int) -> float:
    """Standard error of a share of independent questions, in percent."""
    return math.sqrt(max(percent * (100 - percent), 0) / questions)


def weighted_mean(sums: list[tuple[float, float]]) -> tuple[float, float]:
    """(mean, its standard error over questions) of [(sum of a question's scores, their weight)]."""
    weight = sum(w for _, w in sums)
    mean = sum(s for s, _ in sums) / weight
    return mean, math.sqrt(sum((s - mean * w) ** 2 for s, w in sums)) / weight


def harness_figure(results: dict, benchmark: dict) -> Figure | None:
    """What lm-evaluation-harness measured, by the first of the benchmark's tasks that was run."""
    for task, metric in benchmark.get("tasks", {}).items():
        values = results.get("tasks", {}).get(task, {})
        if finite(values.get(metric)):
            name, _, how = metric.partition(",")
            value, error = 100 * values[metric], values.get(f"{name}_stderr,{how}")
            wanted, given = benchmark.get("examples"), values.get("examples")
            notes = [task] if task != next(iter(benchmark["tasks"])) else []
            notes += [f"{given} examples, not {wanted}"] if given != wanted else []
            error = 100 * error if finite(error) else chance(value, benchmark["questions"])
            return Figure(value, error, ", ".join(notes))
    return None


def results_of(folder: Path) -> dict:
    """What evaluate_benchmarks.sh has written into `results.json`, {} where it was not run.

    Raises:
        UserError: the file holds something else.
    """
    path, missing = folder / "results.json", []
    held = read_object(path, missing)
    tasks = held.get("tasks", {})
    if missing or not isinstance(tasks, dict) or not all(isinstance(one, dict) for one in tasks.values()):
        raise UserError(
            f"{path} is damaged: delete it and start evaluate_benchmarks.sh again, which does nothing again "
            "that is done"
        )
    return held


def alpaca_eval_figure(path: Path, generator: str) -> Figure | None:
    """A model's row of AlpacaEval's leaderboard.csv."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = {row[""]: row for row in csv.DictReader(file)}
    row = rows.get(generator, {})
    if row.get("length_controlled_winrate"):
        return Figure(float(row["length_controlled_winrate"]), float(row["lc_standard_error"]))
    if row.get("win_rate"):
        return Figure(float(row["win_rate"]), float(row["standard_error"]), RAW)
    return None


def judgments(path: Path, generator: str) -> Iterator[dict]:
    for record in jsonl_records(path, "judgments"):
        if isinstance(record, BadRecord):
            raise record
        if record.get("model") == generator:
            yield record


def arena_hard_figure(path: Path, generator: str) -> Figure | None:
    """The weighted share of games that a model wins, as arena-hard-auto's show_result.py has it without style
    control; a question without two verdicts is left out.
    """
    sums, judged = [], 0
    for record in judgments(path, generator):
        judged += 1
        verdicts = [VERDICTS.get((game or {}).get("score")) for game in record["games"]]
        if len(verdicts) == 2 and None not in verdicts:
            (baseline, first), (own, second) = verdicts  # the baseline is A in the first game
            sums.append(((1 - baseline) * first + own * second, first + second))
    if not sums:
        return None
    mean, error = weighted_mean(sums)
    lost = judged - len(sums)
    return Figure(100 * mean, 100 * error, f"{lost} without a verdict" if lost else "")


def mt_bench_figure(path: Path, generator: str) -> Figure | None:
    """The mean score of both turns, as FastChat's show_result.py has it; a score of -1 is none."""
    sums = {}
    for record in judgments(path, generator):
        if record["score"] != -1:
            total, n = sums.get(record["question_id"], (0, 0))
            sums[record["question_id"]] = (total + record["score"], n + 1)
    return Figure(*weighted_mean(list(sums.values()))) if sums else None


def judged_figures(folder: Path, bench: str, generator: str) -> dict[str, Figure]:
    """{judge: figure} of one judged benchmark."""
    own = folder / bench
    if bench == "alpaca_eval":
        files = {path.parent.name: path for path in own.glob("*/leaderboard.csv")}
        reader = alpaca_eval_figure
    else:
        files = {path.stem: path for path in judgments_of(own, "*").parent.glob("*.jsonl")}
        reader = mt_bench_figure if bench == "mt_bench" else arena_hard_figure
    try:
        found = {judge: reader(path, generator) for judge, path in sorted(files.items())}
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{own}: its judgments cannot be read: {error!r}") from error
    return {
        f"{judge}, {f.note}" if f.note == RAW else judge: f for judge, f in found.items() if f is not None
    }


def place(args: Arguments) -> tuple[Path, str, str]:
    """(folder of the results, the model's name for the judges, arguments that name the model)."""
    run = RunFolder(args.run)
    if not run.path.is_dir():
        raise UserError(f"{args.run} is not there; a run's folder was expected")
    if args.iterate is None and not run.iterations():
        model = read_object(run.path / "results.json").get("model", "MODEL")
        given = f"--model_name_or_path {quoted(model)} --output_dir {quoted(run.path)}"
        return run.path, args.generator or generator_of(None, None, model), given
    iterate = args.iterate
    if iterate is None:
        iterate = read_object(run.choice).get("iterate", run.iterations()[-1])
    if iterate and not run.iteration(iterate).is_dir():  # of the start a run may have no folder
        raise UserError(f"{run.iteration(iterate)} is not there: which iterate of the run is meant?")
    folder = run.iteration(iterate) / "benchmarks"
    name = args.generator or generator_of(args.run, iterate, "")
    return folder, name, f"--run {quoted(run.path)} --iterate {iterate}"


def table_row(name: str, paper: float, mine: Figure, benchmark: dict) -> str:
    """A line of the table."""
    points = benchmark.get("scale", 100) == 100
    error = math.hypot(mine.error, chance(paper, benchmark["questions"]) if points else mine.error)
    by, digits = mine.value - paper, 1 if points else 2
    low, high = by - 1.96 * error, by + 1.96 * error
    shown = f"{name:16} {paper:6.{digits}f} {mine.value:6.{digits}f} {by:+11.{digits}f}"
    return f"{shown}  {low:+6.{digits}f} … {high:+6.{digits}f}  {mine.note}".rstrip()


def missing_commands(missing: list[str], benchmarks: dict, given: str) -> list[str]:
    """The commands that measure what was not measured."""
    tasks, code, judged, found = [], False, [], []
    for name in missing:
        benchmark = benchmarks[name]
        if "judged" in benchmark:
            judged.append(JUDGED[benchmark["judged"]])
        elif benchmark.get("tasks"):
            task = next(iter(benchmark["tasks"]))
            tasks.append(f"{task}:{benchmark['examples']}")
            code |= task.startswith(("humaneval", "mbpp"))
    if tasks:
        more = " --run_code true" if code else ""
        found.append(f"bash evaluation/evaluate_benchmarks.sh {given} --tasks {' '.join(tasks)}{more}")
    if judged:
        found.append(f"bash evaluation/evaluate_judged.sh {given} {' '.join(judged)}   # then what it prints")
    return found


def how_asked(results: dict) -> str:
    """How the harness asked, in words."""
    if not results:
        return "lm-evaluation-harness was not run"
    template = "in the model's chat template" if results.get("chat_template") else "without a chat template"
    system = results.get("system_instruction")
    said = f"asked {template}, " + (f"system prompt {json.dumps(system)}" if system else "no system prompt")
    return said + (f"; ONLY {results['limit']} questions a task" if results.get("limit") else "")


def main():
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    args = cli.parse(Arguments, __doc__, argv)
    benchmarks, paper, source = published(args.row)
    folder, generator, given = place(args)
    results = results_of(folder)
    lines, missing, others = [], [], []
    for name, value in paper.items():
        benchmark = benchmarks[name]
        if "judged" in benchmark:
            bench = benchmark["judged"]
            by = judged_figures(folder, bench, generator)
            mine = by.pop(HOSTED[bench], None)
            others += [f"{bench} by {judge}: {f.value:.2f} ± {f.error:.2f}" for judge, f in by.items()]
        else:
            mine = harness_figure(results, benchmark)
        if mine is None:
            missing.append(name)
        else:
            lines.append(table_row(name, value, mine, benchmark))
    print(f"{folder} and {args.row!r} of {source}; {how_asked(results)}")
    if lines:
        print(
            f"\n{'benchmark':16} {'paper':>6} {'mine':>6} {'difference':>11}  95% interval", *lines, sep="\n"
        )
    if others:
        print("\nby other judges, which compare with no published figure:", *others, sep="\n  ")
    if missing:
        how = missing_commands(missing, benchmarks, given)
        print(f"\nmissing: {', '.join(missing)}", *how, sep="\n  ")


if __name__ == "__main__":
    cli.run(main)
