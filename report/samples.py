"""Prompts and answers that one can read on the page: a seeded subset, cut to fit, as plain data.

A prompt enters by the hash of its id and the seed, so that every iterate, and every run on the same prompts,
shows the same ones.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.messages import CALLS, text_of
from common.records import finite
from report.run_data import sample_hash

LONGEST = 4000  # characters of a text; the page says how many more there were
SHOWN = 4  # sampled held-out answers of each iterate


def cut(text):
    """[text] or [its beginning, number of characters left out]."""
    return [text] if len(text) <= LONGEST else [text[:LONGEST], len(text) - LONGEST]


def short(value):
    return round(float(value), 4) if finite(value) else None


def turns(prompt):
    """Messages as [role, text, …] lists, tool calls as JSON behind the text; a string is a user's turn."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    calls = [[json.dumps(m[key], ensure_ascii=False) for key in CALLS if m.get(key)] for m in messages]
    return [
        [str(m.get("role", "")), *cut("\n".join(filter(None, [str(text_of(m)), *more])))]
        for m, more in zip(messages, calls, strict=True)
    ]


def responses(record, most=None, judged=None):
    """A record's answers: `t` text, `r` reward, `n` tokens, `c` cut off, `g` gold, `j` the second judge's
    reward.
    """
    found = []
    for k, text in enumerate(record["responses"][:most]):
        answer = {"t": cut(text), "r": short(record["rewards"][k])}
        for name, values in (("n", record.get("num_tokens")), ("g", record.get("gold")), ("j", judged)):
            if values and k < len(values) and finite(values[k]):
                answer[name] = short(values[k])
        reasons = record.get("finish_reasons") or []
        if k < len(reasons) and reasons[k] == "length":
            answer["c"] = 1
        found.append(answer)
    return found


def fill(records, megabytes):
    """The first records whose JSON fits, and how many those are of all."""
    found, room = [], megabytes * 1e6
    for record in records:
        room -= len(json.dumps(record))  # all ASCII: characters are bytes
        if room < 0:
            break
        found.append(record)
    return found


def collect(runs, count, megabytes, seed=0):
    """Samples of all runs.

    Args:
        runs: list of run_data.Run, read with the same seed.
        count: held-out prompts; of training half as many an iteration.
        megabytes: most that they may take in the page; six tenths are the held-out ones'.

    Returns:
        dict: `columns` (labels), `heldout` (prompts with their answers by column), `training` (prompts with
            answers and pairs),
        `left_out`: prompts that were read and do not fit.
    """
    several, columns, by_id = len(runs) > 1, [], {}
    for run in runs:
        for i, iterate in sorted(run.iterates.items()):
            column = len(columns)
            columns.append(f"{run.name}, iterate {i}" if several else f"iterate {i}")
            for kind in ("greedy", "sampled"):
                if kind not in iterate.answers:
                    continue
                judged = (
                    {record["id"]: record["rewards"] for record in iterate.judged[kind].kept}
                    if kind in iterate.judged
                    else {}
                )
                for record in iterate.answers[kind].kept:
                    entry = by_id.setdefault(
                        (record["id"], json.dumps(record["prompt"])), {"p": turns(record["prompt"]), "a": []}
                    )
                    shown = responses(record, None if kind == "greedy" else SHOWN, judged.get(record["id"]))
                    entry["a"].append(
                        {"col": column, "kind": kind, "of": len(record["responses"]), "r": shown}
                    )
    order = sorted(by_id, key=lambda key: (sample_hash(key[0], seed), key[1]))[:count]
    for key in order:
        by_id[key]["id"] = key[0]
    heldout = fill([by_id[key] for key in order], 0.6 * megabytes)
    trained = []
    for n, run in enumerate(runs):
        for i, training in sorted(run.trainings.items()):
            for rank, record in enumerate(
                training.answers.kept[: max(1, count // 2)] if training.answers else []
            ):
                marks = [
                    [m["chosen_index"], m["rejected_index"], short(m["margin"])]
                    for m in training.pairs.get(record["id"], [])
                ]
                entry = {
                    "id": record["id"],
                    "run": n,
                    "i": i,
                    "p": turns(record["prompt"]),
                    "r": responses(record),
                    "pairs": marks,
                }
                trained.append((rank, n, i, entry))
    trained.sort(key=lambda item: item[:3])  # so that every iteration has its share when room ends
    training = fill([entry for *_, entry in trained], 0.4 * megabytes)
    training.sort(key=lambda entry: (entry["run"], entry["i"]))
    left_out = len(order) - len(heldout) + len(trained) - len(training)
    return {
        "columns": columns,
        "runs": [run.name for run in runs],
        "heldout": heldout,
        "training": training,
        "left_out": left_out,
    }
