"""A progress line: stage, count, rate, time elapsed and ETA. Process 0 only."""

import sys
import time

import jax


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Counts to `total`; redraws one line on a terminal, prints a line every few seconds elsewhere."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self.label, self.total, self.unit = label, total, unit
        self.first = self.done = done
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.quiet = jax.process_index() != 0
        if done:
            self._print(f"{label}: resuming at {done} of {total} {unit}\n")

    def update(self, done: int, note: str = "") -> None:
        """Report that `done` of the total are finished."""
        self.done, now = done, time.monotonic()
        if not (self.terminal or done == self.total or now - self.shown >= 5):
            return
        self.shown = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        eta = _clock((self.total - done) / rate) if rate else "?"
        elapsed = _clock(now - self.start)
        line = f"{self.label}: {done}/{self.total} {self.unit}, {rate:.2g}/s, {elapsed} elapsed, ETA {eta}"
        end = "\n" if done == self.total or not self.terminal else ""
        self._print(f"{chr(13) if self.terminal else ''}{line}{'; ' + note if note else ''}{end}")

    def phase(self, note: str) -> None:
        """Print what is being done now, inside a long batch."""
        self._print(f"{chr(13) if self.terminal else ''}{self.label}: {note}{'' if self.terminal else chr(10)}")

    def _print(self, text: str) -> None:
        if not self.quiet:
            print(text, end="", file=sys.stderr, flush=True)
