"""The page itself: tables and texts by jinja2 with autoescape, charts and samples as JSON that page.js puts
in place.

One file, nothing fetched: plotly.js, the style and the script are inlined once. A content security policy
lets exactly these scripts run, by their hashes, and no request go out, so that text of a model could not do
either even if it were not shown as text. The plotly package brings only its full bundle (4.8 MB); the basic
one would be a quarter of that, but would have to be fetched from npm or kept in the project as a generated
file.
"""

import base64
import hashlib
import html
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation import measures
from report import charts, figures
from report.definitions import DEFINITIONS

HERE = Path(__file__).resolve().parent
SECTIONS = (
    ("reward", "Held-out reward"),
    ("wins", "Win rates"),
    ("length", "Is it only length?"),
    ("drift", "Distance from the reference"),
    ("best", "Best of k"),
    ("text", "Length, repetition, variety"),
    ("pairs", "What training saw"),
    ("training", "Training"),
    ("time", "Time"),
    ("settings", "Settings and versions"),
)
SHAPES = {  # how a figure is written
    "share": lambda v: f"{100 * v:.1f}%",
    "number": lambda v: f"{v:.3f}",
    "fine": lambda v: f"{v:.4g}",
    "tokens": lambda v: f"{v:.1f}",
    "count": lambda v: f"{v:,.0f}",
}


def as_json(value):
    """JSON that can stand inside <script>: ASCII only, and without <, > and &, so that no text can end the
    block.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(scripts):
    """Content-Security-Policy that lets only these scripts run and nothing be fetched."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "font-src data:; base-uri 'none'; form-action 'none'"
    )


def shown(value, shape="number"):
    """A figure as text; (value, low, high) with its interval, None as a dash."""
    if value is None:
        return "–"
    write = SHAPES[shape]
    if isinstance(value, tuple):
        return write(value[0]) + (f" [{write(value[1])}, {write(value[2])}]" if value[1] is not None else "")
    return write(value)


def table(caption, columns, rows):
    """A table for the template, without columns that hold nothing.

    Args:
        columns: list of (definition's key or None, heading). rows: list of lists of text.
    """
    kept = [k for k in range(len(columns)) if any(row[k] not in ("–", "") for row in rows)]
    return (
        {
            "caption": caption,
            "columns": [columns[k] for k in kept],
            "rows": [[row[k] for k in kept] for row in rows],
        }
        if rows
        else None
    )


def tables_of(tables):
    """The tables of all runs: a list of (section, table)."""
    found, several = [], len(tables) > 1
    name = (lambda run: [run.name]) if several else (lambda run: [])
    lead = [(None, "run")] if several else []
    rows, more, versus = [], [], []
    for run, iterates, _, _ in tables:
        for row in iterates:
            s, g = row["sampled"], row["greedy"]
            rows.append(
                [
                    *name(run),
                    str(row["iterate"]),
                    *(shown(side.get(q)) for q in figures.QUANTITIES for side in (s, g)),
                    shown((s.get("best_of") or [s.get("best_of_k")])[-1])
                    + (f" (K={len(s['best_of'])})" if s.get("best_of") else ""),
                    f"{shown(row['kl'])}" + (f" ±{row['kl_se']:.3f}" if row.get("kl_se") is not None else ""),
                    shown(row["kl_per_token"]),
                ]
            )
            for kind, side in (("sampled", s), ("greedy", g)):
                more.append(
                    [
                        *name(run),
                        str(row["iterate"]),
                        kind,
                        *(
                            shown(side.get(k), shape)
                            for k, shape in (
                                ("length", "tokens"),
                                ("length_p90", "tokens"),
                                ("truncated", "share"),
                                ("empty", "share"),
                                ("repetition", "share"),
                                ("looping", "share"),
                                ("distinct_1", "fine"),
                                ("distinct_2", "fine"),
                                ("distinct_3", "fine"),
                                ("different_texts", "share"),
                                ("tied", "share"),
                                ("spread", "number"),
                                ("length_correlation", "number"),
                                ("null_share", "share"),
                                ("prompts", "count"),
                            )
                        ),
                    ]
                )
            for against, other in row["versus"].items():
                if against == "previous" and other["iterate"] == (row["versus"].get("start") or {}).get(
                    "iterate"
                ):
                    continue  # the start is the previous one: said once
                for kind in ("sampled", "greedy"):
                    v = other[kind]
                    if v:
                        which = {"start": " (start)", "best": " (best before)"}.get(against, "")
                        versus.append(
                            [
                                *name(run),
                                f"{row['iterate']} against {other['iterate']}{which}",
                                kind,
                                shown(v.get("reward")),
                                shown(v.get("reward_win"), "share"),
                                shown(v.get("lc_win"), "share"),
                                "/".join(map(str, v["counts"])) if v.get("counts") else "–",
                                shown(v.get("gold")),
                                shown(v.get("gold_win"), "share"),
                                shown(v.get("judge")),
                                shown(v.get("judge_win"), "share"),
                            ]
                        )
    columns = [
        (q, f"{DEFINITIONS[q][0]}, {kind}") for q in figures.QUANTITIES for kind in ("sampled", "greedy")
    ]
    title = "Each iterate, with 95% intervals (KL ± its standard error)"
    found.append(
        (
            "reward",
            table(
                title,
                [
                    *lead,
                    ("iterate", "iterate"),
                    *columns,
                    ("best_of", "best of K"),
                    ("kl", "KL"),
                    ("kl_per_token", "KL per token"),
                ],
                rows,
            ),
        )
    )
    found.append(
        (
            "wins",
            table(
                "Iterates against each other, same prompts, with 95% intervals",
                [
                    *lead,
                    ("iterate", "iterate"),
                    ("sampled", "answers"),
                    ("reward", "reward, difference"),
                    ("reward_win", "win rate"),
                    ("lc_win", "at equal length"),
                    ("counts", "won/tied/lost"),
                    ("gold", "gold, difference"),
                    ("gold_win", "win rate by gold"),
                    ("judge", "judge, difference"),
                    ("judge_win", "win rate by judge"),
                ],
                versus,
            ),
        )
    )
    found.append(
        (
            "text",
            table(
                "Held-out answers",
                [
                    *lead,
                    ("iterate", "iterate"),
                    ("sampled", "answers"),
                    ("length", "length"),
                    ("length_p90", "90th percentile"),
                    ("truncated", "cut off"),
                    ("empty", "empty"),
                    ("repetition", "repeated"),
                    ("looping", "looping"),
                    ("distinct", "distinct-1"),
                    ("distinct", "distinct-2"),
                    ("distinct", "distinct-3"),
                    ("different_texts", "different"),
                    ("tied", "ties"),
                    ("spread", "spread"),
                    ("length_correlation", "reward and length"),
                    ("null_share", "null"),
                    (None, "prompts"),
                ],
                more,
            ),
        )
    )
    seen, trained, spent, sums = [], [], [], []
    for run, _, trainings, stages in tables:
        for row in trainings:
            r, i = row["rewards"], str(row["iteration"])
            if r:
                seen.append(
                    [
                        *name(run),
                        i,
                        shown(r["prompts"], "count"),
                        str(r["K"]),
                        shown(row["reward_mean"]),
                        *(
                            shown(r.get(k), shape)
                            for k, shape in (
                                ("spread", "number"),
                                ("tied", "share"),
                                ("all_equal", "share"),
                                ("at_top", "share"),
                                ("null_share", "share"),
                                ("different_texts", "share"),
                                ("length", "tokens"),
                                ("truncated", "share"),
                                ("empty", "share"),
                                ("length_correlation", "number"),
                            )
                        ),
                        shown(row["margin"]),
                        shown(row["chosen_longer"], "tokens"),
                    ]
                )
            if run.kind == "dpo":
                trained.append(
                    [
                        *name(run),
                        i,
                        shown(row["pairs"], "count"),
                        shown(row["eval_pairs"], "count"),
                        shown(row["loss"], "fine"),
                        shown(row["accuracy"], "share"),
                        shown(row["eval_accuracy"], "share"),
                        shown(row["grad_norm"], "fine"),
                    ]
                )
        for row in stages:
            spent.append(
                [
                    *name(run),
                    f"{row['iteration']} {row['stage']}",
                    shown(row["seconds"], "count"),
                    shown(row["work"], "count"),
                    shown(row["waiting"], "share"),
                    shown(row["tokens_per_second"], "count"),
                    shown(row["gpus"], "count"),
                    shown(row["gpu_hours"]),
                ]
            )
        if stages:
            known = [row for row in stages if row["work"] is not None]
            wall, gpu = sum(row["seconds"] for row in known), [row["gpu_hours"] for row in stages]
            work = sum(row["work"] for row in known)
            sums.append(
                [
                    *name(run),
                    "all",
                    shown(sum(row["seconds"] for row in stages), "count"),
                    shown(work, "count") if known else "–",
                    shown(1 - work / wall, "share") if wall else "–",
                    "",
                    "",
                    "–" if None in gpu else shown(sum(gpu)),
                ]
            )
    found.append(
        (
            "pairs",
            table(
                "Responses and pairs of each iteration",
                [
                    *lead,
                    ("iterate", "iteration"),
                    (None, "prompts"),
                    (None, "K"),
                    ("reward", "mean reward"),
                    ("spread", "spread"),
                    ("tied", "ties"),
                    ("all_equal", "all equal"),
                    ("at_top", "at the largest"),
                    ("null_share", "null"),
                    ("different_texts", "different"),
                    ("length", "length"),
                    ("truncated", "cut off"),
                    ("empty", "empty"),
                    ("length_correlation", "reward and length"),
                    ("margin", "margin of pairs"),
                    ("chosen_longer", "chosen longer by"),
                ],
                seen,
            ),
        )
    )
    found.append(
        (
            "training",
            table(
                "The end of each training",
                [
                    *lead,
                    ("iterate", "iteration"),
                    ("pairs", "pairs"),
                    ("pairs", "held out"),
                    ("loss", "loss"),
                    ("accuracy", "accuracy"),
                    ("eval_accuracy", "held-out accuracy"),
                    ("grad_norm", "gradient norm"),
                ],
                trained,
            ),
        )
    )
    found.append(
        (
            "time",
            table(
                "Stages",
                [
                    *lead,
                    (None, "stage"),
                    ("seconds", "seconds"),
                    ("work", "working"),
                    ("waiting", "waiting"),
                    ("tokens_per_second", "tokens/s"),
                    (None, "GPUs"),
                    ("gpu_hours", "GPU-hours"),
                ],
                spent + sums,
            ),
        )
    )
    runs = [run for run, *_ in tables]
    settings = [measures.flatten(run.settings) for run in runs]
    if several:
        rows = [
            [key, *map(text_of, values)]
            for key, values in measures.differing([run.settings for run in runs]).items()
        ]
        found.append(
            (
                "settings",
                table(
                    "What differs between the runs",
                    [(None, "setting"), *((None, run.name) for run in runs)],
                    rows,
                ),
            )
        )
        rows = [
            [key, *map(text_of, values)]
            for key, values in measures.differing([run.versions for run in runs]).items()
        ]
        found.append(
            (
                "settings",
                table("Versions that differ", [(None, "package"), *((None, run.name) for run in runs)], rows),
            )
        )
    keys = list(dict.fromkeys(key for one in settings for key in one))
    found.append(
        (
            "settings",
            table(
                "All settings",
                [(None, "setting"), *((None, run.name) for run in runs)],
                [[key, *(text_of(one.get(key)) for one in settings)] for key in keys],
            ),
        )
    )
    keys = list(dict.fromkeys(key for run in runs for key in run.versions))
    found.append(
        (
            "settings",
            table(
                "Versions",
                [(None, "package"), *((None, run.name) for run in runs)],
                [[key, *(text_of(run.versions.get(key)) for run in runs)] for key in keys],
            ),
        )
    )
    return [(section, made) for section, made in found if made]


def text_of(value):
    """A setting as YAML's reader would know it."""
    return (
        "–"
        if value is None
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False, default=str)
    )


def render(tables, troubles, samples, states, title=None):
    """The page as text.

    Args:
        tables: list of (run, iterates, trainings, stages), see report/figures.py.
        troubles: list of (run, list of troubles.Trouble). samples: of samples.collect.
        states: list of (word, detail) of the runs, see report/state.py.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((HERE / "page.html.j2").read_text(encoding="utf-8"))
    library = get_plotlyjs().replace("</script", "<\\/script")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    made = charts.of_runs(tables)
    sections = []
    for key, heading in SECTIONS:
        own = [chart for section, chart in made if section == key]
        listed = [one for section, one in tables_of(tables) if section == key]
        if own or listed:
            sections.append({"key": key, "heading": heading, "charts": own, "tables": listed})
    runs = [run for run, *_ in tables]
    return template.render(
        title=title or ", ".join(run.name for run in runs),
        runs=list(zip(runs, states, tables)),
        sections=sections,
        definitions=DEFINITIONS,
        in_short=[(run, figures.in_short(run, iterates, stages)) for run, iterates, _, stages in tables],
        troubles=troubles,
        samples=samples,
        samples_json=as_json(samples),
        charts_json=as_json({chart["key"]: chart["figure"] for _, chart in made}),
        names_json=as_json([html.escape(run.name) for run in runs]),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        library=library,
        policy=policy([library, script]),
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )
