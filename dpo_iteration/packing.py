"""Which pairs go into which forward pass, and what a pass is given.

An optimizer step has `pairs_per_step` pairs: those that the unpacked computation would have, in the shuffled
order that TRL's trainer has for the same seed. Packed, they are laid longest first into the least filled of
processes × accumulation rows, so that every process has as many rows and about as many tokens. In a row
(common/shared_prompts.py) chosen and rejected share their prompt and nothing is padded. Padded, which every
model and attention can do, pairs stay in order.

The loss of a step is the mean over its pairs, wherever they lie: each pair's loss is multiplied by its
`scale`, and rows are added up. A row without a pair holds the shortest one with scale 0, so that all
processes have the same number of passes.

Where no loss looks at rejected responses, the rows have none: `rejected_ids` is empty, and of a pair one
sequence is computed.
"""

import heapq
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from accelerate.data_loader import SeedableRandomSampler
from trl.trainer.dpo_trainer import DataCollatorForPreference

from common.cli import UserError
from common.shared_prompts import pack, packed_tokens, shared
from common.training import say, world_size
from dpo_iteration import models
from dpo_iteration.arguments import Arguments, reason_for_trl
from dpo_iteration.checks import refuse_padded

IGNORED = -100
# Of a pair, beside its tokens.
NUMBERS = ("scale", "step_tokens", "margin", "ref_chosen_logps", "ref_rejected_logps")


def both(row: dict) -> list[list[int]]:
    """The two sequences of a pair as token ids; one where nothing is rejected."""
    responses = (row["chosen_ids"], row["rejected_ids"])
    return [row["prompt_ids"] + response for response in responses if response]


def columns_of(row: dict) -> int:
    """Columns that a pair takes in a packed row."""
    return packed_tokens(both(row), labelled=True)


def cost_of(row: dict) -> int:
    """Columns that a pair takes, in its row or in that of the same pairs' answers to other prompts."""
    return max(map(columns_of, (row, row["mismatched"]))) if "mismatched" in row else columns_of(row)


def fill(indices: list[int], costs: list[int], bins: int) -> list[list[int]]:
    """Lay `indices` into `bins` lists, the largest first and always into the least filled, and order these by
    what they hold.

    Lists that lie side by side in the result are filled alike: a round of processes waits for its slowest.
    """
    heap, made = [(0, b) for b in range(bins)], [[] for _ in range(bins)]
    for i in sorted(indices, key=lambda i: (-costs[i], i)):
        total, b = heapq.heappop(heap)
        made[b].append(i)
        heapq.heappush(heap, (total + costs[i], b))
    return sorted(made, key=lambda one: -sum(costs[i] for i in one))


@dataclass
class Steps:
    """The batches of one process, as a torch batch sampler: lists of (index of a pair, scale of its loss), or
    with `tokens` of (index, scale, mean tokens of a chosen response in its step).

    Args:
        costs: tokens of each pair in a row.
        pairs_per_step: over all processes; the last step of an epoch has what is left.
        budget: tokens of a row at most, where a pair is not longer; None lays `at_once` pairs into a pass, in
            order.
        weights: of each pair's loss; None for 1.
        tokens: of each pair's chosen response.
        seed: of the order; None keeps the order of the pairs.

    Attributes:
        accumulation: passes of each process in a step; the same in all steps of `epochs` epochs.
    """

    costs: list
    pairs_per_step: int
    budget: int | None = None
    at_once: int = 1
    processes: int = 1
    process: int = 0
    weights: list | None = None
    tokens: list | None = None
    seed: int | None = None
    epochs: int = 1
    epoch: int = 0
    accumulation: int = field(init=False)

    def __post_init__(self):
        self.accumulation = self._least_accumulation()

    @property
    def batch_sampler(self) -> "Steps":
        """Where the Trainer looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def steps(self, epoch: int) -> Iterator[list[int]]:
        """Yield the pairs of each optimizer step, as lists of indices."""
        order = range(len(self.costs))
        if self.seed is not None:  # the order in which accelerate hands data to TRL's trainer
            sampler = SeedableRandomSampler(order, generator=torch.Generator(), data_seed=self.seed)
            sampler.set_epoch(epoch)
            order = list(sampler)
        for first in range(0, len(order), self.pairs_per_step):
            yield list(order[first : first + self.pairs_per_step])

    def _least_accumulation(self):
        if self.budget is None:
            return -(-self.pairs_per_step // (self.processes * self.at_once))
        most = 1
        for epoch in range(self.epochs):
            for step in self.steps(epoch):
                most = max(most, -(-sum(self.costs[i] for i in step) // (self.budget * self.processes)))
                while not self._fits(fill(step, self.costs, most * self.processes)):
                    most += 1
        return most

    def _fits(self, rows):
        return all(len(row) <= 1 or sum(self.costs[i] for i in row) <= self.budget for row in rows)

    def __len__(self):
        return -(-len(self.costs) // self.pairs_per_step) * self.accumulation

    def __iter__(self):
        least = min(range(len(self.costs)), key=self.costs.__getitem__)
        count = self.processes * self.accumulation
        for step in self.steps(self.epoch):
            if self.budget is None:
                rows = [step[k * self.at_once : (k + 1) * self.at_once] for k in range(count)]
            else:
                rows = fill(step, self.costs, count)
            # The Trainer divides each pass by the accumulation and the mean over processes divides by their
            # number.
            scale = count / len(step)
            mean = (sum(self.tokens[i] for i in step) / len(step),) if self.tokens else ()
            for row in rows[self.process :: self.processes]:
                scaled = [(i, scale * (self.weights[i] if self.weights else 1.0)) for i in row]
                yield [(*pair, *mean) for pair in scaled or [(least, 0.0)]]


def computation(args: Arguments) -> tuple[str, bool]:
    """(why batches and loss are TRL's own, empty where they are ours; whether prompts are shared); says so.

    Raises:
        UserError: what was asked for cannot be.
    """
    experts = args.router_aux_loss_coef != 0 and models.has_auxiliary_loss(args)
    padded = reason_for_trl(args) or ("its mixture of experts has an auxiliary loss" if experts else "")
    if padded:
        refuse_padded(args, padded)
        say(f"note: padded batches and TRL's own loss: {padded}")
        return padded, False
    against = "" if args.share_prompts is False else models.reason_against_sharing(args)
    if against and args.share_prompts:
        raise UserError(f"--share_prompts true: this model cannot share prompts, {against}")
    if against:
        say(f"note: padded batches: the model cannot share prompts, {against}")
    return "", args.share_prompts is not False and not against


def batches(args: Arguments, rows: dict, per_step: int) -> tuple[bool, dict]:
    """(whether prompts are shared, {split: Steps, or None where TRL makes the batches}); says which
    computation it is.
    """
    padded, sharing = computation(args)
    if padded:
        return False, {"train": None, "eval": None}
    budget = row_tokens(args) if sharing else None
    steps, costs, tokens = {"train": None, "eval": None}, {}, {}
    for split in [split for split in rows if rows[split]]:
        costs[split] = [cost_of(row) if sharing else 0 for row in rows[split]]
        tokens[split] = [len(row["chosen_ids"]) for row in rows[split]]
    place = {"processes": world_size(), "process": int(os.environ.get("RANK", "0"))}
    epochs = math.ceil(args.num_train_epochs)
    if args.max_steps > 0:
        epochs = math.ceil(args.max_steps * per_step / len(rows["train"]))
    steps["train"] = Steps(
        costs["train"],
        per_step,
        budget,
        args.per_device_train_batch_size,
        weights=weights(rows["train"], args.margin_weight),
        tokens=tokens["train"],
        seed=args.seed if args.data_seed is None else args.data_seed,
        epochs=epochs,
        **place,
    )
    if rows["eval"]:
        at_once = args.per_device_eval_batch_size
        steps["eval"] = Steps(
            costs["eval"], len(rows["eval"]), budget, at_once, tokens=tokens["eval"], **place
        )
    if sharing:
        alone, packed = (
            sum(len(ids) for row in rows["train"] for ids in both(row)),
            sum(map(columns_of, rows["train"])),
        )
        longest, passes = max(budget, *costs["train"]), steps["train"].accumulation
        say(
            f"packed {alone:,} tokens an epoch into {packed:,} (shared prompts, no padding); rows of up to "
            f"{longest:,} tokens, {passes} per process and step"
        )
    return sharing, steps


def row_tokens(args: Arguments) -> int:
    return args.max_row_tokens or 2 * args.per_device_train_batch_size * args.max_length


def weights(rows: list[dict], power: float) -> list[float] | None:
    """margin ** power × `loss_weight` of each pair, in the mean 1; None where all are alike."""
    if not power and "loss_weight" not in rows[0]:
        return None
    found = [row["margin"] ** power * row.get("loss_weight", 1.0) for row in rows]
    if not sum(found):
        raise UserError(f"--margin_weight {power:g} leaves nothing: all margins are 0")
    return [weight * len(found) / sum(found) for weight in found]


class Rows(torch.utils.data.Dataset):
    """Pairs by what `Steps` yields: the row with its `scale`."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return self.rows[key[0]] | dict(zip(("scale", "step_tokens"), key[1:]))


def numbers(rows: list[dict]) -> dict[str, torch.Tensor]:
    """{name: float32 tensor [pairs]} of the `NUMBERS` that the rows have."""
    there = [name for name in NUMBERS if name in rows[0]]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in there}


def collate_packed(rows: list[dict]) -> dict:
    """One packed row of pairs.

    Returns:
        `input_ids` [1, T]; `row`, a Packed whose `wanted` columns [n] have a next token in a response;
        `next_ids` [1, n], that token; `owner` [n], whose log-probability it is: 3p of pair p's chosen
        response, 3p + 1 of its rejected one, 3p + 2 of both; `numbers`. `tokens`: what the two sequences of
        each pair have in all. `pairs`: the rows as they were given.
    """
    groups = [both(row) for row in rows]
    packed = pack(groups, labelled=True)
    wanted, next_ids, owner, at = [], [], [], 0
    for p, (row, group) in enumerate(zip(rows, groups)):
        prompt, prefix = len(row["prompt_ids"]), shared(group, labelled=True)
        spans = [(group[0], 0, prefix, 2)]
        spans += [(ids, prefix, len(ids) - 1, side) for side, ids in enumerate(group)]
        for ids, first, end, whose in spans:
            labelled = range(max(first, prompt - 1), end)
            wanted.extend(at + j - first for j in labelled)
            next_ids.extend(ids[j + 1] for j in labelled)
            owner.extend([3 * p + whose] * len(labelled))
            at += end - first + (whose != 2)  # the last token of a sequence has no next one
    packed.wanted = torch.tensor(wanted)
    return {
        "input_ids": packed.ids,
        "row": packed,
        "next_ids": torch.tensor([next_ids]),
        "owner": torch.tensor(owner),
        "tokens": sum(len(ids) for group in groups for ids in group),
        "pairs": rows,
        **numbers(rows),
    }


class PaddedCollator:
    """TRL's padded batch with `numbers`, `tokens` and `pairs`, see `collate_packed`."""

    def __init__(self, pad_token_id):
        self.collate = DataCollatorForPreference(pad_token_id=pad_token_id)

    def __call__(self, rows):
        tokens = sum(len(ids) for row in rows for ids in both(row))
        return self.collate(rows) | numbers(rows) | {"tokens": tokens, "pairs": rows}


@dataclass
class Scored:
    """Log-probabilities of a pass.

    chosen, rejected: [pairs], summed over a response's tokens; chosen_tokens, rejected_tokens: [pairs].
    outputs: the model's, with values a token in the places that `of_chosen` and `of_rejected` (bool) tell
    apart.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor
    outputs: object
    of_chosen: torch.Tensor
    of_rejected: torch.Tensor


def score(model: torch.nn.Module, batch: dict, ld_alpha: float | None = None) -> Scored:
    """Log-probabilities of a batch of `collate_packed` or `PaddedCollator`, under a model with TRL's fused
    head.

    `ld_alpha` (padded only): tokens beyond the shorter response's length count by this (LD-DPO, arXiv
    2409.06411).
    """
    if "row" not in batch:
        return _score_padded(model, batch, ld_alpha)
    row = batch["row"].to(batch["input_ids"].device)
    outputs = model(
        input_ids=row.ids,
        position_ids=row.positions,
        use_cache=False,
        shift_labels=batch["next_ids"],
        fused_lm_head=True,
        shared_prompts=row,
    )
    owner, pairs = batch["owner"], len(batch["scale"])
    logps, whose = outputs.log_probs[0], owner % 3

    def sums(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = values.new_zeros(3 * pairs).index_add(0, owner, values).view(pairs, 3)
        return found[:, 0] + found[:, 2], found[:, 1] + found[:, 2]

    return Scored(
        *sums(logps), *sums(torch.ones_like(logps)), outputs, (whose != 1)[None], (whose != 0)[None]
    )


def _score_padded(model, batch, ld_alpha):
    mask = batch["completion_mask"].bool()
    labels = batch["input_ids"].masked_fill(~mask, IGNORED)
    # Not every model takes them.
    places = {"position_ids": batch["position_ids"]} if "position_ids" in batch else {}
    outputs = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        labels=labels,
        fused_lm_head=True,
        **places,
    )
    mask, logps = mask[:, 1:], outputs.log_probs
    tokens = mask.sum(1)
    if ld_alpha is not None:
        shorter = torch.minimum(*tokens.chunk(2)).repeat(2)
        logps = torch.where(mask.cumsum(1) > shorter[:, None], ld_alpha * logps, logps)
    rows = torch.arange(len(mask), device=mask.device)[:, None] < len(mask) // 2
    return Scored(
        *logps.sum(1).chunk(2), *tokens.to(logps.dtype).chunk(2), outputs, mask & rows, mask & ~rows
    )
