"""Watch a run in the terminal: stage, progress, rate, time left, the last metrics, and the end of the log
when something failed.

In:  a run's folder (run_loop.sh, run_ppo.sh), begun or not. Nothing is written and nothing is locked.
Out: a view that refreshes until Ctrl-C, or one frame.

    python report/watch.py runs/tiny                  # over ssh too; Ctrl-C ends the view, not the run
    python report/watch.py runs/tiny --once true      # one frame, for a log or a pipe

The time left of a stage is what its log says, that of the run an estimate: each stage takes what those of its
name took.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.cli import UserError, arg
from common.progress import duration

COLORS = {
    "not started": "dim",
    "running": "yellow",
    "stopped": "magenta",
    "failed": "red",
    "finished": "green",
}


@dataclass
class Arguments:
    run: str | None = arg(None, "the run's folder; may be given without --run")
    once: bool = arg(False, "print one frame and end; so does an output that is no terminal")
    every: float = arg(5.0, "seconds between frames")
    log_lines: int = arg(15, "lines of the log shown when something failed; fewer while it runs")


def frame(folder, state, log_lines, width=None):
    """One frame of the view, as a rich renderable for a terminal of `width` characters, or of any.

    All text of files goes in as Text, so that nothing in it is markup.
    """
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Text.assemble(
        (str(folder), "bold"),
        "  ",
        (state.word, COLORS[state.word]),
        "  ",
        (state.detail, "dim" if state.word != "failed" else "red"),
    )
    parts = [head]
    if state.names:
        done = len(state.names) if state.at is None else state.names.index(state.at[:2])
        parts.append(Text(f"{done} of {len(state.names)} stages done", "dim"))
    if state.at is not None:
        i, stage, step = state.at
        doing = {"running": "in work", "failed": "failed at", "stopped": "stopped at"}.get(state.word, "next")
        parts.append(
            Text.assemble(
                (f"{doing}: ", "dim"), f"iteration {i}, {stage}" + (f" ({step})" if step != stage else "")
            )
        )
    if state.done is not None and (state.total or state.done):
        share = f" ({100 * state.done / state.total:.0f}%)" if state.total else ""
        counts = f"{state.done:,}" + (f"/{state.total:,}" if state.total else "") + f" {state.unit}{share}"
        facts = (
            [counts] + ([state.rate] if state.rate else []) + ([f"{state.left} left"] if state.left else [])
        )
        grid = Table.grid(padding=(0, 2))
        bar = (
            ProgressBar(total=state.total, completed=min(state.done, state.total), width=32)
            if state.total
            else Text("")
        )
        grid.add_row(bar, Text(", ".join(facts)))
        parts.append(grid)
        if state.note:
            parts.append(Text(state.note, "dim"))
    if state.seconds_left is not None:
        parts.append(
            Text(f"about {duration(state.seconds_left)} left in all, going by the stages before", "dim")
        )
    rows = metrics_table(folder, width)
    if rows:
        parts += [Text(""), Text(rows, no_wrap=True, overflow="crop" if width else "ignore")]
    if state.stages:
        last = state.stages[-1]
        spent = sum(entry["seconds"] for entry in state.stages)
        parts.append(
            Text(
                f"last finished: iteration {last.get('iteration')}, {last.get('stage')}, "
                f"{duration(last['seconds'])}; "
                f"{duration(spent)} in {len(state.stages)} stages",
                "dim",
            )
        )
    if state.tail and state.word != "finished":
        count = log_lines if state.word in ("failed", "stopped") else min(log_lines, 4)
        tail = Text("\n".join(state.tail[-count:] if count else []), no_wrap=True, overflow="ellipsis")
        parts.append(
            Panel(tail, title=Text(str(state.log)), title_align="left", border_style=COLORS[state.word])
        )
    return Group(*parts)


def metrics_table(folder, width=None):
    """The table of evaluation/metrics.py, as far as it goes into `width`, or the empty string while nothing has
    been measured.
    """
    from evaluation import metrics

    try:
        return metrics.format_table([found for _, found in metrics.read_run(folder)], width)
    except (
        UserError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ):  # none yet, or a damaged one: the view goes on
        return ""


def main():
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-") and not argv[0].endswith((".yaml", ".yml")):
        argv = ["--run", *argv]
    args = cli.parse(Arguments, __doc__, argv)
    if not args.run:
        raise UserError("no run was given: python report/watch.py runs/NAME")
    if args.every <= 0 or args.log_lines < 0:
        raise UserError("every must be above 0 and log_lines not negative")
    folder = Path(args.run)
    if folder.is_file():
        raise UserError(f"{folder} is a file, a run's folder was expected")

    from rich.console import Console
    from rich.live import Live

    from report.state import Lines, read_state

    console, lines = Console(), Lines()

    def now():
        return frame(
            folder, read_state(folder, lines), args.log_lines, console.width if console.is_terminal else None
        )

    if args.once or not console.is_terminal:
        console.print(now(), soft_wrap=not console.is_terminal)
        return
    with Live(now(), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(now(), refresh=True)
                time.sleep(args.every)
        except KeyboardInterrupt:
            pass
    console.print(now())


if __name__ == "__main__":
    cli.run(main)
