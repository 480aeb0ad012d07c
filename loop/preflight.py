"""What can be known before an hour is spent: settings, paths, GPUs, memory, disk, templates, vocabularies, overlap.

`check(run)` prints what it found and refuses what cannot work, all problems at once. Models and data on the hub are looked
at where the hub answers; where not, it says what was left unchecked.
"""

import re
import shutil
import sys
from array import array
from pathlib import Path

from annotate_data import get_rewards
from annotate_data.functions import EXAMPLE
from common import trackers
from common.cli import UserError, build, check_model, existing_file, read_json
from common.devices import gpu_memory, visible_gpus
from common.functions import function_file
from common.progress import duration
from common.records import read_prompts, record_id
from dpo_iteration import memory, run_dpo
from dpo_iteration.settings import reason_for_trl
from generation import get_hf2
from loop.settings import gpu_groups, processes
from report.metrics import load_gold

# For the estimates, per GPU of the A100/H100 class. Assumed, not measured here; the README says how the sums are made.
PEAK_FLOPS = 312e12  # dense bf16 of an A100; an H100 has three times as much
TRAIN_SHARE, SCORE_SHARE = 0.35, 0.45  # of the peak that training and scoring reach
SAMPLED_TOKENS = 2500 * 8e9  # tokens/s × parameters of one engine with some hundred sequences
RESPONSE_TOKENS, PROMPT_TOKENS = 350, 200  # mean lengths of the recipe's data


def local_config(name):
    """config.json of a local model folder, else None."""
    path = Path(name) / "config.json"
    return read_json(path) if path.is_file() else None


def has_template(name):
    """Whether a local model folder carries a chat template."""
    folder = Path(name)
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(read_json(config).get("chat_template"))


def positions(name):
    """Positions that a local model was made for; None where its config does not say."""
    config = local_config(name) or {}
    shape = config.get("text_config") or config
    return shape.get("max_position_embeddings") or shape.get("n_positions")


def parameters(name, fallback=None):
    """Parameters of a model from the size of its weights, from `fallback` (billions), or None."""
    folder = Path(name)
    if folder.is_dir():
        config = local_config(name) or {}
        width = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
        size = sum(f.stat().st_size for pattern in ("*.safetensors", "pytorch_model*.bin") for f in folder.glob(pattern))
        return size / width or None
    return fallback * 1e9 if fallback else None


def estimate(count, prompts, samples, epochs, gpus):
    """Seconds of generation, annotation and training of one iteration; see the constants on top."""
    tokens = prompts * samples * RESPONSE_TOKENS
    scored = prompts * samples * (PROMPT_TOKENS + RESPONSE_TOKENS)
    trained = prompts * (PROMPT_TOKENS + 2 * RESPONSE_TOKENS)  # chosen and rejected share their prompt
    return (
        tokens * count / SAMPLED_TOKENS / gpus,
        2 * count * scored / (PEAK_FLOPS * SCORE_SHARE) / gpus,
        # FLOPs a parameter and token: forward and backward 6, recomputed activations 2; the reference's forward 2, once
        (8 * epochs + 2) * count * trained / (PEAK_FLOPS * TRAIN_SHARE) / gpus,
    )


def local_prompts(name, generation, others=()):
    """Hashes of a local prompt set's prompts, 8 bytes each; None for a set on the hub. `others` are the sets that have another part."""
    if not Path(name).exists() and not name.endswith((".jsonl", ".json", ".csv", ".parquet")):
        return None
    if not Path(name).exists():
        existing_file(name, "prompt set", others)
    key, split = generation.get("dataset_key"), generation.get("dataset_split", "train")
    try:
        return array("Q", (int(record_id(record["prompt"]), 16) for record in read_prompts(name, key, split)))
    except UserError as error:  # a script's flags are keys of the section here
        raise UserError(re.sub(r"--(dataset_\w+)", r"--generation.\1", str(error))) from None


class Findings:
    """Problems, all of which are told at once, and notes."""

    def __init__(self):
        self.problems, self.notes = [], []

    def attempt(self, function, *args):
        """What the function returns; None, and a problem more, where it raises a UserError."""
        try:
            return function(*args)
        except UserError as error:
            told = getattr(error, "problems", [str(error)])
            self.problems.extend(problem for problem in told if problem not in self.problems)  # two stages may be asked the same
            return None

    def tell(self, summary):
        """Print summary and notes; the problems instead, a line each, where there are any."""
        if self.problems:
            for problem in self.problems[:-1]:
                print(f"error: {problem}", file=sys.stderr)
            raise UserError(self.problems[-1])
        for line in (summary, *self.notes):
            print(f"check: {line}", file=sys.stderr)


def check_models(run, found):
    """Look at what every run has: the policy, the reward models, templates, the gold function, and the arguments of evaluation."""
    settings = run.settings
    found.problems.extend(settings.problems)
    for key in ("num_shards", "num_processes"):
        if getattr(settings, key) is not None and getattr(settings, key) < 1:
            raise UserError(f"{key} {getattr(settings, key)} must be at least 1")
    if settings.gold_function:
        found.attempt(load_gold, settings.gold_function)
    rewards = settings.reward_name_or_path or []
    if not rewards and not settings.annotation.get("reward_function"):
        found.problems.append("reward_name_or_path names no reward model, and annotation has no reward_function")
    if settings.annotation.get("reward_function"):
        # Its text alone: what it imports may be in environment vllm only.
        found.attempt(function_file, settings.annotation["reward_function"], "--reward_function", EXAMPLE, True)
    models = [("model_name_or_path", settings.model_name_or_path, settings.generation)]
    models += [("reward_name_or_path", name, settings.annotation) for name in rewards]
    judges = settings.eval_reward_model or []
    models += [("eval_reward_model", name, settings.eval_annotation) for name in judges]
    if judges and judges == rewards:
        found.problems.append(f"eval_reward_model {', '.join(judges)} is what training is rewarded by: name another one, or leave it out")
    found.attempt(trackers.check, settings.report_to, "report_to", trackers.FIGURES)
    found.attempt(check_model, settings.model_name_or_path, "model_name_or_path")
    for key, name, own in models:
        if Path(name).is_dir() and not found.attempt(has_template, name) and not own.get("chat_template"):
            found.problems.append(f"{key} {name} has no chat template: put a chat_template.jinja beside its tokenizer")
    found.attempt(gpu_groups, settings)
    found.attempt(run.check_sampling)
    found.attempt(check_positions, run, found)
    asked = found.attempt(lambda: build(get_rewards.Arguments, run.annotation([("generated", "rewarded")]), "annotation"))
    if asked:
        found.attempt(get_rewards.check, asked)
    if judges:
        asked = found.attempt(lambda: build(get_rewards.Arguments, run.judging([("generated", "judged")]), "eval_annotation"))
        if asked:
            found.attempt(get_rewards.check, asked)


def check_positions(run, found):
    """Note where prompts and responses may be longer than the policy's positions: generation caps what it samples."""
    limit = positions(run.settings.model_name_or_path)
    jobs = get_hf2.split_jobs(build(get_hf2.Arguments, run.generation(0, run.jobs(0)), "generation"))
    prompt, response = max(((job.max_input_length, job.max_new_tokens) for job in jobs), key=sum)
    if limit and prompt + response > limit:
        found.notes.append(f"the policy has {limit} positions, max_input_length {prompt} + max_new_tokens {response} are more: a response to a "
                           f"prompt of more than {max(0, limit - response)} tokens is cut off where they end")  # fmt: skip


def check_prompts(run, found):
    """Read the prompt sets and refuse an overlap with the held-out set.

    Returns:
        dict name → hashes of its prompts, None for a set on the hub; the held-out set is the last.
    """
    settings = run.settings
    sets = {name: found.attempt(local_prompts, name, settings.generation, [settings.heldout_prompts]) for name in settings.prompts}
    sets[settings.heldout_prompts] = found.attempt(local_prompts, settings.heldout_prompts, settings.generation | settings.heldout, settings.prompts)
    heldout = set(sets[settings.heldout_prompts] or [])
    for name in dict.fromkeys(settings.prompts):
        both = sum(prompt in heldout for prompt in sets[name] or [])
        if both and not settings.allow_overlap:
            where = f"the held-out set {settings.heldout_prompts}"
            found.problems.append(f"{both} prompts of {name} also stand in {where}; take them out or give --allow_overlap true")
    models = [settings.model_name_or_path, *(settings.reward_name_or_path or [])]
    unseen = [name for name, prompts in sets.items() if prompts is None] + [name for name in models if not Path(name).is_dir()]
    if unseen and not found.problems:
        found.notes.append(f"on the hub, not looked at: {', '.join(sorted(unseen))}")
    return sets


def check_gpus(run, found):
    """Refuse more processes than GPUs, and a large model without any; returns (visible GPUs, parameters of the policy or None)."""
    settings, gpus = run.settings, visible_gpus()
    if gpus and processes(settings) > len(gpus):
        found.problems.append(f"num_processes {processes(settings)}, but {len(gpus)} GPUs are visible")
    count = parameters(settings.model_name_or_path, settings.model_size_b)
    if count and count > 1.5e9 and not gpus:
        found.problems.append(f"{count / 1e9:.1f} billion parameters and no GPU: this run needs GPUs")
    return gpus, count


def check_disk(run, found, gib, what, instead):
    """Refuse less room than `gib` GiB where the run lies; `instead` says what to do."""
    folder = run.folder.absolute()
    free = shutil.disk_usage(next(p for p in [folder, *folder.parents] if p.exists())).free / 2**30
    found.notes.append(f"disk: about {gib:.1f} GiB for {what}, {free:.0f} GiB are free")
    if gib > free:
        found.problems.append(f"about {gib:.0f} GiB of disk are needed in {run.settings.run_dir} and {free:.0f} are free; {instead}")


def summary(run):
    """How many processes of what will be at work."""
    generators = "API servers" if run.settings.generation_backend == "servers" else "generation processes"
    where = "GPUs" if visible_gpus() else "CPU"
    return f"{len(gpu_groups(run.settings))} {generators}, {processes(run.settings)} training processes, {where}"


def check(run):
    """Print findings about a run of the loop and refuse what cannot work.

    Returns:
        the stages that have something left, as `Run.stages_left` names them.

    Raises:
        UserError: all problems, a line each.
    """
    settings, found = run.settings, Findings()
    if settings.iterations < 1 or not settings.prompts:
        raise UserError("iterations must be at least 1 and prompts name at least one set")
    if settings.keep_iterates is not None and settings.keep_iterates < 1:
        raise UserError(f"keep_iterates {settings.keep_iterates} must be at least 1")
    check_models(run, found)
    method = found.attempt(memory.method_of, settings.accelerate_config)
    training = found.attempt(run.training, 1)
    if training is not None:
        asked = found.attempt(run_dpo.arguments, training, settings.training)
        if asked:
            if reason_for_trl(*asked):
                found.attempt(run_dpo.accumulate, asked[0], processes(settings))
            if method in ("zero3", "zero3_offload", "fsdp2") and asked[0].load_in_4bit:
                instead = "take configs/zero2.yaml or ddp.yaml"
                found.problems.append(f"load_in_4bit does not work where weights are shared out ({settings.accelerate_config}): {instead}")
    left = None if found.problems else found.attempt(run.stages_left)
    sets = check_prompts(run, found)
    if settings.iterations > len(settings.prompts):
        found.notes.append(f"{settings.iterations} iterations take turns over {len(settings.prompts)} prompt sets; the samples differ, the prompts repeat")
    gpus, count = check_gpus(run, found)
    if count and method is not None:
        describe(run, count, method, gpus, sum(len(p) for p in sets.values() if p) or None, training or {}, found)
    found.tell("" if found.problems else summary(run))
    return left


def training_memory(name, count, method, world, training):
    """Bytes a GPU of the larger of training and the reference's pass, as `run_dpo.py --check true` says. `training`: arguments."""
    shape = memory.shape_of(name) if Path(name).is_dir() else memory.shape_like(count / 1e9)
    args = build(run_dpo.Arguments, {k: v for k, v in training.items() if k in run_dpo.Arguments.__dataclass_fields__}, "training")
    few, frozen = (shape.lora(args.lora_r), memory.FOUR_BITS if args.load_in_4bit else None) if args.use_peft else (None, None)
    how = {"checkpointing": args.gradient_checkpointing, "bf16": args.bf16, "trainable": few, "frozen": frozen}
    return memory.need(method, shape, world, args.per_device_train_batch_size, args.max_length, **how).total


def describe(run, count, method, gpus, local_size, training, found):
    """Memory, disk and hours against what there is, as notes; what certainly does not fit as problems."""
    settings, world = run.settings, processes(run.settings)
    there = gpu_memory()
    if gpus:
        needed = training_memory(settings.model_name_or_path, count, method, world, training) / memory.GIB
        found.notes.append(f"training: {method} over {world} processes takes about {needed:.0f} GiB a GPU; a GPU has {there or 0:.0f}")
        if there and needed > there * 0.95:
            instead = "configs/zero3.yaml, configs/training_lora.yaml or more GPUs"
            found.problems.append(f"training needs about {needed:.0f} GiB a GPU and a GPU has {there:.0f}; take {instead}")
    # An iterate in 2 bytes a parameter (4 on the CPU); while training, DeepSpeed's checkpoint of 14 bytes at most.
    kept = settings.iterations if settings.keep_iterates is None else settings.keep_iterates
    disk = (kept * (2 if gpus else 4) + (14 if training.get("save_steps") else 0)) * count / 2**30
    check_disk(run, found, disk, f"{kept} iterates", "see keep_iterates")
    if gpus:
        prompts = local_size / len(settings.prompts) if local_size else 20000
        parts = estimate(count, prompts, settings.generation.get("K", 8), float(training.get("num_train_epochs", 2)), len(gpus))
        found.notes.append(
            f"time: about {duration(sum(parts) * settings.iterations)} in all; an iteration of {prompts:.0f} prompts: generation {duration(parts[0])}, "
            f"annotation {duration(parts[1])}, training {duration(parts[2])} (estimate for A100s, see the README)"
        )
