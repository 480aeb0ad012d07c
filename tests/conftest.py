"""Paths for all tests: the project's root and this folder, so that `from common import …` and `import micro` work."""

import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Started in the background of a script, the tests would hand an ignored Ctrl-C down to what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
