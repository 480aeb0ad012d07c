"""Moved to ppo/openrlhf/run_openrlhf.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "ppo/openrlhf/run_openrlhf.py"), run_name="__main__")
