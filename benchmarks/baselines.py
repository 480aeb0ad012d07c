"""Iterative DPO against its baselines on the tiny task: the same prompts, as many answers, pairs and steps.

In:  nothing; models and prompts are built anew for every seed, which then decides sampling and training too.
Out: OUTPUT_DIR/seedS/WAY, a run's folder for each seed and way, and a table, also as OUTPUT_DIR/table.md.
     A second start continues.

    python benchmarks/baselines.py --output_dir runs/baselines --seeds 0 1 2

Each way sees the 675 training prompts of the tiny task, answered 8 times, scored by the same reward model:

    loop         three iterations: 225 prompts answered by the policy of then, then DPO from there
    offline_dpo  all prompts answered by the start, then one DPO
    sft          the same answers; SFT on the best of 8
    sft_loop     three iterations with SFT on the best of 8 (RAFT)
    dpo_random   as offline_dpo with best and worst drawn blindly: the control
    sft_random   as sft with one of the 8 drawn blindly: the control
    ppo          the small PPO, 21 rollouts of 64 prompts × 4 answers
    online       DPO as the loop's, in 27 rounds of 25 prompts, each answered by the newest weights

All train for two epochs with batches of 16 pairs or answers; PPO has its own steps, and online training one
epoch with batches of 8. Every trained policy
answers the same 300 held-out prompts. *Gold* is the task's own score, which no way sees. The interval of a
difference is Student's over the seeds, each seed's two policies compared on the same prompts.
"""

import math
import statistics
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from common.cli import UserError, arg, parse, run
from common.manifest import write_text
from common.run_folder import RunFolder, kind_of, read_object
from evaluation import metrics
from report.state import iterations_of

SFT = ("--training", "configs/training_sft_tiny.yaml")
BLIND = ("--training_args.choose_type", "blind")
# Way → (driver, its arguments).
WAYS = {
    "loop": ("run_loop.sh", ()),
    "offline_dpo": ("run_loop.sh", ()),
    "sft": ("run_loop.sh", SFT),
    "sft_loop": ("run_loop.sh", SFT),
    "dpo_random": ("run_loop.sh", BLIND),
    "sft_random": ("run_loop.sh", (*SFT, *BLIND)),
    "ppo": ("run_ppo.sh", ()),
    "online": ("run_online.sh", ()),
}
# One training, on the start's answers to all prompts.
ONCE = ("offline_dpo", "sft", "dpo_random", "sft_random")
CONFIGS = {f"run_{kind}.sh": f"configs/{kind}_tiny.yaml" for kind in ("loop", "ppo", "online")}
# Two-sided 95% points of Student's t by degrees of freedom (2 to 10 seeds).
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
COLUMNS = "way|seeds|gold|greedy gold|reward|length|KL|pairs, steps|gold, way − loop".split("|")


@dataclass
class Arguments:
    output_dir: str = arg("runs/baselines", "folder of the runs and of the table")
    seeds: list[int] = arg([0, 1, 2], "one whole experiment each, models and prompts included")
    ways: list[str] = arg(list(WAYS), "which to run; what is there is in the table in any case")


def setup(folder: Path, seed: int) -> str:
    return f"python tiny/build.py --output_dir {folder / 'built'} --seed {seed}"


def command(way: str, folder: Path, seed: int) -> list[str]:
    """The command that runs `way`; `folder` is the seed's, as seen from the project's."""
    (driver, given), built = WAYS[way], folder / "built"
    sets = [built / f"prompts/iter{i}.jsonl" for i in (1, 2, 3)]
    if way in ONCE:
        sets, given = [folder / "all.jsonl"], ("--iterations", "1", *given)
    settings = {
        "run_dir": folder / way,
        "seed": seed,
        "setup_command": setup(folder, seed),
        "model_name_or_path": built / "policy",
        "reward_name_or_path": built / "reward_model",
        "heldout_prompts": built / "prompts/heldout.jsonl",
    }
    named = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return ["bash", driver, CONFIGS[driver], *named, "--prompts", *map(str, sets), *given]


def run_way(way: str, folder: Path, seed: int):
    """Run one way, from where it stopped.

    Raises:
        UserError: the run failed; its log is named.
    """
    log = folder / f"{way}.log"
    print(f"seed {seed}, {way}: {log}", flush=True)
    with log.open("w") as file:
        status = subprocess.run(
            command(way, folder, seed),
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        ).returncode
    if status:
        raise UserError(f"{way} of seed {seed} ended with {status}; see the end of {log}")


def build(folder: Path, seed: int):
    """Models and prompts of a seed, and all its training prompts in one file."""
    words = [sys.executable, *setup(folder, seed).split()[1:]]
    if subprocess.run(words, cwd=ROOT).returncode:
        raise UserError(f"the tiny models of seed {seed} could not be built")
    parts = [(folder / f"built/prompts/iter{i}.jsonl").read_text(encoding="utf-8") for i in (1, 2, 3)]
    write_text(folder / "all.jsonl", "".join(parts))


def read_way(folder: Path) -> dict | None:
    """Figures of a run's last policy, None where the run is not whole.

    Returns:
        metrics.json's row, with the sums `pairs` and `steps` over its trainings, and `prompts`, {id: mean
        gold of its sampled answers}.
    """
    place = RunFolder(folder)
    settings = metrics.settings_of(folder)
    last = iterations_of(settings)
    rows = {row.get("iterate"): row for row in read_object(place.metrics_table).get("iterates") or []}
    if last not in rows:
        return None
    # Online, a manifest has what was trained on since the start.
    first = last if kind_of(settings) == "online" else 1
    trained = [read_object(place.model_manifest(i)) for i in range(first, last + 1)]
    gold = metrics.load_gold(settings["gold_function"])
    answers = metrics.read_rewarded(place.heldout(last, "sampled", "rewarded"))
    return rows[last] | {
        "pairs": sum(held.get("counts", {}).get("train_pairs", 0) for held in trained),
        "steps": sum(held.get("metrics", {}).get("step", 0) for held in trained),
        "prompts": metrics.prompt_means(answers, gold),
    }


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean, and the least and the largest, of the seeds."""
    values = list(values)
    ends = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{ends}"


def interval(differences: list[float]) -> str:
    """Mean of the seeds' differences with its 95% interval, by Student's distribution over the seeds."""
    mean = f"{statistics.fmean(differences):+.3f}"
    if not 1 < len(differences) <= len(STUDENT) + 1:
        return mean
    half = STUDENT[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean} ± {half:.3f}"


def trained_on(rows: list[dict]) -> str:
    """Pairs and steps; PPO has none."""
    each = (spread((row[key] for row in rows), 0) for key in ("pairs", "steps"))
    return ", ".join(each) if any(row["pairs"] for row in rows) else "–"


def gold_difference(one: dict, other: dict) -> float:
    """Mean over the prompts that both policies answered."""
    both = one["prompts"].keys() & other["prompts"].keys()
    return statistics.fmean(one["prompts"][key] - other["prompts"][key] for key in both)


def table(found: dict[str, dict[int, dict]]) -> str:
    """The ways side by side, in Markdown. `found`: {way: {seed: `read_way`'s figures}}."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for way, seeds in found.items():
        rows, loop = list(seeds.values()), found.get("loop", {})
        shared = [gold_difference(row, loop[seed]) for seed, row in seeds.items() if seed in loop]
        lines.append(
            [
                way,
                " ".join(map(str, seeds)),
                *(spread(row[name] for row in rows) for name in ("sampled_gold", "greedy_gold")),
                spread((row["sampled_reward"] for row in rows), 2),
                spread((row["sampled_length"] for row in rows), 1),
                spread((row["kl"] for row in rows), 2),
                trained_on(rows),
                interval(shared) if way != "loop" and shared else "",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def main():
    args = parse(Arguments, __doc__)
    if unknown := [way for way in args.ways if way not in WAYS]:
        raise UserError(f"--ways {unknown[0]}: one of {', '.join(WAYS)} was expected")
    output = Path(args.output_dir).resolve()
    folders = {seed: output / f"seed{seed}" for seed in args.seeds}
    for seed, folder in folders.items():
        if left := [way for way in args.ways if read_way(folder / way) is None]:
            build(folder, seed)
        for way in left:
            run_way(way, folder, seed)
    found = {way: {seed: read_way(folder / way) for seed, folder in folders.items()} for way in WAYS}
    found = {way: {seed: row for seed, row in seeds.items() if row} for way, seeds in found.items()}
    text = table({way: seeds for way, seeds in found.items() if seeds})
    write_text(output / "table.md", text)
    print(text, end="")


if __name__ == "__main__":
    run(main)
