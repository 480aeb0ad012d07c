"""Which two responses of a prompt become a pair, or which one is trained on alone, and which prompts are
held out: plain Python, no model.

A rewarded record has K responses and K rewards; preferences are read as such (common/preferences.py).
Responses without a finite reward, repeated ones and, if asked, cut-off ones take no part. An empty response
is never chosen; it may be rejected, since a policy that learns to say nothing has to unlearn it. A prompt
that gives no pair is skipped with its reason. Every choice depends on the record and the seed only: not on
the order of the files, nor on the number of processes.

Training without rejected responses (`loss_type: sft`) takes the best response of a prompt, and its margin is
over the worst one. Where all rewards are equal the first response stands for the best, at margin 0.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from common import tokens
from common.cli import UserError
from common.jsonl import BadRecord
from common.preferences import read_answers
from common.records import PER_RESPONSE, dumps, finite, is_empty, record_id

# Lists of a record that a pair has an entry of for each side: the field, and what it is called there.
OF_A_SIDE = {tokens.RESPONSES: "_token_ids", tokens.STOPPED_BY: "_stop_string", "response_sources": "_source"}
# Of a pair, for each of its sides.
SIDE_FIELDS = ("", "_index", "_reward", "_finish_reason", "_num_tokens", *OF_A_SIDE.values())
NO_TEXT = {
    True: "no response with text has the higher reward",
    False: "no response with text above the worst",
}
# These speak of all K responses, so they stay behind.
OF_ALL = ("responses", *PER_RESPONSE, "reward_parts", "pair_probabilities")


@dataclass
class Selection:
    """Pairs of all files, in file order, and what was left out.

    Attributes:
        pairs: pair records; `split` says `train` or `eval`.
        skipped: `{"id", "reason", "source"}` for each prompt without a pair.
        skipped_by_reason: Counter of these.
        counts: numbers of records read and of single responses left out, the latter by reason.
    """

    pairs: list = field(default_factory=list)
    skipped: list = field(default_factory=list)
    skipped_by_reason: Counter = field(default_factory=Counter)
    counts: dict = field(default_factory=dict)

    def skip(self, record: dict, reason: str):
        """Leave a record out; `reason: details` is counted by its first part."""
        self.skipped.append({"id": record["id"], "reason": reason, "source": record["source"]})
        self.skipped_by_reason[reason.split(":")[0]] += 1


def usable_responses(
    record: dict, drop_truncated: bool = False, drop_empty: bool = False
) -> tuple[list[int], Counter]:
    """Indices of the responses that may enter a pair, and a Counter of why the others may not."""
    usable, seen, left_out = [], set(), Counter()
    reasons = record.get("finish_reasons") or [None] * len(record["responses"])
    ids = record.get(tokens.RESPONSES) or [None] * len(record["responses"])
    for i, (text, reward, finish, sampled) in enumerate(
        zip(record["responses"], record["rewards"], reasons, ids)
    ):
        # Texts may be equal where control tokens differ.
        what = (text, tuple(sampled) if tokens.are_ids(sampled) else None)
        if drop_empty and is_empty(text):
            left_out["empty response"] += 1
        elif not finite(reward):
            left_out["reward not finite"] += 1
        elif drop_truncated and finish == "length":
            left_out["cut off by the length limit"] += 1
        elif what in seen:
            left_out["repeated response"] += 1
        else:
            seen.add(what)
            usable.append(i)
    return usable, left_out


def choose(
    scores: list[float] | dict[int, float],
    usable: list[int],
    choose_type: str,
    rng: random.Random,
    empty: Container[int] = (),
) -> tuple[int, int] | None:
    """(index of chosen, index of rejected) or None where no choice has a higher and a lower score.

    Args:
        scores: K floats; a list or dict from index to score.
        usable: indices that take part, at least two.
        choose_type: one of `CHOOSE_TYPES`.
        rng: random.Random, used by the random types only.
        empty: indices of responses that must not be chosen, however high their score.
    """
    # Stable: among equals the earlier response comes first, and one that may be chosen before one that may
    # not.
    ranked = sorted(usable, key=lambda i: (-scores[i], i in empty))
    best = next((i for i in ranked if i not in empty), None)
    if best is None:
        return None
    if CHOOSE_TYPES[choose_type].blind:
        return CHOOSE_TYPES[choose_type].pick(sorted(usable), scores, rng, empty)
    ranked = ranked[ranked.index(best) :]  # empty ones that score higher take no part
    if scores[ranked[-1]] == scores[best]:
        return None
    found = CHOOSE_TYPES[choose_type].pick(ranked, scores, rng, empty)
    return found if found and scores[found[0]] > scores[found[1]] else None


@dataclass(frozen=True)
class Choice:
    """A value of `choose_type`.

    pick: gives (chosen, rejected) of the indices from best to worst, their scores, a random.Random and the
        empty responses, which may not be chosen. The best may be chosen, and the worst scores less.
    penalised: scores are reward - length_penalty × length.
    best: the best is chosen.
    blind: scores are not looked at: what is chosen may be worse than what is rejected.
    """

    words: str
    pick: Callable[[list[int], list[float] | dict[int, float], random.Random, Container[int]], tuple | None]
    penalised: bool = False
    best: bool = True
    blind: bool = False


def best_and_worst(ranked: list[int], scores: dict, rng: random.Random, empty: Container[int]) -> tuple:
    return ranked[0], min(sorted(ranked), key=scores.__getitem__)


def best_and_second(ranked: list[int], scores: dict, rng: random.Random, empty: Container[int]) -> tuple:
    return ranked[0], ranked[1]


def best_and_random(ranked: list[int], scores: dict, rng: random.Random, empty: Container[int]) -> tuple:
    return ranked[0], rng.choice([i for i in sorted(ranked) if scores[i] < scores[ranked[0]]])


def two_random(ranked: list[int], scores: dict, rng: random.Random, empty: Container[int]) -> tuple | None:
    first = rng.choice(sorted(ranked))
    others = [
        i
        for i in sorted(ranked)
        if scores[i] != scores[first] and max(i, first, key=scores.__getitem__) not in empty
    ]
    return tuple(sorted((first, rng.choice(others)), key=lambda i: -scores[i])) if others else None


def two_blind(usable: list[int], scores: dict, rng: random.Random, empty: Container[int]) -> tuple[int, int]:
    chosen = rng.choice([i for i in usable if i not in empty])
    return chosen, rng.choice([i for i in usable if i != chosen])


def choose_alone(
    scores: list[float] | dict[int, float],
    usable: list[int],
    choose_type: str,
    rng: random.Random,
    empty: Container[int] = (),
) -> tuple[int] | None:
    """(index of the response to train on alone,) or None where none has text; arguments as of `choose`.

    It is the best, the first of several, but never one that an empty response alone scores above; with a
    blind choice a random one.
    """
    written = [i for i in sorted(usable) if i not in empty]
    if not written:
        return None
    if CHOOSE_TYPES[choose_type].blind:
        return (rng.choice(written),)
    best = max(written, key=scores.__getitem__)
    worst, most = (pick(scores[i] for i in usable) for pick in (min, max))
    return None if scores[best] == worst < most else (best,)


CHOOSE_TYPES = {
    "max_min": Choice("best and worst", best_and_worst),
    "max_max": Choice("best and second", best_and_second),
    "max_random": Choice("best and a random worse one", best_and_random),
    "random": Choice("two random ones of different score", two_random, best=False),
    "blind": Choice("two random ones whatever they score (the control)", two_blind, best=False, blind=True),
    "max_min_p": Choice("best and worst by reward less length_penalty", best_and_worst, penalised=True),
}

LENGTH_UNITS = ("token", "character")  # of a response, for length_penalty


def make_pairs(
    record: dict,
    choose_type: str = "max_min",
    length_penalty: float = 0.0,
    length_penalty_unit: str = "token",
    min_margin: float = 0.0,
    drop_truncated: bool = False,
    drop_empty: bool = False,
    seed: int = 42,
    count_tokens: Callable[[str], int] | None = None,
    pairs_per_prompt: int = 1,
    rejected: bool = True,
) -> tuple[list[dict], str | None, Counter]:
    """(pairs, reason why there are none or None, Counter of responses left out) of one rewarded record.

    Without `rejected` a pair has a chosen response alone.

    The score is the reward, or for a penalised choice reward - length_penalty × length, by which both
    are chosen and the margin is taken. A length is of one of LENGTH_UNITS; in tokens it is the record's
    `num_tokens`, else `count_tokens(text)`.
    A second pair is chosen as the first was, among the responses that are left.
    """
    usable, left_out = usable_responses(record, drop_truncated, drop_empty)
    least = 1 + rejected
    if len(record["responses"]) < 2 and rejected:
        return [], "fewer than two responses", left_out
    if len(usable) < least:
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(left_out.items()))
        few = "fewer than two usable responses" if rejected else "no usable response"
        return [], f"{few}: {why}", left_out
    scores = {i: record["rewards"][i] for i in usable}
    lengths = record.get("num_tokens") or [None] * len(record["responses"])
    if CHOOSE_TYPES[choose_type].penalised and length_penalty_unit == "character":
        scores = {i: scores[i] - length_penalty * len(record["responses"][i]) for i in usable}
    elif CHOOSE_TYPES[choose_type].penalised:
        lengths = [
            n if n is not None else count_tokens(text) for n, text in zip(lengths, record["responses"])
        ]
        scores = {i: scores[i] - length_penalty * lengths[i] for i in usable}
    pairs, reason, rng = [], None, random.Random(f"{seed}/{record['id']}")
    blind = CHOOSE_TYPES[choose_type].blind
    empty = {i for i in usable if is_empty(record["responses"][i])}
    worst = min(scores.values())
    while len(pairs) < pairs_per_prompt and len(usable) >= least and reason is None:
        found = (choose if rejected else choose_alone)(scores, usable, choose_type, rng, empty)
        if found is None:
            silent = empty and (not rejected or len({scores[i] for i in usable}) > 1)
            reason = NO_TEXT[rejected] if silent else "equal rewards"
        elif (margin := margin_of(found, scores, worst)) < min_margin and not blind:
            reason = f"margin below min_margin: {margin:.6g}"
        else:
            pairs.append(_pair(record, found, lengths) | {"margin": margin} | _rest(record))
            usable = [i for i in usable if i not in found]
    return pairs, None if pairs else reason, left_out


def margin_of(found: tuple, scores: dict[int, float], worst: float) -> float:
    """What the chosen response scores above the rejected one; alone, above the `worst` of the prompt."""
    return scores[found[0]] - (scores[found[1]] if len(found) > 1 else worst)


def _pair(record, found, lengths):
    """The pair of two responses, or the one that is trained alone, with where each came from."""
    finish = record.get("finish_reasons") or [None] * len(record["responses"])
    pair = {"id": record["id"], "prompt": record["prompt"]}
    for side, i in zip(("chosen", "rejected"), found):
        pair |= {
            side: [{"role": "assistant", "content": record["responses"][i]}],
            f"{side}_index": i,
            f"{side}_reward": record["rewards"][i],
            f"{side}_finish_reason": finish[i],
            f"{side}_num_tokens": lengths[i],
        }
        pair |= {f"{side}{name}": record[key][i] for key, name in OF_A_SIDE.items() if record.get(key)}
    return pair


def _rest(record):
    """Fields of a record that are carried through."""
    ours = {
        "id",
        "prompt",
        "margin",
        "loss_weight",  # of train_weights alone, see select_pairs
        *(f"{side}{what}" for side in ("chosen", "rejected") for what in SIDE_FIELDS),
    }
    return {k: v for k, v in record.items() if k not in ours and k not in OF_ALL}


def held_out(messages: list[dict], fraction: float, seed: int) -> bool:
    """Whether a prompt belongs to the held-out set: by a hash of its messages, so that its twins share its
    side.
    """
    digest = hashlib.sha256(f"{seed}/{record_id(messages)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def select_pairs(
    paths: list[str],
    eval_fraction: float = 0.0,
    seed: int = 42,
    split: str | None = None,
    weights: list[float] | None = None,
    **choice: object,
) -> Selection:
    """The pairs of one or several files or data sets of rewarded answers or preferences.

    Record ids may repeat between files (iterations that answered the same prompt): each record gives its own
    pairs.

    Args:
        split: of those that have splits.
        weights: of each of `paths`: its pairs hold it as `loss_weight`.
        choice: what `make_pairs` takes.
    """
    selection, left_out, records, read_as = Selection(), Counter(), 0, {}
    weighted = [{"loss_weight": weight} for weight in weights] if weights else [{}] * len(paths)
    for source, record, more in _records(paths, split, weighted, read_as):
        records += 1
        if isinstance(record, BadRecord):
            selection.skip({"id": record.id, "source": source}, f"bad record: {record}")
            continue
        pairs, reason, responses = make_pairs(record, seed=seed, **choice)
        left_out += responses
        if not pairs:
            selection.skip(record | {"source": source}, reason)
        try:
            dumps(pairs)
        except ValueError:  # in rewards it is looked at; other fields are carried into the pairs
            raise UserError(
                f"{source} record {record['id']} holds NaN or infinity, which is no JSON: mend or remove "
                "that field"
            ) from None
        side = "eval" if held_out(record["prompt"], eval_fraction, seed) else "train"
        selection.pairs.extend(pair | {"split": side, "source": source} | more for pair in pairs)
    selection.counts = {"records": records, "responses_left_out": dict(left_out), "read_as": read_as}
    return selection


def _records(paths, split, weighted, read_as):
    """Yield (source, record, what its pairs are to hold besides), and fill `read_as`: {source: kind}."""
    for path, more in zip(map(str, paths), weighted, strict=True):
        read_as[path], records = read_answers(path, split)
        yield from ((path, record, more) for record in records)
