"""Packed rows and servers held against a padded pass, by what rounding does to the same tokens."""

import torch
from accelerate.utils import gather

from common.cli import UserError
from common.shared_prompts import Unsupported, is_rotary, own_attention
from common.training import say
from dpo_iteration.packing import PaddedCollator, Scored, score

# `check_packing`, in rounding's root mean square over tokens: a response of n tokens may be off by ALL + FEW
# / √n of it.
ALL, FEW = 3.0, 6.0
# At least so much (a few tokens may round less by luck) in half precision (True) and in fp32.
ROUNDING = {True: 0.02, False: 3e-5}


@torch.no_grad()
def check_packing(
    model: torch.nn.Module, base: torch.nn.Module, batch: dict, pad_token_id: int, half: bool, name: str
):
    """Compute the pairs of a packed row again, padded and one by one; stop if a response differs by more than
    rounding.

    What rounding does to this model is measured on the same tokens: the padded pass is made once more with
    all positions moved on by one, which rotary encodings see by rounding alone. All ranks call it, each with
    its own `batch`.

    Args:
        model: as it is called, in evaluation; `base`: the prepared model in it.
        half: whether it computes in bf16 or fp16.
        name: what it is called in what is said.

    Raises:
        UserError: its packed rows are not what its padded ones are.
    """
    pads, pairs, device = PaddedCollator(pad_token_id), batch["pairs"], batch["scale"].device
    try:
        packed = of_responses(batch, score(model, batch))
    except Unsupported as error:
        raise UserError(
            f"prompts cannot be shared with the {name} ({error}): give --share_prompts false"
        ) from None
    # Under ZeRO-3 every pass needs all processes, which may have other numbers of pairs.
    count = int(gather(torch.tensor([len(pairs)], device=device)).max())
    apart, moved = [], []
    with own_attention(base):
        for p in [min(p, len(pairs) - 1) for p in range(count)]:
            padded = {
                k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in pads([pairs[p]]).items()
            }
            theirs = of_responses(padded, score(model, padded))
            for ours, other in zip(packed[2 * p : 2 * p + 2], theirs, strict=True):
                difference = ours - other if len(ours) == len(other) else torch.full_like(other, torch.inf)
                # What is no number in the padded pass is told where it is used.
                apart.append(difference.where(other.isfinite(), 0.0))
            if is_rotary(base):
                length = padded["input_ids"].shape[1]
                later = torch.arange(1, length + 1, device=device).expand_as(padded["input_ids"])
                again = of_responses(padded, score(model, padded | {"position_ids": later}))
                moved += [one - other for one, other in zip(again, theirs, strict=True)]
    distance, limit = furthest(apart, moved, half, device)
    if not distance <= limit:
        raise UserError(
            f"packed rows give log-probabilities of the {name} that differ from the padded ones by "
            f"{distance:.2g} a token (at most {limit:.2g} is rounding in such a response): give "
            "--share_prompts false"
        )
    say(f"{name}: packing check passed, max difference {distance:.1e} per token (rounding: {limit:.1e})")


def furthest(
    apart: list[torch.Tensor], moved: list[torch.Tensor], half: bool, device: torch.device
) -> tuple[float, float]:
    """(distance a token, what rounding explains) of the response whose first is largest by its second. All
    ranks call it.

    Args:
        apart: for each response, [tokens] what log-probabilities differ by from those they should be.
        moved: what rounding does to such: the same of padded passes whose positions differ by one.
        half: whether anything of it was computed in bf16 or fp16.
    """
    moved = torch.cat([*moved, torch.zeros(0, device=device)])
    sums = torch.stack([moved.square().sum(), torch.tensor(float(len(moved)), device=device)])
    squares, tokens = gather(sums[None]).sum(0).tolist()
    rounding = max(ROUNDING[half], (squares / tokens) ** 0.5) if tokens else 5 * ROUNDING[half]
    every = (*(one for one in apart if len(one)), torch.cat(apart))  # there may be no rejected responses
    found = [(one.square().mean().sqrt(), rounding * (ALL + FEW / len(one) ** 0.5)) for one in every]
    found = gather(torch.tensor(found, device=device))  # [responses, 2]: distance, bound
    return found[(found[:, 0] / found[:, 1]).nan_to_num(torch.inf).argmax()].tolist()


def of_responses(batch: dict, scored: Scored) -> list[torch.Tensor]:
    """The log-probabilities of each response's tokens, [tokens] in fp32: chosen and rejected of the first
    pair, of the second, …
    """
    values = scored.outputs.log_probs.float()
    if "row" in batch:
        owner = batch["owner"]
        return [
            values[0, (owner == 3 * p + whose) | (owner == 3 * p + 2)]
            for p in range(len(batch["scale"]))
            for whose in (0, 1)
        ]
    masks = scored.of_chosen | scored.of_rejected
    return [values[i, masks[i]] for p in range(len(values) // 2) for i in (p, p + len(values) // 2)]
