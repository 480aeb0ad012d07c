r"""A Ray cluster of several machines for one command, which it lasts as long as.

    srun --nodes=2 --ntasks=2 --ntasks-per-node=1 bash loop/task.sh all python ppo/openrlhf/ray_cluster.py \
        MACHINE 2 HEAD PORT python ppo/openrlhf/run_openrlhf.py SETTINGS.yaml --ray_address own

Started on each machine: MACHINE is its number, 2 the number of machines, HEAD the name or address of machine
0, and PORT to PORT + 2 are free there. Machine 0 starts Ray's head and, when all have joined, the command,
which finds the cluster by RAY_ADDRESS and whose status is this script's; then all end. The cluster has the
GPUs that each machine's CUDA_VISIBLE_DEVICES names, and no other Ray of the machines is touched. Environment
`ppo_train`.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import UserError, count, one_line, run
from common.devices import visible_gpus
from ppo.openrlhf import process

# Seconds until all have joined: importing Ray from a slow disk takes minutes. Ray itself gives up when it has
# not started within 30, so it is started again.
JOINING, STARTS = int(os.environ.get("RAY_CLUSTER_JOINING", "600")), 3
LONGEST = 30  # characters of a temporary folder: Ray's sockets lie below it, and may have 107 in all
JOINED = "ray_current_cluster"  # a file that Ray writes when it is up


def own_name() -> str:
    """What Slurm calls this machine, or it itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def own_address() -> list[str]:
    """The flag for the address of this machine's name; none where that is no address for others, and Ray
    takes the one by which it reaches machine 0.
    """
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(own_name())
        if not address.startswith("127."):
            return [f"--node-ip-address={address}"]
    return []


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of this cluster alone, with a short name; left there with Ray's logs after an error."""
    place = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=place if len(place) <= LONGEST else "/tmp"))
    try:
        yield folder
    except UserError as error:
        raise UserError(f"{error}; Ray's logs: {folder} on {own_name()}") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def ray_node(folder: Path, *flags: str) -> Iterator[subprocess.Popen]:
    """Ray's processes of this machine, up, while the block runs; they are in the group of the process.

    Raises:
        UserError: they do not start; with the reason.
    """
    gpus = len(visible_gpus())
    # More than there are do no harm: Ray waits for ever for a core for each GPU, one for the trainer, and
    # one for itself. What Slurm gives the job is less than the machine has, which Ray would take.
    cores = max(len(os.sched_getaffinity(0)), gpus + 2)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += [f"--temp-dir={folder}", f"--num-gpus={gpus}", f"--num-cpus={cores}", *own_address(), *flags]
    given = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"} | process.variables()
    given.pop("RAY_ADDRESS", None)  # another cluster's
    how = {"stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "env": given}
    for _ in range(STARTS):
        with (
            open(folder / "start.log", "wb") as log,
            # Nothing of Ray is to be kept, and it takes longer to stop than Slurm may wait. Its group has all
            # that it starts. Where this script is killed, Ray is asked to stop: workers would outlive it.
            process.started(command, signal.SIGKILL, stdout=log, **how) as node,
        ):
            while not (folder / JOINED).is_file() and node.poll() is None:
                time.sleep(0.2)
            if node.poll() is None:
                yield node
                return
    check_node(node, folder)


def check_node(node: subprocess.Popen, folder: Path):
    """Raise a UserError where Ray has ended on this machine."""
    if node.poll() is not None:
        said = process.read(folder / "start.log")
        why = process.last_error(said) or (said.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"Ray has ended on {own_name()}: {why}")


def names(machines: int) -> list[str]:
    """What all machines are called, by number."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if nodes and shutil.which("scontrol"):
        command = ["scontrol", "show", "hostnames", nodes]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        if len(said) == machines:
            return said
    return [f"machine {number}" for number in range(machines)]


def wait_for_machines(address: str, machines: int, node: subprocess.Popen, folder: Path):
    """Wait until all have joined the cluster at `address`.

    Raises:
        UserError: Ray has ended here, or machines are missing, which are named.
    """
    import ray

    end, ours = time.monotonic() + JOINING, signal.getsignal(signal.SIGTERM)
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        while len(joined := {one["NodeName"]: one for one in ray.nodes() if one["Alive"]}) < machines:
            check_node(node, folder)
            if time.monotonic() > end:
                missing = [name for number, name in enumerate(names(machines)) if f"{number}" not in joined]
                raise UserError(
                    f"{len(joined)} of {machines} machines have joined the Ray cluster at {address} within "
                    f"{JOINING} s: {', '.join(missing)} did not; do they share the project and its "
                    "environments, and is no firewall between them?"
                )
            time.sleep(0.5)
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, ours)  # Ray's own would end this script at once, and its command not
    gpus = " + ".join(f"{int(joined[name]['Resources'].get('GPU', 0))}" for name in sorted(joined, key=int))
    print(f"a Ray cluster of {count(machines, 'machine')} with {gpus} GPUs is up at {address}", flush=True)


def lead(machines: int, port: int, command: list[str]) -> int:
    """Start the cluster, run the command on it, end both; the command's status."""
    head = ["--head", "--node-name=0", f"--port={port}", f"--ray-client-server-port={port + 1}"]
    with (
        temporary_folder() as folder,
        ray_node(folder, *head, "--include-dashboard=false") as node,
        # The others connect when Ray is up, and see by the connection when this script ends, however it does.
        socket.create_server(("", port + 2), backlog=machines),
    ):
        address = (folder / JOINED).read_text(encoding="utf-8").strip()
        wait_for_machines(address, machines, node, folder)
        with process.started(command, env=os.environ | {"RAY_ADDRESS": address}) as running:
            while (status := running.poll()) is None:
                check_node(node, folder)
                time.sleep(0.5)
    return status if status >= 0 else 128 - status


def follow(number: int, head: str, port: int):
    """Join the cluster of machine 0, and end when that is gone.

    Raises:
        UserError: machine 0 is not up in time, or Ray does not start or has ended on this one.
    """
    end, door = time.monotonic() + JOINING, None
    while door is None:
        try:
            door = socket.create_connection((head, port + 2), timeout=5)
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"{own_name()} cannot reach Ray's head at {head}:{port}: {one_line(error)}"
                ) from None
            time.sleep(1)
    flags = f"--address={head}:{port}", f"--node-name={number}"
    with door, temporary_folder() as folder, ray_node(folder, *flags) as node:
        door.settimeout(1)
        while not is_closed(door):
            check_node(node, folder)


def is_closed(door: socket.socket) -> bool:
    """Whether the other side has ended the connection; waits for its time limit."""
    try:
        return door.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def main():
    if len(sys.argv) < 6 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(len(sys.argv) < 2 or sys.argv[1] not in ("-h", "--help"))
    number, machines, port = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4])
    with process.stopped_by_signals():
        if number == 0:
            sys.exit(lead(machines, port, sys.argv[5:]))
        with contextlib.suppress(KeyboardInterrupt):  # the status is machine 0's, which is ended, too
            follow(number, sys.argv[3], port)


if __name__ == "__main__":
    run(main)
