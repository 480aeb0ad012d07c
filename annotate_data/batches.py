"""Batches of token sequences: sized by padded tokens, alike in length, smaller once memory ran out."""

from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

from common.cli import UserError

WINDOW = 16  # batches whose sequences are sorted by length together; groups are finished window by window


class Row(NamedTuple):
    """One sequence for the model: its token ids, and how many were cut off to make it fit."""

    ids: array
    cut: int


class Batches:
    """How many padded tokens a forward pass gets; halved whenever memory runs out.

    Attributes:
        tokens: the size at present.
        remedy: what to do where a single sequence is too long, in words.
    """

    def __init__(self, tokens, remedy="lower --max_length"):
        self.tokens, self.remedy = tokens, remedy

    def shrink(self, sequences: int, longest: int, tokens: int):
        """Half as many tokens from now on, after `tokens` in that many sequences did not fit.

        Raises:
            UserError: it was a single sequence.
        """
        if sequences == 1:
            raise UserError(f"out of memory on one sequence of {longest} tokens: {self.remedy}") from None
        self.tokens = max(1, tokens // 2)
        what = f"out of memory with {sequences} sequences, the longest of {longest} tokens"
        print(f"{what}; now {self.tokens} tokens a batch", flush=True)

    def run(
        self, forward: Callable[[list], list], rows: list, apart: Callable[[int], object] | None = None
    ) -> Iterator[tuple[list[int], list]]:
        """Yield (indices into `rows`, their results) batch by batch.

        Longest rows first, so that those of a batch are alike and one that is too large for the memory shows
        at once. A row longer than the budget is a batch of its own.

        Args:
            forward: list of rows → list of results; MemoryError when the batch is too large.
            rows: anything with `ids`.
            apart: function of a row's length that must say the same of all rows of a batch, or None.

        Raises:
            UserError: a single sequence does not fit.
        """
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
        at = 0
        while at < len(order):
            longest = max(1, len(rows[order[at]].ids))
            batch = order[at : at + max(1, self.tokens // longest)]
            if apart:
                batch = [i for i in batch if apart(len(rows[i].ids)) == apart(longest)]
            try:
                results = forward([rows[i] for i in batch])
            except MemoryError:
                self.shrink(len(batch), longest, len(batch) * longest)
                continue
            yield batch, results
            at += len(batch)


def windows(groups: list, tokens: int) -> Iterator[list[int]]:
    """Yield indices of `groups` of token-id sequences in lists of about `tokens`, the longest first."""
    window, size = [], 0
    for g in sorted(range(len(groups)), key=lambda g: -max(map(len, groups[g]), default=0)):
        count = sum(map(len, groups[g]))
        if window and size + count > tokens:
            yield window
            window, size = [], 0
        window.append(g)
        size += count
    if window:
        yield window
