"""Estimates of KL(policy ‖ reference) from log-probabilities of answers that the policy sampled.

With r = log π(token) − log π_ref(token) at each token of a response, in nats:

    kl   Σ r, averaged over a prompt's responses, then over prompts (k1 of
         http://joschu.net/blog/kl-approx.html, unbiased)
    k3   Σ (exp(−r) − 1 + r), averaged alike: as unbiased, never negative, mostly of smaller variance. Null,
         with the reason (`k3_null`), in bf16 and fp16: rounding that moves r by e adds about e²/2 a token,
         always upwards, which may be more than the KL of a small step; in kl it cancels out

`…_se` are standard errors over prompts, `…_per_token` the sums over all tokens by their number.
"""

import math
import statistics
from collections.abc import Iterable

from evaluation.metrics import mean_and_error

HALVES = ("bfloat16", "float16")
K3_NULL = "computed in bf16 or fp16, whose rounding would add to it; --dtype float32 gives it"


def summarise(entries: Iterable[dict], facts: dict) -> dict:
    """The estimates out of the output's records; `facts` are put beside them."""
    kl, k3, tokens, total, total_k3, responses = [], [], 0, 0.0, 0.0, 0
    for entry in entries:
        known = [i for i, n in enumerate(entry["tokens"]) if n is not None]
        if not known:
            continue
        ratios = [entry["logps"][i] - entry["ref_logps"][i] for i in known]
        kl.append(statistics.fmean(ratios))
        responses, tokens = responses + len(known), tokens + sum(entry["tokens"][i] for i in known)
        total += sum(ratios)
        values = [entry["k3"][i] for i in known]
        if None not in values:
            k3.append(statistics.fmean(values))
            total_k3 += sum(values)
    rounded = len(k3) < len(kl)
    found = dict(zip(("kl", "kl_se"), mean_and_error(kl)))
    found |= dict(zip(("k3", "k3_se"), mean_and_error([] if rounded else k3)))
    found["kl_per_token"] = total / tokens if tokens else None
    found["k3_per_token"] = total_k3 / tokens if tokens and not rounded else None
    found = {key: None if value is None else round(value, 6) for key, value in found.items()}
    facts = facts | ({"k3_null": K3_NULL} if rounded else {})
    return found | {"estimator": "k1", "prompts": len(kl), "responses": responses, "tokens": tokens} | facts


def combine(record_id: str, policy: dict, reference: dict) -> dict:
    """The output's record: sums over each response's tokens of what the two models say (entries of
    logps.score); no k3 where one of them was computed in half precision.
    """
    entry = {"id": record_id, "tokens": [], "logps": [], "ref_logps": [], "k3": []}
    rounded = not {policy["dtype"], reference["dtype"]}.isdisjoint(HALVES)
    for ours, theirs in zip(policy["logps"], reference["logps"], strict=True):
        values = (None,) * 4
        if ours is not None:
            ratios = [a - b for a, b in zip(ours, theirs, strict=True)]
            # Beyond 700 exp overflows; such a response says enough with what it has.
            k3 = None if rounded else sum(math.exp(min(-r, 700.0)) - 1 + r for r in ratios)
            values = len(ours), sum(ours), sum(theirs), k3
        for key, value in zip(("tokens", "logps", "ref_logps", "k3"), values):
            entry[key].append(round(value, 6) if isinstance(value, float) else value)
    return entry
