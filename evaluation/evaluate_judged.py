r"""Answer the questions of AlpacaEval 2, Arena-Hard and MT-Bench, and write the answers as their judges read
them.

In:  an iterate of a run, or any model, and the question files that you have.
Out: a folder for each benchmark with the answers and their manifest (which holds system prompt and template),
     and the file for the judge; the commands that judge, and how much the judge reads, are printed.

    bash evaluation/evaluate_judged.sh --run runs/NAME --iterate 3 --alpaca_eval mine/alpaca_eval.json \
        --arena_hard arena-hard-auto/data/arena-hard-v0.1/question.jsonl \
        --mt_bench FastChat/fastchat/llm_judge/data/mt_bench/question.jsonl

The .sh makes environment `vllm` and starts this script in it. The engine starts once for all first turns, and
once more for MT-Bench's second ones. AlpacaEval and Arena-Hard get greedy answers, MT-Bench its own
temperatures. A run's prompts are written as in its training (`generation:` of its loop.yaml). What is done
is not done again. `--local_judge MODEL` writes the judges' settings for a model that vLLM serves, in place of
the hosted ones: a stand-in, whose figures compare with no published ones. Let it judge the start too.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.cli import UserError, arg
from common.manifest import beside
from common.run_folder import RunFolder
from evaluation import judging, mt_bench
from evaluation.evaluate_benchmarks import model_of
from generation import get_hf2

ROOT = Path(__file__).resolve().parents[1]
SET_HERE = (
    *get_hf2.Arguments.per_job,
    *("model_name_or_path", "max_new_tokens", "max_input_length"),
    "mixture",  # its temperatures would stand in place of the benchmark's
)


@dataclass
class Arguments:
    run: str | None = arg(None, help="folder of a run; with --iterate")
    iterate: int | None = arg(None, help="which iterate of the run; 0 is the start")
    model_name_or_path: str | None = arg(None, help="a model in place of a run's iterate: folder or hub name")
    output_dir: str | None = arg(None, help="folder to write; None: RUN/iterI/benchmarks")
    alpaca_eval: str | None = arg(
        None, help="alpaca_eval.json of the hub's data set tatsu-lab/alpaca_eval", metavar="FILE"
    )
    arena_hard: list[str] = arg(
        [],
        help="question.jsonl in data/arena-hard-v0.1 or -v2.0 of a clone of arena-hard-auto; or both",
        metavar="FILE",
    )
    mt_bench: str | None = arg(
        None, help="question.jsonl in data/mt_bench of FastChat's fastchat/llm_judge", metavar="FILE"
    )
    generator: str | None = arg(None, help="the model's name for the judges; None: RUN-iterI")
    max_new_tokens: int = arg(2048, help="tokens of an answer")
    max_input_length: int = arg(6144, help="tokens of a prompt; longer ones are not answered, and listed")
    generation: dict = arg(
        {}, help="more arguments of generation/get_hf2.py; --generation.system_prompt TEXT"
    )
    local_judge: str | None = arg(None, help="a model that vLLM serves, as judge in place of the hosted ones")
    judge_url: str = arg("http://127.0.0.1:8000/v1", help="where it is served")
    dry_run: bool = arg(False, help="print the commands only")

    sections = {"generation": get_hf2.Arguments}


@dataclass
class Job:
    """Prompts to be answered at one temperature: `answers` is the prefix, its file the one shard's."""

    prompts: str
    answers: Path
    temperature: float = 0.0
    key: str | None = None

    @property
    def file(self) -> Path:
        return Path(f"{self.answers}0.jsonl")


def generator_of(run: str | None, iterate: int | None, model: str) -> str:
    """The model's name for the judges."""
    return f"{Path(run).resolve().name}-iter{iterate}" if run else Path(model).name


def clone_of(questions: str, bench_folders: str) -> Path | None:
    """The package's folder, for questions at CLONE/data/BENCH/question.jsonl."""
    path = Path(questions).resolve()
    inside = path.parent.parent.name == "data" and path.parent.name.startswith(bench_folders)
    return path.parents[2] if inside else None


def script(name: str, *words: object) -> list[str]:
    return [sys.executable, str(ROOT / name), *map(str, words)]


def answering(args: Arguments, model: str, jobs: list[Job]) -> list[str]:
    """The command that answers all jobs in one start of the engine."""
    section = [f"{RunFolder(args.run).settings}:generation"] if args.run else []
    words = [*section, "--model_name_or_path", model]
    words += ["--dataset_name_or_path", *[job.prompts for job in jobs]]
    words += ["--dataset_key", *[job.key or "none" for job in jobs]]
    words += ["--output_dir", *[job.answers for job in jobs], "--K", 1]
    words += ["--temperature", *[job.temperature for job in jobs], "--iteration", 0]
    # What training explored by is not asked here.
    words += ["--top_p", 1, "--top_k", -1] + (["--mixture", "none"] if args.run else [])
    words += ["--max_new_tokens", args.max_new_tokens, "--max_input_length", args.max_input_length]
    for key, value in args.generation.items():
        words += [f"--{key}", json.dumps(value) if isinstance(value, (list, dict)) else value]
    return script("generation/get_hf2.py", *words)


def exporting(args: Arguments, name: str, target: Path, jobs: list[Job], kind: str, clone: Path | None):
    """The command that writes the judge's file."""
    words = ["--dataset_name_or_path", *[job.file for job in jobs], "--format", kind, "--generator", name]
    words += ["--output_dir", target, "--overwrite", "true"]
    words += ["--clone", clone] if clone else []
    if args.local_judge and kind != "mt_bench":
        words += ["--local_judge", args.local_judge, "--judge_url", args.judge_url]
    return script("evaluation/export_answers.py", *words)


def plan(args: Arguments, model: str, target: Path) -> tuple[list[list[str]], list[Job]]:
    """(the commands in order, the jobs whose answers they leave)."""
    name = args.generator or generator_of(args.run, args.iterate, model)
    first, exports, before, second_turns, second = [], [], [], [], []
    if args.alpaca_eval:
        folder = target / "alpaca_eval"
        first.append(Job(args.alpaca_eval, folder / "answers", key="instruction"))
        exports.append(exporting(args, name, folder / f"{name}.json", first[-1:], "alpaca_eval", None))
    for questions in args.arena_hard:
        clone = clone_of(questions, "arena-hard-")
        if clone is None:
            raise UserError(
                f"--arena_hard {questions}: CLONE/data/arena-hard-v0.1/question.jsonl was expected"
            )
        folder = target / Path(questions).resolve().parent.name
        first.append(Job(questions, folder / "answers"))
        exports.append(exporting(args, name, folder / f"{name}.jsonl", first[-1:], "arena_hard", clone))
    if args.mt_bench:
        folder, degrees = target / "mt_bench", mt_bench.temperatures(args.mt_bench)
        turns = {
            turn: [Job(f"{folder}/{turn}_{t}.jsonl", folder / f"{turn}_{t}_answers", t) for t in degrees]
            for turn in ("first", "second")
        }
        ask = ("evaluation/mt_bench.py", "--questions", args.mt_bench, "--output_dir")
        before.append(script(*ask, folder / "first_"))
        answers = [job.file for job in turns["first"]]
        second_turns.append(script(*ask, folder / "second_", "--answers", *answers))
        first, second = first + turns["first"], turns["second"]
        second_turns.append(answering(args, model, second))
        clone = clone_of(args.mt_bench, "mt_bench")
        exports.append(exporting(args, name, folder / f"{name}.jsonl", second, "mt_bench", clone))
    return [*before, answering(args, model, first), *second_turns, *exports], first + second


def check(args: Arguments) -> None:
    questions = [path for path in (args.alpaca_eval, *args.arena_hard, args.mt_bench) if path]
    if not questions:
        raise UserError("no questions were given: --alpaca_eval, --arena_hard or --mt_bench and a file")
    for path in questions:
        cli.existing_file(path, "questions")
    for key in args.generation:
        if key in SET_HERE:
            raise UserError(f"--generation.{key} is decided here: see --help")
    if args.generator is not None:
        judging.check_generator(args.generator)


def main():
    args = cli.parse(Arguments, __doc__)
    cli.refuse(args.problems)
    check(args)
    model, target = model_of(args)
    commands, jobs = plan(args, model, target)
    for words in commands:
        if args.dry_run:
            print(shlex.join(words))
        elif status := subprocess.run(words, check=False).returncode:
            raise UserError(
                f"{Path(words[1]).name} ended with status {status}, see above; start again to go on"
            )
    for job in jobs:
        skipped = beside(job.file, ".skipped.jsonl")
        n = len(skipped.read_bytes().splitlines()) if skipped.is_file() and not args.dry_run else 0
        if n:
            print(f"note: {cli.count(n, 'question')} of {job.prompts} not answered, see {skipped}")
    if args.local_judge:
        print(f"To serve the judge: bash generation/register_server.sh {shlex.quote(args.local_judge)}")
        print(
            "Its figures compare with those that it gives the start (--iterate 0), not with published ones."
        )


if __name__ == "__main__":
    cli.run(main)
