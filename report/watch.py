"""Watch a run in the terminal: step, progress, rate, time left, the last metrics, and the end of the log
when something failed.

In:  a run's folder (run_loop.sh, run_ppo.sh), begun or not. Nothing is written and nothing is locked.
Out: a view that refreshes until Ctrl-C, or one frame.

    python report/watch.py runs/tiny                  # over ssh too; Ctrl-C ends the view, not the run
    python report/watch.py runs/tiny --once true      # one frame, for a log or a pipe

The time left of a step is what its command says, that of the run an estimate: each step takes what those of
its name took.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.cli import UserError, arg, count
from common.progress import duration
from common.run_folder import is_evaluated
from evaluation import metrics
from report.state import State, read_state

if TYPE_CHECKING:
    from rich.console import Group

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


def frame(folder: Path, state: State, log_lines: int, width: int | None = None) -> "Group":
    """One frame of the view, as a rich renderable for a terminal of `width` characters, or of any.

    All text of files goes in as Text, so that nothing in it is markup.
    """
    from rich.console import Group
    from rich.text import Text

    detail = (state.detail, "red" if state.word == "failed" else "dim")
    head = Text.assemble((str(folder), "bold"), "  ", (state.word, COLORS[state.word]), "  ", detail)
    parts = [head, *doing(state), *progress_bar(state)]
    if state.seconds_left is not None:
        left = f"about {duration(state.seconds_left)} left in all, going by the steps before"
        parts.append(Text(left, "dim"))
    if state.settings and not is_evaluated(state.settings):
        parts.append(Text(metrics.NOT_EVALUATED, "dim"))
    if rows := metrics_table(folder, width):
        parts += [Text(""), Text(rows, no_wrap=True, overflow="crop" if width else "ignore")]
    if state.done:
        last, spent = state.done[-1], sum(entry["seconds"] for entry in state.done)
        told = f"last finished: policy {last['policy']}, {last['step']}, {duration(last['seconds'])}; "
        parts.append(Text(f"{told}{duration(spent)} in {count(len(state.done), 'step')}", "dim"))
    return Group(*parts, *log_panel(state, log_lines))


def doing(state: State) -> list:
    """Lines: how many steps are done, and which one is in work or comes next."""
    from rich.text import Text

    if not state.steps:
        return []
    done = len(state.steps) if state.at is None else state.steps.index(state.at)
    parts = [Text(f"{done} of {len(state.steps)} steps done", "dim")]
    if state.at is not None:
        words = {"running": "in work", "failed": "failed at", "stopped": "stopped at"}
        what = (state.progress or {}).get("what", state.at[1])
        step = f"policy {state.at[0]}, {state.at[1]}" + (f" ({what})" if what != state.at[1] else "")
        parts.append(Text.assemble((f"{words.get(state.word, 'next')}: ", "dim"), step))
    return parts


def progress_bar(state: State) -> list:
    """The bar of the command in work, with its counts, rate and time left, and its note."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    held = state.progress
    if not held:
        return []
    done, total, rate = held["done"], held["total"], held["rate"]
    facts = [f"{done:,}/{total:,} {held['unit']}" + (f" ({100 * done / total:.0f}%)" if total else "")]
    if rate:
        facts.append(f"{rate:.1f} {held['unit']}/s" if rate >= 0.1 else f"{duration(1 / rate)} each")
    if held["seconds_left"] is not None:
        facts.append(f"{duration(held['seconds_left'])} left")
    grid = Table.grid(padding=(0, 2))
    grid.add_row(ProgressBar(total=total, completed=min(done, total), width=32), Text(", ".join(facts)))
    return [grid, *([Text(held["note"], "dim")] if held["note"] else [])]


def log_panel(state: State, log_lines: int) -> list:
    """The end of the log: all of `log_lines` lines where something went wrong, fewer while it runs."""
    from rich.panel import Panel
    from rich.text import Text

    if not state.tail or state.word == "finished":
        return []
    shown = log_lines if state.word in ("failed", "stopped") else min(log_lines, 4)
    tail = Text("\n".join(state.tail[-shown:] if shown else []), no_wrap=True, overflow="ellipsis")
    title = Text(str(state.log))
    return [Panel(tail, title=title, title_align="left", border_style=COLORS[state.word])]


def metrics_table(folder: Path, width: int | None = None) -> str:
    """The table of evaluation/metrics.py, as far as it goes into `width`, or the empty string while nothing
    has been measured.
    """
    try:
        return metrics.format_table([found for _, found in metrics.read_run(folder)], width)
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return ""  # none yet, or a damaged one: the view goes on


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

    console = Console()

    def now() -> "Group":
        width = console.width if console.is_terminal else None
        return frame(folder, read_state(folder), args.log_lines, width)

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
