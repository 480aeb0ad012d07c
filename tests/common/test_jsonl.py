"""common/jsonl.py: lines, lists and packed files; files that are not what their names say; records that are
none.
"""

import gzip
import json

import pytest
from reading import refusal, write

from common.jsonl import BadRecord, dumps, jsonl_records
from common.records import read_prompts
from generation import merge_data

LINE = '{"prompt": "a"}\n'


def test_line_separators_stay_inside_strings(tmp_path):
    texts = ["one\u2028two", "next\x85line", "form\x0cfeed", "carriage\r\nreturn", "zero\x00byte"]
    path = write(tmp_path / "x.jsonl", *({"text": text} for text in texts))
    assert [record["text"] for record in jsonl_records(path)] == texts
    assert "".join(dumps({"t": text}) + "\n" for text in texts).count("\n") == len(texts)
    with pytest.raises(ValueError):
        dumps({"reward": float("nan")})


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.json", '\n   [{"prompt": "a"}, {"prompt": "b"}]'),
        ("b.json", json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=2)),
        ("c.jsonl", '\ufeff\n\t[{"prompt": "a"}, {"prompt": "b"}]'),
        ("d.ndjson", '\ufeff{"prompt": "a"}\n\n{"prompt": "b"}'),
        ("e.json", '{"prompt": "a"}\n{"prompt": "b"}\n'),
    ],
)
def test_lists_and_packed_files(tmp_path, name, text):
    path, packed = tmp_path / name, tmp_path / f"{name}.gz"
    path.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    assert list(jsonl_records(path)) == list(jsonl_records(packed)) == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    "data, told",
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"[]", "is empty"),
        (gzip.compress(LINE.encode()), "packed by gzip: add .gz"),
        (b"PAR1\xff\xff", "is a parquet table"),
        (LINE.encode("utf-16"), "is UTF-16 text"),
        (LINE.encode() + b"\xfc\n", "is not UTF-8 text"),
        (b"[1, 2]\n[3, 4]\n", "line 1 begins a list"),
        (b"[{]", "is not valid JSON"),
        ((LINE + LINE).replace("\n", "\r").encode(), "line 1 is not valid JSON: Extra data"),
        (b'{"prompt": "b\n' + LINE.encode(), "line 1 is not valid JSON"),
        ((LINE + LINE).encode()[:-5], "line 2 is torn"),
        (LINE.encode() + b"\0" * 9, "line 2 is torn"),
        (LINE.encode() + b"[1]\n", "line 2 is a list"),
        (b'{"prompt": "\\ud800"}\n', "line 1 holds half a surrogate pair"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "line 1 cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    ],
)
def test_what_a_file_is_instead(tmp_path, data, told):
    (tmp_path / "x.jsonl").write_bytes(data)
    refusal(tmp_path / "x.jsonl", "x.jsonl", told)


@pytest.mark.parametrize(
    "text, told",
    [
        ('{"data": [{"prompt": "a"}]}', "there is one under 'data'"),
        ('{\n "data": [{"prompt": "a"}]\n}', "there is one under 'data'"),
        ('{\n "version": 1\n}', "one JSON object"),
        ('{\n"prompt": "a"\n}\n{\n"prompt": "b"\n}\n', "several lines each"),
    ],
)
def test_json_of_another_shape_is_refused_with_the_remedy(tmp_path, text, told):
    (tmp_path / "x.json").write_text(text)
    refusal(tmp_path / "x.json", told)


def test_damaged_archives_and_folders(tmp_path):
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(LINE.encode())[:-9])
    (tmp_path / "z.jsonl.gz").write_text("not packed")
    for name in ("y", "z"):
        refusal(tmp_path / f"{name}.jsonl.gz", "cannot be unpacked")
    refusal(tmp_path, "folder", read=jsonl_records)


def test_bad_records_stand_in_their_places(tmp_path):
    deep = '{"prompt": "a", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}"
    bad = ["[1]", '{"prompt": "\\ud800"}', deep, '{"prompt": 5}', "no JSON", '{"prompt": null}', '{"b": "a"}']
    bad.append('{"prompt": "a", "tools": "hammer"}')
    path = write(tmp_path / "x.jsonl", LINE.strip(), *bad, '{"prompt": "b"}')
    first, *found, last = read_prompts(path, keep_bad=True)
    assert first["prompt"][0]["content"] == "a" and last["prompt"][0]["content"] == "b"
    for number, record in enumerate(found, 2):
        assert isinstance(record, BadRecord)
        assert f"line {number}" in str(record) or f"record {number}" in str(record)
    assert len({record.id for record in found}) == len(bad) == len(found)
    # torn: the file is not whole, and so is no record's fault
    torn = write(tmp_path / "y.jsonl", {"prompt": "a"}, '{"prompt": "b', end="")
    refusal(torn, "torn", keep_bad=True)
    unusable = write(tmp_path / "z.jsonl", {"prompt": 1}, {"prompt": 2})
    refusal(unusable, "holds no prompt that can be used; the first of 2: ", "record 1", keep_bad=True)
    # no prompt's fault: the column is called otherwise
    other = write(tmp_path / "w.jsonl", {"question": "a"}, {"prompt": "b"})
    refusal(other, "record 1 has no", keep_bad=True)


def test_a_mark_at_the_head_of_a_shard_stays_out_of_the_merged_file(tmp_path, monkeypatch):
    for i in range(2):
        (tmp_path / f"s{i}.jsonl").write_text(f'{{"id": "{i}"}}\n', encoding="utf-8-sig")
    words = f"x --base_path {tmp_path}/s --output_dir {tmp_path}/m.jsonl --num_datasets 2"
    monkeypatch.setattr("sys.argv", words.split())
    merge_data.main()
    assert [r["id"] for r in jsonl_records(tmp_path / "m.jsonl")] == ["0", "1"]
