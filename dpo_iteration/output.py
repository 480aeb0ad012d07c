"""What a training by DPO writes beside its model, and what it says at its end."""

import shutil

from common import records
from common.cli import count
from common.manifest import beside, write_jsonl
from common.progress import duration
from common.training import Training, world_size
from dpo_iteration import adapters, card
from dpo_iteration.arguments import Arguments, pairs_path, unit
from dpo_iteration.pairs import Selection


def begin(training: Training, args: Arguments, selection: Selection):
    """Rank 0: clear what `--overwrite` gives up, write an unfinished manifest and the pairs."""
    if args.overwrite:
        # Without LoRA nothing replaces it.
        shutil.rmtree(training.folder / adapters.FOLDER, ignore_errors=True)
    beside(training.folder, ".trainer_state.json").unlink(missing_ok=True)  # of an earlier training
    training.begin()
    write_jsonl(pairs_path(args), selection.pairs)
    write_jsonl(beside(pairs_path(args), ".skipped.jsonl"), selection.skipped)


NOTES = {  # counts of rows.py and common/tokens.py, in words
    "prompts_cut": "prompts cut to max_prompt_length",
    "responses_cut": "responses cut to max_length",
    "responses_without_end_of_turn": (
        "responses without an end of turn: they ended at the generation's length limit"
    ),
    "prompts_merged": "pairs whose prompt and response share a token, which counts as the response's",
    "other_ids": "responses whose token ids are not their text in this tokenizer: their text was tokenised",
    "retokenised": "responses tokenised from text into another number of tokens than were sampled",
    "written_otherwise": (
        "responses that the chat template would change (a thought left out, a header put "
        "in): taken as they are"
    ),
    "never_closed": (
        "responses without an end of turn: the chat template closes no turn and their tokens were not kept"
    ),
}


def in_words(metrics: dict, prefix: str = "") -> str:
    """Loss, accuracy and margin of a log entry; training without rejected responses has the loss alone, KTO
    its z0, the KL by answers to other prompts, too.
    """
    labels = {
        "loss": "loss {:.4f}",
        "rewards/accuracies": "accuracy {:.2f}",
        "rewards/margins": "margin {:.4f}",
        "kl": "z0 {:.4f}",
    }
    there = {words: metrics.get(f"{prefix}{key}") for key, words in labels.items()}
    return ", ".join(words.format(value) for words, value in there.items() if value is not None)


def finish(training: Training, args: Arguments, selection: Selection, metrics: dict, seconds: dict):
    """Write the model card, complete the manifest, and say what was done."""
    counts = selection.counts | {"pairs": len(selection.pairs), "skipped": dict(selection.skipped_by_reason)}
    metrics = {key: value for key, value in metrics.items() if records.finite(value)}
    # The card names the batch that there was: few pairs halve what was asked for.
    settings = training.settings | {"pairs_per_step": counts["pairs_per_step"]}
    card.make_card(args, settings, counts, metrics, world_size()).save(training.folder / "README.md")
    seconds = {k: round(v, 1) for k, v in seconds.items()}
    training.finish(args.keep_checkpoints, counts=counts, metrics=metrics, seconds=seconds)
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items())
    skipped = f"{len(selection.skipped)}" + (f" ({reasons})" if reasons else "")
    print(
        f"read {count(counts['records'], 'record')}, wrote {count(counts['pairs'], unit(args))} to "
        f"{pairs_path(args)}, skipped {skipped}"
    )
    for name, what in NOTES.items():
        if counts.get(name):
            print(f"note: {counts[name]} {what}")
    for reason, n in counts["responses_left_out"].items():
        print(f"note: {count(n, 'response')} left out: {reason}")
    for prefix, name in (("", "train"), ("eval_", "held out")):
        if f"{prefix}loss" in metrics:
            print(f"{name}: {in_words(metrics, prefix)}")
    speed = f"{metrics.get('train_samples_per_second', 0.0):.1f} {unit(args)}s/s"
    if "tflops_per_gpu" in metrics:
        speed += f", {metrics['tflops_per_gpu']:.0f} TFLOPS and {metrics['gpu_memory_gib']:.1f} GiB a GPU"
    print(f"trained {args.output_dir} in {duration(seconds['all'])}, {speed}", flush=True)
