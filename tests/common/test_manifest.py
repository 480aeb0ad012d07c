"""Outputs: whole or not there, resumed after a kill, never continued with other settings."""

import dataclasses
import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from common import manifest
from common.cli import UserError
from common.manifest import (
    Output,
    beside,
    difference,
    fingerprint,
    read_manifest,
    same_content,
    with_date,
    write_json,
)

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"K": 4, "seed": 1}
# Writes records 0…99 slowly enough to be killed on the way, in an order that is not the input's.
WRITER = textwrap.dedent("""
    import sys, time
    from common.cli import run
    from common.manifest import Output
    def main():
        path, pause, size = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
        output = Output(path, "writer", {"K": 4, "seed": 1}, {})
        if output.complete:
            print("complete")
            return
        print("resumed", len(output.done), flush=True)
        for i in reversed(range(100)):
            if str(i) not in output.done:
                output.append({"id": str(i), "text": "é" * size})
                time.sleep(pause)
        output.finish([str(i) for i in range(100)], {"records": 100})
    run(main)
""")


def writer(path, pause=0.0, size=10, **options):
    command = [sys.executable, "-c", WRITER, str(path), str(pause), str(size)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def ids(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def begun(path, *names, settings=SETTINGS):
    """An output with records of these ids; let go, as when its process has ended."""
    output = Output(path, "test", settings, {})
    for name in names:
        output.append({"id": name})
    output._lock.close(), output._file.close()
    return path


@pytest.fixture
def half(tmp_path):
    """An output that is half done: records c and a of a, b, c."""
    return begun(tmp_path / "x.jsonl", "c", "a")


@pytest.mark.parametrize("garbage", [b'{"id": "torn", "te', b'\xff\xfe{"id":\n', b"5\n", b'{"no": "id"}\n'])
def test_garbage_in_unfinished_work_is_cut(half, garbage):
    """A kill in the middle of a write leaves a torn line, a power cut anything."""
    with open(f"{half}.partial", "ab") as file:
        file.write(garbage)
    output = Output(half, "test", SETTINGS, {})
    assert set(output.done) == {"a", "c"}
    output.append({"id": "b"})
    output.finish(["a", "b", "c"], {})
    assert ids(half) == ["a", "b", "c"]


def test_names_that_differ_in_the_suffix_have_manifests_of_their_own(tmp_path):
    for suffix in ("json", "jsonl"):
        output = Output(tmp_path / f"x.{suffix}", "test", {"for": suffix}, {})
        output.append({"id": suffix})
        output.skip("s", suffix)
        output.finish([suffix], {})
    for suffix in ("json", "jsonl"):
        assert read_manifest(tmp_path / f"x.{suffix}")["settings"] == {"for": suffix}
        assert suffix in beside(tmp_path / f"x.{suffix}", ".skipped.jsonl").read_text()


def test_an_input_s_manifest_is_not_written_over(tmp_path, monkeypatch):
    """`data.jsonl` read and `data` written, or the model `data` and its answers `data.jsonl`."""
    (tmp_path / "data.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    kept = {"complete": True, "settings": {}, "inputs": {}}
    for read, written in (("data.jsonl", tmp_path / "data"), (tmp_path / "model", "model.jsonl")):
        write_json(beside(read, ".manifest.json"), kept)
        for overwrite in (False, True):
            with pytest.raises(UserError, match=f"{written} would write the manifest of {read}, "):
                Output(written, "test", {}, {"read": read, "none": None}, overwrite)
        assert read_manifest(read) == kept and not Path(f"{written}.partial").exists()
    Output("hub_name.jsonl", "test", {}, {"model": "hub_name"})  # there is no such folder


def test_a_killed_run_is_resumed_and_ends_the_same(tmp_path):
    path, partial = tmp_path / "x.jsonl", tmp_path / "x.jsonl.partial"
    first = writer(path, 0.02)
    wait_for(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 5)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not path.exists() and read_manifest(path)["complete"] is False
    second = writer(path)
    out, err = second.communicate()
    assert (second.returncode, err) == (0, "")
    assert int(out.split()[1]) >= 5
    assert ids(path) == [str(i) for i in range(100)] and not partial.exists()
    whole = writer(tmp_path / "y.jsonl")
    whole.communicate()
    assert path.read_bytes() == (tmp_path / "y.jsonl").read_bytes()
    assert writer(path).communicate()[0] == "complete\n" and not partial.exists()


def test_order_skipped_counts_and_versions(half):
    output = Output(half, "test", SETTINGS, {})
    assert set(output.done) == {"a", "c"}
    output.append({"id": "b", "text": "\u2028"})
    output.skip("d", "too long")
    output.finish(["a", "b", "c"], {"records": 3})
    assert [json.loads(line)["id"] for line in half.read_bytes().split(b"\n")[:-1]] == ["a", "b", "c"]
    assert json.loads(beside(half, ".skipped.jsonl").read_text()) == {"id": "d", "reason": "too long"}
    made = read_manifest(half)
    assert made["complete"] and made["counts"] == {"records": 3} and made["versions"]["python"]
    assert made["output"]["sha256"] == fingerprint(half)["sha256"]
    assert sorted(p.name for p in half.parent.iterdir()) == ["x.jsonl", "x.manifest.json", "x.skipped.jsonl"]


@pytest.mark.parametrize("settings, words", [
    ({"K": 8, "seed": 1}, "K was 4 and is now 8"), ({"K": 4}, "seed was 1 and is now None"),
    ({"K": 4, "seed": 1, "top_p": 0.5}, "top_p was None and is now 0.5"),
])  # fmt: skip
def test_changed_settings_are_named(half, settings, words):
    before = half.with_name("x.jsonl.partial").read_bytes()
    with pytest.raises(UserError, match=words):
        Output(half, "test", settings, {})
    assert half.with_name("x.jsonl.partial").read_bytes() == before
    output = Output(half, "test", settings, {}, overwrite=True)
    assert not output.done and output.manifest["settings"] == settings


def test_changed_inputs_are_named_by_content_not_time(tmp_path):
    source, path = tmp_path / "in.jsonl", tmp_path / "x.jsonl"
    source.write_text("one")
    output = Output(path, "test", {}, {"data": source, "template": None})
    output.append({"id": "a"})
    output.finish(["a"], {})
    del output
    os.utime(source, ns=(1, 1))
    assert Output(path, "test", {}, {"data": source, "template": None}).complete
    source.write_text("two")
    with pytest.raises(UserError, match=r"data \(.*in.jsonl\) has changed"):
        Output(path, "test", {}, {"data": source})
    assert path.exists() and not tmp_path.joinpath("x.jsonl.partial").exists()
    marks = read_manifest(path)
    source.write_text("one")
    assert difference(marks, {}, {"data": source}) is None
    assert "template" in difference(marks, {}, {"data": source, "template": source})
    with_template = {"settings": {}, "inputs": {"template": fingerprint(source)}}
    assert "template" in difference(with_template, {}, {"template": None})  # one that is no longer given


def test_fingerprints(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "a").write_text("1")
    mark = fingerprint(folder)
    (folder / "checkpoint-5" / "b").write_text("2")
    assert fingerprint(folder)["sha256"] == mark["sha256"]
    (folder / "a").rename(folder / "c")
    assert not same_content(mark, folder)
    mark = fingerprint("owner/name")
    assert same_content(mark, "owner/name") and not same_content(mark, "owner/other")
    assert not same_content(fingerprint(folder), tmp_path / "gone")


def test_an_older_file_in_the_place_of_one_is_seen(tmp_path):
    """As `cp -p` and rsync put it there: of the same size, and not the newest of its folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in (("config.json", "{}"), ("model.safetensors", "old weights")):
        (folder / name).write_text(text)
        os.utime(folder / name, ns=(2, 2))
    mark = fingerprint(folder)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert same_content(mark, folder)  # by its checksum
    (folder / "model.safetensors").write_text("new weights")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert not same_content(mark, folder)


@pytest.fixture
def smaller(monkeypatch):
    """What counts as large begins at 4 KiB, in pieces of 64 bytes."""
    monkeypatch.setattr(manifest, "WHOLE", 2**12)
    monkeypatch.setattr(manifest, "PIECE", 2**6)


def test_data_is_read_whole_also_where_it_is_large(tmp_path, smaller):
    folder = tmp_path / "prompts"
    folder.mkdir()
    content = bytearray(b"a" * 2**14)
    seen = set()
    for place in (0, 5000, 2**14 - 1):
        content[place] = ord("b")
        (folder / "data.arrow").write_bytes(content)
        seen.add(fingerprint(folder)["sha256"])
    assert len(seen) == 3


def test_a_change_of_any_tensor_of_large_weights_is_seen(tmp_path, smaller):
    """A merged adapter changes some tensors, a new head a small one. Written by safetensors itself."""
    numpy, safetensors = pytest.importorskip("numpy"), pytest.importorskip("safetensors.numpy")
    rng = numpy.random.default_rng(0)
    tensors = {f"layers.{i}.weight": rng.normal(size=(40, 40)).astype("float32") for i in range(5)}
    tensors["score.weight"] = numpy.ones((1, 8), "float32")
    folder = tmp_path / "model"
    folder.mkdir()

    def mark(changed=None):
        now = {name: value * (2 if name == changed else 1) for name, value in tensors.items()}
        safetensors.save_file(now, folder / "model.safetensors")
        return fingerprint(folder)["sha256"]

    marks = [mark(), *(mark(name) for name in tensors)]
    assert len(set(marks)) == 7 and mark() == marks[0]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_large_weights_of_any_form_can_be_read(tmp_path, smaller, name):
    """Also a file that is not what its name says."""
    (tmp_path / name).write_bytes(b"a" * 2**13)
    before = fingerprint(tmp_path)["sha256"]
    (tmp_path / name).write_bytes(b"a" * (2**13 - 1) + b"b")
    assert fingerprint(tmp_path)["sha256"] != before


def test_an_unknown_file_in_its_place_is_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("mine")
    with pytest.raises(UserError, match="no manifest"):
        Output(path, "test", {}, {})
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="folder"):
        Output(tmp_path, "test", {}, {})
    beside(path, ".manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Output(path, "test", {}, {})


def test_a_second_process_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    first = writer(path, 0.05)
    assert first.stdout.readline() == "resumed 0\n"
    second = writer(path)
    _, err = second.communicate()
    assert second.returncode == 2 and err.count("\n") == 1
    assert err.startswith("error: another process is writing")
    out, err = first.communicate()
    assert first.returncode == 0 and ids(path) == [str(i) for i in range(100)]


def mounted(folder, *options):
    """Whether a tmpfs could be mounted on a new folder."""
    folder.mkdir(mode=0o555)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("how", ["a limit on files", "a tiny disk"])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, how):
    disk, limit = how == "a tiny disk", (2**16, resource.RLIM_INFINITY)
    if disk and not mounted(tmp_path / "disk", "size=64k"):
        pytest.skip("nothing can be mounted here")
    path = tmp_path / "disk/x.jsonl"
    options = {} if disk else {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)}
    try:
        ended = writer(path, size=1000, **options)
        _, err = ended.communicate()
        assert ended.returncode == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert ("No space" if disk else "too large") in err and not path.exists()
        if disk:
            subprocess.run(["mount", "-o", "remount,size=2m", str(path.parent)], check=True)
        ended = writer(path, size=1000)
        out, err = ended.communicate()
        assert (ended.returncode, err) == (0, "") and int(out.split()[1]) > 10
        assert ids(path) == [str(i) for i in range(100)]
    finally:
        if disk:
            subprocess.run(["umount", str(path.parent)], check=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    closed = tmp_path / "closed"
    if not mounted(closed, "ro") and os.access(closed, os.W_OK):  # root passes permissions by
        pytest.skip("neither permissions nor mounts can be set here")
    try:
        with pytest.raises(UserError, match="cannot write"):
            Output(closed / "x.jsonl", "test", {}, {})
    finally:
        subprocess.run(["umount", str(closed)], capture_output=True)


def test_the_manifest_is_written_before_the_data(tmp_path, monkeypatch):
    """Killed between the two: no data file, and the next start goes on from the partial one."""
    path = begun(tmp_path / "x.jsonl", "a")
    output, replace = Output(path, "test", SETTINGS, {}), os.replace

    def killed(source, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(manifest.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        output.finish(["a"], {"records": 1})
    monkeypatch.undo()
    assert not path.exists()
    output._lock.close(), output._file.close()
    output = Output(path, "test", SETTINGS, {})
    assert not output.complete and set(output.done) == {"a"}
    output.finish(["a"], {"records": 1})
    assert ids(path) == ["a"]


def test_an_output_of_a_version_without_dates_is_continued(tmp_path):
    """A date that is given would be another setting than that which the output was begun with."""

    @dataclasses.dataclass
    class Arguments:
        date: str | None = None
        overwrite: bool = False

    path = tmp_path / "x.jsonl"
    for settings, given, expected in (
        ({}, "2026-01-02", None),
        ({"date": None}, "2026-01-02", "2026-01-02"),
        ({"date": "2026-01-01"}, None, "2026-01-01"),
    ):
        write_json(tmp_path / "x.manifest.json", {"script": "a", "settings": settings, "inputs": {}})
        assert with_date(Arguments(given), path).date == expected
        assert with_date(Arguments(given, overwrite=True), path).date == (given or str(datetime.date.today()))
