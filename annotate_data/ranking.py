"""From comparisons of two responses to rewards of K: pure functions over win probabilities.

A ranking is a generator: it yields rounds, each a list of pairs (i, j), is sent their probabilities that
response i is better than response j (None where the two could not be compared), and returns K rewards in [0,
1]. `rank` drives many of them at once, so that a round of all is one batch.
"""

from collections.abc import Callable, Generator


def round_robin(K: int) -> Generator[list[tuple], list, list]:
    """All K(K−1)/2 pairs; the reward is the mean probability of winning against the others.

    Pairs that could not be compared are left out of the mean; None for a response with none left.
    """
    pairs = [(i, j) for i in range(K) for j in range(i + 1, K)]
    found = dict(zip(pairs, (yield pairs), strict=True)) if pairs else {}
    won = {**found, **{(j, i): None if p is None else 1 - p for (i, j), p in found.items()}}
    rewards = []
    for i in range(K):
        own = [won[i, j] for j in range(K) if j != i and won[i, j] is not None]
        rewards.append(sum(own) / len(own) if own else (0.5 if K == 1 else None))
    return rewards


def tournament(K: int) -> Generator[list[tuple], list, list]:
    """The best and the worst of K in about 3K/2 comparisons: neighbours meet, then winners and losers among
    themselves.

    Each bracket is a knock-out. The reward is 0.5 plus or minus half the share of its bracket's rounds that a
    response went through: the last of the winners alone has 1, the last of the losers alone 0, those between
    are in the order in which they fell out. With K odd, the response without a neighbour enters both
    brackets, and where it would end on both sides it is the best, and the response it met last is the worst.
    Even chances go to the lower index.
    """
    if K == 1:
        return [0.5]
    couples = [(i, i + 1) for i in range(0, K - 1, 2)]
    first = [(i, j) if _wins(p) else (j, i) for (i, j), p in zip(couples, (yield couples), strict=True)]
    over = [K - 1] if K % 2 else []
    winners, losers = [w for w, _ in first] + over, [x for _, x in first] + over
    left_winners, left_losers, number = {}, {}, 0  # response → the round in which it fell out of the bracket
    last_losers_pair = None
    while len(winners) > 1 or len(losers) > 1:
        number += 1
        up = list(zip(winners[::2], winners[1::2], strict=False))
        down = list(zip(losers[::2], losers[1::2], strict=False))
        answers = iter((yield up + down))
        won = [(i, j) if _wins(next(answers)) else (j, i) for i, j in up]
        lost = [(i, j) if _wins(next(answers)) else (j, i) for i, j in down]
        left_winners |= {x: number for _, x in won}
        left_losers |= {w: number for w, _ in lost}
        if lost:
            last_losers_pair = lost[-1]
        winners = [w for w, _ in won] + winners[2 * len(up) :]
        losers = [x for _, x in lost] + losers[2 * len(down) :]
    best, worst = winners[0], losers[0]
    if best == worst:
        worst = next(x for x in last_losers_pair if x != best)
    end = number + 1
    rewards = [0.5 + (left_winners.get(k, 0) - left_losers.get(k, 0)) / (2 * end) for k in range(K)]
    rewards[best], rewards[worst] = 1.0, 0.0
    return rewards


def _wins(p):
    return p is None or p >= 0.5


RANKINGS = {"round_robin": round_robin, "tournament": tournament}


def rank(
    sizes: list[int], ranking: str, compare: Callable[[list[tuple]], list]
) -> list[tuple[list, list[list]]]:
    """Rewards of many prompts' responses, a round of all prompts at a time.

    Args:
        sizes: K of each prompt.
        ranking: a key of `RANKINGS`.
        compare: list of (prompt, i, j) → probabilities that response i of that prompt is better than j.

    Returns:
        (rewards, probabilities) of each prompt: K floats (None: never compared), and K lists of K: in row i,
        column j the probability that i is better than j (None on the diagonal and where it was not asked).
    """
    rankings = [RANKINGS[ranking](K) for K in sizes]
    matrices = [[[None] * K for _ in range(K)] for K in sizes]
    rewards, asked = [None] * len(sizes), {}

    def advance(n: int, answers: list | None):
        try:
            asked[n] = rankings[n].send(answers)
        except StopIteration as ended:
            asked.pop(n, None)
            rewards[n] = ended.value

    for n in range(len(sizes)):
        advance(n, None)
    while asked:
        places = [(n, i, j) for n, pairs in asked.items() for i, j in pairs]
        answers = compare(places)
        for (n, i, j), p in zip(places, answers, strict=True):
            matrices[n][i][j], matrices[n][j][i] = p, None if p is None else 1 - p
        answers = iter(answers)
        for n, pairs in list(asked.items()):
            advance(n, [next(answers) for _ in pairs])
    for values, matrix, K in zip(rewards, matrices, sizes, strict=True):
        for k in range(K):
            if K > 1 and all(p is None for p in matrix[k]):
                values[k] = None
    return list(zip(rewards, matrices, strict=True))
