"""What run_dpo.py refuses before torch is imported, each with what to do instead."""

import os
from math import inf, isnan
from pathlib import Path

from common import trackers
from common.cli import UserError, build, existing_file
from common.manifest import beside
from common.models import check_policy
from common.records import is_local
from common.tables import split_config
from dpo_iteration import adapters
from dpo_iteration.arguments import Arguments, pairs_path, reason_for_trl
from dpo_iteration.losses import LOSSES, Settings, needs_reference, needs_rejected
from dpo_iteration.pairs import CHOOSE_TYPES

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
    gradient_accumulation_steps global_batch_size max_row_tokens pairs_per_prompt desirable_weight
    undesirable_weight
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


def arguments(values: dict, where: str = "") -> Arguments:
    """Arguments from a mapping, converted and checked; whether files exist is not looked at (`check_paths`).

    Raises:
        UserError: as `parse` and `check`; `where` is the place that the message names.
    """
    args = build(Arguments, values, where)
    check(args)
    return args


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
    for key in ("desirable_weight", "undesirable_weight"):
        if "kto" not in args.loss_type and getattr(args, key) != getattr(Settings, key):
            raise UserError(f"--{key} is used by --loss_type kto only, not by {names}")


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
    for name in args.train_dir:
        manifests = {beside(path, ".manifest.json").resolve() for path in (name, args.output_dir)}
        if len(manifests) == 1:
            raise UserError(
                f"--output_dir {args.output_dir} would write the manifest of {name}: give another name"
            )
    args.check_template()
    for key in ("model_name_or_path", "ref_model_name_or_path")[: 1 + needs_reference(args.loss_type)]:
        name = getattr(args, key)
        if name is None:
            continue
        check_policy(name, f"--{key}")
        if Path(name).resolve() == Path(args.output_dir).resolve():
            raise UserError(f"--output_dir {args.output_dir} is --{key} itself; choose another")
