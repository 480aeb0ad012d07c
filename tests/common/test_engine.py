"""What is known of vLLM's engine without vLLM."""

import subprocess
import sys
from pathlib import Path

import faults
import pytest

from common import engine
from common.cli import UserError


def test_a_forked_engine_ends_with_a_killed_script_and_its_own_children_do_so_by_themselves():
    """STAND-INS: processes that sleep. What the engine forks is vLLM's and is left alone."""
    script = (
        f"import os, sys, time\nsys.path.insert(0, {str(faults.ROOT)!r})\n"
        "from common.engine import tie_engine\n"
        "tie_engine()\n"
        "if not os.fork() and not os.fork():\n"
        "    print(os.getppid(), os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    engine, worker = (Path("/proc", word) for word in process.stdout.readline().split())
    try:
        assert faults.kill(process, whole=False)
        faults.wait_for(lambda: not (engine / "exe").exists(), 30)
        assert (worker / "exe").exists()
    finally:
        for path in (engine, worker):
            if path.exists():
                subprocess.run(["kill", "-9", path.name], check=False)


@pytest.mark.parametrize(
    "called, given, told",
    [
        ("engine_args", {"model": "x"}, "may not hold model: .* model_name_or_path"),
        ("engine_args", {"kv_cache_memory_bytes": 1}, "kv_cache_gib"),
        ("engine_args", {"seed": 1}, "seed of its own"),
        ("engine_args", {"enable_chunked_prefill": True}, "without a GPU"),
        ("sampling_args", {"n": 4}, "may not hold n: .* K$"),
        ("sampling_args", {"seed": 4}, "may not hold seed"),
        ("sampling_args", {"logprobs": 4}, "may not hold logprobs"),
        ("sampling_args", {"stop": [""]}, "is no list of texts"),
        ("sampling_args", {"stop": 5}, "is no list of texts"),
    ],
)
def test_what_the_project_relies_on_is_not_passed_on(called, given, told):
    with pytest.raises(UserError, match=told):
        if called == "engine_args":
            engine.check_engine_args(given, on_gpus=False)
        else:
            engine.check_sampling_args(given)
    engine.check_engine_args({"enable_prefix_caching": False}, on_gpus=False)
    engine.check_engine_args({"enable_chunked_prefill": True, "quantization": "fp8"}, on_gpus=True)
    engine.check_sampling_args({"min_p": 0.05, "repetition_penalty": 1.05, "stop": ["a"]})


def test_arguments_of_the_engine_as_flags_of_a_server():
    given = {"quantization": "fp8", "async_scheduling": False, "enforce_eager": True, "swap": None}
    given |= {"hf_overrides": {"a": [1, 2]}, "cudagraph_capture_sizes": [1, 2]}
    assert engine.engine_flags(given) == [
        *("--quantization", "fp8", "--no-async-scheduling", "--enforce-eager"),
        *("--hf-overrides", '{"a": [1, 2]}', "--cudagraph-capture-sizes", "1", "2"),
    ]
