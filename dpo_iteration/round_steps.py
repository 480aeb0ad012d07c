"""The batches of online training: an epoch is a round, whose pairs are there when it begins."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from common.records import shard_range
from common.training import world_size
from dpo_iteration import packing
from dpo_iteration.arguments import Arguments


@dataclass
class RoundSteps(packing.Steps):
    """Steps of a round: its pairs, in random order, laid out evenly over `sync_every` optimizer steps.

    Args, besides those of Steps:
        pairs_per_step: the most that a step can have; for these there are passes.
        sync_every: optimizer steps of a round.
        margin_weight: see arguments.py.
        take: function that gives the rows of round `epoch`; called when the round begins, by all ranks.
    """

    sync_every: int = 1
    margin_weight: float = 0.0
    take: Callable[[int], list[dict]] | None = None

    def _least_accumulation(self) -> int:
        return -(-self.pairs_per_step // (self.processes * self.at_once))

    def __len__(self) -> int:
        return self.sync_every * self.accumulation

    def steps(self, epoch: int) -> Iterator[list[int]]:
        order = [i for step in super().steps(epoch) for i in step]
        for k in range(self.sync_every):
            yield [order[i] for i in shard_range(len(order), k, self.sync_every)]

    def __iter__(self) -> Iterator[list[tuple[int, float, float]]]:
        rows = self.take(self.epoch)
        self.costs = [packing.columns_of(row) if self.budget else 0 for row in rows]
        self.tokens = [len(row["chosen_ids"]) for row in rows]
        self.weights = packing.weights(rows, self.margin_weight)
        yield from super().__iter__()


def round_steps(args: Arguments, sharing: bool, prompts: int, sync_every: int) -> RoundSteps:
    """The batches of rounds of so many prompts; `take` is still to be set.

    A pass has `per_device_train_batch_size` pairs; a packed row that is larger than these as many pairs of
    `max_length` as surely fit.

    Args:
        sharing: whether rows are packed.
    """
    budget = packing.row_tokens(args) if sharing else None
    together = max(1, budget // (2 * args.max_length)) if sharing else args.per_device_train_batch_size
    return RoundSteps(
        costs=[0],
        pairs_per_step=-(-prompts * args.pairs_per_prompt // sync_every),
        budget=budget,
        at_once=together,
        processes=world_size(),
        process=int(os.environ.get("RANK", "0")),
        seed=args.seed if args.data_seed is None else args.data_seed,
        sync_every=sync_every,
        margin_weight=args.margin_weight,
    )
