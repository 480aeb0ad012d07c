"""What a round of online training costs, and where its seconds go, against a loop's iteration.

In:  nothing; the tiny models are built where they are not there.
Out: a table of seconds, and beside it what `--check` estimates for Llama-3-8B; both runs stay in OUTPUT_DIR.

    python benchmarks/online.py --output_dir runs/bench_online --rounds 6
    python benchmarks/online.py --whole true     # both configs as they are, with their four evaluations

Both drivers run whole, one after the other, on the same prompts, without evaluation: `run_online.sh` its
rounds with one start of servers and trainer, `run_loop.sh` one iteration of as many prompts. *Starts* is what
is left of the wall clock: checks, imports, engines, models, what is written at the end, and the loop's
reference. CPU seconds are those of all processes that a driver has started, servers too; on a busy machine
they say more than the clock.
"""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from common.cli import UserError, arg, parse, run
from common.devices import speed_of
from common.manifest import write_json
from common.progress import duration
from common.run_folder import RunFolder
from dpo_iteration.rounds_log import read_log
from loop.estimates import estimate, online_seconds
from report import figures, run_data

CONFIGS = {"online": "configs/online_tiny.yaml", "loop": "configs/loop_tiny.yaml"}
# Parts of a round in its log, and the step of a loop whose work is the same.
STEPS = {"waiting": "sample", "scoring": "annotate", "training": "train"}
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2): processes whose parents are gone become ours


@dataclass
class Arguments:
    output_dir: str = arg("runs/bench_online", "folder of the two runs; what is there is deleted")
    rounds: int = arg(6, "of online training")
    prompts_per_round: int = arg(25, "prompts of each; the loop's iteration has those of all rounds")
    staleness: int = arg(0, "of online training", [0, 1])
    server_port: int = arg(8000, "of the online run's server")
    whole: bool = arg(False, "both configs as they are, evaluations too: what each takes in all")


def drive(kind: str, folder: Path, *words: object) -> dict:
    """{wall, cpu} seconds of a run of run_KIND.sh in `folder`/KIND.

    Raises:
        UserError: it failed; names its log.
    """
    log, before, started = folder / f"{kind}.log", resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    command = ["bash", f"run_{kind}.sh", CONFIGS[kind], "--run_dir", folder / kind, *words]
    with log.open("w") as file:
        status = subprocess.run(
            [str(word) for word in command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    wall = time.time() - started
    while True:  # servers are nobody else's children
        try:
            os.wait()
        except ChildProcessError:
            break
    if status:
        raise UserError(f"run_{kind}.sh ended with {status}; see the end of {log}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = (getattr(after, key) - getattr(before, key) for key in ("ru_utime", "ru_stime"))
    return {"wall": wall, "cpu": sum(spent)}


def write_prompts(path: Path, count: int):
    """The first `count` training prompts of the tiny task.

    Raises:
        UserError: there are fewer.
    """
    sets = [ROOT / f"tiny/built/prompts/iter{i}.jsonl" for i in (1, 2, 3)]
    lines = [line for file in sets for line in file.read_text(encoding="utf-8").split("\n") if line]
    if len(lines) < count:
        raise UserError(f"--rounds × --prompts_per_round are {count} prompts, the tiny task has {len(lines)}")
    path.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")


def of_online(folder: Path) -> dict[str, float]:
    """Seconds of each part of all rounds: what the trainer spends in it, `waiting` for answers among them."""
    found = {}
    for entry in read_log(RunFolder(folder).rounds_log):
        for part, seconds in entry["seconds"].items():
            found[part] = found.get(part, 0.0) + seconds
    return found


def of_loop(folder: Path) -> dict[str, float]:
    """Seconds of work of each step that is a part of a round, too."""
    rows = figures.of_steps(run_data.read_run(folder, gold=False))
    work = {row["step"]: row["work"] for row in rows}
    return {part: work[step] for part, step in STEPS.items() if work.get(step) is not None}


def table(args: Arguments, spent: dict[str, dict], parts: dict[str, dict]) -> str:
    """Both side by side, in Markdown: seconds in all, and a round's (or as many prompts') share."""
    shown = {"waiting": "sampling (the trainer's wait)"}
    names = ("sending", *STEPS, "reference", "kl")
    each, every = args.prompts_per_round, args.rounds * args.prompts_per_round
    lines = [
        f"| seconds | online, {args.rounds} rounds of {each} | a round | loop, one iteration of {every} "
        f"| per {each} prompts |",
        "| --- | --- | --- | --- | --- |",
    ]

    def row(name: str, values: list[float | None]):
        cells = [
            f"{v:.1f}" if v is not None else "–" for one in values for v in (one, one and one / args.rounds)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")

    kinds = list(CONFIGS)
    row("in all", [spent[kind]["wall"] for kind in kinds])
    row("starts", [spent[k]["wall"] - sum(parts[k].get(n, 0.0) for n in names) for k in kinds])
    for name in names:
        row(shown.get(name, name), [parts[kind].get(name) for kind in kinds])
    row("CPU seconds of all processes", [spent[kind]["cpu"] for kind in kinds])
    return "\n".join(lines) + "\n"


def of_whole(spent: dict[str, dict]) -> str:
    """What both runs take in all, in Markdown."""
    lines = ["| seconds of the tiny run | online | loop | online / loop |", "| --- | --- | --- | --- |"]
    for key, name in (("wall", "clock"), ("cpu", "CPU seconds of all processes")):
        ours, theirs = (spent[kind][key] for kind in CONFIGS)
        lines.append(f"| {name} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |")
    return "\n".join(lines) + "\n"


def arithmetic() -> str:
    """Llama-3-8B on 8 A100s as `--check` estimates it: what rounds cost, and a loop of as many iterations."""
    kind, size, prompts, rounds = speed_of(None)[0], 8.03e9, 320, 150
    sampling, scoring, training = online_seconds(size, prompts, 8, 4, 4, kind, ["sigmoid"])
    apart = sum(estimate(size, prompts, 8, 1, 8, kind, False, ["sigmoid"]))
    ways = {
        "online, staleness 0, 4 + 4 GPUs": sampling + scoring + training,
        "online, staleness 1, 4 + 4 GPUs": max(sampling, scoring + training),
        "a loop's iteration, 8 GPUs, its starts apart": apart,
    }
    lines = [
        f"| Llama-3-8B, 8 × {kind.name}, {prompts} prompts | a round | {rounds} rounds |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {way} | {duration(one)} | {duration(one * rounds)} |" for way, one in ways.items()]
    lines.append(f"| each minute that an iteration's starts take | 1m00s | {duration(60 * rounds)} |")
    return "\n".join(lines) + "\n"


def main():
    args = parse(Arguments, __doc__)
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    folder = Path(args.output_dir).resolve()
    for kind in CONFIGS:
        shutil.rmtree(folder / kind, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run([sys.executable, "tiny/build.py", "--output_dir", "tiny/built"], cwd=ROOT).returncode:
        raise UserError("the tiny models could not be built")
    if args.whole:
        print(
            of_whole({kind: drive(kind, folder, "--server_port", args.server_port) for kind in CONFIGS}),
            end="",
        )
        return
    write_prompts(folder / "prompts.jsonl", args.rounds * args.prompts_per_round)
    same = (
        "--prompts",
        folder / "prompts.jsonl",
        "--heldout_prompts",
        "null",
        "--server_port",
        args.server_port,
    )
    rounds = ("--online.rounds", args.rounds, "--online.prompts_per_round", args.prompts_per_round)
    rounds += ("--evaluate_every", args.rounds, "--online.staleness", args.staleness)
    more = {"online": rounds, "loop": ("--iterations", 1)}
    spent = {kind: drive(kind, folder, *same, *words) for kind, words in more.items()}
    parts = {"online": of_online(folder / "online"), "loop": of_loop(folder / "loop")}
    write_json(folder / "seconds.json", {"spent": spent, "parts": parts})
    print(table(args, spent, parts), arithmetic(), sep="\n", end="")


if __name__ == "__main__":
    run(main)
