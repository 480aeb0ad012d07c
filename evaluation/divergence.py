r"""How far an iterate has gone from the reference: KL(policy ‖ reference), estimated from the policy's own
sampled answers.

In:  generated (or rewarded) JSON Lines of answers that the policy sampled; the policy; the reference.
Out: `divergence.jsonl`, a line a prompt: `id`, and for each of its K responses `tokens`, `logps` and
     `ref_logps` (natural log-probabilities, summed over the tokens) and `k3` (see below), null where a
     response has no token or is too long; `divergence.json` beside it with the estimates.

    accelerate launch evaluation/divergence.py --output_dir runs/tiny/iter1/divergence.jsonl \
        --dataset_name_or_path runs/tiny/iter1/heldout_sampled.generated.jsonl \
        --model_name_or_path runs/tiny/iter1/model --ref_model_name_or_path tiny/built/policy

With r = log π(token) − log π_ref(token) at each token of a response, in nats:

    kl   Σ r, averaged over a prompt's responses, then over prompts (k1 of
         http://joschu.net/blog/kl-approx.html, unbiased)
    k3   Σ (exp(−r) − 1 + r), averaged alike: as unbiased, never negative, mostly of smaller variance. Null,
         with the reason (`k3_null`), in bf16 and fp16: rounding that moves r by e adds about e²/2 a token,
         always upwards, which may be more than the KL of a small step; in kl it cancels out. `--dtype
         float32` gives it

`…_se` are standard errors over prompts, `…_per_token` the sums over all tokens by their number.

The answers must be samples of the policy that is measured. Sampled at temperature T, they are samples of the
policy whose logits are divided by T, so both models' logits are: what is estimated is then KL(π_T ‖ π_ref,T),
not KL(π ‖ π_ref). With top_p or top_k they are samples of neither, the estimate is biased, and it is not
`exact` either. Greedy answers are refused.

A response's tokens are those that were sampled, which generated files hold. Where a file has text only, they
are those of the text in the chat template, with its end of turn unless the answer was cut off; answers of
which another number of tokens was sampled are counted (`retokenised`), and the estimate is not `exact`. Each
iterate has answers of its own, so the reference is computed for each of them anew. Where policy and reference
are one model the estimate is 0 without being computed.
"""

import json
import math
import statistics
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from annotate_data.backbone import Backbone
from annotate_data.generated import survey
from annotate_data.ranks import World, leave, share
from common import cli, devices, manifest, models, progress
from common.chat import ChatTemplate, TemplateArguments
from common.cli import UserError, arg
from common.records import dumps, read_generated
from common.tokens import Encoder, answers_of
from evaluation.metrics import mean_and_error
from generation import get_hf2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCRIPT = "evaluation/divergence.py"
HALVES = ("bfloat16", "float16")
NOTES = {  # of what is counted, if there is any
    "left_out": "responses left out: no token, or longer than the models' context",
    "from_text": "responses have no token ids of this tokenizer: from their text the estimate is not exact",
    "retokenised": "of them have another number of tokens than were sampled",
}
K3_NULL = "computed in bf16 or fp16, whose rounding would add to it; --dtype float32 gives it"


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
    """{temperature, top_p, top_k} of the answers: the arguments', else those in the manifest of the file or
    of what it was made from.
    """
    settings = (manifest.generation_manifest(args.dataset_name_or_path) or {}).get("settings", {})
    found = {key: settings[key] for key in ("temperature", "top_p", "top_k") if settings.get(key) is not None}
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
    temperature = sampling(args)["temperature"]
    if not temperature > 0:
        raise UserError(
            f"these answers were sampled at temperature {temperature:g}: a KL is estimated from answers at a "
            "temperature above 0"
        )
    args.check_template()


class Policy(Backbone):
    """A causal language model and the log-probabilities that it gives to responses, its logits divided by
    `temperature`.
    """

    what = "model"

    def __init__(self, name, temperature, **options):
        super().__init__(name, max_length=sys.maxsize, **options)
        self.temperature = temperature
        self.positions = self.positions or sys.maxsize

    def refuse_missing(self, missing: Iterable[str]):
        if missing:
            raise UserError(
                f"{self.name} lacks the weights {', '.join(sorted(missing)[:3])}: it is no whole causal "
                "language model"
            )

    def load(self):
        import transformers
        from trl.trainer.utils import add_fused_lm_head

        self.load_weights(transformers.AutoModelForCausalLM)
        add_fused_lm_head(self.model, temperature=self.temperature)
        self.only_wanted = None

    def logps(self, groups: list[tuple[list[int], list]]) -> Iterator[tuple[int, list[list[float]]]]:
        """Log-probabilities of each response's tokens.

        Args:
            groups: list of (prompt's ids, list of responses' ids), none of them empty.

        Yields:
            (index of a group, list of lists of floats), in any order.
        """
        sequences = [[array("i", [*prompt, *ids]) for ids in responses] for prompt, responses in groups]
        self._check_ids(ids for group in sequences for ids in group)
        starts = [len(prompt) for prompt, _ in groups]
        if self.share_prompts and self._prepared(sequences):
            yield from self._logps_shared(sequences, starts)
        else:
            positions = [[[start]] * len(group) for group, start in zip(sequences, starts)]
            yield from self._in_passes(sequences, positions, self._logps_padded)

    def _logps_padded(self, rows, ids, mask):
        starts = ids.new_tensor([row.positions[0] for row in rows])
        places = mask.cumsum(1) - 1
        labels = ids.masked_fill((mask == 0) | (places < starts[:, None]), -100)
        found = self.model(
            input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True
        ).log_probs.float()
        return [found[i, row.positions[0] - 1 : len(row.ids) - 1].tolist() for i, row in enumerate(rows)]

    def _logps_shared(self, groups, starts):
        """`logps` with what a group has in common computed once."""
        from common import shared_prompts

        if self.only_wanted is None:
            self.only_wanted = shared_prompts.only_wanted(self.model.base_model)
        found, left = {}, {(g, k) for g, group in enumerate(groups) for k in range(len(group))}
        while left:
            numbers = sorted({g for g, _ in left})
            for batch in shared_prompts.plan([groups[g] for g in numbers], self.batches.tokens):
                parts = [(numbers[n], [k for k in part if (numbers[n], k) in left]) for n, part in batch]
                parts = [(g, part) for g, part in parts if part]
                if not parts:
                    continue
                sequences = [[groups[g][k] for k in part] for g, part in parts]
                try:
                    rows = self._in_memory(
                        lambda sequences=sequences, parts=parts: self._forward(
                            sequences, [starts[g] for g, _ in parts]
                        )
                    )
                except MemoryError:
                    size = sum(map(shared_prompts.packed_tokens, sequences))
                    self.batches.shrink(
                        sum(map(len, sequences)), max(len(ids) for group in sequences for ids in group), size
                    )
                    break  # what is left is planned anew
                places = [(g, k) for g, part in parts for k in part]
                found.update(zip(places, rows, strict=True))
                left.difference_update(places)
                for g, _ in parts:
                    if all((g, k) in found for k in range(len(groups[g]))):
                        yield g, [found.pop((g, k)) for k in range(len(groups[g]))]

    def _forward(self, groups, starts):
        """One packed row: the log-probabilities of each sequence's tokens from its group's start on, as
        lists.
        """
        import torch

        from common import shared_prompts

        packed = shared_prompts.pack(groups, labelled=True)
        columns = packed.columns()
        begun = [start for group, start in zip(groups, starts, strict=True) for _ in group]
        # the columns that predict them
        spans = [at[start - 1 : -1] for at, start in zip(columns, begun, strict=True)]
        ids = [ids for group in groups for ids in group]
        following = torch.zeros(packed.ids.shape[1], dtype=torch.long)
        for at, one, start in zip(spans, ids, begun, strict=True):  # alike where sequences share a column
            following[at] = torch.tensor(one[start:], dtype=torch.long)
        packed.wanted = torch.cat(spans).unique()
        place = torch.zeros(packed.ids.shape[1], dtype=torch.long)
        place[packed.wanted] = torch.arange(len(packed.wanted))
        row = packed.to(self.device)
        outputs = self.model(
            input_ids=row.ids,
            position_ids=row.positions,
            shift_labels=following[packed.wanted][None].to(self.device),
            fused_lm_head=True,
            shared_prompts=row,
        )
        found = outputs.log_probs[0].float().cpu()
        return [found[place[at]].tolist() for at in spans]


def summarise(entries: Iterable[dict], facts: dict) -> dict:
    """The estimates out of the output's records; `facts` are put beside them."""
    kl, k3, tokens, total, total_k3, responses = [], [], 0, 0.0, 0.0, 0
    for entry in entries:
        known = [i for i, n in enumerate(entry["tokens"]) if n is not None]
        if not known:
            continue
        ratios = [entry["logps"][i] - entry["ref_logps"][i] for i in known]
        kl.append(statistics.fmean(ratios))
        responses, tokens = responses + len(known), tokens + sum(entry["tokens"][i] for i in known)
        total += sum(ratios)
        values = [entry["k3"][i] for i in known]
        if None not in values:
            k3.append(statistics.fmean(values))
            total_k3 += sum(values)
    rounded = len(k3) < len(kl)
    found = dict(zip(("kl", "kl_se"), mean_and_error(kl)))
    found |= dict(zip(("k3", "k3_se"), mean_and_error([] if rounded else k3)))
    found["kl_per_token"] = total / tokens if tokens else None
    found["k3_per_token"] = total_k3 / tokens if tokens and not rounded else None
    found = {key: None if value is None else round(value, 6) for key, value in found.items()}
    facts = facts | ({"k3_null": K3_NULL} if rounded else {})
    return found | {"estimator": "k1", "prompts": len(kl), "responses": responses, "tokens": tokens} | facts


def combine(record: dict, policy: list, reference: list, rounded: bool = False) -> dict:
    """The output's record: sums over each response's tokens of what the two models say (lists of lists, None
    where left out).

    `rounded`: whether one of them was computed in half precision, so that there is no k3.
    """
    entry = {"id": record["id"], "tokens": [], "logps": [], "ref_logps": [], "k3": []}
    for ours, theirs in zip(policy, reference, strict=True):
        values = (None,) * 4
        if ours is not None:
            ratios = [a - b for a, b in zip(ours, theirs, strict=True)]
            # Beyond 700 exp overflows; such a response says enough with what it has.
            k3 = None if rounded else sum(math.exp(min(-r, 700.0)) - 1 + r for r in ratios)
            values = len(ours), sum(ours), sum(theirs), k3
        for key, value in zip(("tokens", "logps", "ref_logps", "k3"), values):
            entry[key].append(round(value, 6) if isinstance(value, float) else value)
    return entry


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
    encode, chunk = Encoder(ChatTemplate(tokenizer, args)), []

    def save():
        sizes = {at: sum(map(len, record["responses"])) for at, (_, record) in enumerate(chunk)}
        mine = [chunk[at] for at in share(sizes, world.rank, world.size)]
        entries = world.together(lambda: score(mine, policy, encode, limit, args.dataset_name_or_path))
        for found in world.gather(entries):
            for entry in found if world.rank == 0 else ():
                output.append(entry | {"id": number * N + entry["id"]})
        bar.update(len(chunk))
        chunk.clear()

    for i, record in enumerate(read_generated(args.dataset_name_or_path)):
        if i in wanted:
            chunk.append((i, record))
        if len(chunk) == args.chunk_records:
            save()
    if chunk:
        save()
    bar.close()
    world.together(policy.unload)


def score(records: list, policy: Policy, encode: Encoder, limit: int, source: str) -> list[dict]:
    """The log-probabilities of a chunk's records, a list of (number in the file, record).

    Returns:
        for each record `id`, its number; `logps`, K lists of floats, null for a response that is left out;
        `retokenised` and `from_text`, numbers of responses; `dtype`, in which it was computed.
    """
    entries, groups, places = [], [], []
    for i, record in records:
        try:
            prompt, responses, made = encode(record, answers_of(record))
        except UserError as error:
            raise UserError(f"{source} record {i + 1}: {' '.join(str(error).split())}") from None
        known = [k for k, ids in enumerate(responses) if ids and len(prompt) + len(ids) <= limit and prompt]
        entry = {"id": i, "logps": [None] * len(responses), "dtype": policy.dtype}
        entry |= {"retokenised": made["retokenised"], "from_text": len(responses) - made["as_sampled"]}
        entries.append(entry)
        if known:
            groups.append((prompt, [responses[k] for k in known]))
            places.append((entry, known))
    for g, found in policy.logps(groups) if groups else ():
        entry, known = places[g]
        for k, values in zip(known, found, strict=True):
            if not all(map(math.isfinite, values)):
                raise UserError(
                    f"{policy.name} gives log-probabilities that are no numbers: is it damaged, or trained "
                    "in another dtype?"
                )
            entry["logps"][k] = [round(value, 6) for value in values]
    return entries


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
    found = manifest.read_manifest(args.output_dir)
    whole = Path(args.output_dir).exists() and summary_path(args.output_dir).exists()
    if whole and not args.overwrite and found and not manifest.difference(found, settings, inputs):
        print(f"{args.output_dir}: complete already, nothing to do (--overwrite starts anew)")
        return
    N, _, _ = survey(args.dataset_name_or_path)
    how = sampling(args)
    facts = {"reference": args.ref_model_name_or_path, "model": args.model_name_or_path, **how}
    facts["exact"] = how["top_p"] >= 1 and how["top_k"] in (-1, 0)
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
            rounded = not {ours["dtype"], theirs["dtype"]}.isdisjoint(HALVES)
            yield combine(record, ours["logps"], theirs["logps"], rounded)

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
        print("note: the answers were sampled with top_p or top_k, so the estimate is biased")


if __name__ == "__main__":
    leave(lambda: cli.run(main))
