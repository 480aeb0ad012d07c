"""What is known of vLLM's engine without vLLM."""

import subprocess
import sys
from pathlib import Path

import faults


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
