"""Start a command on the machines of a Ray cluster, as srun does on those of a Slurm job.

    RAY_ADDRESS=HOST:6379 python loop/on_ray.py --machines 2 --gpus 8 --tasks 4 bash loop/task.sh 2 COMMAND…
    RAY_ADDRESS=HOST:6379 python loop/on_ray.py --describe

This needs plain `ray` of the cluster's version and nothing else: the command has its own environment, whose
variables it gets from here. It is started in this folder, `--tasks` times on each machine, and sees the GPUs
there that Ray gave it. What it prints comes out here. The status is that of the last task that failed, or 0.

A machine that is lost is replaced by another one, or by itself when it is back, and its tasks are started
again; with `--together` all tasks are, since they wait for each other. A task that fails by itself is not.
What was started on the machines ends with this process, however that ends, within half a minute.
"""

import argparse
import contextlib
import json
import os
import queue
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

# seconds for which machines are waited for, where the cluster has lost one or others use it
PATIENCE = int(os.environ.get("RLHF_RAY_PATIENCE", "600"))
LOSSES = 5  # machines lost during one command: one that takes its machine down would go on for ever
GRACE = 10  # seconds that a task has between TERM and KILL; loop/launch.sh waits longer for all
PIECE = 2**16  # bytes of a task's output that are passed on at once
# Beginnings of the driver's variables that hold for its own machine alone.
OWN = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HOSTNAME", "TMPDIR", "RAY_", "SLURM")


# ---- On the machines ---------------------------------------------------------------------------------------


def guard(mark: str, command: list[str]):
    """Run a command. End all that it has started when it ends, or when stdin closes: the actor that held that
    is gone then.

    Ray kills the children of a worker that ends, so the one that watches is a grandchild.

    Args:
        mark: `NAME=VALUE`, which stands in the environment of what the command starts and of nothing else.
    """
    if watcher := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(watcher, 0)[1]) % 256)
    os.setsid()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end(status: int):
        for number in (signal.SIGTERM, signal.SIGKILL):
            until, asked = time.monotonic() + GRACE, set()
            while (left := marked(mark)) and time.monotonic() < until:
                for pid in set(left) - asked:  # once: it may be cleaning up
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                asked.update(left)
                time.sleep(0.5)
        os._exit(status)

    def watch():
        sys.stdin.buffer.read()
        end(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    end(status if status >= 0 else 128 - status)


def marked(mark: str) -> list[int]:
    """Living processes of this machine with `mark` in their environment, but for those that watch."""
    return [pid for pid, found in tasks_here() if mark in found]


def tasks_here() -> Iterator[tuple[int, list[str]]]:
    """(process, its environment) of all on this machine that a launcher like this one has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            found = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            watches = b"--guard" in (folder / "cmdline").read_bytes().split(b"\0")
            if not watches and any(one.startswith("RLHF_RAY=") for one in found):
                yield int(folder.name), found


def wait_for_others(step: str, run: str | None, tried: list[str]):
    """Wait until no task of an earlier step of this run is at work here, nor an earlier try of this task: the
    driver may have been killed and started again, or Ray may have lost an actor alone.

    Args:
        step: its mark. run: RLHF_RUN, the run's folder. tried: marks of earlier tries.
    """
    until = time.monotonic() + 2 * GRACE + 5
    while time.monotonic() < until:
        if not any(
            set(tried) & set(found) or (f"RLHF_RUN={run}" in found and not any(step in one for one in found))
            for _, found in tasks_here()
        ):
            return
        time.sleep(1)


def free_ports() -> int:
    """The first of three neighbours that nobody listens at; a command may take them all."""
    while True:
        first = random.randrange(20000, 30000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + 3):
                held.enter_context(socket.create_server(("", port)))
            return first


class Machine:
    """Runs tasks on one machine; becomes an actor there."""

    def __init__(self):
        self.running = []

    def about(self) -> tuple[str, str, int]:
        """(host name, address, the first of three free ports)."""
        import ray

        return socket.gethostname(), ray.util.get_node_ip_address(), free_ports()

    def run(
        self, guarded: list[str], environment: dict[str, str], folder: str, step: str, tried: list[str]
    ) -> Iterator[tuple[int, bytes]]:
        """(1 or 2, whole lines of stdout or stderr) as they come, at last (0, the status).

        Args:
            guarded: this file and what `guard` is told. step, tried: see `wait_for_others`.
        """
        import ray

        wait_for_others(step, environment.get("RLHF_RUN"), tried)
        environment = environment | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, ray.get_gpu_ids()))}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen([sys.executable, *guarded], env=environment, cwd=folder, **pipes)
        self.running.append(process)
        held = {1: b"", 2: b""}
        with selectors.DefaultSelector() as ready:
            for number, pipe in ((1, process.stdout), (2, process.stderr)):
                ready.register(pipe, selectors.EVENT_READ, number)
            while ready.get_map():
                for key, _ in ready.select():
                    chunk = os.read(key.fd, PIECE)
                    if not chunk:
                        ready.unregister(key.fileobj)
                    said = held[key.data] + chunk
                    end = max(said.rfind(b"\n"), said.rfind(b"\r")) + 1  # progress bars have the second
                    if not chunk or len(said) - end > PIECE:
                        end = len(said)
                    held[key.data] = said[end:]
                    if end:
                        yield key.data, said[:end]
        yield 0, str(process.wait()).encode()

    def end(self):
        """End all tasks and wait for that."""
        for process in self.running:
            process.stdin.close()
        for process in self.running:
            process.wait()


# ---- Here --------------------------------------------------------------------------------------------------


class Step:
    """A command on all machines, until it has ended on each of them."""

    def __init__(self, args: argparse.Namespace):
        import ray

        self.ray, self.args = ray, args
        self.actors = [None] * args.machines
        self.hosts = [""] * args.machines
        self.tries = [0] * args.machines  # a task of an earlier try tells nothing new
        self.left = self.tasks = {(k, local) for k in range(args.machines) for local in range(args.tasks)}
        self.step, self.tried = str(uuid.uuid4()), {}  # marks of earlier tries of a task
        self.told = queue.SimpleQueue()  # (machine, local, try, status, or None where the machine is gone)
        self.lost = 0

    def place(self):
        """Take the machines, with all that is asked of each."""
        from ray.util.placement_group import placement_group

        each = {"CPU": 1} | ({"GPU": self.args.gpus} if self.args.gpus else {})
        self.group = placement_group([each] * self.args.machines, strategy="STRICT_SPREAD")
        if self.group.wait(5):
            return
        asked = f"as many machines ({self.args.machines}) with as many free GPUs ({self.args.gpus})"
        tell(f"waiting for {asked}; the Ray cluster has {machines_in_words()}")
        if not self.group.wait(PATIENCE):
            fail(f"the Ray cluster has not had {asked} for {PATIENCE} s; it has {machines_in_words()}")

    def start(self, machine: int):
        """Start the tasks of a machine that are left, as soon as it is there."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        placed = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=machine)
        options = {"num_cpus": 1, "num_gpus": self.args.gpus, "scheduling_strategy": placed}
        actor = self.ray.remote(Machine).options(max_concurrency=self.args.tasks + 2, **options)
        until, about = time.monotonic() + PATIENCE, None
        while about is None:
            self.actors[machine] = actor.remote()
            asked = self.actors[machine].about.remote()
            try:
                about = self.ray.get(asked, timeout=max(0, until - time.monotonic()))
            except self.ray.exceptions.GetTimeoutError:
                fail(f"no machine has come for {PATIENCE} s; the Ray cluster has {machines_in_words()}")
            except self.ray.exceptions.RayActorError:  # Ray does not know yet that the machine is gone
                time.sleep(2)
        before, (self.hosts[machine], *address) = self.hosts[machine], about
        if before not in ("", self.hosts[machine]):
            time.sleep(2 * GRACE)  # Ray's part of that machine may be gone alone, and its task be ending yet
        if machine == 0:
            self.address = address
        for local in sorted(local for owner, local in self.left if owner == machine):
            threading.Thread(target=self.follow, args=(machine, local), daemon=True).start()

    def follow(self, machine: int, local: int):
        """Pass on what a task prints, and tell how it ended."""
        task, attempt, status = machine * self.args.tasks + local, self.tries[machine], None
        head, port = self.address
        value = f"{self.step}.{attempt} {task} {local} {machine} {head} {port}"
        environment = {key: kept for key, kept in os.environ.items() if not key.startswith(OWN)}
        environment["RLHF_RAY"] = value  # loop/task.sh reads it
        guarded = [str(Path(__file__).resolve()), "--guard", f"RLHF_RAY={value}", *self.args.command]
        tried = self.tried.setdefault(task, [])
        run = self.actors[machine].run.options(num_returns="streaming")
        try:
            for chunk in run.remote(guarded, environment, os.getcwd(), self.step, list(tried)):
                stream, said = self.ray.get(chunk)
                if stream == 0:
                    status = int(said)
                    continue
                out = sys.stdout if stream == 1 else sys.stderr
                out.buffer.write(said)
                out.flush()
        except (self.ray.exceptions.RayActorError, self.ray.exceptions.ObjectLostError):
            tried.append(f"RLHF_RAY={value}")
        except Exception as error:  # it could not be started there
            tell(f"task {task} on {self.hosts[machine]}: {' '.join(str(error).split())[-300:]}")
            status = 1
        self.told.put((machine, local, attempt, status))

    def run(self) -> int:
        """Until all tasks have ended; returns the status."""
        self.place()
        for machine in range(self.args.machines):
            self.start(machine)
        status = 0
        while self.left:
            machine, local, attempt, ended = self.told.get()
            if attempt != self.tries[machine]:
                continue
            if ended is None:
                self.replace(machine)
                continue
            self.left = self.left - {(machine, local)}
            if ended:
                status, task = ended, machine * self.args.tasks + local
                # loop/launch.sh looks for these words
                tell(f"task {task} on {self.hosts[machine]} ended with status {ended}")
                if self.args.together:
                    break
        return status

    def replace(self, machine: int):
        """Start again what was lost with a machine."""
        self.lost += 1
        if self.lost > LOSSES:
            fail(
                f"{self.lost} machines were lost during this command, the last one was {self.hosts[machine]}"
            )
        again = range(self.args.machines) if self.args.together else [machine]
        tell(
            f"lost {self.hosts[machine]}: its tasks are started again, on another machine or when it is back"
        )
        if self.args.together:
            self.end()
            self.left = self.tasks
        else:
            self.ray.kill(self.actors[machine])  # it may have been out of reach only
        for one in again:
            self.tries[one] += 1
        for one in again:
            self.start(one)

    def end(self):
        """End what is running on all machines, and wait for that where they still answer."""
        ending = [actor.end.remote() for actor in self.actors if actor]
        if ending:
            self.ray.wait(ending, num_returns=len(ending), timeout=2 * GRACE + 5)
        for actor in filter(None, self.actors):
            self.ray.kill(actor)
        self.actors = [None] * self.args.machines


def tell(line: str):
    print(f"ray: {line}", file=sys.stderr, flush=True)


def fail(problem: str):
    raise SystemExit(f"error: {problem}")


def describe() -> list[dict]:
    """Of each living machine of the cluster its host name, GPUs and CPUs."""
    import ray

    return [
        {
            "host": node["NodeManagerHostname"],
            "gpus": int(node["Resources"].get("GPU", 0)),
            "cpus": int(node["Resources"].get("CPU", 0)),
        }
        for node in ray.nodes()
        if node["Alive"]
    ]


def machines_in_words() -> str:
    """Host names and GPUs of the living machines."""
    return ", ".join(f"{one['host']} (GPUs: {one['gpus']})" for one in describe()) or "no machines"


def connect():
    """Connect to the cluster that RAY_ADDRESS names, or that this machine is part of."""
    try:
        import ray
    except ImportError:
        fail(f"{sys.executable} has no ray: pip install ray, of the cluster's version")
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address.startswith("ray://"):
        fail(f"RAY_ADDRESS {address} is for Ray's client: give HOST:6379, on a machine of the cluster")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a thread that outlives the connection would make another
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # many kinds: no cluster, another version, no raylet on this machine
        fail(f"no Ray cluster can be used at {address}: {' '.join(str(error).split())[:400]}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=1, help="of each machine")
    parser.add_argument("--gpus", type=int, default=0, help="of each machine, for all its tasks")
    parser.add_argument("--together", action="store_true", help="a task that fails ends the others")
    parser.add_argument("--describe", action="store_true", help="say what machines there are, as JSON")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args()


def main():
    if sys.argv[1:2] == ["--guard"]:
        guard(sys.argv[2], sys.argv[3:])
    args = parsed()
    connect()
    if args.describe:
        print(json.dumps(describe()))
        return

    def stop(number: int, _: object):
        for one in (signal.SIGTERM, signal.SIGINT):  # another one must not cut the ending short
            signal.signal(one, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    step = Step(args)
    try:
        sys.exit(step.run())
    finally:
        step.end()


if __name__ == "__main__":
    main()
