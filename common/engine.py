"""What the project knows of vLLM beyond its documented arguments; look through it before another version.

Everything that starts vLLM takes it from here: generation/get_hf2.py, generation/register_server.sh,
evaluation/evaluate_benchmarks.py, ppo/openrlhf/run_openrlhf.py. Besides, get_hf2.py drives the engine's own
steps (`answer`), and common/models.py reads a model's length from its config as vLLM does.
"""

import atexit
import ctypes
import os
import signal
from typing import TYPE_CHECKING

from common import models
from common.cli import UserError

if TYPE_CHECKING:
    from vllm import LLM

# It reads the same files as transformers: Mistral's folders hold config, weights and tokenizer twice.
FORMATS = {"tokenizer_mode": "hf", "config_format": "hf", "load_format": "hf"}
# Of `LLM`: an engine in a process of its own would import everything a second time.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Sizes of attention heads that vLLM 0.32's CPU build has a kernel for; a test asks it.
CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def variables(on_gpus: bool) -> dict[str, str]:
    """What an engine needs beside the environment that is there; what is set there stays."""
    found = {
        # Seeded requests never use that sampler, but vLLM would compile it at its start, with nvcc or not
        # at all.
        True: {"VLLM_USE_FLASHINFER_SAMPLER": "0"},
        # vLLM's own binding goes by NUMA nodes, so that several engines would share the same cores.
        False: {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    }[on_gpus]
    return {key: value for key, value in found.items() if key not in os.environ}


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """In a child: Linux sends it signal `number` when its parent is gone, also where that is killed and could
    not do so itself.
    """
    set_parent_death_signal = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, int(number))


def end_as_engine() -> None:
    """In the process that vLLM starts for its engine on GPUs: it would outlive a script that is killed, and
    keep a GPU's memory. vLLM's workers end with their engine by themselves.
    """
    end_with_parent(signal.SIGKILL)


def tie_engine() -> None:
    """Before an engine is started: a process forked by this one is one that ends with it."""
    script = os.getpid()
    os.register_at_fork(after_in_child=lambda: os.getppid() == script and end_as_engine())


def end_at_exit(llm: "LLM") -> None:
    """Have an engine in a process of its own ended before Python waits for that process. vLLM leaves it to a
    finalizer; where a package has made any finalizer before multiprocessing was loaded, Python comes to those
    only after it has waited, for ever (seen on an H200).
    """
    atexit.register(llm.llm_engine.engine_core.shutdown)


def check_head_size(name: str) -> None:
    """Refuse a local model whose attention heads have a size that vLLM cannot compute without a GPU."""
    config = models.local_config(name) or {}
    shape = config.get("text_config") or config
    hidden = shape.get("hidden_size") or shape.get("n_embd")
    heads = shape.get("num_attention_heads") or shape.get("n_head")
    size = shape.get("head_dim") or (hidden // heads if hidden and heads else None)
    if size and size not in CPU_HEAD_SIZES and not shape.get("kv_lora_rank"):  # latent attention has its own
        raise UserError(
            f"{name} has attention heads of size {size}, and vLLM has no kernel for it without a GPU: there "
            f"it takes sizes {', '.join(map(str, CPU_HEAD_SIZES))}"
        )
