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

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import trackers
from common.cli import UserError
from ppo.openrlhf.arguments import Arguments

if TYPE_CHECKING:
    from ppo.openrlhf.plan import Plan

MODULE = "openrlhf.cli.train_ppo_ray"
WANDB_PLACEHOLDER = "see-WANDB_API_KEY"
UNNAMED = {  # what has no key of ours; `extra_flags` may say otherwise
    "vllm.sync_backend": "nccl",
    "ds.param_dtype": "bf16",
    "algo.advantage.is_correction_level": "token",
    "algo.advantage.is_correction_mode": "clip",
    "eval.steps": -1,
}


@dataclass(frozen=True)
class Placement:
    """Where the roles run.

    `gpus` train the policy, and as many the value model (the same where all are colocated); `engines` ×
    `tensor_parallel` sample.
    """

    nodes: int
    gpus_per_node: int
    gpus: int
    engines: int
    tensor_parallel: int
    colocate: bool
    zero_stage: int
    offload: bool
    gpu_memory_utilization: float
    max_tokens_per_gpu: int | None  # where rows are packed, without padding
    attn_implementation: str

    @property
    def all_gpus(self) -> int:
        return self.gpus if self.colocate else 2 * self.gpus + self.engines * self.tensor_parallel

    @property
    def offloads_frozen(self) -> bool:
        """Whether reference and reward model wait in the machines' memory."""
        return self.offload and self.zero_stage == 3


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


def placement_flags(args: Arguments, plan: "Plan") -> dict:
    """Where the roles run, and how they share a GPU's memory."""
    placement, local, found = plan.placement, plan.kind == "local", {}
    apart = not placement.colocate
    for role in ("actor", "ref", "critic", "reward"):
        a_node = placement.gpus if apart else placement.gpus_per_node  # apart, on one node
        found |= {f"{role}.num_nodes": placement.nodes, f"{role}.num_gpus_per_node": a_node}
    packed = placement.max_tokens_per_gpu
    return found | {
        "train.colocate_all": placement.colocate,
        "train.colocate_actor_ref": apart,
        "train.colocate_critic_reward": apart and local,
        "vllm.num_engines": placement.engines,
        "vllm.tensor_parallel_size": placement.tensor_parallel,
        "vllm.gpu_memory_utilization": placement.gpu_memory_utilization,
        "vllm.enforce_eager": args.enforce_eager,
        "vllm.enable_sleep": placement.colocate,
        "ds.enable_sleep": placement.colocate,
        "ds.zero_stage": placement.zero_stage,
        "ds.adam_offload": placement.offload,
        "ref.offload": placement.offloads_frozen and args.kl_coef > 0,
        "reward.offload": placement.offloads_frozen and local,
        "ds.attn_implementation": placement.attn_implementation,
        "ds.packing_samples": bool(packed),
        "train.dynamic_batch_enable": bool(packed),
        "train.max_tokens_per_gpu": packed,
        "rollout.max_tokens_per_gpu": packed,
        "actor.gradient_checkpointing_enable": args.gradient_checkpointing,
    }


def rollout_flags(args: Arguments, plan: "Plan", work: Path, url: str | None) -> dict:
    """Models, prompts, sampling and rewards."""
    local = plan.kind == "local"
    return {
        "actor.model_name_or_path": str(work / "policy"),
        # The name of the policy tells OpenRLHF to make a new value head.
        "critic.model_name_or_path": (plan.critic or str(work / "policy"))
        if "critic" in args.learners
        else None,
        "reward.model_name_or_path": args.reward_name_or_path[0] if local else None,
        "reward.remote_url": None if local else url,
        # With a buffer of one token its overlong penalty is a fixed sum off each response of max_new_tokens
        # tokens. That is ours, but for a response whose end-of-turn is its very last token. Its
        # stop_properly_penalty would replace the reward instead.
        "reward.overlong_buffer_len": 1 if args.missing_eos_penalty else None,
        "reward.overlong_penalty_factor": args.missing_eos_penalty or None,
        "data.prompt_dataset": str(work / "prompts.jsonl"),
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
    """Batches, optimizers, PPO."""
    found = {}
    for role, rate in (("actor", args.learning_rate), ("critic", args.critic_learning_rate)):
        found |= {
            f"{role}.adam.lr": rate,
            f"{role}.adam.weight_decay": args.weight_decay,
            f"{role}.lr_scheduler": args.lr_scheduler_type,
            f"{role}.lr_warmup_ratio": warmup_ratio(args, prompts),
            f"{role}.max_norm": args.max_grad_norm,
        }
    return found | {
        "train.batch_size": args.batch_size,
        "train.micro_batch_size": args.micro_batch_size,
        "train.max_epochs": args.ppo_epochs,
        "train.num_episodes": args.num_episodes,
        "train.seed": args.seed,
        "actor.eps_clip": args.clip,
        "critic.value_clip": args.value_clip,
        "algo.advantage.estimator": args.advantage_estimator,
        "algo.advantage.gamma": args.gamma,
        "algo.advantage.lambd": args.gae_lambda,
        "algo.kl.init_coef": args.kl_coef,
        "algo.kl.estimator": args.kl_estimator,
    }


def output_flags(args: Arguments, work: Path, resume: bool) -> dict:
    """Checkpoints, the model, logs."""
    wandb = "wandb" in args.report_to
    project = args.project or os.environ.get("WANDB_PROJECT") or trackers.PROJECT
    return {
        "ckpt.output_dir": str(work / "model"),
        "ckpt.path": str(work / "checkpoints"),
        "ckpt.save_steps": args.save_steps or -1,
        "ckpt.max_num": args.save_total_limit,
        "ckpt.load_enable": resume,
        "logger.logging_steps": args.logging_steps,
        "logger.tensorboard_dir": str(work / "tensorboard"),
        "logger.wandb.run_name": args.run_name or "ppo",
        "logger.wandb.key": WANDB_PLACEHOLDER if wandb else None,
        "logger.wandb.project": project if wandb else None,
    }


def flags(
    args: Arguments, plan: "Plan", work: Path, url: str | None, prompts: int, resume: bool = False
) -> dict:
    """The command's flags: flag without dashes → value, list of values, or True for a switch.

    Args:
        work: folder of the prepared policy and prompts, and of what OpenRLHF writes.
        url: of the reward servers, with commas between, where OpenRLHF holds no reward model itself.
        prompts: number of prompts in the file.
        resume: continue from the checkpoints in `work`.
    """
    if "," in str(work):
        raise UserError(f"{work}: OpenRLHF splits names at commas; choose an output_dir without")
    ours = placement_flags(args, plan) | rollout_flags(args, plan, work, url)
    ours |= algorithm_flags(args, prompts) | output_flags(args, work, resume)
    given = {name for name, value in ours.items() if value is not None and value is not False}
    if taken := sorted(given & args.extra_flags.keys()):
        raise UserError(
            f"extra_flags: {', '.join(taken)} is set by our own settings already; dry_run true shows the "
            "command"
        )
    found = ours | UNNAMED | args.extra_flags
    return {name: value for name, value in found.items() if value is not None and value is not False}


def words(found: dict) -> list[str]:
    """Arguments of a process, from what `flags` gave."""
    result = []
    for name, value in found.items():
        result.append(f"--{name}")
        if value is not True:
            result += map(str, value if isinstance(value, list) else [value])
    return result
