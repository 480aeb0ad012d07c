"""What looks wrong in a run: pure functions over its figures. Each trouble has its figure and what to try."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg
from common.run_folder import KINDS
from evaluation.metrics import NOTHING_LEARNED, SAME_ANSWERS
from report.run_data import Run

PENALTY = "choose pairs with a length penalty (choose_type max_min_p with length_penalty)"
WIDER = 2.576 / 1.960  # half a normal's 99% interval, in halves of its 95% one


@dataclass
class Bounds:
    length_growth: float = arg(
        1.5, "mean length of the sampled held-out answers, as a multiple of the start's"
    )
    truncated: float = arg(0.1, "share of responses that hit the length limit")
    empty: float = arg(0.02, "share of responses without text")
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
    expected.

    `todo` is what to try: a list of texts, and of (trait, text) for runs with that trait alone (see
    `traits`); `find` makes one text of it.
    """

    name: str
    title: str
    where: str
    figure: str
    todo: str | list


def find(
    run: Run, iterates: list[dict], trainings: list[dict], bounds: Bounds | None = None
) -> list[Trouble]:
    """All troubles of a run, in the order of the checks.

    Args:
        run: run_data.Run. iterates, trainings: of figures.of_iterates and figures.of_trainings.
        bounds: Bounds.
    """
    bounds = bounds or Bounds()
    found = [
        *alike(iterates, bounds),
        *over_optimised(iterates),
        *length(iterates, bounds),
        *judges(iterates),
    ]
    for row in iterates:
        found += answers(row["sampled"], f"iterate {row['iterate']}, held-out answers", bounds)
        found += EMPTY.find(row["greedy"], f"iterate {row['iterate']}, greedy answers", bounds)
        found += guessed(row, f"iterate {row['iterate']}")
        found += drift(row.get("kl"), row.get("kl_per_token"), f"iterate {row['iterate']}", bounds)
    found += variety(iterates, bounds)
    for row in trainings:
        found += answers(row["rewards"], f"iteration {row['iteration']}, training responses", bounds)
        found += training(row, bounds)
    found += collapse(trainings, bounds)
    for i, entry in sorted(run.trainings.items()):
        found += ppo(
            entry.ppo,
            f"iteration {i}",
            bounds,
            any(row["iterate"] == i and row.get("kl") is not None for row in iterates),
        )
    known = traits(run)
    for trouble in found:
        trouble.todo = advice(trouble.todo, known)
    return found


def traits(run: Run) -> set[str]:
    """What decides which advice fits: dpo or ppo, and whether a reward model scores (model) or a function
    alone (function).
    """
    annotation = run.settings.get("annotation")
    function = (
        isinstance(annotation, dict)
        and annotation.get("reward_function")
        and not run.settings.get("reward_name_or_path")
    )
    return {run.kind, "function" if function else "model"}


def advice(parts: list, known: set[str]) -> str:
    """`a, b, or c` of the parts that fit the traits `known`."""
    fitting = [
        part if isinstance(part, str) else part[1]
        for part in parts
        if isinstance(part, str) or part[0] in known
    ]
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


def alike(iterates: list[dict], bounds: Bounds) -> list[Trouble]:
    """Iterates that answer as the one before did: training has changed nothing that shows."""
    found = []
    for row in iterates:
        versus = row["versus"].get("previous") or {}
        shares = {kind: same for kind in KINDS if (same := (versus.get(kind) or {}).get("same")) is not None}
        if (
            shares and min(shares.values()) >= bounds.same_answers
        ):  # few answers may be alike by themselves, greedy ones above all
            figure = ", ".join(f"{percent(share)} of the {kind} answers" for kind, share in shares.items())
            found.append(
                Trouble(
                    "alike",
                    "The iterate answers as the one before did",
                    f"iterate {row['iterate']} against iterate {versus['iterate']}",
                    f"word for word the same: {figure} (bound {percent(bounds.same_answers)})",
                    [
                        NOTHING_LEARNED,
                        "raise learning_rate",
                        "take more optimizer steps: a smaller batch, more epochs or prompts",
                        "on the CPU bf16 false",
                    ],
                )
            )
    return found


OVER_OPTIMISED = [
    "stop at the iterate before",
    "lower the learning rate",
    ("dpo", "raise beta"),
    ("ppo", "raise kl_coef"),
    ("dpo", "train fewer steps an iteration"),
    ("ppo", "train fewer rollouts"),
    ("model", "use a stronger reward model or several"),
    ("function", "change the reward function"),
]


def over_optimised(iterates: list[dict]) -> list[Trouble]:
    """Reward up while gold, a second judge, or the share of prompts that are won falls, against the previous
    iterate, the start, or the best before: a fall in small steps, each of which may be chance.
    """
    found = []
    for row in iterates:
        seen = set()
        for against in ("previous", "start", "best"):
            for kind in KINDS:
                versus = (row["versus"].get(against) or {}).get(kind) or {}
                if rises(versus.get("reward")):
                    found += _bought(versus, f"{kind} answers", _against(row, against), seen)
    return found + _over_optimised_by_averages(iterates)


def _bought(versus, answers, where, seen):
    """What a reward that rises has cost in one comparison; what was `seen` of an iterate is told once."""
    found, reward = [], f"{answers}: reward {_shown(versus['reward'])}"
    for quantity, name in (("gold", "gold"), ("judge", "the second judge's reward")):
        if falls(versus.get(quantity)) and quantity not in seen:
            seen.add(quantity)
            figure = f"{reward}, {name} {_shown(versus[quantity])}"
            title = f"The reward rises while {name} falls"
            found.append(Trouble("over_optimised", title, where, figure, OVER_OPTIMISED))
    win = versus.get("reward_win")
    if win and win[2] is not None and win[2] < 0.5 and "win" not in seen:
        seen.add("win")
        figure = f"{reward}, win rate {percent(win[0])} [{percent(win[1])}, {percent(win[2])}]"
        title = "The mean reward rises while most prompts are lost"
        todo = "a few answers carry the mean: read those with the largest rewards, and mend the reward there"
        found.append(Trouble("win_rate_falls", title, where, figure, [todo]))
    return found


def _over_optimised_by_averages(iterates):
    """The same where answers are gone and averages are left."""
    found = []
    written = [(row, row["sampled"].get("reward"), row["sampled"].get("gold")) for row in iterates]
    for (_, reward, gold), (row, reward_now, gold_now) in zip(written, written[1:]):
        if row["versus"].get("previous", {}).get("sampled"):
            continue
        if None in (reward, gold, reward_now, gold_now) or None in (*gold, *gold_now):
            continue
        if reward_now[0] > reward[0] and gold_now[2] < gold[1]:
            found.append(
                Trouble(
                    "over_optimised",
                    "The reward rises while gold falls",
                    f"iterate {row['iterate']} against the previous one",
                    f"sampled answers: reward {reward[0]:.3f} → {reward_now[0]:.3f}, gold {gold[0]:.3f} → "
                    f"{gold_now[0]:.3f}",
                    OVER_OPTIMISED,
                )
            )
    return found


def _against(row, against):
    if against == "best":
        return f"iterate {row['iterate']} against iterate {row['versus']['best']['iterate']}, the best before"
    return f"iterate {row['iterate']} against the {against if against == 'start' else 'previous one'}"


def judges(iterates: list[dict]) -> list[Trouble]:
    """A gain over the start that the training reward model sees and a second judge does not."""
    found = []
    for row in iterates[-1:]:
        versus = (row["versus"].get("start") or {}).get("sampled") or {}
        judge = versus.get("judge")
        if (
            rises(versus.get("reward"))
            and judge
            and judge[1] is not None
            and judge[1] <= 0
            and not falls(judge)
        ):
            found.append(
                Trouble(
                    "only_training_reward",
                    "Only the training reward sees the gain",
                    f"iterate {row['iterate']} against the start",
                    f"reward {_shown(versus['reward'])}, second judge {_shown(judge)}",
                    [
                        "read the held-out answers side by side",
                        "train with both rewards",
                        ("dpo", "train with more varied preferences"),
                    ],
                )
            )
    return found


def length(iterates: list[dict], bounds: Bounds) -> list[Trouble]:
    """Answers that grow beyond the bound, and a gain that equal lengths do not show."""
    found = []
    start = next((row["sampled"].get("length") for row in iterates if row["iterate"] == 0), None)
    for row in iterates[1:]:
        now = row["sampled"].get("length")
        if start and now and now > bounds.length_growth * start:
            found.append(
                Trouble(
                    "length_growth",
                    "The answers grow",
                    f"iterate {row['iterate']}",
                    f"{now:.1f} tokens, {now / start:.2f} times the start's {start:.1f} (bound "
                    f"{bounds.length_growth})",
                    [
                        "look at the win rate at equal length",
                        ("dpo", PENALTY),
                        ("dpo", "weigh length down in the loss (ld_alpha)"),
                        ("ppo", "correct the reward for length"),
                    ],
                )
            )
    for row in iterates[-1:]:
        versus = (row["versus"].get("start") or {}).get("sampled") or {}
        rate, now = versus.get("lc_win"), row["sampled"].get("length")
        if rises(versus.get("reward")) and rate and rate[1] <= 0.5 and start and now and now != start:
            longer = now > start
            title, taste = (
                ("The gain may be length alone", "long")
                if longer
                else ("The gain may be brevity alone", "short")
            )
            found.append(
                Trouble(
                    "length_only",
                    title,
                    f"iterate {row['iterate']} against the start",
                    f"{start:.1f} → {now:.1f} tokens; win rate {percent(versus['reward_win'][0])}, at equal "
                    f"length {percent(rate[0])} "
                    f"[{percent(rate[1])}, {percent(rate[2])}]",
                    [
                        f"see whether the reward likes {taste} answers for their length",
                        ("model", "correct the reward for length"),
                        ("function", "change the reward function if that is not meant"),
                        *([("dpo", PENALTY)] if longer else []),
                    ],
                )
            )
    return found


@dataclass(frozen=True)
class Check:
    """A bound on a share that `figures.of_answers` has of a rewarded file.

    `figure` has places for the share, its bound and K. `needs`: another figure and its least value.
    """

    key: str
    bound: str  # a name of Bounds
    name: str
    title: str
    figure: str
    todo: list
    needs: tuple | None = None
    below: bool = False  # whether a share below the bound is the bad one

    def find(self, figures: dict, where: str, bounds: Bounds) -> list:
        value, bound = figures.get(self.key), getattr(bounds, self.bound)
        if value is None or (self.needs and (figures.get(self.needs[0]) or 0) < self.needs[1]):
            return []
        if not (value < bound if self.below else value > bound):
            return []
        figure = self.figure.format(share=percent(value), bound=percent(bound), K=figures.get("K"))
        return [Trouble(self.name, self.title, where, figure, self.todo)]


EMPTY = Check(
    "empty",
    "empty",
    "empty",
    "Answers are empty",
    "{share} have no text (bound {bound})",
    [
        "see what an empty answer is rewarded with",
        ("dpo", "let it be rejected (drop_empty false)"),
        "lower the learning rate",
    ],
)
CHECKS = (
    EMPTY,
    Check(
        "truncated",
        "truncated",
        "truncated",
        "Many answers are cut off",
        "{share} hit the length limit (bound {bound})",
        [
            "raise max_new_tokens",
            ("dpo", "leave cut answers out of the pairs (drop_truncated)"),
            ("ppo", "set missing_eos_penalty"),
            "see why the policy does not end",
        ],
    ),
    Check(
        "looping",
        "looping",
        "looping",
        "Many answers repeat themselves",
        "{share} consist of repetition for half or more (bound {bound})",
        [
            "lower the learning rate",
            ("model", "train the reward model with repeated answers among its negatives"),
            ("function", "take something off for repetition in the reward function"),
        ],
    ),
    Check(
        "tied",
        "tied",
        "ties",
        "Many rewards are ties",
        "{share} of the pairs of different answers to a prompt have equal rewards (bound {bound})",
        [
            "the reward cannot tell them apart: use a finer one",
            ("dpo", "leave such pairs out with min_margin"),
        ],
        needs=("K", 2),
    ),
    Check(
        "all_equal",
        "all_equal",
        "collapsed",
        "A prompt's rewards are often all equal",
        "in {share} of the prompts (bound {bound})",
        [
            "these prompts teach nothing: raise the temperature",
            ("dpo", "raise K"),
            "see whether the reward still tells answers apart",
        ],
        needs=("K", 2),
    ),
    Check(
        "different_texts",
        "different_texts",
        "few_distinct",
        "Few different answers",
        "on average {share} of a prompt's {K} answers differ (bound {bound})",
        ["raise the temperature or top_p", "go back to an iterate that still varies"],
        needs=("K", 2),
        below=True,
    ),
    *(
        Check(
            key,
            "at_end",
            "saturated",
            "The rewards are saturated",
            f"{{share}} equal the {end} reward of the file (bound {{bound}})",
            [
                "the scale is used up: use harder prompts",
                "a reward without a ceiling (the logit instead of a probability)",
            ],
            needs=("responses", 20),
        )
        for key, end in (("at_top", "largest"), ("at_bottom", "smallest"))
    ),
    Check(
        "null_share",
        "null_share",
        "null_rewards",
        "Rewards are missing",
        "{share} of the rewards are null (bound {bound})",
        [
            (
                "model",
                "see the skipped files and the log of annotation: answers that are too long for the reward "
                "model are the usual cause",
            ),
            (
                "function",
                "see the log of annotation: the reward function gives none or NaN for these answers",
            ),
        ],
    ),
)


def answers(figures: dict, where: str, bounds: Bounds) -> list[Trouble]:
    """Troubles of one rewarded file."""
    return [trouble for check in CHECKS for trouble in check.find(figures, where, bounds)]


def variety(iterates: list[dict], bounds: Bounds) -> list[Trouble]:
    """Fewer different 2-grams than at the start, beyond what the bound allows."""
    start = next((row["sampled"].get("distinct_2") for row in iterates if row["iterate"] == 0), None)
    return [
        Trouble(
            "few_distinct",
            "The answers become alike",
            f"iterate {row['iterate']}",
            f"distinct 2-grams {now:.4f}, {now / start:.2f} times the start's {start:.4f} (bound "
            f"{bounds.distinct_2})",
            [
                "look at the answers side by side",
                "lower the learning rate",
                ("dpo", "raise beta"),
                ("ppo", "raise kl_coef"),
            ],
        )
        for row in iterates[1:]
        if start and (now := row["sampled"].get("distinct_2")) is not None and now < bounds.distinct_2 * start
    ]


def guessed(row: dict, where: str) -> list[Trouble]:
    """A KL of other tokens than were sampled, for most of the answers."""
    if not row.get("retokenised") or row["retokenised"] <= row["responses"] / 2:
        return []
    return [
        Trouble(
            "kl_guessed",
            "The KL cannot be trusted",
            where,
            f"{row['retokenised']:.0f} of {row['responses']:.0f} responses were sampled in other tokens than "
            "their text gives",
            ["generate the answers with their token ids (response_token_ids), as both generation scripts do"],
        )
    ]


def drift(kl: float | None, per_token: float | None, where: str, bounds: Bounds) -> list[Trouble]:
    """KL beyond its bound."""
    if (kl is None or kl <= bounds.kl) and (per_token is None or per_token <= bounds.kl_per_token):
        return []
    figure = f"{kl:.1f} nats per response (bound {bounds.kl:g})" if kl is not None else ""
    figure += f", {per_token:.2f} per token (bound {bounds.kl_per_token:g})" if per_token is not None else ""
    return [
        Trouble(
            "kl",
            "The policy is far from the reference",
            where,
            figure.strip(", "),
            [
                ("dpo", "raise beta"),
                ("ppo", "raise kl_coef, or set kl_target"),
                "lower the learning rate",
                "train fewer steps",
            ],
        )
    ]


def training(row: dict, bounds: Bounds) -> list[Trouble]:
    """Troubles of one iteration's optimisation."""
    found, where = [], f"iteration {row['iteration']}"
    if row.get("eval_accuracy") is not None and row["eval_accuracy"] < bounds.accuracy:
        count = f" of {row['eval_pairs']} pairs" if row.get("eval_pairs") else ""
        found.append(
            Trouble(
                "eval_accuracy",
                "Accuracy on held-out pairs is below chance",
                where,
                f"{percent(row['eval_accuracy'])}{count}",
                [
                    "read the pairs: chosen and rejected may be swapped, or be noise",
                    "raise min_margin",
                    "lower the learning rate",
                ],
            )
        )
    if row.get("not_finite"):
        found.append(
            Trouble(
                "not_finite",
                "Training met numbers that are not finite",
                where,
                f"{row['not_finite']} entries of its log",
                [
                    "lower the learning rate",
                    "train in bfloat16 rather than float16",
                    "look for broken records",
                ],
            )
        )
    return found


def collapse(trainings: list[dict], bounds: Bounds) -> list[Trouble]:
    """The spread of a prompt's rewards, against the first iteration's."""
    known = [
        (row["iteration"], row["rewards"].get("spread"))
        for row in trainings
        if row["rewards"].get("spread") is not None
    ]
    return [
        Trouble(
            "collapsed",
            "The rewards of a prompt have drawn together",
            f"iteration {i}, training responses",
            f"their spread is {spread:.4f}, {spread / known[0][1]:.2f} times the first iteration's (bound "
            f"{bounds.spread})",
            ["there is little left to prefer: raise the temperature", "use harder prompts", "stop here"],
        )
        for i, spread in known[1:]
        if known[0][1] > 0 and spread < bounds.spread * known[0][1]
    ]


def ppo(log: list[dict], where: str, bounds: Bounds, kl_known: bool) -> list[Trouble]:
    """Troubles of PPO's own log; KL only where no iterate has its own figure."""
    found = []
    if not log:
        return found
    last = log[-1]
    if not kl_known:
        found += drift(last.get("kl"), None, f"{where}, PPO's last rollout", bounds)
    if (
        isinstance(last.get("truncated_fraction"), (int, float))
        and last["truncated_fraction"] > bounds.truncated
    ):
        found.append(
            Trouble(
                "truncated",
                "Many answers are cut off",
                f"{where}, PPO's last rollout",
                f"{percent(last['truncated_fraction'])} hit the length limit (bound "
                f"{percent(bounds.truncated)})",
                ["raise max_new_tokens", "set missing_eos_penalty"],
            )
        )
    entropies = [entry["entropy"] for entry in log if isinstance(entry.get("entropy"), (int, float))]
    if len(entropies) > 1 and entropies[0] > 0 and entropies[-1] < bounds.entropy * entropies[0]:
        found.append(
            Trouble(
                "entropy",
                "The policy has become nearly certain",
                f"{where}, PPO",
                f"entropy {entropies[0]:.3f} → {entropies[-1]:.3f} nats per token (bound {bounds.entropy} of "
                "the start)",
                ["raise kl_coef", "lower the learning rate", "train fewer passes over a rollout"],
            )
        )
    return found
