"""What can be known before an hour is spent: settings, paths, GPUs, memory, disk, templates, vocabularies,
overlap.

`check(plan)` prints what it found and refuses what cannot work, all problems at once. Of models and data on
the hub it says what it could not look at; functions of the user's own are called once, on a made-up response.
"""

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from annotate_data import arguments as annotation
from annotate_data.functions import EXAMPLE
from common import engine, models, trackers
from common.cli import UserError, build
from common.cli import count as counted
from common.functions import function_file
from common.models import check_policy
from dpo_iteration import arguments as dpo
from dpo_iteration import checks, memory
from evaluation.select_iterate import Selection
from generation import get_hf2, sampling
from loop import changes, machines
from loop.estimates import describe, parameters
from loop.prompt_sets import check_prompts, first_prompt
from loop.servers import check_servers
from loop.settings import LoopSettings, decided, gpu_groups, keys_of_section, positions, processes
from loop.try_function import made_up, try_function
from report.state import is_held

if TYPE_CHECKING:
    from loop.plan import Plan

# learning rate × steps; Adam moves no weight further. The recipe's is 1.6e-4, and half a bf16 step at a
# weight of 0.02 is 6e-5
LEAST_MOVE = 2e-5


class Findings:
    """Problems, all of which are told at once, and notes."""

    def __init__(self):
        self.problems, self.notes = [], []

    def attempt(self, function: Callable, *args: object) -> Any:
        """What the function returns; None, and a problem more, where it raises a UserError."""
        try:
            return function(*args)
        except UserError as error:
            # two stages may be asked the same
            self.problems.extend(problem for problem in error.problems if problem not in self.problems)
            return None

    def tell(self, summary: str):
        """Print summary and notes; the problems instead, a line each, where there are any."""
        if self.problems:
            for problem in self.problems[:-1]:
                print(f"error: {problem}", file=sys.stderr)
            raise UserError(self.problems[-1])
        for line in (summary, *self.notes):
            print(f"check: {line}", file=sys.stderr)


def check_settings(plan: "Plan", found: Findings):
    """Look at what the settings themselves say."""
    settings = plan.settings
    if not settings.prompts:
        raise UserError("prompts name at least one set")
    found.problems.extend(settings.problems)
    found.problems.extend(decided(settings))
    found.attempt(machines.check, settings)
    for key in ("num_shards", "num_processes"):
        if getattr(settings, key) is not None and getattr(settings, key) < 1:
            raise UserError(f"{key} {getattr(settings, key)} must be at least 1")
    if settings.gold_function:
        found.attempt(function_file, settings.gold_function, "--gold_function", EXAMPLE, True)
    # The texts alone: what they import may be in another environment, and what they print would reach the
    # driver.
    if function := settings.annotation.get("reward_function"):
        found.attempt(function_file, function, "--reward_function", EXAMPLE, True)
    elif not settings.reward_name_or_path:
        told = "reward_name_or_path names no reward model, and annotation has no reward_function"
        found.problems.append(told)
    judges = settings.eval_reward_model
    if judges and judges == settings.reward_name_or_path:
        found.problems.append(
            f"eval_reward_model {', '.join(judges)} is what training is rewarded by: name another one, or "
            "leave it out"
        )
    found.attempt(check_select, settings)
    found.attempt(trackers.check, settings.report_to, "report_to", trackers.FIGURES)
    groups = found.attempt(gpu_groups, settings) or []
    cpus = machines.cpus_of_a_machine()
    if cpus and cpus < len(groups) and machines.machine_count(settings) > 1 and not machines.on_ray(settings):
        found.problems.append(
            f"{len(groups)} generation processes a machine, and this job has {cpus} CPUs on one: give sbatch "
            "--cpus-per-task"
        )


def check_select(settings: LoopSettings):
    """Refuse a rule for the iterate to keep that the run could not follow: it would be found out after the
    first training.
    """
    rule = build(Selection, settings.select, "select")
    lacks = {
        "gold": ("gold_function", settings.gold_function),
        "judge": ("eval_reward_model", settings.eval_reward_model),
    }
    key, value = lacks.get(rule.by, ("", True))
    if not value:
        raise UserError(f"select.by is {rule.by}, and {key} is not set: set it, or choose by another measure")
    if rule.max_kl is not None and not settings.divergence:
        raise UserError("select.max_kl needs the KL of each iterate: leave divergence: false out")
    if getattr(settings, "stop_when", None) and settings.heldout_prompts is None:
        raise UserError(
            "stop_when needs held-out answers to measure by: name heldout_prompts, or leave it out"
        )


def check_models(plan: "Plan", found: Findings):
    """Look at the models and templates, and at the arguments of sampling and annotation."""
    settings = plan.settings
    check_settings(plan, found)
    found.attempt(check_policy, settings.model_name_or_path, "model_name_or_path")
    if not machines.gpus_of(settings):
        found.attempt(engine.check_head_size, settings.model_name_or_path)
    check_model_files(settings, "model_name_or_path", settings.model_name_or_path, settings.generation, found)
    scorers = {"annotation": ("reward_name_or_path", settings.reward_name_or_path or [])}
    if settings.eval_reward_model:
        scorers["eval_annotation"] = ("eval_reward_model", settings.eval_reward_model)
    for section, (key, names) in scorers.items():
        for name in names:
            check_model_files(settings, key, name, getattr(settings, section), found)
    found.attempt(check_sampling, plan, found)
    found.attempt(check_servers, plan)
    for section, (_, names) in scorers.items():
        asked = found.attempt(plan.annotation, getattr(settings, section), section)
        given = {"dataset_name_or_path": ["generated"], "output_dir": ["rewarded"]}
        given |= {"reward_name_or_path": names} if names else {}
        asked = found.attempt(build, annotation.Arguments, asked | given, section) if asked else None
        if asked:
            found.attempt(annotation.check, asked)


def check_model_files(settings: LoopSettings, key: str, name: str, section: dict, found: Findings):
    """Look at a model's tokenizer and template, or say of one on the hub that nobody has.

    Args:
        key: the setting that names it. section: what may bring another template.
    """
    found.attempt(models.check_tokenizer_files, name)
    if Path(name).is_dir():
        if not found.attempt(models.has_template, name) and not section.get("chat_template"):
            found.problems.append(
                f"{key} {name} has no chat template: put a chat_template.jinja beside its tokenizer"
            )
        return
    size = settings.model_size_b if key == "model_name_or_path" else None
    taken = f"; its size is taken to be model_size_b {size}" if size else ""
    found.notes.append(
        f"on the hub, not looked at: {key} {name}: whether it is there and is of the right kind, its "
        f"weights, chat template, vocabulary, positions{taken}"
    )


def check_sampling(plan: "Plan", found: Findings):
    """Refuse wrong sampling arguments, of the responses and of the held-out answers."""
    for job in plan.jobs():
        with keys_of_section("generation", get_hf2.Arguments):
            sampling.check_sampling(job)
            engine.check_engine_args(job.engine_args, bool(machines.gpus_of(plan.settings)))
    check_positions(plan, found)
    check_heldout(plan, found)


def check_heldout(plan: "Plan", found: Findings):
    """Note at which temperature the held-out answers are sampled where that was not said."""
    settings, first = plan.settings, plan.first_part()
    if first and settings.heldout_prompts and "temperature" not in settings.heldout:
        found.notes.append(
            f"held-out answers are sampled at temperature {first.temperature:g}, that of the policy's "
            "first part of the mixture: heldout.temperature gives another"
        )


def check_mixture(plan: "Plan", found: Findings):
    """Note what parts of a mixture cost and keep that are sampled from other models."""
    others = [name for name in plan.models() if name != "policy"]
    if not others:
        return
    found.notes.append(
        f"responses are of the policy and {' and '.join(others)}: the engine starts once more an "
        "iteration for each other model; before policy 1 the start is all of them"
    )
    if plan.kept_iterates() != plan.settings.keep_iterates:
        found.notes.append(
            f"keep_iterates {plan.settings.keep_iterates}: {plan.kept_iterates()} are kept, since the "
            "mixture samples from the previous policy"
        )


def check_functions(plan: "Plan", found: Findings):
    """Call the run's own functions on a made-up response to the first prompt of each set whose answers they
    are to judge.
    """
    settings = plan.settings
    heldout = [] if settings.heldout_prompts is None else [settings.heldout_prompts]
    sets = [*dict.fromkeys(settings.prompts), *heldout]
    vllm = Path(os.environ.get("RLHF_VLLM_ENV", "")) / "bin" / "python"  # annotation runs there
    for section, names in (("annotation", sets), ("eval_annotation", heldout)):
        spec = getattr(settings, section).get("reward_function")
        check_function(plan, f"{section}.reward_function", "reward", spec, names, vllm, found)
    gold, python = settings.gold_function, Path(sys.executable)
    check_function(plan, "gold_function", "gold", gold, heldout, python, found)


def check_function(
    plan: "Plan", key: str, kind: str, spec: str | None, names: list[str], python: Path, found: Findings
):
    """The same of one function; the first prompt set that it fails on is told.

    Args:
        key: the setting that names it. kind: reward or gold. spec: FILE.py:NAME, or None.
        names: prompt sets. python: of the environment that the function will run in.
    """
    for name in names if spec else ():
        record = first_prompt(name, plan)
        if record is None:
            found.notes.append(f"{key} {spec} was not tried on {name}, which is on the hub")
            continue
        if not python.is_file():
            why = "environment vllm, in which it will run, is not there yet"
            found.notes.append(f"{key} {spec} was not tried: {why}")
            return
        try:
            told = try_function(kind, spec, [made_up(record)], str(python))
        except TimeoutError as error:
            found.notes.append(f"{key}: {error}; it was not waited for")
            return
        if told:
            where = f"tried on a made-up response to the first prompt of {name}"
            found.problems.append(f"{key}, {where}: {told}")
            return


def check_positions(plan: "Plan", found: Findings):
    """Note where prompts and responses may be longer than the policy's positions: generation caps what it
    samples.
    """
    limit = positions(plan.settings.model_name_or_path)
    sizes = [(job.max_input_length, job.max_new_tokens) for job in plan.jobs()]
    prompt, response = max(sizes, key=sum, default=(0, 0))
    if not limit or prompt + response <= limit:
        return
    so = "lower generation.max_new_tokens, or every response may be cut off where they end"
    if limit > response:
        so = f"a response to a prompt of more than {limit - response} tokens is cut off where they end"
    found.notes.append(
        f"the policy has {limit} positions, max_input_length {prompt} + max_new_tokens {response} are "
        f"more: {so}"
    )


def check_gpus(plan: "Plan", found: Findings) -> tuple[list[str], float | None]:
    """Refuse more processes than GPUs, and a large model without any; returns (visible GPUs, parameters of
    the policy or None).
    """
    settings, gpus = plan.settings, machines.gpus_of(plan.settings)
    if gpus and (settings.num_processes or 0) > len(gpus):
        found.problems.append(f"num_processes {settings.num_processes}, but {len(gpus)} GPUs are visible")
    count = parameters(settings.model_name_or_path, settings.model_size_b)
    if count and count > 1.5e9 and not gpus:
        found.problems.append(f"{count / 1e9:.1f} billion parameters and no GPU: this run needs GPUs")
    return gpus, count


def check_learning(plan: "Plan", args: dpo.Arguments, sets: dict, found: Findings):
    """Note a training that can hardly change the policy: few steps at a small rate, or bf16 where there is no
    GPU.

    Args:
        args: of run_dpo.py for iteration 1. sets: as `check_prompts` returns.
    """
    counts = [len(sets[name]) for name in plan.settings.prompts if sets.get(name)]
    if counts:
        world = processes(plan.settings)
        pairs = round(min(counts) * args.pairs_per_prompt * (1 - args.eval_fraction))
        per_step = dpo.halved(dpo.pairs_per_step(args, world), pairs, args, world)
        steps = math.ceil(math.ceil(pairs / per_step) * args.num_train_epochs)
        steps = args.max_steps if args.max_steps > 0 else steps
        move = steps * args.learning_rate
        if move < LEAST_MOVE:
            found.notes.append(
                f"warning: this run will hardly learn: an iteration of {min(counts)} prompts has at most "
                f"{steps} optimizer steps, and at learning_rate {args.learning_rate:g} they move a weight by "
                f"{move:.0e} at most{', which bf16 rounds away' if args.bf16 else ''}; raise "
                "--training_args.learning_rate (5e-7 is "
                "for 8 billion parameters and some hundred steps) or num_train_epochs, or give more prompts"
            )
    if args.bf16 and not machines.gpus_of(plan.settings):
        found.notes.append(
            "warning: bf16 on a CPU is slow, and what training changes is rounded when the policy is saved: "
            "give --training_args.bf16 false"
        )


def summary(plan: "Plan") -> str:
    """How many processes of what will be at work."""
    generators = "API server" if plan.settings.generation_backend == "servers" else "generation process"
    where = "GPUs" if machines.gpus_of(plan.settings) else "CPU"
    count = machines.machine_count(plan.settings)
    over = f" over {count} machines" if count > 1 else ""
    return (
        f"{counted(count * len(gpu_groups(plan.settings)), generators)}, "
        f"{counted(processes(plan.settings), 'training process')}{over}, {where}"
    )


def check_training(plan: "Plan", method: str | None, found: Findings) -> dpo.Arguments | None:
    """Refuse wrong arguments of training; returns those of iteration 1.

    `method`: of spreading it over GPUs, as dpo_iteration/memory.py calls it.
    """
    settings, given = plan.settings, found.attempt(plan.training_of, 1)

    def checked() -> dpo.Arguments:
        with keys_of_section("training_args", dpo.Arguments):
            return checks.arguments(given, settings.training)

    args = given and found.attempt(checked)
    if not args:
        return None
    if dpo.reason_for_trl(args):
        world = processes(settings)
        found.attempt(dpo.accumulation, args, dpo.pairs_per_step(args, world), world)
    if method in ("zero3", "zero3_offload", "fsdp2") and args.load_in_4bit:
        found.problems.append(
            f"load_in_4bit does not work where weights are shared out ({settings.accelerate_config}): take "
            "configs/zero2.yaml or ddp.yaml"
        )
    return args


def check(plan: "Plan", left: bool):
    """Print findings about a run of the loop and refuse what cannot work.

    Args:
        left: whether anything is left to do.

    Raises:
        UserError: all problems, a line each.
    """
    settings, found = plan.settings, Findings()
    if settings.keep_iterates is not None and settings.keep_iterates < 1:
        raise UserError(f"keep_iterates {settings.keep_iterates} must be at least 1")
    check_models(plan, found)
    if settings.generation.get("K") == 1:
        found.problems.append(
            "generation.K 1 leaves no pairs to train on: 2 responses a prompt are the least, 8 are usual"
        )
    method = found.attempt(memory.method_of, settings.accelerate_config)
    args = check_training(plan, method, found)
    if not found.problems:
        found.notes.extend(found.attempt(changes.refuse, plan, plan.resolved()) or [])
    if not found.problems:
        check_mixture(plan, found)
    sets = check_prompts(plan, found)
    if settings.iterations > len(settings.prompts):
        found.notes.append(
            f"{settings.iterations} iterations take turns over "
            f"{counted(len(settings.prompts), 'prompt set')}; the samples differ, the prompts repeat"
        )
    gpus, count = check_gpus(plan, found)
    if count and method is not None:
        local_size = sum(len(p) for p in sets.values() if p) or None
        describe(plan, count, method, gpus, local_size, args, found)
    if args and not found.problems:
        check_learning(plan, args, sets, found)
    conclude(plan, left, found, "" if found.problems else summary(plan))


def conclude(plan: "Plan", left: bool, found: Findings, summary: str):
    """Try the run's functions where something is left to do, and tell what was found."""
    if left and not found.problems:
        check_functions(plan, found)
        path = plan.folder.path.absolute()
        if plan.planning and machines.on_ray(plan.settings) and is_held(path):
            found.notes.append("the machines were not asked, since the run that is at work has their GPUs")
        else:
            machines.ask(plan.settings, next(p for p in [path, *path.parents] if p.is_dir()), found)
    setup = plan.planning and plan.settings.setup_command
    if found.problems and setup and not Path(plan.settings.model_name_or_path).exists():
        found.problems.append(
            "what is missing may be what the setup command makes, which --check and --dry_run do not run: "
            f"{setup}"
        )
    found.tell(summary)
