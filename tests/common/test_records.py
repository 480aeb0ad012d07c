"""Records: every form of a prompt, ids that survive reordering, whole shards, answers in one form."""

import json

import pytest
from reading import TALK, TOOLS, prompts_of, refusal, user, write

from common.cli import UserError
from common.messages import to_messages, to_tools
from common.records import (
    BadRecord,
    Identifier,
    finite,
    read_generated,
    read_prompts,
    read_records,
    read_rewarded,
    record_id,
    sample_seed,
    shard_range,
)
from dpo_iteration.pairs import make_pairs


def test_ids_follow_the_prompt_not_its_place(tmp_path):
    rows = [{"prompt": text} for text in ("a", "b", "a", "c", "a")]
    ids = [p["id"] for p in read_prompts(write(tmp_path / "x.jsonl", *rows))]
    assert len(set(ids)) == 5
    assert [ids[0], ids[2], ids[4]] == [record_id(user("a"), twin) for twin in (0, 1, 2)]
    grown = [{"prompt": "new"}, *reversed(rows)]
    again = [p["id"] for p in read_prompts(write(tmp_path / "y.jsonl", *grown))]
    assert set(ids) < set(again)
    assert record_id(user("a")) != record_id([{"role": "system", "content": "a"}])
    assert record_id(user("a")) == "538f336cb738c0f5"  # runs of before can be continued
    identify = Identifier()  # a twin is not another prompt
    assert len({identify(user(text)) for text in ("1", "1", "11", "1")}) == 4


def test_a_name_that_is_no_file(tmp_path):
    write(tmp_path / "gen_data.json", {"prompt": "a"})
    refusal(tmp_path / "gen_data.jsonl", f"there is {tmp_path / 'gen_data.json'}", read=read_records)
    write(tmp_path / "p.txt", "a")
    refusal(tmp_path / "p.txt", ".jsonl", "hub", read=read_records)


def gpt(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "s"}
PARTS = [{"type": "text", "text": "Is 3 "}, {"type": "text", "text": "even?"}]


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"context_messages": user("a"), "prompt": "b"}, user("a")),
        ({"context_messages": None, "prompt": "f"}, user("f")),
        ({"messages": [*user("c"), gpt("d")]}, user("c")),
        ({"prompt": [SYSTEM, *user("e")]}, [SYSTEM, *user("e")]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, user("a")),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]},
            [SYSTEM, *user("a")],
        ),
        ({"messages": [{"role": "user", "content": PARTS}]}, user("Is 3 even?")),
        ({"messages": [user("a")[0] | {"name": None, "tool_calls": []}]}, user("a")),
    ],
)
def test_every_form_of_a_prompt(tmp_path, row, wanted):
    [record] = read_prompts(write(tmp_path / "x.jsonl", row))
    assert record["prompt"] == wanted and record["id"] == record_id(wanted)


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    "value, told",
    [
        ([], "a prompt is a string or a list of messages"),
        (3, "a prompt is a string or a list of messages"),
        (["a"], "a message is"),
        ([{"role": "user"}], "a message is"),
        ([gpt(None), *user("a")], "a message is"),
        ([gpt("a")], "the last turn of a prompt must be the user's"),
        ([*user("a"), SYSTEM], "the last turn of a prompt must be the user's"),
        ([{"from": "bing", "value": "a"}], "'bing'"),
        ([{"role": "user", "content": [IMAGE]}], "'image_url'"),
    ],
)
def test_what_is_no_prompt_is_refused(value, told):
    with pytest.raises(UserError, match=f"^place: .*{told}"):
        to_messages(value, "place")


@pytest.mark.parametrize(
    "row, told",
    [
        ({"instruction": "Translate.", "input": "chat", "output": "cat"}, "--dataset_key instruction"),
        ({"chosen": "a", "rejected": "b"}, "is an answer"),
        ({"chosen": user("a"), "rejected": user("b")}, "--dataset_key chosen"),
        ({"promt": "a"}, "--dataset_key"),
    ],
)
def test_sets_of_another_form_are_refused_with_the_remedy(tmp_path, row, told):
    columns = "context_messages or messages or prompt or conversations"
    refusal(write(tmp_path / "x.jsonl", {"n": 1} | row), f"record 1 has no {columns}", told)


def test_extra_fields_key_and_system_prompt(tmp_path):
    path = write(tmp_path / "x.jsonl", {"question": "a", "id": 7, "gold": [1, 2], "prompt": "no"})
    [record] = prompts_of(path, dataset_key="question", system_prompt="s")
    assert record["source_id"] == 7 and record["gold"] == [1, 2]
    assert record["prompt"] == [SYSTEM, *user("a")] and record["id"] == record_id(record["prompt"])
    refusal(path, "questions", "'question'", "--dataset_key", dataset_key="questions")
    refusal(write(tmp_path / "y.jsonl", {"messages": user("")}), "record 1: its last turn is empty")


def test_text_that_begins_like_a_list_stays_text_in_columns_of_other_names(tmp_path):
    texts = ["[INST] hello", "[1, 2] summed?"]
    path = write(tmp_path / "x.jsonl", *({"q": text} for text in [*texts, json.dumps(user("as JSON"))]))
    assert [r["prompt"] for r in prompts_of(path, dataset_key="q")] == [
        *map(user, texts),
        user("as JSON"),
    ]


def test_an_alpaca_record_with_an_input_is_not_cut_in_half(tmp_path):
    rows = [{"instruction": "Sing.", "input": ""}, {"instruction": "Translate.", "input": "chat"}]
    path = write(tmp_path / "x.jsonl", *rows)
    whole, half = prompts_of(path, dataset_key="instruction", keep_bad=True)
    assert whole["prompt"] == user("Sing.") and "record 2" in str(half) and "`input`" in str(half)


def test_fields_of_messages_and_tools_are_kept_and_enter_the_id(tmp_path):
    tools = [TOOLS, json.dumps(TOOLS), "[]", None]
    path = write(tmp_path / "x.jsonl", *({"messages": TALK, "tools": value} for value in tools))
    found = list(read_prompts(path))
    assert all(record["prompt"] == TALK for record in found)
    assert [record.get("tools") for record in found] == [TOOLS, TOOLS, None, None]
    ids = [record_id(TALK, 0, TOOLS), record_id(TALK, 1, TOOLS), record_id(TALK), record_id(TALK, 1)]
    assert [r["id"] for r in found] == ids and len(set(ids)) == 4
    assert record_id([{"role": m["role"], "content": m["content"]} for m in TALK]) not in ids


def test_what_is_no_list_of_tools_is_refused():
    assert to_tools([json.dumps(tool) for tool in TOOLS], "place") == TOOLS
    for value in ("hammer", ["hammer"], {"name": "x"}, 5):
        with pytest.raises(UserError, match="^place: `tools` must be"):
            to_tools(value, "place")


@pytest.mark.parametrize("count", [0, 1, 7, 103])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_shards_are_contiguous_even_and_whole(count, world):
    shards = [shard_range(count, i, world) for i in range(world)]
    assert [i for shard in shards for i in shard] == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_seeds_are_spaced_and_depend_on_all_three():
    of = [(run, i, str(name)) for run in (0, 1) for i in (0, 1) for name in range(500)]
    seeds = {sample_seed(*three) for three in of}
    assert len(seeds) == 2000 and all(seed % 1024 == 0 and 0 <= seed < 2**62 for seed in seeds)
    assert sample_seed(1, 2, "ab") == sample_seed(1, 2, "ab")


def test_finite():
    assert finite(0) and finite(-1.5) and not any(map(finite, (None, True, "1", float("nan"), float("inf"))))


ANSWERED = {"id": "x", "prompt": user("a"), "responses": ["b", ""], "rewards": [1, None], "n": 7}


def test_generated_and_rewarded_records_have_one_form(tmp_path):
    rows = [ANSWERED, {"prompt": "a", "responses": ["b"], "id": 7, "rewards": [float("nan")]}]
    path = write(tmp_path / "x.jsonl", *rows, {"prompt": "a", "responses": ["c"], "rewards": [2.5]})
    for read in (read_generated, read_rewarded):
        whole, other, twin = read(path)
        assert whole == ANSWERED and other["prompt"] == user("a") and other["source_id"] == 7
        assert other["id"] == record_id(user("a")) and twin["id"] == record_id(user("a"), 1)


@pytest.mark.parametrize("change, words", [
    ({"prompt": ...}, ["has no `prompt`", "get_hf2.py", "it has id, responses"]),
    ({"responses": ..., "respones": ["a"]}, ["has no `responses`, did you mean 'respones'?", "get_hf2.py"]),
    ({"rewards": ...}, ["has no `rewards`", "get_rewards.py"]),
    ({"responses": []}, ["must be a list of texts"]),
    ({"responses": ["a", 1]}, ["must be a list of texts"]),
    ({"rewards": [1.0]}, ["2 responses and 1 rewards"]),
    ({"rewards": None}, ["`rewards` must be a list"]),
    ({"rewards": ["1", "2"]}, ["`rewards` is ['1', '2']"]),
    ({"num_tokens": [1.5, 2]}, ["`num_tokens` is [1.5, 2]"]),
    ({"finish_reasons": "stop"}, ["`finish_reasons` must be a list"]),
    ({"response_token_ids": [[1]]}, ["2 responses and 1 response_token_ids"]),
    ({"tools": 3}, ["`tools`"]),
])  # fmt: skip
def test_a_rewarded_record_that_cannot_be_used(tmp_path, change, words):
    row = {key: value for key, value in (ANSWERED | change).items() if value is not ...}
    path = write(tmp_path / "x.jsonl", ANSWERED, row)
    message = refusal(path, f"{path} record 2", *words, read=read_rewarded)
    good, bad = read_rewarded(path, keep_bad=True)
    assert good == ANSWERED and isinstance(bad, BadRecord) and str(bad) == message


def test_a_number_called_num_tokens_passes_training_as_it_passes_annotation(tmp_path):
    row = {"id": "x", "prompt": "a", "responses": ["b", "c"], "rewards": [1.0, 2.0], "num_tokens": 57}
    [record] = read_rewarded(write(tmp_path / "x.jsonl", row))
    [pair], reason, _ = make_pairs(record, "max_min_p", 0.1, count_tokens=len)
    assert reason is None and pair["chosen_index"] == 1 and pair["chosen_num_tokens"] == 1
