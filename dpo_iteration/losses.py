"""What DPO optimises: a loss for each pair from the log-probabilities of its responses. Tensors in, tensors
out.

    losses = pair_losses(pairs, ["sigmoid"], [1.0], Settings(beta=0.1, label_smoothing=0.1))

Δ is the difference of the log-ratios, (log π(chosen) - log π_ref(chosen)) - (log π(rejected) - log
π_ref(rejected)), with log-probabilities summed over a response's tokens. The names and constants are those of
TRL's `loss_type`, whose trainer is the oracle in the tests; beyond it there are label smoothing for `sigmoid`
and an offset by the pair's margin. settings.py says which losses there are without torch.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid, relu


@dataclass
class Settings:
    """beta: strength of the tie to the reference; label_smoothing: share of preferences taken as wrong;
    margin_scale: how much
    of a pair's margin, in units of reward, Δ has to exceed; discopop_tau: temperature of the mixture in
    DiscoPOP."""

    beta: float
    label_smoothing: float = 0.0
    margin_scale: float = 0.0
    discopop_tau: float = 0.05


@dataclass
class Pairs:
    """Each a tensor of [pairs].

    chosen, rejected: log-probabilities under the policy, summed over the response's tokens.
    ref_chosen, ref_rejected: the same under the reference.
    chosen_tokens, rejected_tokens: tokens of the responses.
    margin: reward of chosen less that of rejected.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor
    ref_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    margin: torch.Tensor

    @property
    def ratios(self):
        """(log π/π_ref of chosen, of rejected)."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected


def pair_losses(pairs, loss_types, weights, settings):
    """Sum of the losses of each pair, [pairs]; `weights` has one number for each of `loss_types`."""
    return sum(
        weight * LOSSES[name](pairs, settings) for name, weight in zip(loss_types, weights, strict=True)
    )


def scaled_difference(pairs, settings):
    """β·Δ less the offset (Amini et al.

    2024, "Direct Preference Optimization with an Offset", arXiv 2402.10571).
    """
    chosen, rejected = pairs.ratios
    return settings.beta * (chosen - rejected) - settings.margin_scale * pairs.margin


def sigmoid(pairs, settings):
    """DPO (arXiv 2305.18290); with label smoothing ε conservative DPO (Mitchell 2023, "A note on DPO with
    noisy preferences and
    relationship to IPO"): -(1 - ε)·logσ(βΔ) - ε·logσ(-βΔ)."""
    difference, epsilon = scaled_difference(pairs, settings), settings.label_smoothing
    return -(1 - epsilon) * logsigmoid(difference) - epsilon * logsigmoid(-difference)


def robust(pairs, settings):
    """Unbiased under flipped labels (arXiv 2403.00409): [-(1 - ε)·logσ(βΔ) + ε·logσ(-βΔ)] / (1 - 2ε)."""
    difference, epsilon = scaled_difference(pairs, settings), settings.label_smoothing
    return (-(1 - epsilon) * logsigmoid(difference) + epsilon * logsigmoid(-difference)) / (1 - 2 * epsilon)


def hinge(pairs, settings):
    """SLiC (arXiv 2305.10425) as in RSO (arXiv 2309.06657): max(0, 1 - βΔ)."""
    return relu(1 - scaled_difference(pairs, settings))


def exo_pair(pairs, settings):
    """EXO (arXiv 2402.00856, equation 16): KL from (σ(βΔ), σ(-βΔ)) to (1 - ε, ε)."""
    difference, epsilon = (
        scaled_difference(pairs, settings),
        torch.tensor(settings.label_smoothing, device=pairs.chosen.device),
    )
    won = torch.sigmoid(difference) * (logsigmoid(difference) - torch.log1p(-epsilon))
    return won + torch.sigmoid(-difference) * (logsigmoid(-difference) - torch.log(epsilon))


def discopop(pairs, settings):
    """DiscoPOP (arXiv 2406.08414, equation 5): logistic and exponential loss mixed by σ(βΔ / τ)."""
    difference = scaled_difference(pairs, settings)
    mix = torch.sigmoid(difference / settings.discopop_tau)
    return -logsigmoid(difference) * (1 - mix) + torch.exp(-difference) * mix


def _per_token(pairs):
    chosen, rejected = pairs.ratios
    return chosen / pairs.chosen_tokens.clamp(min=1) - rejected / pairs.rejected_tokens.clamp(min=1)


def ipo(pairs, settings):
    """IPO (arXiv 2310.12036, equation 17) on log-ratios a token, as its authors meant it according to TRL."""
    return (_per_token(pairs) - 1 / (2 * settings.beta)) ** 2


def sigmoid_norm(pairs, settings):
    """DPO on log-ratios a token (as Tulu 3, arXiv 2411.15124)."""
    return -logsigmoid(settings.beta * _per_token(pairs))


def nca_pair(pairs, settings):
    """NCA for pairs (arXiv 2402.05369)."""
    chosen, rejected = (settings.beta * ratio for ratio in pairs.ratios)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs, settings):
    """BCO without its moving reference point (arXiv 2404.04656)."""
    chosen, rejected = (settings.beta * ratio for ratio in pairs.ratios)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(pairs, settings):
    """SPPO with win probabilities 1 and 0 (arXiv 2405.00675, equation 4.7)."""
    chosen, rejected = pairs.ratios
    return (chosen - 0.5 / settings.beta) ** 2 + (rejected + 0.5 / settings.beta) ** 2


def apo_zero(pairs, settings):
    """APO-zero (arXiv 2408.06266, equation 7): chosen up, rejected down."""
    chosen, rejected = (settings.beta * ratio for ratio in pairs.ratios)
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(pairs, settings):
    """APO-down (arXiv 2408.06266, equation 8): both down, rejected further."""
    chosen, rejected = (settings.beta * ratio for ratio in pairs.ratios)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


LOSSES = {
    function.__name__: function
    for function in (
        sigmoid,
        robust,
        hinge,
        exo_pair,
        discopop,
        ipo,
        sigmoid_norm,
        nca_pair,
        bco_pair,
        sppo_hard,
        apo_zero,
        apo_down,
    )
}
