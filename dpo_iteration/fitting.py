"""Which way of training fits the GPUs there are: the method, rows and checkpointing that are chosen from the
sums of memory.py, and what `--check true` prints.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from common.cli import UserError
from common.devices import gpu_memory
from common.training import say, world_size
from dpo_iteration.adapters import method_here
from dpo_iteration.losses import needs_reference
from dpo_iteration.memory import FOUR_BITS, GIB, RESERVED, Shape, need, shape_like, shape_of

if TYPE_CHECKING:
    from dpo_iteration.arguments import Arguments

# share of what a GPU reports that a plan may fill: what is left is for what the sums do not know. Assumed,
# not measured
USABLE = 0.95
# and the share of that which is filled by what we choose ourselves: larger rows, activations that are kept
CHOSEN = 0.95
ROWS = (16384, 8192)  # tokens of a packed row that are tried
# GiB that nvidia-smi reports of cards sold with 16, 24 and 48 GB whose error correction takes a sixteenth of
# it (T4; A10, L4; A40, L40S)
REPORTED = {16: 15.0, 24: 22.5, 48: 45.0}
METHODS = ("ddp", "zero2", "zero3", "fsdp2", "zero3_offload")  # configs/METHOD.yaml, the fastest first
WHOLE = ("ddp", "zero2")  # those that hold the weights whole: the only ones for weights in 4 bits


def choose(
    args: "Arguments", method: str, shape: Shape, processes: int, memory: float | None, **how: object
) -> tuple[bool, int]:
    """(gradient checkpointing, tokens of a packed row) of a training: as `args` have them, and where they
    leave it open what is fastest of what fits a GPU of `memory` bytes.

    Recomputing costs a third of the arithmetic; larger rows save passes, each of which adds up gradients over
    all GPUs. Where nothing fits or is known: recompute, and rows as large as padded pairs.
    """
    asked, least = args.gradient_checkpointing, 2 * args.per_device_train_batch_size * args.max_length
    larger = [] if args.share_prompts is False else [tokens for tokens in ROWS if tokens > least]
    sizes = [args.max_row_tokens] if args.max_row_tokens else [*larger, least]
    for on in [False, True] if asked is None else [asked]:
        for tokens in sizes:
            needed = need(method, shape, processes, tokens / 2, 1, on, **how).total
            if memory and needed <= CHOSEN * memory:
                return on, tokens
    return asked is not False, sizes[-1]


def adapted(args: "Arguments", shape: Shape) -> dict:
    """What `need` is told of adapters, of precision, and of the reference."""
    return {
        "bf16": args.bf16,
        "trainable": shape.lora(args.lora_r) if args.use_peft else None,
        "frozen": FOUR_BITS if args.use_peft and args.load_in_4bit else None,
        "reference": needs_reference(args.loss_type),
    }


def usable(gib: float) -> float:
    """Bytes that a plan may fill of a GPU of `gib` GiB, as sold or as reported."""
    return USABLE * REPORTED.get(gib, gib) * GIB


def fit_to_memory(args: "Arguments") -> "Arguments":
    """The arguments with rows and gradient checkpointing chosen for the GPUs that are here, where they are
    left open.
    """
    gib = gpu_memory()
    if not gib or (args.gradient_checkpointing is not None and args.max_row_tokens):
        return replace(args, gradient_checkpointing=args.gradient_checkpointing is not False)
    try:
        shape = shape_of(args.model_name_or_path, args.revision, args.trust_remote_code)
    except UserError as error:  # a model may train all the same
        say(f"note: rows and gradient checkpointing as on a small GPU: {error}")
        return replace(args, gradient_checkpointing=args.gradient_checkpointing is not False)
    how, limit = adapted(args, shape), usable(gib)
    on, tokens = choose(args, method_here(), shape, world_size(), limit, **how)
    say(f"rows of {tokens:,} tokens, gradient checkpointing {'on' if on else 'off'}, for {gib:.0f} GiB a GPU")
    return replace(args, gradient_checkpointing=on, max_row_tokens=tokens)


def recommend(
    shape: Shape, processes: int, memory: float, global_batch_size: int, max_length: int, **how: object
) -> tuple[str, int] | None:
    """(method, pairs per GPU) of the first of METHODS that fits into `memory` bytes, with as many pairs as
    fit; else None.

    The pairs are a power of two, 8 at most (more fill no GPU better), so that `global_batch_size` divides by
    pairs × processes.
    """
    sizes = [size for size in (8, 4, 2, 1) if global_batch_size % (size * processes) == 0] or [1]
    for method in WHOLE if how.get("frozen") == FOUR_BITS else METHODS:
        for size in sizes:
            if need(method, shape, processes, size, max_length, **how).total <= memory:
                return method, size
    return None


def remedy(args: "Arguments", shape: Shape, processes: int, memory: float, **how: object) -> str:
    """What would make training fit into `memory` bytes a GPU, none of it in use already; `args` as
    run_dpo.py's, `how` as `need`'s.
    """
    found = recommend(shape, processes, memory, args.global_batch_size, args.max_length, **how)
    if found:
        divides = args.global_batch_size % (found[1] * processes) == 0
        step = "" if divides else f" and a global_batch_size that divides by {processes}"
        return f"take configs/{found[0]}.yaml with per_device_train_batch_size {found[1]}{step}"
    others = ["more or larger GPUs", f"a max_length below {args.max_length}"]
    if args.gradient_checkpointing is False:
        others.append("gradient_checkpointing true")
    if not args.use_peft:
        others.append("LoRA (configs/training_lora.yaml)")
    elif not args.load_in_4bit:
        others.append("QLoRA (configs/training_qlora.yaml)")
    return f"no configuration fits: take {', '.join(others[:-1])} or {others[-1]}"


def report(args: "Arguments", gpus: int, memory_gib: float | None) -> list[str]:
    """The lines that `--check true` prints: what each method needs on `gpus` GPUs of `memory_gib` GiB, and
    which to take.

    Raises:
        UserError: the GPUs are not known, or the model's size is not.
    """
    if not gpus or not memory_gib:
        raise UserError("no GPU is visible: give --num_gpus N --gpu_memory_gib M to ask about others")
    lines, name = [], args.model_name_or_path
    try:
        shape = shape_of(name, args.revision, args.trust_remote_code)
    except UserError:
        if not args.model_size_b:
            raise
        shape = shape_like(args.model_size_b)
        lines.append(
            f"the config of {name} cannot be read: an estimate for {args.model_size_b} billion parameters in "
            "Llama's shape"
        )
    rank = args.lora_r if args.use_peft else 16
    lora = {"trainable": shape.lora(rank), "frozen": FOUR_BITS if args.load_in_4bit else None}
    lines += [
        f"{name}: {shape.parameters / 1e9:.2f} billion parameters; {gpus} GPUs of {memory_gib:.0f} GiB, "
        f"{usable(memory_gib) / GIB:.0f} of which may be filled",
        f"GiB a GPU, in {'bf16' if args.bf16 else 'fp32'}, with rows and gradient checkpointing as at the "
        f"end of a line; {RESERVED / GIB:.0f} GiB are added for CUDA",
        "in all: the larger of training (states, buffers, activations) and the pass of the reference before "
        "it",
        f"{'':20}{'states':>9}{'buffers':>9}{'activations':>13}{'reference':>11}{'in all':>9}",
    ]
    for kind, more in (("", {}), (", QLoRA" if args.load_in_4bit else ", LoRA", lora)):
        for method in WHOLE if more.get("frozen") else METHODS:
            more |= {"bf16": args.bf16, "reference": needs_reference(args.loss_type)}
            on, tokens = choose(args, method, shape, gpus, usable(memory_gib), **more)
            found = need(method, shape, gpus, tokens / 2, 1, on, **more)
            numbers = f"{found.states / GIB:9.1f}{found.buffers / GIB:9.1f}{found.activations / GIB:13.1f}"
            numbers += f"{found.reference / GIB:11.1f}{found.total / GIB:9.1f}"
            fits = "fits" if found.total <= usable(memory_gib) else "does not fit"
            moved = f", {found.cpu / GIB:.0f} GiB of the machines' memory" if found.cpu else ""
            how = f"{tokens:,} tokens, checkpointing {'on' if on else 'off'}"
            lines.append(f"{method + kind:20}{numbers}  {fits}, {how}{moved}")
    few = lora["trainable"] / 1e6
    lines.append(f"LoRA of rank {rank} on all linear layers trains {few:.0f} million parameters")
    how = adapted(args, shape) | {"checkpointing": args.gradient_checkpointing is not False}
    return [*lines, f"{remedy(args, shape, gpus, usable(memory_gib), **how)}; --num_processes {gpus}"]
