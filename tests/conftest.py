"""Paths for all tests: the project's root and this folder, so that `from common import …` and `import micro`
work; what a shell may bring along, kept out; and the tiny models.
"""

import contextlib
import functools
import locale
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# What a user's shell may hold and a test must not depend on: a launcher's and a scheduler's variables,
# trackers, tokens, proxies, the width of a terminal, packages of the user's own.
FOREIGN = (
    *("ACCELERATE_", "FSDP_", "DEEPSPEED_", "TORCHELASTIC_", "SLURM_", "RAY_", "VLLM_", "GIT_"),
    *("WANDB_", "TRACKIO_", "MLFLOW_", "COMET_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    *("PYTHONPATH", "PYTHONWARNINGS", "PYTHONSTARTUP", "PYTHONIOENCODING", "PYTHONUTF8"),
)
FOREIGN_NAMES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "COLUMNS", "LINES", "CI"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY"),
}
for name in [name for name in os.environ if name.startswith(FOREIGN) or name.upper() in FOREIGN_NAMES]:
    del os.environ[name]
os.environ["PYTHONNOUSERSITE"] = "1"

# Tests compare text: it is UTF-8 with decimal points, whatever the shell's language is.
for name in [name for name in os.environ if name in ("LANG", "LANGUAGE") or name.startswith("LC_")]:
    del os.environ[name]
os.environ["LC_ALL"] = "C.UTF-8"
with contextlib.suppress(locale.Error):  # an old system has C only, where Python takes UTF-8 by itself
    locale.setlocale(locale.LC_ALL, "C.UTF-8")

# Started in the background of a script, the tests would hand an ignored Ctrl-C down to what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

import faults  # noqa: E402  (of this folder, which is on the path from here on)
import pytest  # noqa: E402
import yaml  # noqa: E402


@pytest.fixture(scope="session")
def built():
    """Tiny models and prompts, built from nothing by the loop's own setup command where they are not there
    yet.
    """
    command = yaml.safe_load((ROOT / faults.CONFIG).read_text())["setup_command"]
    end = faults.ended(["bash", "-c", f"source ./envs.sh; use_env rlhflow; {command}"], timeout=None)
    assert end.returncode == 0, end.stderr


@pytest.fixture
def card(monkeypatch):
    """STAND-IN for a GPU's memory: `card(N)` lets a Llama's layers run out of it on more than N tokens. Gives
    the list of the passes' sizes.
    """
    import torch
    from transformers import LlamaModel

    true = LlamaModel.forward

    def hold(tokens):
        passes = []

        @functools.wraps(true)
        def forward(self, input_ids=None, **more):
            passes.append(input_ids.numel())
            if input_ids.numel() > tokens:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return true(self, input_ids=input_ids, **more)

        monkeypatch.setattr(LlamaModel, "forward", forward)
        return passes

    return hold
