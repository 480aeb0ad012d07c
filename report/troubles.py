"""What looks wrong in a run: pure functions over its figures. Each trouble has its figure and what to try."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg
from common.run_folder import KINDS
from evaluation.metrics import NOTHING_LEARNED, SAME_ANSWERS
from report.figures import Figures
from report.run_data import Run

LAST_ROUNDS = 10  # of online training, whose ties are looked at together
WIDER = 2.576 / 1.960  # half a normal's 99% interval, in halves of its 95% one


@dataclass
class Bounds:
    length_growth: float = arg(
        1.5, "mean length of the sampled held-out answers, as a multiple of the start's"
    )
    truncated: float = arg(0.1, "share of responses that hit the length limit")
    empty: float = arg(0.02, "share of responses without text")
    commonest: float = arg(0.8, "share of the greedy answers that are one and the same text")
    looping: float = arg(0.1, "share of responses at least half of whose 4-grams stood in them before")
    tied: float = arg(0.2, "share of the pairs of different responses to a prompt that have equal rewards")
    all_equal: float = arg(0.2, "share of prompts whose rewards are all equal")
    at_end: float = arg(0.5, "share of rewards that equal the largest, or the smallest, of the file")
    spread: float = arg(0.1, "mean spread of a prompt's rewards, as a share of the first iteration's")
    kl: float = arg(50.0, "KL to the reference, nats per response")
    kl_per_token: float = arg(1.0, "KL to the reference, nats per token")
    accuracy: float = arg(0.5, "accuracy on the pairs held out from training; 0.5 is chance")
    different_texts: float = arg(0.5, "mean share of different texts among the K responses to a prompt")
    distinct_2: float = arg(
        0.5, "distinct 2-grams of the sampled held-out answers, as a share of the start's"
    )
    same_answers: float = arg(
        SAME_ANSWERS, "share of the held-out answers that are word for word the previous iterate's"
    )
    null_share: float = arg(0.01, "share of rewards that are null")
    entropy: float = arg(0.1, "PPO's entropy at the end, as a share of its start's")


@dataclass
class Trouble:
    """`name` tells the kind; `where` the iterate or iteration; `figure` is what was found, with what was
    expected; `todo` what to try.
    """

    name: str
    title: str
    where: str
    figure: str
    todo: str


@dataclass(frozen=True)
class Kind:
    """A kind of trouble. `todo` is what to try, parts with `; ` between them; one that begins with the word
    of a trait and a colon is for runs with that trait alone (see `traits`).
    """

    name: str
    title: str
    todo: str

    def at(self, where: str, figure: str, what: str = "") -> Trouble:
        """One that was found; `what` stands in its title."""
        return Trouble(self.name, self.title.format(what), where, figure, self.todo)


def find(of: Figures, bounds: Bounds | None = None) -> list[Trouble]:
    """All troubles of a run, in the order of the checks."""
    bounds = bounds or Bounds()
    found = [
        *alike(of.iterates, bounds),
        *over_optimised(of.iterates),
        *length(of.iterates, bounds),
        *judges(of.iterates),
    ]
    for row in of.iterates:
        place = f"iterate {row['iterate']}"
        found += answers(row["sampled"], f"{place}, held-out answers", bounds)
        for check in (EMPTY, ONE_ANSWER):
            found += check.find(row["greedy"], f"{place}, greedy answers", bounds)
        found += guessed(row, place)
        found += drift(row.get("kl"), row.get("kl_per_token"), place, bounds)
    found += variety(of.iterates, bounds)
    for row in of.trainings:
        found += answers(row["rewards"], f"iteration {row['iteration']}, training responses", bounds)
        found += training(row, bounds)
    found += collapse(of.trainings, bounds)
    known = {row["iterate"] for row in of.iterates if row.get("kl") is not None}
    for i, entry in sorted(of.run.trainings.items()):
        found += ppo(entry.ppo, f"iteration {i}", bounds, i in known)
    found += rounds(of.run.rounds, bounds, bool(known))
    for trouble in found:
        trouble.todo = advice(trouble.todo, traits(of.run))
    return found


def traits(run: Run) -> set[str]:
    """What decides which advice fits: dpo or ppo, and whether a reward model scores (model) or a function
    alone (function).
    """
    annotation = run.settings.get("annotation")
    function = isinstance(annotation, dict) and annotation.get("reward_function")
    return {run.kind, "function" if function and not run.settings.get("reward_name_or_path") else "model"}


def advice(todo: str, known: set[str]) -> str:
    """`a, b, or c` of the parts that fit the traits `known`."""
    split = [part.rpartition(": ") for part in todo.split("; ")]
    fitting = [part for trait, _, part in split if not trait or trait in known]
    return ", ".join(fitting[:-1]) + (", or " if len(fitting) > 1 else "") + fitting[-1]


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def rises(triple: tuple | None) -> bool:
    """Whether the 95% interval of a difference lies above 0; not where there is none."""
    return triple is not None and triple[1] is not None and triple[1] > 0


def falls(triple: tuple | None) -> bool:
    """Whether the interval, widened to 99% as a normal's would be, lies below 0: a run has many comparisons,
    and few are to be false alarms.
    """
    return triple is not None and triple[2] is not None and triple[0] + WIDER * (triple[2] - triple[0]) < 0


def _shown(triple):
    return f"{triple[0]:+.3f} [{triple[1]:+.3f}, {triple[2]:+.3f}]"


# ---- Iterates against each other ---------------------------------------------------------------------------

ALIKE = Kind(
    "alike",
    "The iterate answers as the one before did",
    f"{NOTHING_LEARNED}; raise learning_rate; take more optimizer steps, by a smaller batch, more epochs or "
    f"prompts; on the CPU bf16 false",
)


def alike(iterates: list[dict], bounds: Bounds) -> Iterator[Trouble]:
    """Iterates that answer as the one before did: training has changed nothing that shows."""
    for row in iterates:
        versus = row["versus"].get("previous") or {}
        shares = {kind: same for kind in KINDS if (same := (versus.get(kind) or {}).get("same")) is not None}
        # few answers may be alike by themselves, greedy ones above all
        if shares and min(shares.values()) >= bounds.same_answers:
            figure = ", ".join(f"{percent(share)} of the {kind} answers" for kind, share in shares.items())
            yield ALIKE.at(
                f"iterate {row['iterate']} against iterate {versus['iterate']}",
                f"word for word the same: {figure} (bound {percent(bounds.same_answers)})",
            )


OVER_OPTIMISED = Kind(
    "over_optimised",
    "The reward rises while {} falls",
    "stop at the iterate before; lower the learning rate; dpo: raise beta; ppo: raise kl_coef; dpo: train "
    "fewer steps an iteration; ppo: train fewer rollouts; model: use a stronger reward model or several; "
    "function: change the reward function",
)
WIN_RATE_FALLS = Kind(
    "win_rate_falls",
    "The mean reward rises while most prompts are lost",
    "a few answers carry the mean, so read those with the largest rewards, and mend the reward there",
)


def over_optimised(iterates: list[dict]) -> list[Trouble]:
    """Reward up while gold, a second judge, or the share of prompts that are won falls, against the previous
    iterate, the start, or the best before: a fall in small steps, each of which may be chance.
    """
    found = []
    for row in iterates:
        seen = set()
        for against in ("previous", "start", "best"):
            compared = {kind: (row["versus"].get(against) or {}).get(kind) or {} for kind in KINDS}
            rising = [kind for kind in KINDS if rises(compared[kind].get("reward"))]
            for kind in rising:
                found += _bought(compared[kind], f"{kind} answers", _against(row, against), seen)
            for kind in set(KINDS).difference(rising) if rising else ():
                reward = f"{rising[0]} answers: reward {_shown(compared[rising[0]]['reward'])}"
                found += _fallen(compared[kind], f"{reward}; {kind} answers:", _against(row, against), seen)
    return [*found, *_over_optimised_by_averages(iterates)]


def _against(row, against):
    named = {"start": "the start", "previous": "the previous one"}.get(against)
    return f"iterate {row['iterate']} against " + (
        named or f"iterate {row['versus'][against]['iterate']}, the best before"
    )


def _bought(versus, answers, where, seen):
    """What a reward that rises has cost in one comparison; what was `seen` of an iterate is told once."""
    reward = f"{answers}: reward {_shown(versus['reward'])}"
    yield from _fallen(versus, f"{reward},", where, seen)
    win = versus.get("reward_win")
    if win and win[2] is not None and win[2] < 0.5 and "win" not in seen:
        seen.add("win")
        shares = f"{percent(win[0])} [{percent(win[1])}, {percent(win[2])}]"
        yield WIN_RATE_FALLS.at(where, f"{reward}, win rate {shares}")


def _fallen(versus, reward, where, seen):
    """What falls in one comparison where the reward rises, there or in answers of the other kind."""
    for quantity, name in (("gold", "gold"), ("judge", "the second judge's reward")):
        if falls(versus.get(quantity)) and quantity not in seen:
            seen.add(quantity)
            yield OVER_OPTIMISED.at(where, f"{reward} {name} {_shown(versus[quantity])}", name)


def _over_optimised_by_averages(iterates):
    """The same where answers are gone and averages are left."""
    written = [(row, row["sampled"].get("reward"), row["sampled"].get("gold")) for row in iterates]
    for (_, reward, gold), (row, reward_now, gold_now) in zip(written, written[1:]):
        if row["versus"].get("previous", {}).get("sampled"):
            continue
        if None in (reward, gold, reward_now, gold_now) or None in (*gold, *gold_now):
            continue
        if reward_now[0] > reward[0] and gold_now[2] < gold[1]:
            rewards, golds = (f"{a[0]:.3f} → {b[0]:.3f}" for a, b in ((reward, reward_now), (gold, gold_now)))
            figure = f"sampled answers: reward {rewards}, gold {golds}"
            yield OVER_OPTIMISED.at(_against(row, "previous"), figure, "gold")


ONLY_TRAINING_REWARD = Kind(
    "only_training_reward",
    "Only the training reward sees the gain",
    "read the held-out answers side by side; train with both rewards; dpo: train with more varied "
    "preferences",
)


def judges(iterates: list[dict]) -> Iterator[Trouble]:
    """A gain over the start that the training reward model sees and a second judge does not."""
    for row in iterates[-1:]:
        versus = (row["versus"].get("start") or {}).get("sampled") or {}
        judge = versus.get("judge")
        unseen = judge and judge[1] is not None and judge[1] <= 0 and not falls(judge)
        if rises(versus.get("reward")) and unseen:
            figure = f"reward {_shown(versus['reward'])}, second judge {_shown(judge)}"
            yield ONLY_TRAINING_REWARD.at(_against(row, "start"), figure)


PENALTY = "dpo: choose pairs with a length penalty (choose_type max_min_p with length_penalty)"
LENGTH_GROWTH = Kind(
    "length_growth",
    "The answers grow",
    f"look at the win rate at equal length; {PENALTY}; dpo: weigh length down in the loss (ld_alpha); ppo: "
    f"correct the reward for length",
)
LENGTH_ONLY, BREVITY_ONLY = (
    Kind(
        "length_only",
        f"The gain may be {what} alone",
        f"see whether the reward likes {taste} answers for their length; model: correct the reward for "
        f"length; function: change the reward function if that is not meant{more}",
    )
    for what, taste, more in (("length", "long", f"; {PENALTY}"), ("brevity", "short", ""))
)


def length(iterates: list[dict], bounds: Bounds) -> Iterator[Trouble]:
    """Answers that grow beyond the bound, and a gain that equal lengths do not show."""
    start = next((row["sampled"].get("length") for row in iterates if row["iterate"] == 0), None)
    for row in iterates[1:]:
        now = row["sampled"].get("length")
        if start and now and now > bounds.length_growth * start:
            times = f"{now / start:.2f} times the start's {start:.1f} (bound {bounds.length_growth})"
            yield LENGTH_GROWTH.at(f"iterate {row['iterate']}", f"{now:.1f} tokens, {times}")
    for row in iterates[-1:]:
        versus = (row["versus"].get("start") or {}).get("sampled") or {}
        rate, now = versus.get("lc_win"), row["sampled"].get("length")
        if rises(versus.get("reward")) and rate and rate[1] <= 0.5 and start and now and now != start:
            kind, won = LENGTH_ONLY if now > start else BREVITY_ONLY, percent(versus["reward_win"][0])
            equal = f"{percent(rate[0])} [{percent(rate[1])}, {percent(rate[2])}]"
            figure = f"{start:.1f} → {now:.1f} tokens; win rate {won}, at equal length {equal}"
            yield kind.at(_against(row, "start"), figure)


ALIKE_TEXTS = Kind(
    "few_distinct",
    "The answers become alike",
    "look at the answers side by side; lower the learning rate; dpo: raise beta; ppo: raise kl_coef",
)


def variety(iterates: list[dict], bounds: Bounds) -> Iterator[Trouble]:
    """Fewer different 2-grams than at the start, beyond what the bound allows."""
    start = next((row["sampled"].get("distinct_2") for row in iterates if row["iterate"] == 0), None)
    for row in iterates[1:]:
        now = row["sampled"].get("distinct_2")
        if start and now is not None and now < bounds.distinct_2 * start:
            times = f"{now / start:.2f} times the start's {start:.4f} (bound {bounds.distinct_2})"
            yield ALIKE_TEXTS.at(f"iterate {row['iterate']}", f"distinct 2-grams {now:.4f}, {times}")


# ---- One rewarded file -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check(Kind):
    """A bound on a share that `figures.of_answers` has of a rewarded file.

    `figure` has places for the share and K. `bound`: a name of Bounds, the key's own where it is empty.
    `needs`: another figure and its least value. `below`: whether a share below the bound is the bad one.
    """

    key: str
    figure: str
    bound: str = ""
    needs: tuple | None = None
    below: bool = False

    def find(self, figures: dict, where: str, bounds: Bounds) -> list[Trouble]:
        value, bound = figures.get(self.key), getattr(bounds, self.bound or self.key)
        if value is None or (self.needs and (figures.get(self.needs[0]) or 0) < self.needs[1]):
            return []
        if not (value < bound if self.below else value > bound):
            return []
        figure = self.figure.format(share=percent(value), K=figures.get("K"))
        return [self.at(where, f"{figure} (bound {percent(bound)})")]


EMPTY = Check(
    "empty",
    "Answers are empty",
    "see what an empty answer is rewarded with; dpo: let it be rejected (drop_empty false); lower the "
    "learning rate",
    "empty",
    "{share} have no text",
)
ONE_ANSWER = Check(
    "one_answer",
    "Most prompts get one and the same answer",
    "read the answers, since the prompts may be of a kind that the policy cannot answer, or the template not "
    "its own; lower the learning rate",
    "commonest",
    "{share} of the answers are one text",
    needs=("prompts", 10),
)
TRUNCATED = Check(
    "truncated",
    "Many answers are cut off",
    "raise max_new_tokens; dpo: leave cut answers out of the pairs (drop_truncated); ppo: set "
    "missing_eos_penalty; see why the policy does not end",
    "truncated",
    "{share} hit the length limit",
)
CHECKS = (
    EMPTY,
    TRUNCATED,
    Check(
        "looping",
        "Many answers repeat themselves",
        "lower the learning rate; model: train the reward model with repeated answers among its negatives; "
        "function: take something off for repetition in the reward function",
        "looping",
        "{share} consist of repetition for half or more",
    ),
    Check(
        "ties",
        "Many rewards are ties",
        "the reward cannot tell them apart, so use a finer one; dpo: leave such pairs out with min_margin",
        "tied",
        "{share} of the pairs of different answers to a prompt have equal rewards",
        needs=("K", 2),
    ),
    Check(
        "collapsed",
        "A prompt's rewards are often all equal",
        "these prompts teach nothing, so raise the temperature; dpo: raise K; see whether the reward still "
        "tells answers apart",
        "all_equal",
        "in {share} of the prompts",
        needs=("K", 2),
    ),
    Check(
        "few_distinct",
        "Few different answers",
        "raise the temperature or top_p; go back to an iterate that still varies",
        "different_texts",
        "on average {share} of a prompt's {K} answers differ",
        needs=("K", 2),
        below=True,
    ),
    *(
        Check(
            "saturated",
            "The rewards are saturated",
            "the scale is used up, so use harder prompts; a reward without a ceiling (the logit instead of a "
            "probability)",
            key,
            f"{{share}} equal the {end} reward of the file",
            bound="at_end",
            needs=("responses", 20),
        )
        for key, end in (("at_top", "largest"), ("at_bottom", "smallest"))
    ),
    Check(
        "null_rewards",
        "Rewards are missing",
        "model: see the skipped files and the log of annotation, where answers that are too long for the "
        "reward model are the usual cause; function: see the log of annotation, as the reward function gives "
        "none or NaN for these answers",
        "null_share",
        "{share} of the rewards are null",
    ),
)


def answers(figures: dict, where: str, bounds: Bounds) -> list[Trouble]:
    """Troubles of one rewarded file."""
    return [trouble for check in CHECKS for trouble in check.find(figures, where, bounds)]


# ---- KL and training ---------------------------------------------------------------------------------------

GUESSED = Kind(
    "kl_guessed",
    "The KL cannot be trusted",
    "generate the answers with their token ids (response_token_ids), as both generation scripts do",
)
FAR = Kind(
    "kl",
    "The policy is far from the reference",
    "dpo: raise beta; ppo: raise kl_coef, or set kl_target; lower the learning rate; train fewer steps",
)
EVAL_ACCURACY = Kind(
    "eval_accuracy",
    "Accuracy on held-out pairs is below chance",
    "read the pairs, whose chosen and rejected may be swapped, or be noise; raise min_margin; lower the "
    "learning rate",
)
NOT_FINITE = Kind(
    "not_finite",
    "Training met numbers that are not finite",
    "lower the learning rate; train in bfloat16 rather than float16; look for broken records",
)
SPREAD = Kind(
    "collapsed",
    "The rewards of a prompt have drawn together",
    "there is little left to prefer, so raise the temperature; use harder prompts; stop here",
)
ENTROPY = Kind(
    "entropy",
    "The policy has become nearly certain",
    "raise kl_coef; lower the learning rate; train fewer passes over a rollout",
)


def guessed(row: dict, where: str) -> list[Trouble]:
    """A KL of other tokens than were sampled, for most of the answers."""
    other, responses = row.get("retokenised"), row.get("responses")
    if not other or other <= responses / 2:
        return []
    figure = f"{other:.0f} of {responses:.0f} responses were sampled in other tokens than their text gives"
    return [GUESSED.at(where, figure)]


def drift(kl: float | None, per_token: float | None, where: str, bounds: Bounds) -> list[Trouble]:
    """KL beyond its bound."""
    if (kl is None or kl <= bounds.kl) and (per_token is None or per_token <= bounds.kl_per_token):
        return []
    figures = [f"{kl:.1f} nats per response (bound {bounds.kl:g})"] if kl is not None else []
    if per_token is not None:
        figures.append(f"{per_token:.2f} per token (bound {bounds.kl_per_token:g})")
    return [FAR.at(where, ", ".join(figures))]


def training(row: dict, bounds: Bounds) -> Iterator[Trouble]:
    """Troubles of one iteration's optimisation."""
    where, accuracy = f"iteration {row['iteration']}", row.get("eval_accuracy")
    if accuracy is not None and accuracy < bounds.accuracy:
        of = f" of {row['eval_pairs']} pairs" if row.get("eval_pairs") else ""
        yield EVAL_ACCURACY.at(where, percent(accuracy) + of)
    if row.get("not_finite"):
        yield NOT_FINITE.at(where, f"{row['not_finite']} entries of its log")


def collapse(trainings: list[dict], bounds: Bounds) -> Iterator[Trouble]:
    """The spread of a prompt's rewards, against the first iteration's."""
    known = [(row["iteration"], row["rewards"].get("spread")) for row in trainings]
    known = [(i, spread) for i, spread in known if spread is not None]
    for i, spread in known[1:]:
        first = known[0][1]
        if first > 0 and spread < bounds.spread * first:
            times = f"{spread / first:.2f} times the first iteration's (bound {bounds.spread})"
            yield SPREAD.at(f"iteration {i}, training responses", f"their spread is {spread:.4f}, {times}")


def ppo(log: list[dict], where: str, bounds: Bounds, kl_known: bool) -> Iterator[Trouble]:
    """Troubles of PPO's own log; KL only where no iterate has its own figure."""
    if not log:
        return
    last, place = log[-1], f"{where}, PPO's last rollout"
    if not kl_known:
        yield from drift(last.get("kl"), last.get("kl_per_token"), place, bounds)
    cut = last.get("truncated_fraction")
    if cut is not None and cut > bounds.truncated:
        yield TRUNCATED.at(place, f"{percent(cut)} hit the length limit (bound {percent(bounds.truncated)})")
    entropies = [entry["entropy"] for entry in log if "entropy" in entry]
    if entropies and 0 < entropies[0] and entropies[-1] < bounds.entropy * entropies[0]:
        figure = f"entropy {entropies[0]:.3f} → {entropies[-1]:.3f} nats per token"
        yield ENTROPY.at(f"{where}, PPO", f"{figure} (bound {bounds.entropy} of the start)")


def rounds(log: list[dict], bounds: Bounds, kl_known: bool) -> Iterator[Trouble]:
    """Troubles of the last rounds of online training; KL only where no policy has its own figure."""
    last = log[-LAST_ROUNDS:]
    if not last:
        return
    where = f"rounds {last[0]['round'] + 1} to {last[-1]['round'] + 1}"
    if not kl_known:
        yield from drift(last[-1].get("kl"), last[-1].get("kl_per_token"), where, bounds)
    known = [entry for entry in last if entry.get("prompts") and "ties" in entry]
    if known:
        tied = sum(entry["ties"] for entry in known) / sum(entry["prompts"] for entry in known)
        yield from answers({"all_equal": tied, "K": 2}, where, bounds)  # K: at least
    lengths = [entry["length"] for entry in (log[0], last[-1]) if entry.get("length")]
    if len(lengths) == 2 and lengths[1] > bounds.length_growth * lengths[0]:
        times = f"{lengths[1] / lengths[0]:.2f} times the first round's {lengths[0]:.1f}"
        yield LENGTH_GROWTH.at(where, f"{lengths[1]:.1f} tokens, {times} (bound {bounds.length_growth})")
