"""annotate_data/ranking.py: rewards from comparisons, over a probability callback and without a model."""

import itertools
import math
import random

import pytest

from annotate_data.ranking import rank


def compared(sizes, ranking, probability):
    """(results, list of the rounds' requests)."""
    rounds = []

    def compare(asked):
        rounds.append(asked)
        return [probability(*place) for place in asked]

    return rank(sizes, ranking, compare), rounds


def strength(scores):
    return lambda n, i, j: 1 / (1 + math.exp(scores[n][j] - scores[n][i]))


def test_round_robin_is_the_mean_probability_of_winning():
    table = {(0, 1): 0.9, (0, 2): 0.5, (1, 2): 0.2}
    [(rewards, matrix)], rounds = compared([3], "round_robin", lambda n, i, j: table[i, j])
    assert rewards == pytest.approx([0.7, 0.15, 0.65]) and len(rounds) == 1
    assert matrix[1] == [pytest.approx(0.1), None, 0.2] and matrix[0][0] is None
    assert sum(rewards) == pytest.approx(3 / 2)


def test_ties_single_responses_and_pairs_that_cannot_be_compared():
    for ranking in ("round_robin", "tournament"):
        assert compared([1], ranking, None)[0] == [([0.5], [[None]])]
    assert compared([4], "round_robin", lambda *_: 0.5)[0][0][0] == [0.5] * 4
    table = {(0, 1): 0.9, (0, 2): None, (1, 2): None}
    rewards = compared([3], "round_robin", lambda n, i, j: table[i, j])[0][0][0]
    assert rewards == [0.9, pytest.approx(0.1), None]
    assert compared([2], "tournament", lambda *_: None)[0][0][0] == [None, None]


@pytest.mark.parametrize("K", [2, 3, 4, 5, 8, 9, 17])
def test_a_tournament_finds_best_and_worst_in_three_halves_of_k(K):
    rng = random.Random(K)
    scores = [rng.sample(range(100), K) for _ in range(50)]
    results, rounds = compared([K] * 50, "tournament", strength(scores))
    assert sum(map(len, rounds)) == 50 * (3 * (K // 2) - (0 if K % 2 else 2))
    assert len(rounds) <= 1 + math.ceil(math.log2(K))  # rounds of all prompts are one batch
    for (rewards, matrix), values in zip(results, scores, strict=True):
        best, worst = values.index(max(values)), values.index(min(values))
        assert rewards[best] == 1 and rewards[worst] == 0
        assert all(0 < r < 1 for k, r in enumerate(rewards) if k not in (best, worst))
        known = [(i, j) for i in range(K) for j in range(K) if matrix[i][j] is not None]
        assert all(matrix[i][j] == pytest.approx(1 - matrix[j][i]) and i != j for i, j in known)


@pytest.mark.parametrize("K", [2, 3, 4, 5])
def test_a_tournament_has_one_best_and_another_worst_whatever_the_answers(K):
    """Preferences need not be transitive, and may be ties: all combinations of answers, of many a sample."""
    pairs = list(itertools.combinations(range(K), 2))
    combinations = itertools.product((0.0, 0.5, 1.0), repeat=len(pairs))
    for answers in itertools.islice(combinations, 0, None, 17 if K > 4 else 1):
        table = dict(zip(pairs, answers, strict=True))

        def answer(n, i, j, table=table):
            return table[i, j] if i < j else 1 - table[j, i]

        [(rewards, _)], _ = compared([K], "tournament", answer)
        assert sorted(rewards)[-1] == 1 > sorted(rewards)[-2] and sorted(rewards)[0] == 0 < sorted(rewards)[1]
        if K <= 3 and set(answers) == {0.5}:
            assert rewards.index(1) == 0


def test_prompts_of_different_sizes_do_not_disturb_each_other():
    rng = random.Random(0)
    sizes = [1, 5, 2, 8, 3, 1, 7]
    scores = [[rng.gauss(0, 1) for _ in range(K)] for K in sizes]
    for ranking in ("round_robin", "tournament"):
        together, _ = compared(sizes, ranking, strength(scores))
        alone = [compared([K], ranking, strength([scores[n]]))[0][0] for n, K in enumerate(sizes)]
        assert together == alone
