"""The merged network in transformers 5; `tests/compat` has version 4."""

import json

import numpy as np
import pytest
from conftest import copy_folder, hf_logits, random_adapter, tokens_logits

from roserag_jax.hub import loading, merged_export, model_files
from roserag_jax.models.lora import LoRAConfig

TOKENS = np.random.default_rng(0).integers(3, 131, 24)


@pytest.mark.parametrize("rslora", [False, True])
def test_save_weights_in_shards(rslora, tiny_llama, one_device, tmp_path):
    transformers = pytest.importorskip("transformers")
    opened, base = tiny_llama
    lora = LoRAConfig(4, 12.0, 0.0, ("q_proj", "v_proj", "down_proj"), rslora)
    model = loading.assemble(opened.config, base, lora, random_adapter(opened.config, lora, one_device))
    merged_export.save_weights(model, tmp_path, shard_bytes=20_000)
    merged_export.save_config(opened, "float32", tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(tokens_logits(model, TOKENS), hf_logits(merged, TOKENS), atol=1e-5, rtol=0)


def test_save_config_copies_the_base_models_own(tiny_folder, tmp_path):
    """A file as transformers 4 wrote it stays as it is, nulls and unknown fields too; its dtype is the exported one."""
    old = {"rope_theta": 5000.0, "rope_scaling": None, "torch_dtype": "float16", "something": [None, "ünïcode"]}
    changes = old | {"rope_parameters": ..., "dtype": ...}
    folder = copy_folder(tiny_folder("llama")[0], tmp_path / "model", config=changes)
    merged_export.save_config(model_files.open_model(str(folder)), "bfloat16", tmp_path)
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    assert after == before | {"torch_dtype": "bfloat16"} and list(after) == list(before)


def test_save_generation_config_without_one(tiny_folder, tmp_path):
    folder = copy_folder(tiny_folder("llama")[0], tmp_path / "model")
    opened, file = model_files.open_model(str(folder)), folder / "generation_config.json"
    merged_export.save_generation_config(opened, (2, 7), 0, tmp_path)
    assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    file.unlink()
    merged_export.save_generation_config(opened, (2, 7), 0, tmp_path)
    assert json.loads((tmp_path / file.name).read_text()) == {"eos_token_id": [2, 7], "pad_token_id": 0}


def test_save_config_spells_rope_for_version_4_too(tiny_folder, tmp_path):
    """Its base has no default in version 4's spelling; a base that version 5 did not write is in both."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    folder = copy_folder(tiny_folder("llama")[0], tmp_path / "model", config={"rope_parameters": scaling})
    opened = model_files.open_model(str(folder))
    merged_export.save_config(opened, "float32", tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_theta"] == opened.config.rope_theta == 10000.0
    assert saved["rope_scaling"] == scaling and saved["rope_parameters"] == scaling
