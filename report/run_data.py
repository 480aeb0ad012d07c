"""What a run has left on disk, read as a stream: figures become arrays, texts are kept of a seeded sample
only.

A run may be half finished or damaged: what is not there or cannot be read is named in `Run.missing`, never an
error, except where the folder is no run at all.
"""

import contextlib
import hashlib
import heapq
import math
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli
from common.cli import UserError, count
from common.hide import hidden
from common.jsonl import BadRecord, jsonl_records
from common.manifest import beside
from common.records import finite, is_empty, read_rewarded
from common.run_folder import KINDS, RunFolder, is_evaluated, is_ppo, kind_of, read_object
from dpo_iteration.rounds_log import read_log
from evaluation.metrics import load_gold
from report import clean
from report.state import iterations_of

KEEP_TEXTS = 500  # prompts of a file whose texts are held while it is read: n-grams are counted on them
PAIRS_KEPT = 64  # pairs marked in one prompt of the sample


@dataclass
class Answers:
    """One rewarded file: N prompts, R responses in all, flat arrays of R values in file order.

    Attributes:
        ids: N prompt ids; prompt n's responses are `offsets[n]:offsets[n + 1]`.
        rewards: float64, NaN where null. lengths: tokens, -1 unknown. cut: 1 hit the length limit, 0 not, -1
            unknown.
        gold: float64, NaN where the gold function gave nothing, or None without one.
        distinct: N shares of different texts among a prompt's responses. empty: responses without text.
        different, tied: pairs of responses of one prompt with different texts, and those of them with equal
            rewards.
        kept: records of the seeded sample, smallest hash first, with `gold` where there is one.
        wrong: what could not be read, in words; None where all could.
    """

    ids: list = field(default_factory=list)
    offsets: np.ndarray = None
    rewards: np.ndarray = None
    lengths: np.ndarray = None
    cut: np.ndarray = None
    gold: np.ndarray | None = None
    distinct: np.ndarray = None
    empty: int = 0
    different: int = 0
    tied: int = 0
    kept: list = field(default_factory=list)
    wrong: str | None = None

    @property
    def K(self) -> int:
        return int(np.diff(self.offsets).max()) if self.ids else 0

    @property
    def known_lengths(self) -> np.ndarray:
        return self.lengths[self.lengths >= 0]

    def by_prompt(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """`{id: array}` of the finite values of each prompt's responses; prompts without any are left out."""
        found = {}
        for n, key in enumerate(self.ids):
            own = values[self.offsets[n] : self.offsets[n + 1]]
            own = own[np.isfinite(own)]
            if len(own):
                found[key] = own
        return found

    def means(self, values: np.ndarray) -> dict[str, float]:
        """`{id: mean}` over each prompt's responses, of finite values."""
        return {key: float(own.mean()) for key, own in self.by_prompt(values).items()}


@dataclass
class Iterate:
    """Held-out answers of one policy: `answers` and `judged` by kind (sampled, greedy); what is not there is
    not in them.
    """

    number: int
    answers: dict = field(default_factory=dict)
    judged: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    divergence: dict = field(default_factory=dict)


@dataclass
class Training:
    """Training of one iteration: its rewarded responses, the pairs, the manifest, the trainer's log, PPO's
    log.
    """

    number: int
    answers: Answers | None = None
    pairs: dict = field(default_factory=dict)  # prompt id → list of marks, of the sample only
    margins: np.ndarray | None = None
    longer: float | None = None  # chosen less rejected, tokens, mean over pairs
    manifest: dict = field(default_factory=dict)
    history: list = field(default_factory=list)  # trainer_state.json's log_history
    ppo: list = field(default_factory=list)  # model.log.jsonl


@dataclass
class Run:
    folder: Path
    name: str
    settings: dict
    iterates: dict = field(default_factory=dict)
    trainings: dict = field(default_factory=dict)
    steps: list = field(default_factory=list)  # that have finished, stages.jsonl
    made: dict = field(default_factory=dict)  # (policy, step) → manifests of what the step made
    rounds: list = field(default_factory=list)  # of an online run, online/rounds.jsonl
    versions: dict = field(default_factory=dict)
    missing: list = field(default_factory=list)

    @property
    def kind(self) -> str:
        return "ppo" if is_ppo(self.settings) else "dpo"

    @property
    def iterations(self) -> int:
        return iterations_of(self.settings)

    @property
    def evaluated(self) -> bool:
        return is_evaluated(self.settings)


def sample_hash(key: str, seed: int = 0) -> int:
    """Order in which prompts enter the sample: the same for every file, whatever its order."""
    return int.from_bytes(
        hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogatepass")).digest()[:8], "big"
    )


class Sample:
    """The `size` records with the smallest hash of those it is shown; holds no more than that."""

    def __init__(self, size, seed=0):
        self.size, self.seed, self._heap = size, seed, []

    def add(self, key: str, record: dict):
        rank = sample_hash(key, self.seed)
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, (-rank, str(key), record))
        elif self._heap and -rank > self._heap[0][0]:
            heapq.heapreplace(self._heap, (-rank, str(key), record))

    def records(self) -> list[dict]:
        return [record for _, _, record in sorted(self._heap, key=lambda item: (-item[0], item[1]))]


def lines_of(path: Path) -> Iterator[dict]:
    """Yield the objects of a JSON Lines file up to where it is torn, as one is that is being written."""
    with contextlib.suppress(UserError):
        yield from (record for record in jsonl_records(path) if not isinstance(record, BadRecord))


def read_answers(path: Path, gold: Callable | None = None, seed: int = 0, keep: int = KEEP_TEXTS) -> Answers:
    """A rewarded file as `Answers`, one line in memory at a time.

    Args:
        path: the file.
        gold: function (messages, response) → number, or None; an answer that it cannot judge has NaN.
        seed, keep: the sample whose texts are kept.
    """
    rewards, lengths, cut, golds, offsets = array("d"), array("i"), array("b"), array("d"), array("q", [0])
    found, sample, distinct, seen, bad = Answers(), Sample(keep, seed), array("d"), set(), []
    try:
        for record in read_rewarded(path, keep_bad=True):
            if isinstance(record, BadRecord) or record["id"] in seen:
                bad.append(record)
                continue
            flat, texts, key = clean.as_flat(record), record["responses"], record["id"]
            for values, more in zip((rewards, lengths, cut), flat, strict=True):
                values.extend(more)
            offsets.append(len(rewards))
            seen.add(key)
            found.ids.append(key)
            if gold is not None:
                golds.extend(_gold_of(gold, record, text) for text in texts)
                record["gold"] = list(golds[offsets[-2] :])
            different, tied = ties(texts, flat[0])
            found.different, found.tied = found.different + different, found.tied + tied
            distinct.append(len(set(texts)) / len(texts))
            found.empty += sum(map(is_empty, texts))
            sample.add(key, record)
        if bad:
            found.wrong = f"{count(len(bad), 'line')} cannot be read, or repeat an id"
    except UserError as error:
        found.wrong = str(error)
    found.offsets, found.rewards = np.array(offsets), np.array(rewards)
    found.lengths, found.cut, found.distinct = np.array(lengths), np.array(cut), np.array(distinct)
    found.gold = np.array(golds) if gold is not None else None
    found.kept = sample.records()
    return found


def _gold_of(gold, record, text):
    try:
        value = float(gold(record["prompt"], text))
    except Exception:  # a function of the user's own, on data that it may not know
        return math.nan
    return value if math.isfinite(value) else math.nan


def ties(texts: list[str], rewards: list[float]) -> tuple[int, int]:
    """(pairs of different texts whose rewards are both finite, those of them with equal rewards) of one
    prompt.
    """

    def couples(values: Iterable) -> int:
        return sum(math.comb(n, 2) for n in Counter(values).values())

    known = [(text, reward) for text, reward in zip(texts, rewards) if not math.isnan(reward)]
    different = math.comb(len(known), 2) - couples(text for text, _ in known)
    return different, couples(reward for _, reward in known) - couples(known)


def read_pairs(path: Path, iteration: int, ids: set) -> tuple:
    """(marks of the prompts `ids`, margins, mean length of chosen less rejected) of a pairs file, one line at
    a time.
    """
    marks, margins, longer = {}, array("d"), array("d")
    for pair in lines_of(path):
        if finite(pair.get("margin")):
            margins.append(pair["margin"])
        sizes = pair.get("chosen_num_tokens"), pair.get("rejected_num_tokens")
        if all(isinstance(n, int) and finite(n) for n in sizes):
            longer.append(sizes[0] - sizes[1])
        source, key = str(pair.get("source") or ""), str(pair.get("id"))
        if source and Path(source).parent.name != f"iter{iteration}":
            continue  # with train_on: all others are in it too
        if key in ids and len(marks.get(key, [])) < PAIRS_KEPT:
            known = clean.finites(pair)
            names = ("chosen_index", "rejected_index", "margin")
            marks.setdefault(key, []).append({name: known.get(name) for name in names})
    return marks, np.array(margins), float(np.mean(longer)) if longer else None


def manifests_of(run: RunFolder, i: int, step: str) -> list[dict]:
    """The manifests of what a step of policy i has made, as far as they are there."""
    paths = [run.model(i + 1)]
    if step == "measure":
        paths = [*(run.heldout(i, kind, "judged") for kind in KINDS), run.divergence(i)]
    elif step != "train":
        what = {"sample": "generated", "annotate": "rewarded"}[step]
        paths = [*(run.heldout(i, kind, what) for kind in KINDS), getattr(run, what)(i + 1)]
    found = [clean.as_manifest(read_object(beside(path, ".manifest.json"))) for path in paths]
    return [one for one in found if one]


def read_run(
    folder: str | Path,
    gold_function: str | None = None,
    seed: int = 0,
    keep: int = KEEP_TEXTS,
    gold: bool = True,
) -> Run:
    """Everything of a run's folder that the report shows.

    Args:
        folder: the run's folder.
        gold_function: FILE.py:NAME; None takes the one in the run's metrics or settings.
        seed, keep: the sample whose texts are kept.
        gold: False leaves the gold function unused; its averages are then read from metrics.json.

    Raises:
        UserError: no such folder, or nothing of a run in it.
    """
    files = RunFolder(folder)
    folder = files.path
    if not folder.is_dir():
        raise UserError(f"no such run: {folder}" + _near(folder))
    begun = files.settings.is_file()
    if not begun and not files.iterations():
        lacks = f"neither {files.settings.name} nor iter0, iter1, …"
        raise UserError(f"{folder} holds {lacks}, so it is no run's folder" + _near(folder))
    run = Run(folder, folder.resolve().name, {}, steps=files.finished_steps())
    try:
        run.settings = hidden(cli.read_yaml(files.settings)) if begun else {}
    except UserError as error:
        run.missing.append(f"the settings: {error}")
    if not begun:
        run.missing.append(f"{files.settings.name}, the settings")
    if not run.steps:
        run.missing.append(f"{files.stages.name}: no step has finished, so no times")
    for i in files.iterations():
        _read_iterate(run, files, i, gold_function, seed, keep, gold)
        if i:
            _read_training(run, files, i, seed, keep)
    run.rounds = clean.as_log(read_log(files.rounds_log))
    for i, step in {(entry["policy"], entry["step"]) for entry in run.steps}:
        run.made[i, step] = manifests_of(files, i, step)
    for manifest in (one for made in run.made.values() for one in made):
        run.versions |= manifest["versions"]
    _name_missing(run)
    return run


def _near(folder):
    name = RunFolder(folder).settings.name
    places = [(folder, "*/"), (folder.parent, "*/"), (folder.parent, "runs/*/")]
    runs = sorted({path.parent for place, pattern in places for path in place.glob(pattern + name)})
    return "; there is " + ", ".join(map(str, runs[:5])) if runs else ""


def _told(run, path):
    """How a file is called on the page: its path within the run."""
    return os.path.relpath(path, run.folder)


def _object(run, path):
    """`read_object` of a file of the run; a damaged one is named."""
    return read_object(path, run.missing, _told(run, path))


def _read_named(run, path, gold, seed, keep):
    """`read_answers` of a file, or None where it is not there or holds none; what is wrong is named."""
    if not path.is_file():
        return None
    found = read_answers(path, gold, seed, keep)
    if found.wrong:
        run.missing.append(f"{_told(run, path)}: {found.wrong}")
    return found if found.ids else None


def _read_iterate(run, files, i, gold_function, seed, keep, gold):
    iterate = Iterate(i, metrics=clean.as_metrics(_object(run, files.metrics(i))))
    iterate.divergence = clean.finites(_object(run, files.divergence_summary(i)))
    spec = gold_function or iterate.metrics.get("gold_function") or run.settings.get("gold_function")
    function = _load_gold(spec, run.missing) if gold and spec and isinstance(spec, str) else None
    for kind in KINDS:
        usual = files.heldout(i, kind, "rewarded")
        path = usual.parent / iterate.metrics.get("files", {}).get(kind, usual.name)
        for target, file, score in (
            (iterate.answers, path, function),
            (iterate.judged, files.heldout(i, kind, "judged"), None),
        ):
            if answers := _read_named(run, file, score, seed, keep):
                target[kind] = answers
    if iterate.answers or iterate.metrics:
        run.iterates[i] = iterate


def _read_training(run, files, i, seed, keep):
    training = Training(i, manifest=clean.as_manifest(_object(run, files.model_manifest(i))))
    training.answers = _read_named(run, files.rewarded(i), None, seed, keep)
    if files.pairs(i).is_file():
        ids = {record["id"] for record in training.answers.kept} if training.answers else set()
        training.pairs, training.margins, training.longer = read_pairs(files.pairs(i), i, ids)
    training.history = clean.as_log(_object(run, files.trainer_state(i)).get("log_history"))
    if i > 1 and kind_of(run.settings) == "online":  # one training: what came before is the policy before's
        before = clean.as_log(_object(run, files.trainer_state(i - 1)).get("log_history"))
        last = max((entry["step"] for entry in before if finite(entry.get("step"))), default=0)
        own = [entry for entry in training.history if finite(entry.get("step")) and entry["step"] > last]
        training.history = [entry | {"step": entry["step"] - last} for entry in own]
    if files.ppo_log(i).is_file():
        training.ppo = clean.as_log(lines_of(files.ppo_log(i)))
    if training.answers or training.manifest or training.history or training.ppo:
        run.trainings[i] = training
    run.versions |= training.manifest.get("versions", {})


def _load_gold(spec, missing):
    try:
        return load_gold(spec)
    except UserError as error:
        note = f"the gold function: {error}; gold is what metrics.json says, without intervals of differences"
        if note not in missing:
            missing.append(note)
        return None


def _name_missing(run):
    """Say what a finished run would have and this one has not; what its settings leave out is not missing."""
    files, missing = RunFolder(run.folder), run.missing
    for i, training in run.trainings.items():
        if run.kind == "dpo" and not training.history:
            missing.append(f"the trainer's log of iteration {i} ({_told(run, files.trainer_state(i))})")
        if run.kind == "ppo" and not training.ppo:
            missing.append(f"PPO's log ({_told(run, files.ppo_log(i))})")
    if not run.evaluated:
        return
    last, end = max(run.iterates, default=0), run.iterations
    if run.settings and end - last > 1:  # a run that has just begun is not a list of hundreds
        missing.append(f"iterates {last + 1} to {end} have not been evaluated")
    wanted = range(last + 2 if end == last + 1 else last + 1) if run.settings else run.iterates
    for i in wanted:
        absent = [kind for kind in KINDS if i in run.iterates and kind not in run.iterates[i].answers]
        if i not in run.iterates:
            missing.append(f"iterate {i} has not been evaluated")
        elif absent:
            answers = f"the {' and '.join(absent)} held-out answers of iterate {i}"
            missing.append(f"{answers}, so no intervals from them")
    iterates = list(run.iterates.values())
    if not iterates:
        return
    if not any(it.divergence for it in iterates) and not any(t.ppo for t in run.trainings.values()):
        missing.append("KL to the reference (iterN/divergence.json)")
    if not any(it.judged for it in iterates):
        missing.append("a second judge (eval_reward_model)")
    if not any(has_gold(it, kind) for it in iterates for kind in KINDS):
        missing.append("gold score (gold_function)")


def has_gold(iterate: Iterate, kind: str) -> bool:
    """Whether gold of an iterate's answers is known, by the function or by metrics.json."""
    answers = iterate.answers.get(kind)
    return "gold" in iterate.metrics.get(kind, {}) or answers is not None and answers.gold is not None
