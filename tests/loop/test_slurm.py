"""The loop on two machines under a real Slurm, whose nodes are virtual (slurm.sh): what one machine cannot
show is a network between GPUs, a shared file system of its own kind, and the confinement of devices.
"""

import os
import time
from pathlib import Path

import faults
import pytest
from virtual_slurm import CLUSTER, started

from loop import machines
from loop.settings import LoopSettings


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with started(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def test_a_task_finds_its_machine_and_its_gpus(cluster, tmp_path):
    """GPU 0 of n2 is another job's: each machine cuts tasks out of its own list. The job was made for one
    task a machine; nvidia-smi is a stand-in that counts.
    """
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text('#!/bin/sh\nfor k in 0 1 2 3; do echo "GPU $k: stand-in"; done\n')
    smi.chmod(0o755)
    options = "-w n2 --gpus-per-node=1 --output=/dev/null".split()
    other = cluster("run", "sbatch", "--parsable", *options, "--wrap", "sleep 300")
    cluster.wait(other, "RUNNING", seconds=30)
    settings = LoopSettings(run_dir="x", model_name_or_path="x", prompts=["x"], machines=2)
    words = ["sh", "-c", 'echo $(uname -n) "$@" ${CUDA_VISIBLE_DEVICES-none}', "-", "TASK", "MACHINE", "HEAD"]

    def told(tasks, gpus, *options):
        start = machines.everywhere(settings, tasks, gpus, ends=True)
        (tmp_path / "job").write_text(f"#!/bin/bash\n{' '.join(start)} {' '.join(map(repr, words))}\n")
        job = [
            "-N2",
            "--ntasks-per-node=1",
            "--gpus-per-node=1",
            "--wait",
            f"--output={tmp_path}/out",
            *options,
        ]
        environment = {"PATH": f"{smi.parent}:{os.environ['PATH']}"}
        command = ["bash", CLUSTER, "run", cluster.folder, "sbatch", *job, tmp_path / "job"]
        return faults.ended(command, 60, environment).returncode, (tmp_path / "out").read_text()

    for gpus in ("1", "all"):
        status, said = told(1, gpus)
        assert status == 0 and sorted(said.split("\n")[:2]) == ["n1 0 0 n1 0", "n2 1 1 n1 1"]
    cluster("run", "scancel", other)
    status, said = told(2, "1", "--cpus-per-task=2")  # more than the GPU that each node has
    assert status and "has 1 GPUs: none are left for its task 1" in said, said


def test_two_machines_give_what_one_gives(cluster, undisturbed, tmp_path):
    """From sampling to training; a node loses its power while it samples. The job is queued again and goes
    on, and no process of it is left.
    """
    whole, settings = undisturbed
    folder = tmp_path / "run"
    settings = [*settings, "--generation.max_num_seqs", 1, "--stop_stage", "1.3", "--run_dir", folder]
    job = cluster.submit(tmp_path, faults.CONFIG, *settings)
    partial = folder / "iter1/shards/generated.of2.1.jsonl.partial"
    faults.wait_for(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 3, 300)
    cluster("kill", 2)
    before = [line for line in partial.read_text().split("\n") if line.endswith("}")]
    faults.wait_for(lambda: not faults.started_by(folder), 120)
    cluster.wait(job, "PENDING", seconds=120)
    cluster("boot", 2)
    faults.wait_for(lambda: cluster("run", "sinfo", "-h", "-n", "n2", "-t", "idle", "-o", "%D"), 60, 0.5)
    time.sleep(3)  # Slurm ends there what it believes is left of the job, for which it would wait itself
    assert "terminated; to continue: sbatch configs/loop.slurm" in (tmp_path / "job.log").read_text()
    cluster("run", "scontrol", "update", f"jobid={job}", "StartTime=now")  # Slurm would wait for two minutes
    cluster.wait(job, "COMPLETED", "FAILED")
    log = (tmp_path / "job.log").read_text()
    assert cluster.state(job) == "COMPLETED" and "2 training processes over 2 machines" in log, log
    assert len(before) >= 3 and "continuing: " in (folder / "iter0/logs/sample.1.log").read_text()
    for name in ("iter0/heldout_sampled", "iter0/heldout_greedy", "iter1/"):
        for kind in ("generated", "rewarded"):
            file = f"{name}{kind}.jsonl" if name.endswith("/") else f"{name}.{kind}.jsonl"
            assert faults.records(folder / file) == faults.records(whole / file), file
    assert (folder / "iter1/model/config.json").is_file()
    assert not faults.started_by(folder) and not (folder / "iter1/shards/generated.of2.0.jsonl").exists()


@pytest.mark.long
def test_a_preempted_run_goes_on_with_other_numbers(cluster, undisturbed, tmp_path):
    """A job of higher priority takes the machines; the run goes on with twice as many shards and takes over
    what was saved.
    """
    whole, settings = undisturbed
    folder = tmp_path / "run"
    settings = [*settings, "--generation.max_num_seqs", 1, "--stop_stage", "1.2", "--run_dir", folder]
    job = cluster.submit(tmp_path, faults.CONFIG, *settings)
    shards = folder / "iter1/shards"
    faults.wait_for(lambda: taken(shards) >= 6, 300)
    options = "-p urgent -N2 --exclusive --output=/dev/null".split()
    urgent = cluster("run", "sbatch", "--parsable", *options, "--wrap", "sleep 1")
    cluster.wait(urgent, "COMPLETED", seconds=120)
    cluster.cancel(job)
    faults.wait_for(lambda: not faults.started_by(folder), 60)
    job = cluster.submit(tmp_path, faults.CONFIG, *settings, "--num_shards", 2, options=["--cpus-per-task=2"])
    cluster.wait(job, "COMPLETED", "FAILED")
    log = (tmp_path / "job.log").read_text()
    assert cluster.state(job) == "COMPLETED" and "4 generation processes" in log, log
    taken_over = [path for path in folder.glob("iter0/logs/sample.*.log") if "taken over" in path.read_text()]
    assert taken_over
    assert faults.records(folder / "iter1/generated.jsonl") == faults.records(whole / "iter1/generated.jsonl")
    assert not any(shards.iterdir())


def taken(shards):
    return sum(path.read_bytes().count(b"\n") for path in shards.glob("*.partial"))


def in_a_job(cluster, folder, *arguments):
    """What run_loop.sh says in a job of two machines."""
    job = ["-N2", "--gpus-per-node=1", "--cpus-per-task=2", "--wait", f"--output={folder}/out"]
    settings = [faults.CONFIG, "--run_dir", folder / "run", *arguments]
    cluster("run", "sbatch", *job, "configs/loop.slurm", *settings)
    return (folder / "out").read_text()


def test_the_machines_are_asked(cluster, tmp_path):
    said = in_a_job(cluster, tmp_path, "--check")
    assert "2 generation processes, 2 training processes over 2 machines" in said and "error" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unlike_machines_are_told():
    from loop.check import Findings

    first = {"host": "n1", "gpus": 8, "gpu_gib": 80.0, "commit": "a" * 40, "vllm": True, "refused": True}
    first |= {"seen_after": 0.1, "temporary_gib": 50.0}
    for changed, problem, note in (
        ({}, "", ""),
        ({"gpus": 4}, "n2 has 4 GPUs of 80 GiB and n1 8 GPUs of 80 GiB", ""),
        ({"gpu_gib": 40.0}, "n2 has 8 GPUs of 40 GiB", ""),
        ({"commit": "b" * 40}, "n2 sees commit bbbbbbbbbbbb of the project, this machine aaaaaaaaaaaa", ""),
        ({"seen_after": None, "refused": None}, "n2 does not see what was written into /x", ""),
        ({"seen_after": 31.0}, "", "n2 saw a new file after 31 s"),
        ({"refused": False}, "", "keeps locks to a machine"),
        ({"refused": None}, "", "has no locks"),
        ({"vllm": False}, "n2 does not see environment vllm", ""),
        ({"temporary_gib": 1.0}, "", "n2 has 1.0 GiB left"),
    ):
        found = Findings()
        machines.compare(first, first | {"host": "n2"} | changed, Path("/x"), found)
        assert len(found.problems) == bool(problem) and problem in "".join(found.problems)
        assert len(found.notes) == bool(note) and note in "".join(found.notes)


def test_a_login_node_is_told_what_to_do(tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    end = faults.ended(["bash", "run_loop.sh", "--check"], environment={"PATH": path})
    assert end.returncode == 2 and "sbatch configs/loop.slurm CONFIG" in end.stderr
    end = faults.ended(["bash", "run_loop.sh", faults.CONFIG, "--check", "--machines", "2"])
    assert end.returncode == 2 and "this is no Slurm job: sbatch --nodes=2" in end.stderr


def test_files_of_other_machines_are_waited_for(tmp_path, monkeypatch):
    from common import files

    monkeypatch.setattr(files.time, "sleep", lambda _: (tmp_path / "late").write_text(""))
    assert not files.in_time((tmp_path / "late").exists)
    monkeypatch.setenv("RLHF_MACHINES", "2")
    began = time.monotonic()
    assert files.in_time((tmp_path / "late").exists) and time.monotonic() - began < 5


def test_the_printed_commands_are_of_all_machines(cluster, tmp_path):
    said = in_a_job(cluster, tmp_path, "--dry_run", "--num_shards", 2)
    start = "srun --nodes=2 --ntasks={} --ntasks-per-node={} --cpus-per-task={} --gpus-per-node=1 "
    start += "--gpu-bind=none --cpu-bind=none --export=ALL --overlap"
    sampled, annotated, trained = (
        next(line for line in said.split("\n") if f"{script} {tmp_path}/run/loop.yaml" in line)
        for script in ("generation/get_hf2.py", "annotate_data/get_rewards.py", "dpo_iteration/run_dpo.py")
    )
    assert sampled.startswith(f"{start.format(4, 2, 1)} --kill-on-bad-exit=0 bash loop/task.sh 1 python")
    assert sampled.endswith("--local_index TASK --my_world_size 4") and ".of4. " in sampled
    for line in (annotated, trained):
        assert line.startswith(
            f"{start.format(2, 1, 2)} --kill-on-bad-exit=1 bash loop/task.sh all accelerate"
        )
        others = "--num_machines 2 --machine_rank MACHINE --main_process_ip HEAD --main_process_port PORT"
        assert others in line and "--num_processes 2 " in line
    assert "--num_datasets 4" in said
