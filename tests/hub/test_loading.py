"""Loading: the right tensors in the right places, or their names in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import copy_folder, hf_logits, tokens_logits
from flax import nnx
from safetensors.numpy import load_file, save_file

from roserag_jax.errors import UserError
from roserag_jax.hub import loading, model_files
from roserag_jax.hub.tensor_names import EMBEDDING, HEAD
from roserag_jax.models.lora import LoRAConfig, LoRAParam

TOKENS = np.random.default_rng(0).integers(3, 131, 24)
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return copy_folder(tiny_folder("llama")[0], tmp_path / "model")


def load(folder, mesh):
    opened = model_files.open_model(str(folder))
    return opened, loading.load_base(opened, jnp.dtype("float32"), mesh)


def test_load_base_with_missing_unknown_and_misshapen_tensors(folder, one_device):
    """They are listed before anything is placed."""
    tensors = load_file(folder / "model.safetensors")
    up = tensors.pop(UP)

    def refuse(match, **changes):
        save_file(tensors | changes, folder / "model.safetensors")
        with pytest.raises(UserError, match=match):
            load(folder, one_device)

    refuse(f"missing: {UP}")
    refuse(r"unknown: extra.weight", **{UP: up, "extra.weight": up})
    refuse(rf"shapes differ: {UP} is \(80, 8\)", **{UP: up[:, :8].copy()})


def test_load_base_with_tensors_that_are_not_weights(folder, one_device):
    """Of another type, which would be read as other weights; of no value at all."""
    tensors = load_file(folder / "model.safetensors")
    for kind in (np.int32, np.uint32):
        save_file(tensors | {UP: tensors[UP].view(kind)}, folder / "model.safetensors")
        with pytest.raises(UserError, match=rf"model.safetensors: '{UP}' is of type [IU]32, not one of F64, F32"):
            load(folder, one_device)
    for bad in (np.nan, np.inf):
        damaged = tensors[UP].copy()
        damaged[3, 5] = bad
        save_file(tensors | {UP: damaged}, folder / "model.safetensors")
        with pytest.raises(UserError, match=rf"{UP} holds values that are not finite"):
            load(folder, one_device)


def test_load_base_with_a_tied_table_saved_twice(folder, one_device):
    """It may be there twice if it is the same."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING].copy()}, folder / "model.safetensors")
    load(folder, one_device)
    save_file(tensors | {HEAD: tensors[EMBEDDING] + 1}, folder / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight is not the table"):
        load(folder, one_device)


def test_load_base_with_a_tied_table_saved_as_the_head(folder, tiny_folder, one_device):
    """As in transformers: the table's other name will do."""
    transformers = pytest.importorskip("transformers")
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    opened, base = load(folder, one_device)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    found = tokens_logits(loading.assemble(opened.config, base), TOKENS)
    np.testing.assert_allclose(found, hf_logits(tiny_folder("llama")[1], TOKENS), atol=1e-4, rtol=0)
    np.testing.assert_allclose(found, hf_logits(reference, TOKENS), atol=1e-4, rtol=0)


def test_init_adapter_changes_nothing(tiny_llama, one_device):
    opened, base = tiny_llama
    lora = LoRAConfig(4, 8.0)
    fresh = loading.init_adapter(opened.config, lora, one_device, jax.random.key(0))
    adapted = tokens_logits(loading.assemble(opened.config, base, lora, fresh), TOKENS)
    np.testing.assert_array_equal(adapted, tokens_logits(loading.assemble(opened.config, base), TOKENS))
    values = {path[-1]: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(fresh)}
    assert not values["lora_b"].any() and values["lora_a"].std() > 0.05
    assert nnx.state(loading.assemble(opened.config, base), LoRAParam) == nnx.State({})
