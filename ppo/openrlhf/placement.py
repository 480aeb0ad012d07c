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

from common.cli import UserError
from dpo_iteration import memory
from dpo_iteration.memory import GIB
from ppo.openrlhf.command import Placement, check_batches

SLEEPING = 1.5 * GIB  # what a sleeping engine keeps: context, graphs, buffers. Assumed, not measured
KV_LEAST = 4 * GIB  # for the engine's cache and activations beside its weights
USABLE = 0.95  # of a GPU
LOGITS = 12  # bytes a token and vocabulary entry: bf16 logits and their gradient, fp32 copy and its gradient


def passing(shape, tokens, checkpointing):
    """Bytes of one forward and backward pass over so many tokens."""
    layer = tokens * memory.layer_activations(shape, "zero3")
    kept = shape.layers * tokens * shape.hidden * 2
    gradients = 3 * 2 * shape.intermediate * tokens
    return (kept + layer if checkpointing else shape.layers * layer) + gradients


def needs(placement, shapes, tokens, checkpointing=True, server=0, trainable=None):
    """Bytes of one GPU while training and while sampling, and bytes of the machines' memory in all.

    Args:
        shapes: dict role → Shape or None (a role that OpenRLHF does not hold) of `actor`, `ref`, `critic`,
            `reward`.
        tokens: of one forward pass on a GPU.
        server: bytes of our reward server on the fullest GPU.
        trainable: dict role → parameters trained there (LoRA), or None.
    """
    method, cpu, resident, states = f"zero{placement.zero_stage}", 0.0, server + memory.RESERVED, {}
    whole = placement.zero_stage == 3
    for role, shape in shapes.items():
        if shape is None:
            continue
        world = placement.gpus if role in ("actor", "ref") else placement.critic_gpus
        if role in ("ref", "reward"):
            if placement.offload and whole:
                cpu += 2 * shape.parameters
            else:
                resident += 2 * shape.parameters / (world if whole else 1)
            continue
        count = (trainable or {}).get(role) or shape.parameters
        weights = 2 * shape.parameters / (world if whole else 1)
        resident += weights
        kept, _ = memory.states(method, shape.parameters, world, count if trainable else None)
        moments = 12 * count / world
        more, _ = memory.buffers(method, shape, world, count)
        extra = passing(shape, tokens, checkpointing) + (
            LOGITS * tokens * shape.vocabulary if role == "actor" else 0
        )
        states[role] = (kept - weights - (moments if placement.offload else 0), more + extra)
        cpu += 12 * count if placement.offload or placement.colocate else 0
    if placement.colocate:
        training = resident + SLEEPING + max(sum(pair) for pair in states.values())
    else:  # on GPUs of their own: the fuller of the two groups
        training = 0
        for trained, frozen in (("actor", "ref"), ("critic", "reward")):
            own = {r: s for r, s in shapes.items() if r in (trained, frozen) and s is not None}
            if trained in own:
                held = sum(
                    2
                    * s.parameters
                    / ((placement.gpus if trained == "actor" else placement.critic_gpus) if whole else 1)
                    for r, s in own.items()
                    if not (r == frozen and placement.offload and whole)
                )
                training = max(training, held + memory.RESERVED + sum(states[trained]))
    return training, resident if placement.colocate else memory.RESERVED, cpu


def engine_weights(shape, tensor_parallel):
    return 2 * shape.parameters / tensor_parallel


def utilization(placement, gpu, resident):
    """Share of a GPU that an engine may take: half where that is free beside what stays, rounded down to a
    twentieth.
    """
    free = (gpu * USABLE - resident) / gpu
    wanted = min(0.5 if placement.colocate else 0.9, free)
    return math.floor(wanted * 20 + 1e-9) / 20


def place(args, shapes, gpus, gpus_per_node, gpu, flash, server=0, machine=None):
    """The Placement on `gpus` GPUs of `gpu` bytes (None: not known, nothing is refused for memory).

    Args:
        args: Arguments of run_openrlhf.py.
        shapes: as for `needs`.
        flash: whether flash-attn is there.
        server: bytes of our reward server on the fullest GPU.
        machine: bytes of a node's main memory, or None.

    Returns:
        (Placement, list of notes)

    Raises:
        UserError: what does not fit or divide, and what would.
    """
    nodes = max(1, gpus // gpus_per_node)
    if nodes * gpus_per_node != gpus and gpus > gpus_per_node:
        raise UserError(
            f"num_gpus {gpus} is no multiple of gpus_per_node {gpus_per_node}: nodes must be alike"
        )
    gpus_per_node = min(gpus_per_node, gpus)
    actor = critic = gpus
    sampling = gpus
    if not args.colocate:
        if nodes > 1 or gpus < 4 or gpus & (gpus - 1):
            raise UserError(
                "colocate false needs one node with 4 or 8 GPUs (a quarter for the policy, a quarter for "
                "the value model, half "
                f"for the engines), there are {gpus} on {nodes} nodes; give --colocate true"
            )
        actor = critic = gpus // 4
        sampling = gpus // 2
    attention = args.attn_implementation or ("flash_attention_2" if flash else "sdpa")
    flashes = "flash" in attention
    packing = flashes if args.packing is None else args.packing
    if packing and not flashes:
        raise UserError(
            f"packing true needs flash attention, attn_implementation is {attention}: OpenRLHF would replace "
            "it without asking"
        )
    longest = args.max_input_length + args.max_new_tokens
    limits = [None]  # without packing: micro_batch_size padded responses
    if packing and args.max_tokens_per_gpu:
        limits = [args.max_tokens_per_gpu]
        if limits[0] < longest:
            raise UserError(
                f"max_tokens_per_gpu {limits[0]} is below the {longest} tokens of one prompt and response "
                "(max_input_length + max_new_tokens)"
            )
    elif packing:
        limits = [n for n in (16384, 8192, 4096, 2048, 1024, 512) if n >= longest] or [longest]
    rank = args.lora_r
    trainable = (
        {role: shapes[role].lora(rank) for role in ("actor", "critic") if shapes.get(role)} if rank else None
    )
    sizes = (
        [args.tensor_parallel_size]
        if args.tensor_parallel_size
        else [t for t in (1, 2, 4, 8) if t <= gpus_per_node and sampling % t == 0]
    )
    stages = [args.zero_stage] if args.zero_stage else ([2, 3] if actor > 1 else [2])
    offloads = [args.offload] if args.offload is not None else [False]
    tried = []
    for tensor_parallel, offload, stage, limit in itertools.product(
        sizes, offloads, stages, limits
    ):  # the faster first
        if sampling % tensor_parallel or tensor_parallel > gpus_per_node:
            raise UserError(
                f"tensor_parallel_size {tensor_parallel} does not divide the {sampling} GPUs that sample, or "
                f"exceeds a node's {gpus_per_node}"
            )
        engines = args.num_engines or sampling // tensor_parallel
        if engines * tensor_parallel != sampling:
            raise UserError(
                f"num_engines {engines} × tensor_parallel_size {tensor_parallel} must be the {sampling} GPUs "
                "that sample"
                f"; leave num_engines out, or take {sampling // tensor_parallel}"
            )
        found = Placement(
            nodes,
            gpus_per_node,
            actor,
            critic,
            engines,
            tensor_parallel,
            args.colocate,
            stage,
            offload,
            args.gpu_memory_utilization or 0.5,
            packing,
            limit,
            attention,
        )
        if gpu is None:
            check_batches(args, found)
            return found, ["the GPUs' memory is not known: nothing was said about what fits"]
        training, resident, cpu = needs(
            found,
            shapes,
            limit or args.micro_batch_size * longest,
            args.gradient_checkpointing,
            server,
            trainable,
        )
        share = args.gpu_memory_utilization or utilization(found, gpu, resident)
        engine = engine_weights(shapes["actor"], tensor_parallel) + KV_LEAST
        tried.append((training, resident + engine, stage))
        if training <= gpu * USABLE and engine <= share * gpu and resident + share * gpu <= gpu:
            check_batches(args, found)
            if machine and cpu > machine * nodes:
                instead = (
                    "more nodes or a smaller model"
                    if offload
                    else "--colocate false, more nodes, or a smaller model"
                )
                raise UserError(
                    f"{cpu / GIB:.0f} GiB of states are moved out of the GPUs' memory while others use it, "
                    f"and {nodes} machine{'s' * (nodes > 1)} "
                    f"of {machine / GIB:.0f} GiB cannot take them; take {instead}"
                )
            note = (
                f"a GPU: about {training / GIB:.0f} GiB while training, {(resident + share * gpu) / GIB:.0f} "
                "while sampling, of "
                f"{gpu / GIB:.0f}; {cpu / GIB:.0f} GiB of the machines' memory for states that are moved out"
            )
            return dataclasses.replace(found, gpu_memory_utilization=share), [note]
    tokens = limits[-1] or args.micro_batch_size * longest
    raise UserError(does_not_fit(args, shapes, gpus, gpu, tried, tokens, server, trainable))


def does_not_fit(args, shapes, gpus, gpu, tried, tokens, server, trainable):
    """One line: the figures, and the smallest changes that would do."""
    training, sampling, stage = min(tried, key=lambda t: max(t[:2]))
    states = sum(12 * s.parameters for r, s in shapes.items() if r in ("actor", "critic") and s) / 1e9
    size = shapes["actor"].parameters / 1e9
    engine = engine_weights(shapes["actor"], 1) + KV_LEAST

    def would(count, offload):
        """(fits, bytes of the machines' memory) colocated on so many GPUs, by ZeRO-3 where there are
        several.
        """
        guess = Placement(
            1, count, count, count, count, 1, True, 3 if count > 1 else 2, offload, 0.5, True, None, ""
        )
        found, resident, cpu = needs(guess, shapes, tokens, args.gradient_checkpointing, server, trainable)
        return found <= gpu * USABLE and resident + engine <= gpu * USABLE, cpu

    instead = [
        f"{more} GPUs of {gpu / GIB:.0f} GiB"
        for more in (2, 4, 8, 16, 32, 64)
        if more > gpus and would(more, False)[0]
    ][:1]
    fits, cpu = would(gpus, True)
    if fits and not args.offload:
        instead.append(f"--offload true (slow; {cpu / GIB:.0f} GiB of the machines' memory)")
    if args.max_tokens_per_gpu:
        instead.append("fewer max_tokens_per_gpu (left out, it follows the memory)")
    instead.append(
        "a smaller model"
        if args.lora_r
        else "a smaller model (LoRA is out: OpenRLHF 0.11.2 cannot hand adapters to vLLM)"
    )
    return (
        f"{size:.1f} billion parameters{' with LoRA' if args.lora_r else ' in full'} do not fit {gpus} "
        f"GPU{'s' * (gpus > 1)} of {gpu / GIB:.0f} GiB: "
        f"about {training / GIB:.0f} GiB a GPU while training and {sampling / GIB:.0f} while sampling with "
        f"ZeRO-{stage}"
        + (
            ""
            if args.lora_r
            else f" (master weights and moments of policy and value model are {states:.0f} GB in all)"
        )
        + f"; take {', or '.join(instead)}"
    )
