"""The arguments of run_openrlhf.py: those of the small PPO and its own, and what is refused at once.

OpenRLHF looks at its flags itself when it starts. Refused here is what would end a run only after minutes of
loading, or be passed over without a word.
"""

import dataclasses
import functools
import os
from urllib.parse import urlparse

from common.cli import UserError, arg, build, refuse
from common.records import PromptArguments
from ppo import train_ppo
from ppo.checks import NOT_NEGATIVE, POSITIVE, SHARES, check_schedule, out_of_range, too_few
from ppo.openrlhf.inherit import inherit
from ppo.openrlhf.reward import RewardArguments
from ppo.openrlhf.reward import check as check_rewards

# What the small PPO can do and OpenRLHF cannot → why.
LACKS = {
    "generation_batch_size": "vLLM makes batches of its own",
    "kl_target": "OpenRLHF aims at nats a token and forgets its coefficient at every resume; set kl_coef",
    "kl_horizon": "as kl_target",
    "value_coef": "OpenRLHF's value model has an optimizer of its own; set critic_learning_rate",
    "whiten_rewards": "OpenRLHF does not whiten rewards",
    "whiten_advantages": "OpenRLHF always whitens advantages under GAE",
    "bf16": "OpenRLHF always trains in bf16 with fp32 master weights",
    "cpu_threads": "OpenRLHF needs GPUs",
}
DEFAULTS = {
    "rollout_batch_size": 1024,
    "micro_batch_size": 2,
    "warmup_steps": 0.03,
    "gae_lambda": 1.0,
    "value_clip": 0.5,
    "gradient_checkpointing": True,
    "report_to": ["tensorboard"],
}

SCHEDULERS = "linear cosine cosine_with_min_lr constant constant_with_warmup polynomial inverse_sqrt".split()
OWN = "own"  # as ray_address: a cluster for this training alone
not_shaping = functools.partial(arg, shapes=False)  # may change between two starts


@dataclasses.dataclass(kw_only=True)
class Arguments(inherit(train_ppo.Arguments, LACKS, DEFAULTS), PromptArguments):
    elsewhere = {key: f"backend small, ppo/train_ppo.py ({why})" for key, why in LACKS.items()}

    @property
    def learners(self) -> list[str]:
        """What learns, by OpenRLHF's names."""
        return ["actor", "critic"] if self.advantage_estimator == "gae" else ["actor"]

    @property
    def own_cluster(self) -> bool:
        """Whether a Ray cluster was started for this training alone, in its environment."""
        return self.ray_address == OWN

    @property
    def other_cluster(self) -> bool:
        """Whether it goes to a Ray cluster that ran before, whose environment is another."""
        return bool(self.ray_address) and not self.own_cluster

    # The algorithm
    num_episodes: int = arg(1, "passes over the prompts")
    lr_scheduler_type: str = arg(
        "cosine_with_min_lr", "schedule of both; cosine_with_min_lr ends at a tenth", SCHEDULERS
    )
    advantage_estimator: str = arg(
        "gae",
        "OpenRLHF's own; all but gae do without a value model: reinforce (the score itself), rloo, "
        "reinforce_baseline and dr_grpo (less the prompt's mean), group_norm (GRPO), flash_reinforce",
        "gae reinforce rloo reinforce_baseline group_norm dr_grpo flash_reinforce".split(),
    )
    extra_flags: dict = arg(
        {}, 'flags of OpenRLHF that have no key here: {"vllm.enable_prefix_caching": true}'
    )

    # Rewards
    reward_chat_template: str | None = not_shaping(
        None, "jinja file in place of the reward model's own chat template"
    )
    reward_max_length: int = arg(4096, "tokens that a reward model in our server sees; the left is cut")
    reward_url: list[str] | None = arg(
        None,
        "http://HOST:PORT/get_reward of a server that runs already (openrlhf.cli.serve_rm, "
        "ppo/openrlhf/serve_reward.py), or of several that give the same rewards, asked in turn",
    )
    reward_backend: str = not_shaping(
        "auto",
        "OpenRLHF's own reward model (the policy's tokens), or our server; auto: ours where tokens or "
        "template differ",
        ["auto", "local", "server"],
    )

    # Where it runs
    num_gpus: int | None = not_shaping(
        None, "GPUs over all nodes; None: those visible, or of the Ray cluster"
    )
    gpus_per_node: int | None = not_shaping(None, "GPUs of a node; None: as found")
    gpu_memory_gib: float | None = not_shaping(None, "GiB of a GPU; None: that of the visible ones")
    machine_memory_gib: float | None = not_shaping(
        None, "GiB of a node's main memory; None: that of this machine, where it has the GPUs"
    )
    ray_address: str | None = not_shaping(
        None,
        "HOST:PORT of a Ray cluster that runs already, or own: the one that ppo/openrlhf/ray_cluster.py has "
        "started for this training; output_dir must be on a disk that its nodes share",
    )
    colocate: bool = not_shaping(
        True, "all roles share all GPUs; false: policy, value model and engines on GPUs of their own"
    )
    tensor_parallel_size: int | None = not_shaping(
        None, "GPUs of an engine; None: the fewest that hold the policy"
    )
    gpu_memory_utilization: float | None = not_shaping(
        None, "share of a GPU for an engine; None: up to a half where colocated, as memory allows"
    )
    enforce_eager: bool = not_shaping(
        True, "vLLM without CUDA graphs: more memory for the training, slower sampling"
    )
    zero_stage: int | None = not_shaping(None, "DeepSpeed ZeRO 2 or 3; None: 2 where it fits", [None, 2, 3])
    offload: bool = not_shaping(
        False, "optimizer states (with ZeRO-3 reference and reward model too) in the machines' memory"
    )
    max_tokens_per_gpu: int | None = not_shaping(
        None,
        "tokens of a forward pass on a GPU where attention is flash; None: up to 16384, as memory allows",
    )
    model_size_b: float | None = not_shaping(
        None, "billions of parameters of the policy, where its config is out of reach"
    )
    reward_size_b: float | None = not_shaping(None, "the same of the reward model; None: as the policy")
    dry_run: bool = not_shaping(False, "print the command and what was found, and stop")


OWN_POSITIVE = (
    "reward_max_length num_gpus gpus_per_node gpu_memory_gib machine_memory_gib tensor_parallel_size "
    "gpu_memory_utilization max_tokens_per_gpu model_size_b reward_size_b"
).split()


def arguments(values: dict, where: str = "") -> Arguments:
    """As train_ppo.arguments, for this backend: checked without a GPU and before the files are there."""
    args = build(Arguments, values, where)
    check(args)
    return args


def shaping(args: Arguments) -> tuple[dict, dict]:
    """(settings, inputs) that shape the model; what its manifest holds."""
    settings, inputs = train_ppo.shaping(args)
    return settings, inputs | {"reward_chat_template": args.reward_chat_template}


def check(args: Arguments, processes: int | None = None, prompts: int | None = None):
    """As ppo.checks.check: refuse numbers outside their range and what OpenRLHF cannot do. Sizes are looked
    at where the run is placed on GPUs, whatever `processes`.

    Raises:
        UserError: names the settings, all at once.
    """
    problems = out_of_range(
        args, [*POSITIVE, *OWN_POSITIVE], NOT_NEGATIVE, [*SHARES, "gpu_memory_utilization"]
    )
    problems += check_schedule(args) + too_few(args, prompts)
    if "critic" not in args.learners and (args.critic_name_or_path or not args.colocate):
        what = "colocate false lays out GPUs for" if not args.colocate else "critic_name_or_path is"
        problems.append(f"{what} a value model, and advantage_estimator {args.advantage_estimator} has none")
    if args.save_total_limit == 1:
        problems.append(
            "save_total_limit 1: 2 at least, OpenRLHF deletes an old checkpoint before the new one is whole"
        )
    if args.seed >= 2**32:
        problems.append(f"seed {args.seed}: OpenRLHF takes less than 2**32")
    problems += check_trackers(args)
    try:
        check_reward(args)
        args.check_template()
    except UserError as error:
        problems.append(str(error))
    refuse(problems)


def check_trackers(args: Arguments) -> list[str]:
    """What is wrong with `report_to`. It has its own environment: what is installed here does not count."""
    if "logger.wandb.key" in args.extra_flags:
        return ["extra_flags: a W&B key would be printed and written down; export WANDB_API_KEY instead"]
    problems = [
        f"report_to {tool}: OpenRLHF reports to tensorboard (always) and wandb"
        for tool in args.report_to
        if tool not in ("none", "tensorboard", "wandb")
    ]
    if "wandb" in args.report_to and (args.other_cluster or not os.environ.get("WANDB_API_KEY")):
        problems.append(
            "report_to wandb: a Ray cluster that runs already does not see our WANDB_API_KEY; leave it out"
            if args.other_cluster
            else "report_to wandb: export WANDB_API_KEY first (a key among the arguments would be printed)"
        )
    return problems


def check_reward(args: Arguments):
    """Refuse a missing or contradictory reward."""
    more = args.reward_function or args.reward_weights or len(args.reward_name_or_path or []) > 1
    if args.reward_backend == "local" and (args.reward_url or more):
        raise UserError(
            "reward_backend local: OpenRLHF holds one reward model, without function, weights or reward_url; "
            "take server"
        )
    if args.reward_url and more:
        raise UserError(
            "reward_url: what the server computes is its own; give reward_function, reward_weights and "
            "further models to it (ppo/openrlhf/serve_reward.py)"
        )
    for url in args.reward_url or []:
        parts = urlparse(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "," in url:
            raise UserError(f"reward_url {url}: http://HOST:PORT/get_reward was expected")
    if "reward.normalize_enable" in args.extra_flags:
        raise UserError(
            "extra_flags: reward.normalize_enable divides by numbers that OpenRLHF 0.11.2 leaves "
            "uninitialised under transformers 5: rewards would be garbage"
        )
    if not args.reward_url:
        check_rewards(reward_arguments(args))
        if args.other_cluster and (more or args.reward_backend == "server"):
            raise UserError(
                "on a Ray cluster our reward server must be started by hand where it can be reached: python "
                "ppo/openrlhf/serve_reward.py --host …, then give reward_url"
            )


def reward_arguments(args: Arguments, policy: str | None = None) -> RewardArguments:
    """Arguments of ppo/openrlhf/reward.py for this run. `policy`: the folder that OpenRLHF samples from."""
    same = "reward_name_or_path reward_type reward_function reward_weights reward_chat_template date".split()
    return RewardArguments(
        policy=policy or args.model_name_or_path,
        max_length=args.reward_max_length,
        trust_remote_code=args.trust_remote_code,
        **{key: getattr(args, key) for key in same},
    )
