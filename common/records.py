"""Records: JSON Lines in and out, prompts in every accepted form, ids, seeds and shards.

A record is one JSON object a line, UTF-8, lines ended by `\\n` only (U+2028 and the like may stand inside a string).
Nothing here knows a model; the standard library suffices, `datasets` is imported only for formats that need it.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

from common.cli import UserError, existing_file, nearest
from common.index import Index

PROMPT_KEYS = ("context_messages", "messages", "prompt")


def dumps(record):
    """One line of JSON without its newline. NaN and infinity are no JSON: put None in their place first."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def read_jsonl(path, what="input"):
    """Yield the records of a JSON Lines file, or of a .json file that holds one list.

    Raises:
        UserError: no such file, an empty file, a line that is not a JSON object, a torn last line, text that is
            not UTF-8; with the line's number.
    """
    path = existing_file(path, what)
    count = 0
    with open(path, encoding="utf-8-sig", newline="\n") as file:  # a byte order mark is let pass
        try:
            if path.suffix == ".json" and file.read(1) == "[":
                file.seek(0)
                for count, record in enumerate(json.load(file), 1):
                    yield _checked(record, path, count, "entry")
            else:
                file.seek(0)
                for number, line in enumerate(file, 1):
                    if line.strip() == "":
                        continue
                    count += 1
                    yield _checked(_parsed(line, path, number), path, number, "line")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason} near byte {error.start}); convert it first") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
    if count == 0:
        raise UserError(f"{path} is empty; a record a line was expected")


def _parsed(line, path, number):
    try:
        return json.loads(line)
    except (RecursionError, ValueError) as error:
        if not isinstance(error, json.JSONDecodeError):  # nested a thousand deep, or a number of thousands of digits
            raise UserError(f"{path} line {number} cannot be read: {error}") from None
        if not line.endswith("\n"):
            raise UserError(f"{path} line {number} is torn (the file ends inside a record); write the file again") from None
        raise UserError(f"{path} line {number} is not valid JSON: {error.msg} at column {error.colno}") from None


def _checked(record, path, number, unit):
    if not isinstance(record, dict):
        raise UserError(f"{path} {unit} {number} is a {type(record).__name__}, a JSON object was expected")
    try:
        dumps(record).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{path} {unit} {number} holds half a surrogate pair (\\ud8xx), which is not text; mend the record") from None
    except ValueError:
        pass  # NaN in the input: each stage says what it makes of it
    return record


def read_records(name, split="train"):
    """Yield the records of a .jsonl, .json, .parquet or .csv file, a `save_to_disk` folder or a hub data set."""
    path = Path(name)
    if path.suffix in (".jsonl", ".json"):
        yield from read_jsonl(path)
    elif path.is_dir() or path.suffix in (".parquet", ".csv"):
        yield from _read_with_datasets(path, split)
    elif path.exists():
        raise UserError(f"{path}: expected .jsonl, .json, .parquet, .csv, a save_to_disk folder or a hub name")
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        existing_file(path, "prompt file or folder")
    else:
        yield from _read_hub(name, split)


def _read_with_datasets(path, split):
    import datasets

    try:
        if path.is_dir():
            data = datasets.load_from_disk(str(path))
        else:
            existing_file(path, "input")
            data = datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())[:300]}") from None
    if isinstance(data, dict):
        if split not in data:
            raise UserError(f"{path} has no split {split!r}; it has {', '.join(data)}: choose one with --dataset_split")
        data = data[split]
    if len(data) == 0:
        raise UserError(f"{path} is empty")
    yield from data


def _read_hub(name, split):
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load {name} from the hub or a local path: {type(error).__name__}: {first}") from None
    yield from data


def to_messages(value, where):
    """A prompt as a list of `{"role", "content"}` whose last turn is the user's.

    A string is one user turn; a trailing assistant turn is dropped (`messages` columns hold the answer too).

    Raises:
        UserError: not a prompt; `where` names the place.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: a prompt is a string or a list of messages, got {str(value)[:60]!r}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or not isinstance(message.get("role"), str):
            raise UserError(f'{where}: a message is {{"role": …, "content": text}}, got {str(message)[:60]!r}')
        messages.append({"role": message["role"], "content": message["content"]})
    if messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: the last turn of a prompt must be the user's")
    return messages


def as_json(value):
    """A value of a table as JSON holds it: NaN and infinity are null, what JSON does not know is text."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def record_id(messages, twin=0):
    """16 hex digits: a hash of the prompt's messages and of how many equal prompts came before it in the file."""
    text = json.dumps([messages, twin], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


class Identifier:
    """Gives each prompt of one file its id, counting twins: equal prompts are answered anew, not merged."""

    def __init__(self):
        self._seen = Index()

    def __call__(self, messages):
        base = record_id(messages)
        twin = self._seen.count(base)
        return record_id(messages, twin) if twin else base


def read_prompts(name, key=None, split="train", system_prompt=None):
    """Yield prompt records `{"id", "prompt": messages, …extra fields}` in file order.

    Args:
        name: what `read_records` takes.
        key: the column that holds the prompt; None takes the first of `context_messages`, `messages`, `prompt`.
        split: split of a hub data set or `save_to_disk` folder.
        system_prompt: put before every prompt that has no system turn.

    Extra fields are carried through; a field `id` of the file is kept as `source_id`.
    """
    identify = Identifier()
    for number, record in enumerate(read_records(name, split), 1):
        column = key or next((k for k in PROMPT_KEYS if record.get(k) is not None), None)
        if column is None or column not in record:
            wanted = key or " or ".join(PROMPT_KEYS)
            hint = nearest(column, record) if column else ""
            raise UserError(
                f"{name} record {number} has no {wanted}{hint}; its fields are {', '.join(record)}: name the prompt's with --dataset_key"
            )
        value = record[column]
        if isinstance(value, str) and column != "prompt" and value.lstrip().startswith("["):  # a list in a .csv
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise UserError(f"{name} record {number}: {column} is no JSON list of messages: {error.msg} at column {error.colno}") from None
        messages = to_messages(value, f"{name} record {number}")
        if system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        extra = {k: v for k, v in record.items() if k not in (column, "id", "prompt")}
        try:
            dumps(extra)
        except (TypeError, ValueError):  # a table's dates, bytes and NaN
            extra = {k: as_json(v) for k, v in extra.items()}
        if "id" in record:
            extra["source_id"] = record["id"]
        yield {"id": identify(messages), "prompt": messages, **extra}


def sample_seed(run_seed, iteration, prompt_id, spacing=1024):
    """A prompt's sampling seed: a hash of run seed, iteration and prompt id, a multiple of `spacing` below 2**62.

    The engine gives the i-th of n samples the seed + i, so seeds are spaced by more than any K.
    """
    digest = hashlib.sha256(f"{run_seed}/{iteration}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (2**62 // spacing) * spacing


def shard_range(count, index, world):
    """The half-open range of shard `index` of `world`: contiguous, sizes differing by at most one, nothing lost."""
    return range(count * index // world, count * (index + 1) // world)


def finite(value):
    """Whether a reward is a finite number."""
    # an int too large for a float is none either; math.isfinite would raise
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
