"""What the rewards of a file look like, in a few numbers, from one pass that holds no rewards."""

import math
import statistics


class Mean:
    """Mean of a stream of numbers; None of none."""

    def __init__(self):
        self.count, self.value = 0, None

    def add(self, x: float) -> None:
        self.count += 1
        self.value = x if self.count == 1 else self.value + (x - self.value) / self.count


class Correlation:
    """Pearson's r of a stream of (x, y) from running moments (Welford 1962); None where one is constant."""

    def __init__(self):
        self.count = 0
        self.mean_x = self.mean_y = self.xx = self.yy = self.xy = 0.0

    def add(self, x: float, y: float) -> None:
        self.count += 1
        dx, dy = x - self.mean_x, y - self.mean_y
        self.mean_x += dx / self.count
        self.mean_y += dy / self.count
        self.xx += dx * (x - self.mean_x)
        self.yy += dy * (y - self.mean_y)
        self.xy += dx * (y - self.mean_y)

    @property
    def value(self) -> float | None:
        return self.xy / math.sqrt(self.xx) / math.sqrt(self.yy) if self.xx > 0 and self.yy > 0 else None


def centred(numbers: list[float]) -> list[float]:
    """Numbers less their mean; exact zeros where they are all equal."""
    mean = statistics.fmean(numbers)
    return [0.0] * len(numbers) if min(numbers) == max(numbers) else [x - mean for x in numbers]


class Summary:
    """Add records one by one, then ask for `figures`; null rewards are left out of every figure."""

    def __init__(self):
        self.rewards, self.best, self.worst, self.spread, self.equal = Mean(), Mean(), Mean(), Mean(), Mean()
        self.overall, self.within = Correlation(), Correlation()

    def add(self, rewards: list, lengths: list | None = None) -> None:
        """Add a prompt's K rewards (numbers or None) and the lengths of its responses in tokens (or None)."""
        pairs = zip(rewards, lengths or [None] * len(rewards), strict=True)
        pairs = [(x, n) for x, n in pairs if x is not None]
        values = [x for x, _ in pairs]
        if not values:
            return
        for x in values:
            self.rewards.add(x)
        self.best.add(max(values))
        self.worst.add(min(values))
        self.spread.add(statistics.pstdev(values) if min(values) < max(values) else 0.0)
        if len(values) > 1:
            self.equal.add(float(min(values) == max(values)))
        timed = [(x, n) for x, n in pairs if n is not None]
        if timed:
            xs, ns = zip(*timed, strict=True)
            for x, n in timed:
                self.overall.add(x, n)
            for x, n in zip(centred(xs), centred(ns), strict=True):
                self.within.add(x, n)

    def figures(self) -> dict[str, float | None]:
        """What the rewards look like; nothing to say is None.

        Returns:
            dict: `reward_mean`; `best_of_k`, `worst_of_k` and `spread` (standard deviation of a prompt's K),
            averaged over prompts; `length_correlation` with the response's tokens, and `_within` prompts
            (both centred by prompt); `all_equal_fraction` of the prompts with two rewards or more.
        """
        found = {
            "reward_mean": self.rewards,
            "best_of_k": self.best,
            "worst_of_k": self.worst,
            "spread": self.spread,
            "length_correlation": self.overall,
            "length_correlation_within": self.within,
            "all_equal_fraction": self.equal,
        }
        return {key: None if of.value is None else round(of.value, 6) for key, of in found.items()}
