"""Where OpenRLHF's roles go on the GPUs there are, and how much memory that takes: arithmetic, nothing is
loaded.

Colocated (the default) every GPU holds a part of policy, reference, value and reward model, and samples in
its turn: vLLM sleeps while training, and of policy and value model one at a time has its optimizer states on
the GPU (`ds.enable_sleep` moves master weights, moments and gradients to the machine's memory; the bf16
weights stay). Sums are those of dpo_iteration/memory.py; what OpenRLHF adds is the LM head, which it does not
cut into tiles: bf16 logits, an fp32 copy and its gradient. Estimates; no GPU has confirmed them yet.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

from common.cli import UserError, count
from dpo_iteration import memory
from dpo_iteration.memory import GIB
from ppo.openrlhf.arguments import Arguments
from ppo.openrlhf.command import Placement, check_batches

SLEEPING = 1.5 * GIB  # what a sleeping engine keeps: context, graphs, buffers. Assumed, not measured
KV_LEAST = 4 * GIB  # for the engine's cache and activations, on top of its weights
USABLE = 0.95  # of a GPU
LOGITS = 12  # bytes a token and vocabulary entry: bf16 logits and their gradient, fp32 copy and its gradient
TRAINED = ("actor", "critic")


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes: of one GPU while training, of one GPU while sampling without the engine, and of the machines'
    memory in all.
    """

    training: float
    resident: float
    machines: float


def passing(shape: memory.Shape, tokens: int, checkpointing: bool) -> float:
    """Bytes of one forward and backward pass over so many tokens."""
    layer = tokens * memory.layer_activations(shape, "zero3")
    kept = shape.layers * tokens * shape.hidden * 2
    gradients = 3 * 2 * shape.intermediate * tokens
    return (kept + layer if checkpointing else shape.layers * layer) + gradients


def training_bytes(
    args: Arguments, placement: Placement, role: str, shape: memory.Shape, tokens: int, world: int
) -> float:
    """Bytes of one GPU that `role` takes while it trains, on top of its weights."""
    method = f"zero{placement.zero_stage}"
    trainable = shape.lora(args.lora_r) if args.lora_r else None
    kept, _ = memory.states(method, shape.parameters, world, trainable)
    moments = 12 * (trainable or shape.parameters) / world if placement.offload else 0
    more, _ = memory.buffers(method, shape, world, trainable)
    logits = LOGITS * tokens * shape.vocabulary if role == "actor" else 0
    weights = 2 * shape.parameters / (world if placement.zero_stage == 3 else 1)
    return kept - weights - moments + more + passing(shape, tokens, args.gradient_checkpointing) + logits


def needs(args: Arguments, placement: Placement, shapes: dict, tokens: int, server: float = 0) -> Needs:
    """What a run takes at its fullest GPU.

    Args:
        args: Arguments of run_openrlhf.py.
        shapes: of `actor`, `ref`, `critic`, `reward` the Shape; None: OpenRLHF does not hold it.
        tokens: of one forward pass on a GPU.
        server: bytes of our reward server there.
    """
    whole, machines, fullest, held = placement.zero_stage == 3, 0.0, 0.0, 0.0
    policy, value = ("actor", "ref"), ("critic", "reward")
    for group in [policy + value] if placement.colocate else [policy, value]:
        held, training = memory.RESERVED + (server if placement.colocate else 0), 0.0
        for role in group:
            shape = shapes.get(role)
            if shape is None:
                continue
            world = placement.gpus if role in policy else placement.critic_gpus
            moved = placement.offloads_frozen and role not in TRAINED
            held += 0 if moved else 2 * shape.parameters / (world if whole else 1)
            machines += 2 * shape.parameters if moved else 0
            if role in TRAINED:
                training = max(training, training_bytes(args, placement, role, shape, tokens, world))
                if placement.offload or placement.colocate:
                    machines += 12 * (shape.lora(args.lora_r) if args.lora_r else shape.parameters)
        fullest = max(fullest, held + training)
    if not placement.colocate:
        return Needs(fullest, memory.RESERVED, machines)
    return Needs(fullest + SLEEPING, held, machines)


def engine_bytes(shape: memory.Shape, tensor_parallel: int) -> float:
    """The least that an engine takes of a GPU."""
    return 2 * shape.parameters / tensor_parallel + KV_LEAST


def utilization(placement: Placement, gpu: float, resident: float) -> float:
    """Share of a GPU that an engine may take: half where that is free, rounded down to a twentieth."""
    free = (gpu * USABLE - resident) / gpu
    wanted = min(0.5 if placement.colocate else 0.9, free)
    return math.floor(wanted * 20 + 1e-9) / 20


def split(args: Arguments, gpus: int, gpus_per_node: int) -> tuple[int, int, int]:
    """(nodes, GPUs that train the policy, GPUs that sample).

    Raises:
        UserError: the GPUs cannot be split so.
    """
    nodes = max(1, gpus // gpus_per_node)
    if nodes * gpus_per_node != gpus and gpus > gpus_per_node:
        raise UserError(
            f"num_gpus {gpus} is no multiple of gpus_per_node {gpus_per_node}: nodes must be alike"
        )
    if args.colocate:
        return nodes, gpus, gpus
    if nodes > 1 or gpus < 4 or gpus & (gpus - 1):
        raise UserError(
            "colocate false needs one node with 4 or 8 GPUs (a quarter for the policy, a quarter for the "
            f"value model, half for the engines), there are {gpus} on {nodes} nodes; set colocate true"
        )
    return nodes, gpus // 4, gpus // 2


def packings(args: Arguments, flash: bool) -> tuple[str, bool, list]:
    """(attention, whether rows are packed, limits of tokens on a GPU to try; None: padded rows)."""
    attention = args.attn_implementation or ("flash_attention_2" if flash else "sdpa")
    packing = "flash" in attention if args.packing is None else args.packing
    if packing and "flash" not in attention:
        raise UserError(
            f"packing true needs flash attention, attn_implementation is {attention}: OpenRLHF would replace "
            "it without asking"
        )
    longest = args.max_input_length + args.max_new_tokens
    if not packing:
        return attention, False, [None]
    if args.max_tokens_per_gpu:
        if args.max_tokens_per_gpu < longest:
            raise UserError(
                f"max_tokens_per_gpu {args.max_tokens_per_gpu} is below the {longest} tokens of one prompt "
                "and response (max_input_length + max_new_tokens)"
            )
        return attention, True, [args.max_tokens_per_gpu]
    return attention, True, [n for n in (16384, 8192, 4096, 2048, 1024, 512) if n >= longest] or [longest]


def engines_of(args: Arguments, tensor_parallel: int, sampling: int, gpus_per_node: int) -> int:
    """Number of engines of `tensor_parallel` GPUs each on the `sampling` GPUs that sample."""
    if sampling % tensor_parallel or tensor_parallel > gpus_per_node:
        raise UserError(
            f"tensor_parallel_size {tensor_parallel} does not divide the {sampling} GPUs that sample, or "
            f"exceeds a node's {gpus_per_node}"
        )
    engines = args.num_engines or sampling // tensor_parallel
    if engines * tensor_parallel != sampling:
        raise UserError(
            f"num_engines {engines} × tensor_parallel_size {tensor_parallel} must be the {sampling} GPUs "
            f"that sample; leave num_engines out, or take {sampling // tensor_parallel}"
        )
    return engines


def candidates(args: Arguments, gpus: int, gpus_per_node: int, flash: bool) -> Iterator[Placement]:
    """Yield the placements to try, the faster first."""
    nodes, training, sampling = split(args, gpus, gpus_per_node)
    gpus_per_node = min(gpus_per_node, gpus)
    attention, packing, limits = packings(args, flash)
    sizes = [t for t in (1, 2, 4, 8) if t <= gpus_per_node and sampling % t == 0]
    for tensor_parallel, stage, limit in itertools.product(
        [args.tensor_parallel_size] if args.tensor_parallel_size else sizes,
        [args.zero_stage] if args.zero_stage else [2, 3] if training > 1 else [2],
        limits,
    ):
        yield Placement(
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            gpus=training,
            critic_gpus=training,
            engines=engines_of(args, tensor_parallel, sampling, gpus_per_node),
            tensor_parallel=tensor_parallel,
            colocate=args.colocate,
            zero_stage=stage,
            offload=bool(args.offload),
            gpu_memory_utilization=args.gpu_memory_utilization or 0.5,
            packing=packing,
            max_tokens_per_gpu=limit,
            attn_implementation=attention,
        )


def place(
    args: Arguments,
    shapes: dict,
    gpus: int,
    gpus_per_node: int,
    gpu: float | None,
    flash: bool,
    server: float = 0,
    machine: float | None = None,
) -> tuple[Placement, list[str]]:
    """(Placement on `gpus` GPUs of `gpu` bytes, notes). `gpu` None: not known, nothing is refused for memory.

    Args:
        args: Arguments of run_openrlhf.py.
        shapes, server: as for `needs`.
        flash: whether flash-attn is there.
        machine: bytes of a node's main memory, or None.

    Raises:
        UserError: what does not fit or divide, and what would.
    """
    tried = []
    for found in candidates(args, gpus, gpus_per_node, flash):
        if gpu is None:
            check_batches(args, found)
            return found, ["the GPUs' memory is not known: nothing was said about what fits"]
        tokens = found.max_tokens_per_gpu or args.micro_batch_size * (
            args.max_input_length + args.max_new_tokens
        )
        need = needs(args, found, shapes, tokens, server)
        share = args.gpu_memory_utilization or utilization(found, gpu, need.resident)
        engine = engine_bytes(shapes["actor"], found.tensor_parallel)
        tried.append((need.training, need.resident + engine, found, tokens))
        if need.training > gpu * USABLE or engine > share * gpu or need.resident + share * gpu > gpu:
            continue
        check_batches(args, found)
        if machine and need.machines > machine * found.nodes:
            instead = "" if found.offload else "colocate false, "
            raise UserError(
                f"{need.machines / GIB:.0f} GiB of states are moved out of the GPUs' memory while others use "
                f"it, and {count(found.nodes, 'machine')} of {machine / GIB:.0f} GiB cannot take them; take "
                f"{instead}more nodes, or a smaller model"
            )
        note = (
            f"a GPU: about {need.training / GIB:.0f} GiB while training, "
            f"{(need.resident + share * gpu) / GIB:.0f} while sampling, of {gpu / GIB:.0f}; "
            f"{need.machines / GIB:.0f} GiB of the machines' memory for states that are moved out"
        )
        return dataclasses.replace(found, gpu_memory_utilization=share), [note]
    raise UserError(does_not_fit(args, shapes, gpus, gpu, tried, server))


def does_not_fit(args: Arguments, shapes: dict, gpus: int, gpu: float, tried: list, server: float) -> str:
    """One line: the figures, and the smallest changes that would do."""
    training, sampling, best, _ = min(tried, key=lambda one: max(one[:2]))
    tokens, size = tried[-1][3], shapes["actor"].parameters / 1e9

    def with_gpus(number: int, offload: bool) -> tuple[bool, float]:
        """(whether colocated training on so many GPUs fits, bytes of the machines' memory)."""
        stage = 3 if number > 1 else 2
        placement = dataclasses.replace(
            best, gpus=number, critic_gpus=number, colocate=True, zero_stage=stage, offload=offload
        )
        need = needs(args, placement, shapes, tokens, server)
        fullest = max(need.training, need.resident + engine_bytes(shapes["actor"], 1))
        return fullest <= gpu * USABLE, need.machines

    instead = [
        f"{n} GPUs of {gpu / GIB:.0f} GiB"
        for n in (2, 4, 8, 16, 32, 64)
        if n > gpus and with_gpus(n, False)[0]
    ]
    instead = instead[:1]
    fits, machines = with_gpus(gpus, True)
    if fits and not args.offload:
        instead.append(f"offload true (slow; {machines / GIB:.0f} GiB of the machines' memory)")
    if args.max_tokens_per_gpu:
        instead.append("fewer max_tokens_per_gpu (left out, it follows the memory)")
    no_lora = "" if args.lora_r else " (LoRA is out: OpenRLHF 0.11.2 cannot hand adapters to vLLM)"
    instead.append(f"a smaller model{no_lora}")
    states = sum(12 * shapes[role].parameters for role in TRAINED if shapes[role]) / 1e9
    moments = f" (master weights and moments of policy and value model are {states:.0f} GB in all)"
    moments = "" if args.lora_r else moments
    return (
        f"{size:.1f} billion parameters{' with LoRA' if args.lora_r else ' in full'} do not fit "
        f"{count(gpus, 'GPU')} of {gpu / GIB:.0f} GiB: about {training / GIB:.0f} GiB a GPU while training "
        f"and {sampling / GIB:.0f} while sampling with ZeRO-{best.zero_stage}{moments}; take "
        f"{', or '.join(instead)}"
    )
