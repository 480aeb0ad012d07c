"""The launcher for Ray, on a real cluster of three virtual machines (slurm.sh): the head, where the driver is
and no task has room, and two that can lose their power. GPUs are counted only.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import faults
import pytest
import virtual_slurm

RAY = faults.ROOT / os.environ.get("envs_dir", ".envs") / "ray/bin"
HEAD = "10.77.0.4:6379"  # of n3
PLAIN = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": HEAD}


class Cluster(virtual_slurm.Cluster):
    def begin(self, folder):
        """Ray on all machines; its sockets lie below `folder`, whose name must be short."""
        head = "--head --num-cpus=0 --node-ip-address=10.77.0.4 --port=6379 --include-dashboard=false"
        self("node", 3, RAY / "ray", "start", *head.split(), f"--temp-dir={folder}", **PLAIN)
        for k in (1, 2):
            self.join(k)

    def join(self, k):
        """Machine k becomes one of Ray's."""
        words = f"--address={HEAD} --node-ip-address=10.77.0.{k + 1} --num-cpus=2 --num-gpus={self.gpus}"
        self("node", k, RAY / "ray", "start", *words.split(), **PLAIN)

    def on_head(self, *words):
        return ["bash", virtual_slurm.CLUSTER, "node", str(self.folder), "3", *map(str, words)]

    def command(self, *words):
        return self.on_head(RAY / "python", "loop/on_ray.py", *words)


@contextlib.contextmanager
def started(folder, gpus=2):
    if not (RAY / "ray").exists():
        pytest.skip(f"needs Ray in {RAY}; tests/run.sh puts it there")
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short,
        virtual_slurm.started(folder, 3, 1, Cluster) as found,
    ):
        found.gpus = gpus
        found.begin(short)
        yield found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with started(tmp_path_factory.mktemp("ray")) as found:
        yield found


def test_tasks_find_their_machines_and_gpus(cluster, tmp_path):
    """nvidia-smi is a stand-in that counts."""
    two_gpus(tmp_path)
    task = 'echo $(uname -n) "$@" $CUDA_VISIBLE_DEVICES; echo to stderr >&2; [ "$1" != 2 ] || exit 3'
    words = [
        "--machines",
        "2",
        "--gpus",
        "2",
        "--tasks",
        "2",
        "bash",
        "loop/task.sh",
        "1",
        "sh",
        "-c",
        task,
        "-",
    ]
    environment = PLAIN | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    end = faults.ended(cluster.command(*words, "TASK", "MACHINE", "HEAD"), 100, environment)
    said = sorted(end.stdout.splitlines(), key=lambda line: line.split()[1])
    first = said[0].split()
    assert first[1:3] == ["0", "0"] and first[3] in ("10.77.0.2", "10.77.0.3") and end.returncode == 3
    other = {"n1": "n2", "n2": "n1"}[first[0]]
    assert said == [
        f"{first[0]} 0 0 {first[3]} 0",
        f"{first[0]} 1 0 {first[3]} 1",
        f"{other} 2 1 {first[3]} 0",
        f"{other} 3 1 {first[3]} 1",
    ]
    assert end.stderr.count("to stderr") == 4 and f"task 2 on {other} ended with status 3" in end.stderr


def two_gpus(folder):
    smi = folder / "nvidia-smi"
    smi.write_text('#!/bin/sh\nfor k in 0 1; do echo "GPU $k: stand-in"; done\n')
    smi.chmod(0o755)


def test_what_a_dry_run_prints_can_be_pasted(cluster, tmp_path):
    """Up to the first command, which wants GPUs: the settings, and the word that starts the others."""
    two_gpus(tmp_path)
    run = tmp_path / "run"
    words = ["bash", "run_loop.sh", faults.CONFIG, "--launcher", "ray", "--dry_run", "--run_dir", run]
    path = f"{tmp_path}:{RAY}:{os.environ['PATH']}"
    end = faults.ended(cluster.on_head(*words), 200, PLAIN | {"PATH": path})
    assert end.returncode == 0, end.stderr
    pasted = [line for line in end.stdout.splitlines() if line.startswith(("cd ", "export ", "source "))]
    [write] = [line for line in end.stdout.splitlines() if line.startswith("python loop/plan.py write")]
    start = f"{RAY}/python3 loop/on_ray.py --machines 2 --gpus 2 --tasks 2 bash loop/task.sh 1 python "
    assert f"\n{start}generation/get_hf2.py" in end.stdout, end.stdout
    pasted = [line for line in pasted if "make_envs" not in line]  # the GPUs' own environment is not here
    command = cluster.on_head("env", "-u", "RAY_ADDRESS", "bash", "-c", "\n".join([*pasted, write]))
    end = faults.ended(command, 200, PLAIN | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert end.returncode == 0 and (run / "loop.yaml").is_file(), end.stderr


STUBBORN = "trap '' TERM; echo begun; setsid sleep 1234 & exec sleep {seconds}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_started_ends_with_the_driver(cluster, number, tmp_path):
    """One that passes over TERM, and what it started in a session of its own. The next start waits for it."""
    environment = os.environ | PLAIN | {"RLHF_RUN": str(tmp_path)}
    words = ("--machines", "2", "bash", "-c")
    driver = faults.begin(cluster.command(*words, STUBBORN.format(seconds=1235)), env=environment)
    faults.wait_for(lambda: running("123[45]") == 4, 60)
    [launcher] = [
        pid
        for pid in faults.started_by(tmp_path, "loop/on_ray.py --machines")
        if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(bytes(RAY / "python"))
    ]
    os.kill(launcher, number)
    if number == signal.SIGTERM:
        time.sleep(1)
        os.kill(launcher, number)  # what is being ended is ended all the same
        assert driver.wait(60) == 128 + number and not running("123[45]")
    seen = "pgrep -fx 'sleep 123[45]' | wc -l"
    end = faults.ended(cluster.command(*words, seen), 100, environment)
    assert end.stdout.split() == ["0", "0"], end.stderr
    faults.wait_for(lambda: running("123[45]") == 0, 60)


def running(seconds):
    return len(
        subprocess.run(["pgrep", "-fx", f"sleep {seconds}"], capture_output=True, check=False).stdout.split()
    )


@pytest.mark.parametrize("together", [False, True])
def test_a_lost_machine_comes_back(cluster, together, tmp_path):
    """Its task is started again and the other machine's is not, unless they wait for each other."""
    log = tmp_path / "log"
    words = ["--machines", "2", "--gpus", "2", *(["--together"] if together else [])]
    command = cluster.command(*words, "bash", "-c", STUBBORN.format(seconds=20))
    with log.open("wb") as file:
        driver = faults.begin(command, file, env=os.environ | PLAIN)
    faults.wait_for(lambda: log.read_bytes().count(b"begun") == 2, 60)
    cluster("kill", 2)
    faults.wait_for(lambda: b"lost n2" in log.read_bytes(), 60)
    cluster("boot", 2)
    cluster.join(2)
    assert driver.wait(120) == 0, log.read_text()
    assert log.read_text().count("begun") == 3 + together and not running("1234")


def test_what_is_wrong_is_one_line(cluster, tmp_path):
    path = f"{RAY}:{os.environ['PATH']}"

    def said(*words, **environment):
        words = ["bash", "run_loop.sh", faults.CONFIG, "--launcher", "ray", "--check", *map(str, words)]
        words += ["--run_dir", str(tmp_path / "run")]
        return faults.ended(cluster.on_head(*words), 200, PLAIN | environment)

    end = said("--machines", 3, PATH=path)
    assert (
        end.returncode == 2
        and "machines 3, and the Ray cluster has 2 machines with 2 GPUs each" in end.stderr
    )
    end = said(PATH=path)  # it counts GPUs that nvidia-smi does not see
    assert end.returncode == 2 and "sees 0 of the 2 GPUs it should have" in end.stderr
    end = said(PATH=path, RAY_ADDRESS="ray://10.77.0.1:10001")
    assert end.returncode == 2 and "give HOST:6379, on a machine of the cluster" in end.stderr
    end = said(PATH=f"{os.path.dirname(faults.vllm_python())}:{os.environ['PATH']}")
    assert end.returncode == 2 and "has no ray: pip install ray, of the cluster's version" in end.stderr
    assert end.stderr.count("\n") == 1


@pytest.mark.long
def test_the_loop_gives_what_one_machine_gives(undisturbed, tmp_path_factory, tmp_path):
    """From sampling to training; a machine loses its power while it samples."""
    whole, settings = undisturbed
    folder, log = tmp_path / "run", tmp_path / "log"
    environment = os.environ | PLAIN | {"PATH": f"{RAY}:{os.environ['PATH']}"}
    settings = [*settings, "--generation.max_num_seqs", 1, "--launcher", "ray", "--stop_stage", "1.3"]
    with started(tmp_path_factory.mktemp("ray"), gpus=0) as cluster:
        with log.open("wb") as file:
            driver = faults.begin(
                cluster.on_head(*faults.loop_command(folder, *settings)), file, env=environment
            )
        partial = folder / "iter1/shards/generated.of2.1.jsonl.partial"
        faults.wait_for(lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 3, 300)
        cluster("kill", 2)
        time.sleep(5)
        cluster("boot", 2)
        cluster.join(2)
        assert driver.wait(900) == 0, log.read_text()
    assert "2 training processes over 2 machines" in log.read_text()
    assert "ray: lost n2" in (folder / "iter0/logs/sample.machines.log").read_text()
    for name in ("iter0/heldout_sampled.", "iter0/heldout_greedy.", "iter1/"):
        for kind in ("generated", "rewarded"):
            one, other = (faults.records(root / f"{name}{kind}.jsonl") for root in (folder, whole))
            # as many threads as each virtual machine believes to have: other rounding
            found, wanted = ([record.pop("rewards", None) for record in side] for side in (one, other))
            assert one == other and found == [pytest.approx(row, abs=1e-5) for row in wanted], name + kind
    assert (folder / "iter1/model/config.json").is_file()
