"""The mathematics of ppo/train_ppo.py: against OpenRLHF's own functions, float64, and answers known
beforehand.
"""

import ast
import importlib
import itertools
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from openrlhf_stub import wheel

from ppo import train_ppo as ppo

INSIDE = "openrlhf-0.11.2.data/purelib/"


@pytest.fixture(scope="module")
def openrlhf():
    """OpenRLHF's modules by name, read out of the wheel without its packages' own imports (ray, vllm, …)."""
    before = set(sys.modules)
    # 20 s to import, for nothing that is used here.
    with_deepspeed = sys.modules.setdefault("deepspeed", types.ModuleType("deepspeed"))
    for package in ("openrlhf", "openrlhf.models", "openrlhf.trainer", "openrlhf.trainer.ppo_utils"):
        stub = sys.modules[package] = types.ModuleType(package)
        stub.__path__ = [f"{wheel()}/{INSIDE}{package.replace('.', '/')}"]
    names = ("models.loss", "models.utils", "trainer.ppo_utils.kl_controller")
    found = {name.rpartition(".")[2]: importlib.import_module(f"openrlhf.{name}") for name in names}
    yield types.SimpleNamespace(**found)
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "openrlhf" or sys.modules[name] is with_deepspeed:
            del sys.modules[name]


def method(name, **names):
    """One method of OpenRLHF's RemoteExperienceMaker, whose module cannot be imported without ray."""
    with zipfile.ZipFile(wheel()) as archive:
        source = archive.read(f"{INSIDE}openrlhf/trainer/ppo_utils/experience_maker.py").decode()
    [node] = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == name]
    space = {
        "torch": torch,
        "itertools": itertools,
        "List": list,
        "Tuple": tuple,
        "Experience": object,
    } | names
    exec(compile(ast.Module([node], []), "experience_maker.py", "exec"), space)
    return space[name]


def numbers(seed, shape=(6, 9), dtype=torch.float32):
    """Random tensors of a batch, with responses of 1 to 9 tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 9, 3, 7, 2, 5])
    mask = (torch.arange(shape[1]) < lengths[:, None]).to(dtype)

    def draw(scale=1.0):
        return torch.randn(shape, generator=g, dtype=torch.float64).mul(scale).to(dtype) * mask

    return types.SimpleNamespace(
        mask=mask,
        new=draw(0.4) - 2,
        old=draw(0.4) - 2,
        ref=draw(0.4) - 2,
        values=draw(),
        older=draw(),
        returns=draw(2),
        advantages=draw(),
        scores=torch.randn(shape[0], generator=g, dtype=torch.float64).to(dtype),
    )


def same(a, b, **limits):
    torch.testing.assert_close(a, b, **({"rtol": 1e-5, "atol": 1e-6} | limits))


@pytest.mark.parametrize("seed", range(3))
def test_losses_are_openrlhfs(openrlhf, seed):
    x = numbers(seed)
    tokens = x.mask.sum()
    theirs, clipped, *_ = openrlhf.loss.PolicyLoss(0.2, 0.2)(x.new, x.old, x.advantages, x.mask)
    losses, ratio = ppo.policy_loss(x.new, x.old, x.advantages, 0.2)
    same((losses * x.mask).sum() / tokens, theirs)
    assert clipped > 0.1  # clipping is at work
    for clip in (0.2, 0.5):
        theirs = openrlhf.loss.ValueLoss(clip)(x.values, x.older, x.returns, x.mask)
        same((ppo.value_loss(x.values, x.older, x.returns, clip) * x.mask).sum() / tokens, theirs)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_and_rewards_are_openrlhfs(openrlhf, estimator):
    x = numbers(5)
    kl = ppo.kl_estimate(x.new, x.ref, estimator)
    same(kl, openrlhf.utils.compute_approx_kl(x.new, x.ref, kl_estimator=estimator))
    theirs = openrlhf.utils.compute_reward(x.scores, 0.3, kl, x.mask)
    same(ppo.token_rewards(x.scores, kl, x.mask, 0.3), theirs * x.mask)


@pytest.mark.parametrize("estimator, samples, gamma, lam", [
    ("gae", 1, 1.0, 0.95),
    ("gae", 1, 1.0, 1.0),
    ("gae", 2, 0.9, 0.8),
    ("gae", 1, 1.0, 0.0),
    ("reinforce", 1, 0.9, 0.95),
    ("rloo", 2, 1.0, 0.95),
    ("rloo", 3, 1.0, 0.95),
    ("group_norm", 3, 1.0, 0.95),
])  # fmt: skip
def test_advantages_and_returns_are_openrlhfs(openrlhf, estimator, samples, gamma, lam):
    """From log-probabilities, values and scores to advantages, through OpenRLHF's own method."""
    x, ours = numbers(7), ppo.ESTIMATORS[estimator]
    assert ours.compares == (estimator in ("rloo", "group_norm"))
    advantages_of = method("get_advantages_and_returns")
    whole = method(
        "compute_advantages_and_returns",
        compute_reward=openrlhf.utils.compute_reward,
        apply_length_penalties=lambda *_: None,
    )
    space = types.SimpleNamespace
    args = space(
        rollout=space(n_samples_per_prompt=samples),
        reward=space(clip_range=None),
        algo=space(advantage=space(estimator=estimator, gamma=gamma, lambd=lam, no_std_norm=False)),
    )
    kl = ppo.kl_estimate(x.new, x.ref, "k1")
    maker = space(
        strategy=space(args=args),
        kl_ctl=space(value=0.2),
        advantage_estimator=estimator,
        get_cumulative_returns=lambda *rest: method("get_cumulative_returns")(None, *rest),
        get_advantages_and_returns=lambda *rest: advantages_of(None, *rest),
    )
    experience = space(
        rewards=x.scores, kl=kl, values=x.values, action_mask=x.mask, index=list(range(6)), info={}
    )
    [theirs] = whole(maker, [experience])
    shaped = ours.shape(x.scores.view(-1, samples)).flatten()
    values, lam = (x.values, lam) if ours.critic else (torch.zeros_like(x.values), 1.0)
    advantages, returns = ppo.gae(values, ppo.token_rewards(shaped, kl, x.mask, 0.2), x.mask, gamma, lam)
    if not ours.compares:  # the others it leaves as they are
        advantages = ppo.whiten(advantages, x.mask)
    same(advantages, theirs.advantages * x.mask, atol=1e-5)
    same(returns, theirs.returns * x.mask)


def test_kl_controller_is_openrlhfs(openrlhf):
    theirs, ours = openrlhf.kl_controller.AdaptiveKLController(0.1, 6.0, 1000), 0.1
    for kl in (0.0, 5.9, 6.1, 7.0, 60.0, 3.0):
        theirs.update(kl, 64)
        ours = ppo.steer(ours, kl, 6.0, 1000, 64)
        assert ours == pytest.approx(theirs.value, rel=1e-12)


def test_gae_is_the_sum_of_its_definition():
    """A_t = Σ_l (γλ)^l δ_{t+l}, written out in float64 for each response alone, without masks."""
    x, gamma, lam = numbers(11), 0.97, 0.9
    rewards = numbers(12).advantages
    advantages, returns = ppo.gae(x.values, rewards, x.mask, gamma, lam)
    assert advantages.dtype == torch.float32
    for i, row in enumerate(x.mask):
        n = int(row.sum())
        v, r = np.append(x.values[i, :n].double().numpy(), 0.0), rewards[i, :n].double().numpy()
        delta = r + gamma * v[1:] - v[:-1]
        expected = [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        np.testing.assert_allclose(advantages[i, :n].numpy(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(returns[i, :n].numpy(), expected + v[:-1], rtol=1e-5, atol=1e-6)
        assert not advantages[i, n:].any() and not returns[i, n:].any()


def test_policy_loss_known_answers_and_gradients():
    """ratio 1.5 and 0.5, clip 0.2: which of the four corners still learn."""
    old = torch.zeros(4, dtype=torch.float64)
    new = torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    losses, ratio = ppo.policy_loss(new, old, advantages, 0.2)
    assert losses.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8]) and ratio.tolist() == pytest.approx(
        [1.5, 1.5, 0.5, 0.5]
    )
    losses.sum().backward()
    assert new.grad.tolist() == pytest.approx(
        [0, 1.5, -0.5, 0]
    )  # d(−ratio · A)/d(log π) = −ratio · A, or clipped away


@pytest.mark.parametrize("estimator, unbiased", [("k1", True), ("k3", True), ("k2", False)])
def test_kl_estimators_expect_the_kl(estimator, unbiased):
    """Σ_a π(a) k(a) over a whole distribution, against Σ π log π/π_ref."""
    g = torch.Generator().manual_seed(0)
    log_p, log_q = (
        torch.randn(50, generator=g, dtype=torch.float64).mul(0.5).log_softmax(0) for _ in range(2)
    )
    kl = (log_p.exp() * (log_p - log_q)).sum()
    k = ppo.kl_estimate(log_p, log_q, estimator)
    expected = (log_p.exp() * k).sum()
    assert expected.item() == pytest.approx(kl.item(), rel=1e-9 if unbiased else 0.3) and expected > 0.1
    assert (k.min() >= 0) == (estimator != "k1")


def test_whitening_sees_the_mask_alone():
    x = numbers(3)
    values = x.values * 3 + 7
    white, unshifted = (ppo.whiten(values + (1 - x.mask) * 1e3, x.mask, shift) for shift in (True, False))
    inside = x.mask > 0
    expected = values[inside].double()
    same(white[inside].double(), (expected - expected.mean()) / expected.std(correction=0), atol=1e-5)
    same(unshifted[inside].mean(), expected.mean().float())
    same(unshifted[inside].std(correction=0), torch.tensor(1.0))
    assert not white[~inside].any() and not unshifted[~inside].any()
