"""losses.py against formulas in float64 and against TRL's own `_compute_loss`, gradients too."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer

from dpo_iteration.losses import (
    LOSSES,
    Pairs,
    Settings,
    implicit_rewards,
    needs_mismatched,
    needs_reference,
    needs_rejected,
    pair_losses,
)

CHOSEN_TOKENS, REJECTED_TOKENS = torch.tensor([4, 9, 1, 6]), torch.tensor([7, 2, 3, 6])
LENGTH, KL = 12, 0.4
PAIRWISE = sorted(name for name, one in LOSSES.items() if one.compute)


def per_token(seed):
    """[8, 12] log-probabilities a token, those of four chosen and four rejected responses; zero beyond their
    ends.
    """
    tokens = torch.cat([CHOSEN_TOKENS, REJECTED_TOKENS])
    mask = torch.arange(LENGTH) < tokens[:, None]
    torch.manual_seed(seed)
    return -torch.rand(8, LENGTH, dtype=torch.float64) * 3 * mask, mask


def pairs_of(policy, reference, margin=0.0):
    sums = [*policy.sum(1).chunk(2), *reference.sum(1).chunk(2)]
    mean = CHOSEN_TOKENS.double().mean().expand(4)
    margins, kl = torch.full((4,), margin, dtype=torch.float64), torch.tensor(KL, dtype=torch.float64)
    return Pairs(*sums, CHOSEN_TOKENS, REJECTED_TOKENS, margins, mean, kl)


def trls(policy, reference, mask, loss_types, weights, beta, smoothing):
    """TRL's loss of the same log-probabilities; its model and accelerator are stand-ins, so that its formulas
    alone count.
    """

    def model(log_probs):
        zeros = torch.zeros_like(log_probs)
        return lambda **inputs: SimpleNamespace(
            log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    same = lambda value: value  # noqa: E731
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same, unwrap_model=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=weights,
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    # One column more: the first token has no log-probability.
    completion = torch.cat([torch.zeros(8, 1, dtype=torch.bool), mask], 1).long()
    chosen, rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": completion,
        "attention_mask": completion,
        "completion_mask": completion,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    return DPOTrainer._compute_loss(trainer, model(policy), inputs, False)


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_loss_that_says_it_is_smoothed_or_shifted_is(name):
    """`smoothed` and `offset` are what arguments are refused by."""
    (policy, _), (reference, _) = per_token(1), per_token(2)

    def value(smoothing=0.1, margin_scale=0.0):
        return pair_losses(
            pairs_of(policy, reference, 2.0), [name], [1.0], Settings(0.5, smoothing, margin_scale)
        )

    assert LOSSES[name].smoothed == (not value(smoothing=0.2).equal(value()))
    assert LOSSES[name].offset == (not value(margin_scale=0.3).equal(value()))


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_loss_looks_at_what_it_says(name):
    """`reference` and `rejected` are what is left out by: a model, and half of the tokens."""
    parts = [per_token(seed)[0].requires_grad_() for seed in (1, 2)]
    loss = pair_losses(pairs_of(*parts), [name], [1.0], Settings(0.5, 0.1)).sum()
    policy, reference = torch.autograd.grad(loss, parts, allow_unused=True)
    assert LOSSES[name].reference == (reference is not None)
    assert LOSSES[name].rejected == bool(policy[4:].any()) and policy[:4].any()
    pairs = pairs_of(*parts)
    pairs.kl += 1.0
    moved = pair_losses(pairs, [name], [1.0], Settings(0.5, 0.1)).sum()
    assert LOSSES[name].mismatched == (not moved.equal(loss))
    one, own = [name], LOSSES[name]
    needed = (needs_reference(one), needs_rejected(one), needs_mismatched(one))
    assert needed == (own.reference, own.rejected, own.mismatched)
    assert needs_reference([name, "sigmoid"]) and needs_rejected([name, "sigmoid"])


CASES = [([name], [1.0]) for name in PAIRWISE if LOSSES[name].trl] + [
    (["sigmoid", "hinge", "nca_pair"], [0.5, 2.0, 0.1]),
    (["robust", "exo_pair"], [1.0, 0.3]),
    (["sigmoid", "sft"], [1.0, 0.2]),
]


@pytest.mark.parametrize("loss_types, weights", CASES)
@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_losses_and_gradients_are_trls(loss_types, weights, beta):
    smoothing = 0.2 if set(loss_types) & {"robust", "exo_pair"} else 0.0
    (policy, mask), (reference, _) = per_token(1), per_token(2)
    policy.requires_grad_()
    ours = pair_losses(pairs_of(policy, reference), loss_types, weights, Settings(beta, smoothing)).mean()
    theirs = trls(policy, reference, mask, loss_types, weights, beta, smoothing)
    # TRL's EXO holds its label smoothing in float32.
    tight = 1e-7 if "exo_pair" in loss_types else 1e-12
    assert abs(ours - theirs) < tight * max(1.0, abs(theirs))
    [have], [want] = torch.autograd.grad(ours, policy), torch.autograd.grad(theirs, policy)
    assert ((have - want) * mask).abs().max() < tight and want.abs().max() > 1e-4


def test_what_is_logged_is_what_a_loss_compares():
    """SFT compares nothing, so that beside another loss it does not matter which is named first."""
    pairs = pairs_of(*(per_token(seed)[0] for seed in (1, 2)))
    for found, want in zip(implicit_rewards(pairs, ["sft", "sigmoid"], 0.5), pairs.ratios, strict=True):
        assert (found - 0.5 * want).abs().max() < 1e-12 and want.abs().max() > 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["simpo", "cpo"])
def test_losses_without_a_reference_are_trls_cpo_trainers(name, smoothing):
    """Its CPO adds the mean of the chosen tokens' -log p (`cpo_alpha` 1), its SimPO takes means a token."""
    (policy, mask), (reference, _) = per_token(1), per_token(2)
    policy.requires_grad_()
    pairs, settings = pairs_of(policy, reference), Settings(2.0, smoothing, simpo_gamma=1.4)
    ours = pair_losses(pairs, [name], [1.0], settings).mean()
    # Once more beside a loss that has a reference.
    both = pair_losses(pairs, ["hinge", name], [0.0, 1.0], settings).mean()
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=1.4,
        label_smoothing=smoothing,
        loss_type={"cpo": "sigmoid"}.get(name, name),
        accelerator=SimpleNamespace(device="cpu"),
    )
    tokens = mask.sum(1) if name == "simpo" else 1
    theirs, *rewards = CPOTrainer.cpo_loss(trainer, *(policy.sum(1) / tokens).chunk(2))
    theirs = theirs.mean() - (policy[:4][mask[:4]].mean() if name == "cpo" else 0.0)
    assert abs(ours - theirs) < 1e-12 and abs(both - theirs) < 1e-12
    [have], [want] = torch.autograd.grad(ours, policy), torch.autograd.grad(theirs, policy)
    assert ((have - want) * mask).abs().max() < 1e-12 and want.abs().max() > 1e-4
    for mine, his in zip(implicit_rewards(pairs, [name], 2.0), rewards, strict=True):
        assert (mine - his).abs().max() < 1e-12


def test_kto_is_its_formula():
    """λ·(1 - σ(z)) = λ / (1 + exp z) of each response by itself."""
    policy, reference = (per_token(seed)[0] for seed in (1, 2))
    settings = Settings(0.5, desirable_weight=1.5, undesirable_weight=0.7)
    got = pair_losses(pairs_of(policy, reference), ["kto"], [1.0], settings)
    ratios = (policy - reference).sum(1).tolist()
    for loss, chosen, rejected in zip(got.tolist(), ratios[:4], ratios[4:], strict=True):
        desirable = 1.5 / (1 + math.exp(0.5 * (chosen - KL)))
        assert loss == pytest.approx((desirable + 0.7 / (1 + math.exp(0.5 * (KL - rejected)))) / 2, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3, 0.49])
def test_sigmoid_with_label_smoothing_is_conservative_dpo(smoothing):
    (policy, mask), (reference, _) = per_token(3), per_token(4)
    policy.requires_grad_()
    got = pair_losses(pairs_of(policy, reference), ["sigmoid"], [1.0], Settings(0.1, smoothing))
    chosen, rejected = (policy.sum(1) - reference.sum(1)).chunk(2)
    scaled = 0.1 * (chosen - rejected)
    want = -(1 - smoothing) * torch.log(torch.sigmoid(scaled)) - smoothing * torch.log(torch.sigmoid(-scaled))
    assert (got - want).abs().max() < 1e-12
    [have], [expected] = torch.autograd.grad(got.sum(), policy), torch.autograd.grad(want.sum(), policy)
    assert (have - expected).abs().max() < 1e-12
    # A second oracle: TRL's robust loss with ε′ = -ε / (1 - 2ε) is the same function.
    robust = trls(policy, reference, mask, ["robust"], [1.0], 0.1, -smoothing / (1 - 2 * smoothing))
    assert abs(robust - got.mean()) < 1e-12


@pytest.mark.parametrize("name", [name for name in PAIRWISE if LOSSES[name].offset])
def test_the_offset_is_a_shift_of_the_difference(name):
    """β(Δ - c/β) = βΔ - c: a margin moves the loss as moving the reference's chosen log-probability does."""
    (policy, _), (reference, _) = per_token(6), per_token(7)
    smoothing = 0.1 if name in ("robust", "exo_pair") else 0.0
    scaled = Settings(0.5, smoothing, margin_scale=0.3)
    offset = pair_losses(pairs_of(policy, reference, margin=2.0), [name], [1.0], scaled)
    moved = pairs_of(policy, reference)
    moved.ref_chosen = moved.ref_chosen + 0.3 * 2.0 / 0.5
    assert torch.allclose(offset, pair_losses(moved, [name], [1.0], Settings(0.5, smoothing)), atol=1e-12)
