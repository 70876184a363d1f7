"""The content of a model, named."""

import os
import shutil
import time

import numpy as np
import pytest
from conftest import copy_folder
from safetensors.numpy import load_file, save_file

from roserag_jax import options
from roserag_jax.errors import UserError
from roserag_jax.hub import model_files
from roserag_jax.hub.model_files import fingerprint
from roserag_jax.inputs import corpus_recipe
from roserag_jax.retrieval import indexing


def test_home_of_an_unknown_user_is_no_folder():
    """Nor is it a name to ask the Hub for; `pathlib` raises, where a shell leaves it as it is."""
    with pytest.raises(UserError, match="there is no folder ~nobody1/model"):
        model_files.resolve_path("~nobody1/model")
    config = options.defaults()
    config.index = "~nobody1/index"
    for read in (indexing.open_index, corpus_recipe):
        with pytest.raises(UserError, match="~nobody1/index is not an index"):
            read(config)


def test_fingerprint_of_a_folder_is_its_contents(model_folder, tmp_path):
    folder = copy_folder(model_folder, tmp_path / "model")
    first = fingerprint(str(folder))
    assert first == fingerprint(str(folder)) == fingerprint(str(model_folder)) and len(first) == 32
    (folder / "README.md").write_text("What it is.")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert fingerprint(str(folder)) == first
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole + b"\n")
        assert fingerprint(str(folder)) != first, name
        (folder / name).write_bytes(whole)
    tensors = load_file(folder / "model.safetensors")
    name = min(tensors)
    save_file(tensors | {name: tensors[name] + np.float32(1e-3)}, folder / "model.safetensors")
    assert fingerprint(str(folder)) != first
    tokenizer = fingerprint(str(folder), weights=False)
    (folder / "model.safetensors").unlink()
    assert fingerprint(str(folder), weights=False) == tokenizer != first
    with pytest.raises(UserError, match="has no model.safetensors"):
        fingerprint(str(folder))


def test_fingerprint_of_a_large_file_is_remembered_and_sees_one_changed_bit(smollm_path, tmp_path, monkeypatch):
    """Also where size and time of the file are those from before; a copy has the same content and fingerprint."""
    copy = tmp_path / "model.gguf"
    shutil.copyfile(smollm_path, copy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(model_files, "_SETTLED_SECONDS", 0.0)
    start = time.process_time()
    first = fingerprint(str(copy))
    read = time.process_time() - start
    start = time.process_time()
    assert fingerprint(str(copy)) == first
    assert time.process_time() - start < read / 4
    assert first == fingerprint(str(smollm_path))
    times = copy.stat()
    with copy.open("r+b") as file:
        file.seek(60_000_001)
        bits = file.read(1)[0]
        file.seek(60_000_001)
        file.write(bytes([bits ^ 1]))
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert copy.stat().st_mtime_ns == times.st_mtime_ns and fingerprint(str(copy)) != first
    for remembered in (tmp_path / "cache/roserag_jax/digests").iterdir():
        remembered.write_bytes(b"\xff cut off")
    assert fingerprint(str(smollm_path)) == first


def test_fingerprint_of_a_hub_id_is_its_commit(model_folder, tmp_path, monkeypatch):
    """A model in the Hub's cache, laid out as its client does."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--owner--name"
    shutil.copytree(model_folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint("owner/name") == fingerprint("owner/name", commit) == f"owner/name@{commit}"
    local = str(cache / "snapshots" / commit)
    assert fingerprint(local) == fingerprint(str(model_folder))
