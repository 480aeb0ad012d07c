"""report/watch.py and report/state.py: runs that are not begun, at work, stopped, failed, finished; progress,
rate, time left.
"""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

pytest.importorskip("rich")

import report_runs as runs

from report import state
from report.state import read_state

SCRIPT = str(ROOT / "report" / "watch.py")
EVIL = "\x1b[2J\x1b]0;owned\x07[bold red]not markup[/bold red] \x08"


def frame(folder, *more):
    done = subprocess.run(
        [sys.executable, SCRIPT, str(folder), "--once", "true", *more],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path):
    """A DPO run of two iterations, evaluated up to iterate 1, with prompt files that can be counted."""
    for name, count in (("a.jsonl", 60), ("heldout.jsonl", 60)):
        runs.write(tmp_path / name, [{"prompt": str(n)} for n in range(count)])
    made = runs.make_run(
        tmp_path / "run",
        upto=1,
        settings={"prompts": [str(tmp_path / "a.jsonl")], "heldout_prompts": str(tmp_path / "heldout.jsonl")},
    )
    runs.write(made / "iter2" / "generated.jsonl", [{"id": n} for n in range(60)])
    runs.write(made / "iter2" / "rewarded.jsonl", [{"id": n} for n in range(60)])
    (made / "iter2" / "logs").mkdir()
    return made


class Held:
    """The run's lock, held as run_loop.sh holds it."""

    def __init__(self, folder):
        self.file = open(folder / ".lock", "w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def old(folder):
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))


def test_not_begun(tmp_path):
    assert read_state(tmp_path / "no").word == "not started"
    assert read_state(tmp_path).detail == "no loop.yaml yet"
    code, out, err = frame(tmp_path / "no")
    assert code == 0 and "not started" in out and err == ""


def test_training_at_work(folder):
    (folder / "iter2/logs/train.log").write_text(
        "$ 'accelerate' 'launch'\ntrain: step 1/9, loss 9\n$ 'accelerate' 'launch'\nreference: 10/60 pairs, "
        "12.0/s, 4s left\n"
        "train: step 7/28, loss 0.6147, accuracy 0.94, margin 0.2141, lr 8.61e-05, 63.5 pairs/s, 1m02s left\n"
    )
    with Held(folder):
        assert state.is_held(folder)
        found = read_state(folder)
        code, out, _ = frame(folder)
    assert (found.word, found.at) == ("running", (2, "train", "train"))
    assert (found.done, found.total, found.rate, found.left) == (7, 28, "63.5 pairs/s", "1m02s")
    assert (
        code == 0
        and "running" in out
        and "7/28 steps (25%), 63.5 pairs/s, 1m02s left" in out
        and "loss 0.6147" in out
    )
    assert "in work: iteration 2, train" in out and "left in all" in out
    assert "iterate" in out and "best of K" not in out  # metrics.json of the hand-made run has no averages


def test_the_lock_is_only_looked_at(folder):
    (folder / ".lock").touch()
    assert state.is_held(folder) is False
    read_state(folder)
    with Held(folder):  # would block or fail if the view had taken it
        assert state.is_held(folder) is True


def test_generation_counts_shards_and_partials(folder):
    runs.write_json(folder / "iter2/model.manifest.json", {"complete": True})
    shards = folder / "iter2" / "shards"
    runs.write(shards / "heldout_sampled.generated.of2.0.jsonl", [{"id": n} for n in range(30)])
    runs.write(shards / "heldout_sampled.generated.of2.1.jsonl.partial", [{"id": n} for n in range(5)])
    runs.write(shards / "heldout_greedy.generated.of2.0.jsonl.partial", [{"id": n} for n in range(7)])
    (folder / "iter2/logs/evaluate.0.log").write_text(
        "$ x\ngenerate: 42/120 prompts, 40.9/s, 5s left, 2071 tokens/s\n"
    )
    lines = state.Lines()
    with Held(folder):
        found = read_state(folder, lines)
    assert found.at == (2, "evaluate", "generate") and (found.done, found.total) == (42, 120)
    assert (found.rate, found.left) == ("40.9 prompts/s", "5s") and "2071 tokens/s" in found.note
    with open(shards / "heldout_greedy.generated.of2.0.jsonl.partial", "a") as file:
        file.write('{"id": 8}\n{"half')
    assert read_state(folder, lines).done == 43


def test_annotation_counts_partials(folder):
    runs.write_json(folder / "iter2/model.manifest.json", {"complete": True})
    for kind in ("sampled", "greedy"):
        runs.write(folder / f"iter2/heldout_{kind}.generated.jsonl", [{"id": n} for n in range(60)])
    runs.write(folder / "iter2/heldout_sampled.rewarded.jsonl.partial", [{"id": n} for n in range(24)])
    found = read_state(folder)
    assert found.at == (2, "evaluate", "annotate") and (found.done, found.total, found.unit) == (
        24,
        120,
        "records",
    )


def test_stopped_and_failed(folder):
    (folder / ".lock").touch()
    (folder / "iter2/logs/train.log").write_text("$ x\ntrain: step 7/28, loss 0.6\n")
    old(folder)
    found = read_state(folder)
    assert found.word == "stopped" and "nothing was written for" in found.detail
    (folder / "iter2/logs/train.log").write_text(
        "$ x\nerror: of an earlier start\n$ x\ntrain: step 7/28, loss 0.6\n"
    )
    assert read_state(folder).word == "stopped"
    (folder / "iter2/logs/train.log").write_text(
        f"$ x\ntrain: step 7/28, loss 0.6\n{EVIL}\nerror: the disk is full\n"
    )
    code, out, _ = frame(folder)
    assert code == 0 and "failed" in out and out.count("error: the disk is full") == 2
    assert (
        "[bold red]not markup[/bold red]" in out
        and "\x1b" not in out
        and "\x08" not in out
        and "owned" not in out
    )
    (folder / "iter2/logs/train.log").write_text(
        "$ x\nTraceback (most recent call last):\n  File\ntorch.cuda.OutOfMemoryError: CUDA out of memory\n"
    )
    found = read_state(folder)
    assert (found.word, found.detail) == ("failed", "torch.cuda.OutOfMemoryError: CUDA out of memory")


def test_the_shard_that_failed_is_shown(folder):
    runs.write_json(folder / "iter2/model.manifest.json", {"complete": True})
    (folder / ".lock").touch()
    (folder / "iter2/logs/evaluate.1.log").write_text("$ x\nerror: no memory on GPU 1\n")
    (folder / "iter2/logs/evaluate.0.log").write_text("$ x\nall well\n")
    os.utime(folder / "iter2/logs/evaluate.1.log", (1e9, 1e9))
    found = read_state(folder)
    assert found.word == "failed" and found.log.name == "evaluate.1.log"


def test_finished_and_ppo(tmp_path):
    whole = runs.make_run(tmp_path / "whole")
    for i in (1, 2):
        (whole / f"iter{i}/generated.jsonl").touch()
    assert read_state(whole).word == "finished"
    code, out, _ = frame(whole)
    assert code == 0 and "9 of 9 stages done" in out
    ppo = runs.make_run(tmp_path / "ppo", iterations=1, upto=0, kind="ppo")
    (ppo / "iter1" / "logs").mkdir(parents=True)
    (ppo / "iter1/logs/train.log").write_text(
        "$ x\nppo: rollout 4/18, reward -1.2, kl 0.31, entropy 0.9, 850 tokens/s, 3m05s left\n"
    )
    found = read_state(ppo)
    assert found.at == (1, "train", "train") and (found.done, found.total, found.left) == (4, 18, "3m05s")


def test_time_left_of_the_run(folder):
    """Stages left: training of iteration 2 (12 s as the one before) and its evaluation (30 s); 5 s are
    gone.
    """
    (folder / ".lock").touch()
    ended = state.datetime.strptime("2026-01-01T00:01:30+0000", "%Y-%m-%dT%H:%M:%S%z").timestamp()
    with Held(folder):
        assert read_state(folder, now=ended + 5).seconds_left == pytest.approx(12 + 30 - 5)
        assert read_state(folder, now=ended + 500).seconds_left == pytest.approx(30)


def test_a_view_of_a_large_file_reads_it_once(tmp_path):
    path, lines = tmp_path / "x.partial", state.Lines()
    path.write_bytes(b"x\n" * 1000)
    assert lines(path) == 1000
    read = lines._known[path]
    with open(path, "ab") as file:
        file.write(b"y\n")
    assert lines(path) == 1001 and read == (2000, 1000)
    path.write_bytes(b"z\n")
    assert lines(path) == 1 and lines(tmp_path / "none") == 0


def test_damaged_files_do_not_end_the_view(folder):
    (folder / "stages.jsonl").write_text('{"half\n[]\n{"stage": 3, "seconds": "x"}\n')
    (folder / "iter1/metrics.json").write_text("{")
    (folder / "iter2/logs/train.log").write_bytes(b"\xff\xfe\x00" * 100)
    assert frame(folder)[0] == 0
    (folder / "loop.yaml").write_text("a: [")
    code, out, err = frame(folder)
    assert code == 0 and "not valid YAML" in out and err == ""


def test_refusals(tmp_path):
    for arguments, message in [
        ((), "no run was given"),
        (("x", "--every", "0"), "must be above 0"),
        (("x", "--one"), "did you mean '--once'"),
    ]:
        done = subprocess.run(
            [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    (tmp_path / "file").touch()
    assert "is a file" in frame(tmp_path / "file")[2]


def test_on_a_terminal_it_refreshes_until_ctrl_c(folder):
    """A real terminal (pty): the second frame shows what was written after the first; Ctrl-C ends with status
    0.
    """
    log = folder / "iter2/logs/train.log"
    log.write_text("$ x\ntrain: step 7/28, loss 0.6\n")
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    command = [sys.executable, SCRIPT, str(folder), "--every", "0.3"]
    with (
        Held(folder),
        subprocess.Popen(command, stdout=follower, stderr=follower, env=environment) as process,
    ):
        os.close(follower)
        seen, end, written, ended = b"", time.monotonic() + 60, False, False
        while time.monotonic() < end and process.poll() is None:
            if select.select([leader], [], [], 0.5)[0]:
                try:
                    seen += os.read(leader, 65536)
                except OSError:  # the other side is closed
                    break
            if b"7/28" in seen and not written:
                log.write_text("$ x\ntrain: step 8/28, loss 0.6\n")
                written = True
            if b"8/28" in seen and not ended:
                process.send_signal(signal.SIGINT)
                ended = True
        if process.poll() is None and not ended:
            process.kill()
        assert process.wait(20) == 0 and b"8/28" in seen
    os.close(leader)


def test_lines_of_progress_as_the_project_writes_them(capsys):
    from common.progress import Progress

    progress = Progress(60, "rewards", "records", every=0.0)
    progress.update(6, "12 responses")
    found = state.progress_line([line for line in capsys.readouterr().out.splitlines()])
    assert (found["what"], found["done"], found["total"], found["unit"]) == ("rewards", 6, 60, "records")
    assert found["rate"].endswith("records/s") and found["left"] and "12 responses" in found["note"]
    Progress(60, "generate", "prompts", every=0.0).tick()
    found = state.progress_line([line := capsys.readouterr().out.strip()])
    assert line == "generate: 0/60 prompts, none finished in 0s" and (
        found["done"],
        found["rate"],
        found["left"],
    ) == (0, "", "")
    Progress(60, "generate", "prompts").tick()  # not due yet
    assert capsys.readouterr().out == ""
    assert state.progress_line(["a model said: generate: 1/2", json.dumps({"x": 1})]) is None


def test_the_drivers_own_report_says_finished(tmp_path, monkeypatch):
    whole = runs.make_run(tmp_path / "whole")
    for i in (1, 2):
        (whole / f"iter{i}/generated.jsonl").touch()
    with Held(whole):
        assert read_state(whole).word == "running"  # something is at work again
        monkeypatch.setenv("RLHF_RUN", str(whole.resolve()))  # loop/stages.sh: what the driver starts
        assert read_state(whole).word == "finished"


def test_files_that_go_while_they_are_listed(folder, monkeypatch):
    (folder / "iter2/logs/train.log").write_text("$ x\n")
    stat = Path.stat

    def gone(path, **more):
        if path.suffix == ".log":
            raise FileNotFoundError(path)
        return stat(path, **more)

    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "stat", gone)
    assert read_state(folder).word in ("stopped", "running")


def test_names_that_are_no_text(folder):
    (folder / ".lock").touch()
    (folder / "loop.yaml").write_text(json.dumps({"iterations": "x", "seed": "half \ud800"}))
    strange = folder.with_name(os.fsdecode(b"run\xff"))
    folder.rename(strange)
    code, _, err = frame(strange)
    assert code == 0 and err == ""
