"""A workdir in a bucket, against an emulator."""

import json
import socket

import pytest

from roserag_jax import export, train
from roserag_jax.errors import UserError
from roserag_jax.training.train_step import TrainStep
from roserag_jax.workdir import Workdir, digest


def test_bucket_as_workdir_gives_what_a_local_one_does(config_of, questions, tmp_path, capsys, monkeypatch):
    """The whole path through `gs://`, against an emulator: stopped, it goes on; the adapter is that of a local run."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for things that the emulator lacks
    for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):  # gcsfs's and Orbax's
        monkeypatch.setenv(variable, f"http://localhost:{port}")
    server.start()
    try:
        local = config_of(questions)
        train.run(local)
        config = config_of(questions)
        config.workdir = "gs://bucket/runs/one"
        steps = TrainStep.__call__

        def interrupted(self, state, batch, step):
            if step == 3:
                raise KeyboardInterrupt
            return steps(self, state, batch, step)

        monkeypatch.setattr(TrainStep, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(config)
        assert "Saved step 3" in capsys.readouterr().out
        monkeypatch.setattr(TrainStep, "__call__", steps)
        train.run(config)
        ours, theirs = Workdir(config.workdir), Workdir(local.workdir)
        losses = lambda work: [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]
        assert losses(ours) == losses(theirs)
        for name in ("pairs.jsonl", "adapter"):
            assert digest(ours / name) == digest(theirs / name)
        for name in ("eval/base", "eval/adapter"):
            assert ours.manifest(name)["rows"] == 5
        with pytest.raises(UserError, match="is not local"):
            export.run(config)
        config.export.folder = str(tmp_path / "merged")
        export.run(config)
        assert (tmp_path / "merged/model.safetensors").exists()
    finally:
        server.stop()
