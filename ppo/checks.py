"""What train_ppo.py refuses before torch is imported, each with what to do instead.

Errors call an argument by its key, as a YAML and `--key value` have it.
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from annotate_data import arguments as annotation
from annotate_data.kinds import KINDS
from common import trackers
from common.cli import UserError, count, refuse
from common.models import check_model, check_policy
from common.training import world_size

if TYPE_CHECKING:
    from ppo.openrlhf.arguments import Arguments as OpenRLHFArguments
    from ppo.train_ppo import Arguments

POSITIVE = (
    "max_input_length max_new_tokens generation_batch_size rollout_batch_size samples_per_prompt batch_size "
    "micro_batch_size ppo_epochs kl_horizon logging_steps save_total_limit max_rollouts temperature top_p "
    "num_episodes learning_rate critic_learning_rate clip value_clip kl_target value_coef"
).split()
NOT_NEGATIVE = "kl_coef warmup_steps weight_decay max_grad_norm missing_eos_penalty save_steps seed".split()
SHARES = "gamma gae_lambda top_p".split()


def out_of_range(
    args: "Arguments | OpenRLHFArguments", positive: list[str], not_negative: list[str], shares: list[str]
) -> list[str]:
    """What is said of numbers outside their range. None is in every range, as is a key that `args` lacks."""
    given = {key: value for key, value in vars(args).items() if value is not None}
    ranges = (
        (positive, "above 0 and finite", lambda value: 0 < value < math.inf),
        (not_negative, "0 or above, and finite", lambda value: 0 <= value < math.inf),
        (shares, "from 0 to 1", lambda value: 0 <= value <= 1),
    )
    return [
        f"{key} {given[key]} must be {words}"
        for keys, words, right in ranges
        for key in keys
        if key in given and not right(given[key])
    ]


def check(args: "Arguments", processes: int | None = None, prompts: int | None = None):
    """Refuse what cannot work, whatever the files are.

    Args:
        processes: how many will train; None: those that were launched.
        prompts: how many there are, where that is known.

    Raises:
        UserError: names the settings, all at once.
    """
    problems = out_of_range(args, POSITIVE, NOT_NEGATIVE, SHARES)
    if not args.reward_name_or_path and not args.reward_function:
        problems.append("nothing scores a response: give reward_name_or_path or reward_function")
    if args.kl_target and not args.kl_coef:
        problems.append("kl_target steers kl_coef by a factor: give a kl_coef above 0 to start from")
    problems += check_batches(args, processes or world_size(), prompts)
    if args.generation_batch_size < args.samples_per_prompt:
        problems.append(
            f"generation_batch_size {args.generation_batch_size} is below samples_per_prompt "
            f"{args.samples_per_prompt}, which are sampled together"
        )
    problems += check_schedule(args)
    if args.critic_name_or_path and not args.estimator.critic:
        problems.append(
            f"critic_name_or_path: advantage_estimator {args.advantage_estimator} has no value model; leave "
            "one of them out"
        )
    for function, *given in (
        (check_samples, args, [KINDS[kind].scorer for kind in args.reward_type if kind in KINDS]),
        (trackers.check, args.report_to, "report_to", trackers.FIGURES),
    ):
        try:
            function(*given)
        except UserError as error:
            problems.append(str(error))
    for kind in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            problems.append(
                f"this PPO holds whole models on each process, {kind} would cut them up: launch it with "
                "configs/ddp.yaml"
            )
    refuse(problems)


def check_schedule(args: "Arguments | OpenRLHFArguments") -> list[str]:
    """What is wrong with the learning rates' schedule."""
    if args.lr_scheduler_type != "constant" or not args.warmup_steps:
        return []
    return ["lr_scheduler_type constant has no warm-up: take constant_with_warmup, or warmup_steps 0"]


def check_batches(args: "Arguments", processes: int, prompts: int | None = None) -> list[str]:
    """What is wrong with the sizes of rollouts and steps, and sizes that fit together.

    Args:
        prompts: how many there are, where that is known.
    """
    if min(args.rollout_batch_size, args.samples_per_prompt, args.batch_size, args.micro_batch_size) < 1:
        return []  # told already
    problems, responses = too_few(args, prompts), args.rollout_batch_size * args.samples_per_prompt
    if not problems and responses % args.batch_size:
        problems.append(
            f"a rollout has {responses} responses (rollout_batch_size {args.rollout_batch_size} × "
            f"samples_per_prompt {args.samples_per_prompt}), which does not divide into steps of batch_size "
            f"{args.batch_size}"
        )
    if args.batch_size % (args.micro_batch_size * processes):
        problems.append(
            f"batch_size {args.batch_size} does not divide by {count(processes, 'process')} × "
            f"micro_batch_size {args.micro_batch_size}"
        )
    if problems and (sizes := fitting(args, processes, prompts)):
        problems[-1] += f"; these fit together: {', '.join(f'{key} {value}' for key, value in sizes.items())}"
    return problems


def too_few(args: "Arguments | OpenRLHFArguments", prompts: int | None) -> list[str]:
    """What is said where there are fewer prompts than a rollout takes."""
    if prompts is None or prompts >= args.rollout_batch_size:
        return []
    return [
        f"{prompts} prompts are fewer than a rollout takes: lower rollout_batch_size "
        f"{args.rollout_batch_size}, or give more"
    ]


def fitting(args: "Arguments", processes: int, prompts: int | None = None) -> dict:
    """{key: value} of sizes near those of `args` that divide; {} where there are none.

    A rollout is made smaller where there are fewer prompts, or nothing divides: by a quarter at most, if that
    will do, and so that passes and steps are large.
    """

    def largest(most: int, whole: int, parts: int) -> int | None:
        """The largest number up to `most` that divides `whole` and is itself a multiple of `parts`."""
        return next((n for n in range(most, 0, -1) if whole % n == 0 and n % parts == 0), None)

    def sizes(rollout: int) -> dict | None:
        responses = rollout * args.samples_per_prompt
        batch = largest(min(args.batch_size, responses), responses, processes)
        if batch is None:
            return None
        micro = largest(min(args.micro_batch_size, batch // processes), batch // processes, 1)
        return {"rollout_batch_size": rollout, "batch_size": batch, "micro_batch_size": micro}

    most = min(args.rollout_batch_size, prompts or args.rollout_batch_size)
    if most == args.rollout_batch_size and (as_asked := sizes(most)):
        return as_asked
    found = [one for rollout in range(1, most + 1) if (one := sizes(rollout))]
    near = [one for one in found if one["rollout_batch_size"] >= most - most // 4] or found
    return max(near, key=lambda one: [*reversed(one.values())], default={})


def check_samples(args: "Arguments", scorers: Iterable):
    """Refuse one response a prompt where responses are compared: all would score the same.

    Args:
        scorers: of get_rewards.py, or their classes.
    """
    comparing = ["a pair-preference model"] * any(scorer.compares for scorer in scorers)
    comparing += [f"advantage_estimator {args.advantage_estimator}"] * args.estimator.compares
    if args.samples_per_prompt == 1 and comparing:
        raise UserError(
            f"{comparing[0]} compares the responses of a prompt: give samples_per_prompt 2 or more"
        )


def scoring(args: "Arguments") -> annotation.Arguments:
    """The arguments of annotate_data/get_rewards.py that say what scores a response."""
    shared = ("name_or_path", "type", "function", "weights")
    values = {f"reward_{key}": getattr(args, f"reward_{key}") for key in shared}
    return annotation.Arguments("", "", trust_remote_code=args.trust_remote_code, date=args.date, **values)


def check_paths(args: "Arguments"):
    """Refuse files that are not there, folders that hold no model, and an output that is an input."""
    annotation.check(scoring(args))
    if not args.dataset_name_or_path:
        raise UserError("dataset_name_or_path names no prompts")
    args.check_template()
    check_policy(args.model_name_or_path, "model_name_or_path")
    if args.critic_name_or_path is not None:
        check_model(args.critic_name_or_path, "critic_name_or_path")
    for name in (args.model_name_or_path, args.critic_name_or_path, *(args.reward_name_or_path or [])):
        if name and Path(name).resolve() == Path(args.output_dir).resolve():
            raise UserError(f"output_dir {args.output_dir} is the model {name} itself; choose another")
