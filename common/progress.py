"""Progress with rate and time left: a bar on a terminal, plain lines in a log."""

import sys
import time


def duration(seconds: float) -> str:
    """`95` → `1m35s`."""
    seconds = int(seconds)
    hours, minutes, seconds = seconds // 3600, seconds % 3600 // 60, seconds % 60
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"


class Progress:
    """Counts finished items of `total`; prints a bar (tqdm) on a terminal, else a line every `every`
    seconds.
    """

    def __init__(self, total, what, unit="records", done=0, every=15.0, enabled=True):
        self.total, self.what, self.unit, self.count, self.every, self.enabled = (
            total,
            what,
            unit,
            done,
            every,
            enabled,
        )
        self.first, self.start, self.last = done, time.monotonic(), time.monotonic()
        self.bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", dynamic_ncols=True)

    def update(self, items: int = 1, note: str = "") -> None:
        """Add `items` finished; `note` is shown behind the rate."""
        self.count += items
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(items)
        elif self.enabled and time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            seconds = max(self.last - self.start, 1e-9)
            rate = (self.count - self.first) / seconds
            how = (
                f"{rate:.1f}/s, {duration((self.total - self.count) / rate)} left"
                if rate > 0
                else f"none finished in {duration(seconds)}"
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

    def close(self):
        """End the bar; returns the seconds since the start."""
        if self.bar is not None:
            self.bar.close()
        return time.monotonic() - self.start
