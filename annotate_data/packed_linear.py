"""Linear layers whose weights lie as oneDNN likes them, for scoring on a CPU.

torch multiplies float32 matrices with MKL, which on some processors reaches three quarters of what oneDNN
does; and in bfloat16 it puts the weights in order at every call. The operator is the one that torch's own
compiler uses; it is not public, so where it is missing or refuses, the layers stay as they were.
"""

import torch

ROWS = 2048  # of the inputs that the order is chosen for; others work too


class PackedLinear(torch.nn.Module):
    """`torch.nn.Linear` without gradients; the weights cannot be read back."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[…, in features] → […, out features]"""
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")


def pack_linears(model: torch.nn.Module) -> int:
    """Replace the linear layers of a model on the CPU, one by one; returns how many were."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and child.weight.dtype in (torch.float32, torch.bfloat16):
                try:
                    with torch.inference_mode():
                        packed = PackedLinear(child)
                        packed(torch.zeros(1, child.in_features, dtype=child.weight.dtype))
                except (RuntimeError, AttributeError):  # another torch, or a processor unknown to oneDNN
                    return count
                setattr(parent, name, packed)
                count += 1
    return count
