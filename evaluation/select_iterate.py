"""Choose the iterate of a run to keep, by rule: the last one is not always the best.

    python evaluation/select_iterate.py --run runs/mine
    python evaluation/select_iterate.py --run runs/mine --by judge --max_kl 20

In:  a run's folder with measured iterates; the rule is the run's own `select`, or given here, which holds
     until the run's figures are made again.
Out: RUN/best.json, which iterate was chosen and why, and RUN/best, a link to its model: a folder that every
     script takes for --model_name_or_path.

The measure is of the sampled held-out answers. Chosen is the iterate with the largest, the start among them;
a later one takes the place of an earlier only by more than `min_gain`. Left out are iterates that lack the
measure, those whose weights are gone and, with `max_kl`, those that are farther from the start, or whose
distance is not known. The interval is of the chosen iterate against the last one, on the same prompts.
"""

import dataclasses
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.cli import UserError, arg
from common.manifest import write_json
from common.records import finite
from common.run_folder import RunFolder, read_object, start_of
from evaluation import metrics

# What an iterate may be chosen by, best first: what is nearest to what one wants, and farthest from what
# training itself pushes up.
MEASURES = {
    "gold": "the gold function's mean",
    "judge": "mean reward by eval_reward_model, which training does not see",
    "length_controlled": "win rate against the start by reward, at equal lengths",
    "reward": "mean reward by the reward models of training",
}

# Where a measure's key does not say what it is.
NAMES = {"length_controlled": "win rate over the start at equal length"}

# Why an iterate may lack a measure that others have.
UNKNOWN = {"length_controlled": "nearly all its answers are longer, or shorter, than the start's"}


@dataclasses.dataclass(kw_only=True)
class Selection:
    """The rule; a run's setting `select`."""

    by: str | None = arg(
        None,
        "measure of the held-out answers: "
        + "; ".join(f"{name}, {what}" for name, what in MEASURES.items())
        + ". None: the first of them that the run has",
        [*MEASURES],
    )
    max_kl: float | None = arg(
        None, "leave out iterates farther from the start, in nats a response (divergence.json)"
    )
    min_gain: float = arg(
        0.0, "a later iterate must be better by more than this, in units of the measure, to be chosen"
    )

    def __post_init__(self):
        if self.max_kl is not None and not self.max_kl >= 0:
            raise UserError(f"max_kl {self.max_kl:g}: nats were expected, 0 or more")
        if self.min_gain is not None and not math.isfinite(self.min_gain):
            raise UserError(f"min_gain {self.min_gain:g}: a number was expected")


@dataclasses.dataclass(kw_only=True)
class Arguments(Selection):
    run: str = arg(help="a run's folder")
    min_gain: float | None = arg(None, "as of `select`; None: the run's own")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        iterate: number of the policy. by: one of MEASURES. scores: {iterate: value} of all that have one.
        left_out: {iterate: reason}. last: the last iterate. interval: (difference, low, high) of the chosen
            one minus the last, None where they are one or nothing can be compared.
        worse: whether the last one is worse beyond chance, or was left out though it has the measure.
    """

    iterate: int
    by: str
    scores: dict[int, float]
    left_out: dict[int, str]
    last: int
    interval: tuple[float, float, float] | None

    @property
    def worse(self) -> bool:
        if self.last in self.left_out:
            return self.last in self.scores
        return bool(self.interval and self.interval[1] > 0)

    def sentence(self) -> str:
        """The choice in words, a line."""
        shown = "{:.1%}".format if self.by == "length_controlled" else "{:+.3f}".format
        told = f"best: iterate {self.iterate}, by {NAMES.get(self.by, self.by)} "
        told += shown(self.scores[self.iterate])
        if self.last in self.left_out:
            return f"{told}; the last one, iterate {self.last}, was left out: {self.left_out[self.last]}"
        if self.iterate == self.last:
            return f"{told}, the last one"
        if self.interval is None:
            return f"{told}; iterate {self.last}, the last one, has {shown(self.scores[self.last])}"
        difference, low, high = self.interval
        return (
            f"{told}; against the last one, iterate {self.last}: {difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        )


def choose(iterates: list[dict], rule: Selection, gone: dict[int, str] | None = None) -> Choice | None:
    """The iterate to keep.

    Args:
        iterates: in order, each with `iterate`, `kl` (None where it is not known; the start's is 0) and, of
            each measure that it has, {id: value} of the prompts under its name of MEASURES; of
            length_controlled the rate itself.
        gone: {iterate: why it cannot be chosen}.

    Returns:
        None where no iterate has the measure.

    Raises:
        UserError: the rule's measure is not known of any iterate.
    """
    known = [name for name in MEASURES if sum(one.get(name) is not None for one in iterates) > 0]
    if rule.by is not None and rule.by not in known:
        has = f"it has {', '.join(known)}" if known else "nothing of it was measured"
        raise UserError(f"the run cannot be chosen from by {rule.by}: {has}")
    if not known:
        return None
    by, left_out = rule.by or known[0], dict(gone or {})
    scores = {one["iterate"]: score(one[by]) for one in iterates if one.get(by) is not None}
    for one in iterates:
        kl = one["kl"] if one["iterate"] else 0.0
        if rule.max_kl is not None and (kl is None or kl > rule.max_kl):
            how = "is not known" if kl is None else f"{kl:.2f} is above {rule.max_kl:g}"
            left_out.setdefault(one["iterate"], f"its KL to the start {how}")
    for i in (one["iterate"] for one in iterates if one["iterate"] not in scores):
        left_out.setdefault(i, UNKNOWN.get(by, f"it was not measured by {by}"))
    best = None
    for i, value in scores.items():
        if i not in left_out and (best is None or value - scores[best] > rule.min_gain):
            best = i
    if best is None:
        reasons = "; ".join(f"iterate {i}: {why}" for i, why in left_out.items())
        raise UserError(f"no iterate is left to choose from: {reasons}")
    last = iterates[-1]["iterate"]
    ends = [one.get(by) for one in iterates if one["iterate"] in (best, last)]
    both = len(ends) == 2 and all(isinstance(values, dict) for values in ends)
    interval = (
        metrics.paired_bootstrap(ends[1], ends[0]) if both and len({*ends[0]} & {*ends[1]}) > 1 else None
    )
    return Choice(best, by, scores, left_out, last, interval)


def score(values: dict | float) -> float:
    """Mean over the prompts, or the rate itself."""
    return math.fsum(values.values()) / len(values) if isinstance(values, dict) else values


def measured(folder: str | Path, gold_function: str | None = None) -> list[dict]:
    """What `choose` wants of a run's iterates, from their held-out files.

    Args:
        gold_function: FILE.py:NAME; None takes the one that the metrics were made with.

    Raises:
        UserError: as `metrics.read_run`, and where a file is damaged.
    """
    from evaluation import measures  # numpy; settings are read without it

    found, start = [], None
    for place, held in metrics.read_run(folder):
        spec = gold_function or held.get("gold_function")
        gold = metrics.load_gold(spec) if spec else None
        kl = (held.get("divergence") or {}).get("kl")
        row = {"iterate": held["iterate"], "kl": kl if finite(kl) else None}
        files = {name: place / path for name, path in (held.get("files") or {}).items()}
        if (path := files.get("sampled")) and path.is_file():
            answers = metrics.read_rewarded(path)
            row["reward"] = metrics.prompt_means(answers) or None
            row["gold"] = metrics.prompt_means(answers, gold) if gold else None
            start = start if held["iterate"] else aligned(answers)
            if start and held["iterate"]:
                rate = measures.length_controlled_win_rate(*pairs(start, aligned(answers)))
                row["length_controlled"] = rate and rate[0]
            elif start:
                row["length_controlled"] = 0.5
        if (path := files.get("judge_sampled")) and path.is_file():
            row["judge"] = metrics.prompt_means(metrics.read_rewarded(path)) or None
        found.append(row)
    return found


def aligned(answers: dict) -> tuple[dict, dict]:
    """({id: rewards}, {id: lengths}) of the responses that have both, as arrays."""
    import numpy

    rewards, lengths = {}, {}
    for key, record in answers.items():
        both = zip(record["rewards"], record.get("num_tokens") or [], strict=False)
        if known := [(reward, size) for reward, size in both if None not in (reward, size)]:
            rewards[key], lengths[key] = map(numpy.array, zip(*known, strict=True))
    return rewards, lengths


def pairs(before: tuple[dict, dict], after: tuple[dict, dict]) -> tuple[dict, dict, dict, dict]:
    """The arguments of `measures.length_controlled_win_rate`."""
    return before[0], after[0], before[1], after[1]


def select(
    folder: str | Path, rule: Selection, gold_function: str | None = None, made_of: str | None = None
) -> Choice | None:
    """Choose, and write RUN/best.json and RUN/best; None, and neither, where nothing was measured.

    Args:
        made_of: what the choice rests on, for `current`.
    """
    run = RunFolder(folder)
    models = {i: run.model(i) for i in run.iterations() if i}
    models[0] = Path(start_of(metrics.settings_of(folder)) or "-")
    iterates = measured(folder, gold_function)
    gone = {i: "its weights were removed" for i in models if run.pruned(i).exists()}
    choice = choose(iterates, rule, gone)
    if choice is None:
        return None
    model = models[choice.iterate]
    link(run.best, model)
    held = dataclasses.asdict(choice) | {"worse": choice.worse, "sentence": choice.sentence()}
    held |= {"rule": dataclasses.asdict(rule), "model": str(model), "made_of": made_of}
    write_json(run.choice, held)
    return choice


def current(folder: str | Path, made_of: str, gold_function: str | None = None) -> dict:
    """What RUN/best.json holds, chosen anew by the run's own rule where anything has changed; {} where
    nothing was measured.

    Args:
        made_of: a hash of all that the run's figures are made of.

    Raises:
        UserError: the rule cannot be followed.
    """
    rule = rule_of(folder)
    mark = f"{made_of} {dataclasses.astuple(rule)}"
    held = read_object(RunFolder(folder).choice)
    if held.get("made_of") != mark:
        select(folder, rule, gold_function, mark)
        held = read_object(RunFolder(folder).choice)
    return held if held.get("made_of") == mark else {}


def rule_of(folder: str | Path, given: dict | None = None) -> Selection:
    """A run's setting `select`, with what is given in place of its own.

    Raises:
        UserError: loop.yaml cannot be read, or its rule is none.
    """
    settings = RunFolder(folder).settings
    own = (cli.read_yaml(settings).get("select") if settings.is_file() else None) or {}
    if not isinstance(own, dict):
        raise UserError(f"select in {settings} is {own!r}: a mapping was expected, such as {{by: judge}}")
    return cli.build(Selection, own | (given or {}), "select")


def link(path: Path, model: Path):
    """Let `path` be a link to a model's folder, relative where that is in the run's own; none where the model
    is no folder (one on the hub) or the file system has no links.
    """
    inside = path.parent.resolve() in model.resolve().parents
    target = os.path.relpath(model.resolve(), path.parent.resolve()) if inside else model.resolve()
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    if not model.is_dir():
        if path.is_symlink():
            path.unlink()
        return
    try:
        new.symlink_to(target)
        new.replace(path)  # a script that opens it meanwhile finds the one or the other
    except OSError as error:
        new.unlink(missing_ok=True)
        print(f"note: no link {path} could be made ({error.strerror}); the model: {model}", flush=True)


def main():
    args = cli.parse(Arguments, __doc__)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Selection)}
    given = {key: value for key, value in given.items() if value is not None}
    choice = select(args.run, rule_of(args.run, given))
    if choice is None:
        raise UserError(f"nothing of {args.run} was measured that an iterate could be chosen by")
    for i, why in choice.left_out.items():
        print(f"left out: iterate {i}: {why}")
    print(choice.sentence())
    print(f"wrote {RunFolder(args.run).choice}")


if __name__ == "__main__":
    cli.run(main)
