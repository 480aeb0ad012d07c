"""Preference data in the layouts that people have, read as rewarded records: answers to a prompt, and what
each is worth.

    read_as, records = read_answers("HuggingFaceH4/ultrafeedback_binarized", split="train_prefs")

A record's layout is told by its fields (`LAYOUTS`); what has `responses` is a rewarded record already. Where
nobody gave numbers, chosen has 1 and rejected 0. A new layout is a function here with `@layout(…)` above it.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError
from common.jsonl import BadRecord, jsonl_records
from common.messages import CALLS, as_json, is_messages, text_of, to_messages, to_tools
from common.records import (
    PER_RESPONSE,
    PROMPT_KEYS,
    Identifier,
    finite,
    read_records,
    read_rewarded,
    with_system,
)
from common.tokens import PROMPT

PROMPTS = ("prompt", *(key for key in PROMPT_KEYS if key != "prompt"), "instruction", "question", "context")
BESIDE = {"instruction": ("input", "context"), "question": ("context",)}  # another part of the same prompt
SYSTEM = ("system", "system_prompt")
TEXTS = ("response", "answer", "text", "content", "completion")  # of one of several answers
RATINGS = ("overall_score", "rating", "score")
SCORES = (  # of chosen and of rejected
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen_reward", "rejected_reward"),
)
STRENGTHS = ("preference_strength", "overall_preference")  # below 0: the first response is the better one
TURN = re.compile(r"\n\n(Human|Assistant):")  # of Anthropic's dialogues
REWARDED = "rewarded answers"
OURS = ("responses", *PER_RESPONSE, PROMPT)  # of a rewarded record; they would speak of other responses

Answers = tuple[list[dict], list[str], list[float | None]]  # prompt, responses, what each is worth


@dataclass(frozen=True)
class Layout:
    """A layout of records.

    fields: groups of names, of each of which one must be there.
    read: gives the Answers of a record; a UserError says what is wrong with it.
    """

    fields: tuple[tuple[str, ...], ...]
    read: Callable[[dict], Answers]

    def fits(self, record: dict) -> bool:
        return all(any(name in record for name in group) for group in self.fields)


LAYOUTS: dict[str, Layout] = {}  # by what it is called in words; the first that fits counts


def layout(words: str, *fields: tuple[str, ...]) -> Callable:
    """Make a function the reader of a layout; see Layout."""

    def register(function: Callable) -> Callable:
        LAYOUTS[words] = Layout(fields, function)
        return function

    return register


@layout("chosen and rejected", ("chosen",), ("rejected",))
def chosen_and_rejected(record: dict) -> Answers:
    """Two answers: texts beside a prompt, lists of messages with or without their prompt, or dialogues."""
    prompts, responses = zip(*(answered(record, side) for side in ("chosen", "rejected")))
    if prompts[0] != prompts[1]:
        raise UserError("`chosen` and `rejected` answer different prompts")
    names = next(
        (pair for pair in SCORES if all(number(record.get(name)) is not None for name in pair)), None
    )
    rewards = [number(record[name]) for name in names] if names else [1.0, 0.0]
    if rewards[0] < rewards[1]:
        raise UserError(f"{names[0]} {rewards[0]:g} is below {names[1]} {rewards[1]:g}")
    return prompts[0], list(responses), rewards


@layout("ranked answers", ("answers",))
def ranked_answers(record: dict) -> Answers:
    """Nectar: `answers`, each with its `rank`, 1 for the best. A step of rank is worth 1."""
    answers = several(record, "answers")
    ranks = [number(answer.get("rank")) for answer in answers]
    if None in ranks:
        raise UserError("an answer has no `rank`")
    return prompt_of(record), [text_in(answer) for answer in answers], [-rank for rank in ranks]


@layout("rated completions", ("completions",))
def rated_completions(record: dict) -> Answers:
    """UltraFeedback: `completions`, each with its `overall_score`, `rating` or `score`."""
    completions = several(record, "completions")
    key = next((key for key in RATINGS if any(number(one.get(key)) is not None for one in completions)), None)
    if key is None:
        raise UserError(f"no completion has a number as {', '.join(RATINGS)}")
    return (
        prompt_of(record),
        [text_in(one) for one in completions],
        [number(one.get(key)) for one in completions],
    )


@layout("two responses", ("response_1", "response1"), ("response_2", "response2"), (*STRENGTHS, "preference"))
def two_responses(record: dict) -> Answers:
    """HelpSteer: a strength below 0 prefers the first response; or `preference` names the better one."""
    names = [next(name for name in (f"response_{k}", f"response{k}") if name in record) for k in (1, 2)]
    strength = next((number(record[key]) for key in STRENGTHS if key in record), None)
    if strength is None:
        if record.get("preference") not in names:
            raise UserError(
                f"`preference` is {str(record.get('preference'))[:40]!r}, {names[0]} or {names[1]} was "
                f"expected; a number is read as {' or '.join(STRENGTHS)}"
            )
        strength = (-1.0, 1.0)[names.index(record["preference"])]
    responses = [record[name] for name in names]
    if not all(isinstance(response, str) for response in responses):
        raise UserError(f"{names[0]} and {names[1]} must be texts")
    return prompt_of(record), responses, [max(-strength, 0.0), max(strength, 0.0)]


# Parts of records


def number(value: object) -> float | None:
    """A finite number, which may be text as in a .csv; else None."""
    try:
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return float(value) if finite(value) else None


def several(record: dict, key: str) -> list[dict]:
    """A list of answers, each a dict."""
    values = record[key]
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        raise UserError(f"`{key}` must be a list of answers with their fields, it is {str(values)[:60]!r}")
    return values


def text_in(answer: dict) -> str:
    """The text of one of several answers."""
    found = next((answer[key] for key in TEXTS if isinstance(answer.get(key), str)), None)
    if found is None:
        raise UserError(f"an answer has no text in {', '.join(TEXTS)}; its fields are {', '.join(answer)}")
    return found


def dialogue(text: str) -> list[dict] | None:
    """The turns of a dialogue "\\n\\nHuman: …\\n\\nAssistant: …"; None for another text."""
    before, *parts = TURN.split(text)
    if before.strip() or not parts:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


def listed(value: object) -> object:
    """A cell of a .csv that holds messages, as a list; another value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            found = json.loads(value)
        except ValueError:
            return value
        return found if is_messages(found) else value
    return [value] if is_messages([value]) else value


def system_of(record: dict) -> str | None:
    """The text of a record's system turn that stands beside its prompt."""
    return next((record[name] for name in SYSTEM if isinstance(record.get(name), str)), None)


def prompt_of(record: dict) -> list[dict]:
    """The prompt of a record as messages, with its system turn."""
    key = next((key for key in PROMPTS if record.get(key)), None)
    if key is None:
        raise UserError(f"it has no prompt: {', '.join(PROMPTS)} were looked for")
    if (other := next((name for name in BESIDE.get(key, ()) if record.get(name)), None)) is not None:
        raise UserError(f"it has `{other}` that belongs to its `{key}`: join both in a column `prompt`")
    value = listed(record[key])
    value = (dialogue(value) or value) if isinstance(value, str) else value
    messages = to_messages(value, key)
    if messages[-1]["role"] == "user" and not text_of(messages[-1]).strip():
        raise UserError(f"{key}: its last turn is empty")
    return with_system(messages, system_of(record))


def answered(record: dict, side: str) -> tuple[list[dict], str]:
    """(prompt, response) of one side of a pair: behind the prompt of the record, or with its own."""
    value = listed(record[side])
    if isinstance(value, str):
        turns = dialogue(value)  # which no answer is, so also where its prompt stands in another column, too
        if turns is None:
            return prompt_of(record), value
        value = turns
    if not is_messages(value):
        raise UserError(f"`{side}` is {str(value)[:60]!r}, a text or a list of messages was expected")
    # A user's turn behind the answer lets `to_messages` read all of them, in every form.
    *before, answer = to_messages([*value, {"role": "user", "content": ""}], side)[:-1]
    if answer["role"] != "assistant" or not isinstance(answer.get("content"), str):
        raise UserError(f"`{side}` does not end with the text of an assistant")
    if any(answer.get(key) for key in CALLS):
        raise UserError(f"`{side}` ends with calls of tools, and only the text of an answer is trained")
    if before and before[-1]["role"] == "assistant":
        raise UserError(f"`{side}` ends with two turns of the assistant: join them")
    if not before:
        return prompt_of(record), answer["content"]
    return with_system(to_messages(before, side), system_of(record)), answer["content"]


# Reading


def read_answers(name: str | Path, split: str | None = None) -> tuple[str, Iterator[dict | BadRecord]]:
    """(what the records are, an iterator over them as rewarded records) of rewarded answers or preferences.

    Args:
        name: as of `read_records`: a file, a data set's folder, a hub name.
        split: of a data set; a file has none. None is train.

    A preference that cannot be used is a `BadRecord`; a rewarded record that cannot be is an error.

    Raises:
        UserError: the first record is neither, or no record can be used.
    """
    name = str(name)
    tabular = name.endswith((".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz"))
    if Path(name).is_file() and not tabular:
        records = jsonl_records(name, "file of rewarded answers or preferences")
    else:
        records = read_records(name, "train" if Path(name).is_file() else split or "train")
    ahead = []
    for record in records:
        ahead.append(record)
        if not isinstance(record, BadRecord):
            break
    records, first = itertools.chain(ahead, records), ahead[-1] if ahead else None
    if not isinstance(first, dict) or "responses" in first or "rewards" in first:
        return REWARDED, read_rewarded(name, records=records)
    words = next((words for words, one in LAYOUTS.items() if one.fits(first)), None)
    if words is None:
        raise UserError(
            f"{name} holds neither rewarded answers (prompt, responses, rewards) nor preferences in a layout "
            f"that docs/formats.md lists; its fields are {', '.join(map(str, first))}"
        )
    return words, _preferences(name, records)


def _preferences(name, records):
    identify, count, usable, first_bad = Identifier(), 0, 0, None
    for count, record in enumerate(records, 1):
        if not isinstance(record, BadRecord):
            try:
                record = _preference(record, identify)
            except UserError as error:
                record = BadRecord(f"{error} (record {count})", record)
        if isinstance(record, BadRecord):
            first_bad = first_bad or record
        else:
            usable += 1
        yield record
    if count and not usable:
        raise UserError(f"{name} holds no preference that can be used; the first of {count}: {first_bad}")


def _preference(record, identify):
    """The rewarded record of a preference, whatever its layout; a UserError says what is wrong."""
    one = next((one for one in LAYOUTS.values() if one.fits(record)), None)
    if one is None:
        raise UserError(f"it has no layout of preferences; its fields are {', '.join(map(str, record))}")
    prompt, responses, rewards = one.read(record)
    tools = to_tools(record.get("tools"), "its tools")
    read = {*PROMPTS, *OURS, "tools", "id", *(field for group in one.fields for field in group)}
    extra = {key: as_json(value) for key, value in record.items() if key not in read}
    extra |= {"tools": tools} if tools else {}
    extra |= {"source_id": as_json(record["id"])} if "id" in record else {}
    known = {"id": identify(prompt, tools), "prompt": prompt, "responses": responses, "rewards": rewards}
    return known | extra
