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

from common.cli import UserError, count, refuse
from common.devices import speed_of
from common.progress import duration
from dpo_iteration import memory
from dpo_iteration.memory import GIB
from loop import estimates
from ppo.checks import check_batches
from ppo.openrlhf.arguments import Arguments
from ppo.openrlhf.command import Placement

SLEEPING = 1.5 * GIB  # what a sleeping engine keeps: context, graphs, buffers. Assumed, not measured
KV_LEAST = 4 * GIB  # for the engine's cache and activations, on top of its weights
USABLE = 0.95  # of a GPU
LOGITS = 12  # bytes a token and vocabulary entry: bf16 logits and their gradient, fp32 copy and its gradient
TRAINED = ("actor", "critic")
SOON, PATIENCE = 10, 180  # seconds: too short to speak of, and after which OpenRLHF 0.11.2 drops a request


@dataclasses.dataclass(frozen=True)
class Machine:
    """GPUs in all and of a node, and bytes of a GPU and of a node's main memory; None: not known."""

    gpus: int
    gpus_per_node: int
    gpu: float | None
    memory: float | None


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes of one GPU while training, and while sampling without the engine; of an engine on one GPU; of the
    machines' memory in all.
    """

    training: float
    resident: float
    engine: float
    machines: float


def training_bytes(args: Arguments, placement: Placement, role: str, shape: memory.Shape) -> float:
    """Bytes of one GPU that `role` takes while it trains, on top of its weights."""
    method, world = f"zero{placement.zero_stage}", placement.gpus
    tokens = placement.max_tokens_per_gpu or args.micro_batch_size * longest(args)
    kept, _ = memory.states(method, shape.parameters, world)
    more, _ = memory.buffers(method, shape, world)
    moments = 12 * shape.parameters / world if placement.offload else 0
    weights = 2 * shape.parameters / (world if placement.zero_stage == 3 else 1)
    layer = tokens * memory.layer_activations(shape, "zero3")
    inputs = shape.layers * tokens * shape.hidden * 2
    activations = inputs + layer if args.gradient_checkpointing else shape.layers * layer
    gradients = 3 * 2 * shape.intermediate * tokens
    logits = LOGITS * tokens * shape.vocabulary if role == "actor" else 0
    return kept - weights - moments + more + activations + gradients + logits


def longest(args: Arguments) -> int:
    """Tokens of one prompt and response."""
    return args.max_input_length + args.max_new_tokens


def needs(args: Arguments, placement: Placement, shapes: dict, server: float = 0) -> Needs:
    """What a run takes at its fullest GPU.

    Args:
        args: Arguments of run_openrlhf.py.
        shapes: of `actor`, `ref`, `critic`, `reward` the Shape; None: OpenRLHF does not hold it.
        server: bytes of our reward server there.
    """
    share = placement.gpus if placement.zero_stage == 3 else 1
    training, resident, machines = 0.0, 0.0, 0.0
    roles = ("actor", "ref", "critic", "reward")
    for group in [roles] if placement.colocate else [roles[:2], roles[2:]]:
        there = {role: shapes[role] for role in group if shapes[role]}
        held = memory.RESERVED + (server if placement.colocate else 0)
        for role, shape in there.items():
            if placement.offloads_frozen and role not in TRAINED:
                machines += 2 * shape.parameters
            else:
                held += 2 * shape.parameters / share
            if role in TRAINED and (placement.offload or placement.colocate):
                machines += 12 * shape.parameters
        most = max(training_bytes(args, placement, role, there[role]) for role in there if role in TRAINED)
        training, resident = max(training, held + most), max(resident, held)
    engine = 2 * shapes["actor"].parameters / placement.tensor_parallel + KV_LEAST
    if not placement.colocate:
        return Needs(training, memory.RESERVED, engine, machines)
    return Needs(training + SLEEPING, resident, engine, machines)


def candidates(args: Arguments, machine: Machine) -> Iterator[Placement]:
    """Yield the placements to try, the faster first.

    Raises:
        UserError: the GPUs cannot be split so.
    """
    gpus, a_node = machine.gpus, min(machine.gpus_per_node, machine.gpus)
    if gpus % a_node:
        raise UserError(f"num_gpus {gpus} is no multiple of gpus_per_node {a_node}: nodes must be alike")
    if not args.colocate and (gpus > a_node or gpus not in (4, 8)):
        raise UserError(
            "colocate false needs one node with 4 or 8 GPUs (a quarter for the policy, a quarter for the "
            f"value model, half for the engines), there are {gpus} on {count(gpus // a_node, 'node')}; set "
            "colocate true"
        )
    training, sampling = (gpus, gpus) if args.colocate else (gpus // 4, gpus // 2)
    attention = args.attn_implementation or "flash_attention_2"
    asked = [args.tensor_parallel_size] if args.tensor_parallel_size else (1, 2, 4, 8)
    sizes = [size for size in asked if a_node % size == 0 and sampling % size == 0]
    if not sizes:
        raise UserError(
            f"tensor_parallel_size {args.tensor_parallel_size} does not divide the {sampling} GPUs that "
            f"sample, or a node's {a_node}"
        )
    stages = [args.zero_stage] if args.zero_stage else [2, 3] if training > 1 else [2]
    for tensor_parallel, stage, limit in itertools.product(sizes, stages, limits(args, attention)):
        yield Placement(
            nodes=gpus // a_node,
            gpus_per_node=a_node,
            gpus=training,
            engines=sampling // tensor_parallel,
            tensor_parallel=tensor_parallel,
            colocate=args.colocate,
            zero_stage=stage,
            offload=args.offload,
            gpu_memory_utilization=args.gpu_memory_utilization or 0.5,
            max_tokens_per_gpu=limit,
            attn_implementation=attention,
        )


def limits(args: Arguments, attention: str) -> list:
    """Tokens on a GPU to try; None: padded rows, where attention is not flash."""
    if "flash" not in attention:
        return [None]
    if (args.max_tokens_per_gpu or math.inf) < longest(args):
        raise UserError(
            f"max_tokens_per_gpu {args.max_tokens_per_gpu} is below the {longest(args)} tokens of one prompt "
            "and response (max_input_length + max_new_tokens)"
        )
    if args.max_tokens_per_gpu:
        return [args.max_tokens_per_gpu]
    return [n for n in (16384, 8192, 4096, 2048, 1024, 512) if n >= longest(args)] or [longest(args)]


def tried(args: Arguments, machine: Machine, shapes: dict, server: float) -> Iterator[tuple]:
    """Yield (Placement with its share of a GPU for an engine, Needs, whether it fits) of each candidate."""
    gpu = machine.gpu
    for found in candidates(args, machine):
        need = needs(args, found, shapes, server)
        # Half of a GPU where that is free, rounded down to a twentieth.
        free = min(0.5 if found.colocate else 0.9, USABLE - need.resident / gpu)
        share = args.gpu_memory_utilization or math.floor(free * 20 + 1e-9) / 20
        fits = (
            need.training <= gpu * USABLE
            and need.engine <= share * gpu
            and need.resident + share * gpu <= gpu
        )
        yield dataclasses.replace(found, gpu_memory_utilization=share), need, fits


def place(args: Arguments, machine: Machine, shapes: dict, server: float = 0) -> tuple[Placement, str]:
    """(Placement, a note on memory). Where the GPUs' memory is not known, nothing is refused for it.

    Args:
        args: Arguments of run_openrlhf.py.
        shapes, server: as for `needs`.

    Raises:
        UserError: what does not fit or divide, and what would.
    """
    found = next(candidates(args, machine))
    note = "the GPUs' memory is not known: nothing was said about what fits"
    if machine.gpu:
        fitting = (one for one in tried(args, machine, shapes, server) if one[2])
        found, need, fits = next(fitting, (found, None, False))
        if not fits:
            raise UserError(does_not_fit(args, machine, shapes, server))
        if machine.memory and need.machines > machine.memory * found.nodes:
            instead = "" if found.offload else "colocate false, "
            raise UserError(
                f"{need.machines / GIB:.0f} GiB of states are moved out of the GPUs' memory while others use "
                f"it, and {count(found.nodes, 'machine')} of {machine.memory / GIB:.0f} GiB cannot take "
                f"them; take {instead}more nodes, or a smaller model"
            )
        sampling = need.resident + found.gpu_memory_utilization * machine.gpu
        note = (
            f"a GPU: about {need.training / GIB:.0f} GiB while training, {sampling / GIB:.0f} while "
            f"sampling, of {machine.gpu / GIB:.0f}; {need.machines / GIB:.0f} GiB of the machines' memory "
            "for states that are moved out"
        )
    refuse(check_sizes(args, found))
    return found, note


def check_sizes(args: Arguments, found: Placement) -> list[str]:
    """What is wrong with the sizes of rollouts and steps. Where rows are packed, a step is cut up by tokens
    and only the passes over a rollout go by micro_batch_size.
    """
    if not found.max_tokens_per_gpu:
        return check_batches(args, found.gpus)
    problems = check_batches(dataclasses.replace(args, micro_batch_size=1), found.gpus)
    responses, pass_ = args.rollout_batch_size * args.samples_per_prompt, args.micro_batch_size * found.gpus
    if not problems and responses % pass_:
        problems = [f"a rollout's {responses} responses do not divide by GPUs × micro_batch_size = {pass_}"]
    return problems


def does_not_fit(args: Arguments, machine: Machine, shapes: dict, server: float) -> str:
    """One line: the figures, and the smallest changes that would do."""

    def least(one: tuple) -> float:
        return max(one[1].training, one[1].resident + one[1].engine)

    def would_fit(gpus: int, offload: bool, shapes: dict = shapes) -> Needs | None:
        other = dataclasses.replace(args, offload=offload, colocate=True, tensor_parallel_size=None)
        node = machine.gpus_per_node if gpus == machine.gpus else min(gpus, 8)
        there = dataclasses.replace(machine, gpus=gpus, gpus_per_node=node)
        return next((need for _, need, fits in tried(other, there, shapes, server) if fits), None)

    best, need, _ = min(tried(args, machine, shapes, server), key=least)
    gpu, instead = f"{machine.gpu / GIB:.0f} GiB", []
    more = next((n for n in (2, 4, 8, 16, 32, 64) if n > machine.gpus and would_fit(n, args.offload)), None)
    if more:
        instead.append(f"{more} GPUs of {gpu}")
    if not args.offload and (offloaded := would_fit(machine.gpus, True)):
        instead.append(f"offload true (slow; {offloaded.machines / GIB:.0f} GiB of the machines' memory)")
    if shapes["critic"] and would_fit(machine.gpus, args.offload, shapes | {"critic": None}):
        instead.append("advantage_estimator rloo, which needs no value model")
    if server:
        instead.append("our reward server on another GPU (ppo/openrlhf/serve_reward.py and reward_url)")
    states = sum(12 * shape.parameters for role in TRAINED if (shape := shapes[role])) / 1e9
    return (
        f"{shapes['actor'].parameters / 1e9:.1f} billion parameters in full do not fit "
        f"{count(machine.gpus, 'GPU')} of {gpu}: about {need.training / GIB:.0f} GiB a GPU while training, "
        f"{(need.resident + need.engine) / GIB:.0f} while sampling, with ZeRO-{best.zero_stage} (master "
        f"weights and moments of what learns are {states:.0f} GB in all); take "
        f"{', or '.join([*instead, 'a smaller model'])} (LoRA is out: "
        "OpenRLHF 0.11.2 cannot hand adapters to vLLM)"
    )


def waits_for_rewards(
    args: Arguments, found: Placement, policy: memory.Shape, served: int, gpu: str | None
) -> list[str]:
    """A note where our reward server takes longer over a rollout than the engines do; else nothing.

    Estimated as loop/estimates.py has it for evaluation; what shares the server's GPU would make it slower.

    Args:
        served: parameters of all models in the server.
        gpu: what a GPU is called; None: an A100.
    """
    responses, (kind, _) = args.rollout_batch_size * args.samples_per_prompt, speed_of(gpu)
    answer = min(estimates.RESPONSE_TOKENS, args.max_new_tokens)
    tokens = min(estimates.PROMPT_TOKENS, args.max_input_length) + answer
    rate = estimates.SAMPLED_TOKENS * kind.tb_per_s / policy.parameters
    sampling = responses * answer / rate / (found.engines * found.tensor_parallel)
    scoring = responses * tokens * 2 * served / (kind.tflops * 1e12 * estimates.SCORE_SHARE)
    if scoring <= sampling or scoring < SOON:
        return []
    late = f"OpenRLHF asks anew after {PATIENCE} s, five times in all; " if scoring > PATIENCE else ""
    return [
        f"the engines sample a rollout's {responses:,} responses in about {duration(sampling)} and wait for "
        f"our reward server, which scores them in about {duration(scoring)} ({tokens} tokens each × 2 × "
        f"{served / 1e9:.1f} billion parameters at {estimates.SCORE_SHARE:.0%} of the {kind.tflops:.0f} "
        f"TFLOPS of one {kind.name}); {late}{math.ceil(scoring / sampling)} servers would keep up: start "
        "ppo/openrlhf/serve_reward.py on GPUs of their own and give all addresses as reward_url"
    ]
