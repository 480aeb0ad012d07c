"""Records: JSON Lines in and out, prompts in every accepted form, ids, seeds and shards.

A record is one JSON object a line, UTF-8, lines ended by `\\n` only (U+2028 and the like may stand inside a
string). Nothing here knows a model; the standard library suffices. Tables and data sets are read in
common/tables.py, messages in common/messages.py.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import sys
import zlib
from pathlib import Path

from common.cli import UserError, existing_file, nearest
from common.index import Index
from common.messages import as_json, is_messages, text_of, to_messages, to_tools

PROMPT_KEYS = ("context_messages", "messages", "prompt", "conversations")
LISTS = (
    "context_messages",
    "messages",
    "conversations",
)  # text in these columns that begins with "[" is JSON: a cell of a .csv
SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
FORMS = ".jsonl, .json, .csv, .tsv (these also as .gz), .parquet, a data set's folder or a hub name"


class BadRecord(UserError):
    """What is wrong with one record of many.

    `id`: how the list of skipped prompts calls it, a hash of the record.
    """

    def __init__(self, message, record):
        super().__init__(message)
        try:
            text = repr(record)
        except RecursionError:
            text = message
        self.id = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def raising(found):
    """Yield records; raise the `BadRecord` that stands in place of one."""
    for record in found:
        if isinstance(record, BadRecord):
            raise record
        yield record


def dumps(record):
    """One line of JSON without its newline. NaN and infinity are no JSON: put None in their place first."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def open_text(path, newline="\n"):
    """A text file for reading, or the text in a .gz file; a byte order mark is let pass."""
    opened = gzip.open(path, "rb") if Path(path).suffix == ".gz" else open(path, "rb")
    return io.TextIOWrapper(opened, encoding="utf-8-sig", newline=newline)


@contextlib.contextmanager
def decoding(path):
    """Errors of reading text as a UserError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} near byte {error.start}); convert it first"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}; fetch it again") from None


def read_jsonl(path, what="input"):
    """Yield the records of a JSON Lines file, or of a file that holds one JSON list; either may be packed as
    .gz.

    Raises:
        UserError: no such file, an empty file, a line that is not a JSON object, a torn last line, text that
            is
            not UTF-8; with the line's number.
    """
    return raising(jsonl_records(path, what))


def jsonl_records(path, what="input"):
    """As `read_jsonl`, with a `BadRecord` in place of each record that cannot be used.

    A torn file is still an error.
    """
    path, count = existing_file(path, what), 0
    with decoding(path), open_text(path) as file:
        blank = 0
        first = next(file, "")
        while first and not first.strip():
            first, blank = next(file, ""), blank + 1
        if first.lstrip().startswith("["):
            for count, record in enumerate(_parsed_list(first + file.read(), path), 1):
                yield _checked(record, path, count, "entry")
        else:
            if path.name.removesuffix(".gz").endswith(".json") and not first.rstrip().endswith("}"):
                rest = file.read()
                _refuse_object(first + rest, path)
                file = io.StringIO(rest)
            for number, line in enumerate(itertools.chain([first], file), blank + 1):
                if line.strip():
                    count += 1
                    yield _parsed(line, path, number)
    if count == 0:
        raise UserError(f"{path} is empty; a record a line was expected")


def _parsed_list(text, path):
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _refuse_object(text, path):
    """Refuse a .json file that is one object over several lines, or several such objects."""
    text = text.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (RecursionError, ValueError):
        return  # the line is told
    if "\n" not in text[:end]:
        return
    if text[end:].strip():
        raise UserError(
            f"{path} holds records over several lines each; write a record a line (jq -c . FILE), or one list"
        )
    raise UserError(f"{path} is one JSON object, a list of records was expected{_list_inside(value)}")


def _list_inside(record):
    """Where in an object a list of records stands, in words, or nothing."""
    found = [
        key
        for key, value in record.items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and not is_messages(value)
    ]
    return (
        f"; there is one under {found[0]!r}: save that list alone (jq -c '.{found[0]}[]' FILE)"
        if found
        else ""
    )


def _parsed(line, path, number):
    try:
        return _checked(json.loads(line), path, number, "line")
    except (RecursionError, ValueError) as error:
        if not isinstance(
            error, json.JSONDecodeError
        ):  # nested a thousand deep, or a number of thousands of digits
            return BadRecord(f"{path} line {number} cannot be read: {error}", line)
        if line.startswith("version https://git-lfs"):
            raise UserError(
                f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in its folder"
            ) from None
        if not line.endswith("\n"):
            raise UserError(
                f"{path} line {number} is torn (the file ends inside a record); write the file again"
            ) from None
        return BadRecord(f"{path} line {number} is not valid JSON: {error.msg} at column {error.colno}", line)


def _checked(record, path, number, unit):
    """The record, or a `BadRecord`."""
    if not isinstance(record, dict):
        return BadRecord(
            f"{path} {unit} {number} is a {type(record).__name__}, a JSON object was expected", record
        )
    try:
        dumps(record).encode("utf-8")
    except UnicodeEncodeError:
        return BadRecord(
            f"{path} {unit} {number} holds half a surrogate pair (\\ud8xx), which is not text; mend the "
            "record",
            record,
        )
    except RecursionError:
        return BadRecord(f"{path} {unit} {number} is nested too deep", record)
    except ValueError:
        pass  # NaN in the input: each stage says what it makes of it
    return record


def is_local(name):
    """Whether a name of records is meant for a file or folder here, and not for a data set on the hub."""
    from common.tables import split_config

    base = split_config(name)[0]
    return (
        Path(base).exists()
        or base.startswith((".", "/", "~"))
        or base.count("/") != 1
        or base.removesuffix(".gz").endswith(SUFFIXES)
    )


def read_records(name, split="train", keep_bad=False):
    """Yield the records of a file (.jsonl, .json, .csv, .tsv, .parquet), of a data set's folder or of a hub
    data set.

    Args:
        name: the file, folder or hub name; `NAME:CONFIG` for one of several configurations of a data set.
        split: of a data set; files have none.
        keep_bad: yield a `BadRecord` in place of a record that cannot be used, instead of raising it.
    """
    found = _records(name, split)
    return found if keep_bad else raising(found)


def _records(name, split):
    from common import tables

    suffix = Path(name.removesuffix(".gz")).suffix
    if Path(tables.split_config(name)[0]).is_dir():
        yield from tables.read_data_set(name, split)
    elif suffix in SUFFIXES and not (suffix == ".parquet" and name.endswith(".gz")):
        tables.refuse_split(name, split)
        read = {".parquet": tables.read_parquet, ".csv": tables.read_csv, ".tsv": tables.read_csv}.get(
            suffix, jsonl_records
        )
        yield from read(name)
    elif Path(name).exists():
        raise UserError(f"{name}: expected {FORMS}")
    elif is_local(name):
        existing_file(name, "prompt file or folder")
    else:
        yield from tables.read_data_set(name, split)


def record_id(messages, twin=0, tools=None):
    """16 hex digits: a hash of the prompt's messages and tools, and of how many equal prompts came before it
    in the file.
    """
    text = json.dumps([messages, twin, *([tools] if tools else [])], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


class Identifier:
    """Gives each prompt of one file its id, counting twins: equal prompts are answered anew, not merged."""

    def __init__(self):
        self._seen = Index()

    def __call__(self, messages, tools=None):
        base = record_id(messages, tools=tools)
        twin = self._seen.count(base)
        return record_id(messages, twin, tools) if twin else base


def read_prompts(name, key=None, split="train", system_prompt=None, keep_bad=False):
    """Yield prompt records `{"id", "prompt": messages, …extra fields}` in file order.

    Args:
        name: what `read_records` takes.
        key: the column that holds the prompt; None takes the first of `context_messages`, `messages`,
            `prompt`, `conversations`.
        split: split of a data set.
        system_prompt: put before every prompt that has no system turn.
        keep_bad: yield a `BadRecord` in place of a record that holds no prompt, instead of raising it.

    Extra fields are carried through, `tools` as a list of JSON schemas; a field `id` of the file is kept as
    `source_id`.

    Raises:
        UserError: the first record has no such column, or no record holds a prompt.
    """
    identify, number, usable, first_bad, looked = Identifier(), 0, 0, None, False
    for number, record in enumerate(read_records(name, split, keep_bad=True), 1):
        where = f"{name} record {number}"
        if not isinstance(record, BadRecord):
            if not looked and not any(k in record for k in ([key] if key else PROMPT_KEYS)):
                raise UserError(_no_prompt(record, key, where))
            looked = True
            try:
                record = _prompt_record(record, key, where, system_prompt, identify)
            except (
                UserError,
                RecursionError,
            ) as error:  # RecursionError: nested too deep for what is written in Python
                record = BadRecord(
                    str(error) if isinstance(error, UserError) else f"{where} is nested too deep", record
                )
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
    messages, tools = (
        to_messages(value, where),
        to_tools(record.get("tools") if column != "tools" else None, where),
    )
    if messages[-1]["role"] == "user" and not text_of(messages[-1]).strip():
        raise UserError(f"{where}: its last turn is empty")
    messages = with_system(messages, system_prompt)
    extra = {k: v for k, v in record.items() if k not in (column, "id", "prompt", "tools")} | (
        {"tools": tools} if tools else {}
    )
    try:
        dumps(extra)
    except (TypeError, ValueError):  # a table's dates, bytes and NaN
        extra = {k: as_json(v) for k, v in extra.items()}
    if "id" in record:
        extra["source_id"] = as_json(record["id"])
    return {"id": identify(messages, tools), "prompt": messages, **extra}


def with_system(messages, system_prompt):
    """The messages with a system turn in front where they have none and there is a system prompt."""
    return (
        [{"role": "system", "content": system_prompt}, *messages]
        if system_prompt and messages[0]["role"] != "system"
        else messages
    )


def _listed(text, column, where):
    """Messages in a cell of a .csv: JSON.

    In a column that has a name of its own, a text that is no list of messages stays text.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        if column in LISTS:
            told = (
                f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            )
            raise UserError(f"{where}: {column} is no JSON list of messages: {told}") from None
        return text
    return value if column in LISTS or is_messages(value) else text


def _no_prompt(record, key, where):
    """What to tell where a record has no column of prompts."""
    wanted = key or " or ".join(PROMPT_KEYS)
    start = (
        f"{where} has no {wanted}{nearest(key, record) if key else ''}; its fields are "
        f"{', '.join(map(str, record))}"
    )
    lists = [name for name, value in record.items() if is_messages(value)]
    if key is None and "instruction" in record:
        return (
            f"{start}: give --dataset_key instruction, or where `input` is not empty join both in a "
            "column `prompt`"
        )
    if key is None and lists:
        what = "the prompt of the chosen answer" if lists[0] == "chosen" else "its messages"
        return (
            f"{start}: --dataset_key {lists[0]} takes {what}, without the last turn where that is an answer"
        )
    if key is None and "chosen" in record:
        return f"{start}: `chosen` is an answer and not a prompt; give the prompt a column of its own"
    return start + (_list_inside(record) or ": name the prompt's with --dataset_key")


def sample_seed(run_seed, iteration, prompt_id, spacing=1024):
    """A prompt's sampling seed: a hash of run seed, iteration and prompt id, a multiple of `spacing` below
    2**62.

    The engine gives the i-th of n samples the seed + i, so seeds are spaced by more than any K.
    """
    digest = hashlib.sha256(f"{run_seed}/{iteration}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**62 // spacing) * spacing


def shard_range(count, index, world):
    """The half-open range of shard `index` of `world`: contiguous, sizes differing by at most one, nothing
    lost.
    """
    return range(count * index // world, count * (index + 1) // world)


def is_empty(text):
    """Whether a response says nothing."""
    return not text.strip()


def finite(value):
    """Whether a reward is a finite number."""
    # an int too large for a float is none either; math.isfinite would raise
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )
