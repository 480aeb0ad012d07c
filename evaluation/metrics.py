r"""Measure an iterate on held-out prompts, and compare iterates.

In:  rewarded held-out files: `responses`, `rewards`, `num_tokens`, `finish_reasons`
     (annotate_data/get_rewards.py).
Out: a JSON file of metrics for the sampled and the greedy answers, or the table of a run, or of several, in
     the terminal.

    python evaluation/metrics.py --sampled runs/tiny/iter1/heldout_sampled.rewarded.jsonl \
        --greedy runs/tiny/iter1/heldout_greedy.rewarded.jsonl --output_dir runs/tiny/iter1/metrics.json
    python evaluation/metrics.py --run runs/tiny
    python evaluation/metrics.py --runs runs/tiny runs/ppo_tiny

`--gold_function tiny/task.py:gold_score` adds a quality that a program computes and the reward model never
sees. `--judge_sampled` and `--judge_greedy` are the same answers, scored by a second reward model. Prompts
are the sample: a prompt's K answers are averaged first, and standard errors and intervals are over prompts.
The table's seconds of a policy are those of RUN/stages.jsonl: of its training, sampling, annotation and
measurement.
"""

import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, manifest, records
from common.cli import UserError, arg
from common.functions import as_number, load_function
from common.run_folder import KINDS, RunFolder, is_evaluated, read_object

JUDGED = {f"judge_{kind}": kind for kind in KINDS}
SAME_ANSWERS = 0.95  # share of an iterate's answers that are the previous one's: from here on, a warning
NOTHING_LEARNED = "training changes too little (its log says how many steps there were)"
NOT_EVALUATED = "not evaluated: heldout_prompts is null, so no held-out answers were sampled"


@dataclass
class Arguments:
    sampled: str | None = arg(None, help="rewarded held-out file with K sampled answers a prompt")
    greedy: str | None = arg(None, help="rewarded held-out file with one greedy answer a prompt")
    judge_sampled: str | None = arg(None, help="`sampled` as scored by a second reward model")
    judge_greedy: str | None = arg(None, help="`greedy` as scored by a second reward model")
    output_dir: str | None = arg(
        None, help="JSON file to write (a file name); without it the metrics are printed"
    )
    gold_function: str | None = arg(None, help="FILE.py:NAME, a function (messages, response) -> number")
    run: str | None = arg(None, help="a run's folder: print the table of iter0, iter1, … and stop")
    runs: list[str] | None = arg(
        None, help="folders of several runs, of DPO or PPO: print them in one table and stop"
    )


def load_gold(spec: str) -> Callable:
    """The function that `path.py:name` names, taking (messages, response); a UserError as `load_function`."""
    return load_function(spec, "--gold_function", "tiny/task.py:gold_score")


def gold_scores(record: dict, gold: Callable) -> list[float]:
    """Gold of each response of a record; a bad return value or a refusal names the record."""
    scores = []
    for response in record["responses"]:
        try:
            score = as_number(gold(record["prompt"], response))
        except Exception as error:
            raise UserError(
                f"the gold function fails on {record['id']}: {type(error).__name__}: {error}"
            ) from None
        if not math.isfinite(score):
            raise UserError(
                f"the gold function gives {score} for {record['id']}, a finite number was expected"
            )
        scores.append(score)
    return scores


def read_rewarded(path: str | Path) -> dict:
    """Records of a rewarded file by id, in file order.

    Raises:
        UserError: as `records.read_rewarded`, and where an id stands twice.
    """
    found = {}
    for number, record in enumerate(records.read_rewarded(path), 1):
        if found.setdefault(record["id"], record) is not record:
            raise UserError(
                f"{path} record {number} has the id {record['id']!r} of an earlier one; ids must be unique"
            )
    return found


def prompt_means(by_id: dict, gold: Callable | None = None) -> dict:
    """`{id: mean}` over a prompt's responses: of its rewards (prompts with none but null left out), or of
    gold.
    """
    means = {}
    for key, record in by_id.items():
        values = gold_scores(record, gold) if gold else [r for r in record["rewards"] if r is not None]
        if values:
            means[key] = statistics.fmean(values)
    return means


def same_answers(before: dict, after: dict) -> float | None:
    """Share of an iterate's answers that are word for word those of another, in the same place of the same
    prompt.

    Args:
        before, after: `{id: responses}`.

    Returns:
        a share of the answers to the prompts that both have; None without such prompts.
    """
    pairs = [
        pair
        for key, texts in after.items()
        if key in before
        for pair in zip(before[key], texts, strict=False)
    ]
    return sum(old == new for old, new in pairs) / len(pairs) if pairs else None


def mean_and_error(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean, and its standard error over prompts (None for fewer than two)."""
    values = list(values)
    if not values:
        return None, None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def measure(by_id: dict, gold: Callable | None = None) -> dict:
    """Metrics of one rewarded file; what the file does not tell is None.

    Returns:
        dict: `prompts`, `K`, `null_rewards`; `reward` and `reward_se`; `best_of_k` where K > 1 (mean over
            prompts of
        the largest reward); `length` (tokens of a response); `truncated` (fraction of responses that hit the
        limit); `empty` (fraction without text); `gold` and `gold_se` where a gold function is given.
    """
    rewards = [[r for r in record["rewards"] if r is not None] for record in by_id.values()]
    lengths = [n for record in by_id.values() for n in record.get("num_tokens") or [] if n is not None]
    reasons = [reason for record in by_id.values() for reason in record.get("finish_reasons") or []]
    K = max(len(record["responses"]) for record in by_id.values())
    found = {
        "prompts": len(by_id),
        "K": K,
        "null_rewards": sum(r is None for x in by_id.values() for r in x["rewards"]),
    }
    found["reward"], found["reward_se"] = mean_and_error(prompt_means(by_id).values())
    if K > 1:
        found["best_of_k"] = mean_and_error(max(r) for r in rewards if r)[0]
    found["length"] = statistics.fmean(lengths) if lengths else None
    found["truncated"] = sum(reason == "length" for reason in reasons) / len(reasons) if reasons else None
    texts = [text for record in by_id.values() for text in record["responses"]]
    found["empty"] = sum(map(records.is_empty, texts)) / len(texts)
    if gold:
        found["gold"], found["gold_se"] = mean_and_error(prompt_means(by_id, gold).values())
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in found.items()}


def paired_bootstrap(a: dict, b: dict, samples: int = 10000, seed: int = 0) -> tuple:
    """Mean difference b − a over the prompts that both have, with its 95% percentile bootstrap interval.

    Args:
        a, b: dicts id → value of a prompt; pairing by id takes the prompts' own difficulty out of the
            comparison.
        samples: number of resamples of the prompts, with replacement.

    Returns:
        (difference, low, high).

    Raises:
        UserError: no id in common.
    """
    import numpy as np

    common = [key for key in a if key in b]
    if not common:
        raise UserError("the two files have no prompt in common, so they cannot be compared in pairs")
    differences = np.array([b[key] - a[key] for key in common])
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    for start in range(0, samples, 256):  # slices, so that memory stays at 256 × prompts
        size = min(256, samples - start)
        picks = generator.integers(0, len(common), (size, len(common)))
        means[start : start + size] = differences[picks].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def _figure(metrics, kind, key, digits=3, sign="+"):
    """`+1.234 ±0.100` of a figure in metrics, with its standard error where that is known."""
    own = metrics.get(kind) or {}
    value, error = own.get(key), own.get(f"{key}_se")
    if not records.finite(value):
        return "–"
    return f"{value:{sign}.{digits}f}" + (f" ±{error:.{digits}f}" if records.finite(error) else "")


def _best_of(metrics):
    found = _figure(metrics, "sampled", "best_of_k")
    return found + (f" (K={metrics['sampled'].get('K', '?')})" if found != "–" else "")


def _silent(metrics):
    shares = [(metrics.get(kind) or {}).get("empty") for kind in KINDS]
    return "/".join(f"{share:.2f}" for share in shares if records.finite(share)) if any(shares) else "–"


TABLE = (  # heading, text of an iterate's metrics; how soon a narrow terminal goes without it, 0 for never
    ("run", lambda m: m.get("run", "–"), 0),
    ("iterate", lambda m: str(m["iterate"]), 0),
    ("reward", lambda m: _figure(m, "sampled", "reward"), 0),
    ("best of K", _best_of, 1),
    ("greedy reward", lambda m: _figure(m, "greedy", "reward"), 6),
    ("judge", lambda m: _figure(m.get("judge") or {}, "sampled", "reward"), 8),
    ("greedy judge", lambda m: _figure(m.get("judge") or {}, "greedy", "reward"), 2),
    ("gold", lambda m: _figure(m, "sampled", "gold", sign=""), 0),
    ("greedy gold", lambda m: _figure(m, "greedy", "gold", sign=""), 5),
    ("length", lambda m: _figure(m, "sampled", "length", 1, ""), 7),
    ("cut off", lambda m: _figure(m, "sampled", "truncated", 3, ""), 4),
    ("empty", _silent, 0),
    ("KL", lambda m: _figure(m, "divergence", "kl", 2, ""), 0),
    ("seconds", lambda m: f"{m['seconds']:.0f}" if records.finite(m.get("seconds")) else "–", 3),
)


def format_table(iterates: list[dict], width: int | None = None) -> str:
    """The terminal's table: a row for each of the list of metrics (as `main` writes them, maybe with `run`
    and `seconds`), columns aligned, without those that hold nothing.

    Where it would be wider than `width` characters, columns are left out, those first that are missed least.
    """
    rows = [{"iterate": i} | metrics for i, metrics in enumerate(iterates)]
    columns = {heading: [heading, *map(get, rows)] for heading, get, _ in TABLE}
    columns = {heading: cells for heading, cells in columns.items() if set(cells[1:]) - {"–"}}
    for _, heading in sorted((turn, heading) for heading, _, turn in TABLE if turn):
        if width and sum(max(map(len, cells)) + 2 for cells in columns.values()) - 2 > width:
            columns.pop(heading, None)
    kept = [[cell.rjust(max(map(len, cells))) for cell in cells] for cells in columns.values()]
    lines = ["  ".join(row) for row in zip(*kept, strict=True)] or [""]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def measured(metrics: dict) -> list:
    """(name of the kind, its figures) of all that metrics hold: sampled, greedy, judge_sampled,
    judge_greedy.
    """
    found = {kind: metrics.get(kind) for kind in KINDS} | {
        name: (metrics.get("judge") or {}).get(kind) for name, kind in JUDGED.items()
    }
    return [(name, values) for name, values in found.items() if values]


def settings_of(folder: str | Path) -> dict:
    """The settings in RUN/loop.yaml; {} where they are not there or cannot be read."""
    try:
        return cli.read_yaml(RunFolder(folder).settings)
    except UserError:
        return {}


def read_metrics(path: Path) -> dict:
    """What `main` has written into a metrics.json; a UserError names one that holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and measure again") from None
    parts = [found.get(key, {}) for key in (*KINDS, "judge", "files")] if isinstance(found, dict) else [None]
    if all(isinstance(part, dict) for part in parts):
        *_, judge, files = parts
        inner = [isinstance(own, dict) for own in judge.values()] + [
            isinstance(f, str) for f in files.values()
        ]
        if all(inner):
            return found
    raise UserError(f"{path} does not hold metrics; delete it and measure again")


def read_run(folder: str | Path) -> list[tuple[Path, dict]]:
    """`(folder of the iterate, its metrics)` of every iterate of a run that was measured, in order.

    With them stand `iterate`, its number; `divergence`, the estimates of evaluation/divergence.py where it
    has been; `seconds` of stages.jsonl. A run that is not evaluated has no metrics: its iterates are those
    that were trained.

    Raises:
        UserError: no such folder, or no metrics in it yet.
    """
    run = RunFolder(folder)
    found = {i: read_metrics(run.metrics(i)) for i in run.iterations() if run.metrics(i).is_file()}
    if not is_evaluated(settings_of(folder)):
        trained = [i for i in run.iterations() if read_object(run.model_manifest(i)).get("complete")]
        found = {i: found.get(i, {}) for i in sorted({*found, *trained})}
    elif not found:
        there = "" if run.path.is_dir() else ", there is no such folder"
        raise UserError(f"no iterN/metrics.json in {folder}{there}")
    seconds = run.seconds()
    for i, own in found.items():
        own["iterate"] = i
        if estimates := read_object(run.divergence_summary(i)):
            own["divergence"] = estimates
        if i in seconds:
            own["seconds"] = sum(seconds[i].values())
    return [(run.iteration(i), own) for i, own in found.items()]


def gains(iterates: list[tuple], gold_function: str | None = None) -> list[dict]:
    """Paired intervals between the first and the last of a run's iterates, from their held-out files.

    Args:
        iterates: of `read_run`.
        gold_function: FILE.py:NAME; None takes the one that the last metrics were made with.

    Returns:
        a dict for each kind of answers and quantity (reward; judge, the second reward model's reward; gold):
            `first`, `last` (iterates), `answers`, `quantity`, `difference`, `low`, `high`. Nothing for one
            iterate, nor for a file that is not there any more.
    """
    if len(iterates) < 2:
        return []
    ends, found = (iterates[0], iterates[-1]), []
    spec = gold_function or ends[1][1].get("gold_function")
    gold = load_gold(spec) if spec else None
    for kind in KINDS:
        for name in (kind, f"judge_{kind}"):
            paths = [place / (own.get("files") or {}).get(name, "-") for place, own in ends]
            if not all(path.is_file() for path in paths):
                continue
            both = [read_rewarded(path) for path in paths]
            scores = (
                {"judge": None} if name in JUDGED else {"reward": None} | ({"gold": gold} if gold else {})
            )
            for quantity, score in scores.items():
                interval = paired_bootstrap(*(prompt_means(one, score) for one in both))
                found.append(
                    {"first": ends[0][1]["iterate"], "last": ends[1][1]["iterate"], "answers": kind}
                    | {"quantity": quantity}
                    | dict(zip(("difference", "low", "high"), interval, strict=True))
                )
    return found


def below_table(iterates: list[tuple], gained: list[dict]) -> list[str]:
    """Lines under a run's table: its `gains`, or that nothing was measured."""
    if not any(measured(own) for _, own in iterates):
        return [NOT_EVALUATED]
    head = "iterate {last} − iterate {first}, same prompts, 95% bootstrap interval"
    line = "  {answers:7} {quantity:6} {difference:+.3f}  [{low:+.3f}, {high:+.3f}]"
    return [head.format(**gained[0]), *(line.format(**one) for one in gained)] if gained else []


def table(runs: list[tuple]) -> str:
    """Text: the iterates of one run, or of several in one table, and how each run's last differs from its
    own first.

    Args:
        runs: list of (name or None, of `read_run`, of `gains`).
    """
    rows = [({"run": name} if name else {}) | own for name, iterates, _ in runs for _, own in iterates]
    text = [format_table(rows)]
    for name, iterates, gained in runs:
        if lines := below_table(iterates, gained):
            text += ["", f"{name}: {lines[0]}" if name else lines[0], *lines[1:]]
    return "\n".join(text)


def table_of(folders: list[str], gold_function: str | None = None) -> str:
    """The `table` of runs by their folders. Of several each is called by its folder's name, or by the path as
    given where two names are alike.
    """
    names = [Path(folder).resolve().name for folder in folders]
    if len(folders) == 1:
        names = [None]
    elif len(set(names)) < len(names):
        names = folders
    runs = [(name, read_run(folder)) for name, folder in zip(names, folders, strict=True)]
    return table([(name, iterates, gains(iterates, gold_function)) for name, iterates in runs])


def main():
    args = cli.parse(Arguments, __doc__)
    if args.run and args.runs:
        raise UserError("give --run FOLDER or --runs FOLDER FOLDER …, not both")
    if args.run or args.runs:
        print(table_of(args.runs or [args.run], args.gold_function))
        return
    files = {name: getattr(args, name) for name in (*KINDS, *JUDGED) if getattr(args, name)}
    if not files:
        raise UserError(
            "nothing to measure: give --sampled and --greedy files, or --run FOLDER for the table of a run"
        )
    for path in files.values():
        cli.existing_file(path, "rewarded file")
    gold = load_gold(args.gold_function) if args.gold_function else None
    found = {
        name: measure(read_rewarded(path), None if name in JUDGED else gold) for name, path in files.items()
    }
    metrics = {kind: found[kind] for kind in KINDS if kind in found}
    judge = {kind: found[name] for name, kind in JUDGED.items() if name in found}
    metrics |= {"judge": judge} if judge else {}
    if args.output_dir is None:
        print(json.dumps(metrics, indent=1))
        return
    target = Path(args.output_dir)
    if target.is_dir():
        raise UserError(
            f"--output_dir {target} is a folder, a file name was expected (for example {target}/metrics.json)"
        )
    if target.resolve() in [Path(path).resolve() for path in files.values()]:
        raise UserError(f"{target} is to be read and written at once; give another --output_dir")
    target.parent.mkdir(parents=True, exist_ok=True)
    # relative to the metrics, so that a run's folder may move
    metrics["files"] = {kind: os.path.relpath(path, target.parent) for kind, path in files.items()}
    metrics["gold_function"] = args.gold_function
    manifest.write_json(target, metrics)
    counts = ", ".join(
        f"{values['prompts']} prompts × {values['K']} {name}" for name, values in measured(metrics)
    )
    print(f"read {counts}; wrote {target}")
    print(format_table([metrics]))


if __name__ == "__main__":
    cli.run(main)
