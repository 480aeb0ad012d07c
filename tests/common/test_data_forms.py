"""Prompts in the forms that people have them: cells of tables, lists and lines, folders from the hub,
conversations of other projects.
"""

import csv
import gzip
import json

import pytest

from common.cli import UserError
from common.manifest import fingerprint, same_content
from common.messages import to_messages, to_tools
from common.records import BadRecord, read_jsonl, read_prompts, read_records, record_id


def user(text):
    return [{"role": "user", "content": text}]


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refusal(name, *words, **more):
    with pytest.raises(UserError) as caught:
        list(read_prompts(str(name), **more))
    for word in words:
        assert word in str(caught.value)


CELLS = [
    "null",
    "NA",
    "None",
    "nan",
    "yes",
    "007",
    "1e5",
    "2026-01-02",
    "",
    "-",
    "true",
    "a, b",
    'say "hi"',
    "two\nlines",
    " padded ",
    "1.10",
    "x" * 200_000,
]


@pytest.mark.parametrize(
    "name, delimiter", [("x.csv", ","), ("x.tsv", "\t"), ("x.csv", ";"), ("x.csv", "\t")]
)
def test_cells_stay_what_they_are(tmp_path, name, delimiter):
    with open(
        tmp_path / name, "w", newline="", encoding="utf-8-sig"
    ) as file:  # with a byte order mark, as Excel writes it
        csv.writer(file, delimiter=delimiter).writerows(
            [["prompt", "answer"], *((f"question {i}", cell) for i, cell in enumerate(CELLS))]
        )
    assert [record["answer"] for record in read_prompts(str(tmp_path / name))] == CELLS


def test_words_for_nothing_are_prompts(tmp_path):
    (tmp_path / "x.csv").write_text("prompt\nnull\nNA\n42\n")
    assert [r["prompt"] for r in read_prompts(str(tmp_path / "x.csv"))] == [
        user("null"),
        user("NA"),
        user("42"),
    ]


def test_rows_of_another_width_are_named(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,answer\na,b\nWell, is it?,yes\nc\n\nd,e\n")
    found = list(read_prompts(str(tmp_path / "x.csv"), keep_bad=True))
    assert [isinstance(record, BadRecord) for record in found] == [False, True, True, False]
    assert "record 2 (line 3) has 3 cells, the header has 2" in str(found[1]) and "double quotes" in str(
        found[1]
    )
    for text, word in (
        ("prompt,prompt\na,b\n", "several columns 'prompt'"),
        ("prompt\n", "is empty"),
        ("", "is empty"),
        ('prompt\n"a\n', "behind line"),
    ):
        (tmp_path / "y.csv").write_text(text)
        refusal(tmp_path / "y.csv", word)
    (tmp_path / "y.csv").write_bytes("prompt\nGrüße\n".encode("latin-1"))
    refusal(tmp_path / "y.csv", "not UTF-8")


def test_text_that_begins_like_a_list_stays_text_in_columns_of_other_names(tmp_path):
    lines(
        tmp_path / "x.jsonl",
        {"q": "[INST] hello"},
        {"q": "[1, 2] summed?"},
        {"q": json.dumps(user("as JSON"))},
    )
    assert [r["prompt"] for r in read_prompts(str(tmp_path / "x.jsonl"), key="q")] == [
        user("[INST] hello"),
        user("[1, 2] summed?"),
        user("as JSON"),
    ]


def test_lists_and_packed_files(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    forms = {
        "a.json": "\n  \ufeff".replace("\ufeff", "") + json.dumps(rows),
        "b.json": json.dumps(rows, indent=2),
        "c.jsonl": json.dumps(rows),
        "d.json": "\ufeff\n\t" + json.dumps(rows),
        "e.ndjson": '{"prompt": "a"}\n\n{"prompt": "b"}',
        "f.json": '{"prompt": "a"}\n{"prompt": "b"}\n',
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        assert (
            list(read_records(str(tmp_path / name)))
            == list(read_records(str(tmp_path / f"{name}.gz")))
            == rows
        ), name
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b"prompt\na\nb\n"))
    assert list(read_records(str(tmp_path / "x.csv.gz"))) == rows
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n')[:-9])
    refusal(tmp_path / "y.jsonl.gz", "cannot be unpacked")
    (tmp_path / "z.jsonl.gz").write_text("not packed")
    refusal(tmp_path / "z.jsonl.gz", "cannot be unpacked")


@pytest.mark.parametrize(
    "text, word",
    [
        (json.dumps({"data": [{"prompt": "a"}]}), "under 'data'"),
        (json.dumps({"data": [{"prompt": "a"}]}, indent=1), "under 'data'"),
        (json.dumps({"version": 1}, indent=1), "one JSON object"),
        ('{\n"prompt": "a"\n}\n{\n"prompt": "b"\n}\n', "several lines each"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        ("[]", "empty"),
    ],
)
def test_json_of_another_shape_is_refused_with_the_remedy(tmp_path, text, word):
    (tmp_path / "x.json").write_text(text)
    refusal(tmp_path / "x.json", word)


def test_a_split_of_a_file_is_refused(tmp_path):
    for name, text in (("x.jsonl", '{"prompt": "a"}\n'), ("x.csv", "prompt\na\n")):
        (tmp_path / name).write_text(text)
        refusal(tmp_path / name, "no splits", "--dataset_split test", split="test")


@pytest.mark.parametrize(
    "turns, wanted",
    [
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], user("a")),
        (
            [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}],
            [{"role": "system", "content": "s"}, *user("a")],
        ),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Is 3 "}, {"type": "text", "text": "even?"}],
                }
            ],
            user("Is 3 even?"),
        ),
        ([{"role": "user", "content": "a", "name": None, "tool_calls": None}], user("a")),
        ([{"role": "user", "content": "a", "tool_calls": []}], user("a")),
    ],
)
def test_other_projects_conversations(tmp_path, turns, wanted):
    [record] = read_prompts(lines(tmp_path / "x.jsonl", {"conversations": turns}))
    assert record["prompt"] == wanted and record["id"] == record_id(wanted)


@pytest.mark.parametrize(
    "turns, word",
    [
        ([{"from": "bing", "value": "a"}], "'bing'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "'image_url'"),
        (
            [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "a"}]}],
            "'image'",
        ),
        ([{"role": "assistant", "content": None}, *user("a")], "a message is"),
        ([{"role": "user", "content": ""}], "last turn is empty"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, turns, word):
    refusal(lines(tmp_path / "x.jsonl", {"messages": turns}), "record 1", word)


@pytest.mark.parametrize(
    "row, word",
    [
        ({"instruction": "Translate.", "input": "chat", "output": "cat"}, "--dataset_key instruction"),
        ({"chosen": "a", "rejected": "b"}, "is an answer"),
        ({"chosen": user("a"), "rejected": user("b")}, "--dataset_key chosen"),
        ({"conversation": user("a")}, "--dataset_key conversation"),
        ({"promt": "a"}, "--dataset_key"),
    ],
)
def test_sets_of_another_form_are_refused_with_the_remedy(tmp_path, row, word):
    refusal(
        lines(tmp_path / "x.jsonl", {"n": 1} | row),
        "record 1 has no context_messages or messages or prompt or conversations",
        word,
    )


def test_an_alpaca_record_with_an_input_is_not_cut_in_half(tmp_path):
    path = lines(
        tmp_path / "x.jsonl",
        {"instruction": "Sing.", "input": ""},
        {"instruction": "Translate.", "input": "chat"},
    )
    found = list(read_prompts(path, key="instruction", keep_bad=True))
    assert found[0]["prompt"] == user("Sing.") and "record 2" in str(found[1]) and "`input`" in str(found[1])


def test_bad_records_stand_in_their_places(tmp_path):
    deep = '{"prompt": "a", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}"
    bad = [
        "[1]",
        '{"prompt": "\\ud800"}',
        deep,
        '{"prompt": 5}',
        "no JSON",
        '{"prompt": null}',
        '{"other": "a"}',
        '{"prompt": "a", "tools": "hammer"}',
    ]
    (tmp_path / "x.jsonl").write_text(
        "".join(f"{line}\n" for line in ['{"prompt": "a"}', *bad, '{"prompt": "b"}'])
    )
    found = list(read_prompts(str(tmp_path / "x.jsonl"), keep_bad=True))
    assert [isinstance(record, BadRecord) for record in found] == [False, *[True] * len(bad), False]
    assert all(
        f"line {n}" in str(record) or f"record {n}" in str(record) for n, record in enumerate(found[1:-1], 2)
    )
    assert len({record.id for record in found[1:-1]}) == len(bad)
    (tmp_path / "y.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": "b'
    )  # torn: the file is not whole, and so is no record's fault
    with pytest.raises(UserError, match="torn"):
        list(read_prompts(str(tmp_path / "y.jsonl"), keep_bad=True))
    with pytest.raises(UserError, match="holds no prompt that can be used; the first of 2: .*record 1"):
        list(read_prompts(lines(tmp_path / "z.jsonl", {"prompt": 1}, {"prompt": 2}), keep_bad=True))
    with pytest.raises(
        UserError, match="record 1 has no"
    ):  # no prompt's fault: the column is called otherwise
        list(read_prompts(lines(tmp_path / "z.jsonl", {"question": "a"}, {"prompt": "b"}), keep_bad=True))


# ---- Tools -------------------------------------------------------------------------------------------------

CALL = [
    {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Oslo", "unit": None}},
    }
]
TALK = [
    *user("Weather in Oslo?"),
    {"role": "assistant", "content": None, "tool_calls": CALL},
    {"role": "tool", "tool_call_id": "c1", "content": "4 degrees"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def test_fields_of_messages_and_tools_are_kept_and_enter_the_id(tmp_path):
    rows = [
        {"messages": TALK, "tools": TOOLS},
        {"messages": TALK, "tools": json.dumps(TOOLS)},
        {"messages": TALK, "tools": "[]"},
        {"messages": TALK},
    ]
    found = list(read_prompts(lines(tmp_path / "x.jsonl", *rows)))
    assert all(record["prompt"] == TALK for record in found)
    assert [record.get("tools") for record in found] == [TOOLS, TOOLS, None, None]
    assert [r["id"] for r in found] == [
        record_id(TALK, 0, TOOLS),
        record_id(TALK, 1, TOOLS),
        record_id(TALK),
        record_id(TALK, 1),
    ]
    plain = [{"role": m["role"], "content": m["content"]} for m in TALK]
    assert len({record_id(TALK), record_id(TALK, tools=TOOLS), record_id(plain)}) == 3
    assert (
        record_id(user("a")) == "538f336cb738c0f5"
    )  # of plain messages it is what it was: runs can be continued


def test_what_is_no_list_of_tools_is_refused():
    assert to_tools([json.dumps(tool) for tool in TOOLS], "place") == TOOLS
    for value in ("hammer", ["hammer"], {"name": "x"}, 5):
        with pytest.raises(UserError, match="^place: `tools` must be"):
            to_tools(value, "place")
    with pytest.raises(UserError, match="last turn"):
        to_messages([*TALK[:2], {"role": "system", "content": "a"}], "place")


# ---- Tables and data sets ----------------------------------------------------------------------------------


def test_parquet_has_no_nulls_for_fields_that_other_rows_have(tmp_path):
    datasets = pytest.importorskip("datasets")
    other = {"name": "time", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function", "function": other}]},
        {"messages": TALK, "tools": TOOLS},
    ]
    rows[0]["messages"][0]["name"] = "Bob"
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    found = list(read_prompts(str(tmp_path / "x.parquet")))
    calls = json.loads(json.dumps(CALL))
    del calls[0]["function"]["arguments"][
        "unit"
    ]  # null in every row: not told from a field that is not there
    assert found[0]["prompt"] == rows[0]["messages"] and found[0]["tools"] == rows[0]["tools"]
    assert (
        found[1]["prompt"] == [TALK[0], TALK[1] | {"tool_calls": calls}, TALK[2]]
        and found[1]["tools"] == TOOLS
    )


def folder(path, files, readme="---\nlicense: mit\n---\n"):
    """A data set's repository as it is cloned: README.md and files; `files` maps a name to rows or to
    text.
    """
    datasets = pytest.importorskip("datasets")
    (path / ".git").mkdir(parents=True)
    (path / "README.md").write_text(readme)
    for name, rows in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(rows, str):
            (path / name).write_text(rows)
        elif name.endswith(".parquet"):
            datasets.Dataset.from_list(rows).to_parquet(str(path / name))
        else:
            lines(path / name, *rows)
    return str(path)


def texts(name, **more):
    return [record["prompt"][-1]["content"] for record in read_prompts(name, **more)]


def rows_of(*names):
    return [{"prompt": name} for name in names]


@pytest.mark.parametrize(
    "form, write",
    [
        ("parquet", list),
        ("jsonl", list),
        ("csv", lambda rows: "prompt\n" + "\n".join(r["prompt"] for r in rows) + "\n"),
    ],
)
def test_a_cloned_folder(tmp_path, form, write):
    files = {
        f"data/train-00000-of-00002.{form}": write(rows_of("NA", "007")),
        f"data/train-00001-of-00002.{form}": write(rows_of("c")),
    }
    name = folder(tmp_path / "set", files | {f"data/test-00000-of-00001.{form}": write(rows_of("t"))})
    assert texts(name) == ["NA", "007", "c"] and texts(name, split="test") == ["t"]
    refusal(name, "train, test", "--dataset_split", split="dev")
    mark = fingerprint(name)
    (tmp_path / "set" / "data" / f"test-00000-of-00001.{form}").write_bytes(b"other")
    assert not same_content(mark, name)


def test_folders_named_after_splits(tmp_path):
    name = folder(tmp_path / "set", {"train/a.jsonl": rows_of("a"), "test/b.jsonl": rows_of("b")})
    assert texts(name) == ["a"] and texts(name, split="test") == ["b"]
    only = folder(tmp_path / "only", {"data/test.jsonl": rows_of("a")})
    refusal(only, "no split 'train'", "it has test")


def test_one_of_several_configurations(tmp_path):
    readme = (
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/*.jsonl\n"
            for c in ("main", "other")
        )
        + "---\n"
    )
    name = folder(tmp_path / "set", {"main/x.jsonl": rows_of("a"), "other/x.jsonl": rows_of("b")}, readme)
    assert texts(f"{name}:main") == ["a"] and texts(f"{name}:other") == ["b"]
    refusal(name, "main", "other", f"{name}:NAME")
    refusal(f"{name}:third", "main", f"{name}:NAME")
    mark = fingerprint(f"{name}:main")
    lines(tmp_path / "set" / "main" / "x.jsonl", *rows_of("changed"))
    assert not same_content(mark, f"{name}:main")


def test_json_lines_of_a_folder_keep_their_fields(tmp_path):
    """`datasets` would make one type of all rows' tools, and fill in what others have."""
    rows = [
        {"messages": TALK, "tools": TOOLS, "gold": {"a": 1}},
        {"messages": user("b"), "gold": {"b": None}},
    ]
    found = list(read_prompts(folder(tmp_path / "set", {"train.jsonl": rows})))
    assert (
        found[0]["prompt"] == TALK
        and found[0]["tools"] == TOOLS
        and [r["gold"] for r in found] == [{"a": 1}, {"b": None}]
    )


def test_folders_that_hold_no_data_are_refused(tmp_path):
    refusal(folder(tmp_path / "set", {}), "cannot read")
    name = folder(
        tmp_path / "lfs",
        {"data/train-0.parquet": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"},
    )
    refusal(name, "Git LFS", "git lfs pull")
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows_of("a")).save_to_disk(str(tmp_path / "saved"))
    assert texts(str(tmp_path / "saved")) == ["a"]
    refusal(tmp_path / "saved", "no splits", split="test")


def test_a_generated_file_may_be_packed(tmp_path):
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(b'{"id": "a"}\n'))
    assert list(read_jsonl(tmp_path / "g.jsonl.gz")) == [{"id": "a"}]
