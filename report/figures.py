"""The figures of a run, computed from what `run_data.read_run` holds: one mapping per iterate, training and
step of a policy.

What a run does not tell is None. Every key has its definition in report/definitions.py.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common.records import finite
from common.run_folder import KINDS
from evaluation import measures
from evaluation.metrics import same_answers
from report.run_data import Answers, Iterate, Run

QUANTITIES = ("reward", "gold", "judge")
HEAD = {  # what a reader asks first of a run → where loop.yaml has it, the first that is there
    "policy": ("model_name_or_path",),
    "reward model": ("reward_name_or_path", "annotation.reward_function"),
    "prompts": (),
    "pairs": (),
    "held-out prompts": (),
    "iterations": ("iterations",),
    "rounds": ("online.rounds",),
    "rounds behind": ("online.staleness",),
    "K": ("ppo.samples_per_prompt", "generation.K"),
    "temperature": ("ppo.temperature", "generation.mixture", "generation.temperature"),
    "beta": ("training_args.beta",),
    "advantages": ("ppo.advantage_estimator",),
    "KL coefficient": ("ppo.kl_coef",),
    "learning rate": ("training_args.learning_rate", "ppo.learning_rate"),
    "loss": ("training_args.loss_type",),
    "choice of pairs": ("training_args.choose_type",),
    "epochs": ("training_args.num_train_epochs", "ppo.num_episodes"),
    "seed": ("seed",),
}


class Figures(NamedTuple):
    """A run and its figures: of `of_iterates`, `of_trainings`, `of_steps`."""

    run: Run
    iterates: list[dict]
    trainings: list[dict]
    steps: list[dict]


def of_run(run: Run) -> Figures:
    """All figures of a run."""
    return Figures(run, of_iterates(run), of_trainings(run), of_steps(run))


def flatten(mapping: dict, prefix: str = "") -> dict:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`."""
    found = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differing(settings: list[dict]) -> dict[str, list]:
    """Settings in which runs differ: `{key: list of values}`, mappings flattened to `section.key`.

    Args:
        settings: list of mappings, one a run; a key that a run lacks has None.
    """
    flat = [flatten(one) for one in settings]
    values = {key: [one.get(key) for one in flat] for key in sorted(set().union(*flat), key=str)}
    return {key: own for key, own in values.items() if len(set(map(repr, own))) > 1}


def of_settings(run: Run) -> dict:
    """{label of HEAD: value} of what a reader asks first of a run; None where it is not known."""
    flat = flatten(run.settings)
    found = {
        label: next((flat[key] for key in keys if flat.get(key) is not None), None)
        for label, keys in HEAD.items()
    }
    for label, value in found.items():
        found[label] = ", ".join(map(str, value)) if isinstance(value, list) else value
    trainings = [training for _, training in sorted(run.trainings.items())]
    counts = [training.manifest.get("counts", {}) for training in trainings]
    read = [len(training.answers.ids) if training.answers else 0 for training in trainings]
    read = [own.get("prompts", n) for own, n in zip(counts, read, strict=True)]
    sets = run.settings.get("prompts") or []
    found["prompts"] = sizes(read) or ", ".join(map(str, sets if isinstance(sets, list) else [sets]))
    found["pairs"] = sizes([own.get("train_pairs", 0) for own in counts]) or None
    heldout = {len(it.answers[kind].ids) for it in run.iterates.values() for kind in it.answers}
    found["held-out prompts"] = f"{max(heldout):,}" if heldout else run.settings.get("heldout_prompts")
    if not run.evaluated:
        found["held-out prompts"] = "none: not evaluated"
    return found


def sizes(counts: list[int]) -> str:
    """`500 × 3` of three iterations' prompts, `500, 400` if they differ; 0 is not known."""
    known = [f"{count:,}" for count in counts if count]
    return f"{known[0]} × {len(known)}" if len(set(known)) == 1 and len(known) > 1 else ", ".join(known)


def of_iterates(run: Run) -> list[dict]:
    """Figures of each evaluated iterate, in order.

    Returns:
        list of dicts: `iterate`, `sampled` and `greedy` (see `of_answers`, with what metrics.json says where
            the answers are gone), `kl`, `kl_se`, `kl_per_token`, and `versus`: {"start", "previous", "best"}
            → kind → see `compare`. "best" is the earlier iterate of the highest gold (without gold: judge's
            reward), where it is neither of the others.
    """
    found, order = [], sorted(run.iterates)
    for n, i in enumerate(order):
        iterate = run.iterates[i]
        row = {"iterate": i, "versus": {}} | {kind: of_kind(iterate, kind) for kind in KINDS}
        row |= {key: iterate.divergence.get(key) for key in ("kl", "kl_se", "kl_per_token")}
        row |= {key: iterate.divergence.get(key) for key in ("retokenised", "responses")}
        if row["kl"] is None and i in run.trainings and run.trainings[i].ppo:  # of PPO's last rollout
            row["kl"] = run.trainings[i].ppo[-1].get("kl")
        others = {"start": order[0] if order[0] == 0 and i else None, "previous": order[n - 1] if n else None}
        best = best_so_far(found)
        others |= {"best": None if best in others.values() else best}
        for name, other in others.items():
            if other is not None:
                row["versus"][name] = {"iterate": other} | {
                    kind: compare(run.iterates[other], iterate, kind) for kind in KINDS
                }
        found.append(row)
    return found


def best_so_far(rows: list) -> int | None:
    """The iterate whose sampled answers have the highest gold, or the second judge's highest reward; None
    where neither is known.
    """
    for quantity in ("gold", "judge"):
        known = [(own[0], row["iterate"]) for row in rows if (own := row["sampled"].get(quantity))]
        if known:
            return max(known)[1]
    return None


def values_of(iterate: Iterate, kind: str, quantity: str) -> tuple | None:
    """(Answers, flat values) of a quantity, or None: reward and gold of the answers, judge's rewards of the
    judged ones.
    """
    answers = (iterate.judged if quantity == "judge" else iterate.answers).get(kind)
    values = None if answers is None else answers.gold if quantity == "gold" else answers.rewards
    return None if values is None or not np.isfinite(values).any() else (answers, values)


def of_kind(iterate: Iterate, kind: str) -> dict:
    """Figures of one iterate's sampled or greedy answers; {} where neither answers nor metrics are there."""
    written, found = iterate.metrics.get(kind, {}), {}
    for quantity in QUANTITIES:
        have = values_of(iterate, kind, quantity)
        if have:
            found[quantity] = measures.mean_interval(have[0].means(have[1]))
        else:  # the average that metrics.json holds, with ±1.96 of its standard error
            judged = quantity == "judge"
            source, key = (
                (iterate.metrics.get("judge", {}).get(kind, {}), "reward") if judged else (written, quantity)
            )
            mean, error = source.get(key), source.get(f"{key}_se")
            if mean is not None:
                interval = (None, None) if error is None else (mean - 1.96 * error, mean + 1.96 * error)
                found[quantity] = (mean, *interval)
    answers = iterate.answers.get(kind)
    if answers is None:
        names = ("length", "truncated", "empty", "K", "prompts", "best_of_k")
        return found | {key: written[key] for key in names if key in written}
    found |= of_answers(answers)
    if answers.K > 1:
        rewards = answers.by_prompt(answers.rewards)
        found["best_of"] = measures.best_of(rewards)
        gold = answers.gold
        if gold is not None and np.isfinite(gold).all() and np.isfinite(answers.rewards).all():
            found["gold_of_best"] = measures.best_of(rewards, answers.by_prompt(gold))
    return found


def of_answers(answers: Answers) -> dict:
    """What a rewarded file alone tells: counts, length, truncation, repetition, variety, ties and spread."""
    known, cut = answers.known_lengths, answers.cut[answers.cut >= 0]
    texts = [text for record in answers.kept for text in record["responses"]]
    repeated = np.array([measures.repetition(text) for text in texts])
    spread, equal = measures.spread_within(answers.rewards, answers.offsets)
    top, bottom = measures.at_the_ends(answers.rewards)
    return {
        "prompts": len(answers.ids),
        "K": answers.K,
        "responses": len(answers.rewards),
        "null_share": float(np.isnan(answers.rewards).mean()),
        "length": float(known.mean()) if len(known) else None,
        "length_p90": float(np.quantile(known, 0.9)) if len(known) else None,
        "truncated": float((cut == 1).mean()) if len(cut) else None,
        "empty": answers.empty / len(answers.rewards) if len(answers.rewards) else None,
        "commonest": Counter(texts).most_common(1)[0][1] / len(texts) if texts else None,
        "repetition": float(repeated.mean()),
        "looping": float((repeated >= 0.5).mean()),
        **{f"distinct_{n}": measures.distinct(texts, n) for n in (1, 2, 3)},
        "different_texts": float(answers.distinct.mean()) if answers.K > 1 else None,
        "tied": answers.tied / answers.different if answers.different else None,
        "spread": spread,
        "all_equal": equal,
        "at_top": top,
        "at_bottom": bottom,
        "length_correlation": measures.length_correlation(answers.rewards, answers.lengths, answers.offsets),
    }


def compare(before: Iterate, after: Iterate, kind: str) -> dict:
    """How one iterate differs from another on the same prompts.

    Returns:
        dict: for each quantity both have, `NAME` (difference, low, high), `NAME_win` (win rate, low, high)
            and `counts` of greedy wins, ties and losses by reward; `lc_win`, the length-controlled win rate
            by reward; `same`, the share of equal answers among those whose texts are kept.
    """
    found = {}
    for quantity in QUANTITIES:
        pair = values_of(before, kind, quantity), values_of(after, kind, quantity)
        if not all(pair):
            continue
        found[quantity] = measures.difference(*(answers.means(values) for answers, values in pair))
        old, new = (answers.by_prompt(values) for answers, values in pair)
        won = measures.wins(old, new)
        found[f"{quantity}_win"] = measures.mean_interval(won)
        if quantity != "reward":
            continue
        if kind == "greedy":
            shares = list(won.values())
            found["counts"] = tuple(shares.count(share) for share in (1.0, 0.5, 0.0))
        answers = [answers for answers, _ in pair]
        if all((own.lengths >= 0).all() for own in answers):
            # lengths of the responses that have a reward, so that both lists are aligned
            lengths = [np.where(np.isfinite(own.rewards), own.lengths, np.nan) for own in answers]
            lengths = [own.by_prompt(values) for own, values in zip(answers, lengths, strict=True)]
            found["lc_win"] = measures.length_controlled_win_rate(old, new, *lengths)
    if found and kind in before.answers and kind in after.answers:
        kept = [iterate.answers[kind].kept for iterate in (before, after)]
        found["same"] = same_answers(*({one["id"]: one["responses"] for one in own} for own in kept))
    return found


def of_trainings(run: Run) -> list[dict]:
    """Figures of each iteration's training: of its rewarded responses, its pairs, and its end.

    Returns:
        list of dicts: `iteration`, `rewards` (see `of_answers`), `reward_mean`, `margin`, `pairs`,
            `chosen_longer`, `accuracy`, `eval_accuracy`, `eval_pairs`, `loss`, `not_finite` (entries of the
            log), and `ppo` (last entry).
    """
    found = []
    for i, training in sorted(run.trainings.items()):
        metrics, counts = training.manifest.get("metrics", {}), training.manifest.get("counts", {})
        last = {key: value for entry in training.history for key, value in entry.items()}
        rewards, margins = training.answers.rewards if training.answers else np.zeros(0), training.margins
        known = rewards[np.isfinite(rewards)]
        row = {
            "iteration": i,
            "rewards": of_answers(training.answers) if training.answers else {},
            "ppo": training.ppo[-1] if training.ppo else {},
            "reward_mean": float(known.mean()) if len(known) else None,
            "pairs": counts.get("train_pairs", None if margins is None else len(margins)),
            "eval_pairs": counts.get("eval_pairs"),
            "margin": float(margins.mean()) if margins is not None and len(margins) else None,
            "chosen_longer": training.longer,
        }
        for name, key in (
            ("loss", "loss"),
            ("accuracy", "rewards/accuracies"),
            ("eval_accuracy", "eval_rewards/accuracies"),
            ("grad_norm", "grad_norm"),
        ):
            row[name] = metrics.get(key, last.get(key))
        row["not_finite"] = sum(
            any(isinstance(v, float) and not np.isfinite(v) for v in entry.values())
            for entry in [*training.history, *training.ppo]
        )
        found.append(row)
    return found


def gpus_of(run: Run, policy: int, step: str) -> int | None:
    """GPUs that a step held: processes where it ran on GPUs, 0 on the CPU, None where nothing tells."""
    made = run.made.get((policy, step), [])
    versions = [str(one["versions"].get("torch", "")) for one in made] + [str(run.versions.get("torch", ""))]
    if any(version.endswith("+cpu") for version in versions):
        return 0
    if any(one["counts"].get("device") == "cpu" for one in made):
        return 0
    generation = run.settings.get("generation")
    size = generation.get("tensor_parallel_size") if isinstance(generation, dict) else 1
    size = size if isinstance(size, int) and finite(size) else 1
    counts = [one.get("num_processes", 0) for one in made]
    counts += [one["counts"].get("processes", 0) for one in made]
    counts += [one["merged"].get("num_datasets", 0) * size for one in made]
    return max(counts, default=0) or None


def of_steps(run: Run) -> list[dict]:
    """Where the time went, a row for each finished step of a policy.

    Returns:
        list of dicts: `policy`, `step`, `seconds` (over all its starts), `work` (seconds, or None), `waiting`
            (share), `tokens_per_second`, `mfu` (share; of training on known GPUs), `gpus`, `gpu_hours`.
    """
    rows = {}
    for entry in run.steps:
        key = entry["policy"], entry["step"]
        rows.setdefault(key, {"policy": key[0], "step": key[1], "seconds": 0})["seconds"] += entry["seconds"]
    for key, row in rows.items():
        work = working_seconds(run, *key)
        row["work"] = None if work is None else min(work, row["seconds"])
        row["waiting"] = None if work is None or row["seconds"] <= 0 else 1 - row["work"] / row["seconds"]
        row["tokens_per_second"] = tokens_per_second(run, *key, work)
        trained = run.trainings.get(key[0] + 1) if key[1] == "train" else None
        row["mfu"] = trained.manifest.get("metrics", {}).get("mfu") if trained else None
        row["gpus"] = gpus_of(run, *key)
        row["gpu_hours"] = None if row["gpus"] is None else row["gpus"] * row["seconds"] / 3600
    return list(rows.values())


def working_seconds(run: Run, policy: int, step: str) -> float | None:
    """Seconds of a step in which responses, rewards or optimizer steps were made; None where the manifests
    do not tell.
    """
    training, made = run.trainings.get(policy + 1), run.made.get((policy, step), [])
    if step == "train":
        if training is None:
            return None
        if training.ppo:
            return sum(entry["seconds"].get("all", 0) for entry in training.ppo) or None
        spent = [training.manifest.get("metrics", {}).get(key) for key in ("train_runtime", "eval_runtime")]
        return sum(seconds for seconds in spent if seconds is not None) or None
    names = ("engine_seconds", "scoring_seconds", "seconds")  # of sampling, annotation, divergence
    spent = [next((one["counts"][name] for name in names if name in one["counts"]), None) for one in made]
    return sum(spent) if spent and None not in spent else None


def tokens_per_second(run: Run, policy: int, step: str, work: float | None) -> float | None:
    """Tokens a second while a step worked: those sampled, those trained on; None for the other steps."""
    training = run.trainings.get(policy + 1)
    if step == "train" and training:
        if training.ppo:
            rates = [rate for entry in training.ppo if finite(rate := entry.get("tokens_per_second"))]
            return float(np.mean(rates)) if rates else None
        metrics = training.manifest.get("metrics", {})
        count, seconds = metrics.get("num_tokens"), metrics.get("train_runtime")
        return count / seconds if count and seconds else None
    if step != "sample" or not work:
        return None
    made = [training.answers] if training and training.answers else []
    made += run.iterates[policy].answers.values() if policy in run.iterates else []
    total = sum(int(answers.known_lengths.sum()) for answers in made)
    return total / work if total else None


def in_short(of: Figures) -> list[tuple]:
    """The last iterate against the start, for the head of the page: a list of (definition's key, label, value
    text, note).
    """
    found = _gain(of.iterates[0], of.iterates[-1]) if of.iterates else []
    if of.steps:
        hours = sum(row["seconds"] for row in of.steps) / 3600
        gpu = [row["gpu_hours"] for row in of.steps]
        note = "" if None in gpu else f"{sum(gpu):.2f} GPU-hours" if any(gpu) else "no GPU"
        text = f"{hours:.2f} h" if hours >= 1 else f"{60 * hours:.1f} min"
        found.append(("seconds", "time in all", text, note))
    return found


def _gain(first, last):
    """The part of `in_short` that is about answers: rewards, win rates, length, KL."""
    found, versus = [], last["versus"].get("start") or {}
    for quantity in QUANTITIES:
        for kind in KINDS:
            before, after = first[kind].get(quantity), last[kind].get(quantity)
            if after is not None and (kind == "sampled" or not last["sampled"].get(quantity)):
                start = f"{before[0]:.3f} → " if before and last is not first else ""
                gain = versus.get(kind, {}).get(quantity)
                note = "" if not gain else f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]"
                found.append((quantity, f"{quantity}, {kind}", f"{start}{after[0]:.3f}", note))
    for key, label in (("reward_win", "win rate over the start"), ("lc_win", "the same at equal length")):
        rate = versus.get("sampled", {}).get(key)
        if rate:
            note = "" if rate[1] is None else f"[{100 * rate[1]:.1f}, {100 * rate[2]:.1f}]"
            found.append((key, label, f"{100 * rate[0]:.1f}%", note))
    length = first["sampled"].get("length"), last["sampled"].get("length")
    if None not in length:
        note = f"{length[1] / length[0]:.2f} times" if length[0] else ""
        found.append(("length", "length, tokens", f"{length[0]:.1f} → {length[1]:.1f}", note))
    if last["kl"] is not None:
        found.append(("kl", "KL to the reference", f"{last['kl']:.2f}", "nats per response"))
    return found
