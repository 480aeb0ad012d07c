"""The output of a training: is it there, may it be continued, and what stands beside the model."""

import json
import os
import shutil
import time
from pathlib import Path

from common import locks, records
from common.cli import UserError, count
from common.manifest import beside, difference, fingerprint, read_manifest, versions, write_json, writing
from common.progress import duration
from dpo_iteration import adapters, card


def launched():
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main():
    return os.environ.get("RANK", "0") == "0"


def say(text):
    if is_main():
        print(text, flush=True)


def is_complete(args, settings, inputs):
    """Whether the model is there, from these settings and inputs; refuse what was made, or half made, from
    others.
    """
    folder, manifest = Path(args.output_dir), read_manifest(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file, a folder was expected")
    if args.overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return False
    if manifest is None:
        raise UserError(
            f"{folder} has no manifest, so it is not known how it was made; move it or give --overwrite"
        )
    complete = (
        manifest.get("complete") and (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    )
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
    """Whole checkpoints, oldest first: the Trainer writes `trainer_state.json` after weights and
    optimizer.
    """
    found = [f.parent for f in Path(folder).glob("checkpoint-*/trainer_state.json") if is_json(f)]
    return sorted(found, key=lambda f: int(f.name.split("-")[1]))


def is_json(path):
    """Whether a file was written to its end."""
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def remove_checkpoints(folders):
    for folder in list(folders):
        (folder / "trainer_state.json").unlink(
            missing_ok=True
        )  # first: a half removed one must not look whole
        shutil.rmtree(folder)


def pairs_path(args):
    return Path(args.pairs_path) if args.pairs_path else beside(args.output_dir, ".pairs.jsonl")


def prepare_output(args, selection, settings, inputs):
    """Rank 0: lock the output, clear what `--overwrite` gives up, write the pairs and an unfinished
    manifest.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = locks.hold(beside(folder, ".lock"), f"training into {folder}")
    if is_complete(args, settings, inputs):
        raise UserError(f"another process has finished {folder} meanwhile; there is nothing left to do")
    if args.overwrite:
        remove_checkpoints(folder.glob("checkpoint-*"))
        shutil.rmtree(folder / adapters.FOLDER, ignore_errors=True)  # without LoRA nothing would replace it
    beside(folder, ".trainer_state.json").unlink(missing_ok=True)  # of a training before this one
    marks = {key: fingerprint(name) for key, name in inputs.items() if name is not None}
    manifest = {
        "script": "dpo_iteration/run_dpo.py",
        "complete": False,
        "settings": settings,
        "inputs": marks,
    }
    manifest["num_processes"] = launched()
    write_json(beside(folder, ".manifest.json"), manifest)
    write_jsonl(pairs_path(args), selection.pairs)
    write_jsonl(beside(pairs_path(args), ".skipped.jsonl"), selection.skipped)
    return lock


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


def write_jsonl(path, entries):
    """Write records whole or not at all; without entries no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_text(
            "".join(records.dumps(entry) + "\n" for entry in entries), encoding="utf-8", newline="\n"
        )
    os.replace(temporary, path)
    if not entries:
        path.unlink()


def finish(args, selection, metrics, seconds):
    """Complete the manifest, the last thing written, and say what was done."""
    counts = selection.counts | {"pairs": len(selection.pairs), "skipped": dict(selection.skipped_by_reason)}
    metrics = {key: value for key, value in metrics.items() if records.finite(value)}
    manifest = read_manifest(args.output_dir)
    card.make_card(args, manifest["settings"], counts, metrics, launched()).save(
        Path(args.output_dir, "README.md")
    )
    manifest |= {
        "complete": True,
        "counts": counts,
        "metrics": metrics,
        "seconds": {k: round(v, 1) for k, v in seconds.items()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "output": fingerprint(args.output_dir),
    }
    write_json(beside(args.output_dir, ".manifest.json"), manifest)
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items())
    skipped = f"{len(selection.skipped)}" + (f" ({reasons})" if reasons else "")
    print(
        f"read {count(counts['records'], 'record')}, wrote {count(counts['pairs'], 'pair')} to "
        f"{pairs_path(args)}, skipped {skipped}"
    )
    for name, what in NOTES.items():
        if counts.get(name):
            print(f"note: {counts[name]} {what}")
    for reason, n in counts["responses_left_out"].items():
        print(f"note: {count(n, 'response')} left out: {reason}")
    for prefix, name in (("", "train"), ("eval_", "held out")):
        keys = ("loss", "rewards/accuracies", "rewards/margins")
        loss, accuracy, margin = (metrics.get(f"{prefix}{key}") for key in keys)
        if None not in (loss, accuracy, margin):
            print(f"{name}: loss {loss:.4f}, accuracy {accuracy:.2f}, margin {margin:.4f}")
    speed = metrics.get("train_samples_per_second", 0.0)
    print(f"trained {args.output_dir} in {duration(seconds['all'])}, {speed:.1f} pairs/s", flush=True)
