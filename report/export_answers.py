"""Moved to evaluation/export_answers.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "evaluation/export_answers.py"), run_name="__main__")
