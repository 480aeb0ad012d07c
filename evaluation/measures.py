"""Statistics of a report: pure functions over numbers and texts, no files.

Intervals are 95%, and prompts are the sample.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from evaluation.metrics import paired_bootstrap

RIDGE = 0.01  # of the logistic regression, so that a comparison that is won throughout has a finite answer
SUPPORT = 0.05  # least share of comparisons on either side of equal length
# A word, a sign, or one character of a script that is written without spaces.
TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]"
)


def resamples(prompts: int) -> int:
    """Bootstrap resamples for so many prompts: 10,000, fewer where their mean is as good as normal anyway."""
    return int(min(10000, max(1000, 2e7 / max(prompts, 1))))


def mean_interval(values: dict) -> tuple | None:
    """(mean, low, high) of `{id: value}` by bootstrap over the prompts; None without any, no interval for
    one.
    """
    if not values:
        return None
    if len(values) == 1:
        return (*values.values(), None, None)
    return paired_bootstrap(dict.fromkeys(values, 0.0), values, resamples(len(values)))


def difference(before: dict, after: dict) -> tuple | None:
    """(mean difference, low, high) over the prompts that both `{id: value}` have; None without two in
    common.
    """
    common = sum(key in after for key in before)
    return paired_bootstrap(before, after, resamples(common)) if common > 1 else None


def wins(before: dict, after: dict) -> dict:
    """`{id: share}` of the pairs of answers to a prompt, one of each policy, in which `after` has more; ties
    count half.

    Args:
        before, after: `{id: array of K values}`; all K × K pairs of a prompt are compared.
    """
    found = {}
    for key, old in before.items():
        if key in after:
            new = after[key][:, None]
            found[key] = float((new > old).mean() + 0.5 * (new == old).mean())
    return found


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(−z)), without an overflow."""
    return 1 / (1 + np.exp(-np.clip(z, -500, 500)))


def fit_logistic(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray | None = None, ridge: float = RIDGE, steps: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Weights w of P(y) = 1 / (1 + exp(−x·w)), by Newton's method, and their covariance.

    Minimises −Σ [y log p + (1 − y) log(1 − p)] + ridge/2 · |w|²; y may be a share (a tie is ½).

    Args:
        x: float[rows, columns]. y: float[rows] in [0, 1].
        groups: int[rows], rows of one prompt: the covariance is the sandwich clustered by them; None: by row.

    Returns:
        (w float[columns], covariance float[columns, columns]).
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    w = np.zeros(x.shape[1])

    def loss(w: np.ndarray) -> float:
        z = x @ w
        return float(np.sum(np.logaddexp(0, z) - y * z) + ridge / 2 * w @ w)

    now = loss(w)
    for _ in range(steps):
        p = sigmoid(x @ w)
        gradient = x.T @ (p - y) + ridge * w
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w))
        step, scale = np.linalg.solve(hessian, gradient), 1.0
        while loss(w - scale * step) > now and scale > 1e-6:
            scale /= 2
        w, before, now = w - scale * step, now, loss(w - scale * step)
        if np.abs(gradient).max() < 1e-9 * max(1, len(y)) or before - now < 1e-13 * max(1.0, abs(now)):
            break
    p = sigmoid(x @ w)
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(len(w)))
    scores = x * (y - p)[:, None]
    if groups is not None:
        _, groups = np.unique(groups, return_inverse=True)
        summed = np.zeros((groups.max() + 1, x.shape[1]))
        np.add.at(summed, groups, scores)
        scores = summed
    return w, bread @ (scores.T @ scores) @ bread


def length_controlled_win_rate(
    before: dict, after: dict, before_lengths: dict, after_lengths: dict
) -> tuple | None:
    """Win rate of `after` over `before` if their answers were equally long, in the manner of
    length-controlled AlpacaEval.

    Dubois et al. 2024 (arXiv 2404.04475) fit a logistic regression of the preference and predict it with the
    length term at zero. Here, of two policies: P(after wins) = σ(θ + φ · tanh(Δ / s)), Δ the difference of
    lengths, s its standard deviation; the rate is σ(θ). Their third term, an instruction's difficulty, needs
    many models and is left out. A row is a pair of answers, the k-th of each policy to one prompt; a tie is
    half a win. Interval: ±1.96 standard errors of θ, clustered by prompt.

    Args:
        before, after: `{id: array of values}`, rewards say. before_lengths, after_lengths: `{id: array}`,
            aligned with them.

    Returns:
        (rate, low, high), shares; None without two prompts in common, or where fewer than a twentieth of the
        comparisons have an `after` that is not longer, or not shorter: there the data say nothing about equal
        lengths.
    """
    y, delta, groups = [], [], []
    for n, key in enumerate(key for key in before if key in after):
        sizes = (before_lengths.get(key, ()), after_lengths.get(key, ()))
        size = min(map(len, (before[key], after[key], *sizes)))
        old, new = before[key][:size], after[key][:size]
        y.append((new > old) + 0.5 * (new == old))
        delta.append(np.asarray(sizes[1][:size], float) - np.asarray(sizes[0][:size], float))
        groups.append(np.full(size, n))
    if len(y) < 2 or not sum(map(len, y)):
        return None
    y, delta, groups = map(np.concatenate, (y, delta, groups))
    spread = delta.std()
    if min((delta <= 0).mean(), (delta >= 0).mean()) < SUPPORT:
        return None
    longer = np.tanh(delta / spread) if spread > 0 else np.zeros(len(y))
    w, covariance = fit_logistic(np.stack([np.ones(len(y)), longer], 1), y, groups)
    error = math.sqrt(max(covariance[0, 0], 0.0))
    return tuple(float(sigmoid(z)) for z in (w[0], w[0] - 1.96 * error, w[0] + 1.96 * error))


def best_of(values: dict, others: dict | None = None) -> list[float]:
    """Expected best of k of n answers, k = 1 … n, each prompt's k drawn without replacement, averaged over
    the prompts.

    The unbiased estimator: with the n values sorted, Σᵢ C(i − 1, k − 1) / C(n, k) · value₍ᵢ₎. Prompts with
    another number of values than most have are left out, so that every k is of the same prompts.

    Args:
        values: `{id: array}` to choose by.
        others: `{id: array}` aligned with them; then it is their expectation at the chosen one (ties share
            evenly).

    Returns:
        list of n numbers; empty without values.
    """
    sizes = Counter(map(len, values.values()))
    n = max(sizes, key=lambda size: (sizes[size], size), default=0)
    curve, count = np.zeros(n), 0
    weights = np.array([[math.comb(i, k - 1) / math.comb(n, k) for i in range(n)] for k in range(1, n + 1)])
    for key, own in values.items():
        if len(own) != n or (others is not None and len(others.get(key, ())) != n):
            continue
        order = np.argsort(own, kind="stable")
        shown = own[order]
        if others is not None:
            shown = np.asarray(others[key], float)[order]
            _, starts = np.unique(own[order], return_index=True)
            for block in np.split(np.arange(n), starts[1:]):
                shown[block] = shown[block].mean()
        curve, count = curve + weights @ shown, count + 1
    return [float(v) for v in curve / count] if count else []


def ngrams(text: str, n: int) -> list[tuple]:
    """The n-grams of a text's words and signs."""
    words = TOKEN.findall(text)
    return list(zip(*(words[k:] for k in range(n))))


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that stood in it before (seq-rep-n of Welleck et al. 2019, arXiv
    1908.04319); 0 if too short.
    """
    grams = ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: list[str], n: int) -> float | None:
    """Different n-grams over all n-grams of the texts (Li et al. 2016, arXiv 1510.03055); None where there
    is none.
    """
    total, seen = 0, set()
    for text in texts:
        grams = ngrams(text, n)
        total += len(grams)
        seen.update(grams)
    return len(seen) / total if total else None


def histogram(
    values: Sequence[float] | np.ndarray, bins: int = 40, low: float | None = None, high: float | None = None
) -> tuple:
    """(edges, shares) of the finite values in equal bins; the outer ones take what lies beyond low and
    high.
    """
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if not len(values):
        return [], []
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    if high <= low:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(np.clip(values, low, high), bins, (low, high))
    return edges.tolist(), (counts / len(values)).tolist()


def by_length(rewards: np.ndarray, lengths: np.ndarray, edges: list) -> list:
    """(mean length, mean reward, responses) of the responses within each of the length bins; None where a bin
    has fewer than 5.
    """
    known, found = np.isfinite(rewards) & (lengths >= 0), []
    bins = np.clip(
        np.searchsorted(edges, lengths, "right") - 1, None, len(edges) - 2
    )  # the last holds its end
    for k in range(len(edges) - 1):
        inside = known & (bins == k)
        count = int(inside.sum())
        means = (float(values[inside].mean()) for values in (lengths, rewards))
        found.append((*means, count) if count >= 5 else None)
    return found


def length_edges(lengths: np.ndarray, bins: int = 8) -> list[float]:
    """Edges that cut lengths into bins of about as many responses, at most `bins`."""
    lengths = lengths[lengths >= 0]
    return np.unique(np.quantile(lengths, np.linspace(0, 1, bins + 1))).tolist() if len(lengths) else []


def length_correlation(rewards: np.ndarray, lengths: np.ndarray, offsets: np.ndarray) -> float | None:
    """Pearson correlation of reward and length, both centred within each prompt; None where nothing
    varies.
    """
    known = np.isfinite(rewards) & (lengths >= 0)
    prompt = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))[known]
    if not len(prompt):
        return None
    counts = np.maximum(np.bincount(prompt, minlength=len(offsets) - 1), 1)
    x, y = rewards[known], lengths[known].astype(float)
    x = x - (np.bincount(prompt, x, len(counts)) / counts)[prompt]
    y = y - (np.bincount(prompt, y, len(counts)) / counts)[prompt]
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 1e-12 else None


def spread_within(rewards: np.ndarray, offsets: np.ndarray) -> tuple:
    """(mean over prompts of the standard deviation of their rewards, share of the prompts whose rewards are
    all equal).

    Of prompts with two finite rewards or more; (None, None) without one.
    """
    spreads = []
    for n in range(len(offsets) - 1):
        own = rewards[offsets[n] : offsets[n + 1]]
        own = own[np.isfinite(own)]
        if len(own) > 1:
            spreads.append(0.0 if own.min() == own.max() else float(own.std()))
    return (float(np.mean(spreads)), float(np.mean(np.array(spreads) == 0))) if spreads else (None, None)


def at_the_ends(rewards: np.ndarray) -> tuple:
    """(share of the finite rewards that equal the largest, share that equal the smallest); None, None without
    any.
    """
    rewards = rewards[np.isfinite(rewards)]
    if not len(rewards):
        return None, None
    return float((rewards == rewards.max()).mean()), float((rewards == rewards.min()).mean())
