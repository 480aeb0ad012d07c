"""Files that are not what their names say, and lines with noise: one line that says what they are."""

import gzip
import json

import pytest

from common.cli import UserError
from common.jsonl import read_jsonl
from common.records import read_prompts, read_rewarded
from dpo_iteration.pairs import make_pairs

LINE = '{"prompt": "a"}\n'
REWARDED = {"id": "x", "prompt": "a", "responses": ["b", "c"], "rewards": [1.0, 2.0]}


@pytest.mark.parametrize(
    "data, told",
    [
        (gzip.compress(LINE.encode()), "packed by gzip: add .gz"),
        (b"PAR1\xff\xff", "is a parquet table"),
        (LINE.encode("utf-16"), "is UTF-16 text"),
        (LINE.encode() + b"\xfc\n", "is not UTF-8 text"),
        (b"[1, 2]\n[3, 4]\n", "line 1 begins a list"),
        ((LINE + LINE).replace("\n", "\r").encode(), "line 1 is not valid JSON: Extra data"),
        ((LINE + LINE).encode()[:-5], "line 2 is torn"),
        ((LINE).encode() + b"\0" * 9, "line 2 is torn"),
    ],
)
def test_what_a_file_is_instead(tmp_path, data, told):
    (tmp_path / "x.jsonl").write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(read_jsonl(tmp_path / "x.jsonl"))
    assert told in str(caught.value) and "x.jsonl" in str(caught.value)


def test_parquet_tables_that_cannot_be_read_say_why(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = [pyarrow.array([text]) for text in "ab"]
    for table, told in (
        (pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), "is empty"),
        (pyarrow.Table.from_arrays(texts, names=["prompt", "prompt"]), "prompt"),
    ):
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(UserError) as caught:
            list(read_prompts(str(tmp_path / "x.parquet")))
        assert told in str(caught.value) and "DatasetGenerationError" not in str(caught.value)


def test_a_number_called_num_tokens_passes_training_as_it_passes_annotation(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(REWARDED | {"num_tokens": 57}) + "\n")
    [record] = read_rewarded(path)
    [pair], reason, _ = make_pairs(record, "max_min_p", 0.1, count_tokens=len)
    assert reason is None and pair["chosen_index"] == 1 and pair["chosen_num_tokens"] == 1
    path.write_text(json.dumps(REWARDED | {"num_tokens": [1, "2"]}) + "\n")
    with pytest.raises(UserError, match="record 1: `num_tokens` is .*no list of its kind"):
        list(read_rewarded(path))
