"""Generated files: records in a stream, checked and brought into one form."""

from common import cli, records, tokens
from common.cli import UserError
from common.index import Index

ADDED = ("rewards", "reward_parts", "pair_probabilities")  # of an earlier annotation: replaced


def read_generated(path):
    """Yield the records of a generated file, each with an `id` and its prompt as messages. None is held.

    A record without a text as `id` gets one from its prompt and what `id` it had becomes `source_id`.

    Raises:
        UserError: a field is missing or of another kind; names the record.
    """
    identify = records.Identifier()
    for number, record in enumerate(records.read_jsonl(path, "generated file"), 1):
        where = f"{path} record {number}"
        for field in ("prompt", "responses"):
            if field not in record:
                raise UserError(
                    f"{where} has no `{field}`{cli.nearest(field, record)}; it has {', '.join(record)}"
                )
        prompt, responses = records.to_messages(record["prompt"], where), record["responses"]
        tools = records.to_tools(record.get("tools"), where)
        if not isinstance(responses, list) or not responses or not all(isinstance(r, str) for r in responses):
            raise UserError(f"{where}: `responses` must be a list of texts, it is {str(responses)[:60]}")
        for field in ("finish_reasons", "num_tokens", tokens.RESPONSES):
            values = record.get(field)
            if isinstance(values, str | dict):  # a number is another tool's field of that name
                raise UserError(f"{where}: `{field}` must be a list with an entry for each response")
            if isinstance(values, list) and len(values) != len(responses):
                raise UserError(f"{where} has {len(responses)} responses and {len(values)} {field}")
        if not isinstance(record.get("id"), str):
            made = identify(prompt, tools)
            record = (
                {"id": made} | record | {"id": made} | ({"source_id": record["id"]} if "id" in record else {})
            )
        yield (
            {key: value for key, value in record.items() if key not in ADDED}
            | {"prompt": prompt}
            | ({"tools": tools} if tools else {})
        )


def survey(path, wanted_k=None):
    """Read a generated file once and refuse what is wrong with it, before a model is loaded.

    Returns:
        (number of records, K, dict of the roles of a prompt's turns → number, messages and tools of the first
        record that has them).

    Raises:
        UserError: as `read_generated`; NaN, an id that stands twice, K that differs within the file or from
            `wanted_k`.
    """
    ids, roles, count, K, odd, first_odd = Index(), {}, 0, wanted_k, 0, None
    for count, record in enumerate(read_generated(path), 1):
        try:
            records.dumps(record)
        except ValueError:
            message = (
                f"{path} record {count} holds NaN or infinity, which is no JSON: mend or remove that field"
            )
            raise UserError(message) from None
        twin = ids.get(record["id"])
        if twin:
            raise UserError(
                f"{path} record {count} has the id {record['id']!r} of record {twin[0]}; make ids unique or "
                "leave them out"
            )
        ids[record["id"]] = (count, 0)
        K = K or len(record["responses"])
        if len(record["responses"]) != K:
            odd, first_odd = odd + 1, first_odd or (record["id"], len(record["responses"]))
        roles.setdefault(
            tuple(message["role"] for message in record["prompt"]),
            (count, record["prompt"], record.get("tools")),
        )
    if odd:
        whence = f"--K is {K}" if wanted_k else f"the first record of {path} has {K} responses"
        todo = "leave --K out to take the data's" if wanted_k else "put them in files of their own"
        raise UserError(
            f"{whence}, but {odd} of {count} records in {path} have another number "
            f"({first_odd[0]} has {first_odd[1]}); {todo}"
        )
    return count, K, roles
