"""Moved to evaluation/divergence.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "evaluation/divergence.py"), run_name="__main__")
