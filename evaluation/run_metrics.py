"""All figures of a run, one row an iterate: `metrics.json` and `metrics.csv` in the run's folder, and the
trackers of transformers.

    python evaluation/run_metrics.py --run runs/tiny
    python evaluation/run_metrics.py --run runs/tiny --report_to tensorboard

In:  a run's folder, as run_loop.sh and run_ppo.sh leave it, finished or not.
Out: `metrics.json` and `metrics.csv` there, what the trackers were told in `trackers.json`, and the run's
table in the terminal.

A row's names are flat: `iterate`; what metrics.json of the iterate has of the answers, as `sampled_reward`,
`greedy_gold`, `judge_sampled_reward`, …; `…_win_rate` against the start (below), with its standard error;
`…_same`, the share of the answers that are word for word the previous iterate's; `kl`, `kl_se`,
`kl_per_token`, `k3`, `k3_se` of divergence.json; `train_…` of the training's manifest; `seconds`, and
`generate_seconds`, `annotate_seconds`, `train_seconds`, `evaluate_seconds` of stages.jsonl. What is not known
is null, and an empty cell.

A win rate is the share of comparisons that the iterate's answer wins against the start's to the same prompt,
ties half: all K × K pairs of sampled answers, the one pair of greedy ones; averaged over prompts. By the
reward model; with `judge_` by the second one.

A tracker gets one run for the whole loop, with iterations as steps: RUN/trackers.json remembers which, and
what it was told, so that no step is logged twice. The run's settings `project` and `run_name` name it;
without them the tracker's own variable (WANDB_PROJECT) and the run's folder do.
"""

import csv
import io
import json
import os
import secrets
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, manifest, trackers
from common.cli import arg, count
from common.manifest import write_json
from common.records import finite
from evaluation import metrics
from evaluation.metrics import read_object
from report.hide import hidden
from report.make_report import warnings_of
from report.troubles import NOTHING_LEARNED, Bounds

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


def number(value):
    return finite(value)


def flat(values, prefix):
    """{prefix + key: number} of a dict's numbers; `rewards/margins` becomes `rewards_margins`."""
    return (
        {
            prefix + key.replace("/", "_"): value
            for key, value in values.items()
            if number(value) or value is None
        }
        if isinstance(values, dict)
        else {}
    )


def stage_seconds(folder):
    """{iterate: {stage: seconds}} of a run, what several starts took added up."""
    found = {}
    try:
        lines = (Path(folder) / "stages.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
            stages = found.setdefault(int(entry["iteration"]), {})
            stages[entry["stage"]] = stages.get(entry["stage"], 0) + entry["seconds"]
        except (ValueError, KeyError, TypeError):  # a line that a kill tore
            continue
    return found


def rows(folder):
    """One flat dict an iterate that has metrics, in order, all with the same keys.

    Raises:
        UserError: no such folder, or no metrics in it yet.
    """
    import numpy

    from evaluation.measures import wins

    iterates, made, start, texts = metrics.read_run(folder), [], {}, {}
    seconds = stage_seconds(folder)
    for place, found in iterates:
        row = {"iterate": found["iterate"]}
        for kind, values in metrics.measured(found):
            row |= flat(values, f"{kind}_")
            path = place / (found.get("files") or {}).get(kind, "-")
            records = metrics.read_rewarded(path) if path.is_file() else {}
            held = {key: record["rewards"] for key, record in records.items()}
            answers = {key: [hash(text) for text in record["responses"]] for key, record in records.items()}
            if (
                kind in metrics.KINDS
                and (same := metrics.same_answers(texts.get(kind, {}), answers)) is not None
            ):
                row[f"{kind}_same"] = round(same, 6)
            texts[kind] = answers
            rewards = {
                key: numpy.array(some)
                for key, values in held.items()
                if (some := [value for value in values if value is not None])
            }
            if found["iterate"] == 0:
                start[kind] = rewards
            elif won := wins(start.get(kind, {}), rewards):
                mean, error = metrics.mean_and_error(won.values())
                row |= {
                    f"{kind}_win_rate": round(mean, 6),
                    f"{kind}_win_rate_se": None if error is None else round(error, 6),
                }
        row |= (
            {key: found["divergence"].get(key) for key in DIVERGENCE if number(found["divergence"].get(key))}
            if found.get("divergence")
            else {}
        )
        row |= flat(read_object(place / "model.manifest.json").get("metrics") or {}, "train_")
        row = {
            ("train_" + key.removeprefix("train_train_") if key.startswith("train_train_") else key): value
            for key, value in row.items()
        }
        row |= {"seconds": found.get("seconds")} | {
            f"{stage}_seconds": value for stage, value in seconds.get(found["iterate"], {}).items()
        }
        made.append(row)
    keys = dict.fromkeys(key for row in made for key in row)
    return [{key: row.get(key) for key in keys} for row in made]


def save(folder, made):
    """Write `rows` as metrics.json and metrics.csv, each under a temporary name; what would be the same is
    left as it is.
    """
    folder, text = Path(folder), io.StringIO()
    writer = csv.DictWriter(text, list(made[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(made)
    held = {"run": folder.resolve().name, "iterates": made}
    if read_object(folder / "metrics.json") != held:
        write_json(folder / "metrics.json", held)
    path = folder / "metrics.csv"
    if not path.is_file() or path.read_text(encoding="utf-8") != text.getvalue():
        temporary = path.with_name("metrics.csv.tmp")
        with manifest.writing(path):
            temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
        os.replace(temporary, path)


def to_wandb(folder, state, new, names):
    """One run of W&B, taken up again by its id."""
    import wandb

    trackers.name_project(["wandb"], names["project"])
    state.setdefault("id", secrets.token_hex(4))
    settings = wandb.Settings(init_timeout=60, console="off", silent=True)
    run = wandb.init(
        project=os.environ["WANDB_PROJECT"],
        id=state["id"],
        resume="allow",
        name=names["run_name"],
        dir=str(folder),
        config=settings_of(folder),
        settings=settings,
    )
    for row in new:
        run.log(scalars(row), step=row["iterate"])
    run.finish()


def to_tensorboard(folder, state, new, names):
    """Event files in RUN/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for row in new:
            for key, value in scalars(row).items():
                writer.add_scalar(key, value, row["iterate"])


def to_trackio(folder, state, new, names):
    """One run of trackio, taken up again by its name."""
    import trackio

    state.setdefault("name", f"{names['run_name']}-{int(time.time())}")
    trackio.init(
        project=trackers.name_project(["trackio"], names["project"]),
        name=state["name"],
        resume="allow",
        config=settings_of(folder),
    )
    for row in new:
        trackio.log(scalars(row), step=row["iterate"])
    trackio.finish()


def to_another(name, folder, state, new, names):
    """Any other tracker, by the callback of transformers; mlflow, comet_ml and swanlab take up the same
    run.
    """
    figures = trackers.Figures(name, folder, settings_of(folder), names["project"], names["run_name"], state)
    for row in new:
        figures.log(scalars(row), row["iterate"])
    figures.close()


def scalars(row):
    return {key: value for key, value in row.items() if key != "iterate" and number(value)}


def settings_of(folder):
    """The run's settings without passwords and tokens, for a tracker's page; nothing where they cannot be
    read.
    """
    import yaml

    try:
        found = yaml.safe_load((folder / "loop.yaml").read_text(encoding="utf-8"))
        return hidden(found) if isinstance(found, dict) else {}
    except (OSError, yaml.YAMLError):
        return {}


def log(folder, made, report_to):
    """Tell each tracker of `report_to` the rows that it was not told yet, and say so. One that fails is a
    note, never an error.

    What each was told stands in RUN/trackers.json, so that no row is logged twice.
    """
    folder, ours = Path(folder), {"wandb": to_wandb, "tensorboard": to_tensorboard, "trackio": to_trackio}
    path, settings = folder / "trackers.json", settings_of(folder)
    names = {
        "project": settings.get("project"),
        "run_name": settings.get("run_name") or folder.resolve().name,
    }
    states = read_object(path)
    for name in trackers.chosen(report_to):
        state = states.setdefault(name, {})
        told = state.setdefault("iterates", [])
        new = [row for row in made if row["iterate"] not in told]
        if new:
            try:
                ours.get(name, partial(to_another, name))(folder, state, new, names)
            except Exception as error:  # no network, no login, not installed
                print(
                    f"note: {name} was not told of this run: {type(error).__name__}: "
                    f"{' '.join(str(error).split())[:200]}",
                    flush=True,
                )
                continue
            state["iterates"] = [*told, *(row["iterate"] for row in new)]
            write_json(path, states)
        before = f", {count(len(told), 'iterate')} had been logged before" if told else ""
        print(f"{name}: logged {count(len(new), 'iterate')}{before}", flush=True)


def alike(made):
    """Lines: which iterates answer as the one before did, as the page warns of."""
    for before, row in zip(made, made[1:]):
        shares = [same for kind in metrics.KINDS if (same := row.get(f"{kind}_same")) is not None]
        if shares and min(shares) >= Bounds().same_answers:
            yield (
                f"warning: iterate {row['iterate']} answers as iterate {before['iterate']} did, "
                f"{min(shares):.0%} word for word: {NOTHING_LEARNED}"
            )


def main():
    args = cli.parse(Arguments, __doc__)
    trackers.check(args.report_to, known=trackers.FIGURES)
    made = rows(args.run)
    save(args.run, made)
    log(args.run, made, args.report_to or settings_of(Path(args.run)).get("report_to"))
    print(metrics.table(args.run, args.gold_function))
    for line in warnings(args.run) or alike(made):  # the page warns of the same
        print(line)


def warnings(folder):
    """Lines that say how many warnings the run's page has, which, and where it is; none where no page was
    made.
    """
    page = Path(folder) / "report" / "index.html"
    try:
        listed = json.loads(warnings_of(page).read_text(encoding="utf-8"))
        titles = Counter(entry["title"] for entry in listed)
    except (OSError, ValueError, KeyError, TypeError):  # no page, or one that somebody else has made
        return []
    if not listed:
        return [f"no warnings; the page: {page}"]
    told = [f"  {title} ({n} times)" if n > 1 else f"  {title}" for title, n in titles.items()]
    return [f"{count(len(listed), 'warning')}, with what to try on the page {page}:", *told]


if __name__ == "__main__":
    cli.run(main)
