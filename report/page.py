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
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.run_folder import KINDS, RunFolder, read_object
from evaluation.metrics import NOT_EVALUATED
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
SHAPES = {  # how a number that is not whole is written
    "number": lambda v: f"{v:.3f}",
    "fine": lambda v: f"{v:.4g}",
    "share": lambda v: f"{100 * v:.1f}%",
    "tokens": lambda v: f"{v:.1f}",
    "count": lambda v: f"{v:,.0f}",
}


def as_json(value: object) -> str:
    """JSON that can stand inside <script>: ASCII only, and without <, > and &, so that no text can end the
    block.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(scripts: list[str]) -> str:
    """Content-Security-Policy that lets only these scripts run and nothing be fetched."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "font-src data:; base-uri 'none'; form-action 'none'"
    )


def shown(value: object, shape: str = "number") -> str:
    """A figure as text; (value, low, high) with its interval, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        interval = f" [{shown(value[1], shape)}, {shown(value[2], shape)}]"
        return shown(value[0], shape) + ("" if value[1] is None else interval)
    return f"{value:,}" if isinstance(value, int) else SHAPES[shape](value)


def iterates(of: figures.Figures) -> Iterator[dict]:
    """A row for each iterate; the one that evaluation/select_iterate.py has chosen is marked."""
    chosen = read_object(RunFolder(of.run.folder).choice).get("iterate") if len(of.iterates) > 1 else None
    for row in of.iterates:
        curve = row["sampled"].get("best_of")
        best = f"{shown(curve[-1])} (K={len(curve)})" if curve else row["sampled"].get("best_of_k")
        error = f" ±{row['kl_se']:.3f}" if row.get("kl_se") is not None else ""
        own = {f"{key}_{kind}": row[kind].get(key) for key in figures.QUANTITIES for kind in KINDS}
        number = f"{row['iterate']} (best)" if row["iterate"] == chosen else row["iterate"]
        yield row | own | {"iterate": number, "best_of": best, "kl": shown(row["kl"]) + error}


def comparisons(of: figures.Figures) -> Iterator[dict]:
    """A row for each comparison of two iterates and kind of answers."""
    for row in of.iterates:
        start = (row["versus"].get("start") or {}).get("iterate")
        for against, other in row["versus"].items():
            if against == "previous" and other["iterate"] == start:
                continue  # said once
            named = {"start": " (start)", "best": " (best before)"}.get(against, "")
            which = f"{row['iterate']} against {other['iterate']}{named}"
            for kind in KINDS:
                if own := other[kind]:
                    counts = "/".join(map(str, own["counts"])) if own.get("counts") else None
                    more = {f"{key}_difference": own.get(key) for key in figures.QUANTITIES}
                    yield own | more | {"which": which, "kind": kind, "counts": counts}


def heldout(of: figures.Figures) -> Iterator[dict]:
    """A row for each iterate and kind of its answers."""
    for row in of.iterates:
        yield from ({"iterate": row["iterate"], "kind": kind} | row[kind] for kind in KINDS)


def responses(of: figures.Figures) -> list[dict]:
    """A row for each iteration's responses and pairs."""
    return [row | row["rewards"] for row in of.trainings if row["rewards"]]


def steps(of: figures.Figures) -> list[dict]:
    """The rows of a run's steps, and their sum."""
    if not of.steps:
        return []
    known = [row for row in of.steps if row["work"] is not None]
    wall, work = sum(row["seconds"] for row in known), sum(row["work"] for row in known)
    gpu = [row["gpu_hours"] for row in of.steps]
    whole = {"step": "all", "seconds": sum(row["seconds"] for row in of.steps)}
    whole |= {"work": work if known else None, "waiting": 1 - work / wall if wall else None}
    whole |= {"gpu_hours": None if None in gpu else sum(gpu)}
    return [*(row | {"step": f"{row['policy']} {row['step']}"} for row in of.steps), whole]


COLUMNS = {  # key → (heading, definition) of those that have another one than report/definitions.py
    "iteration": ("iteration", "iterate"),
    "kind": ("answers", "sampled"),
    "which": ("iterate", "iterate"),
    "best_of": ("best of K", "best_of"),
    "kl": ("KL", "kl"),
    "reward_mean": ("mean reward", "reward"),
    "eval_pairs": ("held out", "pairs"),
    **{f"distinct_{n}": (f"distinct-{n}", "distinct") for n in (1, 2, 3)},
    **{f"{key}_difference": (f"{key}, difference", key) for key in figures.QUANTITIES},
    **{f"{key}_{kind}": (f"{key}, {kind}", key) for key in figures.QUANTITIES for kind in KINDS},
}
TABLES = (  # section, caption, keys of the columns, rows of a run's figures
    (
        "reward",
        "Each iterate, with 95% intervals (KL ± its standard error)",
        """iterate reward_sampled reward_greedy gold_sampled gold_greedy judge_sampled judge_greedy best_of kl
        kl_per_token""",
        iterates,
    ),
    (
        "wins",
        "Iterates against each other, same prompts, with 95% intervals",
        """which kind reward_difference reward_win lc_win counts gold_difference gold_win judge_difference
        judge_win""",
        comparisons,
    ),
    (
        "text",
        "Held-out answers",
        """iterate kind length length_p90 truncated empty repetition looping distinct_1 distinct_2 distinct_3
        different_texts tied spread length_correlation null_share prompts""",
        heldout,
    ),
    (
        "pairs",
        "Responses and pairs of each iteration",
        """iteration prompts K reward_mean spread tied all_equal at_top null_share different_texts length
        truncated empty length_correlation margin chosen_longer""",
        responses,
    ),
    (
        "training",
        "The end of each training",
        "iteration pairs eval_pairs loss accuracy eval_accuracy grad_norm",
        lambda of: of.trainings if of.run.kind == "dpo" else [],
    ),
    ("time", "Steps", "step seconds work waiting tokens_per_second mfu gpus gpu_hours", steps),
)


def table(caption: str, columns: list[str], rows: list[dict], headings: dict | None = None) -> dict | None:
    """A table for the template, without columns that hold nothing; None without rows.

    Args:
        columns: keys of `rows`. headings: of keys that are no figures.
    """
    headings, kept, cells = headings or {}, [], []
    for key in columns:
        heading, definition = COLUMNS.get(key, (None, key))
        known = DEFINITIONS.get(definition)
        own = [shown(row.get(key), known.shape if known else "number") for row in rows]
        if set(own) - {"–", ""}:
            name = headings.get(key) or heading or (known.name if known else key)
            kept.append((definition if known else None, name))
            cells.append(own)
    made = {"caption": caption, "columns": kept, "rows": [list(row) for row in zip(*cells, strict=True)]}
    return made if rows else None


def side_by_side(caption: str, first: str, runs: list, values: dict[str, list]) -> dict | None:
    """A table of settings: a row for each key of `values`, a column for each run."""
    headings = {"": first} | {str(n): run.name for n, run in enumerate(runs)}
    rows = [
        {"": str(key)} | {str(n): text_of(value) for n, value in enumerate(own)}
        for key, own in values.items()
    ]
    return table(caption, list(headings), rows, headings)


def together(mappings: list[dict]) -> dict[str, list]:
    """`{key: value of each mapping}`, None where one lacks it."""
    keys = dict.fromkeys(key for one in mappings for key in one)
    return {key: [one.get(key) for one in mappings] for key in keys}


def head_of(runs: list) -> list[dict]:
    """The tables at the top of the page: what was run with what, and what differs between several runs."""
    asked = together([figures.of_settings(run) for run in runs])
    asked = {key: own for key, own in asked.items() if set(map(text_of, own)) - {"–"}}
    made = [side_by_side("What was run", "setting", runs, asked)]
    if len(runs) > 1:
        found = figures.differing([run.settings for run in runs])
        made.append(side_by_side("What differs between the runs", "setting", runs, found))
    return [one for one in made if one]


def tables_of(found: list[figures.Figures]) -> list[tuple]:
    """The tables of all runs: a list of (section, table)."""
    several, made = len(found) > 1, []
    for section, caption, columns, rows_of in TABLES:
        rows = [row | {"run": of.run.name} for of in found for row in rows_of(of)]
        made.append((section, table(caption, ["run"] * several + columns.split(), rows)))
    runs = [of.run for of in found]
    settings = together([figures.flatten(run.settings) for run in runs])
    versions = together([run.versions for run in runs])
    if several:
        other = figures.differing([run.versions for run in runs])
        made.append(("settings", side_by_side("Versions that differ", "package", runs, other)))
    made.append(("settings", side_by_side("All settings", "setting", runs, settings)))
    made.append(("settings", side_by_side("Versions", "package", runs, versions)))
    return [(section, one) for section, one in made if one]


def text_of(value: object) -> str:
    """A setting as YAML's reader would know it."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def render(found: list[figures.Figures], troubles: list, samples: dict, states: list) -> str:
    """The page as text.

    Args:
        troubles: a list of troubles.Trouble for each run. samples: of samples.collect.
        states: (word, detail) of each run, see report/state.py.
    """
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((HERE / "page.html.j2").read_text(encoding="utf-8"))
    library = get_plotlyjs().replace("</script", "<\\/script")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    made, listed = charts.of_runs(found), tables_of(found)
    sections = [
        {
            "key": key,
            "heading": heading,
            "charts": [chart for section, chart in made if section == key],
            "tables": [one for section, one in listed if section == key],
        }
        for key, heading in SECTIONS
    ]
    return template.render(
        title=", ".join(of.run.name for of in found),
        runs=list(zip(found, states, troubles, strict=True)),
        head=head_of([of.run for of in found]),
        not_evaluated=NOT_EVALUATED,
        sections=[section for section in sections if section["charts"] or section["tables"]],
        definitions=DEFINITIONS,
        in_short=figures.in_short,
        samples=samples,
        samples_json=as_json(samples),
        charts_json=as_json({chart["key"]: chart["figure"] for _, chart in made}),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        library=library,
        policy=policy([library, script]),
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )
