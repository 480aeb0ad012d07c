"""Joining the parts of a mixture that several models gave: everything once and in the order of the parts, or
one line that says which file is at fault. The files are made here, as the scripts leave them.
"""

import json
import sys

import pytest

from common.cli import UserError
from common.manifest import Output, read_manifest
from common.records import read_generated
from generation import join_parts

PARTS = [
    {"K": 1, "model": "previous"},
    {"K": 2},
    {"K": 1, "model": "start"},
    {"K": 1, "model": "previous", "top_p": 0.5},
]
SETTINGS = {"K": 5, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "seed": 1, "mixture": PARTS, "date": "d"}


@pytest.fixture
def sampled(tmp_path, monkeypatch):
    """A function that makes a model's file of numbered prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("prompts")

    def make(*names, K, skip=(), ids=range(5), tokens=(1, 2), **more):
        name, key = names[0], "model_name_or_path"
        (tmp_path / f"{name}.model").write_text(name)
        inputs = {"dataset_name_or_path": "prompts.jsonl", key: f"{name}.model"}
        settings = (
            SETTINGS | {"parts_of": None if names == ("policy",) else list(names)} | more.get("settings", {})
        )
        output = Output(f"{name}.jsonl", "generation/get_hf2.py", settings, inputs, overwrite=True)
        for i in ids:
            if i in skip:
                output.skip(f"id{i}", f"too long for {name}")
                continue
            record = {"id": f"id{i}", "prompt": [{"role": "user", "content": f"{i}?"}], "answer": 7}
            record |= {"responses": [f"{name}{i}/{k}" for k in range(K)], "prompt_token_ids": [*tokens, i]}
            record |= {
                "num_tokens": [i] * K,
                "response_sources": [{"model": name, "of": k} for k in range(K)],
            }
            output.append(record | ({"stop_strings": ["x"] * K} if name == "start" else {}))
        kept = [f"id{i}" for i in ids if i not in skip]
        counts = {"prompts": 5, "records": len(kept), "skipped": output.skipped, "engine_seconds": 2.5}
        output.finish(kept, counts)
        return f"{name}.jsonl"

    return make


def join(monkeypatch, *files):
    monkeypatch.setattr(sys, "argv", ["join_parts.py", "--parts", *files, "--output_dir", "all.jsonl"])
    join_parts.main()
    return list(read_generated("all.jsonl"))


@pytest.fixture
def three(sampled):
    alone = {"local_index": 0, "my_world_size": 1}  # as get_hf2.py leaves it, unmerged
    policy = sampled("policy", K=2, skip=(3,), settings=alone)
    return [sampled("start", K=1), sampled("previous", K=2, skip=(1,)), policy]


def test_responses_stand_in_the_order_of_the_parts(three, monkeypatch, capsys):
    """Whatever that of the files; what one has skipped is skipped."""
    rows = join(monkeypatch, *three)
    assert [row["id"] for row in rows] == ["id0", "id2", "id4"]
    for row in rows:
        i = row["id"][2:]
        assert " ".join(row["responses"]) == (
            f"previous{i}/0 policy{i}/0 policy{i}/1 start{i}/0 previous{i}/1"
        )
        assert [(s["model"], s["of"]) for s in row["response_sources"]] == [
            ("previous", 0), ("policy", 0), ("policy", 1), ("start", 0), ("previous", 1)
        ]  # fmt: skip
        assert row["stop_strings"] == [None, None, None, "x", None] and row["num_tokens"] == [int(i)] * 5
        assert row["answer"] == 7 and row["prompt_token_ids"] == [1, 2, int(i)]
    made = read_manifest("all.jsonl")
    models = {key: mark["path"] for key, mark in made["inputs"].items() if key.startswith("model")}
    assert models == {
        "model_name_or_path": "policy.model",
        "model_name_or_path of previous": "previous.model",
        "model_name_or_path of start": "start.model",
    }
    assert made["counts"] == {"prompts": 5, "records": 3, "skipped": 2, "engine_seconds": 7.5}
    skipped = [json.loads(line) for line in open("all.skipped.jsonl")]
    assert {entry["id"]: entry["reason"] for entry in skipped} == {
        "id1": "too long for previous",
        "id3": "too long for policy",
    }
    assert not {"parts_of", "local_index"} & made["settings"].keys() and made["settings"]["mixture"] == PARTS
    join(monkeypatch, *three)
    assert "all.jsonl is complete, nothing to do" in capsys.readouterr().out


def test_models_that_are_one_have_one_file(sampled, monkeypatch):
    """Whose equal parts are one, at the place of the first."""
    files = [sampled("policy", K=2), sampled("previous", "start", K=3)]
    for row in join(monkeypatch, *files):
        assert [entry["model"] for entry in row["response_sources"]] == ["previous"] * 2 + ["policy"] * 2 + [
            "previous"
        ]
        assert [entry["of"] for entry in row["response_sources"]] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"tokens": (1, 9)}, "start.jsonl has other tokens than policy.jsonl for prompt id0: their"),
        ({"K": 2}, "prompt id0 has 2 responses of start, its parts have K 1"),
        ({"ids": (0, 1, 2, 3)}, "start.jsonl holds other prompts than policy.jsonl"),
        ({"ids": (0, 4, 2, 3, 1)}, "start.jsonl holds other prompts than policy.jsonl"),
        ({"settings": {"seed": 2}}, "policy.jsonl was made with seed 1, start.jsonl with 2"),
        ({"settings": {"mixture": PARTS[1:]}}, "policy.jsonl was made with mixture "),
        ({"settings": {"mixture": None}}, "start.jsonl is of no mixture"),
        (
            {"settings": {"local_index": 0, "my_world_size": 2}},
            "start.jsonl is one of 2 shards: merge them first (generation/merge_data.py)",
        ),
        ({"settings": {"parts_of": ["previous"]}}, "several files hold the parts of previous"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(sampled, three, monkeypatch, changes, told):
    sampled("start", **{"K": 1} | changes)
    with pytest.raises(UserError) as refused:
        join(monkeypatch, *three)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_missing_or_was_changed_is_refused(sampled, three, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no file holds the parts of start"):
        join(monkeypatch, *three[1:])
    with open("start.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="start.jsonl was changed after it was made"):
        join(monkeypatch, *three)
    (tmp_path / "start.jsonl").unlink()
    with pytest.raises(UserError, match="start.jsonl is missing, not finished or has no manifest"):
        join(monkeypatch, *three)
    sampled("start", K=1)
    join(monkeypatch, *three)
    (tmp_path / "prompts.jsonl").write_text("others")
    sampled("start", K=1)
    with pytest.raises(UserError, match="were made from another dataset_name_or_path"):
        join(monkeypatch, *three)
