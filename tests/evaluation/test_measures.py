"""evaluation/measures.py: statistics against independent computations; torch is an oracle."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest

from evaluation import measures, metrics
from report import run_data


def arrays(rng, prompts=40, K=4, shift=0.0):
    return {f"p{i}": np.array([rng.gauss(shift, 1) for _ in range(K)]) for i in range(prompts)}


def test_wins_are_counted_pair_by_pair():
    rng = random.Random(0)
    a = {i: np.array([float(rng.randrange(5)) for _ in range(3)]) for i in range(30)}
    b = {i: np.array([float(rng.randrange(5)) for _ in range(4)]) for i in range(5, 40)}
    got = measures.wins(a, b)
    assert set(got) == set(range(5, 30))
    for key, share in got.items():
        won = sum(1.0 if y > x else 0.5 if y == x else 0.0 for x in a[key] for y in b[key])
        assert share == pytest.approx(won / 12, abs=1e-12)
    back = measures.wins(b, a)
    assert all(got[key] + back[key] == pytest.approx(1) for key in got)


def test_logistic_regression_is_torchs_minimum():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = np.stack([np.ones(300), rng.normal(size=300)], 1)
    y = rng.choice([0.0, 0.5, 1.0], 300, p=[0.2, 0.1, 0.7])
    w, covariance = measures.fit_logistic(x, y)
    tx, ty, tw = torch.tensor(x), torch.tensor(y), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    found = {"tolerance_grad": 1e-12, "tolerance_change": 1e-16, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([tw], max_iter=500, **found)

    def loss(v):
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(tx @ v, ty, reduction="sum")
        return entropy + measures.RIDGE / 2 * (v @ v)

    def closure():
        optimizer.zero_grad()
        value = loss(tw)
        value.backward()
        return value

    optimizer.step(closure)
    assert w == pytest.approx(tw.detach().numpy(), abs=1e-7)
    hessian = torch.autograd.functional.hessian(loss, tw.detach())
    scores = x * (y - 1 / (1 + np.exp(-x @ w)))[:, None]
    bread = np.linalg.inv(hessian.numpy())
    assert covariance == pytest.approx(bread @ scores.T @ scores @ bread, rel=1e-6)


def test_logistic_regression_of_a_clean_sweep_is_finite():
    w, covariance = measures.fit_logistic(np.ones((50, 1)), np.ones(50))
    assert 5 < w[0] < 30 and np.isfinite(covariance).all()


def test_clustered_errors_are_those_of_the_bootstrap():
    """Rows that repeat within a prompt: the interval must be that of resampled prompts, twice that of rows
    taken as independent.
    """
    rng = np.random.default_rng(3)
    y = np.repeat(rng.random(150) < 0.6, 4).astype(float)
    groups = np.repeat(np.arange(150), 4)
    _, clustered = measures.fit_logistic(np.ones((600, 1)), y, groups)
    _, naive = measures.fit_logistic(np.ones((600, 1)), y)
    assert math.sqrt(clustered[0, 0] / naive[0, 0]) == pytest.approx(2, rel=0.02)
    draws = [
        measures.fit_logistic(np.ones((600, 1)), y.reshape(150, 4)[rng.integers(0, 150, 150)].ravel())[0][0]
        for _ in range(400)
    ]
    assert math.sqrt(clustered[0, 0]) == pytest.approx(statistics.stdev(draws), rel=0.15)


def test_length_controlled_win_rate_takes_length_out():
    rng = np.random.default_rng(1)

    def world(gain, per_token, longer):
        means = (100, 100 + longer)
        old_n, new_n = ({i: np.clip(rng.normal(m, 25, 4), 1, None) for i in range(400)} for m in means)
        old = {i: per_token * old_n[i] + rng.logistic(size=4) for i in range(400)}
        new = {i: per_token * new_n[i] + gain + rng.logistic(size=4) for i in range(400)}
        controlled = measures.length_controlled_win_rate(old, new, old_n, new_n)
        return measures.mean_interval(measures.wins(old, new)), controlled

    plain, controlled = world(0.0, 0.05, 30)  # length alone
    assert plain[1] > 0.6 and controlled[1] < 0.5 < controlled[2]
    plain, controlled = world(1.0, 0.0, 30)  # length plays no part: both say the same
    assert controlled[0] == pytest.approx(plain[0], abs=0.03) and controlled[1] > 0.55
    plain, controlled = world(1.5, 0.05, -30)  # better and shorter, by a reward that likes length
    assert controlled[0] > plain[0] + 0.1
    assert world(0.0, 0.0, 400)[1] is None  # hardly any comparison on one side of equal length
    assert measures.length_controlled_win_rate(*[{1: np.ones(2)}] * 4) is None


def test_best_of_k_is_the_mean_over_all_subsets():
    rng = random.Random(2)
    values = {i: np.array([float(rng.randrange(6)) for _ in range(6)]) for i in range(8)}
    values |= {"short": np.array([99.0])}  # left out: one prompt does not stand for all
    gold = {i: np.array([rng.random() for _ in own]) for i, own in values.items()}
    curve, other = measures.best_of(values), measures.best_of(values, gold)
    for k in range(1, 7):
        best, chosen = [], []
        for i in range(8):
            subsets = list(itertools.combinations(range(6), k))
            best.append(statistics.fmean(max(values[i][j] for j in s) for s in subsets))
            # ties share evenly: all orders of equal values are alike, so shuffle them exactly by averaging
            # within a value
            fair = {v: statistics.fmean(gold[i][j] for j in range(6) if values[i][j] == v) for v in values[i]}
            chosen.append(statistics.fmean(fair[max(values[i][j] for j in s)] for s in subsets))
        assert curve[k - 1] == pytest.approx(statistics.fmean(best), abs=1e-12)
        assert other[k - 1] == pytest.approx(statistics.fmean(chosen), abs=1e-12)
    assert measures.best_of({}) == []


def test_ngrams_by_hand():
    words = [word for (word,) in measures.ngrams("Don't stop, 日本 go", 1)]
    assert words == ["Don", "'", "t", "stop", ",", "日", "本", "go"]
    assert measures.distinct(["a b a b", "a b"], 2) == 2 / 4
    assert measures.distinct(["a"], 2) is None
    assert measures.repetition("a b c d a b c d a b c d") == pytest.approx(1 - 4 / 9)
    assert measures.repetition("too short") == 0.0 and measures.repetition("one two three four five") == 0.0


def test_ties_spread_ends_and_correlation_against_plain_loops():
    rng = random.Random(4)
    texts = [[rng.choice("abc") for _ in range(5)] for _ in range(60)]
    rewards = [[rng.choice([0.0, 1.0, 2.0, math.nan]) for _ in range(5)] for _ in range(60)]
    for own, values in zip(texts, rewards):
        known = [(text, value) for text, value in zip(own, values) if not math.isnan(value)]
        couples = [(a[1], b[1]) for a, b in itertools.combinations(known, 2) if a[0] != b[0]]
        assert run_data.ties(own, values) == (len(couples), sum(a == b for a, b in couples))
    flat, offsets = np.array(sum(rewards, [])), np.arange(0, 301, 5)
    known = [[v for v in values if not math.isnan(v)] for values in rewards]
    spreads = [statistics.pstdev(v) for v in known if len(v) > 1]
    equal = sum(s == 0 for s in spreads) / len(spreads)
    assert measures.spread_within(flat, offsets) == pytest.approx((statistics.fmean(spreads), equal))
    all_known = sum(known, [])
    ends = [all_known.count(end) / len(all_known) for end in (2.0, 0.0)]
    assert measures.at_the_ends(flat) == tuple(ends)
    lengths = np.array([rng.randrange(1, 50) for _ in range(300)])
    xs, ys = [], []
    for n, values in enumerate(rewards):
        own = [(v, float(lengths[5 * n + k])) for k, v in enumerate(values) if not math.isnan(v)]
        if own:
            means = [statistics.fmean(c) for c in zip(*own)]
            xs += [v - means[0] for v, _ in own]
            ys += [size - means[1] for _, size in own]
    want = pytest.approx(statistics.correlation(xs, ys), abs=1e-9)
    assert measures.length_correlation(flat, lengths, offsets) == want
    assert measures.length_correlation(np.ones(10), np.arange(10), np.array([0, 10])) is None


def test_histogram_and_bins_hold_every_value():
    values = np.array([0.0, 0.5, 1.0, 1.0, math.nan, 3.0])
    edges, shares = measures.histogram(values, 4, 0.0, 2.0)
    assert edges == [0.0, 0.5, 1.0, 1.5, 2.0] and shares == pytest.approx([0.2, 0.2, 0.4, 0.2])
    assert sum(measures.histogram(np.ones(7))[1]) == pytest.approx(1)
    assert measures.histogram([math.nan]) == ([], [])
    lengths = np.array([3, 4, 5, 6, 7, 8, 9, 10, 11, 12] * 10)
    found = measures.by_length(lengths * 2.0, lengths, measures.length_edges(lengths, 5))
    assert sum(n for *_, n in found) == 100
    assert all(reward == pytest.approx(2 * length) for length, reward, _ in found)


def test_intervals_are_those_of_the_terminals_table():
    rng = random.Random(5)
    a, b = ({i: rng.gauss(0, 1) for i in range(100)} for _ in range(2))
    assert measures.difference(a, b) == metrics.paired_bootstrap(a, b)
    assert measures.mean_interval(a) == metrics.paired_bootstrap(dict.fromkeys(a, 0.0), a)
    assert measures.mean_interval({1: 2.0}) == (2.0, None, None) and measures.mean_interval({}) is None
    assert measures.difference(a, {}) is None
