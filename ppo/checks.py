"""Settings of train_ppo.py that cannot work, refused before torch is imported."""

import importlib.util
import math
import os
from pathlib import Path

from annotate_data import arguments as annotation
from common.cli import UserError, check_model, existing_file
from dpo_iteration.output import launched


def scoring(args):
    """The arguments of annotate_data/get_rewards.py that say what scores a response."""
    shared = ("reward_name_or_path", "reward_type", "reward_function", "reward_weights", "trust_remote_code")
    return annotation.Arguments("", "", **{key: getattr(args, key) for key in shared})


def check(args):
    """Refuse what cannot work before torch is imported.

    Raises:
        UserError: names the setting.
    """
    if not args.reward_name_or_path and not args.reward_function:
        raise UserError("nothing scores a response: give --reward_name_or_path or --reward_function")
    counts = ("max_input_length", "max_new_tokens", "generation_batch_size", "rollout_batch_size", "samples_per_prompt", "batch_size",
              "micro_batch_size", "ppo_epochs", "kl_horizon", "logging_steps", "save_total_limit", "max_rollouts")  # fmt: skip
    for key in (*counts, "temperature", "num_episodes", "learning_rate", "critic_learning_rate", "clip", "value_clip", "kl_target", "value_coef"):
        if getattr(args, key) is not None and not 0 < getattr(args, key) < math.inf:
            raise UserError(f"--{key} {getattr(args, key)} must be above 0")
    for key in ("kl_coef", "warmup_steps", "weight_decay", "max_grad_norm", "missing_eos_penalty", "save_steps", "seed"):
        if not 0 <= getattr(args, key) < math.inf:
            raise UserError(f"--{key} {getattr(args, key)} must not be negative")
    for key in ("gamma", "gae_lambda", "top_p"):
        if not 0 <= getattr(args, key) <= 1 or (key == "top_p" and not args.top_p):
            raise UserError(f"--{key} {getattr(args, key)} must be {'above' if key == 'top_p' else 'from'} 0 and at most 1")
    if args.kl_target and not args.kl_coef:
        raise UserError("--kl_target steers kl_coef by a factor: give a --kl_coef above 0 to start from")
    responses, world = args.rollout_batch_size * args.samples_per_prompt, launched()
    if responses % args.batch_size:
        raise UserError(f"a rollout has {responses} responses (--rollout_batch_size {args.rollout_batch_size} × --samples_per_prompt "
                        f"{args.samples_per_prompt}), which does not divide into steps of --batch_size {args.batch_size}")  # fmt: skip
    if args.batch_size % (args.micro_batch_size * world):
        raise UserError(f"--batch_size {args.batch_size} does not divide by {world} processes × --micro_batch_size {args.micro_batch_size}")
    if args.generation_batch_size < args.samples_per_prompt:
        raise UserError(f"--generation_batch_size {args.generation_batch_size} is below --samples_per_prompt {args.samples_per_prompt}, "
                        "which are sampled together")  # fmt: skip
    check_samples(args, args.reward_type)
    if args.lr_scheduler_type == "constant" and args.warmup_steps:
        raise UserError("--lr_scheduler_type constant has no warm-up: take constant_with_warmup, or --warmup_steps 0")
    for tool in args.report_to:
        if tool not in ("none", "wandb", "tensorboard", "trackio"):
            raise UserError(f"--report_to {tool}: expected none, wandb, tensorboard or trackio")
        if tool != "none" and importlib.util.find_spec(tool) is None:
            raise UserError(f"--report_to {tool}: it is not installed here; pip install {tool}, or --report_to none")
    for kind in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise UserError(f"this PPO holds whole models on each process, {kind} would cut them up: launch it with configs/ddp.yaml")


def check_samples(args, kinds):
    """Refuse one response a prompt where responses are compared: each would score the same, and nothing be learned.

    Args:
        kinds: what was asked for, or the names of the scorers' classes once `auto` has been found out.
    """
    if args.samples_per_prompt == 1 and {"pair_preference", "PairPreference"} & set(kinds):
        raise UserError("a pair-preference model compares the responses of a prompt: give --samples_per_prompt 2 or more")


def check_paths(args):
    """Refuse files that are not there, folders that hold no model, and an output that is an input."""
    annotation.check(scoring(args))
    if not args.dataset_name_or_path:
        raise UserError("--dataset_name_or_path names no prompts")
    if args.chat_template:
        existing_file(args.chat_template, "chat template")
    for key in ("model_name_or_path", "critic_name_or_path"):
        if getattr(args, key) is not None:
            check_model(getattr(args, key), f"--{key}")
    for name in (args.model_name_or_path, args.critic_name_or_path, *(args.reward_name_or_path or [])):
        if name and Path(name).resolve() == Path(args.output_dir).resolve():
            raise UserError(f"--output_dir {args.output_dir} is the model {name} itself; choose another")
