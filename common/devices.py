"""Which GPUs this process may use, found without torch, so that a wrong count is refused before anything touches one."""

import contextlib
import ctypes
import functools
import itertools
import os
import shutil
import subprocess

from common.cli import UserError


@functools.cache
def visible_gpus():
    """Names of the GPUs this process may use: `CUDA_VISIBLE_DEVICES` where set, else all that nvidia-smi lists."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    present = [str(i) for i, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not present or chosen is None:
        return present
    names = [name.strip() for name in chosen.split(",")]
    # As CUDA does: what names no GPU hides itself and what stands behind it. count_gpus in envs.sh has the same rule.
    return list(itertools.takewhile(lambda name: name.startswith(("GPU-", "MIG-")) or (name.isdecimal() and int(name) < len(present)), names))


def gpu_memory():
    """GiB of the smallest visible GPU, or None."""
    if not visible_gpus():
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    sizes = [int(line) / 1024 for line in answer.stdout.split() if line.isdigit()]
    return min(sizes, default=None)


def check_processes():
    """Refuse more launched processes than GPUs, before torch touches one. Without a GPU any number may run on the CPU.

    Raises:
        UserError: names the launcher's flag.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = visible_gpus()
    if gpus and processes > len(gpus):
        raise UserError(
            f"{processes} processes were launched and {len(gpus)} GPUs are visible; "
            f"give `accelerate launch` --num_processes {len(gpus)} (or num_processes in its config file)"
        )


def prepare_threads():
    """Call before torch is loaded. Without a GPU, idle OpenMP threads sleep.

    By default they spin, which on a busy machine costs several times the run itself.
    """
    if not visible_gpus():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_memory(keep=True):
    """Let glibc keep what a forward pass on the CPU frees, for the next layer to use; it never shrinks then.

    Otherwise every large tensor is new to the kernel, which clears it page by page: a tenth of the time of small models.
    False sets what glibc's own adapting arrives at (32 MiB and twice that). Elsewhere than on glibc nothing happens.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 2**30 if keep else 2**25)
        libc.mallopt(trim_threshold, 2**30 if keep else 2**26)
