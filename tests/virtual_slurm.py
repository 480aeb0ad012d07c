"""A real Slurm of two virtual nodes, for tests: loop/slurm.sh from Python."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import faults
import pytest

CLUSTER = str(Path(__file__).with_name("loop") / "slurm.sh")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter")
JOB = ("sbatch", "--parsable", "--gpus-per-node=1", "--cpus-per-task=1", "--output=%DIR%/job.log")


def missing() -> str:
    """What this machine lacks for virtual nodes, in words; empty where it has all."""
    if lacking := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"needs {', '.join(lacking)} (Debian's slurmctld slurmd slurm-client munge)"
    asked = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False)
    return "needs the right to unshare" if asked.returncode else ""


class Cluster:
    """Two virtual nodes, n1 and n2."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, action, *arguments, **environment):
        """slurm.sh's ACTION; what it prints."""
        command = ["bash", CLUSTER, action, self.folder, *map(str, arguments)]
        end = faults.ended(command, 100, environment)
        assert end.returncode == 0, end.stdout + end.stderr
        return end.stdout.strip()

    def submit(self, folder, *arguments, options=(), script="configs/loop.slurm"):
        """A job's number."""
        job = [word.replace("%DIR%", str(folder)) for word in (*JOB, *options)]
        return self("run", *job, script, *arguments)

    def cancel(self, job):
        """End a job, and wait until the queue is without it: till then another start is refused."""
        self("run", "scancel", job)
        faults.wait_for(lambda: str(job) not in self("run", "squeue", "-h", "-o", "%A").split(), 60, 0.2)

    def state(self, job):
        told = self("run", "scontrol", "show", "job", job)
        return told.split("JobState=")[1].split()[0]

    def wait(self, job, *states, seconds=600):
        faults.wait_for(lambda: self.state(job) in states, seconds, 0.5)


@contextlib.contextmanager
def started(folder, nodes=2, gpus=2, kind=Cluster):
    """A cluster while the block runs; where this machine can have none, the test is skipped by name."""
    if why := missing():
        pytest.skip(why)
    found = kind(folder)
    end = faults.ended(["bash", CLUSTER, "start", folder, nodes, gpus], 100)
    try:
        if end.returncode:
            pytest.skip(f"virtual nodes do not start here: {' '.join(end.stderr.split())[-200:]}")
        yield found
    finally:
        found("stop")
