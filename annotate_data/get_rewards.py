r"""Score generated responses with a reward model.

In:  generated JSON Lines: `prompt` (messages), `responses` (K texts), any other fields.
Out: the same records with `rewards`: K floats aligned with `responses`, the model's raw logit (null if not finite).

    accelerate launch ./annotate_data/get_rewards.py --dataset_name_or_path ./data/gen_data.jsonl \
        --output_dir ./data/data_with_rewards.jsonl --K 4

One process per GPU under `accelerate launch`; plain `python` uses one. Every reward is saved as soon as its batch is
scored, and a run that was stopped is continued by the same command, also with another number of processes.
Simplified: every response is scored with its own copy of the prompt.
"""

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from annotate_data.ranks import World, share
from annotate_data.reward_models import BradleyTerry, in_batches
from annotate_data.summary import summarise
from common import cli, devices, manifest, progress, records
from common.cli import UserError, arg


@dataclass
class Arguments:
    dataset_name_or_path: list[str] = arg(help="generated JSON Lines file, or several")
    output_dir: list[str] = arg(help="rewarded file to write (a file name), one for each input")
    K: int | None = arg(None, help="responses a prompt; read from the data, a number given here must fit it")
    reward_name_or_path: str = arg("sfairXC/FsfairX-LLaMA3-RM-v0.1", help="folder or hub name; one label")
    max_length: int = arg(4096, help="tokens of prompt and response, at most the model's limit; the left is cut")
    batch_tokens: int = arg(16384, help="padded tokens of a batch on each GPU; halved by itself when memory runs out")
    dtype: str = arg("auto", "auto is bfloat16 on a GPU, float32 without", ("auto", "float32", "bfloat16", "float16"))
    attn_implementation: str = arg("auto", help="auto is flash_attention_2 where installed (GPU), else sdpa")
    revision: str | None = arg(None, help="branch, tag or commit of a hub model")
    chat_template: str | None = arg(None, help="jinja file in place of the reward model's own chat template")
    template_kwargs: dict = arg({}, help='variables for the template, {"name": value}')
    trust_remote_code: bool = arg(False, help="run Python code that comes with the model")
    overwrite: bool = arg(False, help="start anew, whatever is there")


# Settings that change a reward; the others change speed and rounding only.
SHAPING = ("max_length", "dtype", "revision", "template_kwargs")
MODEL = (*SHAPING, "chat_template", "trust_remote_code", "attn_implementation")


def shaping(args, source):
    """(settings, inputs) that shape the rewards of one input file; what its manifest holds."""
    inputs = {"dataset_name_or_path": str(source), "reward_name_or_path": args.reward_name_or_path}
    return {name: getattr(args, name) for name in SHAPING}, inputs | {"chat_template": args.chat_template}


@dataclass
class Job:
    """One input file on its way to one output file. Response k of record i has the number i · K + k."""

    source: str
    target: Path
    records: list
    K: int
    output: manifest.Output | None = None  # rank 0 only

    def responses(self):
        return [(r["prompt"], response) for r in self.records for response in r["responses"]]


def read_generated(path, wanted_k=None):
    """Records of a generated file, each with an `id` and its prompt as messages, and their K.

    Raises:
        UserError: a field is missing or of another kind, K differs within the file or from `wanted_k`.
    """
    found, ids, identify = [], {}, records.Identifier()
    for number, record in enumerate(records.read_jsonl(path, "generated file"), 1):
        where = f"{path} record {number}"
        for field in ("prompt", "responses"):
            if field not in record:
                raise UserError(f"{where} has no `{field}`{cli.nearest(field, record)}; it has {', '.join(record)}")
        prompt, responses = records.to_messages(record["prompt"], where), record["responses"]
        if not isinstance(responses, list) or not responses or not all(isinstance(r, str) for r in responses):
            raise UserError(f"{where}: `responses` must be a list of texts, it is {str(responses)[:60]}")
        for field in ("finish_reasons", "num_tokens"):
            if isinstance(record.get(field), list) and len(record[field]) != len(responses):
                raise UserError(f"{where} has {len(responses)} responses and {len(record[field])} {field}")
        made = identify(prompt)
        if not isinstance(record.get("id"), str):
            record = {"id": made} | record | {"id": made} | ({"source_id": record["id"]} if "id" in record else {})
        record = {key: value for key, value in record.items() if key != "rewards"}  # of an earlier annotation: replaced
        try:
            records.dumps(record)
        except ValueError:
            raise UserError(f"{where} holds NaN or infinity, which is no JSON: mend or remove that field") from None
        if record["id"] in ids:
            raise UserError(
                f"{where} has the id {record['id']!r} of record {ids[record['id']]}; make ids unique or leave them out"
            )
        ids[record["id"]] = number
        found.append(record | {"prompt": prompt})
    K = wanted_k or len(found[0]["responses"])
    odd = [r for r in found if len(r["responses"]) != K]
    if odd:
        whence = f"--K is {K}" if wanted_k else f"the first record of {path} has {K} responses"
        todo = "leave --K out to take the data's" if wanted_k else "put them in files of their own"
        raise UserError(
            f"{whence}, but {len(odd)} of {len(found)} records in {path} have another number "
            f"({odd[0]['id']} has {len(odd[0]['responses'])}); {todo}"
        )
    return found, K


def take_over(job):
    """Move what other ranks have saved into rank 0's file, however many they were; a torn last line is dropped."""
    for file in sorted(job.target.parent.iterdir()):
        if not file.name.startswith(f"{job.target.name}.partial.rank"):
            continue
        for line in file.read_bytes().splitlines(keepends=True) if job.output.done else ():
            with contextlib.suppress(json.JSONDecodeError):
                if line.endswith(b"\n"):
                    job.output.append(json.loads(line))
        file.unlink()


def open_output(job, args, settings, inputs):
    """Lock and check the output (rank 0) and say which responses it has already."""
    job.output = manifest.Output(job.target, "annotate_data/get_rewards.py", settings, inputs, args.overwrite)
    if job.output.complete:
        return set(range(len(job.records) * job.K))
    take_over(job)  # with nothing in rank 0's file, others' are of an earlier life and are dropped
    return {number for number in job.output.done if isinstance(number, int)}


def unscored(jobs, done):
    """What is left, as (job, number of the response) → characters of prompt and response."""
    return {
        (j, number): len(response) + sum(len(m["content"]) for m in prompt)
        for j, job in enumerate(jobs)
        for number, (prompt, response) in enumerate(job.responses())
        if number not in done[j]
    }


def encode(scorer, jobs, mine):
    responses = [job.responses() for job in jobs]
    rows = []
    for j, number in mine:
        try:
            rows.append(scorer.encode(*responses[j][number]))
        except UserError as error:
            raise UserError(f"{jobs[j].source} record {number // jobs[j].K + 1}: {error}") from None
    return rows


def score(scorer, jobs, mine, rows, world, batch_tokens):
    """Score this rank's rows and save each batch: rank 0 into `X.partial`, rank r into `X.partial.rank<r>`."""
    what = f"rewards (this process, 1 of {world.size})" if world.size > 1 else "rewards"
    bar = progress.Progress(len(rows), what, "sequences", enabled=world.rank == 0)
    with contextlib.ExitStack() as files:
        names = [f"{job.target}.partial.rank{world.rank}" for job in jobs if world.rank]
        others = [files.enter_context(open(name, "ab")) for name in names]
        for batch, rewards in in_batches(scorer, rows, batch_tokens):
            for i, reward in zip(batch, rewards, strict=True):
                j, number = mine[i]
                reward = round(reward, 6) if records.finite(reward) else None
                entry = {"id": number, "reward": reward, "cut": rows[i].cut}
                if world.rank == 0:
                    jobs[j].output.append(entry)
                else:
                    others[j].write((records.dumps(entry) + "\n").encode())
            for file in others:
                file.flush()
            bar.update(len(batch))
    bar.close()


def finish(job, facts):
    """Put rewards and records together, in the input's order; returns the counts."""
    take_over(job)
    with open(job.output.partial, "rb") as file:
        saved = {entry["id"]: entry for entry in map(json.loads, file)}
    total = len(job.records) * job.K
    missing = sum(number not in saved for number in range(total))
    if missing:
        raise UserError(f"{missing} of {total} rewards are not beside {job.target}; machines must share its folder")
    entries = [saved[number] for number in range(total)]
    rewarded = [
        record | {"rewards": [entry["reward"] for entry in entries[i * job.K : (i + 1) * job.K]]}
        for i, record in enumerate(job.records)
    ]
    counts = {"read": len(rewarded), "written": len(rewarded), "skipped": 0, "K": job.K, "responses": total}
    counts["null_rewards"] = sum(entry["reward"] is None for entry in entries)
    counts["truncated"] = sum(entry["cut"] > 0 for entry in entries)
    counts |= facts | summarise(rewarded)
    for record in rewarded:
        job.output.append(record)
    job.output.finish([record["id"] for record in rewarded], counts)
    return counts


def tell(job, counts):
    shown = {key: "n/a" if counts[key] is None else f"{counts[key]:.3f}" for key in summarise([])}
    print(
        f"read {counts['read']} records of {job.K} responses from {job.source}, "
        f"wrote {counts['written']} to {job.target}, skipped 0; "
        f"{counts['null_rewards']} rewards are null, {counts['truncated']} sequences were cut on the left\n"
        f"  reward: mean {shown['reward_mean']}, best of {job.K} {shown['best_of_k']}, worst {shown['worst_of_k']}, "
        f"spread {shown['spread']}; all equal in {shown['all_equal_fraction']} of the prompts\n"
        f"  correlation of reward and length in tokens: {shown['length_correlation_within']} within a prompt, "
        f"{shown['length_correlation']} overall",
        flush=True,
    )


def main():
    args = cli.parse(Arguments, __doc__)
    sources, targets = args.dataset_name_or_path, [Path(path) for path in args.output_dir]
    if not sources or len(sources) != len(targets):
        raise UserError(f"{len(sources)} files in --dataset_name_or_path, {len(targets)} in --output_dir: one for each")
    if len({path.resolve() for path in [*targets, *map(Path, sources)]}) != 2 * len(targets):
        raise UserError("--dataset_name_or_path and --output_dir must name different files")
    for name in ("K", "max_length", "batch_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    devices.check_processes()
    devices.prepare_threads()
    shaped = [shaping(args, cli.existing_file(source, "generated file")) for source in sources]
    if args.chat_template:
        cli.existing_file(args.chat_template, "chat template")

    def is_complete(target, shape):
        found = manifest.read_manifest(target)
        return bool(target.exists() and found and not manifest.difference(found, *shape))

    if not args.overwrite and all(map(is_complete, targets, shaped)):
        if os.environ.get("RANK", "0") == "0":
            print(f"{', '.join(map(str, targets))}: complete already, nothing to do (--overwrite starts anew)")
        return
    jobs = [Job(s, t, *read_generated(s, args.K)) for s, t in zip(sources, targets, strict=True)]

    world = World()
    scorer = world.together(lambda: BradleyTerry(args.reward_name_or_path, **{k: getattr(args, k) for k in MODEL}))
    mine_to_open = zip(jobs, shaped, strict=True) if world.rank == 0 else ()
    done = world.gather(world.together(lambda: [open_output(j, args, *shape) for j, shape in mine_to_open]))[0]
    left, facts, seconds = unscored(jobs, done), {}, 0.0
    if left:
        mine = share(left, world.rank, world.size)
        rows = world.together(lambda: encode(scorer, jobs, mine))
        world.together(scorer.load)
        if world.rank == 0:
            print(
                f"scoring {len(left)} responses with {args.reward_name_or_path} on {world.size} × "
                f"{scorer.device.type}, {scorer.dtype}, {scorer.attention}, at most {scorer.max_length} tokens",
                flush=True,
            )
            for job in jobs:
                if not job.output.complete and not job.output.done:
                    job.output.append({"id": "started"})  # binds other ranks' files to this start's settings
        world.gather()
        started = time.monotonic()
        world.together(lambda: score(scorer, jobs, mine, rows, world, args.batch_tokens))
        seconds = time.monotonic() - started
        facts = {"device": scorer.device.type, "dtype": scorer.dtype, "attention": scorer.attention}
    if world.rank:
        return
    rate = len(left) / max(seconds, 1e-9)
    for job in jobs:
        if job.output.complete:
            print(f"{job.target}: complete already")
        else:
            tell(job, finish(job, facts | {"processes": world.size, "sequences_per_second": round(rate, 1)}))
    print(f"scored {len(left)} sequences in {progress.duration(seconds)}, {rate:.1f} sequences/s")


if __name__ == "__main__":
    cli.run(main)
