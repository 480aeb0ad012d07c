"""An output and a merge, ended before each of their steps on disk.

Afterwards there is no file or a whole one with its manifest, and a new start, also one that is ended at the
same step, comes to the same end.
"""

import json
import sys
from pathlib import Path

import pytest

from common.manifest import Output, beside, fingerprint, read_manifest
from generation import merge_data

STEPS = ("os.rename", "os.remove", "os.truncate", "open")  # as Python's audit events call them


class Killed(BaseException):
    """As little can catch it as a signal."""


class Clock:
    """Counts steps in a folder, and ends the process's work before the `last` one."""

    def __init__(self):
        self.folder, self.last, self.count = None, None, 0
        sys.addaudithook(self.step)  # it cannot be taken away again

    def step(self, event, arguments):
        if self.last is None or event not in STEPS or not str(arguments[0]).startswith(str(self.folder)):
            return
        if event == "open" and arguments[1] in ("r", "rb"):
            return
        self.count += 1
        if self.count > self.last:
            raise Killed


CLOCK = Clock()


def ended(work, folder, last):
    """Do the work until `last` steps are taken; whether it was ended."""
    CLOCK.folder, CLOCK.last, CLOCK.count = folder, last, 0
    try:
        work(folder)
    except Killed:
        return True
    finally:
        CLOCK.last = None
    return False


def write(folder, index=None, overwrite=False):
    """Records 0, 1 and 3 into x.jsonl, or shard `index` of two into x<index>.jsonl."""
    world = {} if index is None else {"local_index": index, "my_world_size": 2}
    output = Output(folder / f"x{'' if index is None else index}.jsonl", "test", world, {}, overwrite)
    if output.complete:
        return
    for i in range(3):
        if f"{index}/{i}" not in output.done:
            output.append({"id": f"{index}/{i}", "responses": ["a"]})
    output.skip(f"{index}/3", "too long")
    output.finish([f"{index}/{i}" for i in (2, 0, 1)], {"prompts": 8, "records": 3, "skipped": 1, "K": 1})


def merge(folder, *more):
    argv = ["merge_data.py", "--base_path", folder / "x", "--output_dir", folder / "all.jsonl", *more]
    sys.argv = [*map(str, argv), "--num_datasets", "2"]
    merge_data.main()


def merge_again(folder):
    merge(folder, "--overwrite", "--shuffle_seed", "1")


CASES = {  # what came before, what is ended, its output
    "output": (lambda folder: None, write, "x.jsonl"),
    "output over an older one": (write, lambda folder: write(folder, overwrite=True), "x.jsonl"),
    "merge": (lambda folder: None, merge, "all.jsonl"),
    "merge over an older one": (merge, merge_again, "all.jsonl"),
}


def prepared(folder, before):
    folder.mkdir()
    for index in (0, 1):
        write(folder, index)
    before(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_ended_before_each_step(tmp_path, monkeypatch, capsys, case):
    monkeypatch.setattr(sys, "argv", sys.argv)
    before, work, name = CASES[case]
    whole = prepared(tmp_path / "whole", before)
    old = (whole / name).read_bytes() if (whole / name).exists() else None
    work(whole)
    wanted, skipped = (whole / name).read_bytes(), beside(whole / name, ".skipped.jsonl").read_bytes()
    assert len(wanted.splitlines()) == (3 if name == "x.jsonl" else 6) and skipped
    last = 0
    while True:
        folder = prepared(tmp_path / f"ended{last}", before)
        first = ended(work, folder, last)
        for again in range(2):  # twice at the same step, then to the end
            path = folder / name
            if path.exists():
                assert path.read_bytes() in (old, wanted)
                made = read_manifest(path)
                assert made["complete"] and made["output"]["sha256"] == fingerprint(path)["sha256"]
            ended(work, folder, last if again == 0 else 10**6)
        assert path.read_bytes() == wanted and json.loads(wanted.splitlines()[0])
        assert beside(path, ".skipped.jsonl").read_bytes() == skipped
        left = {file.name for file in Path(folder).iterdir() if file.suffix in (".tmp", ".partial")}
        assert not left, left
        if not first:
            break
        last += 1
    assert last >= 5, f"only {last} steps were seen"
