"""What can be known before an hour is spent: settings, paths, GPUs, memory, disk, templates, vocabularies,
overlap.

`check(plan)` prints what it found and refuses what cannot work, all problems at once. Of models and data on
the hub it says what it could not look at; functions of the user's own are called once, on a made-up response.
"""

import math
import os
import re
import shutil
import sys
from array import array
from pathlib import Path

from annotate_data import get_rewards
from annotate_data.functions import EXAMPLE
from common import chat, models, trackers
from common.cli import UserError, build, existing_file, nearest
from common.cli import count as counted
from common.devices import gpu_memory, gpu_name
from common.functions import function_file
from common.models import check_policy, read_json
from common.progress import duration
from common.records import BadRecord, is_local, read_prompts, record_id, with_system
from dpo_iteration import arguments as dpo
from dpo_iteration import memory
from generation import get_hf2, sampling
from loop import changes
from loop.settings import decided, gpu_groups, gpus_of, processes
from loop.try_function import made_up, try_function

# For the estimates, per GPU. Assumed, not measured here; the README says how the sums are made.
SPEEDS = {  # dense bf16 TFLOPS and TB/s of memory, by the makers' data sheets, for what nvidia-smi calls so
    "A100": (312, 2.0),
    "H100": (989, 3.35),
    "H200": (989, 4.8),
    "L40S": (362, 0.86),
    "A10": (125, 0.6),
    "4090": (165, 1.0),
}
TRAIN_SHARE, SCORE_SHARE = 0.35, 0.45  # of the peak that training and scoring reach
SAMPLED_TOKENS = (
    2500 * 8e9 / 2.0
)  # tokens/s × parameters of one engine with some hundred sequences, for each TB/s of memory
# learning rate × steps; Adam moves no weight further. The recipe's is 1.6e-4, and half a bf16 step at a
# weight of 0.02 is 6e-5
LEAST_MOVE = 2e-5
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
    """Tokens of prompt and response that a local model can take; None where its config does not say."""
    return models.positions(local_config(name) or {})


def parameters(name, fallback=None):
    """Parameters of a model from the size of its weights, from `fallback` (billions), or None."""
    folder = Path(name)
    if folder.is_dir():
        config = local_config(name) or {}
        width = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
        size = sum(
            f.stat().st_size
            for pattern in ("*.safetensors", "pytorch_model*.bin")
            for f in folder.glob(pattern)
        )
        return size / width or None
    return fallback * 1e9 if fallback else None


def speed_of(name):
    """(key of SPEEDS, whether the GPU called `name` is one of those): an A100 stands in for others."""
    known = next((key for key in SPEEDS if re.search(rf"\b{key}\b", name or "")), None)
    return known or "A100", known is not None


def estimate(count, prompts, samples, epochs, gpus, kind="A100"):
    """Seconds of generation, annotation and training of one iteration on GPUs of a `kind` of SPEEDS; see the
    constants on top.
    """
    peak, memory_speed = SPEEDS[kind][0] * 1e12, SPEEDS[kind][1]
    tokens = prompts * samples * RESPONSE_TOKENS
    scored = prompts * samples * (PROMPT_TOKENS + RESPONSE_TOKENS)
    trained = prompts * (PROMPT_TOKENS + 2 * RESPONSE_TOKENS)  # chosen and rejected share their prompt
    return (
        tokens * count / (SAMPLED_TOKENS * memory_speed) / gpus,
        2 * count * scored / (peak * SCORE_SHARE) / gpus,
        # FLOPs a parameter and token: forward and backward 6, recomputed activations 2; the reference's
        # forward 2, once
        (8 * epochs + 2) * count * trained / (peak * TRAIN_SHARE) / gpus,
    )


class Template:
    """The chat template of a local model folder, for `chat.render`, without the seconds that loading a
    tokenizer takes.
    """

    def __init__(self, folder, path=None):
        folder = Path(folder)
        config = (
            read_json(folder / "tokenizer_config.json")
            if (folder / "tokenizer_config.json").is_file()
            else {}
        )
        tokens = {
            key: value.get("content") if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token")
        }
        self.tokens = {key: value for key, value in tokens.items() if isinstance(value, str)}
        self.name_or_path, self.chat_template = str(folder), config.get("chat_template")
        for file in (folder / "chat_template.json", folder / "chat_template.jinja"):
            if file.is_file():
                self.chat_template = (
                    read_json(file).get("chat_template")
                    if file.suffix == ".json"
                    else file.read_text(encoding="utf-8")
                )
        chat.use_template(self, path)

    def apply_chat_template(self, messages, tokenize=False, **given):
        from transformers.utils.chat_template_utils import render_jinja_template

        [text], _ = render_jinja_template(
            [messages], chat_template=self.chat_template, **(self.tokens | given)
        )
        return text


def template_of(name, generation):
    """The template that writes the prompts, or None where the model or several templates of it are out of
    reach.
    """
    if not Path(name).is_dir() or not (generation.get("chat_template") or has_template(name)):
        return None
    template = Template(name, generation.get("chat_template"))
    return template if isinstance(template.chat_template, str) else None


def local_prompts(name, generation, template=None, notes=None, others=()):
    """Hashes of a local prompt set's prompts, 8 bytes each; None for a set on the hub.

    Args:
        name: the set.
        generation: settings that say how its prompts are read and written.
        template: Template that must take them, or None.
        notes: list that gets a line where prompts cannot be used and will be skipped.
        others: the sets that have another part, which a wrong name is not meant for.

    Raises:
        UserError: the set cannot be read, none of its prompts can be used, or one cannot and `bad_prompts` is
            refuse.
    """
    if not is_local(name):
        return None
    if not Path(name).exists():
        existing_file(name, "prompt set", others)
    key, split = generation.get("dataset_key"), generation.get("dataset_split", "train")
    try:
        return _hashes(name, read_prompts(name, key, split, keep_bad=True), generation, template, notes)
    except UserError as error:  # a script's flags are keys of the section here
        raise UserError(re.sub(r"--(dataset_\w+)", r"--generation.\1", str(error))) from None


def _hashes(name, found, generation, template, notes):
    hashes, bad, first = array("Q"), 0, None
    for number, record in enumerate(found, 1):
        try:
            if isinstance(record, BadRecord):
                raise record
            if template is not None:
                messages = with_system(record["prompt"], generation.get("system_prompt"))
                try:
                    chat.render(
                        template, messages, True, generation.get("template_kwargs"), record.get("tools")
                    )
                except UserError as error:
                    raise UserError(f"{name} record {number}: {error}") from None
        except UserError as error:
            bad, first = bad + 1, first or error
            continue
        hashes.append(int(record_id(record["prompt"], tools=record.get("tools")), 16))
    if bad and (not hashes or generation.get("bad_prompts") == "refuse"):
        raise UserError(
            str(first) + (f"; {bad - 1} more prompts of {name} cannot be used" if bad > 1 else "")
        )
    if bad and notes is not None:
        notes.append(f"{bad} prompts of {name} cannot be used and will be skipped, the first: {first}")
    return hashes


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
            self.problems.extend(
                problem for problem in told if problem not in self.problems
            )  # two stages may be asked the same
            return None

    def tell(self, summary):
        """Print summary and notes; the problems instead, a line each, where there are any."""
        if self.problems:
            for problem in self.problems[:-1]:
                print(f"error: {problem}", file=sys.stderr)
            raise UserError(self.problems[-1])
        for line in (summary, *self.notes):
            print(f"check: {line}", file=sys.stderr)


def check_models(plan, found):
    """Look at what every run has: the policy, the reward models, templates, the gold function, and the
    arguments of evaluation.
    """
    settings = plan.settings
    if not settings.prompts:
        raise UserError("prompts name at least one set")
    found.problems.extend(settings.problems)
    found.problems.extend(decided(settings))
    for key in ("num_shards", "num_processes"):
        if getattr(settings, key) is not None and getattr(settings, key) < 1:
            raise UserError(f"{key} {getattr(settings, key)} must be at least 1")
    if settings.gold_function:
        found.attempt(function_file, settings.gold_function, "--gold_function", EXAMPLE, True)
    rewards = settings.reward_name_or_path or []
    if not rewards and not settings.annotation.get("reward_function"):
        found.problems.append(
            "reward_name_or_path names no reward model, and annotation has no reward_function"
        )
    if settings.annotation.get("reward_function"):
        # The texts alone: what they import may be in another environment, and what they print would reach the
        # driver.
        found.attempt(
            function_file, settings.annotation["reward_function"], "--reward_function", EXAMPLE, True
        )
    named = [("model_name_or_path", settings.model_name_or_path, settings.generation)]
    named += [("reward_name_or_path", name, settings.annotation) for name in rewards]
    judges = settings.eval_reward_model or []
    named += [("eval_reward_model", name, settings.eval_annotation) for name in judges]
    if judges and judges == rewards:
        found.problems.append(
            f"eval_reward_model {', '.join(judges)} is what training is rewarded by: name another one, or "
            "leave it out"
        )
    found.attempt(trackers.check, settings.report_to, "report_to", trackers.FIGURES)
    found.attempt(check_policy, settings.model_name_or_path, "model_name_or_path")
    if not gpus_of(settings):
        found.attempt(get_hf2.check_head_size, settings.model_name_or_path)
    for key, name, own in named:
        found.attempt(models.check_tokenizer_files, name)
        if Path(name).is_dir() and not found.attempt(has_template, name) and not own.get("chat_template"):
            found.problems.append(
                f"{key} {name} has no chat template: put a chat_template.jinja beside its tokenizer"
            )
        if not Path(name).is_dir():
            size = (
                f"; its size is taken to be model_size_b {settings.model_size_b}"
                if key == "model_name_or_path" and settings.model_size_b
                else ""
            )
            found.notes.append(
                f"on the hub, not looked at: {key} {name}: whether it is there and is of the right kind, its "
                "weights, chat template, "
                f"vocabulary, positions{size}"
            )
    found.attempt(gpu_groups, settings)
    found.attempt(check_sampling, plan, found)
    found.attempt(plan.check_servers)
    sections = {"annotation": ("reward_name_or_path", rewards)}
    if judges:
        sections["eval_annotation"] = ("eval_reward_model", judges)
    for section, (_, names) in sections.items():
        decided_ones = {"reward_name_or_path": names} if names else {}
        decided_ones |= {"dataset_name_or_path": ["generated"], "output_dir": ["rewarded"]}
        asked = found.attempt(plan.annotation, getattr(settings, section), section)
        asked = found.attempt(build, get_rewards.Arguments, asked | decided_ones, section) if asked else None
        if asked:
            found.attempt(get_rewards.check, asked)


def refuse_unknown(given: dict, known: tuple, section: str):
    """Refuse keys of a section that are none of `known`."""
    for key in given:
        if key not in known:
            raise UserError(
                f"unknown key {key!r} in {section}{nearest(key, known)}; there are {', '.join(known)}"
            )


def check_sampling(plan, found):
    """Refuse wrong sampling arguments, of the responses and of the held-out answers."""
    for job in plan.jobs():
        try:
            sampling.check_sampling(job)
        except UserError as error:  # a script's flags are keys of the section here
            raise UserError(re.sub(r"--(\w+)", r"--generation.\1", str(error))) from None
    check_positions(plan, found)


def check_functions(plan, found):
    """Call the run's own functions on a made-up response to the first prompt of each set whose answers they
    are to judge.
    """
    settings = plan.settings
    heldout = [] if settings.heldout_prompts is None else [settings.heldout_prompts]
    sets = [*dict.fromkeys(settings.prompts), *heldout]
    vllm = (
        Path(os.environ.get("RLHF_VLLM_ENV", "")) / "bin" / "python"
    )  # of the environment that annotation runs in
    asked = [("annotation.reward_function", "reward", settings.annotation.get("reward_function"), sets, vllm)]
    asked += [
        (
            "eval_annotation.reward_function",
            "reward",
            settings.eval_annotation.get("reward_function"),
            heldout,
            vllm,
        )
    ]
    asked += [("gold_function", "gold", settings.gold_function, heldout, Path(sys.executable))]
    for key, kind, spec, names, python in asked:
        records = {name: first_prompt(name, plan) for name in names if spec}
        for name, record in records.items():
            if record is None:
                found.notes.append(f"{key} {spec} was not tried on {name}, which is on the hub")
            elif not python.is_file():
                found.notes.append(
                    f"{key} {spec} was not tried: environment vllm, in which it will run, is not there yet"
                )
                break
            else:
                try:
                    told = try_function(kind, spec, [made_up(record)], str(python))
                except TimeoutError as error:
                    found.notes.append(f"{key}: {error}; it was not waited for")
                    break
                if told:
                    found.problems.append(
                        f"{key}, tried on a made-up response to the first prompt of {name}: {told}"
                    )
                    break


def first_prompt(name, plan):
    """The first record of a local prompt set, None for a set on the hub."""
    generation = plan.settings.generation | (
        plan.settings.heldout if name == plan.settings.heldout_prompts else {}
    )
    if not is_local(name):
        return None
    return next(
        iter(
            read_prompts(
                name,
                generation.get("dataset_key"),
                generation.get("dataset_split", "train"),
                generation.get("system_prompt"),
            )
        ),
        None,
    )


def check_positions(plan, found):
    """Note where prompts and responses may be longer than the policy's positions: generation caps what it
    samples.
    """
    limit = positions(plan.settings.model_name_or_path)
    prompt, response = max(
        ((job.max_input_length, job.max_new_tokens) for job in plan.jobs()), key=sum, default=(0, 0)
    )
    if limit and prompt + response > limit:
        found.notes.append(
            f"the policy has {limit} positions, max_input_length {prompt} + max_new_tokens {response} are "
            "more: "
            + (
                f"a response to a prompt of more than {limit - response} tokens is cut off where they end"
                if limit > response
                else "lower generation.max_new_tokens, or every response may be cut off where they end"
            )
        )


def check_prompts(plan, found):
    """Read the prompt sets and refuse an overlap with the held-out set.

    Returns:
        dict name → hashes of its prompts, None for a set on the hub; the held-out set, if any, is the last.
    """
    settings = plan.settings
    own = dict.fromkeys(settings.prompts, settings.generation)
    if settings.heldout_prompts is not None:  # the last, also where it is a training set too
        own[settings.heldout_prompts] = settings.generation | settings.heldout
    sets = {}
    for name, generation in own.items():
        template = found.attempt(template_of, settings.model_name_or_path, generation)
        sets[name] = found.attempt(
            local_prompts, name, generation, template, found.notes, own.keys() - {name}
        )
    heldout = set(sets.get(settings.heldout_prompts) or [])
    for name in dict.fromkeys(settings.prompts):
        both = sum(prompt in heldout for prompt in sets[name] or [])
        if both and not settings.allow_overlap:
            where = f"the held-out set {settings.heldout_prompts}"
            found.problems.append(
                f"{both} prompts of {name} also stand in {where}; take them out or give --allow_overlap true"
            )
    unseen = [name for name, prompts in sets.items() if prompts is None]
    if unseen and not found.problems:
        found.notes.append(
            f"on the hub, not looked at: {', '.join(unseen)}: whether they are there, their columns, their "
            "number of prompts, and whether "
            "held-out prompts stand among the others"
        )
    return sets


def check_gpus(plan, found):
    """Refuse more processes than GPUs, and a large model without any; returns (visible GPUs, parameters of
    the policy or None).
    """
    settings, gpus = plan.settings, gpus_of(plan.settings)
    if gpus and processes(settings) > len(gpus):
        found.problems.append(f"num_processes {processes(settings)}, but {len(gpus)} GPUs are visible")
    count = parameters(settings.model_name_or_path, settings.model_size_b)
    if count and count > 1.5e9 and not gpus:
        found.problems.append(f"{count / 1e9:.1f} billion parameters and no GPU: this run needs GPUs")
    return gpus, count


def check_disk(plan, found, gib, what, instead):
    """Refuse less room than `gib` GiB where the run lies; `instead` says what to do."""
    folder = plan.folder.path.absolute()
    free = shutil.disk_usage(next(p for p in [folder, *folder.parents] if p.exists())).free / 2**30
    found.notes.append(
        f"disk: about {gib:.1f} GiB for {what}, {free:.0f} GiB are "
        f"free{' here' if plan.settings.num_gpus else ''}"
    )
    if gib > free and not plan.settings.num_gpus:  # a plan is for another machine
        found.problems.append(
            f"about {gib:.0f} GiB of disk are needed in {plan.settings.run_dir} and {free:.0f} are free; "
            f"{instead}"
        )


def check_learning(plan, asked, sets, found):
    """Note a training that can hardly change the policy: few steps at a small rate, or bf16 where there is no
    GPU.

    Args:
        asked: arguments of run_dpo.py for iteration 1.
        sets: as `check_prompts` returns.
    """
    args = asked
    counts = [len(sets[name]) for name in plan.settings.prompts if sets.get(name)]
    if counts:
        pairs = round(min(counts) * args.pairs_per_prompt * (1 - args.eval_fraction))
        per_step = dpo.halved(
            dpo.pairs_per_step(args, processes(plan.settings)), pairs, args, processes(plan.settings)
        )
        steps = (
            args.max_steps
            if args.max_steps > 0
            else math.ceil(math.ceil(pairs / per_step) * args.num_train_epochs)
        )
        move = steps * args.learning_rate
        if move < LEAST_MOVE:
            found.notes.append(
                f"warning: this run will hardly learn: an iteration of {min(counts)} prompts has at most "
                f"{steps} optimizer steps, and at learning_rate "
                f"{args.learning_rate:g} they move a weight by {move:.0e} at most, which bf16 rounds away; "
                "raise --training_args.learning_rate "
                "(5e-7 is for 8 billion parameters and some hundred steps) or num_train_epochs, or give "
                "more prompts"
            )
    if args.bf16 and not gpus_of(plan.settings):
        found.notes.append(
            "warning: bf16 on a CPU is slow, and what training changes is rounded when the policy is saved: "
            "give --training_args.bf16 false"
        )


def summary(plan):
    """How many processes of what will be at work."""
    generators = "API server" if plan.settings.generation_backend == "servers" else "generation process"
    where = "GPUs" if gpus_of(plan.settings) else "CPU"
    return (
        f"{counted(len(gpu_groups(plan.settings)), generators)}, "
        f"{counted(processes(plan.settings), 'training process')}, {where}"
    )


def check(plan, left):
    """Print findings about a run of the loop and refuse what cannot work.

    Args:
        left: whether anything is left to do.

    Raises:
        UserError: all problems, a line each.
    """
    settings, found = plan.settings, Findings()
    if settings.keep_iterates is not None and settings.keep_iterates < 1:
        raise UserError(f"keep_iterates {settings.keep_iterates} must be at least 1")
    check_models(plan, found)
    if plan.settings.generation.get("K") == 1:
        found.problems.append(
            "generation.K 1 leaves no pairs to train on: 2 responses a prompt are the least, 8 are usual"
        )
    method = found.attempt(memory.method_of, settings.accelerate_config)
    training, asked = found.attempt(plan.training_of, 1), None
    if training is not None:
        asked = found.attempt(dpo.arguments, training, settings.training)
        if asked:
            if dpo.reason_for_trl(asked):
                world = processes(settings)
                found.attempt(dpo.accumulation, asked, dpo.pairs_per_step(asked, world), world)
            if method in ("zero3", "zero3_offload", "fsdp2") and asked.load_in_4bit:
                instead = "take configs/zero2.yaml or ddp.yaml"
                found.problems.append(
                    "load_in_4bit does not work where weights are shared out "
                    f"({settings.accelerate_config}): {instead}"
                )
    if not found.problems:
        found.attempt(changes.refuse, plan, plan.resolved())
    sets = check_prompts(plan, found)
    if settings.iterations > len(settings.prompts):
        found.notes.append(
            f"{settings.iterations} iterations take turns over {len(settings.prompts)} prompt sets; the "
            "samples differ, the prompts repeat"
        )
    gpus, count = check_gpus(plan, found)
    if count and method is not None:
        describe(
            plan,
            count,
            method,
            gpus,
            sum(len(p) for p in sets.values() if p) or None,
            asked if asked else None,
            found,
        )
    if asked and not found.problems:
        check_learning(plan, asked, sets, found)
    conclude(plan, left, found, summary(plan) if not found.problems else "")


def conclude(plan, left, found, summary):
    """Try the run's functions where something is left to do, and tell what was found."""
    if left and not found.problems:
        check_functions(plan, found)
    if (
        found.problems
        and plan.planning
        and plan.settings.setup_command
        and not Path(plan.settings.model_name_or_path).exists()
    ):
        found.problems.append(
            "what is missing may be what the setup command makes, which --check and --dry_run do not run: "
            f"{plan.settings.setup_command}"
        )
    found.tell(summary)


def check_memory(plan, count, method, args, found):
    """Tell what training takes of a GPU, as `run_dpo.py --check true` does, and refuse what does not fit.

    `args`: of run_dpo.py.
    """
    name, world, there = (
        plan.settings.model_name_or_path,
        processes(plan.settings),
        plan.settings.gpu_memory_gib or gpu_memory(),
    )
    shape = memory.shape_of(name) if Path(name).is_dir() else memory.shape_like(count / 1e9)
    few, frozen = (
        (shape.lora(args.lora_r), memory.FOUR_BITS if args.load_in_4bit else None)
        if args.use_peft
        else (None, None)
    )
    how = {
        "checkpointing": args.gradient_checkpointing,
        "bf16": args.bf16,
        "trainable": few,
        "frozen": frozen,
    }
    needed = memory.need(method, shape, world, args.per_device_train_batch_size, args.max_length, **how).total
    if not there:
        found.notes.append(
            f"training: {method} over {world} processes takes about {needed / memory.GIB:.0f} GiB a GPU"
        )
        return
    limit = memory.usable(there)
    has = f"a GPU has {there:.0f}, {limit / memory.GIB:.0f} of which may be filled"
    found.notes.append(
        f"training: {method} over {world} processes takes about {needed / memory.GIB:.0f} GiB a GPU; {has}"
    )
    if needed > limit:
        found.problems.append(
            f"training needs about {needed / memory.GIB:.0f} GiB a GPU by {plan.settings.accelerate_config} "
            "with per_device_train_batch_size "
            f"{args.per_device_train_batch_size}, and {has}; "
            f"{memory.remedy(args, shape, world, limit, **how)}"
        )


def describe(plan, count, method, gpus, local_size, args, found):
    """Memory, disk and hours against what there is, as notes; what certainly does not fit as problems.

    `args`: of run_dpo.py, or None.
    """
    settings = plan.settings
    if gpus and args is not None:
        check_memory(plan, count, method, args, found)
    # An iterate in 2 bytes a parameter (4 on the CPU), and what training keeps meanwhile.
    kept = settings.iterations if settings.keep_iterates is None else settings.keep_iterates
    name, trained = settings.model_name_or_path, count
    if args and args.use_peft:
        trained = (memory.shape_of(name) if Path(name).is_dir() else memory.shape_like(count / 1e9)).lora(
            args.lora_r
        )
    disk = (
        kept * (2 if gpus else 4) * count + (memory.checkpoint_bytes(args, trained) if args else 0)
    ) / 2**30
    what = f"{kept} iterates" + (
        f" and {args.save_total_limit + 1} checkpoints" if args and args.save_steps else ""
    )
    check_disk(plan, found, disk, what, "see keep_iterates, save_steps and save_total_limit")
    if gpus:
        prompts = local_size / len(settings.prompts) if local_size else 20000
        name = gpu_name() if settings.num_gpus is None else None
        kind, known = speed_of(name)
        whose = f"{kind}s" if known or not name else f"A100s: nothing is known here of the {name}"
        parts = estimate(
            count,
            prompts,
            settings.generation.get("K", 8),
            args.num_train_epochs if args else 2,
            len(gpus),
            kind,
        )
        found.notes.append(
            f"time: about {duration(sum(parts) * settings.iterations)} in all without evaluations; an "
            f"iteration of {prompts:.0f} prompts: "
            f"generation {duration(parts[0])}, annotation {duration(parts[1])}, training "
            f"{duration(parts[2])} (an estimate for {whose}; see docs/performance.md)"
        )
