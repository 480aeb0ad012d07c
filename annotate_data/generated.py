"""Generated files on their way to a model: checked as a whole, without an earlier annotation, in chunks."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from common import records
from common.cli import UserError
from common.messages import text_of
from common.records import read_generated

ADDED = ("rewards", "reward_parts", "pair_probabilities")  # of an earlier annotation: replaced


def read_unscored(path: str | Path) -> Iterator[dict]:
    """The records of `read_generated` without what an earlier annotation added."""
    for record in read_generated(path):
        yield {key: value for key, value in record.items() if key not in ADDED}


def chunks(items: Iterator, size: int) -> Iterator[list]:
    """Yield the items in lists of `size`; the last one may be shorter."""
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def characters(record: dict) -> int:
    """Characters that a model reads of a record, the prompt with each response."""
    prompt = sum(len(text_of(message)) for message in record["prompt"])
    return sum(prompt + len(response) for response in record["responses"])


def survey(path: str | Path, wanted_k: int | None = None) -> tuple[int, int, dict]:
    """Read a generated file once and refuse what is wrong with it, before a model is loaded.

    Returns:
        (number of records, K, dict of the roles of a prompt's turns → number, messages and tools of the first
        record that has them).

    Raises:
        UserError: as `read_generated`; NaN, a repeated id, K that differs within the file or from
            `wanted_k`.
    """
    ids, roles, count, K, odd, first_odd = {}, {}, 0, wanted_k, 0, None
    for count, record in enumerate(read_unscored(path), 1):
        try:
            records.dumps(record)
        except ValueError:
            what = "holds NaN or infinity, which is no JSON: repair or remove that field"
            raise UserError(f"{path} record {count} {what}") from None
        if (first := ids.setdefault(record["id"], count)) != count:
            what = f"has the id {record['id']!r} of record {first}; make ids unique or leave them out"
            raise UserError(f"{path} record {count} {what}")
        K = K or len(record["responses"])
        if len(record["responses"]) != K:
            odd, first_odd = odd + 1, first_odd or (record["id"], len(record["responses"]))
        kind = tuple(message["role"] for message in record["prompt"])
        roles.setdefault(kind, (count, record["prompt"], record.get("tools")))
    if odd:
        whence = f"--K is {K}" if wanted_k else f"the first record of {path} has {K} responses"
        todo = "leave --K out to take the data's" if wanted_k else "put them in files of their own"
        raise UserError(
            f"{whence}, but {odd} of {count} records in {path} have another number "
            f"({first_odd[0]} has {first_odd[1]}); {todo}"
        )
    return count, K, roles
