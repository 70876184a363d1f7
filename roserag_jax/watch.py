"""Watch a run: what it is doing, how far it is, how fast, how long it will take, and what it last accepted.

    python -m roserag_jax.watch WORKDIR

Reads what the run writes in its workdir, and changes nothing; any number may watch, also over a shared file system. On
a terminal one picture is redrawn; elsewhere a line is printed every 30 seconds. Ends with the run.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from roserag_jax import cli, signals
from roserag_jax.errors import UserError
from roserag_jax.progress import STAGES, STATUS, describe
from roserag_jax.rates import clock
from roserag_jax.workdir import Workdir, from_jsonl

_LINE_SECONDS = 30
_SILENCE = 120  # seconds without a sign of life after which it is told


def read_status(workdir: Workdir) -> dict | None:
    """The status of the stage under way or of the last one; None before the first.

    Raises:
      UserError: the file is not one that a run wrote.
    """
    file = workdir / STATUS
    if not file.exists():
        return None
    try:
        status = json.loads(file.read_text())
        describe(status)
        return status | {"pid": int(status["pid"]), "updated": float(status["updated"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; delete it, the run writes it anew.") from error


def has_ended(status: dict) -> bool:
    """Whether the process is known to have ended; one on another host never is."""
    if status["host"] != platform.node():
        return False
    try:
        os.kill(status["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False


def finished_stages(workdir: Workdir) -> list[dict]:
    """The stages that have ended, with their time; one that was stopped and resumed is one row."""
    found: dict[str, dict] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for row in from_jsonl((workdir / STAGES).read_text()):
            before = found.get(row["stage"], {"seconds": 0.0, "done": 0})
            sums = {name: row[name] + before[name] for name in ("seconds", "done")}
            found[row["stage"]] = {**row, **sums}
    return list(found.values())


def line(status: dict) -> str:
    """A status as one line."""
    silent = time.time() - status["updated"]
    parts = [describe(status), printable(status.get("note", "")), _memory(status)]
    parts.append(f"no sign of life for {clock(silent)}" if silent > _SILENCE else "")
    return "; ".join(filter(None, parts))


def printable(text: str) -> str:
    """A text on one line, without characters that could command a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _memory(status: dict) -> str:
    device = status.get("device_memory_gb")
    return f"memory {status.get('memory_gb', 0)} GB" + (f", on the device {device} GB" if device else "")


def picture(status: dict | None, stages: list[dict]) -> Group:
    """What a terminal shows."""
    parts = []
    if stages:
        table = Table("finished stage", "work", "time", box=None, header_style="dim", padding=(0, 2, 0, 0))
        for row in stages:
            table.add_row(Text(row["stage"]), Text(f"{row['done']} {row['unit']}"), clock(row["seconds"]))
        parts += [table, Text()]
    if status is None:
        return Group(*parts, Text("Nothing has started yet."))
    bar = Table.grid()  # a bar alone does not end its line
    bar.add_row(ProgressBar(total=max(status["total"], 1), completed=status["done"], width=60))
    parts.append(bar)
    parts += [Text(part) for part in line(status).split("; ")]
    if status.get("accepted"):
        parts += [Text(), Text("last accepted rationale:", style="dim"), Text(printable(status["accepted"]))]
    return Group(*parts)


def watch(workdir: Workdir) -> None:
    """Show the run until it has ended or the user has seen enough."""
    console = Console()
    live = Live(console=console, refresh_per_second=4) if console.is_terminal else contextlib.nullcontext()
    shown = None
    with live:
        while True:
            status = read_status(workdir)
            ended = status is not None and has_ended(status)
            if console.is_terminal:
                live.update(picture(status, finished_stages(workdir)))
            elif status is not None and (ended or shown is None or time.monotonic() - shown >= _LINE_SECONDS):
                shown = time.monotonic()
                print(line(status), flush=True)
            if ended:
                break
            time.sleep(1)
    whole = status["done"] == status["total"]
    print("The run has ended." if whole else f"The run was stopped; the same command resumes {status['stage']}.")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="roserag watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", help="the workdir of a run")
    arguments = parser.parse_args()
    workdir = Workdir(arguments.workdir)
    if not workdir.path.is_dir():
        raise UserError(f"{arguments.workdir}: there is no such folder; name the workdir of a run.")
    try:
        watch(workdir)
    except KeyboardInterrupt:  # nothing of it is lost or resumed, so there is nothing to say
        sys.exit(signals.STOPS.get(signals.stopped(), 130))


if __name__ == "__main__":
    cli.guard(main)
