"""The rounds of online training: which prompts, their answers, rewards and pairs, on disk and read back.

    ROUNDS/round_000012/prompts.jsonl      the prompts, each with the `version` of the weights that answer it
    ROUNDS/round_000012/generated.jsonl    the answers
    ROUNDS/round_000012/probe.json         how far the servers' log-probabilities were from the trainer's, and
                                           that they held the same weights afterwards; without it the answers
                                           are sampled again
    ROUNDS/round_000012/rewarded.jsonl     the answers with rewards
    ROUNDS/round_000012/pairs.jsonl        what was chosen of them; pairs.skipped.jsonl what was left out

Rounds count from 0. What exists is whole and is not made again, so a killed run continues from here.
"""

import asyncio
import dataclasses
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from annotate_data.arguments import Arguments as RewardArguments
from annotate_data.arguments import shaping
from annotate_data.generated import survey
from annotate_data.get_rewards import Job, check_turns, finish, make_scorers, open_output, score_left
from annotate_data.ranks import World
from common.cli import UserError
from common.manifest import is_complete, write_json, write_jsonl
from common.records import read_generated, read_prompts, read_rewarded
from dpo_iteration.online_arguments import OF_PROMPTS, Arguments
from generation import gen_hf

VERSION = "version"  # field of a record: rounds that the weights had learned from which sampled it


class Prompts:
    """The prompts of all sets, over and over, each time in another order."""

    def __init__(self, args: Arguments, sampling: gen_hf.Arguments):
        self.size, self.seed = args.prompts_per_round, args.seed
        self.records = []
        for name in args.dataset_name_or_path:
            read = read_prompts(name, sampling, keep_bad=sampling.bad_prompts == "skip")
            self.records.extend(record for record in read if isinstance(record, dict))
        if len(self.records) < self.size:
            raise UserError(
                f"the prompt sets hold {len(self.records)} prompts, fewer than the {self.size} of a round: "
                "lower prompts_per_round or give more"
            )
        self.orders = {}

    def of_round(self, number: int) -> list[dict]:
        """The prompt records of a round, without ids: a file's records get their own."""
        return [
            {key: value for key, value in self.at(place).items() if key != "id"}
            for place in range(number * self.size, (number + 1) * self.size)
        ]

    def at(self, place: int) -> dict:
        number, place = divmod(place, len(self.records))
        if number not in self.orders:
            order = list(range(len(self.records)))
            random.Random(f"{self.seed}/{number}").shuffle(order)
            self.orders = {number: order}
        return self.records[self.orders[number][place]]


class InBackground:
    """A function at work in a thread that ends with this process.

    Attributes, once it is done:
        value, error: what it returned or raised.
        seconds: that it took.
    """

    def __init__(self, action: Callable, *given: object):
        self.value = self.error = None
        self.seconds = 0.0
        self.thread = threading.Thread(target=self._run, args=(action, *given), daemon=True)
        self.thread.start()

    def _run(self, action, *given):
        started = time.monotonic()
        try:
            self.value = action(*given)
        except BaseException as error:  # raised where it is waited for
            self.error = error
        self.seconds = time.monotonic() - started

    def is_done(self, seconds: float) -> bool:
        """Whether it is done, waiting for so long at most."""
        self.thread.join(seconds)
        return not self.thread.is_alive()


class RoundFolder:
    """The files of one round."""

    def __init__(self, args: Arguments, number: int):
        self.number, self.path = number, Path(args.rounds_dir) / f"round_{number:06}"
        self.prompts, self.generated = self.path / "prompts.jsonl", self.path / "generated.jsonl"
        self.rewarded, self.pairs = self.path / "rewarded.jsonl", self.path / "pairs.jsonl"
        self.probe = self.path / "probe.json"

    def is_sampled(self) -> bool:
        return self.generated.exists() and self.probe.exists()


def sample(
    folder: RoundFolder,
    prompts: Prompts,
    args: gen_hf.Arguments,
    version: int,
    probe: dict,
    still_held: Callable[[], str],
) -> str:
    """Have a round's prompts answered by servers that hold the weights `version`. On rank 0, in any thread.

    What a killed start has left of the round goes: nobody proved that its servers held their weights.

    Args:
        probe: what the probe before it found, for the record.
        still_held: says in words which server lost its weights meanwhile; then all answers are thrown
            away.

    Returns:
        What `still_held` said last; empty where all is well.

    Raises:
        UserError: as gen_hf.py.
    """
    own = [record | {VERSION: version} for record in prompts.of_round(folder.number)]
    shutil.rmtree(folder.path, ignore_errors=True)
    write_jsonl(folder.prompts, own)
    asked = OF_PROMPTS | {"dataset_name_or_path": str(folder.prompts), "output_dir": str(folder.generated)}
    asyncio.run(gen_hf.generate(dataclasses.replace(args, **asked, iteration=folder.number)))
    lost = still_held()
    if lost:
        shutil.rmtree(folder.path)
    else:
        write_json(folder.probe, {VERSION: version, "servers": probe})
    return lost


def sample_heldout(jobs: list[gen_hf.Arguments], policy: str, still_held: Callable[[], str]) -> str:
    """Have held-out prompts answered by servers that hold the weights of `policy`. On rank 0, in any thread.

    The answers stand in a folder of their own until it is proved that the servers held them to the end.

    Returns:
        What `still_held` said last, as `sample`.

    Raises:
        UserError: as gen_hf.py.
    """
    places = [Path(job.output_dir) for job in jobs]
    unproved = places[0].parent / "heldout.unproved"
    shutil.rmtree(unproved, ignore_errors=True)
    unproved.mkdir(parents=True)
    for job, place in zip(jobs, places, strict=True):
        asked = dataclasses.replace(job, tokenizer=policy, output_dir=str(unproved / place.name))
        asyncio.run(gen_hf.generate(asked, holds=policy))
    lost = still_held()
    if not lost:
        # the answers last: where they are, all is
        for path in sorted(unproved.iterdir(), key=lambda path: path.name in {p.name for p in places}):
            path.rename(places[0].parent / path.name)
    shutil.rmtree(unproved)
    return lost


def check_version(folder: RoundFolder, version: int):
    """Refuse answers of a round that other weights have sampled than those that they are to be of."""
    for record in read_generated(folder.generated):
        if record.get(VERSION) != version:
            raise UserError(
                f"{folder.generated} record {record['id']} was sampled by version {record.get(VERSION)} of "
                f"the weights, and round {folder.number} trains on those of version {version}: delete "
                f"{folder.path}"
            )


class Ranks(World):
    """The processes of the training, which have been connected by its trainer already."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


class Scoring:
    """Scorers that stay loaded, on every rank.

    Args:
        args: of get_rewards.py, but for input and output.
    """

    def __init__(self, args: RewardArguments):
        self.args, self.scorers, self.checked = args, make_scorers(args), False
        threads = torch.get_num_threads()
        for scorer in self.scorers:
            scorer.load()
        torch.set_num_threads(threads)  # a scorer sets its own

    def score(self, folder: RoundFolder, ranks: Ranks):
        """Write the round's answers with rewards, once. All ranks call it."""
        files = {"dataset_name_or_path": [str(folder.generated)], "output_dir": [str(folder.rewarded)]}
        args = dataclasses.replace(self.args, **files)
        shape = shaping(args, folder.generated)
        if ranks.together(lambda: is_complete(folder.rewarded, *shape)):
            return
        job = Job(str(folder.generated), folder.rewarded, *survey(folder.generated))
        if not self.checked:
            self.checked = True
            check_turns(self.scorers, [job], loud=ranks.rank == 0)
        count = len(self.scorers)
        opened = ranks.together(lambda: open_output(job, args, count, *shape) if ranks.rank == 0 else b"")
        job.done = ranks.gather(opened)[0]
        for number, scorer in enumerate(self.scorers):
            score_left(scorer, number, [job], ranks, args.chunk_records)
        if ranks.rank == 0:
            finish(job, self.scorers, args.reward_weights, {})
        ranks.gather()


def figures_of(folder: RoundFolder) -> dict:
    """What is logged of a round's answers: mean reward, mean of the best, tokens of an answer."""
    rewards, best, lengths, prompts = [], [], [], 0
    for record in read_rewarded(folder.rewarded):
        prompts += 1
        known = [reward for reward in record["rewards"] if reward is not None]
        rewards += known
        best += [max(known)] if known else []
        lengths += record.get("num_tokens") or []

    def mean(values: list) -> float | None:
        return round(sum(values) / len(values), 6) if values else None

    return {"prompts": prompts, "reward": mean(rewards), "best": mean(best), "length": mean(lengths)}
