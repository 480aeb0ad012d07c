"""The settings of a run, and how its stages are spread over the GPUs there are."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

from annotate_data.arguments import Arguments as RewardArguments
from common import models, trackers
from common.arguments import is_required
from common.cli import UserError, arg, build
from common.run_folder import kind_of
from dpo_iteration.arguments import Arguments as DPOArguments
from evaluation.select_iterate import Selection
from generation import get_hf2
from loop.machines import gpus_of, machine_count

# What `servers` may set of generation/gen_hf.py.
CLIENT = ("concurrency", "timeout", "retries", "give_up_after")
# Keys of the sections that the run decides: what they said would be passed over.
DECIDED = {
    "generation": (
        *("model_name_or_path", "dataset_name_or_path", "output_dir"),
        *("iteration", "seed", "local_index", "my_world_size", "parts_of"),
    ),
    "annotation": ("reward_name_or_path", "dataset_name_or_path", "output_dir", "K"),
    "training_args": (
        *("model_name_or_path", "ref_model_name_or_path", "train_dir", "output_dir"),
        *("pairs_path", "seed", "reference_cache", "train_weights", "dataset_split"),
    ),
}
DECIDED |= {"heldout": DECIDED["generation"], "eval_annotation": DECIDED["annotation"]}
INSTEAD = {
    "output_dir": "run_dir",
    "dataset_name_or_path": "prompts and heldout_prompts",
    "K": "generation.K",
    "ref_model_name_or_path": "reference",
    "train_dir": "prompts and train_on",
    "local_index": "num_shards",
    "my_world_size": "num_shards",
}


@dataclasses.dataclass(kw_only=True)
class RunSettings:
    """What every run has: models, prompts, and how its policies are evaluated; ppo/run.py builds on it."""

    run_dir: str = arg(help="folder of the run")
    model_name_or_path: str = arg(help="the policy to start from: hub name or folder")
    reward_name_or_path: list[str] | None = arg(
        None, "reward models: hub names or folders; none where annotation.reward_function scores alone"
    )
    prompts: list[str] = arg(help="prompt sets")
    heldout_prompts: str | None = arg(None, "prompts for evaluation only; null: nothing is evaluated")
    seed: int = arg(42, "seed of the run; sampling, pair selection and training derive theirs from it")
    date: str | None = arg(
        None, "day for chat templates that write today's, YYYY-MM-DD; None: the day on which the run began"
    )
    generation: dict = arg({}, "arguments of generation/get_hf2.py; --generation.K 4")
    generation_backend: str = arg(
        "engine",
        "an engine in each process (get_hf2.py), or API servers and a client (gen_hf.py)",
        ["engine", "servers"],
    )
    server_port: int = arg(8000, "port of the first API server; the others follow")
    servers: dict = arg(
        {},
        f"of generation_backend servers: {', '.join(CLIENT)} of generation/gen_hf.py; and for servers on "
        "other machines hosts, ports, and the commands start and stop",
    )
    heldout: dict = arg({}, "arguments of the held-out sampling that differ from `generation`")
    annotation: dict = arg({}, "arguments of annotate_data/get_rewards.py")
    eval_reward_model: list[str] | None = arg(
        None, "second reward models, which score the held-out answers only and so see what training does not"
    )
    eval_annotation: dict = arg({}, "arguments of annotate_data/get_rewards.py for `eval_reward_model`")
    divergence: bool = arg(
        True,
        "estimate each iterate's KL to the starting policy from its held-out answers "
        "(evaluation/divergence.py)",
    )
    select: dict = arg(
        {}, "by what rule RUN/best is chosen: by, max_kl, min_gain of evaluation/select_iterate.py"
    )
    report: bool = arg(True, "make RUN/report/index.html anew after each stage")
    report_to: list[str] | None = arg(
        None, f"log each iterate's figures there, one run for the loop: {', '.join(trackers.FIGURES)}"
    )
    project: str | None = arg(
        None,
        f"project at the trackers; None: as their variables say (WANDB_PROJECT, …), else {trackers.PROJECT}",
    )
    run_name: str | None = arg(None, "name of the run at the trackers; None: that of its folder")
    machines: int | None = arg(
        None, "machines that every step runs on; None: all of the Slurm job or the Ray cluster, else 1"
    )
    launcher: str = arg(
        "auto",
        "what starts steps on machines: slurm in a job, ray on the cluster of RAY_ADDRESS; auto: slurm in a "
        "job, else ray where RAY_ADDRESS is set and `machines` is above 1",
        ["auto", "slurm", "ray"],
    )
    num_shards: int | None = arg(
        None,
        "generation processes of a machine; None: one per group of tensor_parallel_size GPUs, 1 without",
    )
    num_processes: int | None = arg(
        None, "annotation and training processes of a machine; None: one per GPU, 1 without a GPU"
    )
    num_gpus: int | None = arg(
        None, "with --check or --dry_run: GPUs of a machine to plan for; None: those that are visible"
    )
    gpu_memory_gib: float | None = arg(
        None, "with --check or --dry_run: GiB of each; None: what the visible ones have"
    )
    without_gpu: bool = arg(False, "this run may use the CPU where there is no GPU (small models only)")
    setup_command: str | None = arg(
        None,
        "run once in environment rlhflow before anything else; must be quick when there is nothing to do",
    )
    gold_function: str | None = arg(
        None, "path.py:name of gold(messages, response) → score, where the task has one"
    )
    allow_overlap: bool = arg(False, "accept prompts that stand in both the training and the held-out sets")
    evaluation_sets: list[str] | None = arg(
        None,
        "evaluation sets, files, folders or hub names: how many prompts overlap with them is said at the "
        "start (evaluation/find_overlap.py leaves them out)",
        metavar="NAME_OR_PATH",
    )
    model_size_b: float | None = arg(
        None, "billions of parameters, for --check's estimates where the hub is not reached"
    )

    job = "configs/loop.slurm"  # what a Slurm job of this kind of run is submitted by
    sections = {  # see common/arguments.py
        **dict.fromkeys(("generation", "heldout"), get_hf2.Arguments),
        **dict.fromkeys(("annotation", "eval_annotation"), RewardArguments),
        "select": Selection,
    }
    # Of the driver, for what a wrong flag may have meant.
    driver_flags = ("check", "dry_run", "stage", "stop_stage")
    decided = DECIDED
    problems = ()


@dataclasses.dataclass(kw_only=True)
class DPOSettings(RunSettings):
    """What the loop and an online run have: how DPO trains, which policies are kept, when to end."""

    training: str = arg("configs/training.yaml", "YAML of dpo_iteration/run_dpo.py")
    training_args: dict = arg(
        {}, "arguments that stand in place of that YAML's; --training_args.learning_rate 1e-6"
    )
    accelerate_config: str = arg("configs/zero2.yaml", "accelerate's YAML for training")
    keep_iterates: int | None = arg(
        None,
        "keep the weights of the last so many iterates, of the best, and of what a mixture samples; None: of "
        "all",
    )
    stop_when: str | None = arg(
        None,
        "worse: end the loop when its last policy is worse than the best one, beyond chance or by `select`'s "
        "max_kl",
        ["worse"],
    )

    sections = RunSettings.sections | {"training_args": DPOArguments}


@dataclasses.dataclass(kw_only=True)
class LoopSettings(DPOSettings):
    prompts: list[str] = arg(
        help="prompt sets, one an iteration; with more iterations they are taken in turn"
    )
    iterations: int = arg(3, "iterations in all; a finished run can be given more")
    reference: str = arg(
        "initial",
        "reference policy of the loss: the starting policy or the previous iterate",
        ["initial", "previous"],
    )
    train_on: str = arg("new", "pairs of this iteration only, or of all so far", ["new", "all"])

    elsewhere = dict.fromkeys(("backend", "ppo", "openrlhf"), "bash run_ppo.sh") | dict.fromkeys(
        ("online", "evaluate_every", "sampling_gpus", "share_gpus"), "bash run_online.sh"
    )


def decided(settings: RunSettings) -> Iterator[str]:
    """What is wrong with sections that name what the run decides, a line each."""
    for section, keys in DECIDED.items():
        for key in keys:
            if (getattr(settings, section, None) or {}).get(key) is not None:
                instead = INSTEAD.get(key, key)
                if (section, key) == ("eval_annotation", "reward_name_or_path"):
                    instead = "eval_reward_model"
                named = set(instead.replace(" and ", ".").split(".")) & settings.__dataclass_fields__.keys()
                told = f"{section}.{key} is what the run itself decides: leave it out"
                yield f"{told} and give {instead}" if named else told


def complete(cls, given: dict, without: tuple, where: str) -> dict:
    """All arguments of a script, those that were not given by their defaults, in their types.

    Args:
        cls: its dataclass. given: some of them. without: names that the run decides. where: for messages.
    """
    needed = {f.name: "-" for f in dataclasses.fields(cls) if f.name in without and is_required(f)}
    made = build(cls, {key: value for key, value in given.items() if key not in without} | needed, where)
    return {f.name: getattr(made, f.name) for f in dataclasses.fields(cls) if f.name not in without}


@contextlib.contextmanager
def keys_of_section(section: str, arguments: type) -> Iterator[None]:
    """What a check of a script's arguments refuses is told by the keys of the section, not as its flags."""

    def key(flag: re.Match) -> str:
        return f"--{section}.{flag[1]}" if flag[1] in arguments.__dataclass_fields__ else flag[0]

    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"--(\w+)", key, str(error))) from None


def positions(name: str) -> int | None:
    """Tokens of prompt and response that a local model can take; None where its config does not say."""
    return models.positions(models.local_config(name) or {})


def refuse_other_kind(settings: RunSettings, before: dict):
    """Refuse a folder that holds a run of the other driver, by that name and not by settings that differ.

    `before`: what RUN/loop.yaml holds.

    Raises:
        UserError: it is of another driver than `settings` are of.
    """
    now, names = (
        kind_of(settings.__dataclass_fields__),
        {
            "ppo": "PPO (run_ppo.sh)",
            "online": "online DPO (run_online.sh)",
            "dpo": "DPO (run_loop.sh)",
        },
    )
    if before and kind_of(before) != now:
        raise UserError(
            f"{settings.run_dir} holds a run of {names[kind_of(before)]}, this would be one of {names[now]}: "
            "give another --run_dir"
        )


def processes(settings: RunSettings) -> int:
    """Annotation and training processes over all machines."""
    return machine_count(settings) * (settings.num_processes or max(1, len(gpus_of(settings))))


def gpus_of_an_engine(settings: RunSettings) -> int:
    given = settings.generation | {"model_name_or_path": "-"}
    return build(get_hf2.Arguments, given, "generation").tensor_parallel_size


def gpu_groups(settings: RunSettings) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each generation process of this machine; one empty string per process on the
    CPU.
    """
    gpus, size = gpus_of(settings), gpus_of_an_engine(settings)
    if not gpus:
        return [""] * (settings.num_shards or 1)
    groups = [",".join(gpus[k : k + size]) for k in range(0, len(gpus) - size + 1, size)]
    if not groups or (settings.num_shards or 0) > len(groups):
        raise UserError(
            f"{settings.num_shards or 1} generation processes of {size} GPUs each were asked for, "
            f"{len(gpus)} GPUs are visible"
        )
    return groups[: settings.num_shards]
