"""Moved to ppo/openrlhf/serve_reward.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "ppo/openrlhf/serve_reward.py"), run_name="__main__")
