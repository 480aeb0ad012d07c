"""How well a training used its GPUs: arithmetic a second, its share of what they can do, and memory."""

from typing import TYPE_CHECKING

from common.cli import UserError
from common.devices import gpu_name, speed_of
from dpo_iteration.memory import GIB, Shape, shape_of

if TYPE_CHECKING:
    from dpo_iteration.arguments import Arguments
    from dpo_iteration.dpo import IterativeDPOTrainer


def flops_per_token(shape: Shape, frozen: bool = False) -> int:
    """Floating-point operations of one token's forward and backward pass, attention's sums over other tokens
    aside: 2 and 4 for each weight that it is multiplied by (arXiv 2001.08361, §2.1). Input embeddings are
    looked up. What gradient checkpointing computes again does not count.

    Args:
        frozen: weights without gradients of their own, as LoRA has them: 2 in the backward pass.
    """
    multiplied = shape.parameters - (0 if shape.tied else shape.head)
    return (4 if frozen else 6) * multiplied


def of_training(trainer: "IterativeDPOTrainer", args: "Arguments", seconds: float) -> dict[str, float]:
    """Figures of a training that ran for `seconds`, to be asked for on every rank; none without a GPU.

    Returns:
        `gpu_memory_gib`, the most that torch held on a GPU; `tflops_per_gpu`; `mfu`, their share of the
        GPU's peak in bf16, where that is known (arXiv 2204.02311, appendix B).
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    accelerator = trainer.accelerator
    held = torch.tensor(torch.cuda.max_memory_reserved() / GIB, device=accelerator.device)
    found = {"gpu_memory_gib": accelerator.gather(held).max().item()}
    try:
        shape = shape_of(args.model_name_or_path, args.revision, args.trust_remote_code)
    except UserError:  # the trained model is not saved yet: nothing may end the run here
        return found
    flops = trainer.tokens * flops_per_token(shape, args.use_peft)
    found["tflops_per_gpu"] = flops / seconds / accelerator.num_processes / 1e12
    kind, known = speed_of(gpu_name())
    return found | ({"mfu": found["tflops_per_gpu"] / kind.tflops} if known else {})
