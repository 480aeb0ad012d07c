"""report/watch.py and report/state.py: runs that are not begun, at work, stopped, failed, finished; progress,
rate, time left.
"""

import contextlib
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

pytest.importorskip("rich")

import report_runs as runs

from common.cli import UserError
from common.progress import Progress
from common.run_folder import STEPS
from report import state, watch
from report.state import read_state

SCRIPT = str(Path(__file__).resolve().parents[2] / "report" / "watch.py")
EVIL = "\x1b[2J\x1b]0;owned\x07[bold red]not markup[/bold red] \x08"


@pytest.fixture
def frame(monkeypatch, capsys):
    """One frame of the view, made in this process."""

    def start(folder, *more):
        monkeypatch.setattr(sys, "argv", ["watch.py", str(folder), "--once", "true", *more])
        watch.main()
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return start


@pytest.fixture
def folder(tmp_path):
    """A DPO run of two iterations: policy 1 is measured and has responses; training policy 2 is next."""
    made = runs.make_run(tmp_path / "run", iterations=2, upto=1)
    for name in ("generated", "rewarded"):
        runs.write(made / f"iter2/{name}.jsonl", [{"id": n} for n in range(60)])
    (made / "iter2/logs").mkdir()
    return made


def tell(log, monkeypatch, total, what, unit, done, note="", first=0):
    """Leave the progress that a command leaves whose log this is, as common/progress.py writes it."""
    monkeypatch.setenv("RLHF_PROGRESS", str(log.with_suffix(".progress.json")))
    progress = Progress(total, what, unit, done=first, enabled=False)
    progress.start -= 10.0  # it has been at work for so many seconds
    progress.update(done - first, note)
    progress.close()
    monkeypatch.delenv("RLHF_PROGRESS")


@contextlib.contextmanager
def held(lock):
    """The run's lock, held as run_loop.sh holds it."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_not_begun_and_setting_up(tmp_path, monkeypatch, frame):
    monkeypatch.setenv("envs_dir", str(tmp_path / "envs"))
    assert read_state(tmp_path / "no").word == "not started" and "not started" in frame(tmp_path / "no")
    assert read_state(tmp_path).detail == "no loop.yaml yet"
    (tmp_path / "run").mkdir()
    (tmp_path / "envs").mkdir()
    with held(tmp_path / "run/.lock"):
        found = read_state(tmp_path / "run")
        assert found.word == "running" and found.detail.startswith("setting up: setup command")
        with held(tmp_path / "envs/vllm.lock"):
            making = "environment vllm is being made"
            assert read_state(tmp_path / "run").detail == f"setting up: {making}"
            assert read_state(tmp_path / "no").detail == f"no such folder yet; {making}"


def test_the_steps_of_a_run():
    dpo, ppo = {"iterations": 2, "heldout_prompts": "h"}, {"backend": "small", "heldout_prompts": "h"}
    last = [(2, step) for step in STEPS[:3]]
    assert state.steps_of(dpo) == [*((i, step) for i in (0, 1) for step in STEPS), *last]
    assert state.steps_of(ppo) == [*((0, step) for step in STEPS), *((1, step) for step in STEPS[:3])]
    some = [(i, step) for i in (0, 1) for step in ("sample", "annotate", "train")]
    assert state.steps_of(dpo | {"heldout_prompts": None}) == some
    assert state.steps_of(ppo | {"heldout_prompts": None}) == [(0, "train")]


def test_training_at_work(folder, monkeypatch, frame):
    log = folder / "iter2/logs/train.log"
    log.write_text("$ 'accelerate' 'launch'\ntrain: step 1/9, loss 9\n")
    tell(log, monkeypatch, 28, "train", "steps", 7, "loss 0.6147, accuracy 0.94")
    with held(folder / ".lock"):  # would block or fail if the view took it
        found, out = read_state(folder), frame(folder)
        tell(log, monkeypatch, 60, "reference", "pairs", 10)
        assert "in work: policy 1, train (reference)" in frame(folder)
    assert (found.word, found.at) == ("running", (1, "train"))
    told = found.progress
    assert (told["done"], told["total"]) == (7, 28) and told["rate"] == pytest.approx(0.7, rel=0.05)
    assert told["seconds_left"] == pytest.approx(30, rel=0.05)
    assert "running" in out and "7/28 steps (25%), 0.7 steps/s, " in out and "loss 0.61" in out
    assert "in work: policy 1, train" in out and "left in all" in out
    assert "iterate" in out and "best of K" not in out  # metrics.json of the hand-made run has no averages
    assert state.is_held(folder) is False


def trained(folder):
    runs.manifest(folder / "iter2/model")


def test_shards_side_by_side_are_one(folder, monkeypatch):
    trained(folder)
    logs = folder / "iter2/logs"
    for k, done in enumerate((30, 12)):
        (logs / f"sample.{k}.log").write_text("$ x\n")
        tell(logs / f"sample.{k}.log", monkeypatch, 60, "generate", "prompts", done, f"{k} tokens/s")
    (logs / "merge.log").write_text("$ x\n")
    with held(folder / ".lock"):
        found, later = read_state(folder), read_state(folder, now=time.time() + 600)
    assert found.at == (2, "sample") and found.progress["unit"] == "prompts"
    assert (found.progress["done"], found.progress["total"]) == (42, 120)
    assert found.progress["rate"] == pytest.approx(4.2, rel=0.05)
    assert found.progress["seconds_left"] == pytest.approx(48 / 1.2, rel=0.05)  # of the slower one
    assert (later.progress["done"], later.progress["rate"]) == (42, None)  # nothing was told for long


def test_a_step_is_done_when_its_files_or_what_is_made_of_them_are_there(folder):
    trained(folder)
    assert read_state(folder).at == (2, "sample")
    for kind in ("sampled", "greedy"):
        runs.write(folder / f"iter2/heldout_{kind}.generated.jsonl", [{"id": 1}])
    assert read_state(folder).at == (2, "annotate")
    runs.write(folder / "iter2/heldout_sampled.rewarded.jsonl", [{"id": 1}])
    assert read_state(folder).at == (2, "annotate")
    runs.write(folder / "iter2/heldout_greedy.rewarded.jsonl", [{"id": 1}])
    assert read_state(folder).at == (2, "measure")
    for path in folder.glob("iter2/*.jsonl"):  # to make room
        path.unlink()
    runs.write_json(folder / "iter2/metrics.json", {})
    assert read_state(folder).word == "finished"


def test_stopped_and_failed(folder, frame):
    log = folder / "iter2/logs/train.log"
    (folder / ".lock").touch()
    log.write_text("$ x\nerror: of an earlier start\n$ x\ntrain: step 7/28, loss 0.6\n")
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    found = read_state(folder)
    assert found.word == "stopped" and "nothing was written for" in found.detail
    log.write_text(f"$ x\ntrain: step 7/28, loss 0.6\n{EVIL}\nerror: the disk is full\n")
    out = frame(folder)
    assert "failed" in out and out.count("error: the disk is full") == 2
    assert "[bold red]not markup[/bold red]" in out
    assert not [evil for evil in ("\x1b", "\x08", "owned") if evil in out]
    raised = "torch.cuda.OutOfMemoryError: CUDA out of memory"
    log.write_text(f"$ x\nTraceback (most recent call last):\n  File\n{raised}\n")
    found = read_state(folder)
    assert (found.word, found.detail) == ("failed", raised)
    (folder / "iter2/logs/train.1.log").write_text("$ x\nall well\n")  # the one that failed is shown
    os.utime(log, (1e9, 1e9))
    found = read_state(folder)
    assert found.word == "failed" and found.log == log


def test_finished_and_ppo(tmp_path, monkeypatch, frame):
    whole = runs.make_run(tmp_path / "whole")
    assert read_state(whole).word == "finished"
    out = frame(whole)
    assert "11 of 11 steps done" in out and "last finished: policy 2, measure, 2s" in out
    with held(whole / ".lock"):
        assert read_state(whole).word == "running"  # something is at work again
        monkeypatch.setenv("RLHF_RUN", str(whole.resolve()))  # the report that the driver itself asks for
        assert read_state(whole).word == "finished"
    ppo = runs.make_run(tmp_path / "ppo", iterations=1, upto=0, kind="ppo")
    log = ppo / "iter1/logs/train.log"
    log.parent.mkdir(parents=True)
    log.write_text("$ x\n")
    tell(log, monkeypatch, 18, "ppo", "rollouts", 4, first=2)  # taken up behind the second one
    found = read_state(ppo)
    assert found.at == (0, "train") and (found.progress["done"], found.progress["total"]) == (4, 18)
    assert found.progress["rate"] == pytest.approx(0.2, rel=0.05)


def test_a_run_that_is_not_evaluated(tmp_path, frame):
    folder = runs.make_run(tmp_path / "run", evaluated=False)
    assert read_state(folder).word == "finished"
    out = frame(folder)
    assert "6 of 6 steps done" in out and "12" in out.split("seconds")[1]
    assert "not evaluated: heldout_prompts is null" in out
    (folder / "iter2/model.manifest.json").unlink()
    assert read_state(folder).at == (1, "train")


def test_time_left_of_the_run(folder):
    """Left are training (12 s as the one before), and 20, 8 and 2 s of policy 2; 5 s are gone."""
    (folder / ".lock").touch()
    last = read_state(folder).done[-1]["finished"]
    ended = state.datetime.strptime(last, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    with held(folder / ".lock"):
        assert read_state(folder, now=ended + 5).seconds_left == pytest.approx(12 + 30 - 5)
        assert read_state(folder, now=ended + 500).seconds_left == pytest.approx(30)


def test_damaged_files_do_not_end_the_view(folder, frame):
    (folder / "stages.jsonl").write_text('{"half\n[]\n{"policy": 3, "step": "train", "seconds": "x"}\n')
    (folder / "iter2/logs/train.progress.json").write_text('{"what": "train", "done": "x"}')
    (folder / "iter1/metrics.json").write_text("{")
    (folder / "iter2/logs/train.log").write_bytes(b"\xff\xfe\x00" * 100)
    frame(folder)
    (folder / "loop.yaml").write_text("a: [")
    assert "not valid YAML" in frame(folder)


def test_refusals(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for arguments, message in (
        ([], "no run was given"),
        (["x", "--every", "0"], "must be above 0"),
        ([str(tmp_path / "file")], "is a file"),
    ):
        monkeypatch.setattr(sys, "argv", ["watch.py", *arguments])
        with pytest.raises(UserError, match=message):
            watch.main()


def test_on_a_terminal_it_refreshes_until_ctrl_c(folder, monkeypatch):
    """A real terminal (pty): the second frame shows what was written after the first; Ctrl-C ends with status
    0.
    """
    log = folder / "iter2/logs/train.log"
    log.write_text("$ x\n")
    tell(log, monkeypatch, 28, "train", "steps", 7)
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    command = [sys.executable, SCRIPT, str(folder), "--every", "0.3"]
    with (
        held(folder / ".lock"),
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
                tell(log, monkeypatch, 28, "train", "steps", 8)
                written = True
            if b"8/28" in seen and not ended:
                process.send_signal(signal.SIGINT)
                ended = True
        if process.poll() is None and not ended:
            process.kill()
        assert process.wait(20) == 0 and b"8/28" in seen
    os.close(leader)


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
    (folder / "loop.yaml").write_text(json.dumps({"iterations": "x", "seed": "half \ud800"}))
    strange = folder.rename(folder.with_name(os.fsdecode(b"run\xff")))
    command = [sys.executable, SCRIPT, strange, "--once", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
