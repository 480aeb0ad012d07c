"""From our settings to OpenRLHF 0.11.2's flags: the one place where its words stand. Pure functions, nothing
is read or started.

What was read in its source and decides the shape of a command:

- The prompts file holds templated text, so that no other template, tokenizer default or `<image>` rule of its
loader touches it;
  the turns travel in the label, for reward functions and reward models with another template.
- A rollout of fewer prompts than the others ends its launch (fewer micro-batches than GPUs): the file holds
whole rollouts only.
- `ckpt.load_enable` with an `_actor` folder that holds no checkpoint ends in a KeyError: it is given where
there is one.
- Its W&B logger is switched on by a key on the command line, which is printed: a placeholder stands there,
the key in the environment.
"""

import math
import os
from dataclasses import dataclass

from common import trackers
from common.cli import UserError

MODULE = "openrlhf.cli.train_ppo_ray"
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
)
WANDB_PLACEHOLDER = "see-WANDB_API_KEY"


@dataclass(frozen=True)
class Placement:
    """Where the roles run. `gpus`: those that train the policy; `critic_gpus`: those of value model and
    reward model (the same
    where all are colocated); `engines` × `tensor_parallel`: those that sample."""

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
    def all_gpus(self):
        return (
            self.gpus if self.colocate else self.gpus + self.critic_gpus + self.engines * self.tensor_parallel
        )


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


def number(value):
    """A number as argparse takes it, below 0 too: -10 and 0.00001, never -1e1 (which it takes for an
    option).
    """
    return f"{value:.12f}".rstrip("0").rstrip(".") if value < 0 else repr(value)


def optimizer_steps(args, prompts):
    """Optimizer steps of a run as OpenRLHF counts them for its learning rate (trainer/ppo_trainer.py,
    prepare_datasets).
    """
    return prompts * args.samples_per_prompt // args.batch_size * args.num_episodes * args.ppo_epochs


def warmup_ratio(args, prompts):
    """`warmup_steps` as a share of the steps; OpenRLHF rounds steps × share up."""
    if args.warmup_steps < 1:
        return args.warmup_steps
    steps = optimizer_steps(args, prompts)
    if args.warmup_steps > steps:
        raise UserError(
            f"warmup_steps {args.warmup_steps:g} is more than the {steps} optimizer steps of this run"
        )
    return max(0.0, (args.warmup_steps - 0.5) / steps)


def check_batches(args, placement):
    """Refuse batches that do not divide among the GPUs; OpenRLHF would die in DeepSpeed, hang, or leave
    responses out.

    Raises:
        UserError: names the setting and a value that would do.
    """
    responses, micro = args.rollout_batch_size * args.samples_per_prompt, args.micro_batch_size
    if responses % args.batch_size:
        raise UserError(
            f"a rollout has {responses} responses (rollout_batch_size {args.rollout_batch_size} × "
            "samples_per_prompt "
            f"{args.samples_per_prompt}), which is no multiple of batch_size {args.batch_size}; the rest "
            "would not be trained on"
        )
    for gpus in {placement.gpus, placement.critic_gpus}:
        at_once = gpus * (1 if placement.max_tokens_per_gpu else micro)
        if args.batch_size % at_once:
            what = (
                f"{gpus} GPUs" if placement.max_tokens_per_gpu else f"{gpus} GPUs × micro_batch_size {micro}"
            )
            near = max(at_once, args.batch_size // at_once * at_once)
            raise UserError(
                f"batch_size {args.batch_size} does not divide by {what}; take batch_size {near}, or another "
                "num_gpus or micro_batch_size"
            )
        if responses % (gpus * micro):
            near = math.ceil(responses / (gpus * micro)) * gpus * micro
            raise UserError(
                f"{responses} responses a rollout do not divide by {gpus} GPUs × micro_batch_size {micro}: "
                "some GPUs would get fewer "
                "forward passes and the others wait for ever; take rollout_batch_size × samples_per_prompt "
                f"= {near}, or another micro_batch_size"
            )


def accumulation(args, placement):
    """Forward and backward passes of a GPU in an optimizer step; None where packing by tokens decides."""
    return (
        None if placement.max_tokens_per_gpu else args.batch_size // (placement.gpus * args.micro_batch_size)
    )


def roles(placement):
    """(role, nodes, GPUs per node) of OpenRLHF's four roles."""
    if placement.colocate:
        return [
            (role, placement.nodes, placement.gpus_per_node) for role in ("actor", "ref", "critic", "reward")
        ]
    few = {
        "actor": placement.gpus,
        "ref": placement.gpus,
        "critic": placement.critic_gpus,
        "reward": placement.critic_gpus,
    }
    return [(role, 1, gpus) for role, gpus in few.items()]


def flags(args, placement, reward, paths, prompts, resume=False):
    """The command's flags.

    Args:
        args: Arguments of run_openrlhf.py.
        prompts: number of prompts in the file.
        resume: continue from the checkpoints under `paths.checkpoints`.

    Returns:
        list of (flag without dashes, value, list of values, or True for a switch).
    """
    found = []

    def add(name, value=True):
        if value is not False and value is not None:
            found.append((name, value))

    for role, nodes, gpus in roles(placement):
        add(f"{role}.num_nodes", nodes)
        add(f"{role}.num_gpus_per_node", gpus)
    add("train.colocate_all", placement.colocate)
    add("train.colocate_actor_ref", not placement.colocate)
    add("train.colocate_critic_reward", not placement.colocate and reward.kind == "local")
    add("vllm.num_engines", placement.engines)
    add("vllm.tensor_parallel_size", placement.tensor_parallel)
    add("vllm.gpu_memory_utilization", placement.gpu_memory_utilization)
    add("vllm.sync_backend", "nccl")
    add("vllm.enforce_eager", args.enforce_eager)
    add("vllm.enable_sleep", placement.colocate)
    add("ds.enable_sleep", placement.colocate)

    add("actor.model_name_or_path", paths.policy)
    add("critic.model_name_or_path", paths.critic)
    add("ds.value_head_prefix", args.value_head)
    if reward.kind == "local":
        add("reward.model_name_or_path", reward.model)
        add("reward.offload", placement.offload and placement.zero_stage == 3)
    else:
        add("reward.remote_url", reward.url)
    add("reward.clip_range", [-args.reward_clip, args.reward_clip])
    if args.missing_eos_penalty:
        # With a buffer of one token its overlong penalty is a fixed sum off each response of max_new_tokens
        # tokens. That is ours, but for a response whose end-of-turn is its very last token. Its
        # stop_properly_penalty would replace the reward instead.
        add("reward.overlong_buffer_len", 1)
        add("reward.overlong_penalty_factor", args.missing_eos_penalty)

    add("data.prompt_dataset", paths.prompts)
    add("data.input_key", "prompt")
    add("data.label_key", "label")
    add("data.max_len", args.max_input_length + args.max_new_tokens)
    add("rollout.max_new_tokens", args.max_new_tokens)
    add("rollout.temperature", args.temperature)
    add("rollout.top_p", args.top_p)
    add("rollout.batch_size", args.rollout_batch_size)
    add("rollout.n_samples_per_prompt", args.samples_per_prompt)
    add("rollout.micro_batch_size", args.micro_batch_size)
    add("train.batch_size", args.batch_size)
    add("train.micro_batch_size", args.micro_batch_size)
    add("train.max_epochs", args.ppo_epochs)
    add("train.num_episodes", args.num_episodes)
    add("train.seed", args.seed)
    if placement.max_tokens_per_gpu:
        add("train.dynamic_batch_enable")
        add("train.max_tokens_per_gpu", placement.max_tokens_per_gpu)
        add("rollout.max_tokens_per_gpu", placement.max_tokens_per_gpu)

    add("ds.zero_stage", placement.zero_stage)
    add("ds.param_dtype", "bf16")
    add("ds.adam_offload", placement.offload)
    add("ref.offload", placement.offload and placement.zero_stage == 3 and args.kl_coef > 0)
    add("ds.attn_implementation", placement.attn_implementation)
    add("ds.packing_samples", placement.packing)
    add("actor.gradient_checkpointing_enable", args.gradient_checkpointing)
    if args.lora_r:
        add("ds.lora.rank", args.lora_r)
        add("ds.lora.alpha", args.lora_alpha)
        add("ds.lora.dropout", args.lora_dropout)
        if args.lora_target_modules != ["all-linear"]:
            add("ds.lora.target_modules", args.lora_target_modules)

    for role, rate in (("actor", args.learning_rate), ("critic", args.critic_learning_rate)):
        add(f"{role}.adam.lr", rate)
        add(f"{role}.adam.weight_decay", args.weight_decay)
        add(f"{role}.lr_scheduler", args.lr_scheduler_type)
        add(f"{role}.lr_warmup_ratio", warmup_ratio(args, prompts))
        add(f"{role}.max_norm", args.max_grad_norm)
    add("actor.eps_clip", args.clip)
    add("critic.value_clip", args.value_clip)
    add("critic.freezing_steps", args.critic_only_rollouts - 1 if args.critic_only_rollouts else None)
    add("algo.advantage.estimator", "gae")
    add("algo.advantage.gamma", args.gamma)
    add("algo.advantage.lambd", args.gae_lambda)
    add("algo.kl.init_coef", args.kl_coef)
    add("algo.kl.estimator", args.kl_estimator)
    if args.sampling_correction != "off":
        add("algo.advantage.is_correction_level", "token")
        add("algo.advantage.is_correction_mode", args.sampling_correction)

    add("ckpt.output_dir", paths.model)
    add("ckpt.path", paths.checkpoints)
    add("ckpt.save_steps", args.save_steps or -1)
    add("ckpt.max_num", args.save_total_limit)
    add("ckpt.save_hf", args.save_hf)
    add("ckpt.load_enable", resume)
    add("critic.save_value_network", args.save_critic)
    add("logger.logging_steps", args.logging_steps)
    add("logger.tensorboard_dir", paths.tensorboard)
    add("logger.wandb.run_name", args.run_name or "ppo")
    if "wandb" in args.report_to:
        add("logger.wandb.key", WANDB_PLACEHOLDER)
        add("logger.wandb.project", args.project or os.environ.get("WANDB_PROJECT") or trackers.PROJECT)
    add("eval.steps", -1)
    taken = {name for name, _ in found}
    for name, value in args.extra_flags.items():
        if "wandb.key" in name:
            raise UserError(
                "extra_flags: a W&B key would be printed; export WANDB_API_KEY and say --report_to wandb"
            )
        if name in taken:
            raise UserError(
                f"extra_flags: {name} is set by our own settings already; --dry_run true shows the command"
            )
        add(name, value)
    return found


def words(found):
    """Arguments of a process, from what `flags` gave."""
    result = []
    for name, value in found:
        result.append(f"--{name}")
        if value is True:
            continue
        for item in value if isinstance(value, (list, tuple)) else [value]:
            result.append(
                number(item) if isinstance(item, (int, float)) and not isinstance(item, bool) else str(item)
            )
    return result
