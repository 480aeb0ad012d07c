"""Merging shards: everything once and in order, or one line that says which shard is at fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.manifest import Output, beside, difference, read_manifest, write_json
from common.records import shard_range

SCRIPT = Path(__file__).resolve().parents[2] / "generation" / "merge_data.py"
SETTINGS = {"K": 2, "seed": 42}


def shard(folder, index, world, count=7, settings=SETTINGS, skip=(), more=None):
    """Shard `index` as get_hf2.py leaves it: prompts are numbered, those in `skip` are listed as skipped."""
    inputs = {"dataset_name_or_path": folder / "prompts.jsonl"}
    output = Output(
        folder / f"gen{index}.jsonl",
        "test",
        settings | {"local_index": index, "my_world_size": world},
        inputs,
    )
    mine = [i for i in shard_range(count, index, world)]
    kept = [i for i in mine if i not in skip]
    for i in reversed(kept):
        output.append({"id": f"id{i}", "responses": [f"\u2028{i}", ""]} | (more or {}))
    for i in mine:
        if i in skip:
            output.skip(f"id{i}", "too long")
    output.finish(
        [f"id{i}" for i in kept], {"prompts": count, "records": len(kept), "skipped": len(mine) - len(kept)}
    )


def merge(folder, count, *more, output="merged.jsonl"):
    command = [
        sys.executable,
        SCRIPT,
        "--base_path",
        "./gen",
        "--output_dir",
        output,
        "--num_datasets",
        str(count),
        *more,
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def ids(path):
    return [json.loads(line)["id"] for line in path.read_text().split("\n")[:-1]]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("prompts")
    return tmp_path


@pytest.fixture
def three(folder):
    for i in range(3):
        shard(folder, i, 3, skip=(2, 5))
    return folder


def refused(end, *words):
    assert end.returncode == 2 and end.stderr.startswith("error: ") and end.stderr.count("\n") == 1, (
        end.stderr
    )
    for word in words:
        assert word in end.stderr, end.stderr


@pytest.mark.parametrize("count", [1, 7, 103])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_every_prompt_once_and_in_order(folder, count, world):
    for i in range(world):
        shard(folder, i, world, count)
    end = merge(folder, world)
    assert (end.returncode, end.stderr) == (0, "")
    assert ids(folder / "merged.jsonl") == [f"id{i}" for i in range(count)]
    assert read_manifest(folder / "merged.jsonl")["counts"] == {
        "prompts": count,
        "records": count,
        "skipped": 0,
    }


def test_manifest_and_skipped_stand_for_the_whole(three):
    slow = read_manifest(three / "gen1.jsonl")
    write_json(
        three / "gen1.manifest.json",
        slow | {"seconds": 99.5, "counts": slow["counts"] | {"engine_seconds": 12.5}},
    )
    last = read_manifest(three / "gen2.jsonl")
    write_json(three / "gen2.manifest.json", last | {"counts": last["counts"] | {"engine_seconds": 3.0}})
    assert merge(three, 3, output="new/folder/gen.json").returncode == 0
    path = three / "new/folder/gen.json"
    made = read_manifest(path)
    assert ids(path) == ["id0", "id1", "id3", "id4", "id6"]
    assert (
        made["complete"]
        and made["counts"]
        == {"prompts": 7, "records": 5, "skipped": 2, "engine_seconds": 12.5, "engine_seconds_sum": 15.5}
        and made["seconds"] == 99.5
    )
    assert difference(made, SETTINGS, {"dataset_name_or_path": three / "prompts.jsonl"}) is None
    assert "K was 2" in difference(made, SETTINGS | {"K": 3}, {})
    skipped = [json.loads(line)["id"] for line in beside(path, ".skipped.jsonl").read_text().splitlines()]
    assert skipped == ["id2", "id5"] and not list(path.parent.glob("*.tmp"))


def test_shuffled_by_a_seed(three):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert merge(three, 3, "--shuffle_seed", seed, output=f"{name}.jsonl").returncode == 0
    a, b, c = (ids(three / f"{name}.jsonl") for name in "abc")
    assert a == b != c and sorted(a) == sorted(c) == ["id0", "id1", "id3", "id4", "id6"]


def test_again_and_overwrite(three):
    merge(three, 3)
    path = three / "merged.jsonl"
    before = path.stat().st_mtime_ns
    end = merge(three, 3)
    assert (end.returncode, end.stdout) == (
        0,
        "merged.jsonl is complete, nothing to do\n",
    ) and path.stat().st_mtime_ns == before
    refused(merge(three, 3, "--shuffle_seed", "1"), "--overwrite")
    assert (
        merge(three, 3, "--shuffle_seed", "1", "--overwrite").returncode == 0
        and path.stat().st_mtime_ns != before
    )
    (three / "mine.jsonl").write_text("mine")
    refused(merge(three, 3, output="mine.jsonl"), "--overwrite")
    assert (three / "mine.jsonl").read_text() == "mine"


def test_unfinished_and_missing_shards_are_named(folder):
    shard(folder, 0, 4)
    shard(folder, 2, 4)
    (folder / "gen1.jsonl.partial").write_text("")
    refused(merge(folder, 4), "not finished: gen1.jsonl", "missing: gen3.jsonl", "1, 3")
    assert not (folder / "merged.jsonl").exists()
    refused(merge(folder, 0), "--num_datasets 0")


def test_another_number_of_shards(folder):
    for i in range(3):
        shard(folder, i, 3)
    refused(merge(folder, 2), "--my_world_size 3", "--num_datasets 3")
    (folder / "gen0.jsonl").rename(folder / "gen1.jsonl")
    (folder / "gen0.manifest.json").rename(folder / "gen1.manifest.json")
    shard(folder, 0, 3)
    refused(merge(folder, 3), "gen1.jsonl", "--local_index 0")


def test_settings_inputs_and_prompt_counts_must_agree(folder):
    shard(folder, 0, 2)
    shard(folder, 1, 2, settings=SETTINGS | {"K": 3})
    refused(merge(folder, 2), "gen0.jsonl", "K 2", "gen1.jsonl", "3")
    (folder / "gen1.jsonl").unlink()
    shard(folder, 1, 2, count=8)
    refused(merge(folder, 2), "number of prompts")
    (folder / "gen1.jsonl").unlink()
    (folder / "prompts.jsonl").write_text("others")
    shard(folder, 1, 2)
    refused(merge(folder, 2), "dataset_name_or_path", "different files")


def test_shards_of_two_days_agree_where_no_prompt_is_dated(folder):
    for dated in (False, True):
        for index in range(2):
            shard(
                folder,
                index,
                2,
                settings=SETTINGS | {"date": f"2026-01-0{index + 1}"},
                more={"prompt_date": "x"} if dated else {},
            )
        done = merge(folder, 2, output=f"merged{dated}.jsonl")
        assert (done.returncode == 0) != dated, done.stderr
        for path in folder.glob("gen*"):
            path.unlink()
    assert "date '2026-01-01'" in done.stderr


def test_damage_is_found(three):
    path = three / "gen0.jsonl"
    text = path.read_text()
    path.write_text(text[:-5])
    refused(merge(three, 3), "gen0.jsonl line 2", "ends inside")
    path.write_text(text[: text.index("\n") + 1])
    refused(merge(three, 3), "gen0.jsonl holds 1 records", "says 2")
    path.write_text("3\n" + text)
    refused(merge(three, 3), "line 1", "int")
    path.write_text((three / "gen2.jsonl").read_text())
    refused(merge(three, 3), "id4", "gen0.jsonl", "gen2.jsonl line 1")
    path.write_text(text)
    made = read_manifest(path)
    write_json(beside(path, ".manifest.json"), made | {"counts": made["counts"] | {"skipped": 1}})
    refused(merge(three, 3), "of 7 prompts")
    write_json(beside(path, ".manifest.json"), made | {"complete": False})
    refused(merge(three, 3), "gen0.jsonl is not finished")
    assert not (three / "merged.jsonl").exists()


def test_a_shard_changed_afterwards_is_found(three):
    path = three / "gen0.jsonl"
    text, made = path.read_text(), path.stat().st_mtime_ns
    path.write_text(text.replace("id1", "id9"))
    refused(merge(three, 3), "gen0.jsonl was changed")
    path.write_text(text.replace("id1", "id9"))
    os.utime(path, ns=(1, made))
    refused(merge(three, 3), "gen0.jsonl was changed")
    path.write_text(text)  # touched, not changed
    listed = beside(three / "gen1.jsonl", ".skipped.jsonl")
    line = listed.read_text()
    for text in (None, line[:-1], line + line):
        listed.unlink() if text is None else listed.write_text(text)
        refused(merge(three, 3), "gen1.skipped.jsonl lists", "gen1.jsonl says 1")
    beside(path, ".skipped.jsonl").write_text(line)
    refused(merge(three, 3), "gen0.skipped.jsonl lists 1", "says 0")
    assert not (three / "merged.jsonl").exists()
    beside(path, ".skipped.jsonl").unlink()
    listed.write_text(line)
    assert merge(three, 3).returncode == 0


def test_the_output_may_not_be_a_shard_or_a_folder(three):
    refused(merge(three, 3, "--overwrite", output="gen1.jsonl"), "one of the shards")
    (three / "place").mkdir()
    refused(merge(three, 3, output="place"), "folder")


def test_files_of_other_tools_are_merged_with_a_note(folder):
    (folder / "gen0.jsonl").write_text('{"id": 1}\n\n{"id": 2}')
    (folder / "gen1.jsonl").write_text("")
    (folder / "gen2.jsonl").write_text('{"id": 3}\r\n')
    (folder / "gen3.jsonl").write_text('{"id": 4}\n')
    end = merge(folder, 3)
    assert (
        end.returncode == 0 and "no manifest beside" in end.stdout and "gen3.jsonl is there too" in end.stdout
    )
    assert (folder / "merged.jsonl").read_bytes() == b'{"id": 1}\n{"id": 2}\n{"id": 3}\n'


def test_it_runs_on_the_standard_library_alone(three):
    command = [
        sys.executable,
        "-S",
        "-E",
        SCRIPT,
        "--base_path",
        "./gen",
        "--output_dir",
        "o.jsonl",
        "--num_datasets",
        "3",
    ]
    end = subprocess.run(command, cwd=three, capture_output=True, text=True)
    assert (end.returncode, end.stderr) == (0, "")
