"""Memory, disk and hours of a run, estimated before it starts and held against what there is."""

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import count as plural
from common.devices import Speed, gpu_memory, gpu_name, speed_of
from common.models import local_config
from common.progress import duration
from dpo_iteration import fitting, memory
from dpo_iteration.arguments import Arguments
from dpo_iteration.losses import needs_mismatched, needs_reference, needs_rejected
from loop.machines import machine_count
from loop.settings import processes

if TYPE_CHECKING:
    from loop.check import Findings
    from loop.plan import Plan

# For the estimates, per GPU. Assumed, not measured here; docs/performance.md says how the sums are made.
TRAIN_SHARE, SCORE_SHARE = 0.35, 0.45  # of the peak that training and scoring reach
# tokens/s × parameters of one engine with some hundred sequences, for each TB/s of memory
SAMPLED_TOKENS = 2500 * 8e9 / 2.0
RESPONSE_TOKENS, PROMPT_TOKENS = 350, 200  # mean lengths of the recipe's data


def parameters(name: str, fallback: float | None = None) -> float | None:
    """Parameters of a model from the size of its weights, from `fallback` (billions), or None."""
    folder = Path(name)
    if folder.is_dir():
        config = local_config(name) or {}
        width = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
        files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
        return sum(f.stat().st_size for f in files) / width or None
    return fallback * 1e9 if fallback else None


def estimate(
    count: float,
    prompts: float,
    samples: int,
    epochs: float,
    gpus: int,
    kind: Speed,
    recompute: bool,
    losses: list[str],
) -> tuple[float, float, float]:
    """Seconds of generation, annotation and training of one iteration on GPUs of a `kind`; see the constants
    on top. `recompute`: whether activations are. `losses`: of training.
    """
    peak, memory_speed = kind.tflops * 1e12, kind.tb_per_s
    tokens = prompts * samples * RESPONSE_TOKENS
    scored = prompts * samples * (PROMPT_TOKENS + RESPONSE_TOKENS)
    # Chosen and rejected, where there is one, share their prompt.
    trained = prompts * (PROMPT_TOKENS + (1 + needs_rejected(losses)) * RESPONSE_TOKENS)
    passes = (8 if recompute else 6) * epochs + 2 * needs_reference(losses)
    passes += 2 * (epochs + 1) * needs_mismatched(losses)  # forward, of the policy and of the reference
    return (
        tokens * count / (SAMPLED_TOKENS * memory_speed) / gpus,
        2 * count * scored / (peak * SCORE_SHARE) / gpus,
        # `passes`, FLOPs a parameter and token: forward and backward 6, recomputed activations 2; the
        # reference's forward 2, once
        passes * count * trained / (peak * TRAIN_SHARE) / gpus,
    )


def check_disk(plan: "Plan", found: "Findings", gib: float, what: str, instead: str):
    """Refuse less room than `gib` GiB where the run lies; `instead` says what to do."""
    folder = plan.folder.path.absolute()
    free = shutil.disk_usage(next(p for p in [folder, *folder.parents] if p.exists())).free / 2**30
    planned = plan.settings.num_gpus is not None  # for another machine
    here = f" here{': too few for a run here' * (gib > free)}" if planned else ""
    found.notes.append(f"disk: about {gib:.1f} GiB for {what}, {free:.0f} GiB are free{here}")
    if gib > free and not planned:
        found.problems.append(
            f"about {gib:.0f} GiB of disk are needed in {plan.settings.run_dir} and {free:.0f} are free; "
            f"{instead}"
        )


def shape_of(name: str, count: float) -> memory.Shape:
    """The shape of a local model, else that of a model with as many parameters."""
    return memory.shape_of(name) if Path(name).is_dir() else memory.shape_like(count / 1e9)


def check_memory(plan: "Plan", count: float, method: str, args: Arguments, found: "Findings") -> bool:
    """Tell what training takes of a GPU, as `run_dpo.py --check true` does, and refuse what does not fit.
    Returns whether activations are recomputed. `args`: of run_dpo.py.
    """
    settings, world, batch = plan.settings, processes(plan.settings), args.per_device_train_batch_size
    there, shape = settings.gpu_memory_gib or gpu_memory(), shape_of(settings.model_name_or_path, count)
    limit, how = fitting.usable(there) if there else math.inf, fitting.adapted(args, shape)
    on, tokens = fitting.choose(args, method, shape, world, limit if there else None, **how)
    needed = memory.need(method, shape, world, tokens / 2, 1, on, **how).total
    takes = f"about {needed / memory.GIB:.0f} GiB a GPU"
    has = f"a GPU has {there:.0f}, {limit / memory.GIB:.0f} of which may be filled" if there else ""
    found.notes.append(
        f"training: {method} over {world} processes takes {takes} with rows of {tokens:,} tokens, gradient "
        f"checkpointing {'on' if on else 'off'}{has and '; '}{has}"
    )
    how["checkpointing"] = on
    if needed > limit:
        found.problems.append(
            f"training needs {takes} by {settings.accelerate_config} with per_device_train_batch_size "
            f"{batch}, and {has}; {fitting.remedy(args, shape, world, limit, **how)}"
        )
    return on


def reward_models(plan: "Plan", count: float) -> float:
    """Bytes of the run's reward models; one whose size is not known is taken to be as large as the policy."""
    names = plan.settings.reward_name_or_path or []
    return 2 * sum(parameters(name, count / 1e9) or count for name in names)


def trained_parameters(plan: "Plan", count: float, args: Arguments) -> float:
    """Parameters that are trained: all of the policy's, or those of its adapters."""
    return shape_of(plan.settings.model_name_or_path, count).lora(args.lora_r) if args.use_peft else count


def check_memory_online(plan: "Plan", count: float, method: str, args: Arguments, found: "Findings"):
    """The same of a GPU that trains online, where reference and reward models stay beside the policy, and
    rows and recomputing are as `args` have them.
    """
    settings, world = plan.settings, plan.training_processes()
    there, shape = settings.gpu_memory_gib or gpu_memory(), shape_of(settings.model_name_or_path, count)
    how = fitting.adapted(args, shape)
    on, tokens = fitting.choose(args, method, shape, world, None, **how)
    names, scorers = settings.reward_name_or_path or [], reward_models(plan, count)
    taken = "" if all(Path(name).is_dir() for name in names) else ", taken to be as large as the policy"
    needed = memory.need(method, shape, world, tokens / 2, 1, on, **how)
    total, limit = needed.together + scorers, fitting.usable(there) if there else math.inf
    takes = f"about {total / memory.GIB:.0f} GiB a GPU"
    has = f"a GPU has {there:.0f}, {limit / memory.GIB:.0f} of which may be filled" if there else ""
    found.notes.append(
        f"training: {method} over {world} processes takes {takes} with rows of {tokens:,} tokens, gradient "
        f"checkpointing {'on' if on else 'off'}; the reference has {needed.reference / memory.GIB:.0f} of "
        f"it, {plural(len(names), 'reward model')} {scorers / memory.GIB:.0f}{taken}{has and '; '}{has}"
    )
    if total > limit:
        other = "" if method == "zero3" else "configs/zero3.yaml, "
        found.problems.append(
            f"online training needs {takes} by {settings.accelerate_config}, policy, reference and reward "
            f"models together, and {has}; take {other}a smaller max_row_tokens or max_length, or fewer "
            "sampling_gpus"
        )


def online_seconds(
    count: float, prompts: int, samples: int, sampling: int, training: int, kind: Speed, losses: list[str]
) -> tuple[float, float, float]:
    """Seconds of sampling, scoring and training of a round, each on so many GPUs, activations recomputed."""
    given = count, prompts, samples, 1
    generation, _, _ = estimate(*given, sampling, kind, True, losses)
    return generation, *estimate(*given, training, kind, True, losses)[1:]


def hours_online(
    plan: "Plan", count: float, rounds: int, prompts: int, staleness: int, losses: list[str]
) -> str:
    """Tell how long the rounds take: the servers' GPUs sample while the others score and train, or wait."""
    kind, whose = speed_here(plan)
    gpus = sum(len(group.split(",")) for group in plan.sampling_groups()), len(plan.training_gpus())
    sampling, *training = online_seconds(count, prompts, plan.generation()["K"], *gpus, kind, losses)
    a_round = max(sampling, sum(training)) if staleness else sampling + sum(training)
    scoring, learning = map(duration, training)
    side = "beside it" if staleness else "then"
    return (
        f"time: about {duration(a_round * rounds)} in all without evaluations, starts and sending; a "
        f"round of {prompts} prompts: sampling {duration(sampling)}, {side} scoring {scoring} and "
        f"training {learning} (an estimate for {whose}; see docs/performance.md)"
    )


def speed_here(plan: "Plan") -> tuple[Speed, str]:
    """(speed of the GPUs that the plan is for, their name in words)."""
    name = gpu_name() if plan.settings.num_gpus is None else None
    kind, known = speed_of(name)
    return kind, f"{kind.name}s" if known or not name else f"A100s: nothing is known here of the {name}"


def describe(
    plan: "Plan",
    count: float,
    method: str,
    gpus: list[str],
    local_size: int | None,
    args: Arguments | None,
    found: "Findings",
):
    """Memory, disk and hours against what there is, as notes; what certainly does not fit as problems.

    `args`: of run_dpo.py, or None.
    """
    settings, recompute = plan.settings, True
    if gpus and args is not None:
        recompute = check_memory(plan, count, method, args, found)
    # An iterate in 2 bytes a parameter (4 on the CPU), and what training keeps meanwhile.
    kept = plan.kept_iterates() or settings.iterations
    disk, what = kept * (2 if gpus else 4) * count, plural(kept, "iterate")
    if args and args.save_steps:
        what += f" and {args.save_total_limit + 1} checkpoints"
        disk += memory.checkpoint_bytes(args, trained_parameters(plan, count, args))
    check_disk(plan, found, disk / 2**30, what, "see keep_iterates, save_steps and save_total_limit")
    if gpus:
        prompts = local_size / len(settings.prompts) if local_size else 20000
        kind, whose = speed_here(plan)
        samples, epochs = plan.generation()["K"], args.num_train_epochs if args else 2
        world = machine_count(settings) * len(gpus)
        losses = args.loss_type if args else ["sigmoid"]
        parts = estimate(count, prompts, samples, epochs, world, kind, recompute, losses)
        generation, annotation, training = map(duration, parts)
        found.notes.append(
            f"time: about {duration(sum(parts) * settings.iterations)} in all without evaluations; an "
            f"iteration of {prompts:.0f} prompts: generation {generation}, annotation {annotation}, training "
            f"{training} (an estimate for {whose}; see docs/performance.md)"
        )
