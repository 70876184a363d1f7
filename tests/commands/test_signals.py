"""Ctrl-C and SIGTERM: wherever they fall, one line and 130 or 143."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import start_command, write_lines

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}

# A command whose main thread is nearly always in a place where an exception does not arrive.
PROGRAM = """
import gc, hashlib, sys, time, weakref
from roserag_jax import signals

def busy(*_):
    until = time.monotonic() + 0.05
    while time.monotonic() < until:
        pass

class Dying:
    __del__ = busy

class Swallowing:
    def __getattr__(self, name):
        busy()
        raise AttributeError(name)

def collector():
    if busy not in gc.callbacks:
        gc.callbacks.append(busy)
    gc.collect()

def destructor():
    Dying()

def weak():
    key = Swallowing()
    reference = weakref.ref(key, busy)
    del key

def library():
    try:
        busy()
    except BaseException:
        pass

def c_code():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)

def deferred():
    with signals.deferred():
        busy()

def convert():
    try:
        busy()
    except BaseException as error:
        raise ValueError("something else") from error

def run():
    print("running", flush=True)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        globals()[sys.argv[1]]()

signals._BUSY_SECONDS = 1.0
signals.on_arrival(lambda status, why: print("arrived", status, why, flush=True))
signals.install()
status = 0
try:
    run()
except BaseException:
    number = signals.stopped()
    print(signals.message(number), file=sys.stderr)
    status = signals.STOPS[number]
sys.exit(status)
"""


def assert_stopped(process, how, timeout):
    """The process ends in one line and with the signal's status; returns what it printed."""
    out, err = process.communicate(timeout=timeout)
    assert_said_to_stop(process.returncode, err, how)
    return out


def assert_said_to_stop(status, said, how):
    """The status is the signal's, and of what was said one line tells of it."""
    assert status == STATUS[how], said
    assert said.count("Stopped by") == 1 and "Traceback" not in said and "ignored" not in said, said


@pytest.mark.parametrize("place", ["collector", "destructor", "weak", "library", "c_code", "deferred", "convert"])
def test_signal_arrives_where_an_exception_would_be_lost(place):
    how = signal.SIGINT if place in ("collector", "c_code") else signal.SIGTERM
    line = [sys.executable, "-c", PROGRAM, place]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "running\n"
    time.sleep(0.13)
    process.send_signal(how)
    out = assert_stopped(process, how, 90)
    if place == "c_code":  # which takes so long that other processes are told before
        assert out.count(f"arrived {STATUS[how]} Stopped by") == 1


@pytest.mark.parametrize("how", list(STATUS), ids=lambda how: how.name)
def test_signal_ends_a_command_while_it_imports(how, tmp_path):
    """Jax takes seconds to import; the command's own code has not begun."""
    (tmp_path / "jax.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"}
    for line in ((sys.executable, "-m", "roserag_jax.train"), (sys.executable, "-m", "roserag_jax", "train")):
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        )
        assert process.stdout.readline() == "importing\n"
        process.send_signal(how)
        assert_stopped(process, how, 30)


@pytest.mark.parametrize("how", list(STATUS), ids=lambda how: how.name)
def test_signal_ends_watch_with_its_status_and_no_word_of_resuming(how, tmp_path):
    """Who watches has nothing to resume; the run that is watched goes on."""
    status = {"stage": "train", "unit": "steps", "first": 0, "done": 1, "total": 9, "seconds": 5.0, "running": None}
    (tmp_path / "progress.json").write_text(
        json.dumps(status | {"host": "elsewhere", "pid": 1, "updated": time.time()})
    )
    line = [sys.executable, "-m", "roserag_jax", "watch", str(tmp_path)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("train: 1/9 steps")
    process.send_signal(how)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == STATUS[how]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "generate", "evaluate", "index"])
def test_signal_at_any_moment_of_a_run_ends_it_in_one_line(stage, config_of, finished, tmp_path):
    """Seeded moments of each command, from its first import on; `SIGNAL_MOMENTS=100` for a campaign."""
    draw = random.Random(stage)
    changes = {"data.pairs": f"{finished.workdir}/pairs.jsonl", "train.evaluate": False}
    changes = {"train": changes, "evaluate": {"evaluate.systems": ("base", "closed_book")}}.get(stage, {})
    if stage == "index":
        text = lambda: " ".join(draw.choices("tern moss heron reed gull fen".split(), k=40))
        changes = {"retrieve.corpus": write_lines(tmp_path / "c.jsonl", *({"text": text()} for _ in range(50_000)))}
    for moment in range(int(os.environ.get("SIGNAL_MOMENTS", "2"))):
        if stage == "index":
            changes["index"] = str(tmp_path / f"index{moment}")
        config, how, said = config_of(**changes), draw.choice(list(STATUS)), tmp_path / f"said{moment}"
        with said.open("w") as file:
            process = start_command(stage, config, stdout=file)
        time.sleep(draw.uniform(0.3, 12))
        process.send_signal(how)
        before = said.read_text()
        status, after = process.wait(120), said.read_text()
        if status == 0:  # it was done, so it has nothing more to say; a run that lost the signal has
            assert after == before
        else:
            assert_said_to_stop(status, after, how)


def test_signal_after_the_last_line_leaves_the_commands_status():
    """While the interpreter ends, it would put back the handlers that end a process without a word."""
    program = """
import os, sys
from roserag_jax import signals

class Last:
    def __del__(self, kill=os.kill, me=os.getpid()):
        print("still here", flush=True)
        kill(me, 15)

signals.install()
signals.last = Last()
signals.finish(2)
if sys.argv[1] == "before":
    os.kill(os.getpid(), 2)
sys.exit(2)
"""
    for when, printed in (("behind", "still here\n"), ("before", "")):
        done = subprocess.run([sys.executable, "-c", program, when], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (2, printed, "")


def test_signals_are_left_alone_where_the_package_is_a_library():
    program = "import signal; before = [signal.getsignal(s) for s in (2, 15)]; import roserag_jax.cli\n"
    program += "assert [signal.getsignal(s) for s in (2, 15)] == before"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
