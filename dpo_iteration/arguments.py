"""Arguments of run_dpo.py: what there is, what cannot work, what shapes the model. Imports nothing heavy."""

import dataclasses
import os
from math import inf, isnan
from pathlib import Path

from common import trackers
from common.chat import TemplateArguments
from common.cli import UserError, arg, build, count, existing_file, shaping_values
from common.manifest import beside
from common.models import check_policy
from common.records import is_local
from common.tables import split_config
from common.training import Training, world_size
from dpo_iteration import adapters, trl_arguments
from dpo_iteration.losses import LOSSES, Settings, needs_reference, needs_rejected
from dpo_iteration.pairs import CHOOSE_TYPES, LENGTH_UNITS
from dpo_iteration.trl_arguments import TRLArguments

LEAST_STEPS = 4  # a pass over the pairs has at least so many optimizer steps, where the batch can be halved
REFUSED = {  # settings of DPOConfig that run_dpo.py decides itself, or that cannot work
    "deepspeed": "give a configuration to `accelerate launch --config_file configs/zero2.yaml` instead",
    "fp16": "choose bf16 true or false",
    "bf16_full_eval": "it would turn the fp32 weights into bf16",
    "fp16_full_eval": "it would turn the fp32 weights into fp16",
    "padding_free": "TRL 1.16 ignores it; packed rows have no padding, see --share_prompts",
    "sync_ref_model": "the reference's log-probabilities are computed once, before training",
    "precompute_ref_batch_size": "the reference is computed in batches of --max_row_tokens",
    "save_only_model": "a run could not continue from checkpoints without optimizer states",
    "dataloader_drop_last": "an epoch's last step takes the pairs that are left",
    "resume_from_checkpoint": "a killed run continues by itself; --overwrite starts again",
}
ABOVE_0 = """
    beta learning_rate logging_steps per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps global_batch_size max_row_tokens pairs_per_prompt
"""
NOT_NEGATIVE = """
    weight_decay max_grad_norm length_penalty min_margin margin_scale margin_weight eval_steps save_steps
    warmup_steps
"""
OF_LOADING = {  # what model_init_kwargs must leave to arguments of ours
    "dtype": "bf16 weights alone do not move; see --bf16",
    "torch_dtype": "bf16 weights alone do not move; see --bf16",
    "quantization_config": "give --use_peft true --load_in_4bit true",
    "attn_implementation": "give --attn_implementation",
    "revision": "give --revision",
    "trust_remote_code": "give --trust_remote_code",
    "output_loading_info": "missing weights are already looked for",
}


@dataclasses.dataclass(kw_only=True)
class Arguments(TRLArguments, TemplateArguments):
    model_name_or_path: str = arg(help="policy to start from: hub name or folder", shapes=False)
    ref_model_name_or_path: str | None = arg(
        None, "reference: hub name or folder; None is the policy's start", shapes=False
    )
    revision: str | None = arg(None, "branch, tag or commit of the policy on the hub")
    trust_remote_code: bool = arg(False, "run Python code that comes with the model", shapes=False)
    attn_implementation: str | None = arg(
        None, "None: flash_attention_2 where flash-attn and a GPU are, else transformers' choice"
    )

    train_dir: list[str] = arg(
        help="rewarded records (one file or several, past iterations) or preferences: .jsonl, .json, .csv, "
        ".tsv, .parquet, a data set's folder or a hub name",
        metavar="FILE",
        shapes=False,
    )
    train_weights: list[float] | None = arg(
        None,
        "weight of the loss of each of train_dir's pairs, scaled to a mean of 1 over all; None: all alike",
    )
    dataset_split: str | None = arg(
        None, "split of train_dir's data sets, for example train_prefs; None: train; a file has none"
    )
    output_dir: str = arg(help="folder of the trained model", shapes=False)
    pairs_path: str | None = arg(
        None, "where the chosen pairs are written; None is OUTPUT_DIR.pairs.jsonl", shapes=False
    )
    overwrite: bool = arg(False, "start again where an output exists or is half done", shapes=False)

    choose_type: str = arg(
        "max_min",
        "which two responses: "
        + ", ".join(f"{name} {choice.words}" for name, choice in CHOOSE_TYPES.items()),
        choices=CHOOSE_TYPES,
    )
    length_penalty: float = arg(0.0, "reward per unit of length taken off by choose_type max_min_p")
    length_penalty_unit: str = arg(
        "token", "token, counted as they were sampled, or character of the text", choices=LENGTH_UNITS
    )
    pairs_per_prompt: int = arg(1, "maximum pairs per prompt; no response is used twice")
    min_margin: float = arg(0.0, "reward; pairs closer than this are left out")
    drop_truncated: bool = arg(False, "leave out responses that ended at the generation's length limit")
    drop_empty: bool = arg(
        False, "leave out responses without text; else they may be rejected, but never chosen"
    )
    eval_fraction: float = arg(0.0, "share of the prompts held out for evaluation, from 0 to below 1")
    max_length: int = arg(2048, "tokens of prompt and response; longer responses are cut on the right")
    max_prompt_length: int = arg(1024, "tokens of the prompt; longer prompts are cut on the left")

    loss_type: list[str] = arg(
        ["sigmoid"],
        f"loss, or several with loss_weights, of {', '.join(LOSSES)}; sft trains on the best response alone, "
        "sft, simpo and cpo have no reference",
    )
    beta: float = arg(0.1, "strength of the tie to the reference")
    label_smoothing: float = arg(
        0.1, "share of preferences taken as wrong, below 0.5; with sigmoid: conservative DPO"
    )
    simpo_gamma: float | None = arg(
        None,
        "margin of simpo: by how much beta × the difference of log-probabilities a token has to exceed 0; "
        f"None: {Settings.simpo_gamma}",
    )
    margin_scale: float = arg(0.0, "share of a pair's margin that beta × Δ has to exceed (offset DPO)")
    margin_weight: float = arg(
        0.0, "weight of a pair: its margin to this power, scaled to a mean of 1; 0: all alike"
    )

    use_peft: bool = arg(False, "LoRA: freeze the policy, train adapters, and merge them into it at the end")
    lora_r: int = arg(16, "rank of the adapters")
    lora_alpha: int = arg(32, "the adapters count alpha / r times")
    lora_dropout: float = arg(0.0, "share of an adapter's inputs left out; needs --disable_dropout false")
    lora_target_modules: list[str] = arg(
        ["all-linear"], "ends of the names of modules with an adapter; all-linear: all but lm_head"
    )
    load_in_4bit: bool = arg(False, "QLoRA: hold the frozen policy in 4 bits (nf4, double quantisation)")

    learning_rate: float = arg(5e-7, "peak learning rate")
    lr_scheduler_type: str = arg("cosine", "schedule of the learning rate, as transformers names it")
    warmup_steps: float = arg(0.0, "optimizer steps of linear warm-up; below 1 a share of all steps")
    num_train_epochs: float = arg(2.0, "passes over the pairs")
    max_steps: int = arg(-1, "optimizer steps, in place of num_train_epochs; -1 is off")
    per_device_train_batch_size: int = arg(1, "pairs per process in one forward pass", shapes=False)
    per_device_eval_batch_size: int = arg(
        1, "pairs per process in one forward pass of the evaluation", shapes=False
    )
    global_batch_size: int = arg(
        128,
        "pairs per optimizer step over all processes; the accumulation follows. Halved where a pass over "
        f"the pairs would have fewer than {LEAST_STEPS} steps",
        shapes=False,
    )
    gradient_accumulation_steps: int | None = arg(
        None, "forward passes per step, in place of global_batch_size", shapes=False
    )
    share_prompts: bool | None = arg(
        None,
        "packed rows in which chosen and rejected share their prompt; None: where it can be",
        shapes=False,
    )
    max_row_tokens: int | None = arg(
        None,
        "tokens of a packed row; None: as many as padded pairs may take, "
        "2 × per_device_train_batch_size × max_length, and on a GPU more where they fit",
        shapes=False,
    )
    reference_cache: str | None = arg(
        None,
        "folder where the reference's log-probabilities are kept; None: reference_logps next to output_dir",
        shapes=False,
    )
    optim: str = arg("adamw_torch_fused", "optimizer as transformers names it")
    weight_decay: float = arg(0.0, "decoupled weight decay")
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm")
    bf16: bool = arg(True, "compute and save in bfloat16; the policy's own weights stay fp32")
    gradient_checkpointing: bool | None = arg(
        None,
        "recompute activations: less memory, a third more arithmetic; None: on, but on a GPU where its "
        "memory is enough without",
        shapes=False,
    )
    seed: int = arg(42, "seed of random choices, held-out prompts and the order of the pairs")

    cpu_threads: int | None = arg(
        None, "threads of a process without a GPU; None: an equal share of the cores", shapes=False
    )
    logging_steps: float = arg(1.0, "optimizer steps between log lines", shapes=False)
    eval_steps: int = arg(0, "optimizer steps between evaluations; 0 evaluates at the end only", shapes=False)
    save_steps: int = arg(0, "optimizer steps between checkpoints; 0 writes none", shapes=False)
    save_total_limit: int = arg(2, "checkpoints kept while training", shapes=False)
    keep_checkpoints: bool = arg(
        False, "keep checkpoints and optimizer states once the model is saved", shapes=False
    )
    report_to: list[str] = arg(
        ["none"], f"trackers, one or several: none, {', '.join(trackers.MODULES)}", shapes=False
    )
    project: str | None = arg(
        None,
        "project of the run at the trackers; None: as their variables say (WANDB_PROJECT, …), else "
        f"{trackers.PROJECT}",
        shapes=False,
    )
    run_name: str | None = arg(None, "name of the run at the trackers", shapes=False)

    check: bool = arg(
        False, "print how much memory each configs/*.yaml needs and which to take, and stop", shapes=False
    )
    num_gpus: int | None = arg(
        None, "with check: GPUs over all machines; None: those that are visible", shapes=False
    )
    gpu_memory_gib: float | None = arg(
        None, "with check: GiB of a GPU; None: that of the visible ones", shapes=False
    )
    model_size_b: float | None = arg(
        None, "with check: billions of parameters, where the model's config is out of reach", shapes=False
    )


OURS = [field for field in dataclasses.fields(Arguments) if field.name not in trl_arguments.NAMES]


def arguments(values: dict, where: str = "") -> Arguments:
    """Arguments from a mapping, converted and checked; whether files exist is not looked at (`check_paths`).

    Raises:
        UserError: as `parse` and `check`; `where` is the place that the message names.
    """
    args = build(Arguments, values, where)
    check(args)
    return args


def resolve(values: dict, overrides: dict | None = None, where: str = "") -> dict:
    """All of our arguments, converted, with defaults, and those of TRL's that are given.

    Args:
        values: the mapping of a training YAML.
        overrides: win over `values`.
        where: the place that an error names.

    Returns:
        {name: value}; required arguments are there only where they are given.

    Raises:
        UserError: an unknown key or a value of the wrong type; whether they go together is for `arguments`.
    """
    given = values | (overrides or {})
    if given.get("hub_token"):
        raise UserError(
            "hub_token is not taken from a run's settings, which are written and shown: export HF_TOKEN"
        )
    required = [f.name for f in OURS if f.default is f.default_factory is dataclasses.MISSING]
    args = build(Arguments, dict.fromkeys(required, "") | given, where)
    ours = [field.name for field in OURS if field.name in given or field.name not in required]
    passed_on = [name for name in trl_arguments.NAMES if getattr(args, name) is not None]
    return {name: getattr(args, name) for name in [*ours, *passed_on]}


def training_of(args: Arguments, processes: int | None = None) -> Training:
    """The training that these arguments ask for: its output folder, and what shapes the model.

    Args:
        processes: that train; None: as many as the launcher started. They matter for the batch alone.
    """
    processes = processes or world_size()
    unset = [name for name in trl_arguments.NAMES if getattr(args, name) is None]
    unused = {*unset, *unused_by_losses(args), *(() if args.use_peft else adapters.SETTINGS)}
    in_tokens = not args.length_penalty or args.length_penalty_unit == "token"
    unused |= {"length_penalty_unit"} if in_tokens else set()  # as manifests of before there were units
    settings = {key: value for key, value in shaping_values(args).items() if key not in unused}
    settings["pairs_per_step"] = pairs_per_step(args, processes)
    if reason_for_trl(args):  # which pairs share a pass changes the loss
        settings["per_device_train_batch_size"] = args.per_device_train_batch_size
    inputs = {f"train_dir {i}": name for i, name in enumerate(args.train_dir, 1)} | {
        "model_name_or_path": args.model_name_or_path,
        "ref_model_name_or_path": args.ref_model_name_or_path or args.model_name_or_path,
        "chat_template": args.chat_template,
    }
    if not needs_reference(args.loss_type):
        del inputs["ref_model_name_or_path"]
    return Training(
        args.output_dir,
        "dpo_iteration/run_dpo.py",
        settings,
        inputs,
        args.overwrite,
        checkpoint_settings={"num_processes": processes},
    )


def unused_by_losses(args: Arguments) -> list[str]:
    """Names of settings that the losses do not look at."""
    others = [] if needs_rejected(args.loss_type) else ["beta", "label_smoothing"]
    return others + ([] if "simpo" in args.loss_type else ["simpo_gamma"])


def unit(args: Arguments) -> str:
    """What is trained on, in a word: pairs of responses, or one response of a prompt."""
    return "pair" if needs_rejected(args.loss_type) else "response"


def reason_for_trl(args: Arguments) -> str:
    """Why the loss is TRL's own computation, padded, and not that of losses.py; empty where it is not."""
    others = [name for name in args.loss_type if LOSSES[name].compute is None]
    if others:
        return f"the loss {others[0]} depends on which pairs share a pass"
    plain = {
        "ld_alpha": None,
        "use_weighting": False,
        "f_divergence_type": "reverse_kl",
        "router_aux_loss_coef": 0,
    }
    changed = [key for key, value in plain.items() if getattr(args, key) not in (value, None)]
    return f"{changed[0]} is TRL's own" if changed else ""


# Batches


def pairs_per_step(args: Arguments, processes: int) -> int:
    """Pairs that one optimizer step sees over all processes."""
    if args.gradient_accumulation_steps is None:
        return args.global_batch_size
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes


def halved(per_step: int, pairs: int, args: Arguments, processes: int) -> int:
    """Pairs per optimizer step for so many training pairs: `per_step`, halved until a pass over them has
    LEAST_STEPS steps.

    What does not divide by the pairs of one forward pass on all processes is not halved, nor is an
    accumulation that was given.
    """
    unit = 2 * args.per_device_train_batch_size * processes
    while (
        args.gradient_accumulation_steps is None and pairs < LEAST_STEPS * per_step and per_step % unit == 0
    ):
        per_step //= 2
    return per_step


def accumulation(args: Arguments, per_step: int, processes: int) -> int:
    """Forward passes of each process in an optimizer step of `per_step` pairs, padded.

    Raises:
        UserError: the pairs do not divide by what the processes take at once.
    """
    if args.gradient_accumulation_steps is not None:
        return args.gradient_accumulation_steps
    at_once = args.per_device_train_batch_size * processes
    if per_step % at_once:
        raise UserError(
            f"--global_batch_size {per_step} does not divide by {count(processes, 'process')} × "
            f"--per_device_train_batch_size {args.per_device_train_batch_size}; change one of them"
        )
    return per_step // at_once


# What cannot work


def check(args: Arguments):
    """Refuse what cannot work before torch is imported."""
    for key, why in REFUSED.items():
        if getattr(args, key):
            raise UserError(f"--{key} is not taken here: {why}")
    if args.precompute_ref_log_probs is False:
        raise UserError(
            "--precompute_ref_log_probs false: the reference is always computed before training, and kept "
            "(--reference_cache)"
        )
    if args.truncation_mode not in (None, "keep_start"):
        raise UserError("--truncation_mode: prompts are cut on the left, responses on the right")
    for key, instead in OF_LOADING.items():
        if key in (args.model_init_kwargs or {}):
            raise UserError(f"model_init_kwargs must not set {key}: {instead}")
    check_loss(args)
    check_batches(args)
    check_numbers(args)
    check_finite(args)
    adapters.check(args)
    trackers.check(args.report_to)
    from_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none"
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" and not from_file:
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false").lower() != "true":
            raise UserError("ZeRO-3 would leave no loadable model: set zero3_save_16bit_model: true")


def check_loss(args: Arguments):
    """Refuse losses that are not known, and a smoothing or offset that would have no effect or no meaning.

    Training without rejected responses takes no notice of label smoothing, which the recipe has.
    """
    names = " ".join(args.loss_type)
    unknown = [name for name in args.loss_type if name not in LOSSES]
    if "kto" in unknown:
        raise UserError(
            "--loss_type kto is not there: its KL term wants answers to other prompts, which pairs do not "
            "have; apo_zero is the same without that term"
        )
    if unknown or not args.loss_type:
        raise UserError(f"--loss_type {' '.join(unknown)}: there are {', '.join(sorted(LOSSES))}")
    if args.loss_weights is not None and len(args.loss_weights) != len(args.loss_type):
        raise UserError(
            f"--loss_weights {' '.join(map(str, args.loss_weights))}: a number for each of --loss_type "
            f"{names} was expected"
        )
    if not 0 <= args.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing {args.label_smoothing} must be from 0 to below 0.5")
    smoothed = [name for name in args.loss_type if LOSSES[name].smoothed]
    if args.label_smoothing and not smoothed and needs_rejected(args.loss_type):
        raise UserError(f"--loss_type {names} has no label smoothing: give --label_smoothing 0")
    if args.label_smoothing and "sigmoid" in smoothed and len(smoothed) > 1:
        raise UserError(
            f"--label_smoothing cannot be shared by {' and '.join(smoothed)}; give --label_smoothing 0"
        )
    if args.margin_scale and not all(LOSSES[name].offset for name in args.loss_type):
        offset = [name for name in sorted(LOSSES) if LOSSES[name].offset]
        raise UserError(f"--margin_scale is defined for {', '.join(offset)}, not for {names}")


def check_batches(args: Arguments):
    """Refuse what does not go with TRL's padded computation, or with packed rows."""
    padded = reason_for_trl(args)
    if padded:
        refuse_padded(args, padded)
    if not padded and args.train_sampling_strategy not in (None, "random"):
        raise UserError(
            "--train_sampling_strategy: an epoch's pairs are taken in random order, then laid into rows of "
            "like size"
        )
    sorting = {"aot", "aot_unpaired"} & set(args.loss_type)
    if sorting and args.per_device_train_batch_size == 1:
        raise UserError(
            f"--loss_type {sorting.pop()} compares the pairs of a pass: with --per_device_train_batch_size 1 "
            "it is sigmoid; give more"
        )


def refuse_padded(args: Arguments, reason: str):
    """Refuse what TRL's own padded computation, which there is a reason for, cannot do."""
    if args.share_prompts:
        raise UserError(f"--share_prompts true cannot be: {reason}; leave it out")
    if args.margin_scale or args.margin_weight or args.train_weights:
        names = "--margin_scale, --margin_weight and --train_weights"
        raise UserError(f"{names} cannot be used where {reason}")
    ours = [name for name in args.loss_type if not LOSSES[name].trl]
    if ours or not needs_rejected(args.loss_type):
        raise UserError(f"--loss_type {(ours or args.loss_type)[0]} cannot be used where {reason}")


def check_finite(args: Arguments):
    """Refuse NaN and infinity, which would end as a loss of NaN."""
    for key, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        endless = key != "max_grad_norm" and inf in values  # that is no clipping
        if endless or any(isinstance(one, float) and isnan(one) for one in values):
            raise UserError(f"--{key} {' '.join(map(str, values))}: a finite number was expected")


def check_numbers(args: Arguments):
    """Refuse numbers outside their range, and settings that the others leave without effect."""
    for key in ABOVE_0.split():
        if getattr(args, key) is not None and not getattr(args, key) > 0:
            raise UserError(f"--{key} {getattr(args, key)} must be above 0")
    for key in NOT_NEGATIVE.split():
        if not getattr(args, key) >= 0:
            raise UserError(f"--{key} {getattr(args, key)} must not be negative")
    weights = args.train_weights
    if weights is not None and not (
        len(weights) == len(args.train_dir) and all(0 < w < inf for w in weights)
    ):
        raise UserError(
            f"--train_weights {' '.join(map(str, weights))}: a number above 0 for each of --train_dir was "
            f"expected, which names {len(args.train_dir)}"
        )
    if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs > 0):
        raise UserError("nothing to train: --num_train_epochs must be above 0, or --max_steps")
    if not 0 <= args.eval_fraction < 1:
        raise UserError(f"--eval_fraction {args.eval_fraction} must be from 0 to below 1")
    if not 0 < args.max_prompt_length < args.max_length:
        limit = f"--max_length {args.max_length}"
        raise UserError(f"--max_prompt_length {args.max_prompt_length} must be above 0 and below {limit}")
    choice = CHOOSE_TYPES[args.choose_type]
    by_margin = [key for key in ("min_margin", "margin_scale", "margin_weight") if getattr(args, key)]
    if choice.blind and by_margin:
        raise UserError(
            f"--{by_margin[0]} means nothing with --choose_type {args.choose_type}, which looks at no reward"
        )
    if not needs_rejected(args.loss_type) and not (choice.blind or choice.best):
        raise UserError(
            f"--choose_type {args.choose_type} chooses two responses, and --loss_type {args.loss_type[0]} "
            "trains on one: give max_min, the best, or blind, a random one"
        )
    if args.length_penalty and not CHOOSE_TYPES[args.choose_type].penalised:
        only = " and ".join(name for name, choice in CHOOSE_TYPES.items() if choice.penalised)
        raise UserError(f"--length_penalty is used by --choose_type {only} only, not by {args.choose_type}")


def pairs_path(args: Arguments) -> Path:
    return Path(args.pairs_path) if args.pairs_path else beside(args.output_dir, ".pairs.jsonl")


def check_paths(args: Arguments):
    """Refuse files that are not there, folders that hold no model, and an output that is an input."""
    if not args.train_dir:
        raise UserError("--train_dir names no file")
    for name in args.train_dir:
        if is_local(name) and not Path(split_config(name)[0]).is_dir():
            existing_file(name, "file of rewarded answers or preferences (--train_dir)")
    pairs = pairs_path(args)
    if pairs.resolve() in [Path(name).resolve() for name in args.train_dir]:
        raise UserError(f"--pairs_path {pairs} is to be read and written at once; give another")
    args.check_template()
    for key in ("model_name_or_path", "ref_model_name_or_path")[: 1 + needs_reference(args.loss_type)]:
        name = getattr(args, key)
        if name is None:
            continue
        check_policy(name, f"--{key}")
        if Path(name).resolve() == Path(args.output_dir).resolve():
            raise UserError(f"--output_dir {args.output_dir} is --{key} itself; choose another")
