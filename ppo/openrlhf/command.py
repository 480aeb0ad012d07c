"""From our settings to OpenRLHF 0.11.2's flags: the one place that knows its words. Pure functions:
nothing is read or started.

What was read in its source and decides the shape of a command:

- The prompts file holds templated text, so that no other template, tokenizer default or `<image>` rule of its
  loader touches it; the turns travel in the label, for reward functions and models with another template.
- A rollout of fewer prompts than the others ends its launch (fewer micro-batches than GPUs): the file holds
  whole rollouts only.
- `ckpt.load_enable` with an `_actor` folder that holds no checkpoint ends in a KeyError: it is given where
  there is one.
- Its W&B logger is switched on by a key on the command line, which is printed: a placeholder goes there, the
  key is in the environment.
"""

import math
import os
from dataclasses import dataclass

from common import trackers
from common.cli import UserError
from ppo.openrlhf.arguments import Arguments

MODULE = "openrlhf.cli.train_ppo_ray"
WANDB_PLACEHOLDER = "see-WANDB_API_KEY"


@dataclass(frozen=True)
class Placement:
    """Where the roles run.

    `gpus` train the policy, `critic_gpus` hold value model and reward model (the same where all are
    colocated), `engines` × `tensor_parallel` sample.
    """

    nodes: int
    gpus_per_node: int
    gpus: int
    critic_gpus: int
    engines: int
    tensor_parallel: int
    colocate: bool
    zero_stage: int
    offload: bool
    gpu_memory_utilization: float
    packing: bool
    max_tokens_per_gpu: int | None
    attn_implementation: str

    @property
    def all_gpus(self) -> int:
        apart = self.gpus + self.critic_gpus + self.engines * self.tensor_parallel
        return self.gpus if self.colocate else apart

    @property
    def offloads_frozen(self) -> bool:
        """Whether reference and reward model wait in the machines' memory."""
        return self.offload and self.zero_stage == 3


@dataclass(frozen=True)
class Reward:
    """Who gives the rewards.

    `kind`: `local` (OpenRLHF's own, `model`), `server` (`url`), or `function` (`url` is a .py file).
    """

    kind: str
    model: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Paths:
    """Files of a run: `policy` the prepared folder, `critic` where the value model starts, and what OpenRLHF
    writes.
    """

    policy: str
    critic: str
    prompts: str
    checkpoints: str
    model: str
    tensorboard: str


def optimizer_steps(args: Arguments, prompts: int) -> int:
    """Optimizer steps of a run as OpenRLHF counts them for its learning rate (trainer/ppo_trainer.py,
    prepare_datasets).
    """
    return prompts * args.samples_per_prompt // args.batch_size * args.num_episodes * args.ppo_epochs


def warmup_ratio(args: Arguments, prompts: int) -> float:
    """`warmup_steps` as a share of the steps; OpenRLHF rounds steps × share up."""
    if args.warmup_steps < 1:
        return args.warmup_steps
    steps = optimizer_steps(args, prompts)
    if args.warmup_steps > steps:
        raise UserError(
            f"warmup_steps {args.warmup_steps:g} is more than the {steps} optimizer steps of this run"
        )
    return max(0.0, (args.warmup_steps - 0.5) / steps)


def check_batches(args: Arguments, placement: Placement):
    """Refuse batches that do not divide among the GPUs; OpenRLHF would die in DeepSpeed, hang, or leave
    responses out.

    Raises:
        UserError: names the setting and a value that would do.
    """
    responses, micro = args.rollout_batch_size * args.samples_per_prompt, args.micro_batch_size
    if responses % args.batch_size:
        raise UserError(
            f"a rollout has {responses} responses (rollout_batch_size {args.rollout_batch_size} × "
            f"samples_per_prompt {args.samples_per_prompt}), which is no multiple of batch_size "
            f"{args.batch_size}; the rest would not be trained on"
        )
    packed = placement.max_tokens_per_gpu
    for gpus in {placement.gpus, placement.critic_gpus}:
        at_once = gpus * (1 if packed else micro)
        if args.batch_size % at_once:
            near = max(at_once, args.batch_size // at_once * at_once)
            raise UserError(
                f"batch_size {args.batch_size} does not divide by {gpus} GPUs"
                f"{'' if packed else f' × micro_batch_size {micro}'}; take batch_size {near}, or another "
                "num_gpus or micro_batch_size"
            )
        if responses % (gpus * micro):
            near = math.ceil(responses / (gpus * micro)) * gpus * micro
            raise UserError(
                f"{responses} responses a rollout do not divide by {gpus} GPUs × micro_batch_size {micro}: "
                "some GPUs would get fewer forward passes and the others wait for ever; take "
                f"rollout_batch_size × samples_per_prompt = {near}, or another micro_batch_size"
            )


def accumulation(args: Arguments, placement: Placement) -> int | None:
    """Forward and backward passes of a GPU in an optimizer step; None where packing by tokens decides."""
    if placement.max_tokens_per_gpu:
        return None
    return args.batch_size // (placement.gpus * args.micro_batch_size)


def placement_flags(args: Arguments, placement: Placement, reward: Reward) -> dict:
    """Where the roles run, and how they share a GPU's memory."""
    apart, role_gpus = not placement.colocate, {}
    for role in ("actor", "ref", "critic", "reward"):
        trains_policy = role in ("actor", "ref")
        a_node = placement.gpus_per_node
        if apart:  # on one node
            a_node = placement.gpus if trains_policy else placement.critic_gpus
        role_gpus |= {f"{role}.num_nodes": placement.nodes, f"{role}.num_gpus_per_node": a_node}
    packed = placement.max_tokens_per_gpu
    return role_gpus | {
        "train.colocate_all": placement.colocate,
        "train.colocate_actor_ref": apart,
        "train.colocate_critic_reward": apart and reward.kind == "local",
        "vllm.num_engines": placement.engines,
        "vllm.tensor_parallel_size": placement.tensor_parallel,
        "vllm.gpu_memory_utilization": placement.gpu_memory_utilization,
        "vllm.sync_backend": "nccl",
        "vllm.enforce_eager": args.enforce_eager,
        "vllm.enable_sleep": placement.colocate,
        "ds.enable_sleep": placement.colocate,
        "ds.zero_stage": placement.zero_stage,
        "ds.param_dtype": "bf16",
        "ds.adam_offload": placement.offload,
        "ref.offload": placement.offloads_frozen and args.kl_coef > 0,
        "reward.offload": placement.offloads_frozen and reward.kind == "local",
        "ds.attn_implementation": placement.attn_implementation,
        "ds.packing_samples": placement.packing,
        "train.dynamic_batch_enable": bool(packed),
        "train.max_tokens_per_gpu": packed,
        "rollout.max_tokens_per_gpu": packed,
        "actor.gradient_checkpointing_enable": args.gradient_checkpointing,
    }


def rollout_flags(args: Arguments, reward: Reward, paths: Paths) -> dict:
    """Models, prompts, sampling and rewards."""
    penalty = args.missing_eos_penalty
    return {
        "actor.model_name_or_path": paths.policy,
        "critic.model_name_or_path": paths.critic,
        "ds.value_head_prefix": args.value_head,
        "reward.model_name_or_path": reward.model,
        "reward.remote_url": reward.url,
        "reward.clip_range": [-args.reward_clip, args.reward_clip],
        # With a buffer of one token its overlong penalty is a fixed sum off each response of max_new_tokens
        # tokens. That is ours, but for a response whose end-of-turn is its very last token. Its
        # stop_properly_penalty would replace the reward instead.
        "reward.overlong_buffer_len": 1 if penalty else None,
        "reward.overlong_penalty_factor": penalty or None,
        "data.prompt_dataset": paths.prompts,
        "data.input_key": "prompt",
        "data.label_key": "label",
        "data.max_len": args.max_input_length + args.max_new_tokens,
        "rollout.max_new_tokens": args.max_new_tokens,
        "rollout.temperature": args.temperature,
        "rollout.top_p": args.top_p,
        "rollout.batch_size": args.rollout_batch_size,
        "rollout.n_samples_per_prompt": args.samples_per_prompt,
        "rollout.micro_batch_size": args.micro_batch_size,
    }


def algorithm_flags(args: Arguments, prompts: int) -> dict:
    """Batches, optimizers, PPO, LoRA."""
    found = {}
    for role, rate in (("actor", args.learning_rate), ("critic", args.critic_learning_rate)):
        found |= {
            f"{role}.adam.lr": rate,
            f"{role}.adam.weight_decay": args.weight_decay,
            f"{role}.lr_scheduler": args.lr_scheduler_type,
            f"{role}.lr_warmup_ratio": warmup_ratio(args, prompts),
            f"{role}.max_norm": args.max_grad_norm,
        }
    if args.lora_r:
        everywhere = args.lora_target_modules == ["all-linear"]
        found |= {
            "ds.lora.rank": args.lora_r,
            "ds.lora.alpha": args.lora_alpha,
            "ds.lora.dropout": args.lora_dropout,
            "ds.lora.target_modules": None if everywhere else args.lora_target_modules,
        }
    corrects = args.sampling_correction != "off"
    return found | {
        "train.batch_size": args.batch_size,
        "train.micro_batch_size": args.micro_batch_size,
        "train.max_epochs": args.ppo_epochs,
        "train.num_episodes": args.num_episodes,
        "train.seed": args.seed,
        "actor.eps_clip": args.clip,
        "critic.value_clip": args.value_clip,
        "critic.freezing_steps": args.critic_only_rollouts - 1 if args.critic_only_rollouts else None,
        "algo.advantage.estimator": "gae",
        "algo.advantage.gamma": args.gamma,
        "algo.advantage.lambd": args.gae_lambda,
        "algo.kl.init_coef": args.kl_coef,
        "algo.kl.estimator": args.kl_estimator,
        "algo.advantage.is_correction_level": "token" if corrects else None,
        "algo.advantage.is_correction_mode": args.sampling_correction if corrects else None,
    }


def output_flags(args: Arguments, paths: Paths, resume: bool) -> dict:
    """Checkpoints, the model, logs."""
    wandb = "wandb" in args.report_to
    project = args.project or os.environ.get("WANDB_PROJECT") or trackers.PROJECT
    return {
        "ckpt.output_dir": paths.model,
        "ckpt.path": paths.checkpoints,
        "ckpt.save_steps": args.save_steps or -1,
        "ckpt.max_num": args.save_total_limit,
        "ckpt.save_hf": args.save_hf,
        "ckpt.load_enable": resume,
        "critic.save_value_network": args.save_critic,
        "logger.logging_steps": args.logging_steps,
        "logger.tensorboard_dir": paths.tensorboard,
        "logger.wandb.run_name": args.run_name or "ppo",
        "logger.wandb.key": WANDB_PLACEHOLDER if wandb else None,
        "logger.wandb.project": project if wandb else None,
        "eval.steps": -1,
    }


def flags(
    args: Arguments, placement: Placement, reward: Reward, paths: Paths, prompts: int, resume: bool = False
) -> list[tuple]:
    """The command's flags.

    Args:
        args: Arguments of run_openrlhf.py.
        prompts: number of prompts in the file.
        resume: continue from the checkpoints under `paths.checkpoints`.

    Returns:
        list of (flag without dashes, value, list of values, or True for a switch).
    """
    ours = placement_flags(args, placement, reward) | rollout_flags(args, reward, paths)
    ours |= algorithm_flags(args, prompts) | output_flags(args, paths, resume)
    ours = {name: value for name, value in ours.items() if value is not None and value is not False}
    for name in args.extra_flags:
        if "wandb.key" in name:
            raise UserError(
                "extra_flags: a W&B key would be printed; export WANDB_API_KEY and set report_to wandb"
            )
        if name in ours:
            raise UserError(
                f"extra_flags: {name} is set by our own settings already; dry_run true shows the command"
            )
    more = {
        name: value for name, value in args.extra_flags.items() if value is not None and value is not False
    }
    return [*ours.items(), *more.items()]


def words(found: list[tuple]) -> list[str]:
    """Arguments of a process, from what `flags` gave."""
    result = []
    for name, value in found:
        result.append(f"--{name}")
        if value is not True:
            result += [_word(item) for item in (value if isinstance(value, (list, tuple)) else [value])]
    return result


def _word(value) -> str:
    """A value as argparse takes it: -10 and 0.00001, never -1e1, which it takes for an option."""
    if isinstance(value, float) and value < 0:
        return f"{value:.12f}".rstrip("0").rstrip(".")
    return str(value)
