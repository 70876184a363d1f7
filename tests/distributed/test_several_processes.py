"""Whole runs of several processes with faults: killed, stopped, told to stop, started with other options or files, and
resumed by another number of processes. Each takes minutes on two cores: `make test-processes` runs them.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from roserag_jax import automatic_mesh, generate, options, train
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.workdir import Workdir

pytestmark = pytest.mark.processes
pytest.importorskip("torch")


class Run:
    """A command in several processes."""

    def __init__(self, command, config, count, *arguments, own=None, environment=None, only=None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flat = {name: options.get(config, name) for name, _ in options.walk() if name != "distributed"}
        told = [f"--config.{n}={v}" for n, v in flat.items() if v != options.get(options.defaults(), n)]
        line = [sys.executable, "-m", f"roserag_jax.{command}", *told, *arguments]
        start = lambda i: subprocess.Popen(
            [*line, f"--config.distributed=localhost:{port},{count},{i}", *(own or {}).get(i, ())],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(environment or {}).get(i, {})},
        )
        self.processes = {i: start(i) for i in (only or range(count))}

    def when(self, seen, signals):
        """Send signals, by process, as soon as `seen()` is true; notes the time."""
        deadline = time.monotonic() + 400
        while not seen():
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.processes.values()), self.ends()
            time.sleep(0.02)
        self.sent = time.monotonic()
        for i, number in signals.items():
            self.processes[i].send_signal(number)
        return self

    def ends(self, *, seconds=400):
        """Exit status and output of each process, in order."""
        return [(p.communicate(timeout=seconds)[0], p.returncode)[::-1] for p in self.processes.values()]


def assert_one_line(output, line):
    """The last line of an output is this error, and there is no stack of Python or C++."""
    assert line in output.splitlines()[-1] and "Traceback" not in output and "stack trace" not in output, output


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [{"prompt": f"Which {i}?", "chosen": f"So. Answer: {i}", "rejected": "No. Answer: b"} for i in range(8)]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_generation_through_every_end_and_with_other_numbers_of_processes(config_of):
    """Killed, SIGTERM and Ctrl-C to one of two, then four processes and one: the texts of a single process."""
    config, alone = config_of(), config_of()
    for each in (config, alone):
        each.data.train_rows = 24
    parts = Workdir(config.workdir) / ".parts"
    rows = lambda: sum(len(file.read_text().splitlines()) for file in parts.glob("generate*/*.jsonl"))

    run = Run("generate", config, 2).when(lambda: rows() > 0, {1: signal.SIGKILL})
    (status, output), _ = run.ends()
    assert status == 134 and time.monotonic() - run.sent < 30
    assert_one_line(output, "error: process 1 (")
    for number, status, target in ((signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 0)):
        before = rows()
        run = Run("generate", config, 2).when(lambda before=before: rows() > before, {target: number})
        ends = run.ends()
        assert [code for code, _ in ends] == [status] * 2 and rows() > before, ends
        assert time.monotonic() - run.sent < 20  # ten, on cores of one's own
    before = rows()
    run = Run("generate", config, 4).when(lambda: rows() > before, {0: signal.SIGKILL})
    for status, output in run.ends()[1:]:
        assert status == 134
        assert_one_line(output, "error: process 0 is gone")
    generate.run(config)
    generate.run(alone)
    texts = lambda c: [[x["response"] for x in r["candidates"]] for r in Workdir(c.workdir).rows("candidates.jsonl")]
    assert texts(config) == texts(alone)


def test_training_with_other_numbers_of_processes(config_of, pairs, monkeypatch):
    """Two processes of which either is killed; four, told to stop; one to the end, over four devices each time: the
    adapter of a single process.

    Over another number of devices a batch is summed in other parts, which AdamW scales up where a gradient cancels.
    """
    from safetensors.numpy import load_file

    monkeypatch.setattr(automatic_mesh, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:4]))
    devices = lambda count: {i: {"JAX_NUM_CPU_DEVICES": str(4 // count)} for i in range(count)}
    changes = {"data.pairs": pairs, "train.evaluate": False, "train.checkpoint_every": 1, "train.epochs": 6}
    changes |= {"mesh.data": -1, "mesh.fsdp": 1}
    config, alone = config_of(**changes, **{"train.batch": 4}), config_of(**changes, **{"train.batch": 4})
    checkpoints = Workdir(config.workdir) / "checkpoints"
    saved = lambda least: any(int(f.name) >= least for f in checkpoints.glob("*/*") if f.name.isdigit())
    latest = 0
    for killed, line in ((1, "error: process 1 ("), (0, "error: process 0 is gone")):
        run = Run("train", config, 2, environment=devices(2))
        run.when(lambda least=latest + 1: saved(least), {killed: signal.SIGKILL})
        status, output = run.ends()[1 - killed]
        assert status == 134 and time.monotonic() - run.sent < 30
        assert_one_line(output, line)
        latest = max(int(f.name) for f in checkpoints.glob("*/*") if f.name.isdigit())
    run = Run("train", config, 4, environment=devices(4)).when(lambda: saved(latest + 1), {3: signal.SIGTERM})
    ends = run.ends()
    assert [code for code, _ in ends] == [143] * 4 and f"resuming at {latest}" in ends[0][1], ends
    train.run(config)
    train.run(alone)
    adapter = lambda c: load_file(Workdir(c.workdir) / "adapter/adapter_model.safetensors")
    for name, expected in adapter(alone).items():
        np.testing.assert_allclose(adapter(config)[name], expected, atol=2.8e-7, err_msg=name)


def test_stopped_process_is_named_and_all_write_their_stacks(config_of, pairs):
    changes = {"data.pairs": pairs, "train.evaluate": False, "train.epochs": 100, "watchdog_seconds": 40}
    config = config_of(**changes, **{"mesh.data": -1, "mesh.fsdp": 1})
    metrics = Workdir(config.workdir) / "metrics.jsonl"
    steps = lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 1
    run = Run("train", config, 2).when(steps, {1: signal.SIGSTOP})
    status, output = run.processes[0].wait(timeout=200), run.processes[0].communicate()[0]
    assert status == 134 and "error: process 1 (" in output and "no sign of life" in output, output
    with open(output.split("Where this process was: ")[1].split()[0]) as stacks:
        assert "Thread" in stacks.read()
    run.processes[1].send_signal(signal.SIGCONT)
    assert run.processes[1].wait(timeout=60) == 134
    run.processes[1].stdout.close()


def test_options_that_differ_are_named_at_once(config_of):
    config = config_of()
    own = {1: ["--config.train.evaluate_every=7", "--config.generate.plain_temperature=0.3"]}
    own[1].append("--config.train.checkpoint_every=9")
    for status, output in Run("generate", config, 2, own=own).ends():
        assert status == 2
        assert_one_line(output, "error: config.generate.plain_temperature is 0.3 in process 1 and 0.8 in process 0; ")
        assert "config.train.evaluate_every is 7" in output and "config.train.checkpoint_every is 9" in output


def test_process_that_never_starts(config_of):
    began = time.monotonic()
    for status, output in Run("generate", config_of(), 3, "--config.join_seconds=15", only=(0, 2)).ends():
        assert status == 134
        assert_one_line(output, "error: process 1 of 3 did not join within 15 s (config.join_seconds)")
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("damage", ["another weight", "missing", "cut off"])
def test_weights_that_only_one_process_has_otherwise(config_of, model_folder, tmp_path, damage):
    """All end with status 2 and the first cause, and nothing is sampled."""
    homes = {i: tmp_path / str(i) for i in range(2)}
    for home in homes.values():
        shutil.copytree(model_folder, home / "model")
    weights = homes[1] / "model/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(data if damage == "another weight" else data[:-1000])
    config = config_of(model="~/model")
    environment = {i: {"HOME": str(home)} for i, home in homes.items()}
    for status, output in Run("generate", config, 2, environment=environment).ends():
        assert status == 2 and "Traceback" not in output, output
        assert "model.safetensors" in output or "config.model=~/model is not the same in process 1" in output
    assert not (Workdir(config.workdir) / ".parts").exists()


_LATE = """
import sys, time
import jax, jax.numpy as jnp
from roserag_jax import options
from roserag_jax.distributed import processes
from roserag_jax.distributed.mesh import AXES, make_mesh
config = options.defaults()
config.distributed = sys.argv[1]
processes.start(config)
mesh = make_mesh(1, 2, 2)
processes.connect(mesh)
place = lambda *axes: jax.NamedSharding(mesh, jax.P(axes))
x = jax.jit(lambda: jnp.arange(4.0), out_shardings=place(*AXES))()
for axes in (("fsdp",), ("tensor",), ()):
    time.sleep(32 * jax.process_index())
    found = jax.jit(lambda x: x.reshape(2, 2) + 1, out_shardings=place(*axes))(x)
    processes.barrier(f"{jax.block_until_ready(found).shape}")
print("met", file=sys.stderr)
processes.leave(0)
"""


def test_processes_may_reach_the_first_collective_of_a_mesh_at_different_times():
    """Half a minute apart, in every group of its devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _LATE, f"localhost:{port},2,{i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        )
        for i in range(2)
    ]
    ends = [(run.communicate(timeout=300)[0], run.returncode) for run in runs]
    assert all(output.endswith("met\n") and status == 0 for output, status in ends), ends
