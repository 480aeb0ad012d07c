"""The arguments of run_openrlhf.py: what they are, what shapes the model, what is refused before anything is
read.
"""

import dataclasses
import math
import os

from common import trackers
from common.cli import UserError, arg, build, existing_file, refuse
from common.functions import function_file
from ppo.openrlhf.command import SCHEDULERS
from ppo.openrlhf.reward import RewardArguments
from ppo.openrlhf.reward import check as check_rewards

# Settings that do not shape the model: where it goes and runs, what is shown, and what the inputs'
# fingerprints cover.
NOT_SHAPING = {
    "model_name_or_path",
    "reward_name_or_path",
    "critic_name_or_path",
    "dataset_name_or_path",
    "chat_template",
    "reward_chat_template",
    "output_dir",
    "overwrite",
    "trust_remote_code",
    "save_steps",
    "save_total_limit",
    "save_hf",
    "save_critic",
    "logging_steps",
    "report_to",
    "run_name",
    "keep_checkpoints",
    "project",
    "num_gpus",
    "gpus_per_node",
    "gpu_memory_gib",
    "machine_memory_gib",
    "ray_address",
    "colocate",
    "num_engines",
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "enforce_eager",
    "zero_stage",
    "offload",
    "packing",
    "max_tokens_per_gpu",
    "micro_batch_size",
    "attn_implementation",
    "model_size_b",
    "reward_size_b",
    "reward_gpus",
    "reward_batch_tokens",
    "patched_lora",
    "dry_run",
    "gradient_checkpointing",
    "kl_target",
    "kl_horizon",
    "value_coef",
    "whiten_rewards",
    "whiten_advantages",
    "bf16",
    "reward_backend",
    "ignore_versions",
    "bad_prompts",
}


@dataclasses.dataclass(kw_only=True)
class Arguments:
    model_name_or_path: str = arg(help="policy to start from, and reference: hub name or folder")
    trust_remote_code: bool = arg(
        False, "run Python code that comes with the models (OpenRLHF itself always does)"
    )
    chat_template: str | None = arg(None, "file with a jinja chat template to use instead of the policy's")
    template_kwargs: dict = arg({}, "arguments of the template, JSON: '{\"enable_thinking\": false}'")
    system_prompt: str | None = arg(None, "put before every prompt that has no system turn")
    date: str | None = arg(
        None, "day for a template that writes today's, YYYY-MM-DD; None: that of the first start"
    )
    reward_name_or_path: list[str] | None = arg(None, "reward models: hub names or folders")
    reward_type: list[str] = arg(
        ["auto"], "as in get_rewards.py; pair-preference models cannot judge one response"
    )
    reward_function: str | None = arg(None, "FILE.py:NAME, f(messages, response[, record]) → number")
    reward_weights: list[float] | None = arg(
        None, "one for each model, then the function's; the sum is the reward"
    )
    reward_chat_template: str | None = arg(
        None, "jinja file in place of the reward model's own chat template"
    )
    reward_max_length: int = arg(4096, "tokens that a reward model of ours sees; the left is cut")
    reward_url: str | None = arg(
        None,
        "http://HOST:PORT/get_reward of a server that runs already: openrlhf.cli.serve_rm, "
        "ppo/openrlhf/serve_reward.py",
    )
    reward_backend: str = arg(
        "auto",
        "OpenRLHF's own reward model (the policy's tokens), or our server; auto: ours where tokens or "
        "template differ",
        ["auto", "local", "server"],
    )
    dataset_name_or_path: list[str] = arg(
        help="prompt sets: files, folders or hub names; one set of them all"
    )
    dataset_key: str | None = arg(
        None, "column of the prompts; None: context_messages, messages, prompt or conversations"
    )
    dataset_split: str = arg("train", "split of data sets; a file has none")
    bad_prompts: str = arg(
        "skip",
        "records that hold no prompt, or one that the chat template refuses: skip and list them, or refuse",
        ["skip", "refuse"],
    )
    output_dir: str = arg(help="folder of the trained model")
    overwrite: bool = arg(False, "start anew where an output exists or is half done")
    seed: int = arg(42, "seed of the prompts' choice, sampling and training")

    max_input_length: int = arg(1024, "tokens of a prompt; longer ones are left out")
    max_new_tokens: int = arg(1024, "tokens of a response")
    temperature: float = arg(1.0, "of the sampling")
    top_p: float = arg(
        1.0, "of the sampling; below 1 the policy's probabilities are not those that were sampled from"
    )
    num_episodes: int = arg(1, "passes over the prompts")
    max_rollouts: int | None = arg(None, "at most so many rollouts")
    rollout_batch_size: int = arg(1024, "prompts of a rollout, over all GPUs")
    samples_per_prompt: int = arg(1, "responses to each of them")
    batch_size: int = arg(128, "responses per optimizer step, over all GPUs; the accumulation follows")
    micro_batch_size: int = arg(2, "responses per forward pass and GPU, where packing by tokens is off")
    ppo_epochs: int = arg(1, "passes over a rollout's responses")

    learning_rate: float = arg(5e-7, "peak learning rate of the policy")
    critic_learning_rate: float = arg(9e-6, "peak learning rate of the value model")
    lr_scheduler_type: str = arg(
        "cosine_with_min_lr", "course of both (cosine_with_min_lr ends at a tenth)", SCHEDULERS
    )
    warmup_steps: float = arg(0.03, "optimizer steps of linear warm-up; below 1 a share of all steps")
    weight_decay: float = arg(0.0, "decoupled weight decay")
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm; 0: not at all")
    critic_only_rollouts: int = arg(0, "rollouts at the start that train the value model alone")
    kl_coef: float = arg(0.01, "weight of the KL divergence to the reference, per token, in the reward")
    kl_target: float | None = arg(
        None, "not with OpenRLHF: nats a response that an adaptive coefficient aims at"
    )
    kl_horizon: int = arg(10000, "of kl_target")
    kl_estimator: str = arg(
        "k1", "k1: log-ratio, k2: half its square, k3: ratio - 1 - log-ratio", ["k1", "k2", "k3"]
    )
    gamma: float = arg(1.0, "discount")
    gae_lambda: float = arg(1.0, "λ of GAE")
    clip: float = arg(0.2, "the policy's ratio is clipped to 1 ± this")
    value_clip: float = arg(0.5, "values move by this at most from those of the rollout")
    value_coef: float | None = arg(None, "not with OpenRLHF: its value model has an optimizer of its own")
    reward_clip: float = arg(10.0, "rewards are clipped to ± this")
    missing_eos_penalty: float = arg(1.0, "taken off the reward of a response that ran to max_new_tokens")
    whiten_rewards: bool = arg(False, "not with OpenRLHF")
    whiten_advantages: bool = arg(True, "always with OpenRLHF")
    sampling_correction: str = arg(
        "clip",
        "weigh tokens by training over sampling probability, clipped or left out beyond 0.5 to 5",
        ["clip", "mask", "off"],
    )
    bf16: bool = arg(True, "always with OpenRLHF: bf16 weights, fp32 master weights")
    gradient_checkpointing: bool = arg(True, "recompute activations: less memory, about a fifth slower")

    save_steps: int = arg(20, "rollouts between checkpoints; 0 writes none")
    save_total_limit: int = arg(2, "checkpoints kept while training, 2 at least")
    save_hf: bool = arg(
        False, "a plain model beside each checkpoint too; these are not deleted while it runs"
    )
    save_critic: bool = arg(False, "keep the value model, as output_dir.work/model_critic")
    keep_checkpoints: bool = arg(False, "keep checkpoints and optimizer states once the model is saved")
    logging_steps: int = arg(1, "rollouts between log entries")
    report_to: list[str] = arg(
        ["tensorboard"], "tensorboard (always written), wandb (key from WANDB_API_KEY)"
    )
    project: str | None = arg(
        None, f"project of the run on W&B; None: as WANDB_PROJECT says, else {trackers.PROJECT}"
    )
    run_name: str | None = arg(None, "name of the run on W&B")

    num_gpus: int | None = arg(None, "GPUs over all nodes; None: those visible, or of the Ray cluster")
    gpus_per_node: int | None = arg(None, "GPUs of a node; None: as found")
    gpu_memory_gib: float | None = arg(None, "GiB of a GPU; None: that of the visible ones")
    machine_memory_gib: float | None = arg(
        None, "GiB of a node's main memory; None: that of this machine, where it has the GPUs"
    )
    ray_address: str | None = arg(
        None,
        "HOST:PORT of a Ray cluster that runs already; output_dir must be on a disk that its nodes share",
    )
    colocate: bool = arg(
        True, "all roles share all GPUs; false: policy, value model and engines on GPUs of their own"
    )
    num_engines: int | None = arg(None, "vLLM engines; None: as many as fit")
    tensor_parallel_size: int | None = arg(None, "GPUs of an engine; None: the fewest that hold the policy")
    gpu_memory_utilization: float | None = arg(
        None, "share of a GPU for an engine; None: up to a half where colocated, as memory allows"
    )
    enforce_eager: bool = arg(
        True, "vLLM without CUDA graphs: less memory beside the training, slower sampling"
    )
    zero_stage: int | None = arg(None, "DeepSpeed ZeRO 2 or 3; None: 2 where it fits", [None, 2, 3])
    offload: bool | None = arg(
        None,
        "optimizer states (with ZeRO-3 reference and reward model too) in the machines' memory; None: no",
    )
    lora_r: int = arg(0, "rank of LoRA adapters, 0: train all parameters; see patched_lora")
    lora_alpha: int = arg(32, "the adapters count alpha / r times")
    lora_dropout: float = arg(0.0, "share of an adapter's inputs left out")
    lora_target_modules: list[str] = arg(["all-linear"], "ends of the names of modules with an adapter")
    patched_lora: bool = arg(
        False, "this OpenRLHF is patched to merge adapters before it hands weights to vLLM; 0.11.2 is not"
    )
    packing: bool | None = arg(None, "rows without padding; None: where attention is flash")
    max_tokens_per_gpu: int | None = arg(
        None, "tokens of a forward pass on a GPU where packing is on; None: up to 16384, as memory allows"
    )
    attn_implementation: str | None = arg(
        None, "None: flash_attention_2 where flash-attn is installed, else sdpa"
    )
    critic_name_or_path: str | None = arg(
        None,
        "where the value model starts; None: the reward model if it has the policy's tokens, else the policy",
    )
    value_head: str = arg("score", "name of the reward model's head")
    model_size_b: float | None = arg(
        None, "billions of parameters of the policy, where its config is out of reach"
    )
    reward_size_b: float | None = arg(None, "the same of the reward model; None: as the policy")
    reward_gpus: int | None = arg(
        None, "GPUs set aside for our reward server; 0: it shares one; None: as memory allows"
    )
    reward_batch_tokens: int | None = arg(None, "tokens of a forward pass of our reward server; None: 16384")
    extra_flags: dict = arg(
        {}, 'flags of OpenRLHF that have no key here: {"vllm.enable_prefix_caching": true}'
    )
    ignore_versions: bool = arg(
        False, "accept other versions of OpenRLHF and its packages than the pinned ones"
    )
    dry_run: bool = arg(False, "print the command and what was found, and stop")


def arguments(values, where=""):
    """Arguments from a mapping, checked without a GPU and before the files are there."""
    args = build(Arguments, values, where)
    check(args)
    return args


def check(args):
    """Refuse numbers outside their range, what OpenRLHF cannot do, and what has no effect.

    Raises:
        UserError: names the settings, all at once.
    """
    problems = []
    positive = (
        "max_input_length",
        "max_new_tokens",
        "temperature",
        "num_episodes",
        "rollout_batch_size",
        "samples_per_prompt",
        "batch_size",
        "micro_batch_size",
        "ppo_epochs",
        "learning_rate",
        "critic_learning_rate",
        "clip",
        "value_clip",
        "reward_clip",
        "logging_steps",
        "max_rollouts",
        "num_gpus",
        "gpus_per_node",
        "num_engines",
        "tensor_parallel_size",
        "max_tokens_per_gpu",
        "model_size_b",
        "reward_size_b",
        "gpu_memory_gib",
        "machine_memory_gib",
        "reward_max_length",
        "gpu_memory_utilization",
    )
    for key in positive:
        if getattr(args, key) is not None and not 0 < getattr(args, key) < math.inf:
            problems.append(f"{key} {getattr(args, key)} must be above 0 and finite")
    for key in (
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "kl_coef",
        "missing_eos_penalty",
        "save_steps",
        "critic_only_rollouts",
        "lora_r",
    ):
        if not 0 <= getattr(args, key) < math.inf:
            problems.append(f"{key} {getattr(args, key)} must not be negative, and finite")
    for key in ("top_p", "gamma", "gae_lambda", "gpu_memory_utilization"):
        if getattr(args, key) is not None and not 0 <= getattr(args, key) <= 1:
            problems.append(f"{key} {getattr(args, key)} must be from 0 to 1")
    if not args.top_p:
        problems.append("top_p 0.0 leaves no token to sample (vLLM refuses it): above 0 and at most 1")
    if not 0 <= args.seed < 2**32:
        problems.append(f"seed {args.seed} must be from 0 to {2**32 - 1}, as numpy takes it")
    if args.reward_gpus not in (None, 0, 1):
        problems.append(f"reward_gpus {args.reward_gpus} must be 0 or 1: our server scores on one GPU")
    if args.kl_target is not None:
        problems.append(
            "kl_target: OpenRLHF's adaptive coefficient aims at nats a token and is forgotten at every "
            "resume; leave it out and set kl_coef"
        )
    if args.value_coef is not None:
        problems.append(
            "value_coef has no effect: OpenRLHF's value model has an optimizer of its own; leave it out and "
            "set critic_learning_rate"
        )
    if args.whiten_rewards:
        problems.append("whiten_rewards true: OpenRLHF does not whiten rewards; give --whiten_rewards false")
    if not args.whiten_advantages:
        problems.append(
            "whiten_advantages false: OpenRLHF always whitens advantages under GAE; give --whiten_advantages "
            "true"
        )
    if not args.bf16:
        problems.append(
            "bf16 false: OpenRLHF trains in bf16 or fp16 beside fp32 master weights; give --bf16 true"
        )
    if args.lr_scheduler_type == "constant" and args.warmup_steps:
        problems.append(
            "lr_scheduler_type constant has no warm-up: take constant_with_warmup, or warmup_steps 0"
        )
    if args.save_total_limit < 2:
        problems.append(
            f"save_total_limit {args.save_total_limit}: 2 at least, OpenRLHF deletes an old checkpoint "
            "before the new one is whole"
        )
    for tool in args.report_to:  # into its own environment, so that what is installed here says nothing
        if tool not in ("none", "tensorboard", "wandb"):
            problems.append(f"report_to {tool}: OpenRLHF reports to tensorboard (always) and wandb")
    if "wandb" in args.report_to and not os.environ.get("WANDB_API_KEY"):
        problems.append(
            "report_to wandb: export WANDB_API_KEY first (a key among the arguments would be printed and "
            "kept)"
        )
    if "wandb" in args.report_to and args.ray_address:
        problems.append(
            "report_to wandb: a Ray cluster that runs already does not see our WANDB_API_KEY; leave it out, "
            "TensorBoard's files are always written"
        )
    if args.lora_r and not args.patched_lora:
        problems.append(
            "lora_r: OpenRLHF 0.11.2 hands the adapters' own names to vLLM, which ends at the first "
            "hand-over of weights (its issues 991, 1081, "
            "1349); train all parameters (lora_r 0; offload true saves memory), or say --patched_lora true "
            "for a patched OpenRLHF"
        )
    try:
        check_reward(args)
        if args.chat_template:
            existing_file(args.chat_template, "chat template")
    except UserError as error:
        problems.append(str(error))
    refuse(problems)


def check_reward(args):
    """Refuse a missing or contradictory reward."""
    own = bool(args.reward_function or args.reward_weights)
    if not args.reward_url and not args.reward_name_or_path and not args.reward_function:
        raise UserError(
            "no reward: give reward_name_or_path (a reward model), reward_function (FILE.py:NAME) or "
            "reward_url (a server)"
        )
    if args.reward_url and (own or len(args.reward_name_or_path or []) > 1):
        raise UserError(
            "reward_url: what the server computes is its own; give reward_function, reward_weights and "
            "further models to it (ppo/openrlhf/serve_reward.py)"
        )
    if args.reward_url and args.reward_backend == "local":
        raise UserError("reward_backend local and reward_url exclude each other; leave one out")
    if args.reward_url and not args.reward_url.startswith(("http://", "https://")):
        raise UserError(f"reward_url {args.reward_url}: http://HOST:PORT/get_reward was expected")
    if not args.reward_url:
        check_rewards(reward_arguments(args))
    if args.reward_backend == "local" and (own or len(args.reward_name_or_path) > 1):
        raise UserError(
            "reward_backend local: OpenRLHF holds one reward model, without function or weights; take server"
        )
    if args.ray_address and not args.reward_url and (own or args.reward_backend == "server"):
        raise UserError(
            "on a Ray cluster our reward server must be started by hand where it can be reached: python "
            "ppo/openrlhf/serve_reward.py --host …, "
            "then give reward_url"
        )


def reward_arguments(args, policy=None):
    """RewardArguments of ppo/openrlhf/reward.py for this run."""
    return build(
        RewardArguments,
        {
            "policy": policy or args.model_name_or_path,
            "reward_name_or_path": args.reward_name_or_path,
            "reward_type": args.reward_type,
            "reward_function": args.reward_function,
            "reward_weights": args.reward_weights,
            "reward_chat_template": args.reward_chat_template,
            "max_length": args.reward_max_length,
            "batch_tokens": args.reward_batch_tokens,
            "trust_remote_code": args.trust_remote_code,
        },
    )


def shaping(args):
    """(settings, inputs) that shape the model; what its manifest holds."""
    settings = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in NOT_SHAPING}
    if not args.lora_r:
        settings = {key: value for key, value in settings.items() if not key.startswith("lora_")}
    inputs = {
        "model_name_or_path": args.model_name_or_path,
        "critic_name_or_path": args.critic_name_or_path,
        "chat_template": args.chat_template,
        "reward_chat_template": args.reward_chat_template,
    }
    inputs |= {f"dataset_name_or_path {i}": name for i, name in enumerate(args.dataset_name_or_path, 1)}
    inputs |= {f"reward_name_or_path {i}": name for i, name in enumerate(args.reward_name_or_path or [], 1)}
    if args.reward_function:
        inputs["reward_function file"] = str(
            function_file(args.reward_function, "--reward_function", "tiny/task.py:gold_score")[0]
        )
    return settings, inputs
