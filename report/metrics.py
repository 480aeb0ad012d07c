"""Moved to evaluation/metrics.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "evaluation/metrics.py"), run_name="__main__")
