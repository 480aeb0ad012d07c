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
from common.run_folder import KINDS
from report.run_data import sample_hash

LONGEST = 4000  # characters of a text; the page says how many more there were
SHOWN = 4  # sampled held-out answers of each iterate


def cut(text: str) -> list:
    """[text] or [its beginning, number of characters left out]."""
    return [text] if len(text) <= LONGEST else [text[:LONGEST], len(text) - LONGEST]


def short(value: object) -> float | None:
    return round(float(value), 4) if finite(value) else None


def turns(messages: list[dict]) -> list:
    """Messages as [role, text, …] lists, tool calls as JSON behind the text."""
    found = []
    for message in messages:
        calls = [json.dumps(message[key], ensure_ascii=False) for key in CALLS if message.get(key)]
        found.append([message["role"], *cut("\n".join(filter(None, [text_of(message), *calls])))])
    return found


def source(entry: object) -> str:
    """An entry of `response_sources` in words."""
    parts = entry.items() if isinstance(entry, dict) else ()
    return ", ".join(f"{key} {value}" for key, value in parts if value is not None)[:200] or str(entry)[:200]


def responses(record: dict, most: int | None = None, judged: list | None = None) -> list[dict]:
    """A record's answers: `t` text, `r` reward, `n` tokens, `c` cut off, `g` gold, `j` the second judge's
    reward, `s` the part of a mixture that it came from.
    """
    found = []
    for k, text in enumerate(record["responses"][:most]):
        answer = {"t": cut(text), "r": short(record["rewards"][k])}
        for name, values in (("n", record.get("num_tokens")), ("g", record.get("gold")), ("j", judged)):
            if values and k < len(values) and finite(values[k]):
                answer[name] = short(values[k])
        if record.get("finish_reasons") and record["finish_reasons"][k] == "length":
            answer["c"] = 1
        if isinstance(sources := record.get("response_sources"), list) and k < len(sources):
            answer["s"] = source(sources[k])
        found.append(answer)
    return found


def fill(records: list, megabytes: float) -> list:
    """The first records whose JSON fits."""
    found, room = [], megabytes * 1e6
    for record in records:
        room -= len(json.dumps(record))  # all ASCII: characters are bytes
        if room < 0:
            break
        found.append(record)
    return found


def heldout_samples(runs: list, several: bool) -> tuple[list[str], dict]:
    """(labels of columns, one an iterate; {(id, prompt as JSON): entry}) of the kept held-out answers."""
    columns, by_id = [], {}
    for run in runs:
        for i, iterate in sorted(run.iterates.items()):
            columns.append(f"{run.name}, iterate {i}" if several else f"iterate {i}")
            for kind in reversed(KINDS):
                if kind not in iterate.answers:
                    continue
                judged = iterate.judged[kind].kept if kind in iterate.judged else []
                judged = {record["id"]: record["rewards"] for record in judged}
                for record in iterate.answers[kind].kept:
                    key = record["id"], json.dumps(record["prompt"])
                    entry = by_id.setdefault(key, {"p": turns(record["prompt"]), "a": [], "id": key[0]})
                    most = None if kind == "greedy" else SHOWN
                    entry["a"].append(
                        {
                            "col": len(columns) - 1,
                            "kind": kind,
                            "of": len(record["responses"]),
                            "r": responses(record, most, judged.get(record["id"])),
                        }
                    )
    return columns, by_id


def training_samples(runs: list, count: int) -> list[dict]:
    """Kept training prompts with their answers and pairs, the first of each iteration, then the second, …, so
    that every iteration has its share when room ends.
    """
    found = []
    for n, run in enumerate(runs):
        for i, training in sorted(run.trainings.items()):
            for rank, record in enumerate(training.answers.kept[:count] if training.answers else []):
                marks = [
                    [m["chosen_index"], m["rejected_index"], short(m["margin"])]
                    for m in training.pairs.get(record["id"], [])
                ]
                entry = {"id": record["id"], "run": n, "i": i, "p": turns(record["prompt"])}
                found.append((rank, n, i, entry | {"r": responses(record), "pairs": marks}))
    return [entry for *_, entry in sorted(found, key=lambda item: item[:3])]


def collect(runs: list, count: int, megabytes: float, seed: int = 0) -> dict:
    """Samples of all runs.

    Args:
        runs: list of run_data.Run, read with the same seed.
        count: held-out prompts; of training half as many an iteration.
        megabytes: most that they may take in the page; six tenths are the held-out ones'.

    Returns:
        dict: `columns` (labels), `heldout` (prompts with their answers by column), `training` (prompts with
            answers and pairs), `left_out`: prompts that were read and do not fit.
    """
    columns, by_id = heldout_samples(runs, len(runs) > 1)
    order = sorted(by_id, key=lambda key: (sample_hash(key[0], seed), key[1]))[:count]
    heldout = fill([by_id[key] for key in order], 0.6 * megabytes)
    trained = training_samples(runs, max(1, count // 2))
    training = fill(trained, 0.4 * megabytes)
    return {
        "columns": columns,
        "runs": [run.name for run in runs],
        "heldout": heldout,
        "training": sorted(training, key=lambda entry: (entry["run"], entry["i"])),
        "left_out": len(order) - len(heldout) + len(trained) - len(training),
    }
