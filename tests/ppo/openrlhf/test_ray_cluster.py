"""ray_cluster.py with the real Ray on two machines under a real Slurm, whose nodes are virtual. Of a GPU
there is the count alone: nvidia-smi is a STAND-IN.
"""

import contextlib
import os
import re
import shutil
import signal
import tempfile
import time
from pathlib import Path

import faults
import pytest
from virtual_slurm import started

from loop import machines
from loop.settings import LoopSettings

SEE = """import os, sys, time
import ray

ray.init(log_to_driver=False)

@ray.remote(num_gpus=1)
class Task:
    def where(self):
        return os.uname().nodename, os.environ["CUDA_VISIBLE_DEVICES"], os.environ.get("DS_SKIP_CUDA_CHECK")

tasks = [Task.remote() for _ in range(int(ray.cluster_resources()["GPU"]))]
print("SEES", sorted(ray.get([task.where.remote() for task in tasks])), flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(3)
"""

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with started(tmp_path_factory.mktemp("slurm")) as found:
        yield found


class Job:
    """A job of two machines, whose step runs a command on a Ray cluster of its own."""

    def __init__(self, cluster, environment, folder):
        self.cluster, self.folder, self.out = cluster, folder, folder / "out"
        self.temporary = tempfile.mkdtemp(prefix="r")  # a short name: sockets lie there
        smi = folder / "bin/nvidia-smi"
        smi.parent.mkdir()
        smi.write_text('#!/bin/sh\nfor k in 0 1; do echo "GPU $k: stand-in"; done\n')
        smi.chmod(0o755)
        (folder / "see.py").write_text(SEE)
        self.given = {"MARK_OF_A_TEST": str(folder), "TMPDIR": self.temporary}
        self.given["PATH"] = f"{smi.parent}:{environment}/bin:{os.environ['PATH']}"

    def submit(self, sleeps, first="", **more):
        """The job's number. `first`: bash in front of the cluster on each machine."""
        settings = LoopSettings(run_dir="x", model_name_or_path="x", prompts=["x"], machines=2)
        step = machines.everywhere(settings, 1, "all", ends=True)
        words = f"python ppo/openrlhf/ray_cluster.py $@ python {self.folder}/see.py {sleeps}"
        inner = f"bash -c '{first} exec {words}' - MACHINE 2 HEAD PORT"
        (self.folder / "job").write_text(f"#!/bin/bash\nexec {' '.join(step)} {inner}\n")
        options = ("-N2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
        command = ("sbatch", "--parsable", *options, f"--output={self.out}", self.folder / "job")
        return self.cluster("run", *command, **self.given | more)

    def said(self):
        return self.out.read_text() if self.out.exists() else ""

    def alive(self, what=""):
        """Processes of the job on both machines, with `what` in their command line."""
        mark = f"MARK_OF_A_TEST={self.folder}"
        return faults.processes(lambda line, given: mark in given and what in line)


@pytest.fixture
def job(cluster, environment, tmp_path):
    it = Job(cluster, environment, tmp_path)
    yield it
    left = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in it.alive()}
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(it.temporary, ignore_errors=True)
    assert not left


def test_a_command_finds_the_gpus_of_all_machines(cluster, job):
    """GPU 0 of n2 is another job's. The command's status is the job's, and nothing is left."""
    other = cluster(
        "run",
        "sbatch",
        "--parsable",
        "-w",
        "n2",
        "--gpus-per-node=1",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 300",
    )
    cluster.wait(other, "RUNNING", seconds=30)
    number = job.submit(0)
    cluster.wait(number, "FAILED", "COMPLETED", seconds=400)
    cluster("run", "scancel", other)
    assert "2 machines with 1 + 1 GPUs is up" in job.said(), job.said()
    assert "SEES [('n1', '0', '1'), ('n2', '1', '1')]" in job.said(), job.said()
    assert "ExitCode=3:0" in cluster("run", "scontrol", "show", "job", number)
    faults.wait_for(lambda: not job.alive(), 20)


def test_a_machine_that_does_not_join_is_named(cluster, job):
    slow = '[ "$SLURM_NODEID" = 0 ] || exec sleep 300;'
    number = job.submit(0, slow, RAY_CLUSTER_JOINING="30")
    cluster.wait(number, "FAILED", "COMPLETED", seconds=400)
    assert re.search(r"^error: 1 of 2 machines have joined .* within 30 s: n2 did not; ", job.said(), re.M)
    faults.wait_for(lambda: not job.alive(), 20)


@pytest.mark.parametrize("how", ["scancel", "the head's script", "the command", "Ray of n2", "srun"])
def test_what_ends_a_part_ends_all(how, cluster, job):
    """With kill -9, which nobody can answer, where a process is meant."""
    number = job.submit(300)
    faults.wait_for(lambda: "SEES" in job.said(), 400, 0.5)
    began = time.monotonic()
    if how == "scancel":
        cluster("run", "scancel", number)
    else:
        what = {"the head's script": "ray_cluster.py 0 ", "the command": "see.py 300", "srun": "srun "}
        found = job.alive(what.get(how, "raylet/raylet"))
        if how == "Ray of n2":
            found = [pid for pid in found if node_of(pid) == "n2"]
        if how == "the command":
            found = [pid for pid in found if "ray_cluster" not in Path(f"/proc/{pid}/cmdline").read_text()]
        assert found
        for pid in found:
            os.kill(pid, signal.SIGKILL)
    faults.wait_for(lambda: not job.alive(), 60, 0.2)
    print(f"{how}: all ended after {time.monotonic() - began:.1f} s")
    cluster.wait(number, "FAILED", "CANCELLED", seconds=60)
    if how == "Ray of n2":
        assert "error: Ray has ended on n2" in job.said(), job.said()


def node_of(pid):
    """The machine of a process."""
    given = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next(line.partition("=")[2] for line in given if line.startswith("SLURMD_NODENAME="))
