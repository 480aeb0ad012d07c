"""JSON Lines in and out: one JSON object a line, UTF-8, lines ended by `\\n` only.

U+2028 and the like may stand inside a string. The standard library suffices.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError, existing_file
from common.messages import is_messages

BINARY = {  # how files begin that are no text, and what to do with them
    b"\x1f\x8b": "packed by gzip: add .gz to its name",
    b"PAR1": "a parquet table, JSON Lines were expected: call prompts .parquet, convert other files",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "packed by zstd: unpack it first",
    b"\xff\xfe": "UTF-16 text: convert it first (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16 text: convert it first (iconv -f UTF-16 -t UTF-8)",
}


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


def dumps(record: dict) -> str:
    """One line of JSON without its newline. NaN and infinity are no JSON: put None in their place first."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def open_text(path: str | Path, newline: str = "\n") -> io.TextIOWrapper:
    """A text file for reading, or the text in a .gz file; a byte order mark is let pass."""
    opened = gzip.open(path, "rb") if Path(path).suffix == ".gz" else open(path, "rb")
    return io.TextIOWrapper(opened, encoding="utf-8-sig", newline=newline)


@contextlib.contextmanager
def decoding(path: str | Path) -> Iterator[None]:
    """Errors of reading text as a UserError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        with open(path, "rb") as file:
            start = file.read(4)
        text = f"not UTF-8 text ({error.reason} near byte {error.start}); convert it first"
        what = next((what for mark, what in BINARY.items() if start.startswith(mark)), text)
        raise UserError(f"{path} is {what}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked: {error}; fetch it again") from None


def jsonl_records(path: str | Path, what: str = "input") -> Iterator[dict | BadRecord]:
    """Yield the records of a JSON Lines file, or of a file that holds one JSON list; either may be packed as
    .gz. A `BadRecord` stands in place of each line that is no JSON object.

    Raises:
        UserError: no such file, an empty file, a torn last line, text that is not UTF-8; with the line's
            number.
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
        if getattr(error, "msg", None) == "Extra data":
            raise UserError(
                f"{path} line 1 begins a list and more stands behind it; write an object a line, or one list "
                "of objects"
            ) from None
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _refuse_object(text, path):
    """Refuse a .json file that is one object over several lines, or several such objects."""
    text = text.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (RecursionError, ValueError):
        return  # the error names the line
    if "\n" not in text[:end]:
        return
    if text[end:].strip():
        raise UserError(
            f"{path} holds records over several lines each; write a record a line (jq -c . FILE), or one list"
        )
    raise UserError(f"{path} is one JSON object, a list of records was expected{list_inside(value)}")


def list_inside(record: dict) -> str:
    """Where in an object a list of records stands, in words, or nothing."""
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and not is_messages(value):
            return f"; there is one under {key!r}: save that list alone (jq -c '.{key}[]' FILE)"
    return ""


def _parsed(line, path, number):
    try:
        return _checked(json.loads(line), path, number, "line")
    except (RecursionError, ValueError) as error:
        # nested a thousand deep, or a number of thousands of digits
        if not isinstance(error, json.JSONDecodeError):
            return BadRecord(f"{path} line {number} cannot be read: {error}", line)
        if line.startswith("version https://git-lfs"):
            raise UserError(
                f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in its folder"
            ) from None
        if not line.endswith("\n") and error.msg != "Extra data":  # a whole record stands in front of that
            raise UserError(
                f"{path} line {number} is torn (the file ends inside a record); write the file again"
            ) from None
        why = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        return BadRecord(f"{path} line {number} is not valid JSON: {why}", line)


def _checked(record, path, number, unit):
    """The record, or a `BadRecord`."""
    try:
        if not isinstance(record, dict):
            wrong = f"is a {type(record).__name__}, a JSON object was expected"
        else:
            dumps(record).encode("utf-8")
            return record
    except UnicodeEncodeError:
        wrong = "holds half a surrogate pair (\\ud8xx), which is not text; repair the record"
    except RecursionError:
        wrong = "is nested too deep"
    except ValueError:
        return record  # NaN in the input: each stage says what it makes of it
    return BadRecord(f"{path} {unit} {number} {wrong}", record)
