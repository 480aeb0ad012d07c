"""What one of several machines is like and sees, as a line of JSON; loop/machines.py compares them.

    srun … bash loop/task.sh all python loop/probe.py MACHINE FILE

FILE was written and locked by the machine that asks, on the file system which all are to share.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.devices import gpu_memory, visible_gpus
from common.files import in_time
from common.locks import BUSY


def is_refused(path: Path) -> bool | None:
    """Whether another machine's lock on `path` holds here, too; None where the file system has no locks."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return True if error.errno in BUSY else None
        return False


def commit() -> str:
    """The commit of this checkout; empty where git cannot tell."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def has_vllm() -> bool:
    """Whether environment vllm of the loop that asks is here."""
    return Path(os.environ.get("RLHF_VLLM_ENV", "/")).is_dir()


def main():
    machine, file = int(sys.argv[1]), Path(sys.argv[2])
    started = time.monotonic()
    seen = in_time(file.is_file)
    found = {
        "machine": machine,
        "host": os.uname().nodename,
        "gpus": len(visible_gpus()),
        "gpu_gib": gpu_memory(),
        "commit": commit(),
        "vllm": has_vllm(),
        "temporary_gib": shutil.disk_usage(tempfile.gettempdir()).free / 2**30,
        "seen_after": time.monotonic() - started if seen else None,
        "refused": is_refused(file) if seen else None,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
