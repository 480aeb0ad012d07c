"""Which GPUs this process may use, found without torch, so that a wrong count is refused before anything
touches one.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

from common.cli import UserError

# The oldest NVIDIA driver for builds of a CUDA version. envs.sh asks for that of CUDA 13 before it installs
# anything.
OLDEST_DRIVER = {12: 525, 13: 580}
ASK_TORCH = """import json, torch
reason = ""
if not torch.cuda.is_available():
    try:
        torch.cuda.init()
    except Exception as error:
        reason = str(error)
print(json.dumps([torch.cuda.is_available(), torch.__version__, torch.version.cuda, reason]))"""


@functools.cache
def visible_gpus() -> list[str]:
    """Names of the GPUs this process may use: `CUDA_VISIBLE_DEVICES` where set, else all that nvidia-smi
    lists.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    present = [
        str(i) for i, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))
    ]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not present or chosen is None:
        return present
    names = [name.strip() for name in chosen.split(",")]
    # As CUDA does: what names no GPU hides itself and what stands behind it. count_gpus in envs.sh has the
    # same rule.
    return list(
        itertools.takewhile(
            lambda name: name.startswith(("GPU-", "MIG-")) or (name.isdecimal() and int(name) < len(present)),
            names,
        )
    )


def _smi(field):
    """What nvidia-smi says of each visible GPU, as texts; empty where it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.splitlines() if line.strip()]


def gpu_memory() -> float | None:
    """GiB of the smallest visible GPU, or None."""
    sizes = _smi("memory.total") if visible_gpus() else []
    return min((int(size) / 1024 for size in sizes if size.isdigit()), default=None)


def gpu_name() -> str | None:
    """What the first GPU is called, such as "NVIDIA H100 80GB HBM3", or None."""
    return next(iter(_smi("name")), None) if visible_gpus() else None


def check_processes():
    """Refuse more launched processes than GPUs, before torch touches one. Without a GPU any number may run on
    the CPU.

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


def check_torch():
    """Refuse to go on where GPUs are visible and torch sees none: an 8B model would train on the CPU.

    torch is asked in a process of its own, since asking starts CUDA and what is forked afterwards (vLLM's
    engine) could not use it. CUDA_VISIBLE_DEVICES= and accelerate's --cpu mean the CPU on purpose.

    Raises:
        UserError: the driver's version and the remedy.
    """
    gpus = visible_gpus()
    if not gpus or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return
    asked = {
        key: value for key, value in os.environ.items() if key != "PYTORCH_NVML_BASED_CUDA_CHECK"
    }  # that counts without starting CUDA
    answer = subprocess.run(
        [sys.executable, "-c", ASK_TORCH], env=asked, capture_output=True, text=True, check=False
    )
    try:
        sees, version, cuda, reason = json.loads(answer.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return  # no torch, or a broken one: the script itself will say so
    if sees:
        return
    what = f"nvidia-smi shows {len(gpus)} GPU{'s' * (len(gpus) > 1)}, and torch sees none"
    on_purpose = "to work on the CPU on purpose, put CUDA_VISIBLE_DEVICES= in front"
    if cuda is None:
        raise UserError(
            f"{what}: torch {version} of {sys.executable} is a build for the CPU; enter the environment of "
            "this machine (source envs.sh; "
            "make_envs vllm rlhflow; use_env …), or make this one again where pip finds builds for CUDA; "
            f"{on_purpose}"
        )
    driver, oldest = driver_version(), OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    needs = (
        f"which needs driver {oldest} or newer (or NVIDIA's cuda-compat package on data-centre GPUs)"
        if oldest
        else ""
    )
    said = f" ({' '.join(reason.split())[:160]})" if reason else ""
    raise UserError(
        f"{what}: the driver is {driver or 'unknown'}, torch {version} is built for CUDA {cuda}, "
        f"{needs}{said}; {on_purpose}"
    )


@dataclasses.dataclass(frozen=True)
class Speed:
    """A kind of GPU, as nvidia-smi calls it: dense bf16 TFLOPS and TB/s of memory, by its maker's data
    sheet.
    """

    name: str
    tflops: float
    tb_per_s: float


SPEEDS = (
    Speed("A100", 312, 2.0),
    Speed("H100", 989, 3.35),
    Speed("H200", 989, 4.8),
    Speed("L40S", 362, 0.86),
    Speed("A10", 125, 0.6),
    Speed("4090", 165, 1.0),
)


def speed_of(name: str | None) -> tuple[Speed, bool]:
    """(one of SPEEDS, whether the GPU called `name` is of that kind): an A100 stands in for others."""
    known = next((kind for kind in SPEEDS if re.search(rf"\b{kind.name}\b", name or "")), None)
    return known or SPEEDS[0], known is not None


def driver_version() -> str | None:
    """Version of NVIDIA's driver, such as "580.65.06"; None where nvidia-smi does not tell."""
    told = next(iter(_smi("driver_version")), "")
    return told if told[:1].isdigit() else None


def none_visible() -> str:
    """Why no GPU is visible, in words."""
    amd = shutil.which("nvidia-smi") is None and (shutil.which("rocm-smi") or os.path.exists("/dev/kfd"))
    return (
        "the GPUs here are AMD's, and the pinned builds are for NVIDIA only"
        if amd
        else "none is visible here"
    )


def prepare_threads():
    """Call before torch is loaded. Without a GPU, idle OpenMP threads sleep.

    By default they spin, which on a busy machine costs several times the run itself.
    """
    if not visible_gpus():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_memory(keep: bool = True):
    """Let glibc keep what a forward pass on the CPU frees, for the next layer to use; it never shrinks then.

    Otherwise every large tensor is new to the kernel, which clears it page by page: a tenth of the time of
    small models. False sets what glibc's own adapting arrives at (32 MiB and twice that). Elsewhere than on
    glibc nothing happens.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 2**30 if keep else 2**25)
        libc.mallopt(trim_threshold, 2**30 if keep else 2**26)
