"""Merging shards: everything once and in order, or one line that says which shard is at fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import UserError
from common.manifest import Output, beside, difference, read_manifest, write_json
from common.records import shard_range
from generation import merge_data

SETTINGS = {"K": 2, "seed": 42}


def shard(folder, index, world, count=7, settings=SETTINGS, skip=(), more=None):
    """Shard `index` as get_hf2.py leaves it: prompts are numbered, those in `skip` are listed as skipped."""
    settings = settings | {"local_index": index, "my_world_size": world}
    path = folder / f"gen{index}.jsonl"
    output = Output(
        path, "test", settings, {"dataset_name_or_path": folder / "prompts.jsonl"}, overwrite=True
    )
    mine = shard_range(count, index, world)
    kept = [i for i in mine if i not in skip]
    for i in reversed(kept):
        output.append({"id": f"id{i}", "responses": [f"\u2028{i}", ""]} | (more or {}))
    for i in set(mine) - set(kept):
        output.skip(f"id{i}", "too long")
    counts = {"prompts": count, "records": len(kept), "skipped": len(mine) - len(kept)}
    output.finish([f"id{i}" for i in kept], counts)


def change(path, **values):
    """Change the manifest of a shard."""
    write_json(beside(path, ".manifest.json"), read_manifest(path) | values)


def ids(path):
    return [json.loads(line)["id"] for line in path.read_text().split("\n")[:-1]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("prompts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def three(folder):
    for i in range(3):
        shard(folder, i, 3, skip=(2, 5))
    return folder


@pytest.fixture
def merge(folder, monkeypatch):
    """Runs the script in this process; gives the ids of what it made."""

    def run(count, *more, output="merged.jsonl"):
        argv = ["--base_path", "./gen", "--output_dir", output, "--num_datasets", str(count), *more]
        monkeypatch.setattr(sys, "argv", ["merge_data.py", *argv])
        merge_data.main()
        return ids(folder / output)

    return run


@pytest.fixture
def refused(merge):
    def run(words, count, *more, **output):
        with pytest.raises(UserError) as told:
            merge(count, *more, **output)
        assert "\n" not in str(told.value)
        for word in [words] if isinstance(words, str) else words:
            assert word in str(told.value)

    return run


@pytest.mark.parametrize("count", [1, 7, 103])
@pytest.mark.parametrize("world", [1, 2, 8])
def test_every_prompt_once_and_in_order(folder, merge, count, world):
    for i in range(world):
        shard(folder, i, world, count)
    assert merge(world) == [f"id{i}" for i in range(count)]
    counts = read_manifest(folder / "merged.jsonl")["counts"]
    assert counts == {"prompts": count, "records": count, "skipped": 0}


def test_manifest_and_skipped_stand_for_the_whole(three, merge):
    counts = read_manifest(three / "gen1.jsonl")["counts"]
    change(three / "gen1.jsonl", seconds=99.5, counts=counts | {"engine_seconds": 12.5})
    counts = read_manifest(three / "gen2.jsonl")["counts"]
    change(three / "gen2.jsonl", counts=counts | {"engine_seconds": 3.0})
    path = three / "new/folder/gen.json"
    assert merge(3, output=str(path.relative_to(three))) == ["id0", "id1", "id3", "id4", "id6"]
    made, expected = read_manifest(path), {"prompts": 7, "records": 5, "skipped": 2}
    assert made["counts"] == expected | {"engine_seconds": 12.5, "engine_seconds_sum": 15.5}
    assert made["complete"] and made["seconds"] == 99.5
    assert difference(made, SETTINGS, {"dataset_name_or_path": three / "prompts.jsonl"}) is None
    assert "K was 2" in difference(made, SETTINGS | {"K": 3}, {})
    assert ids(beside(path, ".skipped.jsonl")) == ["id2", "id5"] and not list(path.parent.glob("*.tmp"))


def test_shuffled_by_a_seed(three, merge):
    seeds = {"a": "1", "b": "1", "c": "2"}
    a, b, c = (merge(3, "--shuffle_seed", seed, output=f"{name}.jsonl") for name, seed in seeds.items())
    assert a == b != c and sorted(a) == sorted(c) == ["id0", "id1", "id3", "id4", "id6"]


def test_again_and_overwrite(three, merge, refused, capsys):
    merge(3)
    path = three / "merged.jsonl"
    before = path.stat().st_mtime_ns
    merge(3)
    assert capsys.readouterr().out.endswith("merged.jsonl is complete, nothing to do\n")
    refused("--overwrite", 3, "--shuffle_seed", "1")
    assert path.stat().st_mtime_ns == before
    merge(3, "--shuffle_seed", "1", "--overwrite")
    assert path.stat().st_mtime_ns != before
    (three / "mine.jsonl").write_text("mine")
    refused("--overwrite", 3, output="mine.jsonl")
    assert (three / "mine.jsonl").read_text() == "mine"


def test_unfinished_and_missing_shards_are_named(folder, refused):
    shard(folder, 0, 4)
    shard(folder, 2, 4)
    (folder / "gen1.jsonl.partial").write_text("")
    refused(("gen1.jsonl is not finished", "gen3.jsonl is missing", "1, 3"), 4)
    assert not (folder / "merged.jsonl").exists()
    refused("--num_datasets 0", 0)


def test_another_number_of_shards(three, refused):
    refused(("--my_world_size 3", "--num_datasets 3"), 2)
    for name in ("gen{}.jsonl", "gen{}.manifest.json", "gen{}.skipped.jsonl"):
        if (three / name.format(0)).exists():
            (three / name.format(0)).rename(three / name.format(1))
    shard(three, 0, 3)
    refused(("gen1.jsonl", "--local_index 0"), 3)


def test_settings_inputs_and_prompt_counts_must_agree(folder, refused):
    shard(folder, 0, 2)
    shard(folder, 1, 2, settings=SETTINGS | {"K": 3})
    refused(("gen0.jsonl", "K 2", "gen1.jsonl", "3"), 2)
    shard(folder, 1, 2, count=8)
    refused("number of prompts", 2)
    (folder / "prompts.jsonl").write_text("others")
    shard(folder, 1, 2)
    refused(("dataset_name_or_path", "different files"), 2)


def test_shards_of_two_days_agree_where_no_prompt_is_dated(folder, merge, refused):
    for more in ({}, {"prompt_date": "x"}):
        for index in range(2):
            shard(folder, index, 2, settings=SETTINGS | {"date": f"2026-01-0{index + 1}"}, more=more)
        if more:
            refused("date '2026-01-01'", 2, "--overwrite")
        else:
            merge(2)


def test_damage_is_found(three, refused):
    path = three / "gen0.jsonl"
    text, made = path.read_text(), read_manifest(path)
    damaged = {
        text[:-5]: ("gen0.jsonl line 2", "ends inside"),
        text[: text.index("\n") + 1]: ("gen0.jsonl holds 1 records", "says 2"),
        "3\n" + text: ("line 1", "int"),
        (three / "gen2.jsonl").read_text(): ("id4", "gen0.jsonl", "gen2.jsonl line 1"),
    }
    for damage, words in damaged.items():
        path.write_text(damage)
        refused(words, 3)
    path.write_text(text)
    change(path, counts=made["counts"] | {"skipped": 1})
    refused("of 7 prompts", 3)
    change(path, counts=made["counts"], complete=False)
    refused("gen0.jsonl is not finished", 3)
    assert not (three / "merged.jsonl").exists()


def test_a_shard_changed_afterwards_is_found(three, merge, refused):
    path, listed = three / "gen0.jsonl", beside(three / "gen1.jsonl", ".skipped.jsonl")
    text, line, made = path.read_text(), listed.read_text(), path.stat().st_mtime_ns
    path.write_text(text.replace("id1", "id9"))
    os.utime(path, ns=(1, made))
    refused("gen0.jsonl was changed", 3)
    path.write_text(text)  # touched, not changed
    for text in (None, line[:-1], line + line):
        listed.unlink() if text is None else listed.write_text(text)
        refused(("gen1.skipped.jsonl lists", "gen1.jsonl says 1"), 3)
    listed.write_text(line)
    beside(path, ".skipped.jsonl").write_text(line)
    refused(("gen0.skipped.jsonl lists 1", "says 0"), 3)
    assert not (three / "merged.jsonl").exists()
    beside(path, ".skipped.jsonl").unlink()
    merge(3)


def test_the_output_may_not_be_a_shard_or_a_folder(three, refused):
    refused("one of the shards", 3, "--overwrite", output="gen1.jsonl")
    (three / "place").mkdir()
    refused("folder", 3, output="place")


def test_files_of_other_tools_are_merged_with_a_note(folder, merge, capsys):
    (folder / "gen0.jsonl").write_text('{"id": 1}\n\n{"id": 2}')
    (folder / "gen1.jsonl").write_text("")
    (folder / "gen2.jsonl").write_bytes(b'\xef\xbb\xbf{"id": 3}\r\n')  # with the mark that Windows writes
    (folder / "gen3.jsonl").write_text('{"id": 4}\n')
    merge(3)
    out = capsys.readouterr().out
    assert "no manifest beside" in out and "gen3.jsonl is there too" in out
    assert (folder / "merged.jsonl").read_bytes() == b'{"id": 1}\n{"id": 2}\n{"id": 3}\n'


def test_it_runs_on_the_standard_library_alone(three):
    command = [sys.executable, "-S", "-E", merge_data.__file__, "--base_path", "./gen", "--num_datasets"]
    end = subprocess.run(
        [*command, "3", "--output_dir", "o.jsonl"], cwd=three, capture_output=True, text=True
    )
    assert (end.returncode, end.stderr) == (0, "") and len(ids(Path(three / "o.jsonl"))) == 5
    end = subprocess.run([*command, "4", "--output_dir", "x"], cwd=three, capture_output=True, text=True)
    assert end.returncode == 2 and end.stderr.startswith("error: ") and end.stderr.count("\n") == 1
