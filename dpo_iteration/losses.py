"""What DPO optimises: a loss for each pair, from the log-probabilities of its responses.

    losses = pair_losses(pairs, ["sigmoid"], [1.0], Settings(beta=0.1, label_smoothing=0.1))

Δ is the difference of the log-ratios, (log π(chosen) - log π_ref(chosen)) - (log π(rejected) - log
π_ref(rejected)), with log-probabilities summed over a response's tokens. Names and constants are those of
TRL's `loss_type`, whose trainers are the oracle in the tests; beyond DPO's there are label smoothing for
`sigmoid`, an offset by the pair's margin, `kto`, and the losses without a reference: `sft`, `simpo` and
`cpo`.

A new loss is a function here with `@loss(trl=False)` above it. Torch is imported where it is needed, so that
arguments can be checked without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class Settings:
    """Numbers that the losses share.

    beta: strength of the tie to the reference.
    label_smoothing: share of preferences taken as wrong.
    margin_scale: share of a pair's margin (in units of reward) that β·Δ has to exceed.
    discopop_tau: temperature of the mixture in DiscoPOP.
    simpo_gamma: by how much β × the difference of log-probabilities a token has to exceed 0 in SimPO.
    desirable_weight, undesirable_weight: λ of chosen and of rejected responses in KTO.
    """

    beta: float
    label_smoothing: float = 0.0
    margin_scale: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass
class Pairs:
    """Each a tensor of [pairs].

    chosen, rejected: log-probabilities under the policy, summed over the response's tokens.
    ref_chosen, ref_rejected: the same under the reference.
    chosen_tokens, rejected_tokens: tokens of the responses.
    margin: reward of chosen less that of rejected.
    step_tokens: tokens of a chosen response, in the mean over the pairs of the optimizer step.
    kl: of the policy to the reference, at least 0, as answers to other prompts show it; a number for the
        whole optimizer step (0-d), without gradient.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    margin: torch.Tensor
    step_tokens: torch.Tensor | None = None
    kl: torch.Tensor | None = None

    @property
    def ratios(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(log π/π_ref of chosen, of rejected)."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    def per_token(self, chosen: torch.Tensor, rejected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the tokens of chosen and of rejected, [pairs], as means a token."""
        return chosen / self.chosen_tokens.clamp(min=1), rejected / self.rejected_tokens.clamp(min=1)


@dataclass(frozen=True)
class Loss:
    """A value of `loss_type`.

    compute: gives the loss of each pair, [pairs], from Pairs and Settings; None for TRL's own computation.
    smoothed: `label_smoothing` has an effect.
    offset: `margin_scale` has an effect: the loss is a function of `scaled_difference` alone.
    trl: TRL's DPOTrainer has it under the same name, and the tests hold it to that.
    reference: it looks at the reference. Where no loss does, none is computed.
    rejected: it looks at the rejected response. Where no loss does, only one response of a prompt is trained.
    per_token: it compares log-probabilities a token, and so does the log.
    mismatched: it looks at `Pairs.kl`, for which each pair gets an answer to another prompt.
    """

    compute: Callable[[Pairs, Settings], torch.Tensor] | None = None
    smoothed: bool = False
    offset: bool = False
    trl: bool = True
    reference: bool = True
    rejected: bool = True
    per_token: bool = False
    mismatched: bool = False


# The losses by name. Of these two a pair's loss depends on the other pairs of its pass: TRL computes them, on
# padded batches.
LOSSES = {"aot": Loss(smoothed=True), "aot_unpaired": Loss(smoothed=True)}


def loss(**traits: bool) -> Callable:
    """Make a function a loss under its own name; `traits`: see Loss."""

    def register(function: Callable) -> Callable:
        LOSSES[function.__name__] = Loss(function, **traits)
        return function

    return register


def needs_reference(loss_types: list[str]) -> bool:
    """Whether any of the losses looks at the reference."""
    return any(LOSSES[name].reference for name in loss_types)


def needs_rejected(loss_types: list[str]) -> bool:
    """Whether any of the losses looks at the rejected response."""
    return any(LOSSES[name].rejected for name in loss_types)


def needs_mismatched(loss_types: list[str]) -> bool:
    """Whether any of the losses looks at answers to other prompts."""
    return any(LOSSES[name].mismatched for name in loss_types)


def implicit_rewards(pairs: Pairs, loss_types: list[str], beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """β × what the first loss of pairs compares, of chosen and of rejected, each [pairs]; for the log."""
    first = next((LOSSES[name] for name in loss_types if LOSSES[name].rejected), LOSSES[loss_types[0]])
    found = pairs.ratios if first.reference else (pairs.chosen, pairs.rejected)
    chosen, rejected = pairs.per_token(*found) if first.per_token else found
    return beta * chosen, beta * rejected


def pair_losses(
    pairs: Pairs, loss_types: list[str], weights: list[float], settings: Settings
) -> torch.Tensor:
    """Weighted sum of the losses of each pair, [pairs]; `weights` has one number for each of `loss_types`."""
    return sum(
        weight * LOSSES[name].compute(pairs, settings)
        for name, weight in zip(loss_types, weights, strict=True)
    )


def scaled_difference(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """β·Δ less the offset, [pairs].

    Amini et al. 2024, "Direct Preference Optimization with an Offset", arXiv 2402.10571.
    """
    chosen, rejected = pairs.ratios
    return settings.beta * (chosen - rejected) - settings.margin_scale * pairs.margin


def logsigmoid(values: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


@loss(smoothed=True, offset=True)
def sigmoid(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """DPO (arXiv 2305.18290): -(1 - ε)·logσ(βΔ) - ε·logσ(-βΔ).

    With label smoothing ε it is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences and
    relationship to IPO").
    """
    difference, epsilon = scaled_difference(pairs, settings), settings.label_smoothing
    return -(1 - epsilon) * logsigmoid(difference) - epsilon * logsigmoid(-difference)


@loss(smoothed=True, offset=True)
def robust(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """Unbiased under flipped labels (arXiv 2403.00409): [-(1 - ε)·logσ(βΔ) + ε·logσ(-βΔ)] / (1 - 2ε)."""
    difference, epsilon = scaled_difference(pairs, settings), settings.label_smoothing
    return (-(1 - epsilon) * logsigmoid(difference) + epsilon * logsigmoid(-difference)) / (1 - 2 * epsilon)


@loss(offset=True)
def hinge(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """SLiC (arXiv 2305.10425) as in RSO (arXiv 2309.06657): max(0, 1 - βΔ)."""
    return (1 - scaled_difference(pairs, settings)).relu()


@loss(smoothed=True, offset=True)
def exo_pair(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """EXO (arXiv 2402.00856, equation 16): KL from (σ(βΔ), σ(-βΔ)) to (1 - ε, ε)."""
    import torch

    difference = scaled_difference(pairs, settings)
    epsilon = torch.tensor(settings.label_smoothing, device=difference.device)
    won = torch.sigmoid(difference) * (logsigmoid(difference) - torch.log1p(-epsilon))
    return won + torch.sigmoid(-difference) * (logsigmoid(-difference) - torch.log(epsilon))


@loss(offset=True)
def discopop(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """DiscoPOP (arXiv 2406.08414, equation 5): logistic and exponential loss mixed by σ(βΔ / τ)."""
    difference = scaled_difference(pairs, settings)
    mix = (difference / settings.discopop_tau).sigmoid()
    return -logsigmoid(difference) * (1 - mix) + (-difference).exp() * mix


@loss()
def ipo(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """IPO (arXiv 2310.12036, equation 17) on log-ratios a token, as its authors meant it according to TRL."""
    chosen, rejected = pairs.per_token(*pairs.ratios)
    return (chosen - rejected - 1 / (2 * settings.beta)) ** 2


@loss()
def sigmoid_norm(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """DPO on log-ratios a token (as Tulu 3, arXiv 2411.15124)."""
    chosen, rejected = pairs.per_token(*pairs.ratios)
    return -logsigmoid(settings.beta * (chosen - rejected))


@loss()
def nca_pair(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """NCA for pairs (arXiv 2402.05369)."""
    chosen, rejected = (settings.beta * ratio for ratio in pairs.ratios)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@loss()
def bco_pair(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """BCO without its moving reference point (arXiv 2404.04656)."""
    chosen, rejected = (settings.beta * ratio for ratio in pairs.ratios)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


@loss()
def sppo_hard(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """SPPO with win probabilities 1 and 0 (arXiv 2405.00675, equation 4.7)."""
    chosen, rejected = pairs.ratios
    return (chosen - 0.5 / settings.beta) ** 2 + (rejected + 0.5 / settings.beta) ** 2


@loss()
def apo_zero(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """APO-zero (arXiv 2408.06266, equation 7): chosen up, rejected down."""
    chosen, rejected = (settings.beta * ratio for ratio in pairs.ratios)
    return 1 - chosen.sigmoid() + rejected.sigmoid()


@loss()
def apo_down(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """APO-down (arXiv 2408.06266, equation 8): both down, rejected further."""
    chosen, rejected = (settings.beta * ratio for ratio in pairs.ratios)
    return chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()


@loss(trl=False, mismatched=True)
def kto(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """KTO (arXiv 2402.01306): λ_D·[1 - σ(β(log π/π_ref - KL))] of the chosen response and
    λ_U·[1 - σ(β(KL - log π/π_ref))] of the rejected one, each by itself; the mean of the two, as TRL's
    KTOTrainer has it, whose batches hold them as two examples.
    """
    chosen, rejected = pairs.ratios
    desirable = 1 - (settings.beta * (chosen - pairs.kl)).sigmoid()
    undesirable = 1 - (settings.beta * (pairs.kl - rejected)).sigmoid()
    return (settings.desirable_weight * desirable + settings.undesirable_weight * undesirable) / 2


# Without a reference


@loss(reference=False, rejected=False)
def sft(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """Supervised fine-tuning on the chosen response: on the best of K, RAFT (arXiv 2304.06767).

    In the mean over an optimizer step's pairs it is the mean over their chosen tokens, as TRL's SFTTrainer
    has it, whichever pass they are in.
    """
    return -pairs.chosen / pairs.step_tokens


@loss(smoothed=True, trl=False, reference=False, per_token=True)
def simpo(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """SimPO (arXiv 2405.14734, equation 6) on log-probabilities a token, smoothed as `sigmoid` is."""
    chosen, rejected = pairs.per_token(pairs.chosen, pairs.rejected)
    difference = settings.beta * (chosen - rejected) - settings.simpo_gamma
    epsilon = settings.label_smoothing
    return -(1 - epsilon) * logsigmoid(difference) - epsilon * logsigmoid(-difference)


@loss(smoothed=True, trl=False, reference=False)
def cpo(pairs: Pairs, settings: Settings) -> torch.Tensor:
    """CPO (arXiv 2401.08417, equation 5): DPO under a uniform reference, and `sft` added to it."""
    difference, epsilon = settings.beta * (pairs.chosen - pairs.rejected), settings.label_smoothing
    preferred = -(1 - epsilon) * logsigmoid(difference) - epsilon * logsigmoid(-difference)
    return preferred + sft(pairs, settings)
