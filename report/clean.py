"""What the report takes of JSON that a run, or somebody else, wrote: what is of another type than it should
be is not there.
"""

import math
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.records import finite
from common.run_folder import KINDS


def numbers(value: object) -> dict:
    """The entries of a mapping that are numbers, NaN among them, which a log is to tell; {} for what is no
    mapping.
    """
    return _entries(value, lambda one: finite(one) or isinstance(one, float))


def finites(value: object) -> dict:
    """The entries of a mapping that are finite numbers; {} for what is no mapping."""
    return _entries(value, finite)


def texts(value: object) -> dict:
    """The entries of a mapping that are texts; {} for what is no mapping."""
    return _entries(value, lambda one: isinstance(one, str))


def _entries(value, fits):
    return {key: one for key, one in value.items() if fits(one)} if isinstance(value, dict) else {}


def as_metrics(found: dict) -> dict:
    """What the report reads of an iterate's metrics.json."""
    if not found:
        return {}
    judge = found.get("judge") if isinstance(found.get("judge"), dict) else {}
    kept = {kind: own for kind in KINDS if (own := finites(found.get(kind)))}
    kept["judge"] = {kind: finites(own) for kind, own in judge.items()}
    return kept | {"files": texts(found.get("files"))} | texts({"gold_function": found.get("gold_function")})


def as_manifest(found: dict) -> dict:
    """The same of a manifest."""
    if not found:
        return {}
    counts, versions = found.get("counts"), found.get("versions")
    versions = versions.items() if isinstance(versions, dict) else ()
    return {
        "metrics": finites(found.get("metrics")),
        "counts": finites(counts) | {k: one for k, one in texts(counts).items() if k == "device"},
        "merged": finites(found.get("merged")),
        "versions": {str(name): str(version) for name, version in versions},
    } | finites({"num_processes": found.get("num_processes")})


def as_log(entries: object) -> list[dict]:
    """Entries of a training's log: their numbers, and of PPO's the seconds of a rollout's parts."""
    entries = entries if isinstance(entries, Iterable) else ()
    return [
        numbers(entry) | {"seconds": finites(entry.get("seconds"))}
        for entry in entries
        if isinstance(entry, dict)
    ]


def as_flat(record: dict) -> tuple[list, list, list]:
    """(rewards, NaN where null; tokens, -1 unknown; cut off: 1, 0, -1 unknown) of a rewarded record's K
    responses.
    """
    K = len(record["responses"])
    tokens = [*(record.get("num_tokens") or []), *[None] * K][:K]
    reasons = [*(record.get("finish_reasons") or []), *[None] * K][:K]
    return (
        [float(reward) if finite(reward) else math.nan for reward in record["rewards"]],
        [n if isinstance(n, int) and 0 <= n < 2**31 else -1 for n in tokens],
        [-1 if reason is None else int(reason == "length") for reason in reasons],
    )
