"""All figures of a run, one row an iterate: `metrics.json` and `metrics.csv` in the run's folder, and the
trackers of transformers.

    python evaluation/run_metrics.py --run runs/tiny
    python evaluation/run_metrics.py --run runs/tiny --report_to tensorboard

In:  a run's folder, as run_loop.sh and run_ppo.sh leave it, finished or not, evaluated or not.
Out: `metrics.json` (the rows, and `gains`: how the last iterate differs from the first) and `metrics.csv`
     there, what the trackers were told in `trackers.json`, `best` and `best.json` of
     evaluation/select_iterate.py, and the run's table in the terminal. While no file of the run has changed,
     what metrics.json holds is shown again without being computed.

A row's names are flat: `iterate`; what metrics.json of the iterate has of the answers, as `sampled_reward`,
`greedy_gold`, `judge_sampled_reward`, …; `…_win_rate` against the start (below), with its standard error;
`…_same`, the share of the answers that are word for word the previous iterate's; `kl`, `kl_se`,
`kl_per_token`, `k3`, `k3_se` of divergence.json; `train_…` of the training's manifest; `seconds`, and of them
`train_seconds`, `sample_seconds`, `annotate_seconds`, `measure_seconds`, by stages.jsonl. What is not known
is null, and an empty cell.

A win rate is the share of comparisons that the iterate's answer wins against the start's to the same prompt,
ties half: all K × K pairs of sampled answers, the one pair of greedy ones; averaged over prompts. By the
reward model; with `judge_` by the second one.

A tracker gets one run for the whole loop, with iterates as steps: RUN/trackers.json remembers which, and
what it was told, so that no step is logged twice. The run's settings `project` and `run_name` name it;
without them the tracker's own variable (WANDB_PROJECT) and the run's folder do.
"""

import contextlib
import csv
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, manifest, trackers
from common.cli import UserError, arg, count, one_line
from common.hide import hidden
from common.manifest import write_json
from common.records import finite
from common.run_folder import KINDS, RunFolder, read_object, warnings_of
from evaluation import metrics, select_iterate

DIVERGENCE = ("kl", "kl_se", "kl_per_token", "k3", "k3_se", "k3_per_token")


@dataclass
class Arguments:
    run: str = arg(help="a run's folder")
    report_to: list[str] = arg(
        [],
        help=(
            f"trackers to log the rows to: none, {', '.join(trackers.FIGURES)}; not given: the run's own "
            "report_to"
        ),
    )
    gold_function: str | None = arg(
        None, help="FILE.py:NAME for the intervals under the table; None: the run's own"
    )


def flat(values: object, prefix: str) -> dict:
    """{prefix + key: number} of a dict's numbers; `rewards/margins` becomes `rewards_margins`."""
    items = values.items() if isinstance(values, dict) else ()
    return {prefix + key.replace("/", "_"): own for key, own in items if finite(own) or own is None}


def rows(folder: str | Path) -> list[dict]:
    """One flat dict for each iterate of `metrics.read_run`, in order, all with the same keys.

    Raises:
        UserError: as `metrics.read_run`.
    """
    made, run = [], RunFolder(folder)
    seconds, start, before = run.seconds(), {}, {}
    for place, found in metrics.read_run(folder):
        i = found["iterate"]
        row = {"iterate": i}
        for kind, values in metrics.measured(found):
            path = place / (found.get("files") or {}).get(kind, "-")
            answers = metrics.read_rewarded(path) if path.is_file() else {}
            row |= flat(values, f"{kind}_") | _against(kind, answers, start, before, is_start=i == 0)
        row |= {key: value for key in DIVERGENCE if finite(value := found.get("divergence", {}).get(key))}
        trained = flat(read_object(run.model_manifest(i)).get("metrics"), "train_")
        row |= {key.replace("train_train_", "train_", 1): value for key, value in trained.items()}
        row |= {"seconds": found.get("seconds")}
        row |= {f"{step}_seconds": value for step, value in seconds.get(i, {}).items()}
        made.append(row)
    keys = dict.fromkeys(key for row in made for key in row)
    return [{key: row.get(key) for key in keys} for row in made]


def _against(kind, answers, start, before, is_start):
    """Columns of a kind of answers beside the start's (win rate) and the previous iterate's (same), both of
    which are kept in `start` and `before` for the next one.
    """
    import numpy

    from evaluation.measures import wins

    row = {}
    texts = {key: [hash(text) for text in record["responses"]] for key, record in answers.items()}
    if kind in KINDS and (same := metrics.same_answers(before.get(kind, {}), texts)) is not None:
        row[f"{kind}_same"] = round(same, 6)
    before[kind] = texts
    rewards = {
        key: numpy.array(known)
        for key, record in answers.items()
        if (known := [value for value in record["rewards"] if value is not None])
    }
    if is_start:
        start[kind] = rewards
    elif won := wins(start.get(kind, {}), rewards):
        mean, error = metrics.mean_and_error(won.values())
        row[f"{kind}_win_rate"] = round(mean, 6)
        row[f"{kind}_win_rate_se"] = None if error is None else round(error, 6)
    return row


def made_of(run: RunFolder, gold_function: str | None) -> str:
    """A hash of the sizes and times of all that the rows and gains are made of, and made by."""
    paths, specs = {Path(__file__), Path(metrics.__file__)}, {gold_function}
    for pattern in ("stages.jsonl", "iter*/*.json", "iter*/*.jsonl"):
        paths.update(run.path.glob(pattern))
    for i in run.iterations():
        held = read_object(run.metrics(i))
        specs.add(held.get("gold_function"))
        files = held.get("files")
        paths.update(
            run.iteration(i) / str(name) for name in (files if isinstance(files, dict) else {}).values()
        )
    paths.update(Path(spec.rpartition(":")[0]) for spec in specs if isinstance(spec, str))
    found = [run.path.resolve().name, gold_function]
    for path in sorted(paths):
        with contextlib.suppress(OSError):  # a run at work renames and removes
            stat = path.stat()
            found.append((str(path), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def current(folder: str | Path, gold_function: str | None = None) -> dict:
    """What RUN/metrics.json holds, written anew, with metrics.csv, where anything has changed.

    Its `gains` are null where they cannot be computed.
    """
    run = RunFolder(folder)
    table, mark = run.metrics_table.with_suffix(".csv"), made_of(run, gold_function)
    held = read_object(run.metrics_table)
    if held.get("made_of") == mark and table.is_file():
        return held
    made, text = rows(folder), io.StringIO()
    writer = csv.DictWriter(text, list(made[0]) if made else ["iterate"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(made)
    manifest.write_text(table, text.getvalue())
    try:
        gained = metrics.gains(metrics.read_run(folder), gold_function)
    except UserError:
        gained, mark = None, None
    held = {"run": run.path.resolve().name, "iterates": made, "gains": gained, "made_of": mark}
    write_json(run.metrics_table, held)
    return held


def log(folder: str | Path, made: list[dict], report_to: list[str] | None):
    """Tell each tracker of `report_to` the rows that it was not told yet, and say so. One that fails is a
    note, never an error.

    What each was told stands in RUN/trackers.json, so that no row is logged twice.
    """
    run, settings = RunFolder(folder), hidden(metrics.settings_of(folder))
    names = {"project": settings.get("project")}
    names["run_name"] = settings.get("run_name") or run.path.resolve().name
    states = read_object(run.trackers)
    for name in trackers.chosen(report_to):
        state = states.setdefault(name, {})
        told = state.setdefault("iterates", [])
        new = [row for row in made if row["iterate"] not in told]
        figures = [
            (row["iterate"], {k: v for k, v in row.items() if finite(v) and k != "iterate"}) for row in new
        ]
        try:
            if new:
                trackers.log_rows(name, figures, run.path, settings, names, state)
        except Exception as error:  # no network, no login, not installed
            print(f"note: {name} was not told of this run: {one_line(error, 200)}", flush=True)
            continue
        if new:
            state["iterates"] = [*told, *(row["iterate"] for row in new)]
            write_json(run.trackers, states)
        before = f", {count(len(told), 'iterate')} had been logged before" if told else ""
        print(f"{name}: logged {count(len(new), 'iterate')}{before}", flush=True)


def alike(made: list[dict]) -> Iterator[str]:
    """Lines: which iterates answer as the one before did, as the page warns of."""
    for before, row in zip(made, made[1:]):
        shares = [same for kind in KINDS if (same := row.get(f"{kind}_same")) is not None]
        if shares and min(shares) >= metrics.SAME_ANSWERS:
            yield (
                f"warning: iterate {row['iterate']} answers as iterate {before['iterate']} did, "
                f"{min(shares):.0%} word for word: {metrics.NOTHING_LEARNED}"
            )


def warnings(folder: str | Path) -> list[str]:
    """Lines that say how many warnings the run's page has, which, and where it is; none where no page was
    made.
    """
    page = RunFolder(folder).page
    try:
        listed = json.loads(warnings_of(page).read_text(encoding="utf-8"))
        titles = Counter(entry["title"] for entry in listed)
    except (OSError, ValueError, KeyError, TypeError):  # no page, or one that somebody else has made
        return []
    if not listed:
        return [f"no warnings; the page: {page}"]
    told = [f"  {title} ({n} times)" if n > 1 else f"  {title}" for title, n in titles.items()]
    return [f"{count(len(listed), 'warning')}, with what to try on the page {page}:", *told]


def best(folder: str | Path, gold_function: str | None) -> list[str]:
    """Which iterate is to be kept, in a line; RUN/best is a link to it. None of a run with one iterate."""
    try:
        held = select_iterate.current(folder, made_of(RunFolder(folder), gold_function), gold_function)
    except UserError as error:
        return [f"note: {error}"]
    return [held["sentence"]] if held and len(held["scores"]) > 1 else []


def main():
    args = cli.parse(Arguments, __doc__)
    trackers.check(args.report_to, known=trackers.FIGURES)
    iterates, held = metrics.read_run(args.run), current(args.run, args.gold_function)
    log(args.run, held["iterates"], args.report_to or metrics.settings_of(args.run).get("report_to"))
    gained = metrics.gains(iterates, args.gold_function) if held["gains"] is None else held["gains"]
    print(metrics.table([(None, iterates, gained)]))
    for line in best(args.run, args.gold_function):
        print(line)
    for line in warnings(args.run) or alike(held["iterates"]):  # the page warns of the same
        print(line)


if __name__ == "__main__":
    cli.run(main)
