"""How the commands of a run are started on several machines: by srun inside a Slurm job, or by on_ray.py on a
Ray cluster.
"""

import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError, count
from common.devices import visible_gpus
from loop import probe

if TYPE_CHECKING:
    from loop.check import Findings
    from loop.settings import RunSettings

# How often the machines are asked, and seconds for which their answers are waited for: what is started while
# a machine comes back may be lost, and the run should not be.
TRIES, ASKED = 2, 150
# What a job was made with and srun would take over, though it does not go with `everywhere`: an error beside
# --ntasks-per-node, and GPUs for the job's tasks, which are not ours. The last is newer Slurm's name for it.
NOT_OURS = ("SLURM_NTASKS_PER_GPU", "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK")
# What accelerate is told on each machine; loop/task.sh knows the words in capitals.
OF_ACCELERATE = (
    "--machine_rank MACHINE --main_process_ip HEAD --main_process_port PORT "
    "--deepspeed_multinode_launcher standard"
).split()


def on_ray(settings: "RunSettings") -> bool:
    """Whether Ray starts the steps: where that is asked for, or where several machines are, RAY_ADDRESS names
    a cluster and this is no Slurm job.
    """
    if settings.launcher != "auto":
        return settings.launcher == "ray"
    return "SLURM_JOB_ID" not in os.environ and "RAY_ADDRESS" in os.environ and (settings.machines or 1) > 1


def ray_python() -> str:
    """The Python that has Ray: the driver was started with it in front, before it entered an environment."""
    return os.environ.get("RLHF_RAY_PYTHON", "python")


@functools.cache
def cluster() -> tuple[int, int]:
    """(machines of the Ray cluster with the most GPUs, GPUs of each).

    Raises:
        UserError: no cluster answers, or this Python has no Ray.
    """
    if told := os.environ.get("RLHF_RAY_CLUSTER"):  # asked once a start: it takes seconds
        machines, gpus = map(int, told.split())
        return machines, gpus
    answer = subprocess.run(
        [ray_python(), "loop/on_ray.py", "--describe"], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        said = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
        raise UserError(said[-1].removeprefix("error: ") if said else answer.stderr[-300:])
    there = [one for one in json.loads(answer.stdout.splitlines()[-1]) if one["cpus"]]
    most = max((one["gpus"] for one in there), default=0)
    return sum(one["gpus"] == most for one in there), most


def gpus_of(settings: "RunSettings") -> list[str]:
    """Names of a machine's GPUs: those visible here, as many as Ray counts, or as a plan is asked for."""
    if settings.num_gpus is None and not on_ray(settings):
        return visible_gpus()
    return [str(k) for k in range(cluster()[1] if settings.num_gpus is None else settings.num_gpus)]


def allocated(settings: "RunSettings") -> int:
    """Machines that there are: of the Ray cluster, or of the Slurm job that this was started in, else 1."""
    if on_ray(settings):
        return cluster()[0] if settings.num_gpus is None else 1
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) if "SLURM_JOB_ID" in os.environ else 1


def machine_count(settings: "RunSettings") -> int:
    """Machines that each step runs on."""
    return allocated(settings) if settings.machines is None else settings.machines


def beside_its_job(submit: str) -> str:
    """What to do on a machine that is none of the Slurm job's, in words: salloc leaves its shell on the login
    node. Empty where this is no job, or one of its machines.
    """
    if "SLURM_JOB_ID" not in os.environ or "SLURMD_NODENAME" in os.environ:
        return ""
    host, job = os.uname().nodename, os.environ["SLURM_JOB_ID"]
    return (
        f"{host} is no machine of job {job}: go to one by `srun --nodes=1 --ntasks=1 --pty bash` and start "
        f"it there, or as a job: sbatch {submit} CONFIG"
    )


def on_login_node(settings: "RunSettings") -> str:
    """What to do about missing GPUs where other machines may have them, in words; else nothing."""
    if on_ray(settings):
        return ", nor has a machine of the Ray cluster any"
    job = settings.job
    if why := beside_its_job(job):
        return f" ({why})"
    if "SLURM_JOB_ID" in os.environ or shutil.which("sbatch") is None:
        return ""
    return f" (on a login node, start it as a job: sbatch {job} CONFIG)"


def check(settings: "RunSettings"):
    """Refuse a number of machines that cannot be had here.

    Raises:
        UserError: says what to do.
    """
    wanted, here = settings.machines or 1, settings.num_gpus is None
    if wanted < 1:
        raise UserError(f"machines {wanted} must be at least 1")
    if here and wanted > (there := allocated(settings)):
        if on_ray(settings):
            has = f"{count(there, 'machine')} with {count(cluster()[1], 'GPU')} each"
            raise UserError(f"machines {wanted}, and the Ray cluster has {has}")
        inside = f"this Slurm job has {there}" if "SLURM_JOB_ID" in os.environ else "this is no Slurm job"
        raise UserError(f"machines {wanted}, and {inside}: sbatch --nodes={wanted} {settings.job} CONFIG")
    if settings.launcher == "slurm" and here and "SLURM_JOB_ID" not in os.environ:
        raise UserError(f"launcher slurm, and this is no Slurm job: sbatch {settings.job} CONFIG")
    if not on_ray(settings) and beside_its_job(settings.job) and here and not settings.without_gpu:
        raise UserError(beside_its_job(settings.job))  # the GPUs that are counted here are others
    servers = settings.generation_backend == "servers" and "start" not in settings.servers
    if servers and (on_ray(settings) or machine_count(settings) > 1):
        raise UserError(
            "generation_backend servers starts servers on one machine: on several, take the engine, or "
            "give servers.hosts, ports, start and stop (docs/clusters.md)"
        )


def everywhere(settings: "RunSettings", tasks: int, gpus: str, ends: bool) -> list[str]:
    """The words in front of a command that start it on every machine; none where there is one machine.

    Args:
        tasks: of each machine. gpus: of each task, `all` or a number. ends: whether a task that fails ends
            the others.
    """
    machines, task = machine_count(settings), ["bash", "loop/task.sh", gpus]
    if on_ray(settings):
        each = ["--machines", str(machines), "--gpus", str(len(gpus_of(settings)))]
        together = ["--together"] if ends else []
        return [ray_python(), "loop/on_ray.py", *each, "--tasks", str(tasks), *together, *task]
    if machines == 1:
        return []
    without = [word for name in NOT_OURS if name in os.environ for word in ("-u", name)]
    cpus, there = cpus_of_a_machine(), os.environ.get("SLURM_GPUS_ON_NODE")
    # All of it is said, since srun inherits the job's own numbers without a word. Each task is shown all GPUs
    # of its machine, however the job asked for them, and loop/task.sh cuts out the task's own.
    return [
        *(["env", *without] if without else []),
        *("srun", f"--nodes={machines}", f"--ntasks={machines * tasks}", f"--ntasks-per-node={tasks}"),
        *([f"--cpus-per-task={max(1, cpus // tasks)}"] if cpus else []),
        *([f"--gpus-per-node={there}", "--gpu-bind=none"] if there else []),
        *("--cpu-bind=none", "--export=ALL", "--overlap", f"--kill-on-bad-exit={int(ends)}"),
        *task,
    ]


def cpus_of_a_machine() -> int | None:
    """CPUs that the Slurm job has on the machine where it has fewest, `64(x2),32`; None outside of any."""
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", os.environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
    return min(map(int, counts), default=None)


def of_accelerate(settings: "RunSettings") -> list[str]:
    """The flags by which the launchers on all machines find each other; none where there is one machine."""
    count = machine_count(settings)
    return [] if count == 1 else ["--num_machines", str(count), *OF_ACCELERATE]


def ask(settings: "RunSettings", folder: Path, found: "Findings"):
    """Look at the machines that a run is to use, one command on each of them, and tell in what they differ.

    Args:
        folder: that of the run, or the nearest one above it that is there.
    """
    wanted = machine_count(settings)
    if settings.num_gpus is not None or not everywhere(settings, 1, "all", ends=False):
        return
    told, said = {}, ""
    with tempfile.NamedTemporaryFile(prefix=".probe-", dir=folder) as file:
        with contextlib.suppress(OSError):  # where there are no locks, that is told below
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for _ in range(TRIES):
            if len(told) < wanted:
                told, said = answers(settings, file.name)
    if len(told) < wanted:
        found.problems.append(f"{len(told)} of {wanted} machines answer: {said or 'they say nothing'}")
    if 0 not in told:
        return
    first, gpus = told[0], len(gpus_of(settings))
    if first["gpus"] != gpus:
        found.problems.append(
            f"{first['host']} sees {first['gpus']} of the {count(gpus, 'GPU')} it should have"
        )
    first = first | {"commit": probe.commit(), "vllm": probe.has_vllm()}
    before = len(found.problems) + len(found.notes)
    for number in sorted(told):
        compare(first, told[number], folder, found)
    if len(found.problems) + len(found.notes) == before and len(told) == wanted:
        found.notes.append(
            f"{count(wanted, 'machine')} answer alike: one commit, and each sees the others' files and locks"
        )


def answers(settings: "RunSettings", file: str) -> tuple[dict[int, dict], str]:
    """({machine: what loop/probe.py says there}, the end of what its launcher says)."""
    command = [*everywhere(settings, 1, "all", ends=False), "python", "loop/probe.py", "MACHINE", file]
    patient = os.environ | {"RLHF_RAY_PATIENCE": str(ASKED // 3)}  # Ray's launcher says what it waits for
    how = {
        "stdin": subprocess.DEVNULL,
        "capture_output": True,
        "text": True,
        "timeout": ASKED,
        "env": patient,
    }
    try:
        answer = subprocess.run(command, check=False, **how)
    except subprocess.TimeoutExpired:
        return {}, f"no answer for {ASKED} s"
    lines = [line for line in answer.stdout.splitlines() if line.startswith("{")]
    return {one["machine"]: one for one in map(json.loads, lines)}, " ".join(answer.stderr.split())[-300:]


def compare(first: dict, other: dict, folder: Path, found: "Findings"):
    """Tell in what a machine differs from the first one, as loop/probe.py tells of both; `commit` and `vllm`
    of `first` are this machine's.
    """
    host = other["host"]
    if other["gpus"] != first["gpus"] or (other["gpu_gib"] or 0) < 0.99 * (first["gpu_gib"] or 0):
        has, had = (f"{one['gpus']} GPUs of {one['gpu_gib'] or 0:.0f} GiB" for one in (other, first))
        found.problems.append(f"{host} has {has} and {first['host']} {had}: take machines that are alike")
    if other["commit"] != first["commit"]:
        found.problems.append(
            f"{host} sees commit {other['commit'][:12] or '(none)'} of the project, this machine "
            f"{first['commit'][:12]}: they must share the project's folder"
        )
    if other["seen_after"] is None:
        found.problems.append(
            f"{host} does not see what was written into {folder}: the run must lie on a file system that all "
            "machines share"
        )
        return
    if first["vllm"] and not other["vllm"]:
        found.problems.append(f"{host} does not see environment vllm: environments must be shared, too")
    if other["seen_after"] > 1:
        found.notes.append(
            f"{host} saw a new file after {other['seen_after']:.0f} s; the loop waits for such"
        )
    if not other["refused"]:
        why = "has no locks" if other["refused"] is None else "keeps locks to a machine"
        found.notes.append(f"the file system of {folder} {why}: start this run from one place at a time")
    if other["temporary_gib"] < 2:
        found.notes.append(f"{host} has {other['temporary_gib']:.1f} GiB left in its temporary folder")
