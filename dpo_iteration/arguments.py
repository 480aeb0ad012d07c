"""Arguments of run_dpo.py: what there is, and what shapes the model (checks.py: what cannot work).

Nothing heavy is imported here.
"""

import dataclasses
from pathlib import Path

from common import trackers
from common.chat import TemplateArguments
from common.cli import UserError, arg, build, count, shaping_values
from common.manifest import beside
from common.training import Training, world_size
from dpo_iteration import adapters, trl_arguments
from dpo_iteration.losses import LOSSES, Settings, needs_reference, needs_rejected
from dpo_iteration.pairs import CHOOSE_TYPES, LENGTH_UNITS
from dpo_iteration.trl_arguments import TRLArguments

LEAST_STEPS = 4  # a pass over the pairs has at least so many optimizer steps, where the batch can be halved


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
    desirable_weight: float = arg(Settings.desirable_weight, "weight of chosen responses in kto")
    undesirable_weight: float = arg(Settings.undesirable_weight, "weight of rejected responses in kto")
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
    others += [] if "simpo" in args.loss_type else ["simpo_gamma"]
    return others + ([] if "kto" in args.loss_type else ["desirable_weight", "undesirable_weight"])


def unit(args: Arguments) -> str:
    """What is trained on, in a word: pairs of responses, or one response of a prompt."""
    return "pair" if needs_rejected(args.loss_type) else "response"


def pairs_path(args: Arguments) -> Path:
    return Path(args.pairs_path) if args.pairs_path else beside(args.output_dir, ".pairs.jsonl")


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
