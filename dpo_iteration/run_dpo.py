"""Train a policy by DPO on pairs chosen from rewarded answers.

In:  rewarded records at `train_dir` (one file or several, as annotate_data/get_rewards.py writes them) and a policy.
Out: model, tokenizer, chat template and generation config in the folder `output_dir`; beside it the pairs that were
     chosen (`.pairs.jsonl`), the prompts left out (`.pairs.skipped.jsonl`), and last a manifest (`.manifest.json`).

    accelerate launch --config_file ./configs/zero2.yaml dpo_iteration/run_dpo.py ./configs/training.yaml

Any other setting of TRL's DPOConfig may stand in the YAML or on the command line too. With `--save_steps N` a killed
run continues from its last checkpoint when the same command is started again. `--check true` tells the memory it needs.
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
from common.devices import check_processes, gpu_memory, prepare_threads, visible_gpus
from common.manifest import beside, difference, fingerprint, read_manifest, versions, write_json, writing
from common.progress import Progress, duration
from dpo_iteration import memory
from dpo_iteration.pairs import CHOOSE_TYPES, select_pairs
from dpo_iteration.settings import check, check_paths, given, reason_for_trl, training_config, with_passthrough

# Settings that do not shape the model: where it goes, what is shown, and what the inputs' fingerprints cover.
NOT_SHAPING = {
    "train_dir", "output_dir", "pairs_path", "model_name_or_path", "ref_model_name_or_path", "trust_remote_code",
    "overwrite", "report_to", "run_name", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "keep_checkpoints", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "global_batch_size", "cpu_threads", "share_prompts", "max_row_tokens", "reference_cache", "check", "num_gpus", "gpu_memory_gib",
    "model_size_b",
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
    pairs_per_prompt: int = arg(1, "at most so many pairs of a prompt, each response in one of them at most")
    min_margin: float = arg(0.0, "reward; pairs closer than this are left out")
    drop_truncated: bool = arg(False, "leave out responses that ended at the generation's length limit")
    eval_fraction: float = arg(0.0, "share of the prompts held out for evaluation, from 0 to below 1")
    max_length: int = arg(2048, "tokens of prompt and response; longer responses are cut on the right")
    max_prompt_length: int = arg(1024, "tokens of the prompt; longer prompts are cut on the left")

    loss_type: list[str] = arg(["sigmoid"], "DPO loss as TRL names it, or several (with loss_weights)")
    beta: float = arg(0.1, "strength of the tie to the reference")
    label_smoothing: float = arg(0.1, "share of preferences taken as wrong, below 0.5; with sigmoid: conservative DPO")
    margin_scale: float = arg(0.0, "share of a pair's margin that beta × Δ has to exceed (offset DPO)")
    margin_weight: float = arg(0.0, "pairs count by margin to this power, in the mean 1; 0: all alike")

    learning_rate: float = arg(5e-7, "peak learning rate")
    lr_scheduler_type: str = arg("cosine", "course of the learning rate")
    warmup_steps: float = arg(0.0, "optimizer steps of linear warm-up; below 1 a share of all steps")
    num_train_epochs: float = arg(2.0, "passes over the pairs")
    max_steps: int = arg(-1, "optimizer steps, in place of num_train_epochs; -1 is off")
    per_device_train_batch_size: int = arg(1, "pairs per process in one forward pass")
    per_device_eval_batch_size: int = arg(1, "pairs per process in one forward pass of the evaluation")
    global_batch_size: int = arg(128, "pairs per optimizer step over all processes; the accumulation follows")
    gradient_accumulation_steps: int | None = arg(None, "forward passes per step, in place of global_batch_size")
    share_prompts: bool | None = arg(None, "packed rows in which chosen and rejected share their prompt; None: where it can be")
    max_row_tokens: int | None = arg(None, "tokens of a packed row; None: as many as padded pairs may take, "
                                     "2 × per_device_train_batch_size × max_length")  # fmt: skip
    reference_cache: str | None = arg(None, "folder where the reference's log-probabilities are kept; None: "
                                      "reference_logps beside output_dir")  # fmt: skip
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

    check: bool = arg(False, "print how much memory each configs/*.yaml needs and which to take, and stop")
    num_gpus: int | None = arg(None, "with check: GPUs over all machines; None: those that are visible")
    gpu_memory_gib: float | None = arg(None, "with check: GiB of a GPU; None: that of the visible ones")
    model_size_b: float | None = arg(None, "with check: billions of parameters, where the model's config is out of reach")


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
    """Tokenise, compute the reference, load, train, evaluate, save: what needs torch."""
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

    from dpo_iteration.dpo import IterativeDPOTrainer, PlainLog
    from dpo_iteration.rows import check_bos, show_pair

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    tokenizer = models.load_tokenizer(args)
    rows = tokenize(selection, tokenizer, args)
    check_pairs(selection, args)
    check_bos(tokenizer, rows["train"][0])
    models.check_models(args, tokenizer, rows)

    per_step = settings["pairs_per_step"]
    sharing, steps = batches(args, extra, rows, per_step)
    if steps["train"]:
        args.gradient_accumulation_steps = steps["train"].accumulation
    else:
        accumulate(args, launched())
    config = training_config(args, extra, Arguments, bool(rows["eval"]))
    models.prepare_sharding(config)
    PartialState().wait_for_everyone()  # every rank has looked at what is there; now rank 0 may write
    lock = prepare_output(args, selection, settings, inputs) if is_main() else None
    PartialState().wait_for_everyone()

    compute_reference(args, extra, config, rows, sharing, tokenizer)
    computed = time.time()
    policy = models.load_model(args.model_name_or_path, args, config, args.revision)
    source = models.Source.of(policy, tokenizer, args)
    data = {split: Dataset.from_list(ids) if ids else None for split, ids in rows.items()}
    try:
        trainer = IterativeDPOTrainer(
            model=policy, args=config, processing_class=tokenizer, train_dataset=data["train"], eval_dataset=data["eval"],
            callbacks=[PlainLog(per_step)], rows=rows, steps=steps["train"], eval_steps=steps["eval"], sharing=sharing,
            margin_scale=args.margin_scale,
        )  # fmt: skip
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"TRL refuses the settings: {' '.join(str(error).split())[:400]}") from None
    trainer.remove_callback(PrinterCallback)
    models.check_master_weights(trainer)
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
    source.save(trainer)
    if is_main():
        remove_checkpoints([] if args.keep_checkpoints else Path(args.output_dir).glob("checkpoint-*"))
        seconds = {"start": ready - started, "reference": computed - started, "all": time.time() - started}
        finish(args, selection, metrics, seconds)
        lock.close()
        os.unlink(lock.name)
    PartialState().destroy_process_group()


def batches(args, extra, rows, per_step):
    """(whether prompts are shared, {split: Steps, or None where TRL makes the batches}); says which computation it is."""
    from dpo_iteration import models
    from dpo_iteration.packing import Steps, both, columns_of

    padded = reason_for_trl(args, extra) or ("its mixture of experts has an auxiliary loss" if models.has_auxiliary_loss(args) else "")
    if padded:
        if args.share_prompts or args.margin_scale or args.margin_weight:
            raise UserError(f"--share_prompts, --margin_scale and --margin_weight cannot be used: {padded}")
        say(f"note: padded batches and TRL's own loss: {padded}")
        return False, {"train": None, "eval": None}
    against = "" if args.share_prompts is False else models.reason_against_sharing(args)
    if against and args.share_prompts:
        raise UserError(f"--share_prompts true: this model cannot share prompts, {against}")
    sharing = args.share_prompts is not False and not against
    if against:
        say(f"note: padded batches: the model cannot share prompts, {against}")
    budget = row_tokens(args) if sharing else None
    steps, costs = {"train": None, "eval": None}, {}
    for split in [split for split in rows if rows[split]]:
        costs[split] = [columns_of(row) if sharing else 0 for row in rows[split]]
    place = {"processes": launched(), "process": int(os.environ.get("RANK", "0"))}
    epochs = -(-args.max_steps * per_step // len(rows["train"])) if args.max_steps > 0 else -int(-args.num_train_epochs // 1)
    steps["train"] = Steps(
        costs["train"], per_step, budget, args.per_device_train_batch_size, weights=weights(rows["train"], args.margin_weight),
        seed=extra.get("data_seed", args.seed), epochs=epochs, **place,
    )  # fmt: skip
    if rows["eval"]:
        steps["eval"] = Steps(costs["eval"], len(rows["eval"]), budget, args.per_device_eval_batch_size, **place)
    if sharing:
        alone, longest = sum(len(ids) for row in rows["train"] for ids in both(row)), max(costs["train"])
        say(
            f"rows of up to {max(budget, longest)} tokens, {steps['train'].accumulation} a process and step; shared prompts and no padding: "
            f"{sum(costs['train'])} tokens an epoch instead of {alone} and padding"
        )
    return sharing, steps


def row_tokens(args):
    return args.max_row_tokens or 2 * args.per_device_train_batch_size * args.max_length


def weights(rows, power):
    """margin ** power of each pair, in the mean 1; None for power 0."""
    if not power:
        return None
    found = [row["margin"] ** power for row in rows]
    return [weight * len(found) / sum(found) for weight in found]


def compute_reference(args, extra, config, rows, sharing, tokenizer):
    """Put the reference's log-probabilities into the rows, from disk where they are known; says how many were."""
    import torch

    from dpo_iteration import models, reference

    name, revision = models.reference_name(args)
    deepspeed = config.deepspeed_plugin
    about = {
        "dtype": "bfloat16" if args.bf16 else "float32", "autocast": args.bf16 and not deepspeed, "ld_alpha": extra.get("ld_alpha"),
        "zero_stage": deepspeed.zero_stage if deepspeed else None, "fsdp": os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
        "attention": "shared_prompts" if sharing else models.attention(name, args, revision),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }  # fmt: skip
    every = rows["train"] + rows["eval"]
    started = time.time()
    found, key = reference.add_reference(
        every, lambda: reference.ready(models.load_model(name, args, config, revision), config, sharing), name, revision,
        reference_cache(args), about, sharing, row_tokens(args), args.per_device_train_batch_size, tokenizer.pad_token_id or 0,
        torch.bfloat16 if about["autocast"] else None, extra.get("ld_alpha"),
    )  # fmt: skip
    say(f"reference: {found} of {len(every)} pairs known from {reference_cache(args)}/{key}, {duration(time.time() - started)}")


def reference_cache(args):
    return Path(args.reference_cache) if args.reference_cache else Path(args.output_dir).parent / "reference_logps"


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
    manifest = read_manifest(args.output_dir) | {
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
    settings = {k: v for k, v in own.items() if k not in NOT_SHAPING} | extra
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
    if args.check:
        for line in memory.report(args, args.num_gpus or len(visible_gpus()), args.gpu_memory_gib or gpu_memory()):
            say(f"check: {line}")
        return
    check_paths(args)
    check_processes()
    settings, inputs = shaping(args, extra, launched())
    if is_complete(args, settings, inputs):
        say(f"{args.output_dir} is complete, nothing to do")
        return
    prepare_threads()
    selection = select_pairs(
        args.train_dir, args.eval_fraction, args.seed, choose_type=args.choose_type, length_penalty=args.length_penalty,
        min_margin=args.min_margin, drop_truncated=args.drop_truncated, count_tokens=count_tokens_with(args),
        pairs_per_prompt=args.pairs_per_prompt,
    )  # fmt: skip
    check_pairs(selection, args)
    train(args, extra, selection, settings, inputs, started)


if __name__ == "__main__":
    run(main)
