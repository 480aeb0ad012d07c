"""Starting OpenRLHF and our reward server, waiting, stopping what was started, and what is left on disk."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError
from common.manifest import write_yaml

GRACE = 30  # seconds that a stopped process has for its own end


def stop(process: subprocess.Popen, grace: float = GRACE):
    """End a process and its group: as Ctrl-C does, then harder.

    Only what was started here is in that group.
    """
    for number, wait in ((signal.SIGINT, grace), (signal.SIGTERM, grace / 3), (signal.SIGKILL, grace)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
            break
    with contextlib.suppress(ProcessLookupError):  # workers that outlived it
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM ends this script as Ctrl-C does, so that what it started is stopped too."""

    def interrupt(*_: object):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last_lines(path: Path, count: int = 8) -> list[str]:
    """The end of a log, without a progress bar's earlier states and without empty lines."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 20000))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]
    return list(deque((line for line in lines if line), count))


@contextlib.contextmanager
def reward_server(settings: dict, folder: Path, gpus: str | None, patience: float = 1800) -> Iterator[str]:
    """Run ppo/openrlhf/serve_reward.py with the mapping `settings` while the block runs; yields its address.

    Args:
        gpus: its CUDA_VISIBLE_DEVICES; None: as it is here.
        patience: seconds until it must answer (an 8B model is read from a slow disk in minutes).

    Raises:
        UserError: it ended or did not answer; with the end of its log.
    """
    port, log = free_port(), folder / "reward.log"
    write_yaml(folder / "reward.yaml", settings | {"port": port})
    script = str(Path(__file__).with_name("serve_reward.py"))
    env = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus is not None else {})
    with open(log, "wb") as file:
        command = [sys.executable, script, str(folder / "reward.yaml")]
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        end = time.monotonic() + patience
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > end:
                lines = last_lines(log)
                errors = [line for line in lines if line.startswith("error: ")]
                reason = errors[-1].removeprefix("error: ") if errors else " | ".join(lines[-3:])
                raise UserError(f"the reward server does not run ({reason}); its log is {log}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/get_reward"
    finally:
        stop(process, 5)


def _answers(port):
    """Whether the server on this machine answers; http_proxy knows nothing of it."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        direct.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
    except (urllib.error.URLError, OSError):
        return False
    return True


def run_openrlhf(command: list[str], log: Path, env: dict):
    """Run the command to its end; what it prints goes to the terminal and the log.

    Raises:
        UserError: it failed; with the end of the log.
    """
    with open(log, "ab") as file:
        file.write(f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )

        def copy():
            while block := os.read(process.stdout.fileno(), 65536):
                file.write(block)
                file.flush()
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.buffer.write(block)
                    sys.stdout.buffer.flush()

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        try:
            status = process.wait()
        finally:
            stop(process)
            thread.join(10)
    if status:
        lines = last_lines(log)
        for line in lines[:-1]:
            print(f"  {line}", file=sys.stderr)
        why = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise UserError(
            f"OpenRLHF {why}: {lines[-1] if lines else 'it printed nothing'}; the log is {log}; mend it and "
            "start the same command again"
        )


def checkpoint_to_resume(folder: Path) -> str | None:
    """The newest step that policy and value model both have whole, made the one that DeepSpeed loads; None
    without one.

    DeepSpeed writes a folder `global_stepN` and then its name into `latest`. A run that is stopped between
    the two saves leaves them at different steps; the other role's folder of the older step is still there
    (that is why save_total_limit is 2 at least).

    Raises:
        UserError: checkpoints without a common step.
    """
    tags, latest = {}, {}
    for role in ("_actor", "_critic"):
        file = folder / role / "latest"
        if not file.is_file():
            return None
        latest[role] = file.read_text(encoding="utf-8").strip()
        found = {path.name for path in (folder / role).glob("global_step*") if path.is_dir()}
        # A folder beyond `latest` may be half written.
        tags[role] = {tag for tag in found if step(tag) <= step(latest[role])}
    common = sorted(tags["_actor"] & tags["_critic"], key=step)
    if not common:
        raise UserError(
            f"{folder} holds checkpoints of policy and value model that share no step; set overwrite true "
            "to start again"
        )
    for role, tag in latest.items():
        if tag != common[-1]:
            temporary = folder / role / "latest.tmp"
            temporary.write_text(common[-1], encoding="utf-8")
            os.replace(temporary, folder / role / "latest")
    return common[-1]


def step(tag: str) -> int:
    return int("".join(filter(str.isdigit, tag)) or 0)
