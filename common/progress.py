"""Progress with rate and time left: a bar on a terminal, plain lines in a log, and a small file for programs.

The environment variable RLHF_PROGRESS names that file. The first rank writes it, at most once a second:
{"what", "unit", "done", "total", "rate", "seconds_left", "note"}. The rate is a second's; null is not known.
"""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

VARIABLE = "RLHF_PROGRESS"


def read_progress(path: Path) -> dict | None:
    """What a command wrote last of its progress; None without a file that holds it."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        found = {key: str(held[key]) for key in ("what", "unit", "note")}
        found |= {key: int(held[key]) for key in ("done", "total")}
        for key in ("rate", "seconds_left"):
            value = held[key]
            found[key] = float(value) if value is not None and math.isfinite(value) else None
        return found
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def duration(seconds: float) -> str:
    """`95` → `1m35s`."""
    seconds = int(seconds)
    hours, minutes, seconds = seconds // 3600, seconds % 3600 // 60, seconds % 60
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


class Progress:
    """Counts finished items of `total`; prints a bar (tqdm) on a terminal, else a line every `every`
    seconds. With `enabled` false nothing is printed.
    """

    def __init__(self, total, what, unit="records", done=0, every=15.0, enabled=True):
        self.total, self.what, self.unit, self.count, self.every = total, what, unit, done, every
        self.first, self.start, self.last = done, time.monotonic(), time.monotonic()
        self.enabled, self.note, self.bar = enabled, "", None
        self.file = os.environ.get(VARIABLE) if os.environ.get("RANK", "0") == "0" else None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", dynamic_ncols=True)
        self._write()

    def rate(self) -> float:
        """Items a second of this start."""
        return (self.count - self.first) / max(time.monotonic() - self.start, 1e-9)

    def update(self, items: int = 1, note: str = "") -> None:
        """Add `items` finished; `note` is shown behind the rate."""
        self.count, self.note = self.count + items, note or self.note
        now = time.monotonic()
        if now - self.written >= 1:
            self._write()
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(items)
        elif self.enabled and now - self.last >= self.every:
            self.last, rate = now, self.rate()
            how = (
                f"{rate:.1f}/s, {duration((self.total - self.count) / rate)} left"
                if rate > 0
                else f"none finished in {duration(now - self.start)}"
            )
            tail = f", {note}" if note else ""
            print(f"{self.what}: {self.count}/{self.total} {self.unit}, {how}{tail}", flush=True)

    def tick(self):
        """A sign of life where nothing may finish for long, since much is worked on at once: the line that is
        due, or the bar's clock.
        """
        if self.bar is None:
            self.update(0)
        elif time.monotonic() - self.last >= 1:
            self.last = time.monotonic()
            self.bar.refresh()

    def close(self) -> float:
        """End the bar; returns the seconds since the start."""
        self._write()
        if self.bar is not None:
            self.bar.close()
        return time.monotonic() - self.start

    def _write(self):
        """Write the file for programs; a disk that is full must not end the work."""
        self.written, rate = time.monotonic(), self.rate()
        if not self.file:
            return
        held = {"what": self.what, "unit": self.unit, "done": self.count, "total": self.total, "rate": rate}
        held |= {"seconds_left": (self.total - self.count) / rate if rate else None, "note": self.note}
        temporary = Path(f"{self.file}.tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(held), encoding="utf-8")
            os.replace(temporary, self.file)
