"""Preferences in the layouts of the hub's common sets, as rewarded records."""

import csv
import json

import pytest
from datasets import Dataset, DatasetDict

from common.cli import UserError
from common.jsonl import BadRecord
from common.preferences import LAYOUTS, REWARDED, read_answers


def turn(role, text):
    return {"role": role, "content": text}


ASKED = [turn("user", "2+2?")]
EARLIER = [turn("user", "Hi"), turn("assistant", "Hello."), *ASKED]
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 2+2?\n\nAssistant:"
FOUR, FIVE = [turn("assistant", "four")], [turn("assistant", "five")]


def sharegpt(messages):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


# name: (record, layout, prompt, responses, rewards), each in the form of a set on the hub
KNOWN = {
    "ultrafeedback_binarized": (
        {"prompt": "2+2?", "chosen": ASKED + FOUR, "rejected": ASKED + FIVE, "messages": ASKED + FOUR}
        | {"score_chosen": 8.5, "score_rejected": 6.0},
        *("chosen and rejected", ASKED, ["four", "five"], [8.5, 6.0]),
    ),
    "messages without a prompt": (
        {"chosen": EARLIER + FOUR, "rejected": EARLIER + FIVE},
        *("chosen and rejected", EARLIER, ["four", "five"], [1.0, 0.0]),
    ),
    "trl's explicit prompt": (
        {"prompt": EARLIER, "chosen": FOUR, "rejected": FIVE, "chosen_rating": "5", "rejected_rating": "3"},
        *("chosen and rejected", EARLIER, ["four", "five"], [5.0, 3.0]),
    ),
    "orca_dpo_pairs": (
        {"system": "Be brief.", "question": "2+2?", "chosen": "four", "rejected": "five"},
        *("chosen and rejected", [turn("system", "Be brief."), *ASKED], ["four", "five"], [1.0, 0.0]),
    ),
    "sharegpt": (
        {"conversations": sharegpt(EARLIER), "chosen": sharegpt(FOUR)[0], "rejected": sharegpt(FIVE)[0]},
        *("chosen and rejected", EARLIER, ["four", "five"], [1.0, 0.0]),
    ),
    "hh-rlhf": (
        {"chosen": f"{HH} four", "rejected": f"{HH} five"},
        *("chosen and rejected", EARLIER, ["four", "five"], [1.0, 0.0]),
    ),
    "hh with a prompt": (
        {"prompt": HH, "chosen": " four", "rejected": " five"},
        *("chosen and rejected", EARLIER, [" four", " five"], [1.0, 0.0]),
    ),
    "hh with a prompt and whole dialogues": (
        {"prompt": HH, "chosen": f"{HH} four", "rejected": f"{HH} five"},
        *("chosen and rejected", EARLIER, ["four", "five"], [1.0, 0.0]),
    ),
    "helpsteer2": (
        {"prompt": "2+2?", "response_1": "four", "response_2": "five", "preference_strength": -2},
        *("two responses", ASKED, ["four", "five"], [2.0, 0.0]),
    ),
    "helpsteer3": (
        {"context": EARLIER, "response1": "five", "response2": "four", "overall_preference": 3},
        *("two responses", EARLIER, ["five", "four"], [0.0, 3.0]),
    ),
    "by name": (
        {"prompt": "2+2?", "response_1": "four", "response_2": "five", "preference": "response_1"},
        *("two responses", ASKED, ["four", "five"], [1.0, 0.0]),
    ),
    "nectar": (
        {"prompt": HH, "answers": [{"answer": f"a{k}", "rank": k, "model": "m"} for k in (3, 1, 2)]},
        *("ranked answers", EARLIER, ["a3", "a1", "a2"], [-3.0, -1.0, -2.0]),
    ),
    "ultrafeedback": (
        {
            "instruction": "2+2?",
            "completions": [
                {"model": "a", "response": "four", "overall_score": 7.5, "annotations": {}},
                {"model": "b", "response": "five", "overall_score": None, "annotations": {}},
            ],
        },
        *("rated completions", ASKED, ["four", "five"], [7.5, None]),
    ),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_layout_is_read_and_what_else_is_there_kept(name, tmp_path):
    record, words, prompt, responses, rewards = KNOWN[name]
    more = {"id": 7, "topic": "sums", "response_sources": [{}] * 8, "stop_strings": ["x"] * 8}
    read_as, records = read_answers(write(tmp_path / "a.jsonl", [record | more] * 2))
    first, second = records
    assert read_as == words and words in LAYOUTS
    assert (first["prompt"], first["responses"], first["rewards"]) == (prompt, responses, rewards)
    assert (first["topic"], first["source_id"]) == ("sums", 7) and first["id"] != second["id"]
    assert not {"chosen", "rejected", "answers", "completions", "response1"} & set(first)
    assert not {"response_sources", "stop_strings"} & set(first)  # of other responses


def test_every_layout_is_tried():
    assert {words for _, words, *_ in KNOWN.values()} == set(LAYOUTS)


def test_every_kind_of_source_gives_the_same(tmp_path, monkeypatch):
    """A file of each kind, and splits of a data set; cells of a .csv are text."""
    rows = [KNOWN["ultrafeedback_binarized"][0] | {"number": i} for i in range(3)]
    want = [
        (r["prompt"], r["responses"], r["rewards"])
        for r in read_answers(write(tmp_path / "a.jsonl", rows))[1]
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    data = Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    DatasetDict({"train_prefs": data, "test_prefs": data.select([0])}).save_to_disk(tmp_path / "saved")
    with open(tmp_path / "a.csv", "w", newline="") as file:
        cells = csv.DictWriter(file, list(rows[0]))
        cells.writeheader()
        cells.writerows(
            {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows
        )
    for name in ("a.json", "a.parquet", "a.csv", "saved"):
        # A split is of data sets: files beside one have none.
        _, found = read_answers(tmp_path / name, "train_prefs")
        assert [(r["prompt"], r["responses"], r["rewards"]) for r in found] == want, name
    with pytest.raises(UserError, match="has no split 'train'; it has train_prefs, test_prefs"):
        read_answers(tmp_path / "saved")


CHOSEN = {"prompt": "2+2?", "chosen": "four", "rejected": "five"}
WRONG = [
    ({"chosen": "four"}, "no layout of preferences; its fields are prompt, chosen"),
    (CHOSEN | {"prompt": ""}, "it has no prompt"),
    (CHOSEN | {"chosen": 4}, "`chosen` is '4', a text or a list of messages"),
    (CHOSEN | {"chosen": ASKED}, "`chosen` does not end with the text of an assistant"),
    (CHOSEN | {"score_chosen": 1, "score_rejected": 2}, "score_chosen 1 is below score_rejected 2"),
    ({"chosen": EARLIER + FOUR, "rejected": ASKED + FIVE}, "answer different prompts"),
    ({"prompt": "a", "answers": [{"answer": "x"}]}, "no `rank`"),
    ({"prompt": "a", "answers": "x"}, "`answers` must be a list of answers"),
    ({"prompt": "a", "completions": [{"response": "x"}]}, "no completion has a number as overall_score"),
    ({"prompt": "a", "answers": [{"reply": "x", "rank": 1}]}, "no text in .*; its fields are reply, rank"),
    (
        {"prompt": "a", "response_1": "x", "response_2": "y", "preference": 1},
        "a number is read as preference_st",
    ),
    ({"instruction": "a", "input": "b", "chosen": "x", "rejected": "y"}, "join both in a column `prompt`"),
    ({"question": "a", "context": "b", "chosen": "x", "rejected": "y"}, "`context` that belongs to its `q"),
    (CHOSEN | {"prompt": " "}, "prompt: its last turn is empty"),
    ({"chosen": ASKED + FIVE + FOUR, "rejected": ASKED + FOUR + FIVE}, "`chosen` ends with two turns of the"),
    (
        CHOSEN | {"chosen": [FOUR[0] | {"tool_calls": [{"function": {}}]}]},
        "`chosen` ends with calls of tools",
    ),
]


@pytest.mark.parametrize(("record", "message"), WRONG)
def test_one_bad_record_is_one_bad_record(record, message, tmp_path):
    record = {"prompt": "2+2?"} | record if "layout" in message else record
    _, records = read_answers(write(tmp_path / "a.jsonl", [CHOSEN, record, CHOSEN]))
    good, bad, other = records
    assert isinstance(bad, BadRecord) and not isinstance(good, BadRecord) and good["id"] != other["id"]
    with pytest.raises(BadRecord, match=message + r".*\(record 2\)"):
        raise bad


def test_what_is_no_preference_names_its_fields(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "2+2?", "answer": "four"}])
    with pytest.raises(UserError, match=r"neither rewarded answers .* its fields are prompt, answer$"):
        read_answers(path)
    write(path, [CHOSEN | {"prompt": ""}] * 3)
    with pytest.raises(UserError, match="no preference that can be used; the first of 3: it has no prompt"):
        list(read_answers(path)[1])


def test_rewarded_answers_stay_what_they_are(tmp_path):
    row = {"id": "x", "prompt": ASKED, "responses": ["four", "five"], "rewards": [1.0, 0.5], "chosen": 0}
    read_as, records = read_answers(write(tmp_path / "a.jsonl", [row]))
    assert read_as == REWARDED and list(records) == [row]


def test_a_field_of_ours_in_another_meaning_is_left_out(tmp_path):
    """Pairs would take their entries, one for each response."""
    row = CHOSEN | {"stop_strings": 5, "response_sources": ["a"], "finish_reasons": [], "num_tokens": "x"}
    [record] = read_answers(write(tmp_path / "a.jsonl", [row]))[1]
    assert set(record) == {"id", "prompt", "responses", "rewards"}
