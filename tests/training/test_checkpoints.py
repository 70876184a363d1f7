"""Checkpoints: verified on the way back, agreed upon by all processes, and never lost to a passing fault."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from roserag_jax.errors import UserError
from roserag_jax.training import checkpoints as module
from roserag_jax.training.checkpoints import Checkpoints
from roserag_jax.training.train_step import TrainState


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.0)


def state_of(step):
    return TrainState({"a": jnp.arange(40.0) + step}, {"m": jnp.full(3, step)})


@pytest.fixture
def folder(tmp_path):
    """A folder of checkpoints of the steps 1 and 2, each with its evaluation."""
    folder = epath.Path(tmp_path / "checkpoints")
    with Checkpoints(folder, keep=2, options={"train.loss": "orpo", "targets": ("a", "b")}) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), [{"step": step, "held_out_loss": 1 / 3}])
    return folder


def restore(folder, step=None):
    with Checkpoints(folder, keep=2) as checkpoints:
        return checkpoints.restore(state_of(0), step)


def assert_restored(found, step):
    assert found.step == step and found.evaluations == [{"step": step, "held_out_loss": 1 / 3}]
    jax.tree.map(np.testing.assert_array_equal, found.state, state_of(step))


def test_checkpoints_restore_the_latest_or_the_named(folder):
    assert_restored(restore(folder), 2)
    assert_restored(restore(folder, 1), 1)
    assert restore(folder, 3) is None and not (folder / "damaged").exists()


@pytest.mark.parametrize("part", ["arrays", "about"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_checkpoints_pass_over_damage(part, damage, folder, capsys):
    """One flipped bit or missing piece anywhere: named, moved away, and the checkpoint before is used."""
    last = Path(folder / "2")
    files = [last / "about/metadata"] if part == "about" else list((last / "arrays").rglob("d/*"))
    for file in files:
        data = bytearray(file.read_bytes())
        if damage == "missing":
            file.unlink()
            continue
        data[len(data) // 2] ^= damage == "flipped"
        file.write_bytes(bytes(data[: len(data) // 2 if damage == "cut" else None]))
    assert_restored(restore(folder), 1)
    assert f"{last} is damaged" in capsys.readouterr().out
    assert [p.name.split("-")[0] for p in (folder / "damaged").iterdir()] == ["2"]


@pytest.mark.parametrize("failures", [1, 2, 99])
def test_checkpoints_survive_read_errors_that_pass(failures, folder, monkeypatch):
    """An input/output error is tried again; where it stays the command ends, and no checkpoint is moved."""
    verified, left = Checkpoints._verified, [failures]

    def failing(self, step, like):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, "Input/output error", str(self.folder))
        return verified(self, step, like)

    monkeypatch.setattr(Checkpoints, "_verified", failing)
    if failures < 3:
        assert_restored(restore(folder), 2)
    else:
        with pytest.raises(UserError, match=r"checkpoints/2 cannot be read \(.*Input/output error.*left as it is"):
            restore(folder)
    assert not (folder / "damaged").exists() and (folder / "2").exists()
    left[0] = 0
    assert_restored(restore(folder), 2)


@pytest.mark.parametrize(
    ("error", "may_recover"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (ValueError('UNAVAILABLE: Error reading "0/.zarray": connection reset'), True),
        (ValueError('Error opening "zarr" driver: [OS error 5: EIO Input/output error]'), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (ValueError('NOT_FOUND: Error opening "zarr" driver [OS error 2: ENOENT]'), False),
        (ValueError("DATA_LOSS: Error decoding local file"), False),
        (json.JSONDecodeError("Expecting value", "", 0), False),
    ],
)
def test_read_errors_are_told_from_damage(error, may_recover):
    assert module._may_recover(error) == may_recover


def test_checkpoints_replace_what_a_former_run_saved_later(folder):
    """A run that resumes at step 0 saves step 1 anew: Orbax alone would silently not save it."""
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, state_of(7))
    found = restore(folder)
    assert found.step == 1
    jax.tree.map(np.testing.assert_array_equal, found.state, state_of(7))


def test_checkpoints_finish_a_save_before_a_signal(tmp_path):
    """SIGTERM inside Orbax's save would leave its threads waiting: it is held back, and the checkpoint is complete."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with Checkpoints(epath.Path(tmp_path / "c"), keep=2) as checkpoints:
            save = checkpoints._manager.save

            def interrupted(*args, **kwargs):
                signal.raise_signal(signal.SIGTERM)
                return save(*args, **kwargs)

            checkpoints._manager.save = interrupted
            with pytest.raises(SystemExit, match="143"):
                checkpoints.save(1, state_of(1), [{"step": 1, "held_out_loss": 1 / 3}])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert_restored(restore(tmp_path / "c"), 1)


_PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, index, folder = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(index))
import jax.numpy as jnp
from etils import epath
from roserag_jax.training import checkpoints as module
module._RETRY_SECONDS = 0.0
mesh = jax.make_mesh((2,), ("data",))
split = jax.NamedSharding(mesh, jax.P("data"))
state = lambda value: module.TrainState({"a": jax.device_put(jnp.full(4, value), split)}, {})
with module.Checkpoints(epath.Path(folder), keep=2) as checkpoints:
    assert checkpoints.restore(state(0.0)) is None
    for step in (1, 2):
        checkpoints.save(step, state(float(step)))
    checkpoints.wait()
    verified = module.Checkpoints._verified
    for fault in (OSError(5, "Input/output error"), ValueError("its digest does not match")):
        def failing(self, step, like):
            if step == 2 and index == "1":
                raise fault
            return verified(self, step, like)
        module.Checkpoints._verified = failing
        try:
            found = checkpoints.restore(state(0.0))
            print("RESTORED", found.step, [float(s.data[0]) for s in found.state.adapter["a"].addressable_shards])
        except module.UserError as error:
            print("REFUSED", error)
"""


def test_checkpoints_are_agreed_upon_by_two_processes(tmp_path):
    """What only process 1 cannot use, neither takes; and neither waits for the other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "checkpoints"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(port), str(index), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        for index in range(2)
    ]
    output = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], output
    for text in output:
        assert "REFUSED" in text and "2 cannot be read in processes [1]" in text, output
        assert "RESTORED 1 [1.0]" in text and "is damaged in processes [1]" in text, output
    assert [p.name.split("-")[0] for p in (folder / "damaged").iterdir()] == ["2"]
