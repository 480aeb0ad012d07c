"""The arguments of train_ppo.py: what they are, what shapes the model, what is refused before torch is
imported.
"""

import dataclasses
import math
import os
from pathlib import Path

from annotate_data import arguments as annotation
from annotate_data.functions import EXAMPLE
from common import trackers
from common.cli import UserError, arg, build, count, existing_file, refuse
from common.functions import function_file
from common.models import check_model, check_policy
from dpo_iteration.output import launched

# Settings that do not shape the model: where it goes, what is shown, what the inputs' fingerprints cover,
# mere speed.
NOT_SHAPING = {
    "model_name_or_path",
    "critic_name_or_path",
    "reward_name_or_path",
    "dataset_name_or_path",
    "chat_template",
    "output_dir",
    "overwrite",
    "trust_remote_code",
    "attn_implementation",
    "micro_batch_size",
    "gradient_checkpointing",
    "cpu_threads",
    "save_steps",
    "save_total_limit",
    "keep_checkpoints",
    "logging_steps",
    "report_to",
    "project",
    "run_name",
    "bad_prompts",
}


@dataclasses.dataclass(kw_only=True)
class Arguments:
    model_name_or_path: str = arg(help="policy to start from, and the reference: hub name or folder")
    critic_name_or_path: str | None = arg(
        None,
        "start of the value model, a classifier with the policy's vocabulary; None: the "
        "first Bradley-Terry reward model if it has that vocabulary, else the policy with a new head",
    )
    reward_name_or_path: list[str] | None = arg(None, "reward model, or several: hub name or folder")
    reward_type: list[str] = arg(["auto"], "kind of the reward models, see annotate_data/get_rewards.py")
    reward_function: str | None = arg(None, "FILE.py:NAME, f(messages, response[, record]) → number")
    reward_weights: list[float] | None = arg(
        None, "one for each reward model, then the function's; the sum is the score"
    )
    trust_remote_code: bool = arg(False, "run Python code that comes with a model")
    attn_implementation: str | None = arg(
        None, "of policy and value model; None: sdpa, or eager where scores are soft-capped"
    )
    chat_template: str | None = arg(
        None, "file with a jinja chat template to use instead of the policy's own"
    )
    template_kwargs: dict = arg({}, "arguments of the template, JSON: '{\"enable_thinking\": false}'")
    system_prompt: str | None = arg(None, "put before every prompt that has no system turn")
    date: str | None = arg(
        None, "day for a template that writes today's, YYYY-MM-DD; None: that of the first start"
    )

    dataset_name_or_path: list[str] = arg(
        help="prompts, one set or several: hub name, a data set's folder, .jsonl, .json, …"
    )
    dataset_key: str | None = arg(
        None, "column of the prompts (the first of context_messages, messages, prompt, conversations)"
    )
    dataset_split: str = arg("train", "split of a data set; a file has none")
    bad_prompts: str = arg(
        "skip",
        "records that hold no prompt, or one that a chat template refuses: skip and list them, or refuse",
        ["skip", "refuse"],
    )
    output_dir: str = arg(help="folder of the trained model")
    overwrite: bool = arg(False, "start anew where an output exists or is half done")
    seed: int = arg(42, "seed of sampling and of the order of prompts and responses")

    max_input_length: int = arg(1024, "tokens of the templated prompt; longer prompts are skipped and listed")
    max_new_tokens: int = arg(1024, "tokens of a response; one without an end of turn by then is cut off")
    temperature: float = arg(1.0, "of sampling; log-probabilities are those of the logits divided by it")
    top_p: float = arg(
        1.0,
        "nucleus sampling; log-probabilities are of the whole distribution all the same, so below 1 "
        "the policy that samples is not quite the one that learns",
    )
    generation_batch_size: int = arg(64, "responses sampled at once by a process")

    num_episodes: float = arg(1.0, "passes over the prompts")
    max_rollouts: int | None = arg(None, "at most so many rollouts")
    rollout_batch_size: int = arg(128, "prompts of a rollout, over all processes")
    samples_per_prompt: int = arg(1, "responses to each prompt of a rollout")
    batch_size: int = arg(128, "responses per optimizer step, over all processes")
    micro_batch_size: int = arg(8, "responses in one pass through a model, per process")
    ppo_epochs: int = arg(1, "passes over a rollout's responses")

    learning_rate: float = arg(5e-7, "peak learning rate of the policy")
    critic_learning_rate: float = arg(9e-6, "peak learning rate of the value model")
    lr_scheduler_type: str = arg(
        "cosine", "course of both", choices=("constant", "constant_with_warmup", "cosine", "linear")
    )
    warmup_steps: float = arg(0.0, "optimizer steps of linear warm-up; below 1 a share of all steps")
    weight_decay: float = arg(0.0, "decoupled weight decay of both models")
    max_grad_norm: float = arg(1.0, "gradients of each model are scaled down to this norm; 0: never")
    kl_coef: float = arg(
        0.01, "reward taken off per nat that a response is off the reference; with kl_target the start"
    )
    kl_target: float | None = arg(None, "nats per response that kl_coef is steered to; None: kl_coef stays")
    kl_horizon: int = arg(10000, "responses; the larger, the slower kl_coef is steered")
    kl_estimator: str = arg("k1", "of a token's KL in the reward", choices=("k1", "k2", "k3"))
    gamma: float = arg(1.0, "discount of a later token's reward, per token")
    gae_lambda: float = arg(0.95, "0: advantages from the next value alone, 1: from the rewards alone")
    clip: float = arg(0.2, "a token's probability ratio earns no more beyond 1 ± this")
    value_clip: float = arg(0.2, "a value earns no more beyond the rollout's value ± this")
    value_coef: float = arg(
        0.1, "weight of the value loss; matters through max_grad_norm alone, the models being two"
    )
    missing_eos_penalty: float = arg(1.0, "taken off the score of a response that was cut off, as in TRL")
    whiten_rewards: bool = arg(False, "give the tokens' rewards variance 1, their mean kept")
    whiten_advantages: bool = arg(True, "give advantages mean 0 and variance 1")

    bf16: bool = arg(
        True, "compute in bfloat16 on a GPU and save in it; the weights that learn are fp32 all the while"
    )
    gradient_checkpointing: bool = arg(False, "recompute activations: less memory, slower")
    cpu_threads: int | None = arg(None, "threads of a process without a GPU; None: the cores shared out")
    save_steps: int = arg(20, "rollouts between checkpoints; 0 writes none")
    save_total_limit: int = arg(2, "checkpoints kept while training")
    keep_checkpoints: bool = arg(False, "keep checkpoints, with the value model, once the model is saved")
    logging_steps: int = arg(1, "rollouts between lines of progress")
    report_to: list[str] = arg(["none"], f"trackers, one or several: none, {', '.join(trackers.FIGURES)}")
    project: str | None = arg(
        None,
        "project of the run at the trackers; None: as their variables say (WANDB_PROJECT, …), else "
        f"{trackers.PROJECT}",
    )
    run_name: str | None = arg(None, "name of the run at the trackers")


def arguments(values, where=""):
    """Arguments from a mapping, checked without torch and before the files are there."""
    args = build(Arguments, values, where)
    check(args)
    return args


def shaping(args):
    """(settings, inputs) that shape the model; what its manifest holds."""
    settings = {
        f.name: getattr(args, f.name) for f in dataclasses.fields(Arguments) if f.name not in NOT_SHAPING
    }
    inputs = {
        "model_name_or_path": args.model_name_or_path,
        "critic_name_or_path": args.critic_name_or_path,
        "chat_template": args.chat_template,
    }
    inputs |= {f"dataset_name_or_path {i}": name for i, name in enumerate(args.dataset_name_or_path, 1)}
    inputs |= {f"reward_name_or_path {i}": name for i, name in enumerate(args.reward_name_or_path or [], 1)}
    if args.reward_function:
        inputs["reward_function"] = str(function_file(args.reward_function, "--reward_function", EXAMPLE)[0])
    return settings, inputs


def scoring(args):
    """The arguments of annotate_data/get_rewards.py that say what scores a response."""
    shared = (
        "reward_name_or_path",
        "reward_type",
        "reward_function",
        "reward_weights",
        "trust_remote_code",
        "date",
    )
    return annotation.Arguments("", "", **{key: getattr(args, key) for key in shared})


def check(args, world=None):
    """Refuse what cannot work before torch is imported.

    Args:
        world: processes that will train; None: those that were launched.

    Raises:
        UserError: names the settings, all at once.
    """
    problems = []
    if not args.reward_name_or_path and not args.reward_function:
        problems.append("nothing scores a response: give --reward_name_or_path or --reward_function")
    counts = (
        "max_input_length",
        "max_new_tokens",
        "generation_batch_size",
        "rollout_batch_size",
        "samples_per_prompt",
        "batch_size",
        "micro_batch_size",
        "ppo_epochs",
        "kl_horizon",
        "logging_steps",
        "save_total_limit",
        "max_rollouts",
    )
    for key in (
        *counts,
        "temperature",
        "num_episodes",
        "learning_rate",
        "critic_learning_rate",
        "clip",
        "value_clip",
        "kl_target",
        "value_coef",
    ):
        if getattr(args, key) is not None and not 0 < getattr(args, key) < math.inf:
            problems.append(f"--{key} {getattr(args, key)} must be above 0")
    for key in (
        "kl_coef",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "missing_eos_penalty",
        "save_steps",
        "seed",
    ):
        if not 0 <= getattr(args, key) < math.inf:
            problems.append(f"--{key} {getattr(args, key)} must not be negative")
    for key in ("gamma", "gae_lambda", "top_p"):
        if not 0 <= getattr(args, key) <= 1 or (key == "top_p" and not args.top_p):
            problems.append(
                f"--{key} {getattr(args, key)} must be {'above' if key == 'top_p' else 'from'} 0 and at most "
                "1"
            )
    if args.kl_target and not args.kl_coef:
        problems.append("--kl_target steers kl_coef by a factor: give a --kl_coef above 0 to start from")
    problems += check_batches(args, world or launched())
    if args.generation_batch_size < args.samples_per_prompt:
        problems.append(
            f"--generation_batch_size {args.generation_batch_size} is below --samples_per_prompt "
            f"{args.samples_per_prompt}, "
            "which are sampled together"
        )
    try:
        check_samples(args, args.reward_type)
    except UserError as error:
        problems.append(str(error))
    if args.lr_scheduler_type == "constant" and args.warmup_steps:
        problems.append(
            "--lr_scheduler_type constant has no warm-up: take constant_with_warmup, or --warmup_steps 0"
        )
    try:
        trackers.check(args.report_to, known=trackers.FIGURES)
    except UserError as error:
        problems.append(str(error))
    for kind in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            problems.append(
                f"this PPO holds whole models on each process, {kind} would cut them up: launch it with "
                "configs/ddp.yaml"
            )
    refuse(problems)


def check_batches(args, world, prompts=None):
    """What is wrong with the sizes of rollouts and steps, and sizes that fit together.

    Args:
        world: processes that train. prompts: how many there are, where that is known.
    """
    if min(args.rollout_batch_size, args.samples_per_prompt, args.batch_size, args.micro_batch_size) < 1:
        return []  # told already
    problems, responses = [], args.rollout_batch_size * args.samples_per_prompt
    if prompts is not None and prompts < args.rollout_batch_size:
        problems.append(
            f"{prompts} prompts are fewer than a rollout takes: lower --rollout_batch_size "
            f"{args.rollout_batch_size}, or give more"
        )
    elif responses % args.batch_size:
        problems.append(
            f"a rollout has {responses} responses (--rollout_batch_size {args.rollout_batch_size} × "
            "--samples_per_prompt "
            f"{args.samples_per_prompt}), which does not divide into steps of --batch_size {args.batch_size}"
        )
    if args.batch_size % (args.micro_batch_size * world):
        problems.append(
            f"--batch_size {args.batch_size} does not divide by {count(world, 'process')} × "
            f"--micro_batch_size {args.micro_batch_size}"
        )
    if problems and (sizes := fitting(args, world, prompts)):
        problems[-1] += (
            f"; these fit together: {' '.join(f'--{key} {value}' for key, value in sizes.items())}"
        )
    return problems


def fitting(args, world, prompts=None):
    """{key: value} of sizes near those of `args` that divide; {} where there are none.

    A rollout is made smaller where there are fewer prompts: by a quarter at most, if that will do, and so
    that passes are large.
    """
    most = min(args.rollout_batch_size, prompts or args.rollout_batch_size)
    found = {}
    for rollout in range(1 if most < args.rollout_batch_size else most, most + 1):
        responses = rollout * args.samples_per_prompt
        batch = next(
            (
                n
                for n in range(min(args.batch_size, responses), 0, -1)
                if responses % n == 0 and n % world == 0
            ),
            None,
        )
        if batch:
            micro = next(
                n for n in range(min(args.micro_batch_size, batch // world), 0, -1) if batch // world % n == 0
            )
            found[rollout >= most - most // 4, micro, rollout] = {
                "rollout_batch_size": rollout,
                "batch_size": batch,
                "micro_batch_size": micro,
            }
    return found[max(found)] if found else {}


def check_samples(args, kinds):
    """Refuse one response a prompt where responses are compared: each would score the same, and nothing be
    learned.

    Args:
        kinds: what was asked for, or the names of the scorers' classes once `auto` has been found out.
    """
    if args.samples_per_prompt == 1 and {"pair_preference", "PairPreference"} & set(kinds):
        raise UserError(
            "a pair-preference model compares the responses of a prompt: give --samples_per_prompt 2 or more"
        )


def check_paths(args):
    """Refuse files that are not there, folders that hold no model, and an output that is an input."""
    annotation.check(scoring(args))
    if not args.dataset_name_or_path:
        raise UserError("--dataset_name_or_path names no prompts")
    if args.chat_template:
        existing_file(args.chat_template, "chat template")
    check_policy(args.model_name_or_path)
    if args.critic_name_or_path is not None:
        check_model(args.critic_name_or_path, "--critic_name_or_path")
    for name in (args.model_name_or_path, args.critic_name_or_path, *(args.reward_name_or_path or [])):
        if name and Path(name).resolve() == Path(args.output_dir).resolve():
            raise UserError(f"--output_dir {args.output_dir} is the model {name} itself; choose another")
