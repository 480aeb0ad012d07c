"""What the rewards of a file look like, in a few numbers."""

import contextlib
import statistics


def correlation(pairs):
    """Pearson's r of (x, y) pairs; None where one of them does not vary."""
    with contextlib.suppress(statistics.StatisticsError):
        return statistics.correlation(*zip(*pairs, strict=True)) if len(pairs) > 1 else None
    return None


def mean(numbers):
    return statistics.fmean(numbers) if numbers else None


def summarise(rewarded):
    """What the rewards of a file look like; null rewards are left out of every figure, nothing to say is None.

    Returns:
        dict: `reward_mean`; `best_of_k`, `worst_of_k` and `spread` (standard deviation of a prompt's K), averaged over
        prompts; `length_correlation` with the response's tokens, and `_within` prompts (both centred by prompt);
        `all_equal_fraction` of the prompts with two rewards or more.
    """
    groups = []  # for each prompt (reward, tokens) of its finite rewards
    for r in rewarded:
        lengths = r.get("num_tokens") or [None] * len(r["rewards"])
        groups.append([(x, n) for x, n in zip(r["rewards"], lengths, strict=True) if x is not None])
    groups = [group for group in groups if group]
    values = [[x for x, _ in group] for group in groups]
    several = [v for v in values if len(v) > 1]
    timed = [[(x, n) for x, n in group if n is not None] for group in groups]
    centred = [(x - mean([x for x, _ in g]), n - mean([n for _, n in g])) for g in timed for x, n in g]
    summary = {
        "reward_mean": mean([x for v in values for x in v]),
        "best_of_k": mean([max(v) for v in values]),
        "worst_of_k": mean([min(v) for v in values]),
        "spread": mean([statistics.pstdev(v) for v in values]),
        "length_correlation": correlation([pair for g in timed for pair in g]),
        "length_correlation_within": correlation(centred),
        "all_equal_fraction": mean([float(min(v) == max(v)) for v in several]),
    }
    return {key: None if value is None else round(value, 6) for key, value in summary.items()}
