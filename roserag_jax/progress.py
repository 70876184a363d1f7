"""Progress of a stage: a line on standard error, and a file in the workdir that `roserag watch` reads. Process 0 only.

The file `progress.json` says what is being done and how fast; `stages.jsonl` gets a row for each stage that has ended,
whose time is no function of its input and so is in no artifact. Finished stages also leave their rate in the user's
cache, from which the next run is estimated (`rates`).
"""

import contextlib
import json
import os
import platform
import resource
import shlex
import sys
import time

import jax

from roserag_jax import rates
from roserag_jax.rates import clock
from roserag_jax.workdir import Workdir, append, is_remote, to_json, write_atomic

STATUS, STAGES = "progress.json", "stages.jsonl"
_ERASE = "\x1b[K"  # what a longer line has left behind the cursor
_LINE_SECONDS = 30  # between lines where there is no terminal
_STATUS_SECONDS = 2  # between writes of the file


class Progress:
    """Counts to `total`; redraws one line on a terminal, prints a line every half minute elsewhere.

    Args:
      done: how many were finished by a run before.
      workdir: where the status goes; None writes none.
      rate: what the stage's speed depends on, from `rates.key`; '' keeps no rate.
    """

    def __init__(
        self, label: str, total: int, unit: str, done: int = 0, *, workdir: Workdir | None = None, rate: str = ""
    ):
        self.label, self.total, self.unit, self.rate = (workdir.label if workdir else "") + label, total, unit, rate
        self.first = self.done = done
        self.start = self.shown = time.monotonic()
        self.written, self.accepted, self.note = 0.0, "", ""
        self.running: tuple[int, float] | None = None  # how many were done when, as soon as any was
        self.terminal = sys.stderr.isatty()
        self.quiet = jax.process_index() != 0
        self.workdir = None if workdir is None or self.quiet or is_remote(workdir.path) else workdir
        if done:
            self._print(f"{self.label}: resuming at {done} of {total} {unit}\n")
        self._keep_time_of_stopped()
        self._write()

    def update(self, done: int, note: str = "", accepted: str = "") -> None:
        """Report that `done` of the total are finished.

        Args:
          accepted: the last rationale that was accepted.
        """
        self.done, self.note, self.accepted = done, note, accepted or self.accepted
        now = time.monotonic()
        self.running = self.running or (done, now - self.start)
        if done == self.total or now - self.written >= _STATUS_SECONDS:
            self._write()
        if done == self.total:
            self._end()
        if not (self.terminal or done == self.total or now - self.shown >= _LINE_SECONDS):
            return
        self.shown = now
        self._line(describe(self._status()) + ("; " + note if note else ""), stays=done == self.total)

    def phase(self, note: str) -> None:
        """Print what is being done now, inside a long batch."""
        self._line(f"{self.label}: {note}")

    def _line(self, text: str, stays: bool = False) -> None:
        """Print a line; on a terminal the next one takes its place unless it `stays`, so it must not wrap there."""
        if not self.terminal:
            self._print(f"{text}\n")
            return
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        except OSError:
            columns = 80
        self._print(f"\r{text if stays else text[: columns - 1]}{_ERASE}{chr(10) if stays else ''}")

    def _print(self, text: str) -> None:
        if not self.quiet:
            print(text, end="", file=sys.stderr, flush=True)

    def _status(self) -> dict:
        """What `watch` shows; `updated` and `pid` say whether the run is alive."""
        memory = jax.local_devices()[0].memory_stats() or {}  # none on a CPU
        return {
            "stage": self.label,
            "unit": self.unit,
            "first": self.first,
            "done": self.done,
            "total": self.total,
            "seconds": round(time.monotonic() - self.start, 2),
            "running": self.running,
            "note": self.note,
            "accepted": self.accepted,
            "memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 1e9, 2),
            "device_memory_gb": round(memory.get("peak_bytes_in_use", 0) / 1e9, 2),
            "command": shlex.join(["roserag", os.path.basename(sys.argv[0]).removesuffix(".py"), *sys.argv[1:]]),
            "host": platform.node(),
            "pid": os.getpid(),
            "updated": time.time(),
        }

    def _write(self) -> None:
        self.written = time.monotonic()
        if self.workdir is not None:
            write_atomic(self.workdir / STATUS, to_json(self._status()))

    def _end(self) -> None:
        """Keep the stage's time, and its rate for the next run's estimate."""
        if self.workdir is None or self.done == self.first:
            return
        self._keep_time(self._status())
        if self.rate:
            rates.record(self.rate, (time.monotonic() - self.start) / (self.done - self.first))

    def _keep_time_of_stopped(self) -> None:
        """Keep the time of a run that was stopped inside a stage: its last status says how far it came."""
        if self.workdir is None:
            return
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads((self.workdir / STATUS).read_text())
            if before["first"] < before["done"] < before["total"]:
                self._keep_time(before)

    def _keep_time(self, status: dict) -> None:
        row = {name: status[name] for name in ("stage", "unit", "seconds", "command")}
        append(self.workdir / STAGES, to_json(row | {"done": status["done"] - status["first"]}))


_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere


def describe(status: dict) -> str:
    """A status as a line: stage, count, rate, time elapsed and ETA, by the rate since the first that was finished.

    What came before that is compiled once: it would make the first ETAs many times too long.
    """
    done, total, seconds = status["done"], status["total"], status["seconds"]
    rate = (done - status["first"]) / max(seconds, 1e-9)
    before, since = status["running"] or (done, 0.0)
    eta = clock((total - done) * (seconds - since) / (done - before)) if done > before else "?"
    eta = clock(0) if done == total else eta
    return f"{status['stage']}: {done}/{total} {status['unit']}, {rate:.2g}/s, {clock(seconds)} elapsed, ETA {eta}"
