"""Starting OpenRLHF and our reward server, waiting, stopping what was started, and what is left on disk."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common import engine
from common.cli import UserError
from common.manifest import write_text, write_yaml
from ppo.openrlhf.serve_reward import FAILED

GRACE = 30  # seconds that a stopped process has for its own end
PATIENCE = 1800  # seconds until the reward server must answer: an 8B model on a slow disk takes minutes
PAUSE = 5  # seconds between looks at what OpenRLHF has logged
TAIL = 2**18  # bytes of its output that are looked at when it has failed


def variables() -> dict[str, str]:
    """What OpenRLHF's processes need in their environment, on all machines; what is set there stays."""
    # DeepSpeed refuses to compile its optimizer where the toolkit is of another minor version than torch's,
    # which does no harm.
    more = {} if "DS_SKIP_CUDA_CHECK" in os.environ else {"DS_SKIP_CUDA_CHECK": "1"}
    return engine.variables(on_gpus=True) | more


@contextlib.contextmanager
def started(command: list[str], first: int = signal.SIGTERM, **options: object) -> Iterator[subprocess.Popen]:
    """A process and its group that end with the block, however it ends: signal `first`, then SIGKILL. Only
    what was started here is in that group. Where this script is killed, the process would train on beside the
    next start, without a lock: it ends, too.
    """
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=engine.end_with_parent, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, first)
            process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):  # workers that outlived it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM ends this script as Ctrl-C does, so that what it started is stopped too."""

    def interrupt(*_: object):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another one must not cut the stopping short
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def reward_server(settings: dict, folder: Path, gpus: str | None, host: str) -> Iterator[str]:
    """Run ppo/openrlhf/serve_reward.py with the mapping `settings` while the block runs; yields its address.

    Args:
        gpus: its CUDA_VISIBLE_DEVICES; None: as it is here.
        host: address to listen on; all machines of the training must reach it.

    Raises:
        UserError: it ended or did not answer; with the end of its log.
    """
    log, end = folder / "reward.log", time.monotonic() + PATIENCE
    write_yaml(folder / "reward.yaml", settings | {"host": host, "port": 0})
    command = [sys.executable, str(Path(__file__).with_name("serve_reward.py")), str(folder / "reward.yaml")]
    env = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus is not None else {})
    with (
        open(log, "wb") as file,
        started(command, stdout=file, stderr=subprocess.STDOUT, env=env) as process,
    ):
        while not (serving := re.search(r"^serving .* at (http:\S+)", said := read(log), re.MULTILINE)):
            if process.poll() is not None or time.monotonic() > end:
                reason = (said.strip().splitlines() or ["no answer"])[-1].removeprefix("error: ")
                raise UserError(f"the reward server does not run ({reason}); its log is {log}")
            time.sleep(0.2)
        yield serving[1]


def read(log: Path | None) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log and log.is_file() else ""


def run_openrlhf(command: list[str], env: dict, log: Path | None, meanwhile: Callable[[], None]):
    """Run the command to its end.

    Args:
        log: of our reward server, if there is one: where a reward fails, OpenRLHF ends with another error.
        meanwhile: is called every few seconds, and once more at the end.

    Raises:
        UserError: it failed; with what it said last of an error.
    """
    said = bytearray()
    with started(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        reader = threading.Thread(target=pass_on, args=(process.stdout.fileno(), said), daemon=True)
        reader.start()
        while (status := process.poll()) is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PAUSE)
            meanwhile()
        reader.join(PAUSE)  # a worker that lives on may hold the pipe
    if status:
        why = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        failed = re.findall(rf"^{FAILED}(.*)", read(log), re.MULTILINE)
        cause = f"no reward, {failed[-1]}" if failed else last_error(said.decode(errors="replace"))
        raise UserError(
            f"OpenRLHF {why}: {cause or 'what it printed above says why'}; mend it and start the same "
            "command again"
        )


def pass_on(source: int, kept: bytearray):
    """Write what comes from a file descriptor to stdout, whole lines or not, and keep the end of it."""
    while chunk := os.read(source, 65536):
        kept += chunk
        del kept[:-TAIL]
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more; OpenRLHF must not wait
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


def last_error(said: str) -> str | None:
    """The last line of an exception, without colours and the names of Ray's workers.

    Behind it come progress bars and warnings that Ray hands on late, and what Ray makes of it for the driver.
    """
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", said).replace("\r", "\n")
    found = re.findall(
        r"^(?:\([^()\n]* pid=\d+[^()\n]*\) ?)?((?:\w+\.)*\w*(?:Error|Exception): .+)", plain, re.M
    )
    named = [line for line in found if "RayTaskError" not in line and "ActorDied" not in line]
    return named[-1].strip()[:300] if named else None


def checkpoint_to_resume(folder: Path, roles: Sequence[str]) -> str | None:
    """The newest step that all `roles` (actor, critic) have whole, made the one that DeepSpeed loads; None
    without one.

    DeepSpeed writes a folder `global_stepN` and then its name into `latest`. A run that is stopped between
    the two saves leaves them at different steps; the other role's folder of the older step is still there
    (that is why save_total_limit is 2 at least).

    Raises:
        UserError: checkpoints without a common step.
    """
    files, tags = [folder / f"_{role}" / "latest" for role in roles], []
    if not all(file.is_file() for file in files):
        return None
    for file in files:
        newest = step(file.read_text(encoding="utf-8"))
        # A folder beyond `latest` may be half written.
        tags.append({path.name for path in file.parent.glob("global_step*") if step(path.name) <= newest})
    common = max(set.intersection(*tags), key=step, default=None)
    if common is None:
        raise UserError(
            f"{folder} holds checkpoints of policy and value model that share no step; set overwrite true "
            "to start again"
        )
    for file in files:
        write_text(file, common)
    return common


def step(tag: str) -> int:
    return int("".join(filter(str.isdigit, tag)) or 0)
