"""What the project knows of vLLM beyond its documented arguments; look through it before another version.

Everything that starts vLLM takes it from here: generation/get_hf2.py, generation/register_server.sh,
evaluation/evaluate_benchmarks.py, ppo/openrlhf/run_openrlhf.py. Besides, get_hf2.py drives the engine's own
steps (`answer`), and common/models.py reads a model's length from its config as vLLM does.
"""

import ast
import atexit
import ctypes
import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from common import models
from common.cli import UserError, nearest

if TYPE_CHECKING:
    from vllm import LLM

# It reads the same files as transformers: Mistral's folders hold config, weights and tokenizer twice.
FORMATS = {"tokenizer_mode": "hf", "config_format": "hf", "load_format": "hf"}
# Sizes of attention heads that vLLM 0.32's CPU build has a kernel for; a test asks it.
CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

OWN = "it is an argument of its own: "
# Arguments of vLLM's engine that nobody else may set, and why.
ENGINE_REFUSED = {
    **{name: OWN + "model_name_or_path" for name in ("model", "tokenizer", "served_model_name")},
    **{name: OWN + name for name in ("revision", "trust_remote_code", "tensor_parallel_size", "dtype")},
    **{name: OWN + name for name in ("gpu_memory_utilization", "max_num_seqs")},
    "tokenizer_revision": OWN + "revision",
    "kv_cache_memory_bytes": OWN + "kv_cache_gib",
    "max_model_len": "it follows from max_input_length and max_new_tokens",
    "seed": "every prompt has a seed of its own",
    **dict.fromkeys(FORMATS, "training reads the same files"),
    **dict.fromkeys(("generation_config", "override_generation_config"), "every sampling setting is given"),
    "skip_tokenizer_init": "responses are texts",
    **dict.fromkeys(("runner", "convert"), "the engine generates"),
    **dict.fromkeys(("logits_processors", "scheduler_cls", "worker_cls"), "settings are no code"),
    "data_parallel_size": "each copy of the model has a process, or a server, of its own",
    "hf_token": "settings are written and shown: export HF_TOKEN",
}
NO_GPU_REFUSED = dict.fromkeys(
    ("enable_chunked_prefill", "max_num_batched_tokens"),
    "without a GPU a prompt with a seed must be read in one step",
)
# Sampling parameters of vLLM, the same.
SAMPLING_REFUSED = {
    **{name: OWN + name for name in ("temperature", "top_p", "top_k", "seed")},
    "n": OWN + "K",
    "max_tokens": OWN + "max_new_tokens",
    "stop_token_ids": OWN + "eos_ids",
    "ignore_eos": "a response ends where the policy ends it",
    "include_stop_str_in_output": "the text leaves out what ended it, as it does the end of turn",
    **dict.fromkeys(
        ("logprobs", "prompt_logprobs", "logprob_token_ids"), "records hold none; see divergence.py"
    ),
    **dict.fromkeys(
        ("detokenize", "skip_special_tokens", "spaces_between_special_tokens"), "training reads the texts"
    ),
    **dict.fromkeys(
        ("structured_outputs", "watermarking"), "training takes responses for the policy's own samples"
    ),
    **dict.fromkeys(("stream_interval", "output_kind", "flat_logprobs"), "answers are taken when finished"),
}


def fields_of(file: str, cls: str) -> set[str]:
    """Names of the public annotated fields of a class in vLLM's source, which is not imported: that takes
    seconds.

    Empty where there is no vLLM here, nor in the environment that a loop names (RLHF_VLLM_ENV).
    """
    spec = importlib.util.find_spec("vllm")
    places = list(spec.submodule_search_locations or []) if spec else []
    if "RLHF_VLLM_ENV" in os.environ:
        places += Path(os.environ["RLHF_VLLM_ENV"]).glob("lib/python*/site-packages/vllm")
    for place in places:
        path = Path(place) / file
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
            if isinstance(node, ast.ClassDef) and node.name == cls:
                found = (part.target for part in node.body if isinstance(part, ast.AnnAssign))
                names = {target.id for target in found if isinstance(target, ast.Name)}
                return {name for name in names if not name.startswith("_")}
    return set()


def _check_passed_on(given: dict, called: str, refused: dict, there: set[str]) -> None:
    """Refuse keys that are not passed on, or that vLLM does not know."""
    for key in given:
        if key in refused:
            raise UserError(f"--{called} may not hold {key}: {refused[key]}")
        if there and key not in there:
            near = nearest(str(key), sorted(there - refused.keys()))
            raise UserError(f"--{called}: vLLM has no {key!r} that is passed on{near}")


def check_engine_args(given: dict | None, on_gpus: bool) -> None:
    """Refuse arguments of vLLM's engine that it does not know, or that would break what we rely on."""
    if given:
        refused = ENGINE_REFUSED | ({} if on_gpus else NO_GPU_REFUSED)
        _check_passed_on(given, "engine_args", refused, fields_of("engine/arg_utils.py", "EngineArgs"))


def check_sampling_args(given: dict | None) -> None:
    """The same of sampling parameters: those that the engine and its API share under one name."""
    if given:
        engines = fields_of("sampling_params.py", "SamplingParams")
        servers = fields_of("entrypoints/openai/completion/protocol.py", "CompletionRequest")
        _check_passed_on(given, "sampling_args", SAMPLING_REFUSED, engines & servers)
        stop = given.get("stop")
        stops = [stop] if isinstance(stop, str) else stop
        if stops is not None and not (
            isinstance(stops, list) and all(s and isinstance(s, str) for s in stops)
        ):
            raise UserError(f"--sampling_args: stop {stop!r} is no list of texts")


def engine_flags(given: dict | None) -> list[str]:
    """Arguments of vLLM's engine as flags of its API server."""
    words = []
    for key, value in (given or {}).items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            texts = (json.dumps(v) if isinstance(v, (dict, list)) else str(v) for v in values)
            words += [f"--{flag}", *texts]
    return words


def variables(on_gpus: bool) -> dict[str, str]:
    """What an engine needs beside the environment that is there; what is set there stays."""
    found = {
        # Seeded requests never use that sampler, but vLLM would compile it at its start, with nvcc or not
        # at all.
        True: {"VLLM_USE_FLASHINFER_SAMPLER": "0"},
        False: {
            # vLLM's own binding goes by NUMA nodes, so that several engines would share the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # `LLM` without a process for its engine, a server without one for its worker, which would import
            # everything once more and wait for each other by spinning.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
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
