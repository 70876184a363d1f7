"""Runs in processes of their own: killed and resumed, and two that train as one."""

import itertools
import json
import os
import re
import signal
import socket

import jax
import numpy as np
import pytest
from conftest import run_command, start_command, stop_when

from roserag_jax import train
from roserag_jax.distributed import processes
from roserag_jax.workdir import Workdir, digest

torch = pytest.importorskip("torch")


def _has_a_row(parts):
    """Whether `generate` has finished a question; the file for it is there a moment before."""
    return parts.exists() and any(file.stat().length for file in parts.glob("generate*/*.jsonl"))


@pytest.mark.slow
def test_processes_killed_run_resumes_to_the_same_bytes(config_of, questions, finished):
    """SIGKILL while generating and SIGTERM while training, then the same command: the bytes of an uninterrupted run
    with one question at a time, and the texts of one with several."""
    config, uninterrupted = (config_of(questions, **{"generate.batch": 1}) for _ in range(2))
    work = Workdir(config.workdir)
    parts = work / ".parts"
    process = start_command("train", config, "--config.train.evaluate=False")
    code, _ = stop_when(process, lambda: _has_a_row(parts), signal.SIGKILL)
    assert code == -signal.SIGKILL and not (work / "pairs.jsonl").exists()

    checkpoints = work / "checkpoints"
    process = start_command("train", config, "--config.train.evaluate=False")
    saved = lambda: checkpoints.exists() and any(checkpoints.glob("*/2"))
    code, output = stop_when(process, saved, signal.SIGTERM)
    assert code == 143 or (code == 0 and (work / "adapter/manifest.json").exists()), output
    assert re.search(r"generate: resuming at \d of 6 questions", output), output

    for each in (config, uninterrupted):
        assert run_command("train", each, "--config.train.evaluate=False").returncode == 0
    reference = Workdir(uninterrupted.workdir)
    for artifact in ("candidates.jsonl", "pairs.jsonl", "adapter"):
        assert digest(work / artifact) == digest(reference / artifact), artifact
    said_of = lambda work: [[c["response"] for c in row["candidates"]] for row in work.rows("candidates.jsonl")]
    assert said_of(work) == said_of(Workdir(finished.workdir))
    losses = lambda work: [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert losses(work) == losses(reference)


@pytest.mark.slow
def test_processes_two_train_as_one(config_of, questions, finished):
    """Two real processes with a device each, stopped while decoding and while training, then gone on with: what one
    makes. The last two find out where they meet from what Slurm sets; the others are told.
    """
    # Twelve steps, each with its checkpoint: time enough for both to agree on the step at which they stop.
    shared = {"train.held_out": 0.34, "train.epochs": 6, "train.checkpoint_every": 1}
    one = config_of(questions, **shared, **{"train.evaluate": False, "data.pairs": f"{finished.workdir}/pairs.jsonl"})
    train.run(one)
    config = config_of(questions, **shared, **{"mesh.data": 2, "mesh.fsdp": 1})
    expected, alone, work = Workdir(one.workdir), Workdir(finished.workdir), Workdir(config.workdir)

    start = lambda distributed, **slurm: start_command("train", config, f"--config.distributed={distributed}", **slurm)

    def start_both():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return [start(f"localhost:{port},2,{i}") for i in range(2)]

    with work.lock():  # where one fails, the other does not wait for it
        runs = start_both()
        said = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [2, 2], said
    assert "in use by another run" in said[0] and "error: process 0: config.workdir" in said[1]

    first, second = start_both()
    decoding = lambda: _has_a_row(work / ".parts")
    code, said = stop_when(second, lambda: decoding() and first.send_signal(signal.SIGTERM) is None, signal.SIGTERM)
    said = [first.communicate(timeout=200)[0], said]
    assert code == first.returncode == 143 and not (work / "candidates.jsonl").exists(), said

    first, second = start_both()
    code, said = stop_when(second, lambda: any((work / "checkpoints").glob("*/1")), signal.SIGTERM)
    said = [first.communicate(timeout=200)[0], said]
    assert code == first.returncode == 143 and "generate: resuming at" in said[0] and "Saved step" in said[0], said
    # jax takes its port from the number of the job.
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    runs = [start("auto", **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    said = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert "train: resuming at" in said[0] and "train: " not in said[1]
    said_of = lambda work: [[c["response"] for c in row["candidates"]] for row in work.rows("candidates.jsonl")]
    assert said_of(work) == said_of(alone)
    predictions = lambda work: json.loads((work / "eval/base/predictions.json").read_text())
    assert predictions(work) == predictions(alone)
    rows = lambda work: map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
    losses = lambda work: [row["loss"] for row in rows(work) if "loss" in row]
    np.testing.assert_allclose(losses(work), losses(expected), atol=1e-5)
    adapter = adapter_of(expected)
    for name, ours in adapter_of(work).items():
        np.testing.assert_allclose(ours, adapter[name], atol=1e-5, err_msg=name)


def adapter_of(work):
    from safetensors.numpy import load_file

    return load_file(work / "adapter" / "adapter_model.safetensors")


def test_shared_queue_gives_each_item_to_one_process(monkeypatch):
    """A slow process gets fewer; blocks shrink towards the end; a second queue of the same name begins anew."""
    for _ in range(2):
        assert list(processes.SharedQueue("alone", list("abcde"), 2)) == list("abcde")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    taken, numbers = [0], itertools.count()

    def take(_, count):
        taken.append(taken[-1] + count)
        return taken[-2]

    monkeypatch.setattr(processes, "take", take)
    fast, slow = (processes.SharedQueue("two", list(range(100)), 8) for _ in range(2))
    found = {fast: [], slow: []}
    for number in numbers:
        which = slow if number % 10 == 0 else fast
        if (item := next(which, None)) is None:
            break
        found[which].append(item)
    rest = [item for queue in (fast, slow) for item in queue]
    assert sorted(found[fast] + found[slow] + rest) == list(range(100))
    assert len(found[slow]) < 15 and taken[1] == 8 and taken[-1] - taken[-2] == 1
