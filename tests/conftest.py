"""Paths for all tests: the project's root and this folder, so that `from common import …` and `import micro` work."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
