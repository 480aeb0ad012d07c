"""Who is at work, on file systems that have locks, that refuse them, and in processes that were forked
meanwhile.
"""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import locks
from common.cli import UserError
from common.manifest import Output
from common.training import Training
from report.state import is_held

ROOT = Path(__file__).resolve().parents[2]
REFUSALS = ("ENOSYS", "EINVAL")


def output(folder):
    return Output(folder / "x.jsonl", "test", {}, {})


def training(folder):
    held = Training(folder / "model", "test", {}, {}).locked()
    held.__enter__()
    return held


def merge(folder):
    from generation import merge_data

    words = f"merge_data.py --base_path {folder}/part --output_dir {folder}/all.jsonl --num_datasets 1"
    sys.argv = words.split()
    merge_data.main()


TAKERS = (output, training, merge)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a shard for merge_data.py, made while there were locks."""
    made = Output(tmp_path / "part0.jsonl", "test", {"local_index": 0, "my_world_size": 1}, {})
    made.append({"id": "a", "responses": ["b"]})
    made.finish(["a"], {"prompts": 1, "records": 1, "skipped": 0})
    monkeypatch.setattr(sys, "argv", sys.argv)
    return tmp_path


def refuse(monkeypatch, name):
    def flock(*_):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(fcntl, "flock", flock)
    locks._note.cache_clear()


@pytest.mark.parametrize("take", TAKERS)
@pytest.mark.parametrize("name", REFUSALS)
def test_a_file_system_that_refuses_locks_is_no_other_process(folder, monkeypatch, capsys, take, name):
    refuse(monkeypatch, name)
    take(folder)
    said = capsys.readouterr().out
    assert said.count("refuses locks") == 1 and str(folder) in said
    assert os.strerror(getattr(errno, name)) in said


def test_two_processes_on_one_output_without_locks_spoil_nothing(tmp_path, monkeypatch):
    """Each stops when it sees the other's records, and a third start has what both have saved."""
    refuse(monkeypatch, "ENOSYS")
    first = output(tmp_path)
    first.append({"id": "a"})
    second = output(tmp_path)
    assert list(second.done) == ["a"]
    second.append({"id": "b", "text": "longer"})
    for one, name in ((first, "a"), (second, "c")):
        with pytest.raises(UserError, match="another process writes"):
            one.append({"id": name})
    with pytest.raises(UserError, match="another process writes"):
        second.finish(["a", "b", "c"], {})
    assert not (tmp_path / "x.jsonl").exists()
    third = output(tmp_path)
    third.finish(["a", "b", "c"], {"records": 3})
    with pytest.raises(UserError, match="another process writes"):  # it goes on where all is done
        first.finish(["a"], {})
    assert [json.loads(line)["id"] for line in open(tmp_path / "x.jsonl")] == ["a", "b", "c"]


@pytest.mark.parametrize("take", TAKERS)
@pytest.mark.parametrize("name", ["EWOULDBLOCK", "EACCES"])
def test_a_lock_that_another_holds_is(folder, monkeypatch, take, name):
    refuse(monkeypatch, name)
    with pytest.raises(UserError, match="another process is (writing|training)"):
        take(folder)


def test_a_forked_process_does_not_hold_what_its_parent_locked(tmp_path):
    """As vLLM's engine is forked: `kill -9` of the parent leaves it alive, and a second start must not wait
    for it.
    """
    script = (
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from common.manifest import Output\n"
        f"output = Output({str(tmp_path / 'x.jsonl')!r}, 'test', {{}}, {{}})\n"
        "if not os.fork():\n"
        "    print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        with pytest.raises(UserError, match="another process"):
            output(tmp_path)
        process.kill()
        process.wait()
        os.kill(child, 0)  # alive
        try:
            output(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)


HOLD = """set -euo pipefail
source common/lock.sh
lock_file "$1" ${2:-} || { echo another; exit 2; }
echo mine
read -r || true
"""


def bash(lock, *seconds, path=None, **more):
    more |= {"PATH": f"{path}:{os.environ['PATH']}"} if path else {}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = ["bash", "-c", HOLD, "bash", str(lock), *seconds]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | more, text=True, **pipes)


@pytest.fixture(params=[65, 127])
def without_locks(request, tmp_path):
    """A folder with a `flock` that ends as the real one does on a file system without locks, or where it is
    not installed.

    A stand-in: such a file system cannot be mounted here.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    says = 'echo "flock: $2: Function not implemented" >&2'
    (folder / "flock").write_text(f"#!/bin/sh\n{says}\nexit {request.param}\n")
    (folder / "flock").chmod(0o755)
    return folder


def test_bash_tells_a_lock_that_is_held(tmp_path):
    lock = tmp_path / ".lock"
    with bash(lock) as first:
        assert first.stdout.readline() == "mine\n" and is_held(tmp_path) is True
        for seconds in ([], ["0.1"]):
            with bash(lock, *seconds) as second:
                assert second.communicate() == ("another\n", "") and second.returncode == 2
        with pytest.raises(UserError, match="another process is at work"):
            locks.hold(lock, "at work")
        first.communicate("\n")
    with bash(lock) as third:
        assert third.communicate("\n") == ("mine\n", "")
    assert is_held(tmp_path) is False


def test_a_decimal_comma_is_no_missing_lock(tmp_path):
    """`flock -w 0.1` is refused as a usage error where numbers are written as 0,1."""
    command = ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"]
    made = subprocess.run(command, capture_output=True, check=False)
    if not (tmp_path / "de_DE.UTF-8").is_dir():
        pytest.skip(f"no German locale can be made here: {made.stderr}")
    german = {"LOCPATH": str(tmp_path), "LC_ALL": "de_DE.UTF-8"}
    with bash(tmp_path / ".lock") as first:
        assert first.stdout.readline() == "mine\n"
        with bash(tmp_path / ".lock", "0.1", **german) as second:
            assert second.communicate()[0] == "another\n"
        first.communicate("\n")


def test_bash_goes_on_where_locks_are_refused(tmp_path, without_locks):
    """One note; a second start on the same machine is refused all the same, and one behind a start that was
    killed is not.
    """
    lock = tmp_path / ".lock"
    with bash(lock, path=without_locks) as first:
        assert first.stdout.readline() == "mine\n" and is_held(tmp_path) is None  # the view cannot know
        with bash(lock, "1", path=without_locks) as second:
            assert second.communicate() == ("another\n", "")
        first.kill()
        assert first.communicate()[1].count("refuses locks (Function not implemented)") == 1
    with bash(lock, path=without_locks) as third:
        assert third.communicate("\n")[0] == "mine\n"
    lock.write_text(f"elsewhere {lock.read_text().split(' ', 1)[1]}")
    with bash(lock, path=without_locks) as fourth:
        assert fourth.communicate("\n")[0] == "mine\n"
    with bash(lock) as fifth:  # on a file system with locks again
        assert fifth.communicate("\n") == ("mine\n", "") and is_held(tmp_path) is False


def test_waiting(tmp_path):
    with bash(tmp_path / ".lock") as first:
        assert first.stdout.readline() == "mine\n"
        subprocess.Popen(["bash", "-c", f"sleep 0.3; kill {first.pid}"])
        started = time.monotonic()
        locks.hold(tmp_path / ".lock", "at work", wait=True)
        assert time.monotonic() - started > 0.2


def test_bash_asks_slurm_for_a_job_of_another_machine(tmp_path):
    """Where locks hold on one machine only, both machines get them: the file says whose job has it. `squeue`
    is a stand-in.
    """
    lock, queue = tmp_path / ".lock", tmp_path / "bin/squeue"
    queue.parent.mkdir()
    queue.write_text('#!/bin/sh\n[ "$5" != 7 ] || echo running\n')
    queue.chmod(0o755)
    for owner, said in (
        ("elsewhere boot - - 7", "another\n"),
        ("elsewhere boot 12 34 7", "another\n"),
        ("elsewhere boot - - 6", "mine\n"),  # ended
        ("elsewhere boot - - 8", "mine\n"),  # our own, queued again
        ("elsewhere boot 12 34", "mine\n"),
    ):
        lock.write_text(owner + "\n")
        with bash(lock, path=queue.parent, SLURM_JOB_ID="8") as process:
            assert process.communicate("\n")[0] == said, owner
    lock.write_text("elsewhere boot - - 7")
    assert is_held(tmp_path) is None
    with bash(lock, SLURM_JOB_ID="8") as process:
        assert process.stdout.readline() == "mine\n" and is_held(tmp_path) is True
        process.communicate("\n")
    host, _, *rest = lock.read_text().split()
    assert host == os.uname().nodename and rest == ["-", "-", "8"] and is_held(tmp_path) is False
