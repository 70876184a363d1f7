"""launch/local.py: several processes on one machine, whose failures, signals and exit statuses are passed on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "launch/local.py"


@pytest.fixture
def start(tmp_path):
    """A function that starts `local.py` on a script; `index` is the process's number in it."""

    def start(script, *options):
        head = "import os, signal, sys, time\nindex = int(sys.argv[-1].rsplit(',')[-1]) if ',' in sys.argv[-1] else 0\n"
        (tmp_path / "script.py").write_text(head + script)
        line = [sys.executable, str(LOCAL), *options, "--", str(tmp_path / "script.py"), "told"]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    return start


def test_every_process_is_told_where_and_who_it_is(start):
    process = start("print(sys.argv[1:], flush=True)\nprint('careful', file=sys.stderr)", "--processes", "3")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and out.startswith("['told', '--config.distributed=localhost:")
    assert out.endswith(",3,0']\n") and out.count("\n") == 1
    for i in (1, 2):
        assert f",3,{i}']" in errors and f"[{i}] careful\n" in errors


def test_one_process_is_told_nothing_and_sees_its_gpus(start):
    process = start("print(sys.argv[1:], os.environ['CUDA_VISIBLE_DEVICES'])", "--gpus", "2")
    assert process.communicate(timeout=60)[0] == "['told'] 0,1\n" and process.returncode == 0


def test_first_failure_ends_all_and_is_passed_on(start):
    """Also those that do not listen to SIGTERM, or are stopped."""
    script = """
if index == 1:
    time.sleep(0.5)
    sys.exit(2)
if index == 2:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if index == 3:
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(600)
"""
    began = time.monotonic()
    process = start(script, "--processes", "4", "--grace", "1")
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "process 1 ended with status 2" in errors
    assert time.monotonic() - began < 20


def test_killed_process_has_the_shells_status(start):
    process = start("os.kill(os.getpid(), signal.SIGKILL)")
    process.communicate(timeout=60)
    assert process.returncode == 137


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_is_passed_on_and_nothing_restarts(start, tmp_path, number, status):
    script = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
open(f'ready{index}', 'a').write('x')
try:
    time.sleep(600)
except KeyboardInterrupt:
    sys.exit(130)
"""
    process = start(script, "--processes", "2", "--restarts", "3")
    while not all((tmp_path / f"ready{i}").exists() for i in (0, 1)):
        time.sleep(0.05)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == status and (tmp_path / "ready0").read_text() == "x"


@pytest.mark.parametrize("status, starts", [(134, 3), (143, 3), (1, 1), (2, 1)])
def test_restarts_after_preemption_and_watchdog_alone(start, tmp_path, status, starts):
    process = start(f"open('starts', 'a').write('x')\nsys.exit({status})", "--restarts", "2")
    process.communicate(timeout=60)
    assert process.returncode == status and len((tmp_path / "starts").read_text()) == starts
