"""What OpenRLHF reads: the prompts as one file of templated text, and the policy as a folder with the right
stop tokens.
"""

import os
import random
import shutil
from pathlib import Path

from common import models, records
from common.chat import ChatTemplate
from common.cli import UserError, one_line
from common.manifest import write_json, write_jsonl
from dpo_iteration.saved import generation_config
from ppo.inputs import check_count, rendered_prompts
from ppo.openrlhf.arguments import Arguments

# Files that are not linked from the policy's folder: the tokenizer is saved with our template.
OURS = (
    "README.md",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    models.TEKKEN,
)


def whole_rollouts(args: Arguments, template: ChatTemplate) -> tuple[list[tuple], int, list[dict]]:
    """(prompts of whole rollouts as (record, templated text) in a fixed random order, passes over them within
    `max_rollouts`, entries of the skipped file).
    """
    skipped = []
    kept = [(record, text) for record, text, _ in rendered_prompts(args, template, skipped)]
    check_count(args, kept, skipped)
    random.Random(args.seed).shuffle(kept)
    rollouts, episodes = len(kept) // args.rollout_batch_size, args.num_episodes
    if args.max_rollouts is not None:
        rollouts = min(rollouts, args.max_rollouts)
        episodes = min(episodes, max(1, args.max_rollouts // rollouts))
    cut, reason = rollouts * args.rollout_batch_size, "beyond max_rollouts or in no whole rollout"
    return kept[:cut], episodes, skipped + [{"id": r["id"], "reason": reason} for r, _ in kept[cut:]]


def write_prompts(args: Arguments, template: ChatTemplate, path: Path) -> dict:
    """Write the prompts file and its `.skipped.jsonl`; returns counts."""
    chosen, episodes, skipped = whole_rollouts(args, template)
    # In the label as text: the reward functions' record, which OpenRLHF hands through untouched.
    write_jsonl(path, [{"prompt": text, "label": records.dumps(record)} for record, text in chosen])
    write_jsonl(path.with_name("prompts.skipped.jsonl"), skipped)
    rollouts = len(chosen) // args.rollout_batch_size * episodes
    return {
        "prompts": len(chosen),
        "skipped": len(skipped),
        "episodes": episodes,
        "rollouts": rollouts,
    }


def local_folder(name: str) -> Path:
    """The folder of a model, fetched from the hub where it is none (vLLM would fetch the same files)."""
    if Path(name).is_dir():
        return Path(name).resolve()
    import huggingface_hub

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise UserError(f"cannot fetch {name} from the hub: {one_line(error)}") from None


def prepare_policy(args: Arguments, template: ChatTemplate, folder: Path):
    """Put the policy into `folder`: links to its weights, our tokenizer with its template, a generation
    config that stops.

    OpenRLHF samples until vLLM's stop tokens, which are the EOS and what generation_config.json names. Where
    neither is the template's end of turn (RLHFlow/LLaMA3-SFT is sampled with an extra stop token for that),
    no response would end.
    """
    source = local_folder(args.model_name_or_path)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    template.tokenizer.save_pretrained(folder)
    write_json(
        folder / "generation_config.json",
        generation_config(source, template),
    )
    for file in source.iterdir():
        if file.is_file() and not (folder / file.name).exists() and file.name not in OURS:
            os.symlink(file.resolve(), folder / file.name)
