"""Hugging Face folders as people have them; transformers' loader is the oracle."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import copy_folder
from safetensors.numpy import load_file, save_file

from roserag_jax.errors import UserError
from roserag_jax.hub import model_files
from roserag_jax.hub.tensor_names import EMBEDDING

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return copy_folder(tiny_folder("llama")[0], tmp_path / "model")


def refuse(folder, match):
    with pytest.raises(UserError, match=match):
        model_files.open_model(str(folder))


def write_shards(folder, tensors):
    """Two shards and their index."""
    names = sorted(tensors)
    weight_map = {n: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_one_file_of_weights_comes_before_older_shards(folder):
    """Shards and index from before beside a new `model.safetensors`: what transformers reads."""
    transformers = pytest.importorskip("transformers")
    new = load_file(folder / "model.safetensors")
    write_shards(folder, {name: tensor + 1 for name, tensor in new.items()})
    read = lambda: model_files.open_model(str(folder)).read(EMBEDDING, (slice(None),))
    oracle = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight
    np.testing.assert_array_equal(read(), new[EMBEDDING])
    np.testing.assert_array_equal(read(), oracle().detach().numpy())
    (folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(read(), new[EMBEDDING] + 1)
    np.testing.assert_array_equal(read(), oracle().detach().numpy())


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("model type 'gpt2'", {"model_type": "gpt2", "n_head": 2, "n_embd": 8}),
        ("model type 'nonsense'", {"model_type": "nonsense"}),
        ("model type None", {"model_type": None}),
        ("model_type=7 is not a string", {"model_type": 7}),
        ("activation 'relu'", {"hidden_act": "relu"}),
        ("auto_map=.* is not implemented", {"auto_map": {"AutoModel": "modeling.Own"}}),
        ("quantization_config=.* unquantized", {"quantization_config": {"quant_method": "awq"}}),
        ("transformers_weights is not implemented", {"transformers_weights": "other.safetensors"}),
        ("rope_type 'yarn'", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
        ("factor=-2.0 of RoPE", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -2.0}}),
        ("num_hidden_layers=1000000000000", {"num_hidden_layers": 10**12}),
        ("num_hidden_layers='3'", {"num_hidden_layers": "3"}),
        ("config.json", {"hidden_size": "48"}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json: 4 query heads, 3 key/value heads", {"num_key_value_heads": 3}),
        ("config.json: vocab_size=-131", {"vocab_size": -131}),
        ("config.json", {"rms_norm_eps": 1e308}),
        ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}),
        ("config.json", {"tie_word_embeddings": "no"}),
    ],
    ids=str,
)
def test_config_values_are_refused_by_name(match, changes, tiny_folder, tmp_path):
    refuse(copy_folder(tiny_folder("llama")[0], tmp_path / "model", config=changes), match)


def test_damaged_files_are_named(folder):
    whole = (folder / "config.json").read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 3):
        (folder / "config.json").write_bytes(whole[:cut])
        refuse(folder, r"config.json.*not valid JSON")
    (folder / "config.json").write_text("[1, 2]")
    refuse(folder, r"config.json is not a JSON object")
    (folder / "config.json").write_bytes(whole)

    weights = folder / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1000])
    refuse(folder, "model.safetensors is damaged or incomplete")
    weights.unlink()
    refuse(folder, "never pickles")
    outside = folder.parent / "weights"
    outside.write_bytes(b"")
    weights.symlink_to(outside)
    refuse(folder, "leads out of its folder")
    weights.unlink()
    for name in ("../weights.safetensors", "/etc/weights.safetensors", "weights.bin", ""):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
        refuse(folder, r"is not a plain \*.safetensors name")
    for index in ({}, {"weight_map": []}, {"weight_map": {}}):
        (folder / INDEX).write_text(json.dumps(index))
        refuse(folder, r"index.json: weight_map is not an object of tensor names and files")
    (folder / INDEX).write_text('{"weight_map": {"x": "model-0')
    refuse(folder, r"index.json.*not valid JSON")


@contextlib.contextmanager
def as_nobody():
    """As a user who is not root, whom permissions concern."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_that_may_not_be_read_are_named(name, tiny_folder):
    model_files.open_model(str(tiny_folder("llama")[0]))  # all imports done
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)
        folder = copy_folder(tiny_folder("llama")[0], Path(temporary) / "model")
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o000 if file.name == name else 0o644)
        with as_nobody():
            refuse(folder, f"{name} (may not|cannot) be read.*Permission denied")


def test_a_name_that_is_nothing_is_an_error():
    with pytest.raises(UserError, match="could not be downloaded"):
        model_files.open_model("nobody/nothing")
    with pytest.raises(UserError, match="there is no folder /nowhere/model"):
        model_files.open_model("/nowhere/model")
    with pytest.raises(UserError, match="config.model is empty"):
        model_files.open_model("")
