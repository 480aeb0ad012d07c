"""Where a run stands, from its folder alone: running or not, which step of which policy, how far, how fast.

Reads little and locks nothing. What a command says for people is shown and not read, but for its last word: a
line `error: …`, which all scripts end bad input with, or a traceback.
"""

import contextlib
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.cli import UserError
from common.progress import duration, read_progress
from common.run_folder import (
    KINDS,
    RunFolder,
    is_evaluated,
    is_ppo,
    kind_of,
    progress_of,
    read_object,
    written_at,
)

FRESH = 120  # seconds: a run whose lock cannot be seen (another machine) runs if something was written since
TAIL = 65536  # bytes of a log that are looked at
MOST_ITERATIONS = 10000
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")
RAISED = re.compile(r"^[\w.]+(Error|Exception|Interrupt)\b")


@dataclass
class State:
    """`word`: not started, running, stopped, failed, finished.

    `at`: (policy, step) that comes next or is in work. `progress`: see common/progress.py.
    """

    word: str
    detail: str = ""
    at: tuple | None = None
    settings: dict = field(default_factory=dict)
    progress: dict | None = None
    log: Path | None = None
    tail: list = field(default_factory=list)
    done: list = field(default_factory=list)  # steps that have finished, of stages.jsonl
    steps: list = field(default_factory=list)  # all (policy, step) of the run
    seconds_left: float | None = None


def is_held(folder: str | Path) -> bool | None:
    """Whether a driver holds the run's lock; None where that cannot be seen."""
    return is_locked(RunFolder(folder).lock)


def is_locked(lock: Path) -> bool | None:
    """Whether a process holds a lock; None where that cannot be seen.

    Takes no lock itself, which would turn a driver away.
    """
    try:
        mark, owner = os.stat(lock), lock.read_text(encoding="utf-8").split()
        here = owner[:1] == [os.uname().nodename] and owner[2:4] == ["-", "-"]
        if owner and not here:  # common/lock.sh: the file system refuses locks, or a job of another machine
            return None
        wanted = f"{os.major(mark.st_dev):02x}:{os.minor(mark.st_dev):02x}:{mark.st_ino}"
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return any(line.split()[1] == "FLOCK" and wanted in line.split() for line in locks)


def environments_in_work() -> str:
    """`environment vllm is being made`, by the locks of envs.sh; empty where none is."""
    here = Path(__file__).resolve().parents[1]
    folders = (Path(os.environ.get("envs_dir", here / ".envs")), Path("~/.conda/online-rlhf").expanduser())
    names = sorted({lock.stem for folder in folders for lock in folder.glob("*.lock") if is_locked(lock)})
    return f"environment {' and '.join(names)} is being made" if names else ""


def iterations_of(settings: dict) -> int:
    """Trainings of a run; 0 where the settings do not tell."""
    value = 1 if is_ppo(settings) else settings.get("iterations")
    if kind_of(settings) == "online":
        online, every = settings["online"], settings.get("evaluate_every")
        rounds = online.get("rounds") if isinstance(online, dict) else None
        value = -(-rounds // every) if isinstance(rounds, int) and isinstance(every, int) and every else 0
    return min(value, MOST_ITERATIONS) if isinstance(value, int) and value > 0 else 0


def outputs_of(settings: dict, i: int) -> list[tuple]:
    """What policy i samples: (policy in whose folder, kind of held-out answers or None for responses)."""
    heldout = [(i, kind) for kind in KINDS] if is_evaluated(settings) else []
    ahead = [(i + 1, None)] if i < iterations_of(settings) and kind_of(settings) == "dpo" else []
    return heldout + ahead


def steps_of(settings: dict) -> list[tuple]:
    """All (policy, step) of a run, in their order."""
    found, last = [], iterations_of(settings)
    for i in range(last + 1):
        if outputs_of(settings, i):
            found += [(i, "sample"), (i, "annotate")]
        if is_evaluated(settings):
            found.append((i, "measure"))
        if i < last:
            found.append((i, "train"))
    return found


def is_done(run: RunFolder, settings: dict, i: int, step: str) -> bool:
    """Whether a step has left its files, or a later one those that are made of them."""
    if step == "train":
        return bool(read_object(run.model_manifest(i + 1)).get("complete"))
    if step == "measure":
        return run.metrics(i).is_file()
    for n, kind in outputs_of(settings, i):
        if is_done(run, settings, *((i, "measure") if kind else (i, "train"))):
            continue
        made = [run.heldout(n, kind, "rewarded") if kind else run.rewarded(n)]
        if step == "sample":
            made.append(run.heldout(n, kind) if kind else run.generated(n))
        if not any(path.is_file() for path in made):
            return False
    return True


def clean(line: str) -> str:
    """A log's line without control characters: what a bar wrote over itself is gone, and no terminal obeys
    it.
    """
    return CONTROL.sub("", line.rstrip("\r\n").rsplit("\r", 1)[-1]).rstrip()


def tail_of(log: Path) -> list[str]:
    """Lines of the last start in a log's last 64 KiB, cleaned; a start is a line `$ command`."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [clean(line) for line in text.split("\n")]
    starts = [k for k, line in enumerate(lines) if line.startswith("$ ")]
    return [line for line in lines[starts[-1] if starts else 0 :] if line]


def what_failed(lines: list[str]) -> str | None:
    """The line of a log's last start that says what went wrong, or None."""
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        return next((line for line in reversed(lines) if RAISED.match(line)), "a traceback in the log")
    return None


def progress_in(logs: list[Path], now: float) -> dict | None:
    """The progress of the command that wrote last; shards that run side by side are one.

    Rate and time left are None where they are of a command that has long stopped to tell.
    """
    found = [(written_at(progress_of(log)), log.name.split(".")[0], progress_of(log)) for log in logs]
    found = sorted((item for item in found if item[0] is not None), reverse=True)
    held = [read_progress(path) for _, name, path in found if name == found[0][1]]
    held = [one for one in held if one and one["what"] == (held[0] or {}).get("what")]
    if not held:
        return None
    whole = {key: clean(held[0][key]) for key in ("what", "unit", "note")}
    whole |= {key: sum(one[key] for one in held) for key in ("done", "total")}
    rates = [one["rate"] for one in held if one["rate"]]
    lefts = [one["seconds_left"] for one in held if one["seconds_left"] is not None]
    if not rates or now - found[0][0] > max(FRESH, 3 / min(rates)):
        return whole | {"rate": None, "seconds_left": None}
    return whole | {"rate": sum(rates), "seconds_left": max(lefts, default=None)}


def read_state(folder: str | Path, now: float | None = None) -> State:
    """The state of a run's folder, which need not exist.

    Args:
        folder: the run's folder.
        now: seconds since 1970, for the tests.
    """
    run, now = RunFolder(folder), time.time() if now is None else now
    held, written = is_held(folder), run.last_written()
    if not run.settings.is_file():
        return _before_settings(run, held)
    try:
        settings = cli.read_yaml(run.settings)
    except UserError as error:
        return State("stopped", str(error))
    state = State("stopped", settings=settings, steps=steps_of(settings), done=run.finished_steps())
    state.at = next((step for step in state.steps if not is_done(run, settings, *step)), None)
    if state.at is None:
        # RLHF_RUN: the driver itself asks for the page, which would else say for ever that it is at work
        others = held and os.environ.get("RLHF_RUN") != str(run.path.resolve())
        state.word = "running" if others else "finished"
        return state
    logs = sorted(run.step_logs(*state.at), key=lambda path: (-(written_at(path) or 0), path.name))
    tails = [(log, tail_of(log)) for log in logs]
    broken = [(log, tail) for log, tail in tails if what_failed(tail)]  # one shard of several, say
    state.log, state.tail = next(iter(tails if held else broken or tails), (None, []))
    state.progress = progress_in(logs, now)
    problem = what_failed(state.tail)
    if held or (held is None and written is not None and now - written < FRESH and not problem):
        state.word, state.detail = "running", _sign_of_life(written, now)
        state.seconds_left = seconds_left(state, now)
    elif problem:
        state.word, state.detail = "failed", problem
    elif written is not None:
        state.detail = f"nothing was written for {duration(max(0, now - written))}"
    return state


def _before_settings(run, held):
    """The state of a run that has no loop.yaml yet: its driver may be setting up."""
    making = environments_in_work()
    if held:
        return State("running", f"setting up: {making or 'setup command and checks, no loop.yaml yet'}")
    there = "no loop.yaml yet" if run.path.is_dir() else "no such folder yet"
    return State("not started", f"{there}; {making}" if making else there)


def _sign_of_life(written, now):
    """When a running run wrote something last, or why it does not."""
    making = environments_in_work() if written is None or now - written > FRESH else ""
    ago = "" if written is None else f"something was written {duration(max(0, now - written))} ago"
    return making or ago


def seconds_left(state: State, now: float) -> float | None:
    """Estimate for the whole run: a step takes what those of its name took on average; None before one of
    each has finished.
    """
    took, spent = {}, 0.0
    for entry in state.done:
        took.setdefault(entry["step"], []).append(entry["seconds"])
    names = [step for _, step in state.steps[state.steps.index(state.at) :]]
    if any(name not in took for name in names):
        return None
    means = [statistics.fmean(took[name]) for name in names]
    with contextlib.suppress(KeyError, TypeError, ValueError):
        spent = now - datetime.strptime(state.done[-1]["finished"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return max(0.0, sum(means) - min(max(spent, 0.0), means[0]))
