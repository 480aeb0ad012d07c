"""What both ways of generating share: arguments, prompts as token ids with seeds, the record of an answer.

`get_hf2.py` (an engine in the process) and `gen_hf.py` (a client of API servers) sample by the same settings,
so that they give the same answers where the engine is batch-invariant.
"""

import dataclasses
from array import array
from typing import NamedTuple

from common import engine, models, tokens
from common.chat import NO_HEADER, ChatTemplate, literal_specials
from common.cli import UserError, arg, count, shaping_values
from common.manifest import beside
from common.messages import text_of
from common.records import PER_RESPONSE, BadRecord, PromptArguments, read_prompts, sample_seed, shard_range
from generation import mixture
from generation.mixture import MODELS, Part

SHARD = ("local_index", "my_world_size")  # settings that say which of the answers are in a file
HELDOUT = {  # of either kind of held-out answers what `heldout` does not say; -1: seeds that no iteration has
    "sampled": {"iteration": -1},
    "greedy": {"iteration": -1, "K": 1, "temperature": 0.0},
}
SHOWN = 3  # bad prompts that are printed; the skipped file lists all


@dataclasses.dataclass(kw_only=True)
class SamplingArguments(PromptArguments):
    """Arguments of both generation scripts; each field's `help` is what `--help` shows."""

    dataset_name_or_path: str | None = arg(
        None, "prompts: hub name (NAME:CONFIG), folder, .jsonl, .json, .parquet, .csv"
    )
    output_dir: str | None = arg(None, "where the answers go; see the top of this help", shapes=False)
    K: int = arg(8, "responses per prompt")
    temperature: float | list[float] = arg(
        1.0, "sampling temperature; 0 is greedy and takes K 1; 1.0,0.7 shares K out evenly"
    )
    top_p: float = arg(1.0, "nucleus sampling: smallest set of tokens with this probability")
    top_k: int = arg(-1, "sample from the k likeliest tokens; -1 for all")
    mixture: list[dict] | None = arg(
        None,
        "parts of the K responses, each sampled in its own way, JSON: "
        '[{"K": 4, "temperature": 1.0}, {"K": 4, "temperature": 0.7, "top_p": 0.9}]; keys: '
        + ", ".join(Part.__dataclass_fields__),
        metavar="JSON",
    )
    parts_of: list[str] | None = arg(
        None,
        "what the mixture calls the model that is sampled here, whose parts alone are sampled: "
        f"{', '.join(MODELS)}, or several names where they are one model; None: policy",
        metavar="NAME",
    )
    sampling_args: dict | None = arg(
        None, 'more sampling parameters of vLLM, JSON: \'{"min_p": 0.05, "stop": ["\\nUser:"]}\''
    )
    max_input_length: int = arg(1024, "tokens of the templated prompt; longer prompts are skipped and listed")
    max_new_tokens: int = arg(1024, "tokens of a response")
    eos_ids: list[int] = arg([], "more token ids that end a response, beside the model's own")
    seed: int = arg(42, "seed of the run; each prompt's own seed is a hash of this, the iteration and its id")
    iteration: int = arg(0, "mixed into every prompt's seed, so that each iteration draws new samples")
    revision: str | None = arg(None, "branch, tag or commit of the model on the hub")
    trust_remote_code: bool = arg(False, "run Python code that comes with the model", shapes=False)
    overwrite: bool = arg(False, "discard an output that exists or is half done", shapes=False)


@dataclasses.dataclass
class Item:
    """One prompt to be answered: its record, packed token ids (a list takes nine times the room) and seed.

    `others`: token ids under a system prompt of a part of the mixture.
    """

    record: dict
    packed: array
    seed: int
    others: dict[str, array] = dataclasses.field(default_factory=dict)

    @property
    def token_ids(self) -> list[int]:
        return self.packed.tolist()


class Sample(NamedTuple):
    """One response as an engine or a server gives it; `stopped_by`: the stop string that ended it."""

    text: str
    finish_reason: str
    token_ids: list[int]
    stopped_by: str | None = None


class Request(NamedTuple):
    """What the engine or a server is asked for a part of a prompt's responses."""

    prompt_ids: list[int]
    fields: dict  # sampling settings


def check_sampling(args: SamplingArguments) -> None:
    """Refuse sampling settings that cannot work, before anything is loaded."""
    for name in ("dataset_name_or_path", "output_dir"):
        if getattr(args, name) is None:
            raise UserError(f"missing --{name}")
    if not 1 <= args.K < 1024:
        raise UserError(f"--K {args.K}: a number of responses from 1 to 1023 was expected")
    mixture.check_parts(args)
    engine.check_sampling_args(args.sampling_args)
    args.check_template()
    if args.max_new_tokens < 1 or args.max_input_length < 1:
        raise UserError("--max_new_tokens and --max_input_length must be at least 1")


def stop_ids(name: str, template: ChatTemplate, args: SamplingArguments) -> list[int]:
    """Token ids that end a response: generation config, tokenizer, template and `--eos_ids`."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(name, revision=args.revision).eos_token_id
    except OSError:  # many models have none
        eos = None
    return template.stop_token_ids(eos, args.eos_ids)


def context_length(name: str, args: SamplingArguments) -> int | None:
    """Tokens of prompt and response that the model can take, or None where its config does not say."""
    return models.positions(models.load_config(name, args.revision, args.trust_remote_code))


class Prompts:
    """The prompts of one shard as token ids, read and rendered before anything heavy is started.

    Args:
        args: SamplingArguments.
        template: the policy's.
        output: manifest.Output, which knows what is done and records what is skipped.
        limit: tokens that prompt and response may have together, or None.
        records: all prompts, of `load_prompts`.
        index, world: which shard of how many.

    Attributes:
        items: the Items that are to be answered, in file order.
        count, size: prompts of the file and of this shard.

    Raises:
        UserError: a prompt cannot be used and `bad_prompts` is refuse, or the whole file holds no other.
    """

    def __init__(self, args, template, output, limit, records, index: int = 0, world: int = 1):
        self.args, self.template, self.output, self.count = args, template, output, len(records)
        self.longest = min(args.max_input_length, limit - 1) if limit else args.max_input_length
        shard = shard_range(self.count, index, world)
        self.size, self.items, self.order, self.silent = len(shard), [], [], {}
        self.bad, self.too_long = [], []  # (id, reason)
        # Those of other models' parts are looked at, too, so that all leave the same prompts out.
        self.system_prompts = {part.system_prompt for part in mixture.parts_of(args)} - {None}
        self.own = {part.system_prompt for part in mixture.own_parts(args)}
        template.need()
        name = args.dataset_name_or_path
        for number in shard:
            self._take(records[number], f"{name} record {number + 1}")
        if self.bad and not self.order and not self.too_long:
            others = (record for number, record in enumerate(records) if number not in shard)
            if not any(map(self._is_usable, others)):
                raise UserError(f"{name} holds no prompt that can be used; the first: {self.bad[0][1]}")
        self._tell()
        for skipped in (*self.bad, *self.too_long):
            output.skip(*skipped)

    def _take(self, record, where):
        """Put a record where it belongs: to be answered, done, or left out with a reason."""
        if isinstance(record, BadRecord):
            self.bad.append((record.id, str(record)))
            return
        if record["id"] in self.output.done:
            self.order.append(record["id"])
            return
        try:
            ids = self._encode(record)
            others = {system: self._encode_under(system, record, ids) for system in self.system_prompts}
        except UserError as error:
            self.bad.append((record["id"], f"{where}: {error}"))
            return
        for part in self.template.left_out(record["prompt"], True, record.get("tools")):
            first, total = self.silent.get(part, (where, 0))
            self.silent[part] = (first, total + 1)
        if (longest := max(map(len, (ids, *others.values())))) > self.longest:
            self.too_long.append((record["id"], f"prompt has {longest} tokens, more than {self.longest}"))
            return
        dated = {tokens.DATE: self.args.date} if self.template.writes_date() else {}
        seed = sample_seed(self.args.seed, self.args.iteration, record["id"])
        self.order.append(record["id"])
        packed = {system: array("i", found) for system, found in others.items() if system in self.own}
        self.items.append(Item(record | dated, array("i", ids), seed, packed))

    def _encode(self, record):
        return self.template.encode(record["prompt"], True, record.get("tools"))

    def _encode_under(self, system, record, plain):
        """Token ids of the prompt under a system prompt of the mixture."""
        rest = [message for message in record["prompt"] if message["role"] != "system"]
        messages = [{"role": "system", "content": system}, *rest]
        ids = self.template.encode(messages, True, record.get("tools"))
        if ids != plain:
            return ids
        if ids == self.template.encode(rest, True, record.get("tools")):
            raise UserError("the chat template leaves out the system prompt of a part of --mixture")
        if mixture.repeats_plain(mixture.parts_of(self.args), system):
            raise UserError(
                "its own system turn is that of a part of --mixture, whose responses would be those of the "
                "part without"
            )
        return ids

    def _is_usable(self, record):
        try:
            return not isinstance(record, BadRecord) and bool(self._encode(record))
        except UserError:
            return False

    def _tell(self):
        """Say which prompts cannot be used (or refuse them), and what the template leaves out."""
        told = [reason for _, reason in self.bad[:SHOWN]]
        if self.bad and self.args.bad_prompts == "refuse":
            more = f"; {len(self.bad) - 1} more prompts cannot be used" if len(self.bad) > 1 else ""
            raise UserError(f"{told[0]}{more}; repair or remove, or give --bad_prompts skip")
        if self.bad:
            what = f"{len(self.bad)} of {self.size} prompts cannot be used and are skipped"
            print(f"warning: {what}, for example: {'; '.join(told)}", flush=True)
        for part, (first, total) in self.silent.items():
            what = f"the chat template leaves out the {part} of {total} prompts"
            print(f"warning: {what}, so the policy does not see them; the first: {first}", flush=True)
        others = [name for name in mixture.models_of(self.args) if name not in mixture.names_here(self.args)]
        if others and self.args.parts_of is None:
            print(f"note: parts of {' and '.join(others)} are not sampled here; see --parts_of", flush=True)
        if header := self.template.missing_header():
            print(f"warning: {NO_HEADER.format(header)}", flush=True)

    def finish(self, seconds: float) -> None:
        """Complete the output and say what was read, written and skipped; `seconds` were spent sampling."""
        output = self.output
        counts = {"prompts": self.count, "records": len(self.order), "skipped": output.skipped}
        output.finish(self.order, counts | {"engine_seconds": round(seconds, 1)})
        specials = literal_specials(self.template.tokenizer)
        prompts = [item.record["prompt"] for item in self.items]
        literal = sum(any(s in text_of(m) for m in prompt for s in specials) for prompt in prompts)
        if literal:
            what = count(literal, "prompt holds", "prompts hold")
            print(f"note: {what} the text of a special token; it is kept")
        if self.too_long:
            what = count(len(self.too_long), "prompt is", "prompts are")
            print(f"note: {what} longer than {self.longest} tokens and skipped")
        if self.bad:
            where = beside(output.path, ".skipped.jsonl")
            print(f"warning: {count(len(self.bad), 'prompt')} cannot be used; {where} says why")
        wrote = f"wrote {count(len(self.order), 'record')} to {output.path}"
        print(f"read {count(self.count, 'prompt')}, {wrote}, skipped {output.skipped}")


def load_prompts(args: SamplingArguments) -> list[dict | BadRecord]:
    """The prompt records that `args` name, with a `BadRecord` in place of each that holds no prompt.

    Raises:
        UserError: there is a bad one and `bad_prompts` is refuse; so before anything heavy is loaded.
    """
    found = []
    for record in read_prompts(args.dataset_name_or_path, args, keep_bad=True):
        if isinstance(record, BadRecord) and args.bad_prompts == "refuse":
            raise UserError(f"{record}; repair or remove it, or give --bad_prompts skip")
        found.append(record)
    return found


def requests_of(args: SamplingArguments, item: Item, stops: list[int], limit: int | None) -> list[Request]:
    """What is asked for one prompt: a request for each part of the mixture that is sampled here, in their
    order.

    Its fields stand under the names that the engine and its API share. Every field that a model's generation
    config could change is given, so that servers and the engine agree. All parts have the prompt's own seed,
    so that a part's responses do not depend on the others.
    """
    found = []
    for part in mixture.own_parts(args):
        packed = item.packed if part.system_prompt is None else item.others[part.system_prompt]
        room = args.max_new_tokens if limit is None else min(args.max_new_tokens, limit - len(packed))
        fields = {
            "n": part.K,
            "temperature": part.temperature,
            "top_p": part.top_p,
            "top_k": part.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": room,
            "seed": item.seed,
            "stop_token_ids": stops,
            "skip_special_tokens": True,
        }
        found.append(Request(packed.tolist(), fields | (args.sampling_args or {})))
    return found


def answered(args: SamplingArguments, item: Item, samples: list[Sample]) -> dict:
    """The prompt's record with its K responses, why each ended, and the tokens that were read and sampled.

    Of a mixture each response says where it came from. The tokens that were read are those of the prompt
    itself, also where a part had a system prompt of its own: that is what training continues. What a prompt
    file says of other responses, as a generated one does, is left out.
    """
    responses, reasons, ids, stopped_by = map(list, zip(*samples, strict=True))
    found = {
        "responses": responses,
        "finish_reasons": reasons,
        "num_tokens": [len(one) for one in ids],
        tokens.PROMPT: item.token_ids,
        tokens.RESPONSES: ids,
    }
    if any(stopped_by):
        found[tokens.STOPPED_BY] = stopped_by
    if mixture.is_mixed(args):
        found["response_sources"] = mixture.sources(args)
    earlier = {key for key in PER_RESPONSE if isinstance(item.record.get(key), list)}
    return {key: value for key, value in item.record.items() if key not in earlier} | found


def shaping(args: SamplingArguments, model: str) -> tuple[dict, dict]:
    """(settings, inputs) that shape the answers, for the manifest; `model`: the model's argument."""
    inputs = {name: getattr(args, name) for name in ("dataset_name_or_path", model, "chat_template")}
    settings = shaping_values(args, inputs)
    if not args.mixture:  # then it chooses nothing
        settings["parts_of"] = None
    return settings, inputs
