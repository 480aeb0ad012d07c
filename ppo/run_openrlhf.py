r"""PPO on GPUs with OpenRLHF 0.11.2: checks, the exact command, start, resume, and a plain model at the end.

In:  a policy, a reward (model, several with weights, Python function, or a server's address) and prompt sets.
Out: model, tokenizer, chat template and generation config in the folder `output_dir`, beside it its manifest and
     `output_dir.work/`: prompts, log, TensorBoard's files, and while it runs the checkpoints.

    python ppo/run_openrlhf.py runs/ppo_llama3_8b/iter1/train.yaml --dry_run true

Environment `ppo_train`. It follows the GPUs there are; what cannot fit is refused with what would. A stopped run continues from its
last checkpoint when the same command is started again. W&B: export WANDB_API_KEY and give --report_to wandb.
"""

import dataclasses
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common.cli import UserError, arg, build, check_model, existing_file, parse, read_json, run
from common.devices import prepare_threads, visible_gpus
from common.functions import function_file
from common.manifest import beside, difference, fingerprint, read_manifest, versions, write_json
from common.progress import duration
from dpo_iteration import memory
from ppo import openrlhf_preflight as preflight
from ppo import openrlhf_process as process
from ppo.openrlhf_command import MODULE, SCHEDULERS, Paths, Reward, accumulation, flags, words
from ppo.openrlhf_placement import place
from ppo.openrlhf_reward import CONFIG, RewardArguments
from ppo.openrlhf_reward import check as check_rewards

SCRIPT = "ppo/run_openrlhf.py"
# Settings that do not shape the model: where it goes and runs, what is shown, and what the inputs' fingerprints cover.
NOT_SHAPING = {
    "model_name_or_path", "reward_name_or_path", "critic_name_or_path", "dataset_name_or_path", "chat_template", "reward_chat_template", "output_dir",
    "overwrite", "trust_remote_code", "save_steps", "save_total_limit", "save_hf", "save_critic", "logging_steps", "report_to", "run_name",
    "keep_checkpoints", "wandb_project", "num_gpus", "gpus_per_node", "gpu_memory_gib", "ray_address", "colocate", "num_engines",
    "tensor_parallel_size", "gpu_memory_utilization", "enforce_eager", "zero_stage", "offload", "packing", "max_tokens_per_gpu",
    "micro_batch_size", "attn_implementation", "model_size_b", "reward_size_b", "reward_gpus", "reward_batch_tokens", "patched_lora",
    "dry_run", "gradient_checkpointing", "kl_target", "kl_horizon", "value_coef", "whiten_rewards", "whiten_advantages", "bf16",
    "reward_backend", "ignore_versions",
}  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class Arguments:
    model_name_or_path: str = arg(help="policy to start from, and reference: hub name or folder")
    trust_remote_code: bool = arg(False, "run Python code that comes with the models (OpenRLHF itself always does)")
    chat_template: str | None = arg(None, "file with a jinja chat template to use instead of the policy's")
    reward_name_or_path: list[str] | None = arg(None, "reward models: hub names or folders")
    reward_type: list[str] = arg(["auto"], "as in get_rewards.py; pair-preference models cannot judge one response")
    reward_function: str | None = arg(None, "FILE.py:NAME, f(messages, response[, record]) → number")
    reward_weights: list[float] | None = arg(None, "one for each model, then the function's; the sum is the reward")
    reward_chat_template: str | None = arg(None, "jinja file in place of the reward model's own chat template")
    reward_max_length: int = arg(4096, "tokens that a reward model of ours sees; the left is cut")
    reward_url: str | None = arg(None, "http://HOST:PORT/get_reward of a server that runs already: openrlhf.cli.serve_rm, ppo/serve_reward.py")
    reward_backend: str = arg("auto", "OpenRLHF's own reward model (the policy's tokens), or our server; auto: ours where tokens or "
                              "template differ", ["auto", "local", "server"])  # fmt: skip
    dataset_name_or_path: list[str] = arg(help="prompt sets: files, folders or hub names; one set of them all")
    dataset_key: str | None = arg(None, "column of the prompts; None: context_messages, messages or prompt")
    dataset_split: str = arg("train", "split of hub data sets")
    output_dir: str = arg(help="folder of the trained model")
    overwrite: bool = arg(False, "start anew where an output exists or is half done")
    seed: int = arg(42, "seed of the prompts' choice, sampling and training")

    max_input_length: int = arg(1024, "tokens of a prompt; longer ones are left out")
    max_new_tokens: int = arg(1024, "tokens of a response")
    temperature: float = arg(1.0, "of the sampling")
    top_p: float = arg(1.0, "of the sampling; below 1 the policy's probabilities are not those that were sampled from")
    num_episodes: int = arg(1, "passes over the prompts")
    max_rollouts: int | None = arg(None, "at most so many rollouts")
    rollout_batch_size: int = arg(1024, "prompts of a rollout, over all GPUs")
    samples_per_prompt: int = arg(1, "responses to each of them")
    batch_size: int = arg(128, "responses per optimizer step, over all GPUs; the accumulation follows")
    micro_batch_size: int = arg(2, "responses per forward pass and GPU, where packing by tokens is off")
    ppo_epochs: int = arg(1, "passes over a rollout's responses")

    learning_rate: float = arg(5e-7, "peak learning rate of the policy")
    critic_learning_rate: float = arg(9e-6, "peak learning rate of the value model")
    lr_scheduler_type: str = arg("cosine_with_min_lr", "course of both (cosine_with_min_lr ends at a tenth)", SCHEDULERS)
    warmup_steps: float = arg(0.03, "optimizer steps of linear warm-up; below 1 a share of all steps")
    weight_decay: float = arg(0.0, "decoupled weight decay")
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm; 0: not at all")
    critic_only_rollouts: int = arg(0, "rollouts at the start that train the value model alone")
    kl_coef: float = arg(0.01, "weight of the KL divergence to the reference, per token, in the reward")
    kl_target: float | None = arg(None, "not with OpenRLHF: nats a response that an adaptive coefficient aims at")
    kl_horizon: int = arg(10000, "of kl_target")
    kl_estimator: str = arg("k1", "k1: log-ratio, k2: half its square, k3: ratio - 1 - log-ratio", ["k1", "k2", "k3"])
    gamma: float = arg(1.0, "discount")
    gae_lambda: float = arg(1.0, "λ of GAE")
    clip: float = arg(0.2, "the policy's ratio is clipped to 1 ± this")
    value_clip: float = arg(0.5, "values move by this at most from those of the rollout")
    value_coef: float | None = arg(None, "not with OpenRLHF: its value model has an optimizer of its own")
    reward_clip: float = arg(10.0, "rewards are clipped to ± this")
    missing_eos_penalty: float = arg(0.0, "taken off the reward of a response that ran to max_new_tokens")
    whiten_rewards: bool = arg(False, "not with OpenRLHF")
    whiten_advantages: bool = arg(True, "always with OpenRLHF")
    sampling_correction: str = arg("clip", "weigh tokens by training over sampling probability, clipped or left out beyond 0.5 to 5", ["clip", "mask", "off"])
    bf16: bool = arg(True, "always with OpenRLHF: bf16 weights, fp32 master weights")
    gradient_checkpointing: bool = arg(True, "recompute activations: less memory, about a fifth slower")

    save_steps: int = arg(20, "rollouts between checkpoints; 0 writes none")
    save_total_limit: int = arg(2, "checkpoints kept while training, 2 at least")
    save_hf: bool = arg(False, "a plain model beside each checkpoint too; these are not deleted while it runs")
    save_critic: bool = arg(False, "keep the value model, as output_dir.work/model_critic")
    keep_checkpoints: bool = arg(False, "keep checkpoints and optimizer states once the model is saved")
    logging_steps: int = arg(1, "rollouts between log entries")
    report_to: list[str] = arg(["tensorboard"], "tensorboard (always written), wandb (key from WANDB_API_KEY)")
    run_name: str | None = arg(None, "name of the run for report_to")
    wandb_project: str = arg("ppo", "project of the run on W&B")

    num_gpus: int | None = arg(None, "GPUs over all nodes; None: those visible, or of the Ray cluster")
    gpus_per_node: int | None = arg(None, "GPUs of a node; None: as found")
    gpu_memory_gib: float | None = arg(None, "GiB of a GPU; None: that of the visible ones")
    ray_address: str | None = arg(None, "HOST:PORT of a Ray cluster that runs already; output_dir must be on a disk that its nodes share")
    colocate: bool = arg(True, "all roles share all GPUs; false: policy, value model and engines on GPUs of their own")
    num_engines: int | None = arg(None, "vLLM engines; None: as many as fit")
    tensor_parallel_size: int | None = arg(None, "GPUs of an engine; None: the fewest that hold the policy")
    gpu_memory_utilization: float | None = arg(None, "share of a GPU for an engine; None: up to a half where colocated, as memory allows")
    enforce_eager: bool = arg(True, "vLLM without CUDA graphs: less memory beside the training, slower sampling")
    zero_stage: int | None = arg(None, "DeepSpeed ZeRO 2 or 3; None: 2 where it fits", [None, 2, 3])
    offload: bool | None = arg(None, "optimizer states (with ZeRO-3 reference and reward model too) in the machines' memory; None: no")
    lora_r: int = arg(0, "rank of LoRA adapters, 0: train all parameters; see patched_lora")
    lora_alpha: int = arg(32, "the adapters count alpha / r times")
    lora_dropout: float = arg(0.0, "share of an adapter's inputs left out")
    lora_target_modules: list[str] = arg(["all-linear"], "ends of the names of modules with an adapter")
    patched_lora: bool = arg(False, "this OpenRLHF is patched to merge adapters before it hands weights to vLLM; 0.11.2 is not")
    packing: bool | None = arg(None, "rows without padding; None: where attention is flash")
    max_tokens_per_gpu: int | None = arg(None, "tokens of a forward pass on a GPU where packing is on; None: up to 16384, as memory allows")
    attn_implementation: str | None = arg(None, "None: flash_attention_2 where flash-attn is installed, else sdpa")
    critic_name_or_path: str | None = arg(None, "where the value model starts; None: the reward model if it has the policy's tokens, else the policy")
    value_head: str = arg("score", "name of the reward model's head")
    model_size_b: float | None = arg(None, "billions of parameters of the policy, where its config is out of reach")
    reward_size_b: float | None = arg(None, "the same of the reward model; None: as the policy")
    reward_gpus: int | None = arg(None, "GPUs set aside for our reward server; 0: it shares one; None: as memory allows")
    reward_batch_tokens: int | None = arg(None, "tokens of a forward pass of our reward server; None: 16384")
    extra_flags: dict = arg({}, 'flags of OpenRLHF that have no key here: {"vllm.enable_prefix_caching": true}')
    ignore_versions: bool = arg(False, "accept other versions of OpenRLHF and its packages than the pinned ones")
    dry_run: bool = arg(False, "print the command and what was found, and stop")


def arguments(values, where=""):
    """Arguments from a mapping, checked without a GPU and before the files are there."""
    args = build(Arguments, values, where)
    check(args)
    return args


def check(args):
    """Refuse numbers outside their range, what OpenRLHF cannot do, and what has no effect.

    Raises:
        UserError: names the setting.
    """
    positive = ("max_input_length", "max_new_tokens", "temperature", "num_episodes", "rollout_batch_size", "samples_per_prompt", "batch_size",
                "micro_batch_size", "ppo_epochs", "learning_rate", "critic_learning_rate", "clip", "value_clip", "reward_clip", "logging_steps",
                "max_rollouts", "num_gpus", "gpus_per_node", "num_engines", "tensor_parallel_size", "max_tokens_per_gpu", "model_size_b",
                "reward_size_b", "gpu_memory_gib", "reward_max_length", "gpu_memory_utilization")  # fmt: skip
    for key in positive:
        if getattr(args, key) is not None and not getattr(args, key) > 0:
            raise UserError(f"{key} {getattr(args, key)} must be above 0")
    for key in ("warmup_steps", "weight_decay", "max_grad_norm", "kl_coef", "missing_eos_penalty", "save_steps", "critic_only_rollouts", "lora_r"):
        if not getattr(args, key) >= 0:
            raise UserError(f"{key} {getattr(args, key)} must not be negative")
    for key in ("top_p", "gamma", "gae_lambda", "gpu_memory_utilization"):
        if getattr(args, key) is not None and not 0 <= getattr(args, key) <= 1:
            raise UserError(f"{key} {getattr(args, key)} must be from 0 to 1")
    if args.reward_gpus not in (None, 0, 1):
        raise UserError(f"reward_gpus {args.reward_gpus} must be 0 or 1: our server scores on one GPU")
    if args.kl_target is not None:
        raise UserError("kl_target: OpenRLHF's adaptive coefficient aims at nats a token and is forgotten at every resume; leave it out and set kl_coef")
    if args.value_coef is not None:
        raise UserError("value_coef has no effect: OpenRLHF's value model has an optimizer of its own; leave it out and set critic_learning_rate")
    if args.whiten_rewards:
        raise UserError("whiten_rewards true: OpenRLHF does not whiten rewards; give --whiten_rewards false")
    if not args.whiten_advantages:
        raise UserError("whiten_advantages false: OpenRLHF always whitens advantages under GAE; give --whiten_advantages true")
    if not args.bf16:
        raise UserError("bf16 false: OpenRLHF trains in bf16 or fp16 beside fp32 master weights; give --bf16 true")
    if args.lr_scheduler_type == "constant" and args.warmup_steps:
        raise UserError("lr_scheduler_type constant has no warm-up: take constant_with_warmup, or warmup_steps 0")
    if args.save_total_limit < 2:
        raise UserError(f"save_total_limit {args.save_total_limit}: 2 at least, OpenRLHF deletes an old checkpoint before the new one is whole")
    for tool in args.report_to:
        if tool not in ("none", "tensorboard", "wandb"):
            raise UserError(f"report_to {tool}: OpenRLHF reports to tensorboard (always) and wandb")
    if "wandb" in args.report_to and not os.environ.get("WANDB_API_KEY"):
        raise UserError("report_to wandb: export WANDB_API_KEY first (a key among the arguments would be printed and kept)")
    if "wandb" in args.report_to and args.ray_address:
        raise UserError("report_to wandb: a Ray cluster that runs already does not see our WANDB_API_KEY; start Ray with it and give extra_flags, "
                        "or read the TensorBoard files")  # fmt: skip
    if args.lora_r and not args.patched_lora:
        raise UserError(
            "lora_r: OpenRLHF 0.11.2 hands the adapters' own names to vLLM, which ends at the first hand-over of weights (its issues 991, 1081, "
            "1349); train all parameters (lora_r 0; offload true saves memory), or say --patched_lora true for a patched OpenRLHF"
        )
    check_reward(args)
    if args.chat_template:
        existing_file(args.chat_template, "chat template")


def check_reward(args):
    """Refuse a missing or contradictory reward."""
    own = bool(args.reward_function or args.reward_weights)
    if not args.reward_url and not args.reward_name_or_path and not args.reward_function:
        raise UserError("no reward: give reward_name_or_path (a reward model), reward_function (FILE.py:NAME) or reward_url (a server)")
    if args.reward_url and (own or len(args.reward_name_or_path or []) > 1):
        raise UserError("reward_url: what the server computes is its own; give reward_function, reward_weights and further models to it (ppo/serve_reward.py)")
    if args.reward_url and args.reward_backend == "local":
        raise UserError("reward_backend local and reward_url exclude each other; leave one out")
    if args.reward_url and not args.reward_url.startswith(("http://", "https://")):
        raise UserError(f"reward_url {args.reward_url}: http://HOST:PORT/get_reward was expected")
    if not args.reward_url:
        check_rewards(reward_arguments(args))
    if args.reward_backend == "local" and (own or len(args.reward_name_or_path) > 1):
        raise UserError("reward_backend local: OpenRLHF holds one reward model, without function or weights; take server")
    if args.ray_address and not args.reward_url and (own or args.reward_backend == "server"):
        raise UserError("on a Ray cluster our reward server must be started by hand where it can be reached: python ppo/serve_reward.py --host …, "
                        "then give reward_url")  # fmt: skip


def reward_arguments(args, policy=None):
    """RewardArguments of ppo/openrlhf_reward.py for this run."""
    return build(RewardArguments, {
        "policy": policy or args.model_name_or_path, "reward_name_or_path": args.reward_name_or_path, "reward_type": args.reward_type,
        "reward_function": args.reward_function, "reward_weights": args.reward_weights, "reward_chat_template": args.reward_chat_template,
        "max_length": args.reward_max_length, "batch_tokens": args.reward_batch_tokens, "trust_remote_code": args.trust_remote_code,
    })  # fmt: skip


def shaping(args):
    """(settings, inputs) that shape the model; what its manifest holds."""
    settings = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.name not in NOT_SHAPING}
    if not args.lora_r:
        settings = {key: value for key, value in settings.items() if not key.startswith("lora_")}
    inputs = {"model_name_or_path": args.model_name_or_path, "critic_name_or_path": args.critic_name_or_path, "chat_template": args.chat_template,
              "reward_chat_template": args.reward_chat_template}  # fmt: skip
    inputs |= {f"dataset_name_or_path {i}": name for i, name in enumerate(args.dataset_name_or_path, 1)}
    inputs |= {f"reward_name_or_path {i}": name for i, name in enumerate(args.reward_name_or_path or [], 1)}
    if args.reward_function:
        inputs["reward_function file"] = str(function_file(args.reward_function, "--reward_function", "tiny/task.py:gold_score")[0])
    return settings, inputs


def work_folder(args):
    return beside(args.output_dir, ".work")


def is_complete(args, settings, inputs):
    """Whether the model is there, from these settings and inputs; refuse what was made, or half made, from others.

    Raises:
        UserError: the output or checkpoints are of other settings or of nobody knows what.
    """
    folder, work = Path(args.output_dir), work_folder(args)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file, a folder was expected")
    if args.overwrite:
        return False
    manifest = read_manifest(folder)
    there = folder.is_dir() and any(folder.iterdir())
    stale = (work / "checkpoints" / "_actor").is_dir()
    if manifest is None and (there or stale):
        what = folder if there else work / "checkpoints" / "_actor"
        raise UserError(f"{what} has no manifest, so it is not known how it was made; move it away or give --overwrite true")
    if manifest is None:
        return False
    complete = manifest.get("complete") and (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    changed = difference(manifest, settings, inputs) if complete or stale else None
    if changed:
        state = "complete" if complete else "half done"
        raise UserError(f"{folder} is {state} with other settings: {changed}; choose another --output_dir or give --overwrite true")
    return bool(complete)


def shapes_of(args, reward):
    """Role → Shape (or None) of the models that OpenRLHF holds; estimates where a config is out of reach; None: size not known."""

    def shape(name, billions):
        if Path(name).is_dir():
            return memory.shape_of(name, trust_remote_code=args.trust_remote_code)
        return memory.shape_like(billions) if billions else None

    policy = shape(args.model_name_or_path, args.model_size_b)
    if policy is None:
        return None
    model = shape(args.reward_name_or_path[0], args.reward_size_b or args.model_size_b) if args.reward_name_or_path else None
    critic = args.critic_name_or_path or (args.reward_name_or_path or [args.model_name_or_path])[0]
    value = policy if critic == args.model_name_or_path else shape(critic, args.reward_size_b or args.model_size_b)
    return {"actor": policy, "ref": policy if args.kl_coef else None, "critic": value or policy, "reward": model if reward == "local" else None,
            "server": model if reward == "server" else None}  # fmt: skip


def choose_reward(args, tokenizer, notes):
    """(`local`, `server`, `function` or `url`, whether the first reward model has the policy's tokens).

    Raises:
        UserError: OpenRLHF's own was asked for and cannot read the policy's tokens.
    """
    from ppo.openrlhf_prompts import load_tokenizer

    models = args.reward_name_or_path or []
    why = None
    if models and tokenizer is not None:
        other = load_tokenizer(models[0], args.trust_remote_code, args.reward_chat_template)
        why = preflight.differs(tokenizer, other)
        config = Path(models[0]) / "config.json"
        if why is None and config.is_file() and "SequenceClassification" not in str(read_json(config).get("architectures", "SequenceClassification")):
            why = "it is no classifier with one label"
        if why is None and preflight.has_value_head(models[0], args.value_head) is False:
            why = f"it has no weights {args.value_head}.weight (value_head)"
    if args.reward_url:
        return "url", bool(models) and why is None
    if not models:
        return "function", False
    if len(models) > 1 or args.reward_function or args.reward_weights or args.reward_backend == "server":
        return "server", why is None
    if why and args.reward_backend == "local":
        raise UserError(f"reward_backend local: {models[0]} cannot be used so: {why}; take reward_backend server, which has its own tokenizer")
    if why and args.ray_address:
        raise UserError(f"OpenRLHF's own reward model cannot be {models[0]}: {why}; start ppo/serve_reward.py --host … by hand and give reward_url")
    if why:
        notes.append(f"the reward model runs in our server: {why}")
        return "server", False
    return "local", True


def try_place(args, kind, gpus, a_node, size, flash, notes):
    """(Placement, GPUs set aside for our reward server)."""
    shapes = shapes_of(args, kind)
    if shapes is None:
        raise UserError(f"model_name_or_path {args.model_name_or_path}: its size is not known here; give --model_size_b")
    own = shapes.pop("server")
    asides = [0] if own is None else [args.reward_gpus] if args.reward_gpus is not None else [0, 1]
    problem = None
    for aside in asides:
        counts = [gpus - aside] + ([n for n in (32, 16, 8, 4, 2, 1) if n < gpus - aside] if aside else [])
        for count in counts:
            if count < 1:
                problem = problem or UserError("reward_gpus 1 leaves no GPU to train on; give 0, or more GPUs")
                continue
            beside_it = 0 if own is None or aside else 2 * own.parameters + 2 * memory.GIB
            try:
                placement, more = place(args, shapes, count, min(a_node, count), size, flash, beside_it)
            except UserError as error:
                problem = problem or error
                continue
            notes += more
            if own is not None:
                where = f"one GPU of its own, {gpus - aside - count} stay idle" if aside else "one of the GPUs that train"
                notes.append(f"our reward server takes {where}")
            return placement, aside
    raise problem


@dataclasses.dataclass
class Plan:
    """A run worked out: what is started, and what was found on the way."""

    placement: object
    kind: str
    same_tokens: bool
    aside: int
    notes: list
    tokenizer: object
    prompts: int = 0  # known once they are read


def plan(args):
    """Look at GPUs, models and reward, and decide where all goes; nothing is written.

    Raises:
        UserError: what cannot work, with what would.
    """
    from ppo.openrlhf_prompts import load_tokenizer

    notes, tokenizer = [], None
    check_model(args.model_name_or_path, "model_name_or_path")
    for name in args.reward_name_or_path or []:
        check_model(name, "reward_name_or_path")
    if not args.dry_run:
        if not args.ignore_versions:
            preflight.check_versions()
        preflight.check_writable(work_folder(args))
        if args.reward_url:
            preflight.check_address(args.reward_url)
    gpus, a_node, size = preflight.count_gpus(args)
    prepare_threads()
    try:
        tokenizer = load_tokenizer(args.model_name_or_path, args.trust_remote_code, args.chat_template)
        kind, same = choose_reward(args, tokenizer, notes)
    except UserError:
        if not args.dry_run or (Path(args.model_name_or_path).is_dir() and all(Path(name).is_dir() for name in args.reward_name_or_path or [])):
            raise
        kind, same = choose_reward(args, None, notes)
        notes.append("tokenizers on the hub are not at hand: that policy and reward model share tokens and template is assumed")
    flash = preflight.installed("flash-attn") is not None or args.dry_run
    placement, aside = try_place(args, kind, gpus, a_node, size, flash, notes)
    return Plan(placement, kind, same, aside, notes + preflight.notes_on_machine(placement), tokenizer)


def command_of(args, found, url, resume):
    """(arguments of python, Paths)."""
    work = work_folder(args).absolute()
    policy = str(work / "policy")
    critic = args.critic_name_or_path or (args.reward_name_or_path[0] if found.same_tokens and args.reward_name_or_path else policy)
    if critic == args.model_name_or_path:
        critic = policy  # the same name tells OpenRLHF to make a new value head
    paths = Paths(policy, critic, str(work / "prompts.jsonl"), str(work / "checkpoints"), str(work / "model"), str(work / "tensorboard"))
    if found.kind == "function":
        url = str(Path(__file__).with_name("openrlhf_reward.py").resolve())
    reward = Reward("local" if found.kind == "local" else "server", args.reward_name_or_path[0] if found.kind == "local" else None, url)
    for value in (paths.prompts, url or ""):
        if "," in value or "@" in Path(value).name:
            raise UserError(f"{value}: OpenRLHF splits names at commas; choose an --output_dir without")
    return ["-m", MODULE, *words(flags(args, found.placement, reward, paths, found.prompts, resume))], paths


def show(command, environment):
    """The command, a flag a line, as bash takes it."""
    lines, line = [], [shlex.quote(word) for word in command[:3]]
    for word in command[3:]:
        if word.startswith("--"):
            lines.append(line)
            line = []
        line.append(shlex.quote(word))
    head = "".join(f"{key}={shlex.quote(value)} " for key, value in environment.items())
    return head + " \\\n  ".join(" ".join(words) for words in [*lines, line])


def prepare(args, found, settings, inputs):
    """Write prompts, policy folder and an unfinished manifest; returns (counts, tag to resume from or None)."""
    from ppo.openrlhf_prompts import prepare_policy, write_prompts

    work, world = work_folder(args), found.placement.all_gpus
    manifest, resume = read_manifest(args.output_dir), None
    if args.overwrite:
        for name in ("checkpoints", "model", "model_critic", "tensorboard"):
            shutil.rmtree(work / name, ignore_errors=True)
    else:
        resume = process.checkpoint_to_resume(work / "checkpoints")
    if resume and manifest and manifest.get("num_gpus") != world:
        raise UserError(f"{args.output_dir} is half done on {manifest.get('num_gpus')} GPUs and {world} are used now: DeepSpeed's checkpoints are cut into as "
                        f"many parts; give --num_gpus {manifest.get('num_gpus')} or --overwrite true")  # fmt: skip
    if resume and manifest.get("zero_stage") != found.placement.zero_stage:
        stage = manifest.get("zero_stage")
        raise UserError(f"{args.output_dir} is half done with ZeRO-{stage}: give --zero_stage {stage} or --overwrite true")
    if not resume:
        shutil.rmtree(work / "checkpoints", ignore_errors=True)  # without a whole checkpoint: OpenRLHF would stumble over it
    shutil.rmtree(work / "model", ignore_errors=True)
    counts = write_prompts(args, found.tokenizer, work / "prompts.jsonl")
    prepare_policy(args, found.tokenizer, work / "policy")
    marks = {key: fingerprint(name) for key, name in inputs.items() if name is not None}
    before = manifest.get("seconds", 0.0) if resume and manifest else 0.0
    write_json(beside(args.output_dir, ".manifest.json"), {
        "script": SCRIPT, "complete": False, "settings": settings, "inputs": marks, "num_gpus": world,
        "zero_stage": found.placement.zero_stage, "counts": counts, "seconds": before,
    })  # fmt: skip
    return counts, resume


def place_model(args, paths):
    """Make the folder that OpenRLHF left a plain model with our tokenizer and generation config, and rename it to `output_dir`."""
    from dpo_iteration.saved import check_saved

    made, target = Path(paths.model), Path(args.output_dir)
    if args.lora_r:
        from types import SimpleNamespace

        from dpo_iteration.adapters import merged

        source = SimpleNamespace(model_name_or_path=paths.policy, revision=None, trust_remote_code=args.trust_remote_code, bf16=True, model_init_kwargs=None)
        model = merged(source, made)
        shutil.move(made, f"{made}_adapter")
        model.save_pretrained(made)
    if not (made / "config.json").is_file() or not any(made.glob("*.safetensors")):
        raise UserError(f"OpenRLHF ended and left no model in {made}; the log is {work_folder(args) / 'openrlhf.log'}")
    config, start = read_json(made / "config.json"), read_json(Path(paths.policy) / "config.json")
    for key in ("use_cache", "pad_token_id", "eos_token_id"):  # what OpenRLHF sets for its own needs
        config.pop(key, None)
        if key in start:
            config[key] = start[key]
    write_json(made / "config.json", config)
    for file in Path(paths.policy).iterdir():
        if not file.is_symlink():  # tokenizer, template, generation config
            shutil.copyfile(file, made / file.name)
    for file in Path(paths.policy).glob("*.py"):  # code that came with the model
        shutil.copyfile(file, made / file.name)
    check_saved(made, args.trust_remote_code)
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(made, target)


def finish(args, paths, counts, seconds):
    """Complete the manifest and clear what a resume would have needed."""
    manifest = read_manifest(args.output_dir)
    manifest |= {
        "complete": True, "counts": counts, "seconds": round(manifest["seconds"] + seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "output": fingerprint(args.output_dir),
        "versions": versions() | {name: found for name in ("openrlhf", "ray") if (found := preflight.installed(name))},
    }  # fmt: skip
    write_json(beside(args.output_dir, ".manifest.json"), manifest)
    if not args.keep_checkpoints:
        shutil.rmtree(paths.checkpoints, ignore_errors=True)
    shutil.rmtree(paths.policy, ignore_errors=True)
    skipped = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items()) or "0"
    print(f"read {counts['prompts']} prompts in {counts['rollouts']} rollouts, skipped {skipped}; trained {args.output_dir} in {duration(manifest['seconds'])}")


def start(args, found, settings, inputs):
    """Write, start, wait, place."""
    began = time.time()
    counts, resume = prepare(args, found, settings, inputs)
    args.num_episodes, found.prompts = counts["episodes"], counts["prompts"]
    work, env = work_folder(args), dict(os.environ)
    if args.ray_address:
        env["RAY_ADDRESS"] = args.ray_address
    gpus = visible_gpus()
    if not args.ray_address and found.placement.all_gpus < len(gpus):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[: found.placement.all_gpus])
    rewards = reward_arguments(args, str(work / "policy")) if found.kind in ("server", "function") else None
    served = {key: value for key, value in vars(rewards).items() if value is not None} if rewards else {}
    with process.stopped_by_signals():
        if found.kind == "server":
            with process.reward_server(served, work, gpus[-1] if gpus else None) as url:
                paths = launch(args, found, url, resume, env)
        else:
            if found.kind == "function":
                from common.loop import write_yaml

                write_yaml(work / "reward.yaml", served)
                env[CONFIG] = str((work / "reward.yaml").absolute())
            paths = launch(args, found, args.reward_url, resume, env)
    place_model(args, paths)
    finish(args, paths, counts, time.time() - began)


def launch(args, found, url, resume, env):
    """Run OpenRLHF to its end; returns its Paths."""
    command, paths = command_of(args, found, url, resume is not None)
    if not args.ignore_versions:
        preflight.check_command(command[2:])
    if resume:
        print(f"continuing from {resume}", flush=True)
    print(show(["python", *command], {}), flush=True)
    process.run_openrlhf([sys.executable, *command], work_folder(args) / "openrlhf.log", env)
    return paths


def describe(args, found):
    """What was decided, for a reader."""
    p = found.placement
    steps = accumulation(args, p)
    how = f"{steps} passes a step" if steps else f"packed to {p.max_tokens_per_gpu} tokens"
    where = "all roles on all of them" if p.colocate else f"{p.gpus} for the policy, {p.critic_gpus} for value and reward model"
    reward = {"local": "OpenRLHF's own reward model", "server": "our reward server", "function": "a function", "url": args.reward_url}[found.kind]
    yield f"{p.all_gpus} GPUs on {p.nodes} nodes, {where}; {p.engines} engines × {p.tensor_parallel} GPUs, ZeRO-{p.zero_stage}, {how}; reward: {reward}"
    yield from found.notes


def main():
    for word in sys.argv[1:]:
        if "wandb" in word.lower() and "key" in word.lower() or "wandb_api_key" in word.lower():
            raise UserError("a W&B key does not belong among the arguments, where it is printed and kept: export WANDB_API_KEY and say --report_to wandb")
    args = parse(Arguments, __doc__)
    check(args)
    settings, inputs = shaping(args)
    if is_complete(args, settings, inputs):
        print(f"{args.output_dir} is complete, nothing to do")
        return
    found = plan(args)
    for line in describe(args, found):
        print(f"ppo: {line}", file=sys.stderr, flush=True)
    if args.dry_run:
        found.prompts = dry_prompts(args, found)
        url = args.reward_url or "http://127.0.0.1:PORT/get_reward"
        resume = (work_folder(args) / "checkpoints" / "_actor" / "latest").is_file()
        print(show(["python", *command_of(args, found, url, resume)[0]], {"RAY_ADDRESS": args.ray_address} if args.ray_address else {}))
        return
    start(args, found, settings, inputs)


def dry_prompts(args, found):
    """Number of prompts of the run, counted as `prepare` will; None where a set is on the hub and out of reach."""
    from ppo.openrlhf_prompts import read_all, whole_rollouts

    try:
        chosen, _, args.num_episodes = whole_rollouts(args, read_all(args, found.tokenizer)[0])
    except (UserError, AttributeError) as error:
        if found.tokenizer is not None and all(Path(name).exists() for name in args.dataset_name_or_path):
            raise
        print(f"ppo: prompts not looked at: {error}", file=sys.stderr)
        if args.warmup_steps >= 1 or args.max_rollouts is not None:
            raise UserError("warmup_steps of 1 or more and max_rollouts need the prompts, which are out of reach for this dry run") from None
        return 0
    return len(chosen)


if __name__ == "__main__":
    run(main)
