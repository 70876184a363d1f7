"""Start a command in several processes on this machine, and restart it when it is preempted.

    python launch/local.py --processes 4 -- train --config configs/quickstart.py
    python launch/local.py --processes 1 --restarts 20 -- train --config configs/gemma2b.py --config.distributed=auto

Several processes find each other at a free port of this machine. One process is told nothing: it is how the supervisor
of a single host runs. The output of process 0 is shown as it is, the errors of the others with their number in front.
The first process that fails ends all of them, and its exit status becomes this command's. With `--restarts`, all are
started again after 143 (preempted) and 134 (a process was lost, or the watchdog ended a run that hung).
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

RESTARTED = (134, 143)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def lines(command: list[str], processes: int) -> list[list[str]]:
    """The command line of each process."""
    if not command[0].endswith(".py"):
        command = ["-m", f"roserag_jax.{command[0]}", *command[1:]]
    line = [sys.executable, "-u", *command]
    if processes == 1:
        return [line]
    address = f"localhost:{free_port()}"
    return [[*line, f"--config.distributed={address},{processes},{i}"] for i in range(processes)]


def environment(index: int, gpus: int) -> dict[str, str]:
    """The environment of a process; with `gpus` it sees that many GPUs of its own."""
    own = range(index * gpus, (index + 1) * gpus)
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(map(str, own))} if gpus else {})}


def show(stream, index: int) -> None:
    """Copy a process's output to the errors, line by line, with its number in front."""
    for line in stream:
        print(f"[{index}] {line}", end="", file=sys.stderr, flush=True)


def run(command: list[str], processes: int, gpus: int, grace: float, told: list[int]) -> int:
    """Run all processes to their end; returns the exit status of the first that failed, or 0.

    Args:
      grace: seconds that the others have to end by themselves after a failure, before SIGTERM, and then SIGKILL.
      told: signals that came for this command; they are passed on to all processes.
    """
    running = {}
    for index, line in enumerate(lines(command, processes)):
        output = {} if index == 0 else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # In a session of its own, or Ctrl-C on a terminal would reach it twice.
        process = subprocess.Popen(line, env=environment(index, gpus), start_new_session=True, **output)
        if index:
            threading.Thread(target=show, args=(process.stdout, index), daemon=True).start()
        running[index] = process
    status, deadline, stops, passed = 0, None, [signal.SIGTERM, signal.SIGKILL], 0
    while running:
        for index, process in list(running.items()):
            if (code := process.poll()) is None:
                continue
            del running[index]
            if code and not status:
                status = code if code > 0 else 128 - code
                deadline = time.monotonic() + grace
                if processes > 1:
                    print(f"[local] process {index} ended with status {status}", file=sys.stderr, flush=True)
        for number in told[passed:]:
            passed += 1
            for process in running.values():
                process.send_signal(number)
        if deadline and time.monotonic() > deadline and stops:
            number, deadline = stops.pop(0), time.monotonic() + grace
            for process in running.values():
                process.send_signal(number)
        with contextlib.suppress(InterruptedError):
            time.sleep(0.05)
    return status


def main() -> int:
    """Read the options, run the command, and restart it where that helps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="how many (default 1)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that each process gets to itself; 0 sets nothing")
    parser.add_argument(
        "--restarts", type=int, default=0, help="how often to start again after 143 and 134 (default 0)"
    )
    parser.add_argument(
        "--grace", type=float, default=20, help="seconds before the others are stopped when one has failed (default 20)"
    )
    parser.add_argument("command", nargs="+", help="-- COMMAND [OPTION ...]: a roserag_jax command, or a script.py")
    options = parser.parse_args()
    if options.processes < 1 or min(options.restarts, options.gpus, options.grace) < 0:
        parser.error("--processes must be at least 1, --restarts, --gpus and --grace at least 0")
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: told.append(number))
    for restart in range(options.restarts + 1):
        status = run(options.command, options.processes, options.gpus, options.grace, told)
        if status not in RESTARTED or told or restart == options.restarts:
            return status
        print(f"[local] restart {restart + 1} of {options.restarts}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
