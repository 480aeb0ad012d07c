"""Charts of the page, as plotly figures without colours: `meta` says which colour a trace takes, and page.js
paints it for the light or the dark page (`color`: the n-th run; `step`: from 0, the first iterate, to 1, the
last). What is shown, and in which section, is the list CHARTS.
"""

import html
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import plotly.graph_objects as go

from common.records import finite
from common.run_folder import KINDS
from evaluation import measures
from report.run_data import Run

MOST_POINTS = 2000  # of a line; longer logs are thinned evenly
DPO_CURVES = (
    ("loss", "loss", "loss", "eval_loss"),
    ("accuracy", "accuracy", "rewards/accuracies", "eval_rewards/accuracies"),
    ("margins", "implicit margin", "rewards/margins", "eval_rewards/margins"),
    ("grad_norm", "gradient norm", "grad_norm", None),
    ("learning_rate", "learning rate", "learning_rate", None),
)
PPO_CURVES = (
    ("reward", "reward"),
    ("kl", "KL, nats per response"),
    ("kl_per_token", "KL, nats per token"),
    ("response_length", "length, tokens"),
    ("entropy", "entropy, nats per token"),
    ("truncated_fraction", "cut off"),
    ("clip_fraction", "clipped"),
    ("policy_loss", "policy loss"),
    ("value_loss", "value loss"),
    ("explained_variance", "explained variance"),
    ("engine_kl", "KL between engine and trainer"),
    ("kl_coef", "KL coefficient"),
)

ROUND_CURVES = (  # title, {name of a line: its value of an entry of rounds.jsonl}
    (
        "reward of the sampled answers",
        {"mean": lambda e: e.get("reward"), "best of K": lambda e: e.get("best")},
    ),
    ("length, tokens", {"length": lambda e: e.get("length")}),
    ("KL to the start, nats per response", {"KL": lambda e: e.get("kl")}),
    ("implicit margin", {"margin": lambda e: e.get("margin")}),
    ("share of prompts whose answers tied", {"ties": lambda e: e["ties"] / e["prompts"]}),
    ("rounds behind", {"staleness": lambda e: e.get("staleness")}),
    (
        "share of time that waited",
        {
            "trainer": lambda e: e["seconds"].get("waiting", 0.0) / e["seconds"]["all"],
            "servers": lambda e: max(0.0, 1 - e["seconds"].get("sampling", 0.0) / e["seconds"]["all"]),
        },
    ),
)


def number(value: object) -> float | None:
    """A float short enough for a page; None where it is not finite."""
    return float(f"{value:.5g}") if finite(value) else None


def line(
    points: Iterable[tuple], name: str, color: dict, dash: str | None = None, **more: object
) -> go.Scatter | None:
    """One line; None without a point.

    Args:
        points: tuples of x, y and maybe what is shown beside the pointer. y is a number, a (value, low, high)
            with an error bar where low is not None, or None, which is left out.
        more: of plotly's trace.
    """
    points = [
        (x, y if isinstance(y, tuple) else (y, None, None), *said) for x, y, *said in points if y is not None
    ]
    if not points:
        return None
    if len(points[0]) > 2:
        more["text"] = [said for *_, said in points]
    values = [y for _, y, *_ in points]
    if any(low is not None for _, low, _ in values):
        sides = [(0, 0) if low is None else (high - v, v - low) for v, low, high in values]
        up, down = ([number(float(side)) for side in own] for own in zip(*sides, strict=True))
        bars = {"type": "data", "symmetric": False, "thickness": 1.3, "width": 4}
        more["error_y"] = bars | {"array": up, "arrayminus": down}
    if dash:
        more["line"] = {"dash": dash}
    return go.Scatter(
        x=[x for x, *_ in points],
        y=[number(float(value)) for value, *_ in values],
        name=html.escape(name),
        meta=color,
        **({"mode": "lines+markers"} | more),
    )


def chart(
    key: str,
    title: str,
    y: str,
    x: str,
    traces: list,
    definition: str,
    wide: bool = False,
    **layout: object,
) -> dict | None:
    """What the page needs of one chart; None without traces."""
    traces = [trace for trace in traces if trace is not None]
    if not traces:
        return None
    figure = go.Figure(traces)
    figure.update_layout(template="none", showlegend=len(traces) > 1, **layout)
    figure.update_xaxes(title={"text": x}, dtick=1 if x in ("iterate", "k") else None)
    figure.update_layout(yaxis_title_text=y)  # a second axis has its own
    if figure.layout.yaxis.rangemode == "tozero" and not any(v for trace in traces for v in trace.y):
        figure.update_layout(yaxis_range=[0, 1])  # of nothing but zeros plotly would show -1 to 1
    made = {"key": key, "title": title, "definition": definition, "wide": wide}
    return made | {"figure": figure.to_plotly_json()}


def label(run: Run, name: str, several: bool) -> str:
    return f"{run.name}, {name}" if several else name


def over_iterates(
    tables: list[tuple],
    key: str,
    title: str,
    y: str,
    get: Callable | None = None,
    definition: str | None = None,
    kinds: tuple[str, ...] = KINDS,
    **layout: object,
) -> dict | None:
    """A value of each iterate, a line for each run and kind; `get(row, kind)` gives a number or (value, low,
    high), without it the kind's figure `key`. The definition is that of `key`, too.
    """
    get, traces = get or (lambda row, kind: row[kind].get(key)), []
    for n, (run, iterates, *_) in enumerate(tables):
        for k, kind in enumerate(kinds):
            points = [(row["iterate"], get(row, kind)) for row in iterates]
            if len(tables) == 1:
                traces.append(line(points, kind, {"color": k}))
            else:
                name = label(run, kind, True) if len(kinds) > 1 else run.name
                traces.append(line(points, name, {"color": n}, "dot" if kind == "greedy" else None))
    return chart(key, title, y, "iterate", traces, definition or key, **layout)


def by_iterate(tables: list[tuple]) -> Iterator[tuple]:
    """(n, run, row, colour, dash) of the iterates whose curves are drawn: all of one run, first and last of
    several.
    """
    several = len(tables) > 1
    for n, (run, iterates, *_) in enumerate(tables):
        for k, row in enumerate(iterates):
            if not several:
                yield n, run, row, {"step": k / max(len(iterates) - 1, 1)}, None
            elif k in (0, len(iterates) - 1):
                yield n, run, row, {"color": n}, "dot" if k == 0 and len(iterates) > 1 else None


WINS = (  # figure, name, dash; of several runs the first two are drawn, the table has the rest
    ("reward_win", "by reward", None),
    ("lc_win", "at equal length", "dash"),
    ("gold_win", "by gold", "dot"),
    ("judge_win", "by the judge", "dashdot"),
)
EVEN = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0.5, "y1": 0.5}
EVEN |= {"line": {"dash": "dot", "width": 1, "color": "#888"}}


def wins(tables: list[tuple], against: str) -> dict | None:
    """Win rate by reward, plain and at equal length, of the sampled answers; by gold and by the judge where
    there are.
    """
    traces, several = [], len(tables) > 1
    for n, (run, iterates, *_) in enumerate(tables):
        versus = [(row["iterate"], (row["versus"].get(against) or {}).get("sampled", {})) for row in iterates]
        for k, (key, name, dash) in enumerate(WINS[:2] if several else WINS):
            color = {"color": n if several else k}
            points = [(i, own.get(key)) for i, own in versus]
            traces.append(line(points, label(run, name, several), color, dash if several else None))
    title = "Win rate over " + {"start": "the start", "previous": "the previous iterate"}[against]
    more = {"shapes": [EVEN], "yaxis": {"tickformat": ".0%"}}
    return chart(f"wins_{against}", title, "share of comparisons", "iterate", traces, "reward_win", **more)


def reward_by_length(tables: list[tuple]) -> dict | None:
    """Mean reward of sampled answers of about the same length, a line for each iterate."""
    traces = []
    for _, run, row, color, dash in by_iterate(tables):
        lengths = [it.answers["sampled"].lengths for it in run.iterates.values() if "sampled" in it.answers]
        answers = run.iterates[row["iterate"]].answers.get("sampled")
        edges = measures.length_edges(np.concatenate(lengths)) if lengths else []
        if answers is not None and len(edges) > 2:
            bins = filter(None, measures.by_length(answers.rewards, answers.lengths, edges))
            points = [(number(length), reward, f"{count} answers") for length, reward, count in bins]
            name = label(run, f"iterate {row['iterate']}", len(tables) > 1)
            traces.append(line(points, name, color, dash))
    title, x = "Reward of answers of the same length", "tokens of the answer"
    return chart("by_length", title, "mean reward", x, traces, "by_length")


def against_kl(tables: list[tuple]) -> dict | None:
    """Reward over KL: what each nat bought."""
    traces, several = [], len(tables) > 1
    for n, (run, iterates, *_) in enumerate(tables):
        known = [row for row in iterates if row["kl"] is not None]
        for k, quantity in enumerate(("reward",) if several else ("reward", "gold", "judge")):
            points = [
                (number(row["kl"]), value[0], f"iterate {row['iterate']}")
                for row in known
                if (value := row["sampled"].get(quantity))
            ]
            if len(points) > 1:
                name, color = label(run, quantity, several), {"color": n if several else k}
                traces.append(line(points, name, color, **({"yaxis": "y2"} if k else {})))
    axis = {"overlaying": "y", "side": "right", "title": {"text": "gold, judge"}, "showgrid": False}
    second = {"yaxis2": axis} if any(t.yaxis == "y2" for t in traces) else {}
    x = "KL to the reference, nats per response"
    return chart("against_kl", "Reward for each nat of KL", "reward", x, traces, "kl", **second)


def best_of(tables: list[tuple], key: str, title: str, y: str) -> dict | None:
    """A figure of the best of k answers, over k."""
    traces = []
    for _, run, row, color, dash in by_iterate(tables):
        name = label(run, f"iterate {row['iterate']}", len(tables) > 1)
        traces.append(line(enumerate(row["sampled"].get(key) or (), 1), name, color, dash))
    return chart(key, title, y, "k", traces, "best_of")


def histograms(tables: list[tuple]) -> dict | None:
    """Rewards that each iteration trained on."""
    trained = [
        (n, run, i, training.answers.rewards)
        for n, (run, *_) in enumerate(tables)
        for i, training in sorted(run.trainings.items())
        if training.answers
    ]
    values = np.concatenate([np.zeros(0), *(rewards for *_, rewards in trained)])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    traces, shape = [], {"mode": "lines", "line": {"shape": "hvh", "width": 1.5}, "fill": "tozeroy"}
    for k, (n, run, i, rewards) in enumerate(trained):
        edges, shares = measures.histogram(rewards, 40, float(values.min()), float(values.max()))
        middles = [number((a + b) / 2) for a, b in zip(edges, edges[1:])]
        color = {"color": n} if len(tables) > 1 else {"step": k / max(len(trained) - 1, 1)}
        name = label(run, f"iteration {i}", len(tables) > 1)
        traces.append(line(zip(middles, shares, strict=True), name, color | {"fill": True}, **shape))
    title, y = "Rewards of the training responses", "share of responses"
    return chart("histogram", title, y, "reward", traces, "histogram", wide=True)


def thin(points: list) -> list:
    """At most MOST_POINTS of them, evenly."""
    if len(points) <= MOST_POINTS:
        return points
    return [points[round(k)] for k in np.linspace(0, len(points) - 1, MOST_POINTS)]


def logged(run: Run, field: str) -> Iterator[tuple]:
    """Yield (step, value, its iteration in words) of a field of the trainer's log, steps counted on over the
    iterations.
    """
    before = 0
    for i, training in sorted(run.trainings.items()):
        last = 0
        for entry in training.history:
            step = entry["step"] if finite(entry.get("step")) else 0
            last = max(last, step)
            if finite(entry.get(field)):
                yield before + step, entry[field], f"iteration {i}"
        before += last


def dpo_curve(tables: list, key: str, title: str, own: str, held: str | None) -> dict | None:
    """A field of the trainer's log over the steps of all iterations in turn, and that of held-out pairs."""
    traces, several = [], len(tables) > 1
    for n, (run, *_) in enumerate(tables):
        points = thin(list(logged(run, own)))
        mode, color = "lines+markers" if len(points) < 60 else "lines", {"color": n if several else 0}
        traces.append(line(points, label(run, "training", several), color, mode=mode))
        if held:
            points, color = thin(list(logged(run, held))), {"color": n if several else 1}
            traces.append(line(points, label(run, "held-out pairs", several), color, mode="markers"))
    return chart(f"dpo_{key}", title.capitalize(), title, "optimizer step", traces, key)


def ppo_curve(tables: list, key: str, title: str) -> dict | None:
    """A field of PPO's log over its rollouts."""
    traces = []
    for n, (run, *_) in enumerate(tables):
        entries = [entry for _, t in sorted(run.trainings.items()) for entry in enumerate(t.ppo, 1)]
        points = [
            (entry["step"] if finite(entry.get("step")) else k, entry[key])
            for k, entry in entries
            if finite(entry.get(key))
        ]
        traces.append(line(thin(points), run.name, {"color": n}, mode="lines"))
    zero = {"yaxis": {"rangemode": "tozero"}} if key.endswith("_fraction") else {}
    return chart(f"ppo_{key}", f"PPO: {title}", title, "rollout", traces, "ppo_log", **zero)


def round_curve(tables: list, title: str, lines: dict[str, Callable]) -> dict | None:
    """Figures of each round of online training."""
    traces, several = [], len(tables) > 1
    for n, (run, *_) in enumerate(tables):
        for k, (name, value) in enumerate(lines.items()):
            points = []
            for entry in run.rounds:
                try:
                    points.append((entry["round"] + 1, value(entry)))
                except (KeyError, ZeroDivisionError, TypeError):  # of another version, or damaged
                    continue
            color = {"color": n * len(lines) + k}
            traces.append(line(thin(points), label(run, name, several), color, mode="lines"))
    key = f"round_{'_'.join(lines).replace(' ', '_')}"
    return chart(key, f"Online: {title}", title, "round", traces, "rounds_log")


def seconds(tables: list[tuple]) -> dict | None:
    """Working and waiting seconds of each step."""
    names, columns = [], {"working": [], "waiting": [], "not known": []}
    for run, _, _, steps in tables:
        for row in steps:
            names.append(html.escape(label(run, f"{row['policy']} {row['step']}", len(tables) > 1)))
            work = row["work"]
            parts = (0, 0, row["seconds"]) if work is None else (work, row["seconds"] - work, 0)
            for values, part in zip(columns.values(), parts, strict=True):
                values.append(number(part))
    colors = dict(zip(columns, (0, 1, 7), strict=True))
    traces = [
        go.Bar(x=names, y=values, name=name, meta={"color": colors[name]})
        for name, values in columns.items()
        if any(values)
    ]
    title, x = "Where the time went", "policy and step"
    return chart("seconds", title, "seconds", x, traces, "waiting", wide=True, barmode="stack")


def kl_of(row: dict, kind: str) -> tuple | None:
    """An iterate's KL and what one standard error less and more would be."""
    kl, error = row["kl"], row.get("kl_se")
    if kl is None:
        return None
    return (kl, None, None) if error is None else (kl, kl - error, kl + error)


def previous_wins(tables: list) -> dict | None:
    """Win rates over the previous iterate; after one iteration that is the start."""
    return wins(tables, "previous") if any(len(iterates) > 2 for _, iterates, *_ in tables) else None


def curve(key: str, title: str, y: str, **more: object) -> Callable:
    """What makes a chart of a figure over the iterates, see `over_iterates`."""
    return lambda tables: over_iterates(tables, key, title, y, **more)


SAMPLED = {"kinds": ("sampled",)}
FROM_ZERO = {"yaxis": {"rangemode": "tozero"}}
CHARTS = (  # section, what makes a chart of the tables, or None where nothing of it is known
    ("reward", curve("reward", "Held-out reward", "held-out reward")),
    ("reward", curve("gold", "Gold score", "gold score")),
    ("reward", curve("judge", "Second judge", "second judge")),
    ("wins", lambda tables: wins(tables, "start")),
    ("wins", previous_wins),
    ("length", reward_by_length),
    ("length", curve("length_correlation", "Reward and length within a prompt", "correlation", **SAMPLED)),
    ("drift", curve("kl", "KL to the reference", "nats per response", get=kl_of, **SAMPLED)),
    ("drift", against_kl),
    ("best", lambda tables: best_of(tables, "best_of", "Best of k", "reward")),
    ("best", lambda tables: best_of(tables, "gold_of_best", "Gold of the best of k by reward", "gold")),
    ("text", curve("length", "Length", "tokens")),
    ("text", curve("truncated", "Cut off", "share", **FROM_ZERO)),
    ("text", curve("repetition", "Repeated 4-grams", "share", **FROM_ZERO)),
    ("text", curve("distinct_2", "Distinct 2-grams", "share", definition="distinct", **FROM_ZERO)),
    ("text", curve("different_texts", "Different answers to a prompt", "share", **SAMPLED, **FROM_ZERO)),
    ("pairs", histograms),
    *(("training", lambda tables, one=one: dpo_curve(tables, *one)) for one in DPO_CURVES),
    *(("training", lambda tables, one=one: ppo_curve(tables, *one)) for one in PPO_CURVES),
    *(("training", lambda tables, one=one: round_curve(tables, *one)) for one in ROUND_CURVES),
    ("time", seconds),
)


def of_runs(tables: list) -> list[tuple]:
    """All charts: a list of (section, chart).

    Args:
        tables: list of (run, iterates, trainings, steps), see report/figures.py.
    """
    made = [(section, make(tables)) for section, make in CHARTS]
    return [(section, one) for section, one in made if one]
