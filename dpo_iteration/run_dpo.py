"""Train a policy by DPO on pairs chosen from rewarded answers.

In:  rewarded records at `train_dir` (one file or several, as annotate_data/get_rewards.py writes them) and a policy.
Out: model, tokenizer, chat template, generation config and model card in the folder `output_dir`; beside it
the pairs
     that were chosen (`.pairs.jsonl`), the prompts left out (`.pairs.skipped.jsonl`), and last a manifest
     (`.manifest.json`).

    accelerate launch --config_file ./configs/zero2.yaml dpo_iteration/run_dpo.py ./configs/training.yaml

Any other setting of TRL's DPOConfig may stand in the YAML or on the command line too. With `--save_steps N` a
killed run continues from its last checkpoint when the same command is started again. `--check true` tells the
memory it needs.
"""

import dataclasses
import functools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common import trackers
from common.cli import UserError, arg, build, count, parse, run
from common.devices import check_processes, check_torch, gpu_memory, prepare_threads, visible_gpus
from common.progress import Progress
from common.training import Training, is_main, say, step_of, world_size
from dpo_iteration import adapters, hub, memory
from dpo_iteration.output import begin, finish
from dpo_iteration.pairs import CHOOSE_TYPES, select_pairs
from dpo_iteration.saved import check_saved
from dpo_iteration.settings import (
    QUIET,
    check,
    check_paths,
    given,
    reason_for_trl,
    training_config,
    with_passthrough,
)

# Settings that do not shape the model: where it goes, what is shown, and what the inputs' fingerprints cover.
NOT_SHAPING = {
    "train_dir",
    "output_dir",
    "pairs_path",
    "model_name_or_path",
    "ref_model_name_or_path",
    "trust_remote_code",
    "overwrite",
    "report_to",
    "project",
    "run_name",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "keep_checkpoints",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "cpu_threads",
    "share_prompts",
    "max_row_tokens",
    "reference_cache",
    "check",
    "num_gpus",
    "gpu_memory_gib",
    "model_size_b",
}
LEAST_STEPS = 4  # optimizer steps that a pass over the pairs has at least, as far as the batch can be halved
# Settings that came later: left out of the manifest where they change nothing, so that older models stay
# complete.
LATER = {"pairs_per_prompt": 1, "margin_scale": 0.0, "margin_weight": 0.0, "use_peft": False}


@dataclasses.dataclass(kw_only=True)
class Arguments:
    model_name_or_path: str = arg(help="policy to start from: hub name or folder")
    ref_model_name_or_path: str | None = arg(
        None, "reference: hub name or folder; None is the policy's start"
    )
    revision: str | None = arg(None, "branch, tag or commit of the policy on the hub")
    trust_remote_code: bool = arg(False, "run Python code that comes with the model")
    attn_implementation: str | None = arg(
        None, "None: flash_attention_2 where flash-attn and a GPU are, else sdpa"
    )
    chat_template: str | None = arg(None, "file with a jinja chat template to use instead of the tokenizer's")
    template_kwargs: dict = arg({}, "arguments of the template, JSON: '{\"enable_thinking\": false}'")

    train_dir: list[str] = arg(
        help="rewarded records, JSON Lines: one file or several (past iterations)", metavar="FILE"
    )
    output_dir: str = arg(help="folder of the trained model")
    pairs_path: str | None = arg(None, "where the chosen pairs are written; None is OUTPUT_DIR.pairs.jsonl")
    overwrite: bool = arg(False, "start anew where an output exists or is half done")

    choose_type: str = arg(
        "max_min",
        "which two responses: best and worst, best and second, best and random, two "
        "random, best and worst by reward less length_penalty",
        choices=CHOOSE_TYPES,
    )
    length_penalty: float = arg(0.0, "reward per token taken off by choose_type max_min_p")
    pairs_per_prompt: int = arg(1, "at most so many pairs of a prompt, each response in one of them at most")
    min_margin: float = arg(0.0, "reward; pairs closer than this are left out")
    drop_truncated: bool = arg(False, "leave out responses that ended at the generation's length limit")
    drop_empty: bool = arg(
        False, "leave out responses without text; else they may be rejected, but never chosen"
    )
    eval_fraction: float = arg(0.0, "share of the prompts held out for evaluation, from 0 to below 1")
    max_length: int = arg(2048, "tokens of prompt and response; longer responses are cut on the right")
    max_prompt_length: int = arg(1024, "tokens of the prompt; longer prompts are cut on the left")

    loss_type: list[str] = arg(["sigmoid"], "DPO loss as TRL names it, or several (with loss_weights)")
    beta: float = arg(0.1, "strength of the tie to the reference")
    label_smoothing: float = arg(
        0.1, "share of preferences taken as wrong, below 0.5; with sigmoid: conservative DPO"
    )
    margin_scale: float = arg(0.0, "share of a pair's margin that beta × Δ has to exceed (offset DPO)")
    margin_weight: float = arg(0.0, "pairs count by margin to this power, in the mean 1; 0: all alike")

    use_peft: bool = arg(False, "LoRA: train adapters, the policy frozen; they are merged into it at the end")
    lora_r: int = arg(16, "rank of the adapters")
    lora_alpha: int = arg(32, "the adapters count alpha / r times")
    lora_dropout: float = arg(0.0, "share of an adapter's inputs left out; needs --disable_dropout false")
    lora_target_modules: list[str] = arg(
        ["all-linear"], "ends of the names of modules with an adapter; all-linear: all but lm_head"
    )
    load_in_4bit: bool = arg(False, "QLoRA: hold the frozen policy in 4 bits (nf4, double quantisation)")

    learning_rate: float = arg(5e-7, "peak learning rate")
    lr_scheduler_type: str = arg("cosine", "course of the learning rate")
    warmup_steps: float = arg(0.0, "optimizer steps of linear warm-up; below 1 a share of all steps")
    num_train_epochs: float = arg(2.0, "passes over the pairs")
    max_steps: int = arg(-1, "optimizer steps, in place of num_train_epochs; -1 is off")
    per_device_train_batch_size: int = arg(1, "pairs per process in one forward pass")
    per_device_eval_batch_size: int = arg(1, "pairs per process in one forward pass of the evaluation")
    global_batch_size: int = arg(
        128,
        "pairs per optimizer step over all processes; the accumulation follows. Halved where a pass over "
        f"the pairs would have fewer than {LEAST_STEPS} steps",
    )
    gradient_accumulation_steps: int | None = arg(
        None, "forward passes per step, in place of global_batch_size"
    )
    share_prompts: bool | None = arg(
        None, "packed rows in which chosen and rejected share their prompt; None: where it can be"
    )
    max_row_tokens: int | None = arg(None, "tokens of a packed row; None: as many as padded pairs may take, "
                                     "2 × per_device_train_batch_size × max_length")  # fmt: skip
    reference_cache: str | None = arg(None, "folder where the reference's log-probabilities are kept; None: "
                                      "reference_logps beside output_dir")  # fmt: skip
    optim: str = arg("adamw_torch", "optimizer as transformers names it")
    weight_decay: float = arg(0.0, "decoupled weight decay")
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm")
    bf16: bool = arg(
        True, "compute in bfloat16 and save in it; the policy's own weights are fp32 all the while"
    )
    gradient_checkpointing: bool = arg(True, "recompute activations: less memory, about a fifth slower")
    seed: int = arg(42, "seed of random choices, held-out prompts and the order of the pairs")

    cpu_threads: int | None = arg(None, "threads of a process without a GPU; None: the cores shared out")
    logging_steps: float = arg(1.0, "optimizer steps between log lines")
    eval_steps: int = arg(0, "optimizer steps between evaluations; 0 evaluates at the end only")
    save_steps: int = arg(0, "optimizer steps between checkpoints; 0 writes none")
    save_total_limit: int = arg(2, "checkpoints kept while training")
    keep_checkpoints: bool = arg(False, "keep checkpoints and optimizer states once the model is saved")
    report_to: list[str] = arg(["none"], f"trackers, one or several: none, {', '.join(trackers.MODULES)}")
    project: str | None = arg(
        None,
        "project of the run at the trackers; None: as their variables say (WANDB_PROJECT, …), else "
        f"{trackers.PROJECT}",
    )
    run_name: str | None = arg(None, "name of the run at the trackers")

    check: bool = arg(False, "print how much memory each configs/*.yaml needs and which to take, and stop")
    num_gpus: int | None = arg(None, "with check: GPUs over all machines; None: those that are visible")
    gpu_memory_gib: float | None = arg(None, "with check: GiB of a GPU; None: that of the visible ones")
    model_size_b: float | None = arg(
        None, "with check: billions of parameters, where the model's config is out of reach"
    )


def known_arguments():
    """`Arguments` with the settings of TRL that are passed on."""
    return with_passthrough(Arguments)


def tokenize(selection, tokenizer, args):
    """Rows of token ids of the train and eval pairs; pairs that teach nothing move to `selection.skipped`."""
    from dpo_iteration.rows import PairTokenizer

    to_row = PairTokenizer(tokenizer, args.max_length, args.max_prompt_length, args.template_kwargs)
    rows, kept = {"train": [], "eval": []}, []
    progress = Progress(len(selection.pairs), "tokenize", "pairs", enabled=is_main())
    for pair in selection.pairs:
        row, reason = to_row(pair)
        if row is None:
            selection.skip(pair, reason)
        else:
            rows[pair["split"]].append(row | {"margin": float(pair["margin"])})
            kept.append(pair)
        progress.update()
    progress.close()
    selection.pairs = kept
    selection.counts |= {"train_pairs": len(rows["train"]), "eval_pairs": len(rows["eval"]), **to_row.counts}
    return rows


def check_pairs(selection, args):
    """Refuse too few pairs; every rank calls it alike, so that none waits for another."""
    world = world_size()
    reasons = ", ".join(f"{n} {reason}" for reason, n in selection.skipped_by_reason.items())
    read = f"{selection.counts['records']} records" + (f"; skipped: {reasons}" if reasons else "")
    if not selection.pairs:
        raise UserError(f"no pairs in {' '.join(args.train_dir)} ({read})")
    training = sum(pair["split"] == "train" for pair in selection.pairs)
    if not training:
        raise UserError(
            f"all {len(selection.pairs)} pairs are held out: lower --eval_fraction {args.eval_fraction}"
        )
    if training < world:
        raise UserError(
            f"{count(training, 'training pair')} for {count(world, 'process')} ({read}): give "
            f"--num_processes {training}"
        )
    if args.eval_fraction and training == len(selection.pairs):
        say(
            f"note: no pair is held out by --eval_fraction {args.eval_fraction}, so there will be no "
            "evaluation"
        )


def train(args, extra, selection, output, started):
    """Tokenise, compute the reference, load, train, evaluate, save: what needs torch."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL sends a ping from every start
    check_torch()
    import torch

    from dpo_iteration import models

    if not torch.cuda.is_available():
        say("note: no GPU found, training on the CPU")
        models.prepare_cpu(args.cpu_threads)
    from accelerate import PartialState
    from transformers.utils import logging as transformers_logging

    from dpo_iteration import packing
    from dpo_iteration.rows import check_bos

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    tokenizer = models.load_tokenizer(args)
    rows = tokenize(selection, tokenizer, args)
    check_pairs(selection, args)
    check_bos(tokenizer, rows["train"][0])
    models.check_models(args, tokenizer, rows)

    per_step = halved(output.settings["pairs_per_step"], len(rows["train"]), args, world_size())
    if per_step < output.settings["pairs_per_step"]:
        say(
            f"note: {len(rows['train'])} pairs are few for steps of {output.settings['pairs_per_step']}: {per_step} "
            "pairs per optimizer step"
        )
        args.global_batch_size = per_step
    sharing, steps = packing.batches(args, extra, rows, per_step)
    if steps["train"]:
        args.gradient_accumulation_steps = steps["train"].accumulation
    else:
        accumulate(args, world_size())
    hub.take_token(extra)
    config = training_config(args, extra, Arguments, bool(rows["eval"]))
    models.prepare_sharding(config)
    PartialState().wait_for_everyone()  # every rank has looked at what is there; now rank 0 may write
    with output.locked():
        if is_main():
            begin(output, args, selection)
            hub.reach(config)
        PartialState().wait_for_everyone()
        _train(args, extra, selection, output, started, config, rows, sharing, tokenizer, steps, per_step)


def _train(args, extra, selection, output, started, config, rows, sharing, tokenizer, steps, per_step):
    """Compute the reference, load, train, evaluate, save; the output is locked."""
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import PrinterCallback

    from dpo_iteration import models, reference
    from dpo_iteration.dpo import IterativeDPOTrainer, PlainLog
    from dpo_iteration.rows import show_pair

    reference.compute_reference(args, extra, config, rows, sharing, tokenizer)
    computed = time.time()
    policy = models.load_model(args.model_name_or_path, args, config, args.revision)
    source = models.Source.of(policy, tokenizer, args)
    log = PlainLog(per_step)
    data = {split: Dataset.from_list(ids) if ids else None for split, ids in rows.items()}
    try:
        trainer = IterativeDPOTrainer(
            model=policy,
            args=config,
            processing_class=tokenizer,
            train_dataset=data["train"],
            eval_dataset=data["eval"],
            callbacks=[log],
            peft_config=adapters.lora_config(args),
            rows=rows,
            steps=steps["train"],
            eval_steps=steps["eval"],
            sharing=sharing,
            margin_scale=args.margin_scale,
        )
    except (ValueError, NotImplementedError, ImportError) as error:
        raise UserError(f"TRL refuses the settings: {' '.join(str(error).split())[:400]}") from None
    trainer.remove_callback(PrinterCallback)
    adapters.keep_fp32(trainer)
    models.check_master_weights(trainer)
    say(show_pair(tokenizer, rows["train"][0]))
    say(
        f"training on {len(rows['train'])} pairs, {len(rows['eval'])} held out, {per_step} pairs per "
        "optimizer step"
    )
    if per_step > len(rows["train"]):
        say(
            "note: fewer pairs than an optimizer step takes, so a step is an epoch: lower --global_batch_size"
        )

    saved = output.checkpoints()
    if saved:
        say(f"continuing from {saved[-1]}")
    ready = time.time()
    try:
        metrics = trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None).metrics
    except Exception as error:
        if isinstance(error, UserError) or not saved or log.stepped:
            raise
        damage = (
            f"cannot continue from {saved[-1]}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )
        raise UserError(f"{damage}; delete that folder to continue from the one before it") from error
    # The Trainer counts passes as if each had per_device_train_batch_size pairs.
    before = step_of(saved[-1]) / -(-len(rows["train"]) // per_step) if saved else 0.0
    metrics["train_samples_per_second"] = (
        (trainer.state.epoch - before) * len(rows["train"]) / metrics["train_runtime"]
    )
    metrics |= {"loss": metrics["train_loss"]} | figures(trainer)
    source.save(trainer, args)
    if is_main():
        check_saved(args.output_dir, args.trust_remote_code)
        seconds = {"start": ready - started, "reference": computed - started, "all": time.time() - started}
        finish(output, args, selection, metrics, seconds)
        if config.push_to_hub:
            hub.push(trainer, args.output_dir)
    PartialState().destroy_process_group()


def figures(trainer):
    """Figures of the weights that are there to be saved: of the last step, or of the best checkpoint, which
    `load_best_model_at_end` has loaded.
    """
    state, step = trainer.state, trainer.state.global_step
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        step = int(
            Path(state.best_model_checkpoint).name.split("-")[1]
        )  # best_global_step may be one that was not saved
        say(
            f"the model is that of step {step} of {state.global_step}, the best by "
            f"{trainer.args.metric_for_best_model} of those saved"
        )
    so_far = [entry for entry in state.log_history if entry["step"] <= step]
    logged = next((entry for entry in reversed(so_far) if "rewards/margins" in entry and "loss" in entry), {})
    found = {"step": step} | {
        key: logged[key] for key in ("loss", "rewards/accuracies", "rewards/margins") if key in logged
    }
    if trainer.eval_dataset is not None:
        done = [entry for entry in so_far if "eval_loss" in entry and entry["step"] == step]
        found |= (
            {key: value for key, value in done[-1].items() if key.startswith("eval_")}
            if done
            else trainer.evaluate()
        )
    return found


def count_tokens_with(args):
    """A function from text to its length in tokens.

    The tokenizer is loaded at the first call: few files need it.
    """

    @functools.cache
    def tokenizer():
        from dpo_iteration.models import load_tokenizer

        return load_tokenizer(args)

    return lambda text: len(tokenizer()(text, add_special_tokens=False)["input_ids"])


def arguments(values, where=""):
    """(Arguments, settings passed on to TRL) from a mapping, checked without torch and before the files are
    there.
    """
    return _checked(build(with_passthrough(Arguments), values, where))


def _checked(args):
    extra = given(args, Arguments)
    check(args, extra)
    return args, extra


def shaping(args, extra, processes):
    """(settings, inputs) that shape the model; what its manifest holds.

    `processes` matters by the batch alone.
    """
    own = {f.name: getattr(args, f.name) for f in dataclasses.fields(Arguments)}
    unused = (
        NOT_SHAPING
        | {k for k, off in LATER.items() if own[k] == off}
        | (set() if args.use_peft else {*adapters.SETTINGS})
    )
    settings = {k: v for k, v in own.items() if k not in unused}
    settings |= {
        k: v for k, v in extra.items() if k not in QUIET and k != "push_to_hub" and not k.startswith("hub_")
    }
    settings["pairs_per_step"] = pairs_per_step(args, processes)
    if reason_for_trl(args, extra):  # which pairs share a pass changes the loss
        settings["per_device_train_batch_size"] = args.per_device_train_batch_size
    inputs = {f"train_dir {i}": name for i, name in enumerate(args.train_dir, 1)}
    inputs["model_name_or_path"] = args.model_name_or_path
    inputs["ref_model_name_or_path"] = args.ref_model_name_or_path or args.model_name_or_path
    inputs["chat_template"] = args.chat_template
    return settings, inputs


def pairs_per_step(args, processes):
    """Pairs that one optimizer step sees over all processes."""
    if args.gradient_accumulation_steps is None:
        return args.global_batch_size
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes


def halved(per_step, pairs, args, processes):
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


def accumulate(args, processes):
    """Set the accumulation that gives `global_batch_size` on these processes; refuse what does not divide."""
    if args.gradient_accumulation_steps is not None:
        return
    at_once = args.per_device_train_batch_size * processes
    if args.global_batch_size % at_once:
        raise UserError(
            f"--global_batch_size {args.global_batch_size} does not divide by {count(processes, 'process')} "
            "× "
            f"--per_device_train_batch_size {args.per_device_train_batch_size}; change one of them"
        )
    args.gradient_accumulation_steps = args.global_batch_size // at_once


def main():
    started = time.time()
    args, extra = _checked(parse(known_arguments(), __doc__))
    if args.check:
        for line in memory.report(
            args, args.num_gpus or len(visible_gpus()), args.gpu_memory_gib or gpu_memory()
        ):
            say(f"check: {line}")
        return
    check_paths(args)
    check_processes()
    settings, inputs = shaping(args, extra, world_size())
    fixed = {"num_processes": world_size()}
    output = Training(args.output_dir, "dpo_iteration/run_dpo.py", settings, inputs, args.overwrite, fixed)
    if output.is_complete():
        say(f"{args.output_dir} is complete, nothing to do")
        return
    prepare_threads()
    selection = select_pairs(
        args.train_dir,
        args.eval_fraction,
        args.seed,
        choose_type=args.choose_type,
        length_penalty=args.length_penalty,
        min_margin=args.min_margin,
        drop_truncated=args.drop_truncated,
        drop_empty=args.drop_empty,
        count_tokens=count_tokens_with(args),
        pairs_per_prompt=args.pairs_per_prompt,
    )
    check_pairs(selection, args)
    train(args, extra, selection, output, started)


if __name__ == "__main__":
    run(main)
