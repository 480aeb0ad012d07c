"""Hostile conditions of the loop on several machines, under a real Slurm with virtual nodes (slurm.sh): file
systems without locks or slow to tell news, a terminal that goes away, jobs made with other options.
"""

import dataclasses
import json
import os
import pty
import select
import shutil
import signal
import time

import faults
import pytest
from virtual_slurm import CLUSTER, started

from common.cli import UserError
from loop import machines
from loop.settings import LoopSettings

# A libc that knows no flock below a folder, as if that were Lustre mounted without `-o flock`.
NO_FLOCK = r"""
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
int flock(int file, int how) {
  char link[64], path[4096] = {0}, *folder = getenv("NO_FLOCK");
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  if (readlink(link, path, sizeof path - 1) > 0 && folder && !strncmp(path, folder, strlen(folder))) {
    errno = ENOSYS;
    return -1;
  }
  return syscall(SYS_flock, file, how);
}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with started(tmp_path_factory.mktemp("slurm"), nodes=3) as found:
        yield found


class Terminal:
    """A command on the login node in a terminal of its own; `said` is what stands there."""

    def __init__(self, cluster, *command):
        words = [str(word) for word in ("bash", CLUSTER, "run", cluster.folder, *command)]
        self.said = ""
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(faults.ROOT)
            os.execvp(words[0], words)

    def type(self, text):
        os.write(self.file, text.encode())

    def read(self):
        while select.select([self.file], [], [], 0.05)[0]:
            try:
                data = os.read(self.file, 65536)
            except OSError:  # nobody is at its other end
                data = b""
            self.said += data.decode(errors="replace")
            if not data:
                break
        return self.said

    def wait(self, condition, seconds=60):
        return faults.wait_for(lambda: (self.read(), condition())[1], seconds, 0.1)

    def close(self):
        os.close(self.file)
        faults.wait_for(lambda: os.waitpid(self.pid, os.WNOHANG)[0], 30, 0.1)


def loop(folder, settings, *more):
    return [
        str(word) for word in ("bash", "run_loop.sh", faults.CONFIG, *settings, "--run_dir", folder, *more)
    ]


def driver(folder):
    """The process of the run's driver."""
    begun = f"bash run_loop.sh {faults.CONFIG} "
    return min(faults.processes(lambda line, _: line.startswith(begun) and f" {folder} " in line))


# ---- The driver on a login node, under salloc ----------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    ["scancel", pytest.param("Ctrl-C", marks=pytest.mark.long), pytest.param("TERM", marks=pytest.mark.long)],
)
def test_under_salloc_nothing_is_left(cluster, built, tmp_path, how):
    folder, settings = tmp_path / "run", faults.small_settings(tmp_path)
    terminal = Terminal(cluster, "salloc", "-N2", *loop(folder, settings, "--stop_stage", "1.1"))
    terminal.wait(lambda: len(faults.started_by(folder, "generation/get_hf2.py")) >= 2)
    if how == "Ctrl-C":
        terminal.type("\x03\x03")
    elif how == "TERM":
        os.kill(driver(folder), signal.SIGTERM)
    else:
        cluster("run", "scancel", terminal.said.split("allocation ")[1].split()[0])
    terminal.wait(lambda: "to continue: bash run_loop.sh" in terminal.said, 20)
    terminal.wait(lambda: not faults.started_by(folder), 20)
    terminal.close()
    faults.wait_for(lambda: not cluster("run", "squeue", "-h"), 30, 0.2)


@pytest.mark.long
def test_in_a_shell_of_salloc(cluster, built, tmp_path):
    """A driver that is killed leaves its steps at work, as on one machine; a second start ends them and goes
    on. A job that ends sends the shell a hang-up.
    """
    folder, settings = tmp_path / "run", faults.small_settings(tmp_path)
    command = " ".join(loop(folder, settings, "--stop_stage", "1.1"))
    terminal = Terminal(cluster, "salloc", "-N2", "bash", "--norc")

    def steps():
        return set(faults.started_by(folder, "generation/get_hf2.py"))

    terminal.type(f"{command}\n")
    terminal.wait(lambda: len(steps()) >= 2)
    before = steps()
    os.kill(driver(folder), signal.SIGKILL)
    terminal.wait(lambda: "Killed" in terminal.said)
    assert steps() & before
    terminal.type(f"{command}\n")
    terminal.wait(lambda: len(steps() - before) >= 2 and not steps() & before)
    cluster("run", "scancel", terminal.said.split("allocation ")[1].split()[0])
    terminal.wait(
        lambda: "the terminal or the job is gone; to continue: bash run_loop.sh" in terminal.said, 20
    )
    terminal.wait(lambda: not faults.started_by(folder), 20)
    terminal.type("exit\n")
    terminal.close()


@pytest.mark.long
def test_gpus_of_a_login_node_are_not_the_job_s(cluster, tmp_path):
    command = ["bash", CLUSTER, "run", cluster.folder, "salloc", "-N2", "--gpus-per-node=1"]
    given = ["--run_dir", tmp_path / "run", "--without_gpu", "false", "--check"]
    end = faults.ended([*command, "bash", "run_loop.sh", faults.CONFIG, *given], 60)
    assert "login is no machine of job" in end.stderr and "srun --nodes=1 --ntasks=1 --pty bash" in end.stderr
    stand_in(tmp_path)  # the login node has GPUs of its own
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    end = faults.ended([*command, "bash", "run_loop.sh", faults.CONFIG, *given], 60, environment)
    assert "error: login is no machine of job" in end.stderr, end.stderr


# ---- Jobs made with other options ----------------------------------------------------------------------


def stand_in(folder):
    """STAND-IN for nvidia-smi, which counts two GPUs."""
    (folder / "nvidia-smi").write_text('#!/bin/sh\nfor k in 0 1; do echo "GPU $k: stand-in"; done\n')
    (folder / "nvidia-smi").chmod(0o755)


OPTIONS = [
    "--gpus-per-task=2 --ntasks-per-node=1 -c 2",
    "--gpus=4 --ntasks=4 --ntasks-per-gpu=1",
    "--gpus-per-node=2 --gpu-bind=single:1 -c 2",
]
MORE_OPTIONS = [
    "--gpus-per-task=1 --ntasks-per-node=2",
    "--gpus=4 -c 2",
    "--gres=gpu:2 --hint=nomultithread --mem-per-cpu=100 -c 2",
    "--gpus-per-node=2 --cpus-per-gpu=1 --mem-per-gpu=100 --distribution=cyclic",
]


@pytest.mark.parametrize(
    "options", [*OPTIONS, *(pytest.param(option, marks=pytest.mark.long) for option in MORE_OPTIONS)]
)
def test_gpus_are_found_however_the_job_was_made(cluster, tmp_path, options):
    """The job's own wishes for its tasks are not ours, and srun would take them over."""
    stand_in(tmp_path)
    python = (
        "import sys; from loop import machines; from loop.settings import LoopSettings; "
        "settings = LoopSettings(run_dir='x', model_name_or_path='x', prompts=['x']); "
        "print(*machines.everywhere(settings, int(sys.argv[1]), sys.argv[2], ends=True))"
    )
    show = "sh -c 'echo $1 $(uname -n) $CUDA_VISIBLE_DEVICES' - TASK"
    start = f'{shutil.which("python3")} -c "{python}"'
    job = f"$({start} 2 1) {show}\n$({start} 1 all) {show}\n"
    (tmp_path / "job").write_text(f"#!/bin/bash\nset -e\n{job}")
    job = [
        "sbatch",
        "-N2",
        "-w",
        "n1,n2",
        "--wait",
        f"--output={tmp_path}/out",
        *options.split(),
        tmp_path / "job",
    ]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    end = faults.ended(["bash", CLUSTER, "run", cluster.folder, *job], 60, environment)
    said = (tmp_path / "out").read_text() if (tmp_path / "out").exists() else end.stderr
    assert end.returncode == 0, said
    lines = [line.split() for line in said.splitlines()]
    assert sorted(line[0] for line in lines) == ["0", "0", "1", "1", "2", "3"], said
    assert sorted(line[1:] for line in lines) == [[n, g] for n in ("n1", "n2") for g in ("0", "0,1", "1")], (
        said
    )


def test_a_shell_of_salloc_is_told_where_to_go(monkeypatch):
    settings = LoopSettings(run_dir="x", model_name_or_path="x", prompts=["x"])
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    machines.check(settings)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    with pytest.raises(UserError, match="is no machine of job 7: go to one by `srun"):
        machines.check(settings)
    assert "is no machine of job 7" in machines.on_login_node(settings)
    machines.check(dataclasses.replace(settings, without_gpu=True))
    machines.check(dataclasses.replace(settings, num_gpus=8))  # a plan
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    machines.check(settings)
    assert not machines.on_login_node(settings)


def test_what_is_not_known_is_left_out(monkeypatch):
    """A plan for machines elsewhere, made outside of any job."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    settings = LoopSettings(run_dir="x", model_name_or_path="x", prompts=["x"], machines=2)
    start = machines.everywhere(settings, 4, "1", ends=False)
    assert start[0] == "srun" and not any(word.startswith(("--cpus", "--gpus")) for word in start), start


def test_a_task_that_fails_is_told_at_once(cluster, built, tmp_path):
    folder, settings = tmp_path / "run", faults.small_settings(tmp_path)
    (folder / "iter0/shards/heldout_sampled.generated.of2.1.jsonl").mkdir(parents=True)  # not to be written
    job = cluster.submit(tmp_path, faults.CONFIG, *settings, "--run_dir", folder, "--stop_stage", "1.1")
    log = tmp_path / "job.log"
    told = "n2: task 1: Exited with exit code 2, the others go on; its log: " + str(
        folder / "iter0/logs/sample.1.log"
    )
    faults.wait_for(lambda: log.exists() and told in log.read_text(), 60, 0.2)
    assert faults.started_by(folder, "generation/get_hf2.py") and "\nlog: " not in log.read_text()
    cluster.cancel(job)
    faults.wait_for(lambda: not faults.started_by(folder), 30)
    (folder / "iter0/shards/heldout_sampled.generated.of2.0.jsonl").mkdir()
    job = cluster.submit(tmp_path, faults.CONFIG, *settings, "--run_dir", folder, "--stop_stage", "1.1")
    cluster.wait(job, "FAILED", seconds=60)
    assert f"\nlog: {folder}/iter0/logs/sample." in log.read_text()


# ---- File systems --------------------------------------------------------------------------------------


@pytest.fixture
def no_flock(tmp_path):
    """An option of sbatch, for a job in which no program can lock a file of the test."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "no_flock.c").write_text(NO_FLOCK)
    end = faults.ended(["cc", "-shared", "-fPIC", "-o", tmp_path / "no_flock.so", tmp_path / "no_flock.c"])
    assert end.returncode == 0, end.stderr
    return f"--export=ALL,LD_PRELOAD={tmp_path}/no_flock.so,NO_FLOCK={tmp_path}"


def test_without_locks_another_job_is_refused(cluster, built, tmp_path, no_flock):
    """Two jobs on different nodes; the first waits in its setup command. When its driver was killed another
    one may begin, with a note.
    """
    folder, settings = tmp_path / "run", faults.small_settings(tmp_path)
    go, logs = tmp_path / "go", [tmp_path / f"job{k}.log" for k in range(3)]
    settings += ["--run_dir", folder, "--stop_stage", "1.1"]
    settings += ["--setup_command", f"touch {tmp_path}/held; while [ ! -e {go} ]; do sleep 0.1; done"]

    def submit(number):
        options = [no_flock, "-N1", f"--output={logs[number]}", "-w", f"n{1 + number}"]
        return cluster.submit(tmp_path, faults.CONFIG, *settings, options=options)

    first = submit(0)
    faults.wait_for((tmp_path / "held").exists, 30)
    second = submit(1)
    cluster.wait(second, "COMPLETED", "FAILED", seconds=30)
    assert "another run is at work in" in logs[1].read_text()
    assert logs[0].read_text().count("refuses locks") == 1
    os.kill(driver(folder), signal.SIGKILL)
    cluster.wait(first, "FAILED", "COMPLETED", seconds=30)
    go.touch()
    third = submit(2)
    faults.wait_for(lambda: faults.started_by(folder, "generation/get_hf2.py"), 60)
    assert "refuses locks" in logs[2].read_text()
    cluster.cancel(third)
    faults.wait_for(lambda: not faults.started_by(folder), 30)


@pytest.mark.long
def test_a_run_without_locks(cluster, undisturbed, tmp_path, no_flock):
    whole, settings = undisturbed
    folder = tmp_path / "run"
    settings = [*settings, "--run_dir", folder, "--stop_stage", "1.3"]
    job = cluster.submit(tmp_path, faults.CONFIG, *settings, options=[no_flock])
    cluster.wait(job, "COMPLETED", "FAILED")
    log = (tmp_path / "job.log").read_text()
    assert cluster.state(job) == "COMPLETED" and log.count("nothing will stop a second start") == 1, log
    assert faults.records(folder / "iter1/rewarded.jsonl") == faults.records(whole / "iter1/rewarded.jsonl")
    assert (folder / "iter1/model/config.json").is_file()


@pytest.fixture
def slow(cluster, tmp_path, request):
    """A folder that each machine sees through a file system of its own, which remembers for some seconds (the
    parameter) that a name was not there, as NFS clients do.
    """
    if shutil.which("bindfs") is None or not os.path.exists("/dev/fuse"):
        pytest.skip("needs bindfs (Debian's package of that name) and /dev/fuse")
    folder = tmp_path / "slow"
    folder.mkdir()
    mount = [
        "bindfs",
        "-f",
        "-o",
        f"negative_timeout={request.param},entry_timeout={request.param}",
        folder,
        folder,
    ]
    mounts = []
    for where in (("run",), ("node", 1), ("node", 2)):
        words = ["bash", CLUSTER, where[0], cluster.folder, *where[1:]]
        mounts.append(faults.begin([*words, *mount]))
        mounted = [*words, "sh", "-c", f"[ $(stat -c %d {folder}) != $(stat -c %d {tmp_path}) ]"]
        faults.wait_for(lambda mounted=mounted: faults.ended(mounted).returncode == 0, 20)
    yield folder
    for one in mounts:
        faults.kill(one)
    for where in (("run",), ("node", 1), ("node", 2)):
        faults.ended(["bash", CLUSTER, where[0], cluster.folder, *where[1:], "umount", "-l", folder])


@pytest.mark.parametrize("slow", [8], indirect=True)
def test_what_another_machine_has_made_is_waited_for(cluster, slow):
    """n2 has asked for a model before n1 made it, and forgets that only by and by."""
    python, model = shutil.which("python3"), slow / "model"
    n1, n2 = (["bash", CLUSTER, "node", cluster.folder, k] for k in (1, 2))
    for name in (model, slow / "model.manifest.json"):
        assert faults.ended([*n2, "ls", name]).returncode
    told = {"settings": {}, "inputs": {}, "complete": True, "output": {"size": 5}}
    made = f"mkdir {model}; echo 1234 >{model}/weights; echo '{json.dumps(told)}' >{model}.manifest.json"
    assert faults.ended([*n1, "sh", "-c", made]).returncode == 0
    assert faults.ended([*n2, "ls", model]).returncode, "the file system is not as slow as it was to be"
    one, several = {"RLHF_MACHINES": "1"}, {"RLHF_MACHINES": "2"}
    for given in ([model], ["--made", model]):
        began = time.monotonic()
        end = faults.ended([*n2, python, "loop/seen.py", *given], 30, one)
        assert end.returncode and "n2 does not see" in end.stderr and time.monotonic() - began < 5
    for given in ([model, model / "weights", slow / "model.manifest.json"], ["--made", model]):
        end = faults.ended([*n2, python, "loop/seen.py", *given], 30, several)
        assert end.returncode == 0, end.stderr


@pytest.mark.long
@pytest.mark.parametrize("slow", [75], indirect=True)
def test_a_run_on_a_slow_file_system(cluster, undisturbed, slow, tmp_path):
    """The driver on the login node, which sees nothing of its own; a training that is cut off and goes on."""
    whole, settings = undisturbed
    folder = slow / "run"
    command = loop(folder, settings, "--training_args.save_steps", 1, "--stop_stage", "1.3")
    command = ["bash", CLUSTER, "run", cluster.folder, "salloc", "-N2", "-w", "n1,n2", *command]
    with open(tmp_path / "log", "wb") as log:
        first = faults.begin(command, log)
        faults.wait_for(lambda: list(folder.glob("iter1/model/checkpoint-*/trainer_state.json")), 600)
        os.kill(driver(folder), signal.SIGTERM)
        first.wait(60)
        second = faults.begin(command, log)
        assert second.wait(600) == 0, (tmp_path / "log").read_text()
    assert "continuing from " in (folder / "iter1/logs/train.log").read_text()
    assert faults.records(folder / "iter1/rewarded.jsonl") == faults.records(whole / "iter1/rewarded.jsonl")
    assert json.loads((folder / "iter1/model.manifest.json").read_text())["complete"]


# ---- Other machines than before ------------------------------------------------------------------------


@pytest.mark.long
def test_machines_come_and_go(cluster, undisturbed, tmp_path):
    """Two machines, then three, then one: what was sampled is taken over, and the answers are one's."""
    whole, settings = undisturbed
    folder = tmp_path / "run"
    settings = [*settings, "--generation.max_num_seqs", 1, "--stop_stage", "1.2", "--run_dir", folder]
    saved = 0
    for nodes in (2, 3):
        job = cluster.submit(tmp_path, faults.CONFIG, *settings, options=[f"-N{nodes}"])
        faults.wait_for(lambda nodes=nodes, saved=saved: held(folder, nodes) >= saved + 6, 400)
        cluster.cancel(job)
        faults.wait_for(lambda: not faults.started_by(folder), 60)
        cluster.wait(job, "CANCELLED", seconds=60)
        saved = held(folder, nodes)
    job = cluster.submit(tmp_path, faults.CONFIG, *settings, options=["-N1"])
    cluster.wait(job, "COMPLETED", "FAILED")
    assert cluster.state(job) == "COMPLETED", (tmp_path / "job.log").read_text()
    logs = [path.read_text() for path in folder.glob("iter0/logs/sample.*.log")]
    assert sum(log.count("taken over from another number of shards") for log in logs) >= 2
    for kind in ("generated", "rewarded"):
        assert faults.records(folder / f"iter1/{kind}.jsonl") == faults.records(whole / f"iter1/{kind}.jsonl")


def held(folder, shards):
    """Answers in the unfinished shards of so many."""
    paths = folder.glob(f"iter*/shards/*.of{shards}.*.jsonl*")
    return sum(path.read_bytes().count(b"\n") for path in paths if "manifest" not in path.name)


@pytest.mark.long
def test_a_job_that_starts_as_its_node_comes_back(cluster, built, tmp_path):
    """The job waits for its node and is started again in the moment in which that is back."""
    folder, settings = tmp_path / "run", faults.small_settings(tmp_path)
    go, held = tmp_path / "go", tmp_path / "held"
    settings += ["--setup_command", f"touch {held}; while [ ! -e {go} ]; do sleep 0.1; done"]
    settings += ["--run_dir", folder, "--stop_stage", "1.1"]
    job = cluster.submit(tmp_path, faults.CONFIG, *settings, options=["-w", "n1,n2"])
    faults.wait_for(held.exists, 30)
    cluster("kill", 2)
    cluster.wait(job, "PENDING", seconds=120)
    go.touch()
    cluster("run", "scontrol", "update", f"jobid={job}", "StartTime=now")  # Slurm would wait for two minutes
    time.sleep(3)
    assert cluster.state(job) == "PENDING"
    cluster("boot", 2)
    faults.wait_for(lambda: len(faults.started_by(folder, "generation/get_hf2.py")) >= 2, 2 * machines.ASKED)
    cluster.cancel(job)
    faults.wait_for(lambda: not faults.started_by(folder), 30)
