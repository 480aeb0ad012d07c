"""What a run has left on disk, read as a stream: figures become arrays, texts are kept of a seeded sample
only.

A run may be half finished or damaged: what is not there or cannot be read is named in `Run.missing`, never an
error, except where the folder is no run at all.
"""

import hashlib
import heapq
import json
import math
import sys
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import cli
from common.cli import UserError
from common.records import finite, record_id
from evaluation.metrics import KINDS, load_gold, read_object
from report.hide import hidden
from report.state import finished_stages, iterations_of, written_at

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
        distinct: N shares of different texts among a prompt's responses.
        different, tied: pairs of responses of one prompt with different texts, and those of them with equal
            rewards.
        kept: records of the seeded sample, smallest hash first, with `gold` where there is one.
        damaged: lines that could not be read.
    """

    ids: list = field(default_factory=list)
    offsets: np.ndarray = None
    rewards: np.ndarray = None
    lengths: np.ndarray = None
    cut: np.ndarray = None
    gold: np.ndarray | None = None
    distinct: np.ndarray = None
    different: int = 0
    tied: int = 0
    kept: list = field(default_factory=list)
    damaged: int = 0

    @property
    def K(self):
        return int(np.diff(self.offsets).max()) if self.ids else 0

    def by_prompt(self, values):
        """`{id: array}` of the finite values of each prompt's responses; prompts without any are left out."""
        found = {}
        for n, key in enumerate(self.ids):
            own = values[self.offsets[n] : self.offsets[n + 1]]
            own = own[np.isfinite(own)]
            if len(own):
                found[key] = own
        return found

    def means(self, values):
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
    manifests: dict = field(default_factory=dict)  # of generated and rewarded files
    history: list = field(default_factory=list)  # trainer_state.json's log_history
    ppo: list = field(default_factory=list)  # model.log.jsonl


@dataclass
class Run:
    folder: Path
    name: str
    settings: dict
    iterates: dict = field(default_factory=dict)
    trainings: dict = field(default_factory=dict)
    stages: list = field(default_factory=list)
    work: dict = field(
        default_factory=dict
    )  # (iteration, stage) → seconds in which responses, rewards or steps were made
    versions: dict = field(default_factory=dict)
    missing: list = field(default_factory=list)

    @property
    def kind(self):
        return "ppo" if "ppo" in self.settings or "backend" in self.settings else "dpo"

    @property
    def iterations(self):
        return 1 if self.kind == "ppo" else iterations_of(self.settings)


def sample_hash(key, seed=0):
    """Order in which prompts enter the sample: the same for every file, whatever its order."""
    return int.from_bytes(
        hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogatepass")).digest()[:8], "big"
    )


class Sample:
    """The `size` records with the smallest hash of those it is shown; holds no more than that."""

    def __init__(self, size, seed=0):
        self.size, self.seed, self._heap = size, seed, []

    def add(self, key, record):
        rank = sample_hash(key, self.seed)
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, (-rank, str(key), record))
        elif self._heap and -rank > self._heap[0][0]:
            heapq.heapreplace(self._heap, (-rank, str(key), record))

    def records(self):
        return [record for _, _, record in sorted(self._heap, key=lambda item: (-item[0], item[1]))]


def lines_of(path):
    """Yield each JSON object of a JSON Lines file, or None for a line that is none (torn, not UTF-8)."""
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                yield value if isinstance(value, dict) else None


def is_rewarded(record):
    """Whether a record has what the report reads: a prompt, K texts, K rewards, and lists of K where there
    are others.
    """
    responses, rewards = (record or {}).get("responses"), (record or {}).get("rewards")
    if (
        not isinstance(responses, list)
        or not isinstance(rewards, list)
        or not responses
        or len(responses) != len(rewards)
    ):
        return False
    if not all(isinstance(text, str) for text in responses) or not all(
        reward is None or isinstance(reward, (int, float)) for reward in rewards
    ):
        return False
    if not all(isinstance(record.get(name) or [], list) for name in ("num_tokens", "finish_reasons")):
        return False
    prompt = record.get("prompt")
    return isinstance(prompt, str) or isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)


def read_answers(path, gold=None, seed=0, keep=KEEP_TEXTS):
    """A rewarded file as `Answers`, one line in memory at a time.

    Args:
        path: the file.
        gold: function (messages, response) → number, or None; an answer that it cannot judge has NaN.
        seed, keep: the sample whose texts are kept.
    """
    rewards, lengths, cut, golds, offsets = array("d"), array("i"), array("b"), array("d"), array("q", [0])
    found, sample = Answers(), Sample(keep, seed)
    distinct, seen = array("d"), Counter()
    for record in lines_of(path):
        if not is_rewarded(record):
            found.damaged += 1
            continue
        texts, own = record["responses"], [float(r) if finite(r) else math.nan for r in record["rewards"]]
        key = record.get("id")
        if key is None:
            try:
                key = record_id(record["prompt"])
            except UnicodeEncodeError:  # half a surrogate pair
                key = f"{sample_hash(json.dumps(record['prompt'])):016x}"
        key = str(key)
        seen[key] += 1
        if seen[key] > 1:
            key = f"{key}#{seen[key]}"
        tokens, reasons = record.get("num_tokens") or [], record.get("finish_reasons") or []
        found.ids.append(key)
        rewards.extend(own)
        lengths.extend(
            n if isinstance(n, int) and 0 <= n < 2**31 else -1
            for n in (tokens + [-1] * len(texts))[: len(texts)]
        )
        cut.extend(
            -1 if r is None else int(r == "length") for r in (reasons + [None] * len(texts))[: len(texts)]
        )
        offsets.append(len(rewards))
        if gold is not None:
            golds.extend(_gold_of(gold, record, text) for text in texts)
        different, tied = ties(texts, own)
        found.different += different
        found.tied += tied
        distinct.append(len(set(texts)) / len(texts))
        sample.add(
            key, record | {"id": key} | ({"gold": list(golds[offsets[-2] :])} if gold is not None else {})
        )
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


def ties(texts, rewards):
    """(pairs of different texts whose rewards are both finite, those of them with equal rewards) of one
    prompt.
    """

    def couples(counts):
        return sum(n * (n - 1) // 2 for n in counts.values())

    known = [(text, reward) for text, reward in zip(texts, rewards) if not math.isnan(reward)]
    different = len(known) * (len(known) - 1) // 2 - couples(Counter(text for text, _ in known))
    tied = couples(Counter(reward for _, reward in known)) - couples(Counter(known))
    return different, tied


def numbers(value):
    """The entries of a mapping that are numbers, NaN among them, which a log is to tell; {} for what is no
    mapping.
    """
    return (
        {key: one for key, one in value.items() if finite(one) or isinstance(one, float)}
        if isinstance(value, dict)
        else {}
    )


def finites(value):
    """The entries of a mapping that are finite numbers; {} for what is no mapping."""
    return {key: one for key, one in value.items() if finite(one)} if isinstance(value, dict) else {}


def texts(value):
    """The entries of a mapping that are texts; {} for what is no mapping."""
    return {key: one for key, one in value.items() if isinstance(one, str)} if isinstance(value, dict) else {}


def as_metrics(found):
    """What the report reads of an iterate's metrics.json; what is of another type than it should be is not
    there.
    """
    judge = found.get("judge") if isinstance(found.get("judge"), dict) else {}
    kept = {kind: own for kind in KINDS if (own := finites(found.get(kind)))} | {
        "judge": {kind: finites(own) for kind, own in judge.items()}
    }
    kept |= (
        {"files": texts(found.get("files"))}
        | texts({"gold_function": found.get("gold_function")})
        | finites({"seconds": found.get("seconds")})
    )
    return kept if found else {}


def as_manifest(found):
    """The same of a stage's manifest."""
    counts, versions = found.get("counts"), found.get("versions")
    kept = {
        "metrics": finites(found.get("metrics")),
        "counts": finites(counts) | texts(counts),
        "merged": finites(found.get("merged")),
    }
    kept["counts"] = {
        key: one for key, one in kept["counts"].items() if (key == "device") == isinstance(one, str)
    }
    kept["versions"] = (
        {str(name): str(version) for name, version in versions.items()} if isinstance(versions, dict) else {}
    )
    return kept | finites({"num_processes": found.get("num_processes")}) if found else {}


def read_pairs(path, iteration, ids):
    """(marks of the prompts `ids`, margins, mean length of chosen less rejected) of a pairs file, one line at
    a time.
    """
    marks, margins, longer = {}, array("d"), array("d")
    for pair in lines_of(path):
        if pair is None:
            continue
        if finite(pair.get("margin")):
            margins.append(pair["margin"])
        sizes = pair.get("chosen_num_tokens"), pair.get("rejected_num_tokens")
        if all(isinstance(n, int) and finite(n) for n in sizes):
            longer.append(sizes[0] - sizes[1])
        source = str(pair.get("source") or "")
        of_this = (
            not source or Path(source).parent.name == f"iter{iteration}"
        )  # with train_on: all others are in it too
        key = str(pair.get("id"))
        if of_this and key in ids and len(marks.get(key, [])) < PAIRS_KEPT:
            known = finites(pair)
            marks.setdefault(key, []).append(
                {name: known.get(name) for name in ("chosen_index", "rejected_index", "margin")}
            )
    return marks, np.array(margins), float(np.mean(longer)) if longer else None


def stage_work(run, iteration, stage):
    """Seconds of a stage in which responses, rewards or optimizer steps were made, by the manifests; None
    where they do not tell.
    """
    if stage == "train":
        training = run.trainings.get(iteration)
        if training is None:
            return None
        if training.ppo:
            return sum(entry["seconds"].get("all", 0) for entry in training.ppo) or None
        parts = [training.manifest.get("metrics", {}).get(key) for key in ("train_runtime", "eval_runtime")]
        return sum(p for p in parts if finite(p)) or None
    held, asked, more = f"iter{iteration}/heldout_", [], []
    if stage == "evaluate":
        asked = [f"{held}{kind}.{what}" for kind in KINDS for what in ("generated", "rewarded")]
        more = [f"{held}{kind}.judged" for kind in KINDS]
        # The next iteration's responses, unless a stage of their own made them.
        own = {(entry.get("iteration"), entry.get("stage")) for entry in run.stages}
        ahead = {"generated": "generate", "rewarded": "annotate"}
        more += [
            f"iter{iteration + 1}/{what}"
            for what, maker in ahead.items()
            if (iteration + 1, maker) not in own
        ]
    elif stage in ("generate", "annotate"):
        asked = [f"iter{iteration}/{'generated' if stage == 'generate' else 'rewarded'}"]
    seconds = {name: spent(run.folder / f"{name}.manifest.json") for name in (*asked, *more)}
    if not asked or None in [seconds[name] for name in asked]:
        return None
    return sum(value for value in seconds.values() if value is not None)


def spent(path):
    """Seconds that a manifest says were spent on sampling or scoring its file; None without one."""
    counts = as_manifest(read_object(path)).get("counts", {})
    return next((counts[key] for key in ("engine_seconds", "scoring_seconds") if key in counts), None)


def numbers_of(folder):
    """N of the folders iterN of a run, in order."""
    return sorted(
        int(path.name[4:]) for path in folder.glob("iter*") if path.is_dir() and path.name[4:].isdigit()
    )


def read_run(folder, gold_function=None, seed=0, keep=KEEP_TEXTS, gold=True):
    """Everything of a run's folder that the report shows.

    Args:
        folder: the run's folder.
        gold_function: FILE.py:NAME; None takes the one in the run's metrics or settings.
        seed, keep: the sample whose texts are kept.
        gold: False leaves the gold function unused; its averages are then read from metrics.json.

    Raises:
        UserError: no such folder, or nothing of a run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such run: {folder}" + _near(folder))
    if not (folder / "loop.yaml").is_file() and not numbers_of(folder):
        raise UserError(
            f"{folder} holds neither loop.yaml nor iter0, iter1, …, so it is no run's folder" + _near(folder)
        )
    run = Run(folder, folder.resolve().name, {})
    if (folder / "loop.yaml").is_file():
        try:
            run.settings = hidden(cli.read_yaml(folder / "loop.yaml"))
        except UserError as error:
            run.missing.append(f"the settings: {error}")
    else:
        run.missing.append("loop.yaml, the settings")
    run.stages = finished_stages(folder)
    if not run.stages:
        run.missing.append("stages.jsonl: no stage has finished, so no times")
    for i in numbers_of(folder):
        _read_iteration(run, i, gold_function, seed, keep, gold)
    for iteration, stage in {(s["iteration"], s["stage"]) for s in run.stages}:
        run.work[iteration, stage] = stage_work(run, iteration, stage)
    _name_missing(run)
    return run


def _near(folder):
    places = [(folder, "*/loop.yaml"), (folder.parent, "*/loop.yaml"), (folder.parent, "runs/*/loop.yaml")]
    runs = sorted({path.parent for place, pattern in places for path in place.glob(pattern)})
    return "; there is " + ", ".join(map(str, runs[:5])) if runs else ""


def _read_iteration(run, i, gold_function, seed, keep, gold):
    path = run.folder / f"iter{i}"
    iterate = Iterate(
        i, metrics=as_metrics(read_object(path / "metrics.json", run.missing, f"iter{i}/metrics.json"))
    )
    estimates = read_object(path / "divergence.json", run.missing, f"iter{i}/divergence.json")
    iterate.divergence = finites(estimates) | {
        key: one for key, one in texts(estimates).items() if key in ("estimator", "reference")
    }
    spec = gold_function or iterate.metrics.get("gold_function") or run.settings.get("gold_function")
    function = _load_gold(spec, run.missing) if gold and spec and isinstance(spec, str) else None
    for kind in KINDS:
        name = iterate.metrics.get("files", {}).get(kind, f"heldout_{kind}.rewarded.jsonl")
        for target, file, score in (
            (iterate.answers, name, function),
            (iterate.judged, f"heldout_{kind}.judged.jsonl", None),
        ):
            if (path / file).is_file():
                target[kind] = read_answers(path / file, score, seed, keep)
                if not target[kind].ids:
                    run.missing.append(f"iter{i}/{file} holds no answer that can be read")
                    del target[kind]
                elif target[kind].damaged:
                    run.missing.append(f"iter{i}/{file}: {target[kind].damaged} lines cannot be read")
    if iterate.answers or iterate.metrics:
        run.iterates[i] = iterate
    if i == 0:
        return
    training = Training(
        i,
        manifest=as_manifest(
            read_object(path / "model.manifest.json", run.missing, f"iter{i}/model.manifest.json")
        ),
    )
    training.manifests = {
        name: as_manifest(read_object(path / f"{name}.manifest.json")) for name in ("generated", "rewarded")
    }
    if (path / "rewarded.jsonl").is_file():
        training.answers = read_answers(path / "rewarded.jsonl", None, seed, keep)
        if not training.answers.ids:
            training.answers = None
            run.missing.append(f"iter{i}/rewarded.jsonl holds no answer that can be read")
        elif training.answers.damaged:
            run.missing.append(f"iter{i}/rewarded.jsonl: {training.answers.damaged} lines cannot be read")
    if (path / "pairs.jsonl").is_file():
        ids = {record["id"] for record in training.answers.kept} if training.answers else set()
        training.pairs, training.margins, training.longer = read_pairs(path / "pairs.jsonl", i, ids)
    state = path / "model.trainer_state.json"
    if not state.is_file():  # in the middle of training: the last checkpoint's
        state = max(
            path.glob("model/checkpoint-*/trainer_state.json"),
            key=lambda p: written_at(p) or 0,
            default=state,
        )
    history = read_object(state, run.missing, f"iter{i}'s trainer_state.json").get("log_history")
    training.history = (
        [numbers(entry) for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    )
    if (path / "model.log.jsonl").is_file():
        training.ppo = [
            numbers(entry) | {"seconds": finites(entry.get("seconds"))}
            for entry in lines_of(path / "model.log.jsonl")
            if entry
        ]
    if training.answers or training.manifest or training.history or training.ppo:
        run.trainings[i] = training
    for manifest in (training.manifest, *training.manifests.values()):
        run.versions |= manifest.get("versions", {})


def _load_gold(spec, missing):
    try:
        return load_gold(spec)
    except UserError as error:
        note = f"the gold function: {error}; gold is what metrics.json says, without intervals of differences"
        if note not in missing:
            missing.append(note)
        return None


def _name_missing(run):
    """Say what a finished run would have and this one has not."""
    last = max(run.iterates, default=0)
    if run.settings and run.iterations - last > 1:  # a run that has just begun is not a list of hundreds
        run.missing.append(f"iterates {last + 1} to {run.iterations} have not been evaluated")
    for i in range(min(run.iterations, last + 1) + 1) if run.settings else run.iterates:
        iterate = run.iterates.get(i)
        if iterate is None:
            if i <= last or run.iterations == last + 1:
                run.missing.append(f"iterate {i} has not been evaluated")
            continue
        absent = [kind for kind in KINDS if kind not in iterate.answers]
        if absent:
            run.missing.append(
                f"the {' and '.join(absent)} held-out answers of iterate {i}, so no intervals from them"
            )
        training = run.trainings.get(i)
        if i and run.kind == "dpo" and training and not training.history:
            run.missing.append(f"the trainer's log of iteration {i} (iter{i}/model.trainer_state.json)")
        if i and run.kind == "ppo" and training and not training.ppo:
            run.missing.append(f"PPO's log (iter{i}/model.log.jsonl)")
    if (
        run.iterates
        and not any(iterate.divergence for iterate in run.iterates.values())
        and not any(t.ppo for t in run.trainings.values())
    ):
        run.missing.append("KL to the reference (iterN/divergence.json)")
    if run.iterates and not any(iterate.judged for iterate in run.iterates.values()):
        run.missing.append("a second judge (eval_reward_model)")
    if run.iterates and not any(
        "gold" in (iterate.metrics.get(k) or {}) or getattr(iterate.answers.get(k), "gold", None) is not None
        for iterate in run.iterates.values()
        for k in KINDS
    ):
        run.missing.append("gold score (gold_function)")
