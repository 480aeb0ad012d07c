"""All figures of a run, one row an iterate: `metrics.json` and `metrics.csv` in the run's folder, and W&B, TensorBoard or trackio.

    python report/run_metrics.py --run runs/tiny
    python report/run_metrics.py --run runs/tiny --report_to tensorboard

In:  a run's folder, as run_loop.sh and run_ppo.sh leave it, finished or not.
Out: `metrics.json` and `metrics.csv` there, what the trackers were told in `trackers.json`, and the run's table in the terminal.

A row's names are flat: `iterate`; what metrics.json of the iterate has of the answers, as `sampled_reward`, `greedy_gold`,
`judge_sampled_reward`, …; `…_win_rate` against the start (below), with its standard error; `…_same`, the share of the answers
that are word for word the previous iterate's; `kl`, `kl_se`, `kl_per_token`, `k3`,
`k3_se` of divergence.json; `train_…` of the training's manifest; `seconds`, and `generate_seconds`, `annotate_seconds`,
`train_seconds`, `evaluate_seconds` of stages.jsonl. What is not known is null, and an empty cell.

A win rate is the share of comparisons that the iterate's answer wins against the start's to the same prompt, ties half: all K × K
pairs of sampled answers, the one pair of greedy ones; averaged over prompts. By the reward model; with `judge_` by the second one.

A tracker gets one run for the whole loop, with iterations as steps: RUN/trackers.json remembers which, and what it was told.
"""

import csv
import io
import json
import os
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, manifest
from common.cli import UserError, arg
from common.manifest import write_json
from common.records import finite
from report import metrics
from report.hide import hidden
from report.metrics import read_object
from report.troubles import NOTHING_LEARNED, Bounds

TRACKERS = ("wandb", "tensorboard", "trackio")
PROJECT = "online-rlhf"  # WANDB_PROJECT, TRACKIO_PROJECT stand in place of it
DIVERGENCE = ("kl", "kl_se", "kl_per_token", "k3", "k3_se", "k3_per_token")


@dataclass
class Arguments:
    run: str = arg(help="a run's folder")
    report_to: list[str] | None = arg(None, help=f"trackers to log the rows to, out of {', '.join(TRACKERS)}")
    gold_function: str | None = arg(None, help="FILE.py:NAME for the intervals under the table; None: the run's own")


def number(value):
    return finite(value)


def flat(values, prefix):
    """{prefix + key: number} of a dict's numbers; `rewards/margins` becomes `rewards_margins`."""
    return {prefix + key.replace("/", "_"): value for key, value in values.items() if number(value) or value is None} if isinstance(values, dict) else {}


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

    from report.measures import wins

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
            if kind in metrics.KINDS and (same := metrics.same_answers(texts.get(kind, {}), answers)) is not None:
                row[f"{kind}_same"] = round(same, 6)
            texts[kind] = answers
            rewards = {key: numpy.array(some) for key, values in held.items() if (some := [value for value in values if value is not None])}
            if found["iterate"] == 0:
                start[kind] = rewards
            elif won := wins(start.get(kind, {}), rewards):
                mean, error = metrics.mean_and_error(won.values())
                row |= {f"{kind}_win_rate": round(mean, 6), f"{kind}_win_rate_se": None if error is None else round(error, 6)}
        row |= {key: found["divergence"].get(key) for key in DIVERGENCE if number(found["divergence"].get(key))} if found.get("divergence") else {}
        row |= flat(read_object(place / "model.manifest.json").get("metrics") or {}, "train_")
        row = {("train_" + key.removeprefix("train_train_") if key.startswith("train_train_") else key): value for key, value in row.items()}
        row |= {"seconds": found.get("seconds")} | {f"{stage}_seconds": value for stage, value in seconds.get(found["iterate"], {}).items()}
        made.append(row)
    keys = dict.fromkeys(key for row in made for key in row)
    return [{key: row.get(key) for key in keys} for row in made]


def save(folder, made):
    """Write `rows` as metrics.json and metrics.csv, each under a temporary name; what would be the same is left as it is."""
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


def to_wandb(folder, state, new):
    """One run of W&B, taken up again by its id."""
    import wandb

    state.setdefault("id", secrets.token_hex(4))
    settings = wandb.Settings(init_timeout=60, console="off", silent=True)
    run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), id=state["id"], resume="allow", name=folder.resolve().name,
                     dir=str(folder), config=settings_of(folder), settings=settings)  # fmt: skip
    for row in new:
        run.log(scalars(row), step=row["iterate"])
    run.finish()


def to_tensorboard(folder, state, new):
    """Event files in RUN/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for row in new:
            for key, value in scalars(row).items():
                writer.add_scalar(key, value, row["iterate"])


def to_trackio(folder, state, new):
    """One run of trackio, taken up again by its name."""
    import trackio

    state.setdefault("name", f"{folder.resolve().name}-{int(time.time())}")
    trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=state["name"], resume="allow", config=settings_of(folder))
    for row in new:
        trackio.log(scalars(row), step=row["iterate"])
    trackio.finish()


def scalars(row):
    return {key: value for key, value in row.items() if key != "iterate" and number(value)}


def settings_of(folder):
    """The run's settings without passwords and tokens, for a tracker's page; nothing where they cannot be read."""
    import yaml

    try:
        return hidden(yaml.safe_load((folder / "loop.yaml").read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError):
        return {}


def log(folder, made, report_to):
    """Tell each tracker of `report_to` the rows that it was not told yet. One that fails is a note, never an error."""
    folder = Path(folder)
    path = folder / "trackers.json"
    states = read_object(path)
    for name in report_to:
        state = states.setdefault(name, {})
        told = state.setdefault("iterates", [])
        new = [row for row in made if row["iterate"] not in told]
        if not new:
            continue
        try:
            {"wandb": to_wandb, "tensorboard": to_tensorboard, "trackio": to_trackio}[name](folder, state, new)
        except Exception as error:  # no network, no login, not installed
            print(f"note: {name} was not told of this run: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
            continue
        state["iterates"] = [*told, *(row["iterate"] for row in new)]
        write_json(path, states)


def alike(made):
    """Lines: which iterates answer as the one before did, as the page warns of."""
    for before, row in zip(made, made[1:]):
        shares = [same for kind in metrics.KINDS if (same := row.get(f"{kind}_same")) is not None]
        if shares and max(shares) >= Bounds().same_answers:
            yield f"warning: iterate {row['iterate']} answers as iterate {before['iterate']} did, {max(shares):.0%} word for word: {NOTHING_LEARNED}"


def main():
    args = cli.parse(Arguments, __doc__)
    for name in args.report_to or ():
        if name not in TRACKERS:
            raise UserError(f"--report_to {name}: one of {', '.join(TRACKERS)} was expected")
    made = rows(args.run)
    save(args.run, made)
    log(args.run, made, args.report_to or ())
    print(metrics.table(args.run, args.gold_function))
    for line in alike(made):
        print(line)


if __name__ == "__main__":
    cli.run(main)
