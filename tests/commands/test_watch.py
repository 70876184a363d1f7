"""Progress and `watch`: what a run says of itself while it runs, and what is known of its rates afterwards."""

import io
import json
import os
import pty
import subprocess
import sys
import time

import pytest
from conftest import write_lines
from rich.console import Console

from roserag_jax import options, rates, watch
from roserag_jax.errors import UserError
from roserag_jax.progress import Progress
from roserag_jax.workdir import Workdir


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "run").mkdir()
    return Workdir(str(tmp_path / "run"))


def shown(workdir):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    console.print(watch.picture(watch.read_status(workdir), watch.finished_stages(workdir)))
    return console.file.getvalue()


def test_progress_prints_a_line_in_half_a_minute_and_the_last_one(workdir, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("generate", 100, "questions", workdir=workdir)
    for done in range(1, 101):
        now[0] += 1.0
        progress.update(done, f"{done} correct")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2].partition(" ")[0] for line in lines] == ["30/100", "60/100", "90/100", "100/100"]
    assert lines[1] == "generate: 60/100 questions, 1/s, 1:00 elapsed, ETA 0:40; 60 correct"


def test_progress_estimates_from_the_first_that_is_finished(workdir, capsys, monkeypatch):
    """Before it programs are compiled, which happens once; with one finished nothing is known of the rate."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("evaluate base", 48, "questions", 8, workdir=workdir)
    for done, seconds in ((9, 48.0), (29, 40.0)):
        now[0] += seconds
        progress.update(done)
    first, second = capsys.readouterr().err.splitlines()[1:]
    assert first == "evaluate base: 9/48 questions, 0.021/s, 0:48 elapsed, ETA ?"
    assert second == "evaluate base: 29/48 questions, 0.24/s, 1:28 elapsed, ETA 0:38"


def test_progress_redraws_one_line_of_a_terminal(workdir):
    """In a terminal of 40 columns: no line wraps, none leaves its tail behind, and the last stays whole."""
    code = (
        "import fcntl, struct, sys, termios\nfrom roserag_jax.progress import Progress\n"
        "fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack('HHHH', 9, 40, 0, 0))\n"
        "progress = Progress('generate', 3, 'questions')\n"
        "progress.update(1, 'a note that is longer than the line')\nprogress.phase('compiling')\n"
        "progress.update(3, 'end')"
    )
    master, terminal = pty.openpty()
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], stderr=terminal, check=True, timeout=100)
    os.close(terminal)
    first, second, last = os.read(master, 9999).decode().split("\r", 3)[1:]
    assert first.startswith("generate: 1/3 questions, ") and len(first.removesuffix("\x1b[K")) == 39
    assert second == "generate: compiling\x1b[K"
    assert last.startswith("generate: 3/3 questions, ") and last.endswith("ETA 0:00; end\x1b[K\r\n")
    os.close(master)


def test_watch_shows_the_stage_and_the_last_accepted_rationale_as_text(workdir):
    """What the model wrote cannot command the terminal, nor be rich's markup."""
    progress = Progress("generate", 4, "questions", workdir=workdir)
    progress.update(4, "3 of 8 candidates correct", accepted="It [bold red]says[/] so.\x1b[2J\x07\nAnswer")
    text = shown(workdir)
    assert "finished stage" in text and "4 questions" in text and "3 of 8 candidates correct" in text
    assert "It [bold red]says[/] so. [2J  Answer" in text and "\x1b[2J" not in text
    assert "memory" in text and "GB" in text
    assert [line for line in text.splitlines() if line.startswith("generate: 4/4 questions, ")]  # on a line of its own


def test_watch_ends_with_the_run_and_says_how(workdir):
    """In a process of its own, without a terminal: plain lines, and whether the same command resumes."""
    code = (
        "import sys\nfrom roserag_jax.progress import Progress\nfrom roserag_jax.workdir import Workdir\n"
        "progress = Progress('train', 9, 'steps', workdir=Workdir(sys.argv[1]))\n"
        "progress.written = -9.0\nprogress.update(5, 'loss 0.5')"
    )
    subprocess.run([sys.executable, "-c", code, str(workdir.path)], check=True, timeout=100)
    assert watch.has_ended(watch.read_status(workdir))
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        watch.watch(workdir)
    first, last = output.getvalue().splitlines()
    assert first.startswith("train: 5/9 steps, ") and "loss 0.5; memory " in first
    assert last == "The run was stopped; the same command resumes train."


def test_watch_knows_a_run_on_another_host_by_its_silence(workdir):
    Progress("train", 9, "steps", workdir=workdir)
    status = watch.read_status(workdir) | {"host": "elsewhere", "pid": 2**22 + 1, "updated": time.time() - 300}
    assert not watch.has_ended(status) and "no sign of life for 5:00" in watch.line(status)
    (workdir / "progress.json").write_text('{"stage": 3')
    with pytest.raises(UserError, match="progress.json is damaged"):
        watch.read_status(workdir)


def test_stopped_stage_keeps_its_time(workdir):
    """The time of a run that was stopped and of the one that resumed are added up."""
    progress = Progress("generate", 10, "questions", workdir=workdir)
    progress.written = -9.0
    progress.update(4)
    status = json.loads((workdir / "progress.json").read_text())
    write_lines(workdir / "progress.json", status | {"seconds": 40.0})
    Progress("generate", 10, "questions", 4, workdir=workdir).update(10)
    rows = [json.loads(line) for line in (workdir / "stages.jsonl").read_text().splitlines()]
    assert [row["done"] for row in rows] == [4, 6] and rows[0]["seconds"] == 40.0
    (whole,) = watch.finished_stages(workdir)
    assert whole["done"] == 10 and whole["seconds"] == pytest.approx(40.0, abs=5)


def test_rates_are_of_the_same_work_on_the_same_machine(workdir):
    config = options.defaults()
    name = rates.key(config, "generate", guided=4)
    assert rates.seconds_each(name) is None
    progress = Progress("generate", 10, "questions", workdir=workdir, rate=name)
    progress.start -= 50
    progress.update(10)
    assert rates.seconds_each(name) == pytest.approx(5.0, abs=0.5)
    config.generate.max_tokens = 7
    assert rates.seconds_each(rates.key(config, "generate", guided=4)) is None
    (Workdir(os.environ["XDG_CACHE_HOME"]) / "roserag_jax/rates.json").write_text("[1")
    assert rates.seconds_each(name) is None
    assert [rates.about(s) for s in (0.2, 70, 600, 9000)] == ["about 1 s", "about 70 s", "about 10 min", "about 2.5 h"]
