"""Train a policy by DPO on pairs chosen from rewarded answers.

In:  rewarded records at `train_dir` (one file or several, as annotate_data/get_rewards.py writes them) and a policy.
Out: model, tokenizer, chat template, generation config and model card in the folder `output_dir`; beside it the pairs
     that were chosen (`.pairs.jsonl`), the prompts left out (`.pairs.skipped.jsonl`), and last a manifest
     (`.manifest.json`).

    accelerate launch --config_file ./configs/zero2.yaml dpo_iteration/run_dpo.py ./configs/training.yaml

Any other setting of TRL's DPOConfig may stand in the YAML or on the command line too. With `--save_steps N` a killed
run continues from its last checkpoint when the same command is started again.
"""

import dataclasses
import fcntl
import functools
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common import records
from common.cli import UserError, arg, build, parse, run
from common.devices import check_processes, prepare_threads
from common.manifest import beside, difference, fingerprint, read_manifest, versions, write_json, writing
from common.progress import Progress, duration
from dpo_iteration import adapters, card, hub
from dpo_iteration.pairs import CHOOSE_TYPES, select_pairs
from dpo_iteration.saved import check_saved
from dpo_iteration.settings import check, check_paths, given, training_config, with_passthrough

# Settings that do not shape the model: where it goes, what is shown, and what the inputs' fingerprints cover.
NOT_SHAPING = {
    "train_dir", "output_dir", "pairs_path", "model_name_or_path", "ref_model_name_or_path", "trust_remote_code",
    "overwrite", "report_to", "run_name", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "keep_checkpoints", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "global_batch_size", "cpu_threads",
}  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class Arguments:
    model_name_or_path: str = arg(help="policy to start from: hub name or folder")
    ref_model_name_or_path: str | None = arg(None, "reference: hub name or folder; None is the policy's start")
    revision: str | None = arg(None, "branch, tag or commit of the policy on the hub")
    trust_remote_code: bool = arg(False, "run Python code that comes with the model")
    attn_implementation: str | None = arg(None, "None: flash_attention_2 where flash-attn and a GPU are, else sdpa")
    chat_template: str | None = arg(None, "file with a jinja chat template to use instead of the tokenizer's")
    template_kwargs: dict = arg({}, 'arguments of the template, JSON: \'{"enable_thinking": false}\'')

    train_dir: list[str] = arg(help="rewarded records, JSON Lines: one file or several (past iterations)")
    output_dir: str = arg(help="folder of the trained model")
    pairs_path: str | None = arg(None, "where the chosen pairs are written; None is OUTPUT_DIR.pairs.jsonl")
    overwrite: bool = arg(False, "start anew where an output exists or is half done")

    choose_type: str = arg("max_min", "which two responses: best and worst, best and second, best and random, two "
                           "random, best and worst by reward less length_penalty", choices=CHOOSE_TYPES)  # fmt: skip
    length_penalty: float = arg(0.0, "reward per token taken off by choose_type max_min_p")
    min_margin: float = arg(0.0, "reward; pairs closer than this are left out")
    drop_truncated: bool = arg(False, "leave out responses that ended at the generation's length limit")
    eval_fraction: float = arg(0.0, "share of the prompts held out for evaluation, from 0 to below 1")
    max_length: int = arg(2048, "tokens of prompt and response; longer responses are cut on the right")
    max_prompt_length: int = arg(1024, "tokens of the prompt; longer prompts are cut on the left")

    loss_type: list[str] = arg(["sigmoid"], "DPO loss as TRL names it, or several (with loss_weights)")
    beta: float = arg(0.1, "strength of the tie to the reference")
    label_smoothing: float = arg(0.1, "share of preferences taken as wrong, below 0.5; with sigmoid: conservative DPO")

    use_peft: bool = arg(False, "LoRA: train adapters, the policy frozen; they are merged into it at the end")
    lora_r: int = arg(16, "rank of the adapters")
    lora_alpha: int = arg(32, "the adapters count alpha / r times")
    lora_dropout: float = arg(0.0, "share of an adapter's inputs left out; needs --disable_dropout false")
    lora_target_modules: list[str] = arg(["all-linear"], "ends of the names of modules with an adapter; all-linear: all but lm_head")
    load_in_4bit: bool = arg(False, "QLoRA: hold the frozen policy in 4 bits (nf4, double quantisation)")

    learning_rate: float = arg(5e-7, "peak learning rate")
    lr_scheduler_type: str = arg("cosine", "course of the learning rate")
    warmup_steps: float = arg(0.0, "optimizer steps of linear warm-up; below 1 a share of all steps")
    num_train_epochs: float = arg(2.0, "passes over the pairs")
    max_steps: int = arg(-1, "optimizer steps, in place of num_train_epochs; -1 is off")
    per_device_train_batch_size: int = arg(1, "pairs per process in one forward pass")
    per_device_eval_batch_size: int = arg(1, "pairs per process in one forward pass of the evaluation")
    global_batch_size: int = arg(128, "pairs per optimizer step over all processes; the accumulation follows")
    gradient_accumulation_steps: int | None = arg(None, "forward passes per step, in place of global_batch_size")
    optim: str = arg("adamw_torch", "optimizer as transformers names it")
    weight_decay: float = arg(0.0, "decoupled weight decay")
    max_grad_norm: float = arg(1.0, "gradients are scaled down to this norm")
    bf16: bool = arg(True, "compute in bfloat16 and save in it; the policy's own weights are fp32 all the while")
    gradient_checkpointing: bool = arg(True, "recompute activations: less memory, about a fifth slower")
    seed: int = arg(42, "seed of random choices, held-out prompts and the order of the pairs")

    cpu_threads: int | None = arg(None, "threads of a process without a GPU; None: the cores shared out")
    logging_steps: float = arg(1.0, "optimizer steps between log lines")
    eval_steps: int = arg(0, "optimizer steps between evaluations; 0 evaluates at the end only")
    save_steps: int = arg(0, "optimizer steps between checkpoints; 0 writes none")
    save_total_limit: int = arg(2, "checkpoints kept while training")
    keep_checkpoints: bool = arg(False, "keep checkpoints and optimizer states once the model is saved")
    report_to: list[str] = arg(["none"], "none, wandb, tensorboard, trackio: one or several")
    run_name: str | None = arg(None, "name of the run for report_to")


def is_complete(args, settings, inputs):
    """Whether the model is there, from these settings and inputs; refuse what was made, or half made, from others."""
    folder, manifest = Path(args.output_dir), read_manifest(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file, a folder was expected")
    if args.overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return False
    if manifest is None:
        raise UserError(f"{folder} has no manifest, so it is not known how it was made; move it or give --overwrite")
    complete = manifest.get("complete") and (folder / "config.json").is_file()
    if not complete and not checkpoints(folder):
        return False
    changed = difference(manifest, settings, inputs)
    if not changed and not complete and manifest.get("num_processes", launched()) != launched():
        # The optimizer states of a checkpoint are cut into as many parts.
        changed = f"num_processes was {manifest['num_processes']} and is now {launched()}"
    if changed:
        what = f"{folder} is {'complete' if complete else 'half done'} with other settings: {changed}"
        raise UserError(f"{what}; choose another --output_dir or give --overwrite")
    return complete


def checkpoints(folder):
    """Whole checkpoints, oldest first: the Trainer writes `trainer_state.json` after weights and optimizer."""
    found = [f.parent for f in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return sorted(found, key=lambda f: int(f.name.split("-")[1]))


def launched():
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main():
    return os.environ.get("RANK", "0") == "0"


def say(text):
    if is_main():
        print(text, flush=True)


def tokenize(selection, tokenizer, args):
    """Rows of token ids of the train and eval pairs; pairs that teach nothing move to `selection.skipped`."""
    from dpo_iteration.dpo import PairTokenizer

    to_row = PairTokenizer(tokenizer, args.max_length, args.max_prompt_length, args.template_kwargs)
    rows, kept = {"train": [], "eval": []}, []
    progress = Progress(len(selection.pairs), "tokenize", "pairs", enabled=is_main())
    for pair in selection.pairs:
        row, reason = to_row(pair)
        if row is None:
            selection.skip(pair, reason)
        else:
            rows[pair["split"]].append(row)
            kept.append(pair)
        progress.update()
    progress.close()
    selection.pairs = kept
    selection.counts |= {"train_pairs": len(rows["train"]), "eval_pairs": len(rows["eval"]), **to_row.counts}
    return rows


def check_pairs(selection, args):
    """Refuse too few pairs; every rank calls it alike, so that none waits for another."""
    world = launched()
    reasons = ", ".join(f"{n} {reason}" for reason, n in selection.skipped_by_reason.items())
    read = f"{selection.counts['records']} records" + (f"; skipped: {reasons}" if reasons else "")
    if not selection.pairs:
        raise UserError(f"no pairs in {' '.join(args.train_dir)} ({read})")
    training = sum(pair["split"] == "train" for pair in selection.pairs)
    if not training:
        raise UserError(f"all {len(selection.pairs)} pairs are held out: lower --eval_fraction {args.eval_fraction}")
    if training < world:
        raise UserError(f"{training} training pairs for {world} processes ({read}): give --num_processes {training}")
    if args.eval_fraction and training == len(selection.pairs):
        say(f"note: no pair is held out by --eval_fraction {args.eval_fraction}, so there will be no evaluation")


def train(args, extra, selection, settings, inputs, started):
    """Tokenise, load, train, evaluate, save: what needs torch."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL sends a ping from every start
    import torch

    from dpo_iteration import models

    if not torch.cuda.is_available():
        say("note: no GPU found, training on the CPU")
        models.prepare_cpu(args.cpu_threads)
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.utils import logging as transformers_logging

    from dpo_iteration.dpo import IterativeDPOTrainer, PlainLog, check_bos, show_pair

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    tokenizer = models.load_tokenizer(args)
    rows = tokenize(selection, tokenizer, args)
    check_pairs(selection, args)
    check_bos(tokenizer, rows["train"][0])

    hub.take_token(extra)
    config = training_config(args, extra, Arguments, bool(rows["eval"]))
    PartialState().wait_for_everyone()  # every rank has looked at what is there; now rank 0 may write
    lock = prepare_output(args, selection, settings, inputs) if is_main() else None
    if is_main():
        hub.reach(config)
    PartialState().wait_for_everyone()

    policy, ref_model = models.load_policy_and_reference(args, config, tokenizer, rows)
    source = models.Source.of(policy, tokenizer, args)
    per_step = settings["pairs_per_step"]
    data = {split: Dataset.from_list(ids) if ids else None for split, ids in rows.items()}
    try:
        trainer = IterativeDPOTrainer(
            model=policy, ref_model=ref_model, args=config, processing_class=tokenizer, train_dataset=data["train"],
            eval_dataset=data["eval"], callbacks=[PlainLog(per_step)], peft_config=adapters.lora_config(args),
        )  # fmt: skip
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"TRL refuses the settings: {' '.join(str(error).split())[:400]}") from None
    trainer.remove_callback(PrinterCallback)
    adapters.keep_fp32(trainer)
    models.check_master_weights(trainer)
    if config.precompute_ref_log_probs:
        trainer.ref_model = None  # its log-probabilities are kept, its memory is not needed
    say(show_pair(tokenizer, rows["train"][0]))
    say(f"training on {len(rows['train'])} pairs, {len(rows['eval'])} held out, {per_step} pairs per optimizer step")

    saved = checkpoints(args.output_dir)
    if saved:
        say(f"continuing from {saved[-1]}")
    ready = time.time()
    metrics = trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None).metrics
    logged = next((entry for entry in reversed(trainer.state.log_history) if "rewards/margins" in entry), {})
    metrics |= {key: logged[key] for key in ("loss", "rewards/accuracies", "rewards/margins") if key in logged}
    if data["eval"]:
        metrics |= trainer.evaluate()
    source.save(trainer, args)
    if is_main():
        check_saved(args.output_dir, args.trust_remote_code)
        remove_checkpoints([] if args.keep_checkpoints else Path(args.output_dir).glob("checkpoint-*"))
        shutil.rmtree(Path(args.output_dir, ".precompute"), ignore_errors=True)
        finish(args, selection, metrics, {"start": ready - started, "all": time.time() - started})
        lock.close()
        os.unlink(lock.name)
        if config.push_to_hub:
            hub.push(trainer, args.output_dir)
    PartialState().destroy_process_group()


def pairs_path(args):
    return Path(args.pairs_path) if args.pairs_path else beside(args.output_dir, ".pairs.jsonl")


def prepare_output(args, selection, settings, inputs):
    """Rank 0: lock the output, clear what `--overwrite` gives up, write the pairs and an unfinished manifest."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(beside(folder, ".lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is training into {folder}; wait for it or stop it first") from None
    if args.overwrite:
        remove_checkpoints(folder.glob("checkpoint-*"))
        shutil.rmtree(folder / adapters.FOLDER, ignore_errors=True)  # without LoRA nothing would replace it
    marks = {key: fingerprint(name) for key, name in inputs.items()}
    manifest = {"script": "dpo_iteration/run_dpo.py", "complete": False, "settings": settings, "inputs": marks}
    manifest["num_processes"] = launched()
    write_json(beside(folder, ".manifest.json"), manifest)
    write_jsonl(pairs_path(args), selection.pairs)
    write_jsonl(beside(pairs_path(args), ".skipped.jsonl"), selection.skipped)
    return lock


def write_jsonl(path, entries):
    """Write records whole or not at all; without entries no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_text("".join(records.dumps(entry) + "\n" for entry in entries), encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    if not entries:
        path.unlink()


def remove_checkpoints(folders):
    for folder in list(folders):
        (folder / "trainer_state.json").unlink(missing_ok=True)  # first: a half removed one must not look whole
        shutil.rmtree(folder)


def finish(args, selection, metrics, seconds):
    """Complete the manifest, the last thing written, and say what was done."""
    counts = selection.counts | {"pairs": len(selection.pairs), "skipped": dict(selection.skipped_by_reason)}
    metrics = {key: value for key, value in metrics.items() if records.finite(value)}
    manifest = read_manifest(args.output_dir)
    card.make_card(args, manifest["settings"], counts, metrics, launched()).save(Path(args.output_dir, "README.md"))
    manifest |= {
        "complete": True, "counts": counts, "metrics": metrics, "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "versions": versions(),
        "output": fingerprint(args.output_dir),
    }  # fmt: skip
    write_json(beside(args.output_dir, ".manifest.json"), manifest)
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items())
    skipped = f"{len(selection.skipped)}" + (f" ({reasons})" if reasons else "")
    print(f"read {counts['records']} records, wrote {counts['pairs']} pairs to {pairs_path(args)}, skipped {skipped}")
    for name in ("prompts_cut", "prompts_rendered_otherwise", "responses_cut", "responses_without_end_of_turn"):
        if counts.get(name):
            print(f"note: {counts[name]} {name.replace('_', ' ')}")
    for reason, n in counts["responses_left_out"].items():
        print(f"note: {n} responses left out: {reason}")
    for prefix, name in (("", "train"), ("eval_", "held out")):
        keys = ("loss", "rewards/accuracies", "rewards/margins")
        loss, accuracy, margin = (metrics.get(f"{prefix}{key}") for key in keys)
        if None not in (loss, accuracy, margin):
            print(f"{name}: loss {loss:.4f}, accuracy {accuracy:.2f}, margin {margin:.4f}")
    speed = metrics.get("train_samples_per_second", 0.0)
    print(f"trained {args.output_dir} in {duration(seconds['all'])}, {speed:.1f} pairs/s", flush=True)


def count_tokens_with(args):
    """A function from text to its length in tokens. The tokenizer is loaded at the first call: few files need it."""

    @functools.cache
    def tokenizer():
        from dpo_iteration.models import load_tokenizer

        return load_tokenizer(args)

    return lambda text: len(tokenizer()(text, add_special_tokens=False)["input_ids"])


def arguments(values, where=""):
    """(Arguments, settings passed on to TRL) from a mapping, checked without torch and before the files are there."""
    return _checked(build(with_passthrough(Arguments), values, where))


def _checked(args):
    extra = given(args, Arguments)
    check(args, extra)
    return args, extra


def shaping(args, extra, processes):
    """(settings, inputs) that shape the model; what its manifest holds. `processes` matters by the batch alone."""
    own = {f.name: getattr(args, f.name) for f in dataclasses.fields(Arguments)}
    unused = NOT_SHAPING if args.use_peft else NOT_SHAPING | {"use_peft", *adapters.SETTINGS}
    settings = {k: v for k, v in own.items() if k not in unused}
    settings |= {k: v for k, v in extra.items() if k != "push_to_hub" and not k.startswith("hub_")}
    settings["pairs_per_step"] = pairs_per_step(args, processes)
    inputs = {f"train_dir {i}": name for i, name in enumerate(args.train_dir, 1)}
    inputs["model_name_or_path"] = args.model_name_or_path
    inputs["ref_model_name_or_path"] = args.ref_model_name_or_path or args.model_name_or_path
    return settings, inputs


def pairs_per_step(args, processes):
    """Pairs that one optimizer step sees over all processes."""
    if args.gradient_accumulation_steps is None:
        return args.global_batch_size
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes


def accumulate(args, processes):
    """Set the accumulation that gives `global_batch_size` on these processes; refuse what does not divide."""
    if args.gradient_accumulation_steps is not None:
        return
    at_once = args.per_device_train_batch_size * processes
    if args.global_batch_size % at_once:
        raise UserError(
            f"--global_batch_size {args.global_batch_size} does not divide by {processes} processes × "
            f"--per_device_train_batch_size {args.per_device_train_batch_size}; change one of them"
        )
    args.gradient_accumulation_steps = args.global_batch_size // at_once


def main():
    started = time.time()
    args, extra = _checked(parse(with_passthrough(Arguments), __doc__))
    check_paths(args)
    check_processes()
    settings, inputs = shaping(args, extra, launched())
    accumulate(args, launched())
    if is_complete(args, settings, inputs):
        say(f"{args.output_dir} is complete, nothing to do")
        return
    prepare_threads()
    selection = select_pairs(
        args.train_dir, args.eval_fraction, args.seed, choose_type=args.choose_type, length_penalty=args.length_penalty,
        min_margin=args.min_margin, drop_truncated=args.drop_truncated, count_tokens=count_tokens_with(args),
    )  # fmt: skip
    check_pairs(selection, args)
    train(args, extra, selection, settings, inputs, started)


if __name__ == "__main__":
    run(main)
