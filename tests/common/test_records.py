"""Records: reading every form of prompts, ids that survive reordering, shards that lose nothing."""

import importlib.util
import json

import pytest

from common.cli import UserError
from common.records import (
    BadRecord,
    Identifier,
    dumps,
    finite,
    read_generated,
    read_jsonl,
    read_prompts,
    read_records,
    read_rewarded,
    record_id,
    sample_seed,
    shard_range,
    to_messages,
)

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="datasets is not installed"
)


def user(text):
    return [{"role": "user", "content": text}]


def write(path, *rows, end="\n"):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text + end, encoding="utf-8", newline="\n")
    return str(path)


def refusal(call, *words):
    with pytest.raises(UserError) as caught:
        list(call())
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_ids_follow_the_prompt_not_its_place(tmp_path):
    rows = [{"prompt": text} for text in ("a", "b", "a", "c", "a")]
    ids = [p["id"] for p in read_prompts(write(tmp_path / "x.jsonl", *rows))]
    assert len(set(ids)) == 5
    assert (
        ids[0] == record_id(user("a"))
        and ids[2] == record_id(user("a"), 1)
        and ids[4] == record_id(user("a"), 2)
    )
    grown = [{"prompt": "new"}, *reversed(rows)]
    again = [p["id"] for p in read_prompts(write(tmp_path / "y.jsonl", *grown))]
    assert set(ids) < set(again)
    assert record_id(user("a")) != record_id([{"role": "system", "content": "a"}])


def test_a_twin_is_not_another_prompt():
    identify = Identifier()
    ids = [identify(user(text)) for text in ("1", "1", "11", "1")]
    assert len(set(ids)) == 4


def test_line_separators_stay_inside_strings(tmp_path):
    texts = ["one\u2028two", "next\x85line", "form\x0cfeed", "carriage\r\nreturn", "zero\x00byte"]
    path = write(tmp_path / "x.jsonl", *({"prompt": text} for text in texts))
    assert [p["prompt"][0]["content"] for p in read_prompts(path)] == texts
    written = "".join(dumps({"t": text}) + "\n" for text in texts)
    assert written.count("\n") == len(texts)


def test_a_torn_line_is_an_error_with_its_number(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "a"}, '{"prompt": "b', end="")
    refusal(lambda: read_jsonl(path), "line 2", "torn")
    path = write(tmp_path / "y.jsonl", {"prompt": "a"}, '{"prompt": "b', {"prompt": "c"})
    refusal(lambda: read_jsonl(path), "line 2", "not valid JSON")


def test_what_is_no_record_is_refused(tmp_path):
    refusal(lambda: read_jsonl(write(tmp_path / "a.jsonl", {"prompt": "a"}, "[1]")), "line 2", "list")
    refusal(lambda: read_jsonl(write(tmp_path / "b.jsonl", '{"prompt": "\\ud800"}')), "line 1", "surrogate")
    (tmp_path / "c.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    refusal(lambda: read_jsonl(tmp_path / "c.jsonl"), "not UTF-8")
    (tmp_path / "d.jsonl").write_text("")
    refusal(lambda: read_jsonl(tmp_path / "d.jsonl"), "empty")
    (tmp_path / "e.jsonl").write_text("\n\n")
    refusal(lambda: read_jsonl(tmp_path / "e.jsonl"), "empty")
    refusal(lambda: read_jsonl(tmp_path), "folder")
    (tmp_path / "f.json").write_text("[{]")
    refusal(lambda: read_jsonl(tmp_path / "f.json"), "not valid JSON")


def test_a_byte_order_mark_is_let_pass(tmp_path):
    for name, text in (("x.jsonl", b'{"prompt": "a"}\n'), ("x.json", b'[{"prompt": "a"}]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text)
        assert list(read_jsonl(tmp_path / name)) == [{"prompt": "a"}]


def test_json_lists_and_lines_are_both_read(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=1))
    assert [r["prompt"] for r in read_jsonl(tmp_path / "x.json")] == ["a", "b"]
    write(tmp_path / "y.json", {"prompt": "a"}, {"prompt": "b"})  # the seed writes JSON Lines under this name
    assert [r["prompt"] for r in read_jsonl(tmp_path / "y.json")] == ["a", "b"]


def test_the_nearest_namesake_is_offered(tmp_path):
    write(tmp_path / "gen_data.json", {"prompt": "a"})
    refusal(lambda: read_records(str(tmp_path / "gen_data.jsonl")), f"{tmp_path / 'gen_data.json'}")
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs" / "p.jsonl", {"prompt": "a"})
    refusal(lambda: read_records(str(tmp_path / "config" / "p.jsonl")), "configs")
    refusal(lambda: read_records("./no_such_place/x.jsonl"), "no such")
    write(tmp_path / "p.txt", "a")
    refusal(lambda: read_records(str(tmp_path / "p.txt")), ".jsonl", "hub")


@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"context_messages": user("a"), "prompt": "b"}, user("a")),
        ({"prompt": "b"}, user("b")),
        ({"messages": [*user("c"), {"role": "assistant", "content": "d"}]}, user("c")),
        (
            {"prompt": [{"role": "system", "content": "s"}, *user("e")]},
            [{"role": "system", "content": "s"}, *user("e")],
        ),
        ({"context_messages": None, "prompt": "f"}, user("f")),
    ],
)
def test_every_form_of_a_prompt(tmp_path, row, wanted):
    [record] = read_prompts(write(tmp_path / "x.jsonl", row))
    assert record["prompt"] == wanted


@pytest.mark.parametrize(
    "value",
    [
        [],
        3,
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        ["a"],
        [{"role": "assistant", "content": "a"}],
        [*user("a"), {"role": "system", "content": "b"}],
    ],
)
def test_what_is_no_prompt_is_refused(value):
    with pytest.raises(UserError, match="^place"):
        to_messages(value, "place")


def test_extra_fields_key_and_system_prompt(tmp_path):
    path = write(tmp_path / "x.jsonl", {"question": "a", "id": 7, "gold": [1, 2], "prompt": "no"})
    [record] = read_prompts(path, key="question", system_prompt="s")
    assert record["source_id"] == 7 and record["gold"] == [1, 2]
    assert record["prompt"] == [{"role": "system", "content": "s"}, *user("a")]
    assert record["id"] == record_id(record["prompt"])
    refusal(lambda: read_prompts(path, key="questions"), "questions", "'question'", "--dataset_key")


@needs_datasets
def test_csv_parquet_and_saved_folders(tmp_path):
    import datasets

    rows = [{"prompt": f"question {i}", "n": i} for i in range(5)]
    data = datasets.Dataset.from_list(rows)
    data.to_csv(str(tmp_path / "x.csv"))
    data.to_parquet(str(tmp_path / "x.parquet"))
    data.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "splits"))
    expected = [user(row["prompt"]) for row in rows]
    for name in ("x.csv", "x.parquet", "plain", "splits"):
        assert [p["prompt"] for p in read_prompts(str(tmp_path / name))] == expected, name
    assert len(list(read_prompts(str(tmp_path / "splits"), split="test"))) == 1
    refusal(lambda: read_prompts(str(tmp_path / "splits"), split="dev"), "train, test", "--dataset_split")
    (tmp_path / "broken.parquet").write_text("no parquet")
    refusal(lambda: read_records(str(tmp_path / "broken.parquet")), "cannot read")


@pytest.mark.parametrize("count", [0, 1, 7, 103])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_shards_are_contiguous_even_and_whole(count, world):
    shards = [shard_range(count, i, world) for i in range(world)]
    assert [i for shard in shards for i in shard] == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_seeds_are_spaced_and_depend_on_all_three():
    seeds = {
        sample_seed(run, iteration, name)
        for run in (0, 1)
        for iteration in (0, 1)
        for name in map(str, range(500))
    }
    assert len(seeds) == 2000
    assert all(seed % 1024 == 0 and 0 <= seed < 2**62 for seed in seeds)
    assert sample_seed(1, 2, "ab") == sample_seed(1, 2, "ab")


def test_finite_and_dumps():
    assert finite(0) and finite(-1.5) and not any(map(finite, (None, True, "1", float("nan"), float("inf"))))
    with pytest.raises(ValueError):
        dumps({"reward": float("nan")})


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
    message = refusal(lambda: read_rewarded(path), f"{path} record 2", *words)
    good, bad = read_rewarded(path, keep_bad=True)
    assert good == ANSWERED and isinstance(bad, BadRecord) and str(bad) == message
