"""Where a run stands, from its folder alone: running or not, which stage, how far, how fast.

Reads little and locks nothing.
"""

import json
import os
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.cli import UserError
from common.records import finite

FRESH = 120  # seconds: a run whose lock cannot be seen (another machine) runs if something was written since
TAIL = 65536  # bytes of a log that are looked at
MOST_ITERATIONS = 10000
# Lines of common/progress.py, dpo.py and train_ppo.py: `generate: 613/825 prompts, 40.9/s, 5s left, 2071
# tokens/s`
LINE = re.compile(
    r"^(?P<what>\w+): (?:(?:step|rollout) )?(?P<done>\d+)/(?P<total>\d+)(?: (?P<unit>\w+))?(?P<rest>,.*)?$"
)
LEFT = re.compile(r"(?:^|, )(\S+) left\b")
RATE = re.compile(r"(?:^|, )([\d.]+)(?: (\w+))?/s\b")
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


@dataclass
class State:
    """`word`: not started, running, stopped, failed, finished.

    `at`: (iteration, stage, step) that comes next or is in work.
    """

    word: str
    detail: str = ""
    at: tuple | None = None
    settings: dict = field(default_factory=dict)
    done: int | None = None
    total: int | None = None
    unit: str = ""
    rate: str = ""
    left: str = ""
    note: str = ""
    log: Path | None = None
    tail: list = field(default_factory=list)
    stages: list = field(default_factory=list)  # what has finished, stages.jsonl
    names: list = field(default_factory=list)  # all (iteration, stage) of the run
    seconds_left: float | None = None


class Lines:
    """Lines of growing files, each read once: a file that grew is read from where it ended."""

    def __init__(self):
        self._known = {}

    def __call__(self, path):
        try:
            size, (offset, lines) = path.stat().st_size, self._known.get(path, (0, 0))
            if size < offset:  # begun anew
                offset, lines = 0, 0
            with open(path, "rb") as file:
                file.seek(offset)
                while block := file.read(2**20):
                    lines, offset = lines + block.count(b"\n"), offset + len(block)
        except OSError:
            return 0
        self._known[path] = offset, lines
        return lines


def is_held(folder):
    """Whether a driver holds the run's lock; None where that cannot be seen.

    Takes no lock itself, which would turn a driver away.
    """
    try:
        mark = os.stat(folder / ".lock")
        if mark.st_size:  # common/lock.sh: the file system refuses locks
            return None
        wanted = f"{os.major(mark.st_dev):02x}:{os.minor(mark.st_dev):02x}:{mark.st_ino}"
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return any(line.split()[1] == "FLOCK" and wanted in line.split() for line in locks)


def last_written(folder):
    """When a log, a partial output or the list of stages was written last, seconds since 1970; None for an
    empty folder.
    """
    patterns = (
        "iter*/logs/*",
        "iter*/*.partial",
        "iter*/shards/*.partial",
        "stages.jsonl",
        "iter*/metrics.json",
        "iter*/model.log.jsonl",
    )
    times = [written_at(path) for pattern in patterns for path in folder.glob(pattern)]
    return max((time for time in times if time is not None), default=None)


def iterations_of(settings):
    """Iterations of a DPO run; 0 where the settings do not tell."""
    value = settings.get("iterations")
    return min(value, MOST_ITERATIONS) if isinstance(value, int) and value > 0 else 0


def written_at(path):
    """When a file was written, seconds since 1970; None where it is gone: a run at work renames and removes
    what we have just listed.
    """
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def stage_names(settings):
    """All (iteration, stage) of a run, in their order."""
    if "ppo" in settings or "backend" in settings:
        return [(0, "evaluate"), (1, "train"), (1, "evaluate")]
    later = [
        (i, stage)
        for i in range(1, iterations_of(settings) + 1)
        for stage in ("generate", "annotate", "train", "evaluate")
    ]
    return [(0, "evaluate"), *later]


def is_complete(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(value, dict) and bool(value.get("complete"))
    except (OSError, ValueError):
        return False


def is_done(folder, i, stage):
    """Whether a stage has left its last output."""
    own = folder / f"iter{i}"
    if stage == "train":
        return is_complete(own / "model.manifest.json")
    last = {
        "generate": ("generated.jsonl", "rewarded.jsonl"),
        "annotate": ("rewarded.jsonl",),
        "evaluate": ("metrics.json",),
    }[stage]
    return any((own / name).is_file() for name in last)


def files_of(folder, i, stage, settings):
    """(folder of the iteration, name, prompt set) of what a stage's generation writes."""
    prompts = settings.get("prompts") or []
    prompts = prompts if isinstance(prompts, list) else [prompts]
    ahead = i + 1 if stage == "evaluate" else i
    dpo = not ("ppo" in settings or "backend" in settings)
    kinds = ("sampled", "greedy") if stage == "evaluate" else ()
    found = [
        (folder / f"iter{i}", f"heldout_{kind}.generated", settings.get("heldout_prompts")) for kind in kinds
    ]
    if dpo and prompts and ahead <= iterations_of(settings):
        found.append((folder / f"iter{ahead}", "generated", prompts[(ahead - 1) % len(prompts)]))
    return found


def count_answers(own, name, lines):
    """Records of an output that are on disk: the file, or its partial, or its shards with their partials."""
    if (own / f"{name}.jsonl").is_file():
        return lines(own / f"{name}.jsonl")
    shards = [
        path for path in own.glob(f"shards/{name}.of*") if path.name.endswith((".jsonl", ".jsonl.partial"))
    ]
    return lines(own / f"{name}.jsonl.partial") + sum(lines(path) for path in shards)


def count_prompts(source, lines):
    """Prompts of a local .jsonl file; None for what cannot be counted cheaply."""
    try:
        path = Path(str(source))
        if not path.is_absolute() and not path.is_file():
            path = Path(__file__).resolve().parents[1] / path
        return lines(path) if path.suffix == ".jsonl" and path.is_file() else None
    except (OSError, ValueError):  # no name of a file at all
        return None


def step_of(folder, i, stage, settings, lines):
    """(step, done, total) of a stage that has not finished; done and total are None where they are not known
    from files.
    """
    if stage == "train":
        return "train", None, None
    outputs = files_of(folder, i, stage, settings)
    if stage != "annotate" and any(not (own / f"{name}.jsonl").is_file() for own, name, _ in outputs):
        counts = [
            (count_answers(own, name, lines), count_prompts(source, lines)) for own, name, source in outputs
        ]
        total = None if any(t is None for _, t in counts) else sum(t for _, t in counts)
        return "generate", sum(done for done, _ in counts), total
    scored = [(own, name.replace("generated", "rewarded"), name) for own, name, _ in outputs]
    if any(not (own / f"{rewarded}.jsonl").is_file() for own, rewarded, _ in scored):
        return (
            "annotate",
            sum(count_answers(own, rewarded, lines) for own, rewarded, _ in scored),
            sum(lines(own / f"{name}.jsonl") for own, _, name in scored),
        )
    return "metrics", None, None


def clean(line):
    """A log's line without control characters: what a bar wrote over itself is gone, and no terminal obeys
    it.
    """
    return CONTROL.sub("", line.rstrip("\r\n").rsplit("\r", 1)[-1]).rstrip()


def tail_of(log):
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


def logs_of(folder, i, stage):
    """A stage's logs, the one written last first."""
    names = (f"{stage}.", "metrics.") if stage == "evaluate" else (f"{stage}.",)
    logs = [path for path in (folder / f"iter{i}" / "logs").glob("*.log") if path.name.startswith(names)]
    return sorted(logs, key=lambda path: (-(written_at(path) or 0), path.name))


def has_failed(lines):
    """The line of a log's last start that says what went wrong, or None."""
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        return next(
            (line for line in reversed(lines) if re.match(r"^[\w.]+(Error|Exception|Interrupt)\b", line)),
            "a traceback in the log",
        )
    return None


def progress_line(lines):
    """The last line of progress in a log: {what, done, total, unit, rate, left, note}, or None."""
    for line in reversed(lines):
        match = LINE.match(line)
        if match:
            rest = (match["rest"] or "").lstrip(", ")
            left, rate = LEFT.search(rest), RATE.search(rest)
            note = ", ".join(part for part in rest.split(", ") if part and not part.endswith(" left"))
            rate = "" if rate is None else f"{rate[1]} {rate[2] or match['unit'] or ''}".strip() + "/s"
            return {
                "what": match["what"],
                "done": int(match["done"]),
                "total": int(match["total"]),
                "unit": match["unit"] or "steps",
                "rate": rate,
                "left": left[1] if left else "",
                "note": note,
            }
    return None


def read_state(folder, lines=None, now=None):
    """The state of a run's folder.

    Args:
        folder: the run's folder; it need not exist.
        lines: a `Lines` that is kept between calls, so that files are read once.
        now: seconds since 1970, for the tests.
    """
    folder, lines, now = Path(folder), lines or Lines(), time.time() if now is None else now
    if not (folder / "loop.yaml").is_file():
        return State("not started", "no loop.yaml yet" if folder.is_dir() else "no such folder yet")
    try:
        settings = cli.read_yaml(folder / "loop.yaml")
    except UserError as error:
        return State("stopped", str(error))
    state = State("stopped", settings=settings, names=stage_names(settings), stages=finished_stages(folder))
    state.at = next(((i, stage) for i, stage in state.names if not is_done(folder, i, stage)), None)
    held, written = is_held(folder), last_written(folder)
    if state.at is None:
        # The report that the driver itself asks for after its last stage would else say for ever that the run
        # is at work.
        state.word = "running" if held and os.environ.get("RLHF_RUN") != str(folder.resolve()) else "finished"
        return state
    i, stage = state.at
    step, state.done, state.total = step_of(folder, i, stage, settings, lines)
    state.at, state.unit = (i, stage, step), {"generate": "prompts", "annotate": "records"}.get(step, "")
    tails = [(log, tail_of(log)) for log in logs_of(folder, i, stage)]
    broken = [(log, tail) for log, tail in tails if has_failed(tail)]  # one shard of several, say
    fresh = written is not None and now - written < FRESH
    state.log, state.tail = next(iter(tails if held else broken or tails), (None, []))
    problem = has_failed(state.tail)
    if held or (held is None and fresh and not problem):
        state.word = "running"
        state.detail = "" if written is None else f"something was written {ago(now - written)} ago"
        said = progress_line(state.tail)
        if said and (
            state.done is None or said["what"] == {"generate": "generate", "annotate": "rewards"}.get(step)
        ):
            state.rate, state.left, state.note = said["rate"], said["left"], said["note"]
        if said and state.done is None:
            state.done, state.total, state.unit = said["done"], said["total"], said["unit"]
        state.seconds_left = seconds_left(state, now)
    elif problem:
        state.word, state.detail = "failed", problem
    elif written is not None:
        state.detail = f"nothing was written for {ago(now - written)}"
    return state


def finished_stages(folder):
    """Objects of stages.jsonl; lines that are none are passed over."""
    try:
        lines = (folder / "stages.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if (
            isinstance(value, dict)
            and isinstance(value.get("iteration"), int)
            and isinstance(value.get("stage"), str)
            and finite(value.get("seconds"))
        ):
            found.append(value)
    return found


def seconds_left(state, now):
    """Estimate for the whole run: a stage takes what those of its name took on average; None before one of
    each has finished.
    """
    took = {}
    for entry in state.stages:
        took.setdefault(entry.get("stage"), []).append(entry["seconds"])
    at = state.names.index(state.at[:2])
    # generate and annotate are done by the evaluation before, unless the run is told otherwise
    names = [stage for _, stage in state.names[at:] if stage in took or stage in ("train", "evaluate")]
    if any(name not in took for name in names):
        return None
    total = sum(sum(took[name]) / len(took[name]) for name in names)
    spent = 0.0
    try:
        spent = now - datetime.strptime(state.stages[-1]["finished"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (IndexError, KeyError, TypeError, ValueError):
        pass
    return max(0.0, total - min(max(spent, 0.0), sum(took[names[0]]) / len(took[names[0]])))


def ago(seconds):
    from common.progress import duration

    return duration(max(0, seconds))
