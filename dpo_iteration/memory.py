"""How much memory DPO training takes on each GPU, worked out before anything is loaded; fitting.py asks what
fits.

Pure arithmetic in bytes, apart from `shape_of`, which counts a model's parameters from its config. Left out
are the batch's token ids (kilobytes) and what a kernel needs for a moment; RESERVED stands for them and for
what CUDA and NCCL take.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common import models
from common.cli import UserError, read_yaml

if TYPE_CHECKING:
    from dpo_iteration.arguments import Arguments

GIB = 2**30
RESERVED = 2 * GIB  # a GPU: CUDA's context, NCCL's buffers, gaps between blocks. Assumed, not measured
FOUR_BITS = 0.6  # bytes a weight, with its scales
SHARES = {  # what is shared out among the processes: weights, gradients, optimizer states
    "ddp": (False, False, False), "zero1": (False, False, True), "zero2": (False, True, True),
    "zero3": (True, True, True), "zero3_offload": (True, True, True), "fsdp2": (True, True, True),
}  # fmt: skip
BUCKET, LIVE = 5e8, 1e9  # DeepSpeed's defaults: reduce_bucket_size, stage3_max_live_parameters
TOKEN_TILE, VOCABULARY_TILE = 4096, 32768  # of TRL 1.16's fused LM head


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. `query` and `key_value` are widths over all heads; `linear` is Σ (inputs + outputs)
    of its layers; `tied`: the head's weights are the input embeddings.
    """

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    query: int
    key_value: int
    vocabulary: int
    linear: int
    tied: bool = False

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        return self.hidden * (2 * self.query + 2 * self.key_value + 3 * self.intermediate)

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    def lora(self, rank: int) -> int:
        """Trainable parameters of LoRA on every linear layer but the LM head: r·(inputs + outputs) each
        (arXiv 2106.09685, §4.1).
        """
        return rank * self.linear


def shape_of(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Shape:
    """Shape of a model, its parameters counted on the meta device: no weights are read or allocated.

    Raises:
        UserError: the config cannot be read.
    """
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        model = models.without_weights(config, trust_remote_code)
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise UserError(
            f"cannot read the config of {name}, so its size is unknown: give --model_size_b ({reason})"
        ) from None
    text, output = config.get_text_config(), model.get_output_embeddings()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not output]
    return Shape(
        parameters=model.num_parameters(),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        query=heads * width,
        key_value=(getattr(text, "num_key_value_heads", None) or heads) * width,
        vocabulary=text.vocab_size,
        linear=sum(m.in_features + m.out_features for m in linear),
        tied=output is not None and output.weight is model.get_input_embeddings().weight,
    )


def shape_like(billions: float) -> Shape:
    """Shape of a model of that many billion parameters, if it were Llama-3-8B grown or shrunk in depth and
    width alike.
    """
    scale = (billions / 8.03) ** (1 / 3)
    layers, hidden = max(1, round(32 * scale)), max(64, round(4096 * scale))
    return Shape(
        parameters=round(billions * 1e9),
        layers=layers,
        hidden=hidden,
        intermediate=round(3.5 * hidden),
        heads=max(1, hidden // 128),
        query=hidden,
        key_value=hidden // 4,
        vocabulary=128256,
        linear=round(layers * hidden * (2 * 2 + 2 * 1.25 + 3 * 4.5)),
    )


def method_of(path: str) -> str:
    """The method of an accelerate YAML: a key of SHARES.

    Raises:
        UserError: a DeepSpeed stage that is none, or DeepSpeed's settings in a file of their own.
    """
    config = read_yaml(path, "accelerate config")
    if config.get("distributed_type") == "FSDP":
        return "fsdp2"
    deepspeed = config.get("deepspeed_config") or {}
    stage = deepspeed.get("zero_stage", 0) if isinstance(deepspeed, dict) else None
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: deepspeed_config with zero_stage 0, 1, 2 or 3 was expected")
    offload = (
        stage == 3
        and deepspeed.get("offload_param_device") == deepspeed.get("offload_optimizer_device") == "cpu"
    )
    return "zero3_offload" if offload else f"zero{stage}" if stage else "ddp"


def _kept_weight(method, bf16):
    """Bytes of a weight as it is kept: DeepSpeed has bf16 beside its fp32 master weights, the others fp32
    alone.
    """
    return 2 if bf16 and method.startswith("zero") else 4


def checkpoint_bytes(args: "Arguments", trained: int) -> int:
    """Bytes of the checkpoints that are on the disk at once: those that are kept, and the next, written
    before the oldest goes.

    Args:
        args: of run_dpo.py.
        trained: parameters that are trained: all, or LoRA's.
    """
    if not args.save_steps:
        return 0
    # DeepSpeed's are the largest: weights twice (once for transformers), fp32 master weights, Adam's two
    # moments in fp32.
    weight = 2 if args.bf16 else 4
    return (args.save_total_limit + 1) * (2 * weight + 12) * trained


def states(
    method: str,
    parameters: int,
    processes: int,
    trainable: int | None = None,
    bf16: bool = True,
    frozen: float | None = None,
) -> tuple[float, float]:
    """(bytes a GPU, bytes of all processes on the CPU) of weights, gradients and optimizer states.

    ZeRO, arXiv 1910.02054, §3.1 and §5: 16 bytes a trainable parameter, which are 2 of weight, 2 of gradient,
    and 12 of fp32 weight and Adam moments (or 4, 4 and 8 where the weights are fp32). Stage 1 shares out the
    last, stage 2 the gradients too, stage 3 and FSDP2 all; offloading moves all to the CPU. No reference
    model: its log-probabilities are cached before. With `trainable` adapters beside frozen `parameters` these
    are weights alone, of `frozen` bytes: 2 with bf16, 4 without, about 0.6 in 4 bits with their scales.
    """
    weight = _kept_weight(method, bf16)
    master = 4 if weight == 2 else 0
    if trainable is None:
        weights, trainable = weight * parameters, parameters
    else:
        weights = (frozen or (2 if bf16 else 4)) * parameters + weight * trainable
    parts = (weights, weight * trainable, (8 + master) * trainable)
    if method == "zero3_offload":
        return 0, sum(parts)
    return sum(part / processes if shared else part for part, shared in zip(parts, SHARES[method])), 0


def buffers(
    method: str, shape: Shape, processes: int, trainable: int | None = None, bf16: bool = True
) -> tuple[float, float]:
    """(bytes a GPU, bytes on the CPU) that come on top of the states while training.

    ddp: a second copy of the gradients in its buckets (`gradient_as_bucket_view` is off), and autocast's bf16
    weights. DeepSpeed: gradients in fp32 for the step, 4 bytes in stages 1 and 2 and 2 more in stage 3, as
    its own estimators have it (`estimate_zero2_model_states_mem_needs`, `estimate_zero3_…`); a bucket of
    gradients, as large for a small model (with `overlap_comm`, which is off in stages 1 and 2 unless a file
    of DeepSpeed's own has it, there are two); in stage 3 the weights that are gathered. FSDP2: two gathered
    layers, the head, and the largest unit's gradients in both dtypes.
    """
    trainable = shape.parameters if trainable is None else trainable
    compute = 2 if bf16 else 4
    largest = max(shape.layer, shape.head)
    if method == "ddp":
        # Frozen weights are bf16 already.
        copies = 2 * shape.parameters if bf16 and trainable == shape.parameters else 0
        return (4 * trainable if processes > 1 else 0) + copies, 0
    if method == "fsdp2":
        gradients = (compute + 4) * (largest if trainable == shape.parameters else 0)
        return compute * (2 * shape.layer + shape.head) + gradients, 0
    bucket = compute * BUCKET
    if method in ("zero1", "zero2"):
        return 4 * trainable / processes + bucket, 0
    gathered = max(2 * compute * largest, compute * min(shape.parameters, LIVE))
    if method == "zero3_offload":
        return gathered + bucket, 2 * trainable
    return 2 * trainable / processes + gathered + bucket, 0


def layer_activations(shape: Shape, method: str = "zero2", bf16: bool = True) -> int:
    """Bytes a token that one layer keeps for the backward pass.

    Korthikanti et al., arXiv 2205.05198, §4.1 (34·h bytes and 5·a·s a token), for today's layers: flash
    attention keeps none of the s² scores but 4 bytes a head; there is no dropout; the gated MLP keeps gate,
    up, activation and product; a norm in fp32 keeps its input, the normalised one and its output.
    """
    width = 2 if bf16 else 4
    norm = 12 if not bf16 else 8 if _kept_weight(method, bf16) == 2 or method == "fsdp2" else 13
    inner = width * (2 * shape.query + 2 * shape.key_value + 4 * shape.intermediate)
    return 2 * norm * shape.hidden + inner + 4 * shape.heads + 8


def head_memory(shape: Shape, tokens: int, trainable: int | None = None, bf16: bool = True) -> float:
    """Bytes of the fused LM head: one tile of logits, hidden states and their gradient, the gradient of its
    weight in fp32.
    """
    width = 2 if bf16 else 4
    tile = width * min(tokens, TOKEN_TILE) * min(shape.vocabulary, VOCABULARY_TILE)
    gradient = (4 + width) * shape.head if trainable in (None, shape.parameters) else 0
    return tile + tokens * shape.hidden * (4 + 2 * width) + gradient


def activations(
    shape: Shape,
    pairs: float,
    max_length: int,
    method: str = "zero2",
    checkpointing: bool = True,
    trainable: int | None = None,
    bf16: bool = True,
) -> float:
    """Bytes at the peak of one forward and backward pass over `pairs` pairs: chosen and rejected of
    `max_length` tokens each.

    With checkpointing (arXiv 2205.05198, §5) each layer keeps its input, and one layer at a time is computed
    anew, when the head's memory is free again. In a layer's backward pass three gradients of the MLP's width
    are there at once.
    """
    tokens = 2 * pairs * max_length
    layer, head = tokens * layer_activations(shape, method, bf16), head_memory(shape, tokens, trainable, bf16)
    gradients = 3 * (2 if bf16 else 4) * shape.intermediate * tokens
    if not checkpointing:
        return shape.layers * layer + max(gradients, head)
    # Autocast leaves the sums in fp32.
    stream = 2 if bf16 and (method.startswith("zero") or method == "fsdp2") else 4
    return shape.layers * tokens * shape.hidden * stream + max(layer + gradients, head)


def reference_pass(
    method: str, shape: Shape, processes: int, bf16: bool = True, frozen: float | None = None
) -> float:
    """Bytes a GPU of the model whose log-probabilities are cached before training: its weights as training
    will hold them, `frozen` bytes each with adapters, and the largest unit gathered where they are sharded.
    """
    weights, unit = (frozen or _kept_weight(method, bf16)) * shape.parameters, 2 * shape.layer + shape.head
    if not SHARES[method][0]:
        return weights
    if method != "fsdp2":
        unit = max(unit, min(shape.parameters, LIVE))
    return weights / processes + (2 if bf16 else 4) * unit


@dataclass(frozen=True)
class Need:
    """Bytes a GPU of one method: `states`, `buffers`, `activations` of training, `reference` of the pass
    before it; `cpu`: bytes of the machines' own memory.
    """

    method: str
    states: float
    buffers: float
    activations: float
    reference: float
    cpu: float

    @property
    def total(self) -> float:
        return max(self.states + self.buffers + self.activations, self.reference) + RESERVED

    @property
    def together(self) -> float:
        """Where the reference stays while the policy is trained, as online."""
        return self.states + self.buffers + self.activations + self.reference + RESERVED


def need(
    method: str,
    shape: Shape,
    processes: int,
    pairs: float,
    max_length: int,
    checkpointing: bool = True,
    trainable: int | None = None,
    bf16: bool = True,
    frozen: float | None = None,
    reference: bool = True,
) -> Need:
    """The Need of a method with `pairs` pairs per GPU at once; `frozen`: see `states`; `reference`: whether
    the loss looks at one.
    """
    frozen = None if trainable is None else frozen or (2 if bf16 else 4)
    kept, moved = states(method, shape.parameters, processes, trainable, bf16, frozen)
    more, more_moved = buffers(method, shape, processes, trainable, bf16)
    passing = activations(shape, pairs, max_length, method, checkpointing, trainable, bf16)
    return Need(
        method,
        kept,
        more,
        passing,
        reference_pass(method, shape, processes, bf16, frozen) if reference else 0.0,
        moved + more_moved,
    )
