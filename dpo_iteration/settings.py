"""Settings of a DPO run: what cannot work is refused here before torch is imported, the rest becomes TRL's
DPOConfig.

Fields of DPOConfig that our own arguments do not name are taken too. Their names and types are read from the
source, since importing TRL takes seconds and a misspelt key is to be refused at once.
"""

import argparse
import ast
import dataclasses
import functools
import importlib.util
import os
from pathlib import Path

import yaml

from common import trackers
from common.cli import UserError, arg, existing_file
from common.manifest import beside
from common.models import check_policy
from dpo_iteration import adapters

# Each class with the file that defines it; a later one's fields stand in place of an earlier one's.
SOURCES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/dpo_config.py", "DPOConfig"),
)
SIMPLE = {"int": int, "float": float, "bool": bool}
SMOOTHED = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}  # losses that have a label smoothing
OF_DIFFERENCE = {
    "sigmoid",
    "hinge",
    "robust",
    "exo_pair",
    "discopop",
}  # of the difference of log-ratios alone
PAIRWISE = OF_DIFFERENCE | {
    "ipo",
    "sigmoid_norm",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
}  # in losses.py
LOSSES = PAIRWISE | {
    "aot",
    "aot_unpaired",
    "sft",
}  # the others depend on which pairs share a pass: TRL's own computation
REFUSED = {  # settings of DPOConfig that this script decides itself, or that cannot work
    "deepspeed": "give a configuration to `accelerate launch --config_file configs/zero2.yaml` instead",
    "fp16": "choose bf16 true or false",
    "bf16_full_eval": "it would turn the fp32 weights into bf16",
    "fp16_full_eval": "it would turn the fp32 weights into fp16",
    "padding_free": "TRL 1.16 ignores it; packed rows have no padding, see --share_prompts",
    "sync_ref_model": "the reference's log-probabilities are computed once, before training",
    "precompute_ref_batch_size": "the reference is computed in batches of --max_row_tokens",
    "save_only_model": "a run could not continue from checkpoints without optimizer states",
    "dataloader_drop_last": "an epoch's last step takes the pairs that are left",
    "resume_from_checkpoint": "a killed run continues by itself; --overwrite starts anew",
}
QUIET = {  # settings of DPOConfig that shape no weight: a run may go on with others
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "ddp_timeout",
    "disable_tqdm",
    "include_num_input_tokens_seen",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_first_step",
    "logging_strategy",
    "torch_empty_cache_steps",
    "trackio_space_id",
    "use_cache",
}
OF_LOADING = {  # what model_init_kwargs must leave to settings of ours
    "dtype": "bf16 weights alone do not move; see --bf16",
    "torch_dtype": "bf16 weights alone do not move; see --bf16",
    "quantization_config": "give --use_peft true --load_in_4bit true",
    "attn_implementation": "give --attn_implementation",
    "revision": "give --revision",
    "trust_remote_code": "give --trust_remote_code",
    "output_loading_info": "what a checkpoint lacks is looked at already",
}


@functools.cache
def config_fields():
    """Name → set of type names of every DPOConfig field, in the source's order.

    Raises:
        UserError: TRL or transformers is not installed.
    """
    fields = {}
    for package, file, name in SOURCES:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise UserError(
                f"{package} is not installed here: run this in the environment of requirements-train.txt"
            )
        tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
        [definition] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
        for node in definition.body:
            if isinstance(node, ast.AnnAssign):
                fields[node.target.id] = {
                    t.strip().split("[")[0] for t in ast.unparse(node.annotation).split("|")
                }
    return fields


def _hint(types):
    """The type under which a value is read; where several fit, it is read as text and looked at in
    `given`.
    """
    types = types - {"None"}
    if "dict" in types:
        return dict | None
    if types == {"list"}:
        return list[str] | None
    return SIMPLE.get(*types, str) | None if len(types) == 1 else str | None


def with_passthrough(arguments):
    """The dataclass `arguments` with all other DPOConfig fields, hidden in `--help`; unset ones are None."""
    own = {f.name for f in dataclasses.fields(arguments)}
    others = {name: types for name, types in config_fields().items() if name not in own}
    more = [(name, _hint(types), arg(None, argparse.SUPPRESS)) for name, types in others.items()]
    return dataclasses.make_dataclass("Arguments", more, bases=(arguments,), kw_only=True)


def given(args, arguments):
    """The passed-through settings that were given: name → value.

    Text of a mixed type ("auto" or 8) is read as YAML.
    """
    own, types, values = {f.name for f in dataclasses.fields(arguments)}, config_fields(), {}
    for name in (f.name for f in dataclasses.fields(args) if f.name not in own):
        value = getattr(args, name)
        if isinstance(value, list):
            value = [yaml.safe_load(entry) for entry in value]
        elif isinstance(value, str) and len(types[name] - {"None"}) > 1:
            value = yaml.safe_load(value)
        if value is not None:
            values[name] = value
    return values


def reason_for_trl(args, extra):
    """Why the loss is TRL's own computation, padded, and not that of losses.py; empty where it is not."""
    others = [name for name in args.loss_type if name not in PAIRWISE]
    if others:
        return f"the loss {others[0]} depends on which pairs share a pass"
    for key, plain in (
        ("ld_alpha", None),
        ("use_weighting", False),
        ("f_divergence_type", "reverse_kl"),
        ("router_aux_loss_coef", 0),
    ):
        if extra.get(key, plain) not in (plain, None):
            return f"{key} is TRL's own"
    return ""


def check(args, extra):
    """Refuse what cannot work before torch is imported. `extra`: settings that are passed on to TRL."""
    for key, why in REFUSED.items():
        if extra.get(key):
            raise UserError(f"--{key} is not taken here: {why}")
    if extra.get("precompute_ref_log_probs") is False:
        raise UserError(
            "--precompute_ref_log_probs false: the reference is always computed before training, and kept "
            "(--reference_cache)"
        )
    padded = reason_for_trl(args, extra)
    if padded and args.share_prompts:
        raise UserError(f"--share_prompts true cannot be: {padded}; leave it out")
    if not padded and extra.get("train_sampling_strategy", "random") != "random":
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
    if args.margin_scale and not set(args.loss_type) <= OF_DIFFERENCE:
        raise UserError(
            f"--margin_scale is defined for {', '.join(sorted(OF_DIFFERENCE))}, not for "
            f"{' '.join(args.loss_type)}"
        )
    if padded and (args.margin_scale or args.margin_weight):
        raise UserError(f"--margin_scale and --margin_weight cannot be used where {padded}")
    if extra.get("truncation_mode", "keep_start") != "keep_start":
        raise UserError("--truncation_mode: prompts are cut on the left, responses on the right")
    for key, instead in OF_LOADING.items():
        if key in (extra.get("model_init_kwargs") or {}):
            raise UserError(f"model_init_kwargs must not set {key}: {instead}")
    check_loss(args)
    check_numbers(args)
    adapters.check(args, extra)
    trackers.check(args.report_to)
    from_file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none"
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" and not from_file:
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false").lower() != "true":
            raise UserError("ZeRO-3 would leave no loadable model: set zero3_save_16bit_model: true")


def check_paths(args):
    """Refuse files that are not there, folders that hold no model, and an output that is an input."""
    if not args.train_dir:
        raise UserError("--train_dir names no file")
    for name in args.train_dir:
        existing_file(name, "rewarded file (--train_dir)")
    pairs = Path(args.pairs_path) if args.pairs_path else beside(args.output_dir, ".pairs.jsonl")
    if pairs.resolve() in [Path(name).resolve() for name in args.train_dir]:
        raise UserError(f"--pairs_path {pairs} is to be read and written at once; give another")
    if args.chat_template:
        existing_file(args.chat_template, "chat template")
    for key in ("model_name_or_path", "ref_model_name_or_path"):
        name = getattr(args, key)
        if name is None:
            continue
        check_policy(name, f"--{key}")
        if Path(name).resolve() == Path(args.output_dir).resolve():
            raise UserError(f"--output_dir {args.output_dir} is --{key} itself; choose another")


def check_loss(args):
    """Refuse losses that TRL does not know, and a label smoothing that would have no effect or no meaning."""
    unknown = [name for name in args.loss_type if name not in LOSSES]
    if unknown or not args.loss_type:
        raise UserError(f"--loss_type {' '.join(unknown)}: TRL has {', '.join(sorted(LOSSES))}")
    smoothed = [name for name in args.loss_type if name in SMOOTHED]
    if not 0 <= args.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing {args.label_smoothing} must be from 0 to below 0.5")
    if args.label_smoothing and not smoothed:
        raise UserError(
            f"--loss_type {' '.join(args.loss_type)} has no label smoothing: give --label_smoothing 0"
        )
    if args.label_smoothing and "sigmoid" in smoothed and len(smoothed) > 1:
        raise UserError(
            f"--label_smoothing cannot be shared by {' and '.join(smoothed)}; give --label_smoothing 0"
        )


def check_numbers(args):
    """Refuse numbers outside their range, and settings that the others leave without effect."""
    sizes = (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "global_batch_size",
        "max_row_tokens",
        "pairs_per_prompt",
    )
    for key in ("beta", "learning_rate", "logging_steps", *sizes):
        if getattr(args, key) is not None and not getattr(args, key) > 0:
            raise UserError(f"--{key} {getattr(args, key)} must be above 0")
    steps = ("eval_steps", "save_steps", "warmup_steps")
    for key in (
        "weight_decay",
        "max_grad_norm",
        "length_penalty",
        "min_margin",
        "margin_scale",
        "margin_weight",
        *steps,
    ):
        if not getattr(args, key) >= 0:
            raise UserError(f"--{key} {getattr(args, key)} must not be negative")
    if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs > 0):
        raise UserError("nothing to train: --num_train_epochs must be above 0, or --max_steps")
    if not 0 <= args.eval_fraction < 1:
        raise UserError(f"--eval_fraction {args.eval_fraction} must be from 0 to below 1")
    if not 0 < args.max_prompt_length < args.max_length:
        limit = f"--max_length {args.max_length}"
        raise UserError(f"--max_prompt_length {args.max_prompt_length} must be above 0 and below {limit}")
    if args.length_penalty and args.choose_type != "max_min_p":
        raise UserError(
            f"--length_penalty is used by --choose_type max_min_p only, not by {args.choose_type}"
        )


def training_config(args, extra, arguments, has_eval):
    """TRL's DPOConfig: those of our own arguments that bear its names, what we decide, then `extra`."""
    # A mixed precision of the launcher's configuration would win over bf16 of ours.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if args.bf16 else "no"
    import torch
    from trl import DPOConfig

    shared = {f.name for f in dataclasses.fields(arguments)} & {f.name for f in dataclasses.fields(DPOConfig)}
    values = {name: getattr(args, name) for name in shared} | {
        "eval_strategy": "steps" if has_eval and args.eval_steps else "no",
        "eval_steps": args.eval_steps or None,
        "save_strategy": "steps" if args.save_steps else "no",
        "save_steps": args.save_steps or 500,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "precompute_ref_log_probs": True,
        "report_to": trackers.chosen(args.report_to) or "none",
        "project": trackers.name_project(args.report_to, args.project),
    }
    try:
        return DPOConfig(**values | extra)
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"TRL refuses the settings: {' '.join(str(error).split())[:400]}") from None
