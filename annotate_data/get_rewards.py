r"""Score generated responses by reward models of several kinds, functions of your own, or a sum of them.

In:  generated JSON Lines: `prompt` (messages), `responses` (K texts), any other fields.
Out: the same records with `rewards`: K floats aligned with `responses` (null if not finite); with several
     scorers also `reward_parts`, {name: K floats}; with --save_pair_probabilities also
     `pair_probabilities`, K lists of K.

    accelerate launch ./annotate_data/get_rewards.py --dataset_name_or_path ./data/gen_data.jsonl \
        --output_dir ./data/data_with_rewards.jsonl --K 4

One process per GPU under `accelerate launch`; plain `python` uses one. The input is read as a stream, once to
check it, once for each scorer, once to write the output, so that memory does not grow with it. A record is
saved as soon as its K responses are scored, and a run that was stopped is continued by the same command, also
with another number of processes. A prompt is computed once for its K responses (common/shared_prompts.py).
"""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from annotate_data.arguments import MODEL, Arguments, check, check_options, dated, names, shaping, types
from annotate_data.backbone import Backbone, BadRecord
from annotate_data.functions import RewardFunction
from annotate_data.generated import chunks, read_unscored, survey
from annotate_data.kinds import KINDS, kind_of
from annotate_data.ranks import World, leave, share
from annotate_data.summary import Summary
from common import cli, devices, manifest, models, progress, records
from common.cli import UserError
from common.files import in_time
from common.records import is_empty
from common.training import say

Scorer = Backbone | RewardFunction
LARGEST = 1e100  # of a reward
# First entry of a `.partial`; other ranks' files beside one without it are of an earlier life.
STARTED = "records"


@dataclass
class Job:
    """One input file on its way to one output file.

    What scorer s says of record i is saved under the id s · N + i.
    """

    source: str
    target: Path
    N: int  # records
    K: int  # responses each
    roles: dict  # roles of a prompt's turns → number, messages and tools of the first record that has them
    output: manifest.Output | None = None  # rank 0 only
    done: bytes = b""  # for each scorer and record a byte, 1 where that is saved

    def flags(self, scorer: int) -> bytes:
        """The bytes of `done` of one scorer."""
        return self.done[scorer * self.N : (scorer + 1) * self.N]

    def left(self, scorer: int) -> Iterator[tuple[int, dict]]:
        """(number, record) of what one scorer has not done, in the input's order."""
        done = self.flags(scorer)
        return (item for item in enumerate(read_unscored(self.source)) if not done[item[0]])


def make_scorers(args: Arguments) -> list[Scorer]:
    """The scorers in the order of `--reward_weights`: models, without weights as yet, then the function."""
    scorers, kinds = [], []
    for name, asked in zip(names(args), types(args), strict=True):
        config = models.load_config(name, args.revision, args.trust_remote_code, "reward model")
        kinds.append(kind_of(config.to_dict() | {"num_labels": config.num_labels}, asked, name))
        kind = KINDS[kinds[-1]]
        options = {key: getattr(args, key) for key in (*MODEL, *kind.options)} | {"template": args}
        scorers.append(kind.scorer(name, **options))
    check_options(args, kinds)
    return scorers + ([RewardFunction(args.reward_function)] if args.reward_function else [])


def check_turns(scorers: list[Scorer], jobs: list[Job], loud: bool = True) -> None:
    """Look at the first record of each kind of turns before any weights are loaded.

    A chat template that takes none of them is an error; one that takes some is told, since the others'
    rewards will be null. So is what a scorer does not see of tools.
    """
    for scorer in scorers:
        refused, taken, silent = [], 0, {}
        for job in jobs:
            for number, prompt, tools in job.roles.values():
                where = f"{job.source} record {number}"
                try:
                    scorer.check(prompt, tools)
                except UserError as error:
                    refused.append(f"{where}: {error}")
                    continue
                taken += 1
                for part in scorer.left_out(prompt, tools):
                    silent.setdefault(part, where)
        if refused and not taken:
            raise UserError(refused[0])
        if loud and refused:
            what = f"records that {scorer.name} cannot read get rewards of null"
            print(f"warning: {what}, such as {refused[0]}", flush=True)
        for part, where in silent.items() if loud else ():
            print(f"warning: {scorer.name} does not see the {part} of prompts such as {where}", flush=True)


def take_over(job: Job) -> None:
    """Move what other ranks have saved into rank 0's file; a torn last line is dropped."""
    ours = f"{job.target.name}.partial.rank"
    for path in sorted(path for path in job.target.parent.iterdir() if path.name.startswith(ours)):
        with open(path, "rb") as file:
            for line in file if job.output.done else ():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # anything, after a power cut
                    if line.endswith(b"\n"):
                        job.output.append(json.loads(line))
        path.unlink()


def open_output(job: Job, args: Arguments, scorers: int, settings: dict, inputs: dict) -> bytes:
    """Lock and check the output (rank 0); returns what becomes `Job.done`."""
    job.output = manifest.Output(job.target, "annotate_data/get_rewards.py", settings, inputs, args.overwrite)
    if job.output.complete:
        return b"\1" * (scorers * job.N)
    take_over(job)
    done = bytearray(scorers * job.N)
    for key in job.output.done:
        if isinstance(key, int):
            done[key] = 1
    return bytes(done)


def score(scorer: Scorer, number: int, jobs: list[Job], world: World, size: int, bar: progress.Progress):
    """Score what is left and save each record: rank 0 into `X.partial`, rank r into `X.partial.rank<r>`.

    Ranks share out each chunk of `size` records and wait for each other after it, so that one's error ends
    all of them.
    """
    turn = 0
    for job in jobs:
        if all(job.flags(number)):
            continue
        own = f"{job.target}.partial.rank{world.rank}"
        with open(own, "ab") if world.rank else contextlib.nullcontext() as file:
            for chunk in chunks(job.left(number), size):
                mine = share(chunk, (world.rank + turn) % world.size, world.size)
                world.together(functools.partial(score_chunk, scorer, number, job, mine, file, bar))
                bar.update(len(chunk) - len(mine))  # the others'
                turn += 1


def score_chunk(
    scorer: Scorer,
    number: int,
    job: Job,
    mine: list[tuple[int, dict]],
    file: BinaryIO | None,
    bar: progress.Progress,
):
    """Score this rank's records of a chunk; one that a reward model cannot read gets rewards of null."""

    def save(index: int, entry: dict):
        entry = {"id": number * job.N + index} | entry
        entry["rewards"] = [rounded(x) for x in entry["rewards"]]
        if "pairs" in entry:
            entry["pairs"] = [[None if p is None else round(p, 6) for p in row] for row in entry["pairs"]]
        if file is None:
            job.output.append(entry)
        else:
            with manifest.writing(file.name):
                file.write((records.dumps(entry) + "\n").encode())
                file.flush()
        bar.update(1)

    left = dict(mine)
    for index, record in mine:
        try:
            scorer.check(record["prompt"], record.get("tools"))
        except UserError as error:
            save(index, refusal(left.pop(index), error))
    while left:
        asked = list(left)
        try:
            for place, entry in scorer.score(list(left.values())):
                save(asked[place], entry)
                del left[asked[place]]
        except BadRecord as error:
            if isinstance(scorer, RewardFunction):  # its author can repair it, and what is scored is saved
                raise UserError(f"{job.source} record {asked[error.index] + 1}: {error}") from None
            save(asked[error.index], refusal(left.pop(asked[error.index]), error))
        else:
            break


def refusal(record: dict, error: Exception) -> dict:
    """What is saved of a record that a scorer cannot read."""
    return {"rewards": [None] * len(record["responses"]), "cut": 0, "refused": str(error)}


def rounded(reward: float | None) -> float | None:
    """A reward to 6 decimals; None where it is not finite, or beyond what sums of squares can take."""
    return round(reward, 6) if records.finite(reward) and abs(reward) < LARGEST else None


def combine(parts: list[list], weights: list[float]) -> list:
    """The weighted sum of lists of K rewards; None where a part is None."""
    return [
        None if None in values else rounded(sum(w * x for w, x in zip(weights, values, strict=True)))
        for values in zip(*parts, strict=True)
    ]


def rewarded(job: Job, scorers: list[Scorer], weights: list[float], counts: dict) -> Iterator[bytes]:
    """Yield the output's lines in the input's order; fills `counts` on the way."""
    order = (s * job.N + i for i in range(job.N) for s in range(len(scorers)))
    saved, summary = map(json.loads, job.output.saved(order)), Summary()
    nulls = cut = refused = empty = 0
    for record in read_unscored(job.source):
        entries = [next(saved) for _ in scorers]
        parts = [entry["rewards"] for entry in entries]
        record["rewards"] = combine(parts, weights) if weights else parts[0]
        named = {scorer.name: entry for scorer, entry in zip(scorers, entries, strict=True)}
        if len(scorers) > 1:
            record["reward_parts"] = {name: entry["rewards"] for name, entry in named.items()}
        pairs = {name: entry["pairs"] for name, entry in named.items() if "pairs" in entry}
        if pairs:
            record["pair_probabilities"] = pairs if len(pairs) > 1 else next(iter(pairs.values()))
        nulls += record["rewards"].count(None)
        empty += sum(is_empty(text) for text in record["responses"])
        cut += sum(entry["cut"] for entry in entries)
        refused += any("refused" in entry for entry in entries)
        lengths = record.get("num_tokens")
        known = isinstance(lengths, list) and all(isinstance(n, (int, float)) for n in lengths)
        summary.add(record["rewards"], lengths if known else None)
        yield (records.dumps(record) + "\n").encode("utf-8")
    counts |= {"null_rewards": nulls, "truncated": cut, "empty": empty, "refused": refused}
    counts |= summary.figures()


def finish(job: Job, scorers: list[Scorer], weights: list[float], facts: dict) -> dict:
    """Put rewards and records together, in the input's order; returns the counts."""
    total = len(scorers) * job.N

    def missing() -> int:
        take_over(job)
        return total - sum(isinstance(key, int) for key in job.output.done)

    if not in_time(lambda: not missing()):
        what = f"{missing()} of {total} records are not beside {job.target}"
        raise UserError(f"{what}; machines must share its folder")
    counts = {"read": job.N, "written": job.N, "skipped": 0, "K": job.K, "responses": job.N * job.K} | facts
    job.output.finish_with(rewarded(job, scorers, weights, counts), counts)
    return counts


def tell(job: Job, counts: dict) -> None:
    shown = {key: "n/a" if counts[key] is None else f"{counts[key]:.3f}" for key in Summary().figures()}
    print(
        f"read {cli.count(counts['read'], 'record')} of {cli.count(job.K, 'response')} from {job.source}, "
        f"wrote {counts['written']} to {job.target}, skipped 0; {counts['null_rewards']} rewards are null, "
        f"{counts['truncated']} sequences were cut on the left, {counts['empty']} responses are empty\n"
        f"  reward: mean {shown['reward_mean']}, best of {job.K} {shown['best_of_k']}, "
        f"worst {shown['worst_of_k']}, spread {shown['spread']}; "
        f"all equal in {shown['all_equal_fraction']} of the prompts\n"
        f"  correlation of reward and length in tokens: {shown['length_correlation_within']} within a "
        f"prompt, {shown['length_correlation']} overall",
        flush=True,
    )
    if counts["refused"]:
        what = f"{counts['refused']} records have rewards of null"
        print(f"warning: {what} because a scorer cannot read their prompts", flush=True)


def run_scorer(
    scorer: Scorer, number: int, jobs: list[Job], world: World, size: int
) -> tuple[int, int, float, dict]:
    """All that scorer `number` has left: (records scored, responses, seconds, facts for the manifest)."""
    left = [job.N - sum(job.flags(number)) for job in jobs]
    if not any(left):
        return 0, 0, 0.0, {}
    world.together(scorer.load)
    facts, how = {}, "cpu"
    if hasattr(scorer, "device"):
        facts = {"device": scorer.device.type, "dtype": scorer.dtype, "attention": scorer.attention}
        how = f"{', '.join(map(str, facts.values()))}, at most {scorer.max_length} tokens"
    if world.rank == 0:
        print(f"scoring {sum(left)} records with {scorer.name} on {world.size} × {how}", flush=True)
    seconds = score_left(scorer, number, jobs, world, size)
    if facts:
        facts["shared_prompts"] = scorer.before is not None
    world.together(scorer.unload)
    responses = sum(n * job.K for n, job in zip(left, jobs, strict=True))
    return sum(left), responses, seconds, facts


def score_left(scorer: Scorer, number: int, jobs: list[Job], world: World, size: int) -> float:
    """Score what scorer `number`, which is loaded, has left; returns the seconds."""
    if world.rank == 0:
        for job in jobs:
            if not job.output.complete and not job.output.done:
                job.output.append({"id": STARTED})
    world.gather()
    left = sum(job.N - sum(job.flags(number)) for job in jobs)
    bar = progress.Progress(left, "rewards", "records", enabled=world.rank == 0)
    started = time.monotonic()
    score(scorer, number, jobs, world, size, bar)
    bar.close()
    return time.monotonic() - started


def check_files(args: Arguments) -> list[tuple[str, Path]]:
    """[(input, output)]; refuses numbers and names of files that do not go together."""
    sources, targets = args.dataset_name_or_path, [Path(path) for path in args.output_dir]
    if not sources or len(sources) != len(targets):
        files = f"{len(sources)} files in --dataset_name_or_path, {len(targets)} in --output_dir"
        raise UserError(f"{files}: one for each")
    if len({path.resolve() for path in [*targets, *map(Path, sources)]}) != 2 * len(targets):
        raise UserError("--dataset_name_or_path and --output_dir must name different files")
    return list(zip(sources, targets, strict=True))


def finish_all(jobs: list[Job], scorers: list[Scorer], weights: list[float], ran: list[tuple], world: World):
    """Complete the outputs (rank 0); `ran`: what `run_scorer` returned for each scorer."""
    scored, responses, seconds = (sum(column) for column in list(zip(*ran, strict=True))[:3])
    facts = {key: value for *_, found in ran for key, value in found.items()}
    rate = responses / max(seconds, 1e-9)
    total = sum(job.N * job.K for job in jobs if not job.output.complete)
    for job in jobs:
        if job.output.complete:
            print(f"{job.target}: complete already")
            continue
        own = seconds * job.N * job.K / max(total, 1)  # files that are scored together share this start's
        facts |= {"processes": world.size, "sequences_per_second": round(rate, 1)}
        tell(job, finish(job, scorers, weights, facts | {"scoring_seconds": round(own, 1)}))
    what = f"{cli.count(scored, 'record')} ({cli.count(responses, 'response')})"
    print(f"scored {what} in {progress.duration(seconds)}, {rate:.1f} responses/s")


def main():
    args = cli.parse(Arguments, __doc__)
    files = check_files(args)
    check(args)
    args = dated(args)
    devices.check_processes()
    devices.prepare_threads()
    shaped = [shaping(args, cli.existing_file(source, "generated file")) for source, _ in files]
    done = [manifest.is_complete(target, *shape) for (_, target), shape in zip(files, shaped, strict=True)]
    if not args.overwrite and all(done):
        whole = ", ".join(str(target) for _, target in files)
        say(f"{whole}: complete already, nothing to do (--overwrite makes it again)")
        return
    jobs = [Job(source, target, *survey(source, args.K)) for source, target in files]

    devices.check_torch()
    world = World()
    scorers = world.together(lambda: make_scorers(args))
    world.together(lambda: check_turns(scorers, jobs, loud=world.rank == 0))
    to_open = zip(jobs, shaped, strict=True) if world.rank == 0 else ()
    opened = world.together(lambda: [open_output(job, args, len(scorers), *shape) for job, shape in to_open])
    for job, done in zip(jobs, world.gather(opened)[0], strict=True):
        job.done = done
    ran = [run_scorer(scorer, n, jobs, world, args.chunk_records) for n, scorer in enumerate(scorers)]
    if world.rank == 0:
        finish_all(jobs, scorers, args.reward_weights, ran, world)


if __name__ == "__main__":
    leave(lambda: cli.run(main))
