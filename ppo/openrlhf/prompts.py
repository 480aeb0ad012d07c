"""What OpenRLHF reads: the prompts as one file of templated text, and the policy as a folder with the right
stop tokens.
"""

import collections
import json
import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from common import models, records
from common.cli import UserError, one_line
from common.manifest import write_json, write_jsonl
from dpo_iteration.saved import generation_config
from ppo.inputs import rendered_prompts
from ppo.openrlhf.arguments import Arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files that are not linked from the policy's folder: the tokenizer is saved with our template.
OURS = (
    "README.md",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    models.TEKKEN,
)


def load_tokenizer(
    name: str, trust_remote_code: bool = False, chat_template: str | None = None
) -> "PreTrainedTokenizerBase":
    """A model's tokenizer, with the chat template of the file `chat_template` where one is given."""
    tokenizer = models.load_tokenizer(name, trust_remote_code=trust_remote_code, chat_template=chat_template)
    if not tokenizer.chat_template:
        raise UserError(
            f"model_name_or_path {name} has no chat template: put a chat_template.jinja in its folder or "
            "set chat_template to a file"
        )
    return tokenizer


def read_all(args: Arguments, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[dict], list[dict]]:
    """(records to write: every prompt of all sets in order; entries of the skipped file)."""
    kept, skipped, bad, seen = [], [], [], set()
    for record, text in rendered_prompts(args, tokenizer, bad):
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokens > args.max_input_length:
            skipped.append({"id": record["id"], "reason": "too long", "tokens": tokens})
            continue
        twin = record["id"] in seen  # the same prompt in two sets
        key = f"{record['id']}-{len(seen)}" if twin else record["id"]
        seen.add(key)
        # In the label as text: the reward functions' record, which OpenRLHF hands through untouched.
        kept.append({"prompt": text, "label": records.dumps(record | {"id": key})})
    unusable = [{"id": e["id"], "reason": "cannot be used", "detail": e["reason"]} for e in bad]
    return kept, unusable + skipped


def whole_rollouts(args: Arguments, kept: list) -> tuple[list, list, int]:
    """(prompts of whole rollouts in a fixed random order, those left over, passes over them) within
    `max_rollouts`.
    """
    kept = list(kept)
    random.Random(args.seed).shuffle(kept)
    rollouts, episodes = len(kept) // args.rollout_batch_size, args.num_episodes
    if not rollouts:
        raise UserError(
            f"{len(kept)} prompts of {', '.join(args.dataset_name_or_path)} are fewer than "
            f"rollout_batch_size {args.rollout_batch_size}; lower it"
        )
    if args.max_rollouts is not None:
        rollouts = min(rollouts, args.max_rollouts)
        episodes = min(episodes, max(1, args.max_rollouts // rollouts))
    cut = rollouts * args.rollout_batch_size
    return kept[:cut], kept[cut:], episodes


def write_prompts(args: Arguments, tokenizer: "PreTrainedTokenizerBase", path: Path) -> dict:
    """Write the prompts file and its `.skipped.jsonl`; returns counts: prompts, skipped by reason, episodes,
    rollouts.
    """
    kept, skipped = read_all(args, tokenizer)
    chosen, left, episodes = whole_rollouts(args, kept)
    reason = "beyond max_rollouts or in no whole rollout"
    skipped += [{"id": json.loads(entry["label"])["id"], "reason": reason} for entry in left]
    write_jsonl(path, chosen)
    write_jsonl(path.with_name("prompts.skipped.jsonl"), skipped)
    return {
        "prompts": len(chosen),
        "skipped": dict(collections.Counter(entry["reason"] for entry in skipped)),
        "episodes": episodes,
        "rollouts": len(chosen) // args.rollout_batch_size * episodes,
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


def prepare_policy(args: Arguments, tokenizer: "PreTrainedTokenizerBase", folder: Path):
    """Put the policy into `folder`: links to its weights, our tokenizer with its template, a generation
    config that stops.

    OpenRLHF samples until vLLM's stop tokens, which are the EOS and what generation_config.json names. Where
    neither is the template's end of turn (RLHFlow/LLaMA3-SFT is sampled with an extra stop token for that),
    no response would end.
    """
    source = local_folder(args.model_name_or_path)
    if not any(source.glob("*.safetensors")) and not any(source.glob("pytorch_model*.bin")):
        raise UserError(f"model_name_or_path {args.model_name_or_path} holds no weights (*.safetensors)")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    write_json(folder / "generation_config.json", generation_config(source, tokenizer))
    for file in source.iterdir():
        if file.is_file() and not (folder / file.name).exists() and file.name not in OURS:
            os.symlink(file.resolve(), folder / file.name)
