r"""How far an iterate has gone from the reference: KL(policy ‖ reference), estimated from the policy's own
sampled answers.

In:  generated (or rewarded) JSON Lines of answers that the policy sampled; the policy; the reference.
Out: `divergence.jsonl`, a line a prompt: `id`, and for each of its K responses `tokens`, `logps` and
     `ref_logps` (natural log-probabilities, summed over the tokens) and `k3`, null where a
     response has no token or is too long; `divergence.json` beside it with the estimates.

    accelerate launch evaluation/divergence.py --output_dir runs/tiny/iter1/divergence.jsonl \
        --dataset_name_or_path runs/tiny/iter1/heldout_sampled.generated.jsonl \
        --model_name_or_path runs/tiny/iter1/model --ref_model_name_or_path tiny/built/policy

There are two estimates in nats a response, `kl` and `k3`, each with its standard error over prompts, `…_se`,
and a mean over all tokens, `…_per_token`; evaluation/kl.py says how they are made. `k3` is null in bf16 and
fp16, whose rounding would add to it (`k3_null`); `--dtype float32` gives it.

The answers must be samples of the policy that is measured. Sampled at temperature T, they are samples of the
policy whose logits are divided by T, so both models' logits are: what is estimated is then KL(π_T ‖ π_ref,T),
not KL(π ‖ π_ref). With top_p, top_k, sampling_args (but `stop`) or engine_args (a quantised engine, say) they
are samples of neither, the estimate is biased, and it is not `exact` either. Greedy answers are refused, and
those of a mixture, which have no one temperature.

A response's tokens are those that were sampled, which generated files hold. Where a file has text only, they
are those of the text in the chat template, with its end of turn unless the answer was cut off; answers of
which another number of tokens was sampled are counted (`retokenised`), and the estimate is not `exact`. Each
iterate has answers of its own, so the reference is computed for each of them anew. Where policy and reference
are one model the estimate is 0 without being computed.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from annotate_data.generated import chunks, survey
from annotate_data.ranks import World, leave, share
from common import cli, devices, manifest, models, progress
from common.chat import ChatTemplate, TemplateArguments
from common.cli import UserError, arg
from common.records import dumps, read_generated
from common.tokens import Encoder
from common.training import say
from evaluation.kl import combine, summarise
from evaluation.logps import Policy, score
from generation import get_hf2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCRIPT = "evaluation/divergence.py"
NOTES = {  # of what is counted, if there is any
    "left_out": "responses left out: no token, or longer than the models' context",
    "from_text": "responses have no token ids of this tokenizer: from their text the estimate is not exact",
    "retokenised": "of them have another number of tokens than were sampled",
}


@dataclass
class Arguments(TemplateArguments):
    dataset_name_or_path: str = arg(
        help="answers that the policy sampled: generated or rewarded JSON Lines file"
    )
    model_name_or_path: str = arg(help="the policy that sampled them: folder or hub name")
    ref_model_name_or_path: str = arg(help="the reference: folder or hub name")
    output_dir: str = arg(
        help="JSON Lines file to write (a file name); the estimates stand beside it, in .json", shapes=False
    )
    temperature: float | None = arg(None, "of the sampling; None: as the answers' manifest has it")
    top_p: float | None = arg(None, "of the sampling; None: as the answers' manifest has it")
    dtype: str = arg(
        "auto", "auto is bfloat16 on a GPU, float32 without", ("auto", "float32", "bfloat16", "float16")
    )
    attn_implementation: str = arg(
        "auto", help="auto is flash_attention_2 where installed (GPU), else sdpa", shapes=False
    )
    batch_tokens: int | None = arg(
        None,
        "tokens of a forward pass, halved when memory runs out; None: 16384 on a GPU, 2048 without",
        shapes=False,
    )
    share_prompts: bool = arg(
        True, help="compute a prompt once for its K responses, where the architecture allows it", shapes=False
    )
    chunk_records: int = arg(256, help="records that are shared out and saved together", shapes=False)
    trust_remote_code: bool = arg(False, help="run Python code that comes with the models", shapes=False)
    overwrite: bool = arg(False, help="start anew, whatever is there", shapes=False)

    shares_section = get_hf2.Arguments  # a YAML section may serve both scripts


def summary_path(output_dir: str | Path) -> Path:
    """`divergence.jsonl` → `divergence.json`."""
    return manifest.beside(output_dir, ".json")


def sampling(args: Arguments) -> dict:
    """{temperature, top_p, top_k} of the answers, sampling_args and engine_args where given: the arguments',
    else those in the manifest of the file or of what it was made from.
    """
    settings = (manifest.generation_manifest(args.dataset_name_or_path) or {}).get("settings", {})
    names = ("temperature", "top_p", "top_k", "sampling_args", "engine_args")
    found = {key: settings[key] for key in names if settings.get(key) is not None}
    given = {key: getattr(args, key) for key in ("temperature", "top_p") if getattr(args, key) is not None}
    return {"temperature": 1.0, "top_p": 1.0, "top_k": -1} | found | given


def shaping(args: Arguments) -> tuple[dict, dict]:
    """(settings, inputs) that shape the estimates; what the output's manifest holds."""
    names = ("dataset_name_or_path", "model_name_or_path", "ref_model_name_or_path")
    how = {key: sampling(args)[key] for key in ("temperature", "top_p")}
    inputs = {name: getattr(args, name) for name in (*names, "chat_template")}
    return cli.shaping_values(args, names) | how, inputs


def is_same(one: str, other: str) -> bool:
    """Whether two models are one, by name or by folder."""
    return one == other or (Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other))


def check(args: Arguments):
    """Refuse what cannot work before anything heavy is imported."""
    cli.existing_file(args.dataset_name_or_path, "generated file")
    for name in ("model_name_or_path", "ref_model_name_or_path"):
        models.check_policy(getattr(args, name), f"--{name}")
    for name in ("chunk_records", "batch_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if Path(args.output_dir).suffix != ".jsonl":
        raise UserError(f"--output_dir {args.output_dir}: a name that ends in .jsonl was expected")
    first = next(read_generated(args.dataset_name_or_path), {})
    if "response_sources" in first:
        raise UserError(
            f"{args.dataset_name_or_path} holds responses of a mixture: a KL is estimated from answers that "
            "were all sampled at one temperature; generate some without --mixture"
        )
    temperature = sampling(args)["temperature"]
    if not temperature > 0:
        raise UserError(
            f"these answers were sampled at temperature {temperature:g}: a KL is estimated from answers at a "
            "temperature above 0"
        )
    args.check_template()


def of_itself(args: Arguments, output: manifest.Output, facts: dict):
    """Policy and reference are one model: the estimate is 0 and nothing is computed."""
    lines = [
        {"id": record["id"]}
        | dict.fromkeys(("tokens", "logps", "ref_logps", "k3"), [None] * len(record["responses"]))
        for record in read_generated(args.dataset_name_or_path)
    ]
    summary = dict.fromkeys(("kl", "kl_se", "k3", "k3_se", "kl_per_token", "k3_per_token"), 0.0)
    summary |= {"estimator": "none: policy and reference are one model", "prompts": len(lines)}
    summary |= {"responses": 0, "tokens": 0} | facts
    save(args, output, lines, summary, records=len(lines), processes=1)
    print(f"{args.model_name_or_path} is the reference: KL 0; wrote {summary_path(args.output_dir)}")


def save(args: Arguments, output: manifest.Output, entries: Iterable[dict], summary: dict, **counts: int):
    """Write the estimates, then the records."""
    manifest.write_json(summary_path(args.output_dir), summary)
    lines = ((dumps(entry) + "\n").encode() for entry in entries)
    output.finish_with(lines, counts | summary)


def run_model(
    policy: Policy,
    number: int,
    N: int,
    done: set,
    world: World,
    output: manifest.Output | None,
    args: Arguments,
    tokenizer: "PreTrainedTokenizerBase",
    limit: int,
):
    """Save the log-probabilities that one model (number 0 the policy, 1 the reference) gives to what is not
    done.

    Entries are those of `score`; the one of record i has the id number · N + i. Ranks share out each chunk;
    rank 0 saves it.
    """
    wanted = {i for i in range(N) if number * N + i not in done}
    if not wanted:
        return
    world.together(policy.load)
    bar = progress.Progress(len(wanted), ("policy", "reference")[number], "prompts", enabled=world.rank == 0)
    encode = Encoder(ChatTemplate(tokenizer, args))
    left = (item for item in enumerate(read_generated(args.dataset_name_or_path)) if item[0] in wanted)
    for chunk in chunks(left, args.chunk_records):
        mine = share(chunk, world.rank, world.size)
        entries = world.together(
            lambda mine=mine: score(mine, policy, encode, limit, args.dataset_name_or_path)
        )
        for found in world.gather(entries):
            for entry in found if world.rank == 0 else ():
                output.append(entry | {"id": number * N + entry["id"]})
        bar.update(len(chunk))
    bar.close()
    world.together(policy.unload)


def load_models(args: Arguments, temperature: float, world: World) -> tuple[Policy, Policy]:
    """The policy and the reference, whose tokens must be the same; their weights are not loaded yet."""
    names = ("dtype", "attn_implementation", "batch_tokens", "share_prompts", "trust_remote_code")
    options = {key: getattr(args, key) for key in names}
    policy, reference = (
        world.together(lambda name=name: Policy(name, temperature, **options))
        for name in (args.model_name_or_path, args.ref_model_name_or_path)
    )
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise UserError(
            f"{policy.name} and {reference.name} have different vocabularies: their log-probabilities are of "
            "other tokens"
        )
    return policy, reference


def restore_summary(args: Arguments, output: manifest.Output):
    """Write the estimates that the manifest of a complete output holds: their own file is gone."""
    counts = output.manifest["counts"].items()
    manifest.write_json(
        summary_path(args.output_dir), {k: v for k, v in counts if k not in ("records", "processes")}
    )
    print(f"wrote {summary_path(args.output_dir)} anew")


def main():
    args = cli.parse(Arguments, __doc__)
    check(args)
    devices.check_processes()
    devices.prepare_threads()
    answers = manifest.generation_manifest(args.dataset_name_or_path)
    args = manifest.with_date(args, args.output_dir, answers and answers["settings"].get("date"))
    settings, inputs = shaping(args)
    whole = summary_path(args.output_dir).exists() and not args.overwrite
    if whole and manifest.is_complete(args.output_dir, settings, inputs):
        say(f"{args.output_dir}: complete already, nothing to do (--overwrite starts anew)")
        return
    N, _, _ = survey(args.dataset_name_or_path)
    how = sampling(args)
    facts = {"reference": args.ref_model_name_or_path, "model": args.model_name_or_path, **how}
    more = how.get("sampling_args", {}).keys() - {"stop"} or how.get("engine_args")
    facts["exact"] = how["top_p"] >= 1 and how["top_k"] in (-1, 0) and not more
    devices.check_torch()
    world, started = World(), time.monotonic()

    def open_output() -> manifest.Output:
        return manifest.Output(args.output_dir, SCRIPT, settings, inputs, args.overwrite)

    output = world.together(lambda: open_output() if world.rank == 0 else None)
    if world.gather(output is not None and output.complete)[0]:
        if world.rank == 0:
            restore_summary(args, output)
        return
    if is_same(args.model_name_or_path, args.ref_model_name_or_path):
        if world.rank == 0:
            of_itself(args, output, facts)
        return
    done = set(world.gather(list(output.done) if output else [])[0])
    models = load_models(args, how["temperature"], world)
    tokenizer, limit = models[0].tokenizer, min(model.positions for model in models)
    for number, model in enumerate(models):
        run_model(model, number, N, done, world, output, args, tokenizer, limit)
    if world.rank == 0:
        finish(args, output, N, facts, time.monotonic() - started, world.size)


def finish(args: Arguments, output: manifest.Output, N: int, facts: dict, seconds: float, processes: int):
    """Put both models' entries together, write the estimates, then the records."""

    def entries() -> Iterator[dict]:
        saved = map(json.loads, output.saved(key for i in range(N) for key in (i, N + i)))
        counts.update(left_out=0, retokenised=0, from_text=0)
        for record in read_generated(args.dataset_name_or_path):
            ours, theirs = next(saved), next(saved)
            counts["left_out"] += ours["logps"].count(None)
            for key in ("retokenised", "from_text"):
                counts[key] += ours[key]
            yield combine(record["id"], ours, theirs)

    counts = {}
    summary = summarise(entries(), facts) | counts | {"seconds": round(seconds, 1)}
    summary["exact"] &= not counts["from_text"]
    save(args, output, entries(), summary, records=N, processes=processes)
    error = "" if summary["kl_se"] is None else f" ± {summary['kl_se']:.3f}"
    shown = "–"
    if summary["kl"] is not None:
        shown = f"{summary['kl']:.3f}{error} nats a response, {summary['kl_per_token']:.4f} a token"
    of = f"{N} prompts, {summary['responses']} responses, {summary['tokens']} tokens"
    print(f"read {of}; wrote {args.output_dir}\n  KL to {facts['reference']}: {shown}")
    for key, what in NOTES.items():
        if summary[key]:
            print(f"note: {summary[key]} {what}")
    if not facts["exact"]:
        print("note: the answers were sampled with more than a temperature, so the estimate is biased")


if __name__ == "__main__":
    leave(lambda: cli.run(main))
