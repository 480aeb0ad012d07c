"""What both ways of generating share: arguments, prompts as token ids with seeds, and the record of an
answer.

`get_hf2.py` (an engine in the process) and `gen_hf.py` (a client of API servers) sample by the same settings,
so that they give the same answers where the engine is batch-invariant.
"""

import dataclasses
import itertools
from array import array

from common import chat, models, tokens
from common.cli import UserError, arg, existing_file, shaping_values
from common.manifest import beside
from common.messages import text_of
from common.records import BadRecord, read_prompts, sample_seed, shard_range

SHOWN = 3  # bad prompts that are told in full; all are listed


@dataclasses.dataclass(kw_only=True)
class SamplingArguments:
    """Arguments of both generation scripts; each field's `help` is what `--help` shows."""

    dataset_name_or_path: str | None = arg(
        None, "prompts: hub name or NAME:CONFIG, a data set's folder, .jsonl, .json, .parquet, .csv"
    )
    dataset_key: str | None = arg(
        None, "column of the prompts (the first of context_messages, messages, prompt, conversations)"
    )
    dataset_split: str = arg("train", "split of a data set; a file has none")
    bad_prompts: str = arg(
        "skip",
        "what becomes of a record that holds no prompt or one that the chat template refuses: it is "
        "skipped and listed, or the run is refused",
        ["skip", "refuse"],
        shapes=False,
    )
    output_dir: str | None = arg(None, "where the answers go; see the top of this help", shapes=False)
    K: int = arg(8, "responses per prompt")
    temperature: float = arg(1.0, "sampling temperature; 0 is greedy and takes K 1")
    top_p: float = arg(1.0, "nucleus sampling: smallest set of tokens with this probability")
    top_k: int = arg(-1, "sample from the k likeliest tokens; -1 for all")
    max_input_length: int = arg(1024, "tokens of the templated prompt; longer prompts are skipped and listed")
    max_new_tokens: int = arg(1024, "tokens of a response")
    eos_ids: list[int] = arg([], "more token ids that end a response, beside the model's own")
    seed: int = arg(42, "seed of the run; each prompt's own seed is a hash of this, the iteration and its id")
    iteration: int = arg(0, "mixed into every prompt's seed, so that each iteration samples anew")
    date: str | None = arg(
        None, "day for a template that writes today's, YYYY-MM-DD; None: that of the first start"
    )
    system_prompt: str | None = arg(None, "put before every prompt that has no system turn")
    chat_template: str | None = arg(None, "file with a jinja chat template to use instead of the tokenizer's")
    template_kwargs: dict = arg({}, "arguments of the template, JSON: '{\"enable_thinking\": false}'")
    revision: str | None = arg(None, "branch, tag or commit of the model on the hub")
    trust_remote_code: bool = arg(False, "run Python code that comes with the model", shapes=False)
    overwrite: bool = arg(False, "start anew where an output exists or is half done", shapes=False)


@dataclasses.dataclass
class Item:
    """One prompt to be answered: its record, token ids and sampling seed."""

    record: dict
    token_ids: list[int]
    seed: int


def check_sampling(args):
    """Refuse sampling settings that cannot work, before anything is loaded."""
    if args.dataset_name_or_path is None or args.output_dir is None:
        raise UserError(
            f"missing --{'dataset_name_or_path' if args.dataset_name_or_path is None else 'output_dir'}"
        )
    if not 1 <= args.K < 1024:
        raise UserError(f"--K {args.K}: a number of responses from 1 to 1023 was expected")
    if not 0 <= args.temperature < float("inf") or not 0 < args.top_p <= 1:
        raise UserError("--temperature must not be negative and --top_p must be above 0 and at most 1")
    if args.temperature == 0 and args.K > 1:
        raise UserError(
            f"--temperature 0 is greedy: all {args.K} responses would be equal; give --K 1 or a temperature"
        )
    if args.chat_template:
        existing_file(args.chat_template, "chat template")
    chat.parse_date(args.date)
    if args.max_new_tokens < 1 or args.max_input_length < 1:
        raise UserError("--max_new_tokens and --max_input_length must be at least 1")


def load_tokenizer(name, args):
    """The tokenizer of a model, with the chat template that `args` asks for."""
    return models.load_tokenizer(name, args.revision, args.trust_remote_code, args.chat_template)


def stop_ids(name, tokenizer, args):
    """Token ids that end a response: generation config, tokenizer, template and `--eos_ids`."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(name, revision=args.revision).eos_token_id
    except OSError:  # many models have none
        eos = None
    return chat.stop_token_ids(tokenizer, eos, args.eos_ids)


def context_length(name: str, args: SamplingArguments) -> int | None:
    """Tokens of prompt and response that the model can take, or None where its config does not say."""
    return models.positions(models.load_config(name, args.revision, args.trust_remote_code))


class Prompts:
    """The prompts of one shard, read, tokenised and handed out while earlier ones are being answered.

    Args:
        args: SamplingArguments.
        tokenizer: the policy's.
        output: manifest.Output, which knows what is done and records what is skipped.
        limit: tokens that prompt and response may have together, or None.
        count: prompts of the whole file.
        index, world: which shard of how many.

    Attributes:
        size: prompts of this shard.
        order: their ids in file order as 64-bit numbers, too long ones apart; whole when the iteration is.
    """

    def __init__(self, args, tokenizer, output, limit, count, index=0, world=1):
        self.args, self.tokenizer, self.output, self.count = args, tokenizer, output, count
        self.longest = min(args.max_input_length, limit - 1) if limit else args.max_input_length
        self.shard = shard_range(count, index, world)
        self.size, self.order, self.literal, self.bad = len(self.shard), array("Q"), 0, 0
        self.specials = chat.literal_specials(tokenizer)
        self.dated = {tokens.DATE: args.date} if chat.writes_date(tokenizer) else {}

    def check(self):
        """Render every prompt of this shard, before anything heavy is started, and tell of those that cannot
        be used.

        Raises:
            UserError: there is one and `bad_prompts` is refuse, or the whole file holds no other.
        """
        chat.need_template(self.tokenizer)
        usable, bad, silent = self.count == 0, [], {}
        for number, record in enumerate(read_prompts_of(self.args)):
            mine = number in self.shard
            if usable and not mine:
                if number >= self.shard.stop:
                    break
                continue
            error = self.reason_against(record, number, silent if mine else {})
            usable = usable or error is None
            if mine and error is not None:
                bad.append(str(error) if len(bad) < SHOWN else None)
        if not usable:
            raise UserError(
                f"{self.args.dataset_name_or_path} holds no prompt that can be used; the first: "
                f"{(bad or [error])[0]}"
            )
        if bad and self.args.bad_prompts == "refuse":
            more = f"; {len(bad) - 1} more prompts cannot be used" if len(bad) > 1 else ""
            raise UserError(f"{bad[0]}{more}; mend or remove, or give --bad_prompts skip")
        if bad:
            print(
                f"warning: {len(bad)} of {self.size} prompts cannot be used and are skipped, for example: "
                f"{'; '.join(filter(None, bad))}",
                flush=True,
            )
        for part, (first, total) in silent.items():
            print(
                f"warning: the chat template leaves out the {part} of {total} prompts, so the policy does "
                f"not see them; the first: {first}",
                flush=True,
            )

    def reason_against(self, record, number, silent):
        """A UserError that says why a prompt cannot be used, or None; counts in `silent` what the template
        leaves out of it.
        """
        if isinstance(record, BadRecord) or record["id"] in self.output.done:
            return record if isinstance(record, BadRecord) else None
        kwargs, where = self.args.template_kwargs, f"{self.args.dataset_name_or_path} record {number + 1}"
        try:
            chat.render(self.tokenizer, record["prompt"], True, kwargs, record.get("tools"), self.args.date)
        except UserError as error:
            return UserError(f"{where}: {error}")
        for part in chat.left_out(self.tokenizer, record["prompt"], True, kwargs, record.get("tools")):
            first, total = silent.get(part, (where, 0))
            silent[part] = (first, total + 1)
        return None

    def __iter__(self):
        """Yield the items that are to be answered, in file order."""
        for number, record in enumerate(read_prompts_of(self.args)):
            if number >= self.shard.stop:
                break
            if number < self.shard.start:
                continue
            if isinstance(record, BadRecord):
                self.skip_bad(record.id, record)
                continue
            if record["id"] in self.output.done:
                self.order.append(int(record["id"], 16))
                continue
            try:
                token_ids = chat.encode(
                    self.tokenizer,
                    record["prompt"],
                    True,
                    self.args.template_kwargs,
                    record.get("tools"),
                    self.args.date,
                )
            except UserError as error:
                self.skip_bad(record["id"], f"{self.args.dataset_name_or_path} record {number + 1}: {error}")
                continue
            self.literal += any(s in text_of(m) for m in record["prompt"] for s in self.specials)
            if len(token_ids) > self.longest:
                self.output.skip(
                    record["id"], f"prompt has {len(token_ids)} tokens, more than {self.longest}"
                )
                continue
            self.order.append(int(record["id"], 16))
            yield Item(
                record | self.dated, token_ids, sample_seed(self.args.seed, self.args.iteration, record["id"])
            )

    def skip_bad(self, prompt_id, reason):
        self.bad += 1
        self.output.skip(prompt_id, str(reason))

    def finish(self, seconds):
        """Complete the output and say what was read, written and skipped.

        `seconds`: what sampling it took, of the start that ends here.
        """
        output, records = self.output, len(self.order)
        counts = {
            "prompts": self.count,
            "records": records,
            "skipped": output.skipped,
            "engine_seconds": round(seconds, 1),
        }
        output.finish((f"{number:016x}" for number in self.order), counts)
        if self.literal:
            print(
                f"note: {self.literal} prompts hold the text of a special token; it is kept as the template "
                "tokenises it"
            )
        if output.skipped > self.bad:
            print(
                f"note: {output.skipped - self.bad} prompts are longer than {self.longest} tokens and are "
                "skipped"
            )
        if self.bad:
            print(
                f"warning: {self.bad} prompts cannot be used and are skipped; "
                f"{beside(output.path, '.skipped.jsonl')} says why"
            )
        print(
            f"read {self.count} prompts, wrote {records} records to {output.path}, skipped {output.skipped}"
        )


def read_prompts_of(args):
    """The prompt records that `args` name, with a `BadRecord` in place of each that holds no prompt."""
    return read_prompts(
        args.dataset_name_or_path, args.dataset_key, args.dataset_split, args.system_prompt, keep_bad=True
    )


def count_prompts(args):
    """Number of prompts, bad ones too; reads them all, so that a bad record is refused before anything heavy
    is loaded.
    """
    count = 0
    for record in read_prompts_of(args):
        if isinstance(record, BadRecord) and args.bad_prompts == "refuse":
            raise UserError(f"{record}; mend or remove it, or give --bad_prompts skip")
        count += 1
    return count


def by_prefix(items, first, later=4096):
    """Sort items by their token ids, a stretch at a time, so that prompts with a common beginning meet in the
    prefix cache.

    Args:
        items: iterable of Items.
        first, later: length of the first stretch, read before anything is answered, and of the others.
    """
    items, size = iter(items), first
    while stretch := list(itertools.islice(items, size)):
        yield from sorted(stretch, key=lambda item: item.token_ids)
        size = later


def sampling_fields(args, item, stops, limit):
    """Sampling settings of one prompt, under the names that the engine and its API share.

    Every field that a model's generation config could change is given, so that servers and the engine agree.
    """
    room = args.max_new_tokens if limit is None else min(args.max_new_tokens, limit - len(item.token_ids))
    return {
        "n": args.K,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": room,
        "seed": item.seed,
        "stop_token_ids": stops,
        "skip_special_tokens": True,
    }


def answered(item, responses, finish_reasons, token_ids):
    """The generated record: the prompt's record with its K responses, why each ended, and the tokens that
    were read and sampled.
    """
    return item.record | {
        "responses": responses,
        "finish_reasons": finish_reasons,
        "num_tokens": [len(ids) for ids in token_ids],
        tokens.PROMPT: item.token_ids,
        tokens.RESPONSES: token_ids,
    }


def shaping(args: SamplingArguments, model: str) -> tuple[dict, dict]:
    """(settings, inputs) that shape the answers, for the manifest; `model` names the argument of the model."""
    inputs = {name: getattr(args, name) for name in ("dataset_name_or_path", model, "chat_template")}
    return shaping_values(args, inputs), inputs
