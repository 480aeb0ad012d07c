"""Moved to evaluation/run_metrics.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "evaluation/run_metrics.py"), run_name="__main__")
