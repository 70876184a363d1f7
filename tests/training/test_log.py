"""The training log: each run's own rows, cut back to where it resumes, whatever became of the file."""

import json

import pytest

from roserag_jax.training.log import TrainingLog, read_rows, round_row
from roserag_jax.workdir import Workdir


def write(work, run, done, losses, evaluations=()):
    """Resume the log of a run after `done` steps and add rows of these losses."""
    with TrainingLog(work, work / "checkpoints" / run).resume(done, evaluations) as log:
        for step, loss in enumerate(losses, done + 1):
            log.add(round_row(step, {"loss": loss}))
    return log


def test_log_of_runs_that_take_turns_keeps_their_own_rows(tmp_path):
    """One run stops, another with other options begins and stops, the first resumes."""
    work = Workdir(str(tmp_path))
    for run, done, losses in (("a", 0, (3.0, 2.0)), ("b", 0, (9.0,)), ("a", 1, (1.0,))):
        log = write(work, run, done, losses)
    assert [row["loss"] for row in log.steps] == [3.0, 1.0]
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert rows == log.steps and [row["step"] for row in rows] == [1, 2]


def test_round_row_writes_null_for_nonfinite_numbers():
    row = round_row(3, {"loss": float("nan"), "gradient_norm": float("inf"), "margin": 1 / 3}, measure="loss")
    assert row == {"step": 3, "loss": None, "gradient_norm": None, "margin": 0.333333, "measure": "loss"}


@pytest.mark.parametrize("damage", ["deleted", "torn", "garbage", "empty", "other JSON"])
def test_log_resumes_with_the_rows_that_are_left(damage, tmp_path, capsys):
    """A file that is gone, cut off in its last line or overwritten in the middle costs those rows, not the run."""
    work, evaluation = Workdir(str(tmp_path)), {"step": 2, "held_out_loss": 1.5, "measure": "loss"}
    log = write(work, "a", 0, (3.0, 2.0, 1.0))
    file = log.paths[0]
    lines = file.read_bytes().splitlines(keepends=True)
    left = {"deleted": [], "torn": [1, 2], "garbage": [1, 3], "empty": [], "other JSON": [1, 3]}[damage]
    damaged = {"torn": lines[2][:-9], "garbage": b'{"st\xff\x00p": 2}\n', "other JSON": b'[2]\n{"step": "2"}\n3\n'}
    if damage == "deleted":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        at = 2 if damage == "torn" else 1
        file.write_bytes(b"".join([*lines[:at], damaged[damage], *lines[at + 1 :]]))
    log = write(work, "a", 3, (0.5,), [evaluation])
    assert [row["step"] for row in log.steps] == [*left, 4] and log.evaluations == [evaluation]
    assert f"{file} lacks {3 - len(left)} of 3 steps" in capsys.readouterr().out
    assert read_rows(file) == (log.all, 0) and read_rows(work / "metrics.jsonl") == (log.all, 0)


def test_log_takes_evaluations_from_the_checkpoint(tmp_path, capsys):
    """Those that the file has lost come back, none is there twice, and each stands behind its step."""
    work = Workdir(str(tmp_path))
    evaluations = [{"step": step, "held_out_loss": 1.0 + step, "measure": "loss"} for step in (0, 1, 2)]
    with TrainingLog(work, work / "checkpoints" / "a").resume(0) as log:
        for row in (evaluations[0], round_row(1, {"loss": 3.0}), evaluations[1], round_row(2, {"loss": 2.0})):
            log.add(row)
    log = write(work, "a", 2, (1.0,), evaluations)
    assert log.evaluations == evaluations and [row["step"] for row in log.all] == [0, 1, 1, 2, 2, 3]
    assert "lacks" not in capsys.readouterr().out
