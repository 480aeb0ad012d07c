"""Records, read and checked in one place: prompts in every accepted form, generated and rewarded ones, their
ids, seeds and shards.

Nothing here knows a model; the standard library suffices. Lines are read in common/jsonl.py, tables and data
sets in common/tables.py, messages in common/messages.py.
"""

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from common.chat import TemplateArguments
from common.cli import UserError, arg, existing_file, nearest
from common.jsonl import BadRecord, dumps, jsonl_records, list_inside
from common.messages import as_json, is_messages, text_of, to_messages, to_tools

PROMPT_KEYS = ("context_messages", "messages", "prompt", "conversations")
LISTS = (
    "context_messages",
    "messages",
    "conversations",
)  # in a .csv, text that begins with "[" is JSON there
SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
GROUP = "prompts"  # in --help
FORMS = ".jsonl, .json, .csv, .tsv (these also as .gz), .parquet, a data set's folder or a hub name"


def is_local(name: str) -> bool:
    """Whether a name of records is meant for a file or folder here, and not for a data set on the hub."""
    from common.tables import split_config

    base = split_config(name)[0]
    return (
        Path(base).exists()
        or base.startswith((".", "/", "~"))
        or base.count("/") != 1
        or base.removesuffix(".gz").endswith(SUFFIXES)
    )


def read_records(name: str, split: str = "train") -> Iterator[dict | BadRecord]:
    """Yield the records of a file (.jsonl, .json, .csv, .tsv, .parquet), of a data set's folder or of a hub
    data set, with a `BadRecord` in place of one that cannot be used.

    Args:
        name: the file, folder or hub name; `NAME:CONFIG` for one of several configurations of a data set.
        split: of a data set; files have none.
    """
    from common import tables

    suffix = Path(name.removesuffix(".gz")).suffix
    readers = {".parquet": tables.read_parquet, ".csv": tables.read_csv, ".tsv": tables.read_csv}
    if Path(tables.split_config(name)[0]).is_dir():
        yield from tables.read_data_set(name, split)
    elif suffix in SUFFIXES and not (suffix == ".parquet" and name.endswith(".gz")):
        tables.refuse_split(name, split)
        yield from readers.get(suffix, jsonl_records)(name)
    elif Path(name).exists():
        raise UserError(f"{name}: expected {FORMS}")
    elif is_local(name):
        existing_file(name, "prompt file or folder")
    else:
        yield from tables.read_data_set(name, split)


def record_id(messages: list[dict], twin: int = 0, tools: list | None = None) -> str:
    """16 hex digits: a hash of the prompt's messages and tools, and of how many equal prompts came before it
    in the file.
    """
    text = json.dumps([messages, twin, *([tools] if tools else [])], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


class Identifier:
    """Gives each prompt of one file its id, counting twins: equal prompts are answered each, not merged."""

    def __init__(self):
        self._seen = Counter()

    def __call__(self, messages: list[dict], tools: list | None = None) -> str:
        base = record_id(messages, tools=tools)
        twin, self._seen[base] = self._seen[base], self._seen[base] + 1
        return record_id(messages, twin, tools) if twin else base


@dataclasses.dataclass(kw_only=True)
class PromptArguments(TemplateArguments):
    """How a script's prompts are read, and how its chat template writes them."""

    dataset_key: str | None = arg(
        None, "column; None: context_messages, messages, prompt or conversations", group=GROUP
    )
    dataset_split: str = arg("train", "split of a data set; a file has none", group=GROUP)
    bad_prompts: str = arg(
        "skip",
        "what becomes of a record that holds no prompt or one that the chat template refuses: it is skipped "
        "and listed, or the run is refused",
        ["skip", "refuse"],
        shapes=False,
        group=GROUP,
    )
    system_prompt: str | None = arg(None, "put before every prompt that has no system turn", group=GROUP)


def read_prompts(
    name: str, args: PromptArguments | None = None, keep_bad: bool = False
) -> Iterator[dict | BadRecord]:
    """Yield prompt records `{"id", "prompt": messages, …extra fields}` in file order.

    Args:
        name: what `read_records` takes.
        args: the script's arguments; None for the defaults.
        keep_bad: yield a `BadRecord` in place of a record that holds no prompt, instead of raising it.

    Extra fields are carried through, `tools` as a list of JSON schemas; a field `id` of the file is kept as
    `source_id`.

    Raises:
        UserError: the first record has no such column, or no record holds a prompt.
    """
    args = args or PromptArguments()
    key = args.dataset_key
    identify, number, usable, first_bad, looked = Identifier(), 0, 0, None, False
    for number, record in enumerate(read_records(name, args.dataset_split), 1):
        where = f"{name} record {number}"
        if not isinstance(record, BadRecord):
            if not looked and not any(k in record for k in ([key] if key else PROMPT_KEYS)):
                raise UserError(_no_prompt(record, key, where))
            looked = True
            try:
                record = _prompt_record(record, key, where, args.system_prompt, identify)
            except UserError as error:
                record = BadRecord(str(error), record)
            except RecursionError:  # for what is written in Python
                record = BadRecord(f"{where} is nested too deep", record)
        if isinstance(record, BadRecord):
            if not keep_bad:
                raise record
            first_bad = first_bad or record
        else:
            usable += 1
        yield record
    if number and not usable:
        raise UserError(f"{name} holds no prompt that can be used; the first of {number}: {first_bad}")


def _prompt_record(record, key, where, system_prompt, identify):
    """The prompt record of a record; a UserError says what is wrong."""
    there = [k for k in ([key] if key else PROMPT_KEYS) if k in record]
    column = next((k for k in there if record[k] not in (None, "", [])), None)
    if column is None:
        raise UserError(f"{where}: its {there[0]} is empty" if there else _no_prompt(record, key, where))
    if column == "instruction" and record.get("input"):
        raise UserError(
            f"{where} has an `input` that belongs to its `instruction` (Alpaca's form): join both in a "
            "column `prompt`"
        )
    value = record[column]
    if isinstance(value, str) and column != "prompt" and value.lstrip().startswith("["):
        value = _listed(value, column, where)
    messages = to_messages(value, where)
    tools = to_tools(record.get("tools") if column != "tools" else None, where)
    if messages[-1]["role"] == "user" and not text_of(messages[-1]).strip():
        raise UserError(f"{where}: its last turn is empty")
    messages = with_system(messages, system_prompt)
    extra = {k: v for k, v in record.items() if k not in (column, "id", "prompt", "tools")}
    extra |= {"tools": tools} if tools else {}
    try:
        dumps(extra)
    except (TypeError, ValueError):  # a table's dates, bytes and NaN
        extra = {k: as_json(v) for k, v in extra.items()}
    if "id" in record:
        extra["source_id"] = as_json(record["id"])
    return {"id": identify(messages, tools), "prompt": messages, **extra}


def with_system(messages: list[dict], system_prompt: str | None) -> list[dict]:
    """The messages with a system turn in front where they have none and there is a system prompt."""
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _listed(text, column, where):
    """Messages in a cell of a .csv: JSON.

    In a column that has a name of its own, a text that is no list of messages stays text.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        if column in LISTS:
            raise UserError(f"{where}: {column} is no JSON list of messages: {error}") from None
        return text
    return value if column in LISTS or is_messages(value) else text


def _no_prompt(record, key, where):
    """The message for a record without a column of prompts."""
    wanted = key or " or ".join(PROMPT_KEYS)
    lists = [name for name, value in record.items() if is_messages(value)]
    todo = list_inside(record) or ": name the prompt's with --dataset_key"
    if key is None and "instruction" in record:
        todo = (
            ": give --dataset_key instruction, or where `input` is not empty join both in a column `prompt`"
        )
    elif key is None and lists:
        what = "the prompt of the chosen answer" if lists[0] == "chosen" else "its messages"
        todo = f": --dataset_key {lists[0]} takes {what}, without the last turn where that is an answer"
    elif key is None and "chosen" in record:
        todo = ": `chosen` is an answer and not a prompt; give the prompt a column of its own"
    near, fields = nearest(key, record) if key else "", ", ".join(map(str, record))
    return f"{where} has no {wanted}{near}; its fields are {fields}{todo}"


# Lists of a record with an entry for each response, and what an entry may be.
PER_RESPONSE = {
    "rewards": (int, float, type(None)),
    "finish_reasons": (str, type(None)),
    "num_tokens": (int, type(None)),
    "response_token_ids": (list, type(None)),
    "stop_strings": (str, type(None)),
    "response_sources": (dict, str, type(None)),
}
MADE_BY = {
    "prompt": "generate answers first (generation/get_hf2.py)",
    "responses": "generate answers first (generation/get_hf2.py)",
    "rewards": "run annotate_data/get_rewards.py on it first",
}


def read_generated(path: str | Path) -> Iterator[dict]:
    """Yield the records of a generated file, each with an `id` and its `prompt` as messages; none is held.

    `responses` is a list of at least one text. `finish_reasons`, `num_tokens` and `response_token_ids` are
    absent, null or lists with an entry for each response; a number in their place is another tool's field and
    carried through, as all other fields are. A record without a text as `id` gets one from its prompt, and
    what id it had becomes `source_id`. Ids are not compared: a file may repeat one.

    Args:
        path: JSON Lines file, or one with a JSON list.

    Raises:
        UserError: a field is missing or of another kind; names the record.
    """
    return _answers(jsonl_records(path, "generated file"), path, rewarded=False, keep_bad=False)


def read_rewarded(
    path: str | Path, keep_bad: bool = False, records: Iterable[dict | BadRecord] | None = None
) -> Iterator[dict]:
    """As `read_generated`, of a rewarded file: `rewards` is a list of numbers or null, one for each response.

    A reward may be NaN or infinite; see `finite`. Entries of the other lists are held to their kinds, too.

    Args:
        keep_bad: yield a `BadRecord` in place of a record that cannot be used, instead of raising it.
        records: what was read of `path` already; None reads it as JSON Lines.
    """
    records = jsonl_records(path, "rewarded file") if records is None else records
    return _answers(records, path, rewarded=True, keep_bad=keep_bad)


def _answers(records, path, rewarded, keep_bad):
    identify = Identifier()
    for number, record in enumerate(records, 1):
        if not isinstance(record, BadRecord):
            try:
                record = _answered(record, f"{path} record {number}", identify, rewarded)
            except UserError as error:
                record = BadRecord(str(error), record)
        if isinstance(record, BadRecord) and not keep_bad:
            raise record
        yield record


def _answered(record, where, identify, rewarded):
    """The record of a prompt's answers in its one form; a UserError says what is wrong."""
    for field in ("prompt", "responses", "rewards") if rewarded else ("prompt", "responses"):
        if field not in record:
            near, there = nearest(field, record), ", ".join(record)
            raise UserError(f"{where} has no `{field}`{near}: {MADE_BY[field]}; it has {there}")
    prompt, tools = to_messages(record["prompt"], where), to_tools(record.get("tools"), where)
    responses = record["responses"]
    if not isinstance(responses, list) or not responses or not all(isinstance(r, str) for r in responses):
        raise UserError(f"{where}: `responses` must be a list of texts, it is {str(responses)[:60]}")
    for field, kinds in PER_RESPONSE.items():
        values = record.get(field)
        if field == "rewards" and not rewarded or values is None and field != "rewards":
            continue
        if not isinstance(values, list):
            if field == "rewards" or isinstance(values, (str, dict)):
                raise UserError(f"{where}: `{field}` must be a list with an entry for each response")
            if rewarded:  # annotation let the number pass, and pairs want lists
                record = record | {field: None}
        elif len(values) != len(responses):
            raise UserError(f"{where} has {len(responses)} responses and {len(values)} {field}")
        elif rewarded and not all(isinstance(value, kinds) for value in values):
            raise UserError(f"{where}: `{field}` is {str(values)[:60]}, which is no list of its kind")
    own = {"prompt": prompt} | ({"tools": tools} if tools else {})
    if isinstance(record.get("id"), str):
        return record | own
    made = {"id": identify(prompt, tools)}
    return made | record | own | made | ({"source_id": record["id"]} if "id" in record else {})


def read_pairs(path: str | Path) -> Iterator[dict | BadRecord]:
    """Yield the pairs that a training chose, as it wrote them: `prompt`, `chosen`, `rejected` are messages.

    Where it trained on a response alone there is no `rejected`.
    A `BadRecord` stands in place of one that is no pair.
    """
    for number, record in enumerate(jsonl_records(path, "pairs file"), 1):
        if isinstance(record, BadRecord):
            yield record
            continue
        where = f"{path} record {number}"
        try:
            for side in ("prompt", "chosen", *(["rejected"] if "rejected" in record else [])):
                if not is_messages(record.get(side)):
                    raise UserError(f"{where}: `{side}` must be a list of messages")
            prompt, tools = to_messages(record["prompt"], where), to_tools(record.get("tools"), where)
            yield record | {"prompt": prompt} | ({"tools": tools} if tools else {})
        except UserError as error:
            yield BadRecord(str(error), record)


def sample_seed(run_seed: int, iteration: int, prompt_id: str, spacing: int = 1024) -> int:
    """A prompt's sampling seed: a hash of run seed, iteration and prompt id, a multiple of `spacing` below
    2**62.

    The engine gives the i-th of n samples the seed + i, so seeds are spaced by more than any K.
    """
    digest = hashlib.sha256(f"{run_seed}/{iteration}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**62 // spacing) * spacing


def shard_range(count: int, index: int, world: int) -> range:
    """The half-open range of shard `index` of `world`: contiguous, sizes differing by at most one, nothing
    lost.
    """
    return range(count * index // world, count * (index + 1) // world)


def is_empty(text: str) -> bool:
    """Whether a response says nothing."""
    return not text.strip()


def finite(value: object) -> bool:
    """Whether a reward is a finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # math.isfinite would raise for an int that is larger
