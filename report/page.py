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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.run_folder import KINDS
from evaluation.metrics import NOT_EVALUATED
from report import charts, figures, run_data
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
    "text": str,
    "share": lambda v: f"{100 * v:.1f}%",
    "number": lambda v: f"{v:.3f}",
    "fine": lambda v: f"{v:.4g}",
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
    write = SHAPES[shape]
    if isinstance(value, tuple):
        return write(value[0]) + (f" [{write(value[1])}, {write(value[2])}]" if value[1] is not None else "")
    return write(value)


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, the key of its definition (report/definitions.py), what it shows of a
    row, and how.

    `get` is a path into the row, `sampled.reward`, or a function of it; `shape` is one of SHAPES.
    """

    heading: str
    definition: str | None
    get: str | Callable
    shape: str = "number"

    def cell(self, row: dict) -> str:
        """The text of a row's figure; a dash where there is none."""
        if callable(self.get):
            return shown(self.get(row), self.shape)
        value = row
        for key in self.get.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return shown(value, self.shape)


def _best_of(row):
    curve = row["sampled"].get("best_of")
    if curve:
        return f"{shown(curve[-1])} (K={len(curve)})"
    return shown(row["sampled"].get("best_of_k"))


def _kl(row):
    error = row.get("kl_se")
    return shown(row["kl"]) + (f" ±{error:.3f}" if error is not None else "")


def _counts(row):
    return "/".join(map(str, row["counts"])) if row.get("counts") else None


RUN = Column("run", None, "run", "text")  # leads the rows where there are several
ITERATES = (
    Column("iterate", "iterate", "iterate", "text"),
    *(
        Column(f"{DEFINITIONS[quantity][0]}, {kind}", quantity, f"{kind}.{quantity}")
        for quantity in figures.QUANTITIES
        for kind in KINDS
    ),
    Column("best of K", "best_of", _best_of, "text"),
    Column("KL", "kl", _kl, "text"),
    Column("KL per token", "kl_per_token", "kl_per_token"),
)
COMPARISONS = (
    Column("iterate", "iterate", "which", "text"),
    Column("answers", "sampled", "kind", "text"),
    Column("reward, difference", "reward", "reward"),
    Column("win rate", "reward_win", "reward_win", "share"),
    Column("at equal length", "lc_win", "lc_win", "share"),
    Column("won/tied/lost", "counts", _counts, "text"),
    Column("gold, difference", "gold", "gold"),
    Column("win rate by gold", "gold_win", "gold_win", "share"),
    Column("judge, difference", "judge", "judge"),
    Column("win rate by judge", "judge_win", "judge_win", "share"),
)
HELDOUT = (
    Column("iterate", "iterate", "iterate", "text"),
    Column("answers", "sampled", "kind", "text"),
    Column("length", "length", "length", "tokens"),
    Column("90th percentile", "length_p90", "length_p90", "tokens"),
    Column("cut off", "truncated", "truncated", "share"),
    Column("empty", "empty", "empty", "share"),
    Column("repeated", "repetition", "repetition", "share"),
    Column("looping", "looping", "looping", "share"),
    Column("distinct-1", "distinct", "distinct_1", "fine"),
    Column("distinct-2", "distinct", "distinct_2", "fine"),
    Column("distinct-3", "distinct", "distinct_3", "fine"),
    Column("different", "different_texts", "different_texts", "share"),
    Column("ties", "tied", "tied", "share"),
    Column("spread", "spread", "spread"),
    Column("reward and length", "length_correlation", "length_correlation"),
    Column("null", "null_share", "null_share", "share"),
    Column("prompts", None, "prompts", "count"),
)
RESPONSES = (
    Column("iteration", "iterate", "iteration", "text"),
    Column("prompts", None, "rewards.prompts", "count"),
    Column("K", None, "rewards.K", "text"),
    Column("mean reward", "reward", "reward_mean"),
    Column("spread", "spread", "rewards.spread"),
    Column("ties", "tied", "rewards.tied", "share"),
    Column("all equal", "all_equal", "rewards.all_equal", "share"),
    Column("at the largest", "at_top", "rewards.at_top", "share"),
    Column("null", "null_share", "rewards.null_share", "share"),
    Column("different", "different_texts", "rewards.different_texts", "share"),
    Column("length", "length", "rewards.length", "tokens"),
    Column("cut off", "truncated", "rewards.truncated", "share"),
    Column("empty", "empty", "rewards.empty", "share"),
    Column("reward and length", "length_correlation", "rewards.length_correlation"),
    Column("margin of pairs", "margin", "margin"),
    Column("chosen longer by", "chosen_longer", "chosen_longer", "tokens"),
)
TRAININGS = (
    Column("iteration", "iterate", "iteration", "text"),
    Column("pairs", "pairs", "pairs", "count"),
    Column("held out", "pairs", "eval_pairs", "count"),
    Column("loss", "loss", "loss", "fine"),
    Column("accuracy", "accuracy", "accuracy", "share"),
    Column("held-out accuracy", "eval_accuracy", "eval_accuracy", "share"),
    Column("gradient norm", "grad_norm", "grad_norm", "fine"),
)
STEPS = (
    Column("step", "step", lambda row: f"{row['policy']} {row['step']}".strip(), "text"),
    Column("seconds", "seconds", "seconds", "count"),
    Column("working", "work", "work", "count"),
    Column("waiting", "waiting", "waiting", "share"),
    Column("tokens/s", "tokens_per_second", "tokens_per_second", "count"),
    Column("GPUs", None, "gpus", "count"),
    Column("GPU-hours", "gpu_hours", "gpu_hours"),
)


def comparisons(iterates: list[dict]) -> Iterator[dict]:
    """Yield a row for each comparison of two iterates and kind of answers."""
    for row in iterates:
        start = (row["versus"].get("start") or {}).get("iterate")
        for against, other in row["versus"].items():
            if against == "previous" and other["iterate"] == start:
                continue  # said once
            named = {"start": " (start)", "best": " (best before)"}.get(against, "")
            which = f"{row['iterate']} against {other['iterate']}{named}"
            yield from ({"which": which, "kind": kind} | other[kind] for kind in KINDS if other[kind])


def heldout(iterates: list[dict]) -> Iterator[dict]:
    """Yield a row for each iterate and kind of its answers."""
    for row in iterates:
        yield from ({"iterate": row["iterate"], "kind": kind} | row[kind] for kind in KINDS)


def with_sum(steps: list[dict]) -> list[dict]:
    """The rows of a run's steps, and their sum."""
    if not steps:
        return []
    known = [row for row in steps if row["work"] is not None]
    wall, work = sum(row["seconds"] for row in known), sum(row["work"] for row in known)
    gpu = [row["gpu_hours"] for row in steps]
    whole = {"policy": "all", "step": "", "seconds": sum(row["seconds"] for row in steps)}
    whole |= {"work": work if known else None, "waiting": 1 - work / wall if wall else None}
    return [*steps, whole | {"gpu_hours": None if None in gpu else sum(gpu)}]


class Found(NamedTuple):
    """A run and its figures, see report/figures.py."""

    run: run_data.Run
    iterates: list[dict]
    trainings: list[dict]
    steps: list[dict]


TABLES = (  # section, caption, columns, rows of what was Found
    (
        "reward",
        "Each iterate, with 95% intervals (KL ± its standard error)",
        ITERATES,
        lambda of: of.iterates,
    ),
    (
        "wins",
        "Iterates against each other, same prompts, with 95% intervals",
        COMPARISONS,
        lambda of: comparisons(of.iterates),
    ),
    ("text", "Held-out answers", HELDOUT, lambda of: heldout(of.iterates)),
    (
        "pairs",
        "Responses and pairs of each iteration",
        RESPONSES,
        lambda of: [row for row in of.trainings if row["rewards"]],
    ),
    (
        "training",
        "The end of each training",
        TRAININGS,
        lambda of: of.trainings if of.run.kind == "dpo" else [],
    ),
    ("time", "Steps", STEPS, lambda of: with_sum(of.steps)),
)


def table(caption: str, columns: tuple, rows: list[dict]) -> dict | None:
    """A table for the template, without columns that hold nothing; None without rows."""
    cells = [[column.cell(row) for row in rows] for column in columns]
    kept = [k for k, own in enumerate(cells) if set(own) - {"–", ""}]
    return (
        {
            "caption": caption,
            "columns": [(columns[k].definition, columns[k].heading) for k in kept],
            "rows": [list(row) for row in zip(*(cells[k] for k in kept), strict=True)],
        }
        if rows
        else None
    )


def side_by_side(caption: str, first: str, runs: list, values: dict[str, list]) -> dict | None:
    """A table of settings: a row for each key of `values`, a column for each run."""
    columns = (Column(first, None, "key", "text"),) + tuple(
        Column(run.name, None, lambda row, n=n: text_of(row["values"][n]), "text")
        for n, run in enumerate(runs)
    )
    return table(caption, columns, [{"key": key, "values": own} for key, own in values.items()])


def together(mappings: list[dict]) -> dict[str, list]:
    """`{key: value of each mapping}`, None where one lacks it."""
    return {
        key: [one.get(key) for one in mappings] for key in dict.fromkeys(k for one in mappings for k in one)
    }


def head_of(runs: list) -> list[dict]:
    """The tables at the top of the page: what was run with what, and what differs between several runs."""
    asked = together([figures.of_settings(run) for run in runs])
    asked = {key: own for key, own in asked.items() if set(map(text_of, own)) - {"–"}}
    made = [side_by_side("What was run", "setting", runs, asked)]
    if len(runs) > 1:
        found = figures.differing([run.settings for run in runs])
        made.append(side_by_side("What differs between the runs", "setting", runs, found))
    return [one for one in made if one]


def tables_of(tables: list) -> list[tuple]:
    """The tables of all runs: a list of (section, table)."""
    several, found = len(tables) > 1, []
    for section, caption, columns, rows_of in TABLES:
        rows = [row | {"run": one[0].name} for one in tables for row in rows_of(Found(*one))]
        found.append((section, table(caption, (RUN, *columns) if several else columns, rows)))
    runs = [run for run, *_ in tables]
    settings = together([figures.flatten(run.settings) for run in runs])
    versions = together([run.versions for run in runs])
    if several:
        other = figures.differing([run.versions for run in runs])
        found.append(("settings", side_by_side("Versions that differ", "package", runs, other)))
    found.append(("settings", side_by_side("All settings", "setting", runs, settings)))
    found.append(("settings", side_by_side("Versions", "package", runs, versions)))
    return [(section, made) for section, made in found if made]


def text_of(value: object) -> str:
    """A setting as YAML's reader would know it."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def render(tables: list, troubles: list, samples: dict, states: list, title: str | None = None) -> str:
    """The page as text.

    Args:
        tables: list of (run, iterates, trainings, steps), see report/figures.py.
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
        head=head_of(runs),
        not_evaluated=NOT_EVALUATED,
        sections=sections,
        definitions=DEFINITIONS,
        in_short=[(run, figures.in_short(run, iterates, steps)) for run, iterates, _, steps in tables],
        troubles=troubles,
        samples=samples,
        samples_json=as_json(samples),
        charts_json=as_json({chart["key"]: chart["figure"] for _, chart in made}),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        library=library,
        policy=policy([library, script]),
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )
