"""common/tables.py: tables and data sets' folders as people have them."""

import copy
import csv
import datetime
import gzip
import json

import pytest
from reading import TALK, TOOLS, prompts_of, refusal, tool, user, write

from common.manifest import fingerprint, same_content
from common.records import BadRecord, read_prompts, read_records

datasets = pytest.importorskip("datasets")

CELLS = ["null", "NA", "None", "nan", "yes", "007", "1e5", "2026-01-02", "", "-", "true", "a, b"]
CELLS += ['say "hi"', "two\nlines", " padded ", "1.10", "x" * 200_000]


@pytest.mark.parametrize("name, delimiter", [("x.csv", ","), ("x.tsv", "\t"), ("x.csv", ";")])
def test_cells_stay_what_they_are(tmp_path, name, delimiter):
    # with a byte order mark, as Excel writes it
    with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
        rows = [["prompt", "answer"], *((f"question {i}", cell) for i, cell in enumerate(CELLS))]
        csv.writer(file, delimiter=delimiter).writerows(rows)
    assert [record["answer"] for record in read_prompts(str(tmp_path / name))] == CELLS


def test_words_for_nothing_are_prompts(tmp_path):
    text = "prompt\nnull\nNA\n42\n"
    (tmp_path / "x.csv").write_text(text)
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("x.csv", "x.csv.gz"):
        assert texts(str(tmp_path / name)) == ["null", "NA", "42"]


def test_rows_of_another_width_are_named(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,answer\na,b\nWell, is it?,yes\nc\n\nd,e\n")
    found = list(read_prompts(str(tmp_path / "x.csv"), keep_bad=True))
    assert [isinstance(record, BadRecord) for record in found] == [False, True, True, False]
    assert "record 2 (line 3) has 3 cells, the header has 2" in str(found[1])
    assert "double quotes" in str(found[1])


@pytest.mark.parametrize(
    "data, told",
    [
        (b"prompt,prompt\na,b\n", "several columns 'prompt'"),
        (b"prompt\n", "is empty"),
        (b"", "is empty"),
        (b'prompt\n"a\n', "behind line"),
        ("prompt\nGrüße\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_what_is_no_table(tmp_path, data, told):
    (tmp_path / "y.csv").write_bytes(data)
    refusal(tmp_path / "y.csv", told)


def test_lists_of_messages_in_a_csv(tmp_path):
    turns = user('say "hi", please')
    with open(tmp_path / "p.csv", "w", newline="") as file:
        csv.writer(file).writerows([["context_messages"], [json.dumps(turns)], ["a plain text"]])
    assert [r["prompt"] for r in read_prompts(str(tmp_path / "p.csv"))] == [turns, user("a plain text")]
    python = "context_messages\n\"[{'role': 'user', 'content': 'as Python writes it'}]\"\n"
    (tmp_path / "q.csv").write_text(python)
    refusal(tmp_path / "q.csv", "record 1: context_messages is no JSON list")


def test_a_split_of_a_file_is_refused(tmp_path):
    for name, text in (("x.jsonl", '{"prompt": "a"}\n'), ("x.csv", "prompt\na\n")):
        (tmp_path / name).write_text(text)
        refusal(tmp_path / name, "no splits", "--dataset_split test", dataset_split="test")


# ---- Parquet and folders -----------------------------------------------------------------------------------


def test_parquet_and_saved_folders(tmp_path):
    data = datasets.Dataset.from_list([{"prompt": f"question {i}", "n": i} for i in range(5)])
    data.to_parquet(str(tmp_path / "x.parquet"))
    data.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "splits"))
    for name in ("x.parquet", "plain", "splits"):
        assert texts(str(tmp_path / name)) == data["prompt"], name
    assert texts(str(tmp_path / "splits"), dataset_split="test") == ["question 0"]
    refusal(tmp_path / "splits", "train, test", "--dataset_split", dataset_split="dev")
    refusal(tmp_path / "plain", "no splits", dataset_split="test")
    (tmp_path / "broken.parquet").write_text("no parquet")
    refusal(tmp_path / "broken.parquet", "cannot read", read=read_records)


def test_what_json_does_not_know_is_carried_through_as_null_or_text(tmp_path):
    days = [datetime.datetime(2026, 1, 2), datetime.datetime(2026, 1, 3)]
    rows = {"prompt": ["a", "b"], "score": [float("nan"), 1.5], "day": days}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "p.parquet"))
    found = list(read_prompts(str(tmp_path / "p.parquet")))
    assert [r["score"] for r in found] == [None, 1.5] and found[0]["day"].startswith("2026-01-02")


def test_parquet_has_no_nulls_for_fields_that_other_rows_have(tmp_path):
    named = [{"role": "user", "content": "Hi", "name": "Bob"}]
    rows = [{"messages": named, "tools": [tool("time", "zone")]}, {"messages": TALK, "tools": TOOLS}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    first, second = read_prompts(str(tmp_path / "x.parquet"))
    assert (first["prompt"], first["tools"], second["tools"]) == (named, [tool("time", "zone")], TOOLS)
    talk = copy.deepcopy(TALK)  # null in every row: not told from a field that is not there
    del talk[1]["tool_calls"][0]["function"]["arguments"]["unit"]
    assert second["prompt"] == talk


def test_parquet_tables_that_cannot_be_read_say_why(tmp_path):
    import pyarrow
    import pyarrow.parquet

    empty = pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})
    twice = pyarrow.Table.from_arrays([pyarrow.array([text]) for text in "ab"], names=["prompt", "prompt"])
    for table, told in ((empty, "is empty"), (twice, "prompt")):
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        assert "DatasetGenerationError" not in refusal(tmp_path / "x.parquet", told)


def folder(path, files, readme="---\nlicense: mit\n---\n"):
    """A data set's repository as it is cloned: README.md and files; `files` maps a name to rows or to
    text.
    """
    (path / ".git").mkdir(parents=True)
    (path / "README.md").write_text(readme)
    for name, rows in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(rows, str):
            (path / name).write_text(rows)
        elif name.endswith(".parquet"):
            datasets.Dataset.from_list(rows).to_parquet(str(path / name))
        else:
            write(path / name, *rows)
    return str(path)


def texts(name, **more):
    return [record["prompt"][-1]["content"] for record in prompts_of(name, **more)]


def rows_of(*names):
    return [{"prompt": name} for name in names]


def as_csv(rows):
    return "prompt\n" + "\n".join(row["prompt"] for row in rows) + "\n"


@pytest.mark.parametrize("form, written", [("parquet", list), ("jsonl", list), ("csv", as_csv)])
def test_a_cloned_folder(tmp_path, form, written):
    files = {
        f"data/train-00000-of-00002.{form}": written(rows_of("NA", "007")),
        f"data/train-00001-of-00002.{form}": written(rows_of("c")),
        f"data/test-00000-of-00001.{form}": written(rows_of("t")),
    }
    name = folder(tmp_path / "set", files)
    assert texts(name) == ["NA", "007", "c"] and texts(name, dataset_split="test") == ["t"]
    refusal(name, "train, test", "--dataset_split", dataset_split="dev")
    mark = fingerprint(name)
    (tmp_path / "set" / "data" / f"test-00000-of-00001.{form}").write_bytes(b"other")
    assert not same_content(mark, name)


def test_folders_named_after_splits(tmp_path):
    name = folder(tmp_path / "set", {"train/a.jsonl": rows_of("a"), "test/b.jsonl": rows_of("b")})
    assert texts(name) == ["a"] and texts(name, dataset_split="test") == ["b"]
    only = folder(tmp_path / "only", {"data/test.jsonl": rows_of("a")})
    refusal(only, "no split 'train'", "it has test")


def test_one_of_several_configurations(tmp_path):
    form = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}/*.jsonl\n"
    readme = f"---\nconfigs:\n{form.format('main')}{form.format('other')}---\n"
    name = folder(tmp_path / "set", {"main/x.jsonl": rows_of("a"), "other/x.jsonl": rows_of("b")}, readme)
    assert texts(f"{name}:main") == ["a"] and texts(f"{name}:other") == ["b"]
    refusal(name, "main", "other", f"{name}:NAME")
    refusal(f"{name}:third", "main", f"{name}:NAME")
    mark = fingerprint(f"{name}:main")
    write(tmp_path / "set" / "main" / "x.jsonl", *rows_of("changed"))
    assert not same_content(mark, f"{name}:main")


def test_json_lines_of_a_folder_keep_their_fields(tmp_path):
    """`datasets` would make one type of all rows' fields, and fill in what others have."""
    rows = [{"prompt": "a", "gold": {"a": 1}}, {"prompt": "b", "gold": {"b": None}}]
    found = read_prompts(folder(tmp_path / "set", {"train.jsonl": rows}))
    assert [record["gold"] for record in found] == [{"a": 1}, {"b": None}]


def test_folders_that_hold_no_data_are_refused(tmp_path):
    refusal(folder(tmp_path / "set", {}), "cannot read")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    refusal(folder(tmp_path / "lfs", {"data/train-0.parquet": pointer}), "Git LFS", "git lfs pull")
