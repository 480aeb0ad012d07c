"""What people's files hold: tables with NaN and dates, lists in a .csv, marks and garbage, names that differ
in the suffix only.
"""

import csv
import json
import os

import pytest

from common.cli import UserError
from common.functions import function_file
from common.manifest import Output, beside, difference, fingerprint, read_manifest
from common.records import read_jsonl, read_prompts
from generation import merge_data


def test_lists_of_messages_in_a_csv(tmp_path):
    pytest.importorskip("datasets")
    turns = [{"role": "user", "content": 'say "hi", please'}]
    with open(tmp_path / "p.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["context_messages"], [json.dumps(turns)], ["a plain text"]])
    assert [r["prompt"] for r in read_prompts(str(tmp_path / "p.csv"))] == [
        turns,
        [{"role": "user", "content": "a plain text"}],
    ]
    (tmp_path / "q.csv").write_text(
        "context_messages\n\"[{'role': 'user', 'content': 'as Python writes it'}]\"\n"
    )
    with pytest.raises(UserError, match="record 1: context_messages is no JSON list"):
        list(read_prompts(str(tmp_path / "q.csv")))


def test_what_json_does_not_know_is_carried_through_as_null_or_text(tmp_path):
    datasets = pytest.importorskip("datasets")
    import datetime

    rows = {
        "prompt": ["a", "b"],
        "score": [float("nan"), 1.5],
        "day": [datetime.datetime(2026, 1, 2), datetime.datetime(2026, 1, 3)],
    }
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "p.parquet"))
    found = list(read_prompts(str(tmp_path / "p.parquet")))
    assert [r["score"] for r in found] == [None, 1.5] and found[0]["day"].startswith("2026-01-02")
    output = Output(tmp_path / "out.jsonl", "test", {}, {})
    for record in found:
        output.append(record)
    output.finish([r["id"] for r in found], {})
    assert len(list(read_jsonl(tmp_path / "out.jsonl"))) == 2


@pytest.mark.parametrize(
    "line, words",
    [
        ("[" * 100000, "cannot be read|not valid JSON|is torn"),
        ('{"a": ' + "9" * 5000 + "}\n", "cannot be read"),
    ],
)
def test_what_cannot_be_parsed_is_named(tmp_path, line, words):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n' + line)
    with pytest.raises(UserError, match=f"line 2.*({words})"):
        list(read_jsonl(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("garbage", [b'\xff\xfe{"id":\n', b"5\n", b'{"no": "id"}\n', b"\0\0\0\n"])
def test_garbage_in_unfinished_work_is_cut(tmp_path, garbage):
    output = Output(tmp_path / "x.jsonl", "test", {}, {})
    output.append({"id": "a"})
    del output
    with open(tmp_path / "x.jsonl.partial", "ab") as file:
        file.write(garbage)
    output = Output(tmp_path / "x.jsonl", "test", {}, {})
    assert set(output.done) == {"a"}
    output.append({"id": "b"})
    output.finish(["a", "b"], {})
    assert (tmp_path / "x.jsonl").read_text() == '{"id": "a"}\n{"id": "b"}\n'


def test_names_that_differ_in_the_suffix_have_manifests_of_their_own(tmp_path):
    for suffix in ("json", "jsonl"):
        output = Output(tmp_path / f"x.{suffix}", "test", {"for": suffix}, {})
        output.append({"id": suffix})
        output.skip("s", suffix)
        output.finish([suffix], {})
    for suffix in ("json", "jsonl"):
        assert read_manifest(tmp_path / f"x.{suffix}")["settings"] == {"for": suffix}
        assert suffix in beside(tmp_path / f"x.{suffix}", ".skipped.jsonl").read_text()


def test_a_change_in_the_middle_of_a_large_input_is_seen(tmp_path):
    data = tmp_path / "big.jsonl"
    with open(data, "wb") as file:
        file.truncate(70 * 2**20)
    manifest = {"settings": {}, "inputs": {"data": fingerprint(data)}}
    with open(data, "r+b") as file:
        file.seek(35 * 2**20)
        file.write(b"x")
    os.utime(data, ns=(1, 1))
    assert "has changed" in difference(manifest, {}, {"data": str(data)})


def test_a_mark_at_the_head_of_a_shard_stays_out_of_the_merged_file(tmp_path, monkeypatch):
    for i in range(2):
        (tmp_path / f"s{i}.jsonl").write_text(f'{{"id": "{i}"}}\n', encoding="utf-8-sig")
    monkeypatch.setattr(
        "sys.argv",
        ["x", "--base_path", f"{tmp_path}/s", "--output_dir", f"{tmp_path}/m.jsonl", "--num_datasets", "2"],
    )
    merge_data.main()
    assert [r["id"] for r in read_jsonl(tmp_path / "m.jsonl")] == ["0", "1"]


@pytest.mark.parametrize(
    "text, named",
    [
        ("def score(m, r): return 1\n", ""),
        ("if True:\n    from math import sqrt as score\n", ""),
        ("score = lambda m, r: 1\n", ""),
        ("from math import *\n", ""),
        ("def __getattr__(name): return len\n", ""),
        ("def scor(m, r): return 1\n", "has no function score, did you mean 'scor'"),
    ],
)
def test_a_function_that_is_not_there_is_known_without_running_its_file(tmp_path, text, named):
    (tmp_path / "mine.py").write_text(text)
    spec = f"{tmp_path / 'mine.py'}:score"
    if named:
        with pytest.raises(UserError, match=named):
            function_file(spec, "--reward_function", "x.py:y", look=True)
    else:
        assert function_file(spec, "--reward_function", "x.py:y", look=True) == (
            tmp_path / "mine.py",
            "score",
        )
