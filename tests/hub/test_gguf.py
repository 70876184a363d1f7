"""GGUF files of every architecture, written here as llama.cpp writes them and read by transformers for comparison."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import branch_logits, finish_gguf, hf_logits, write_gguf

from roserag_jax.errors import UserError
from roserag_jax.hub import loading, model_files
from roserag_jax.hub.gguf import FAMILIES
from roserag_jax.models import config as model_config

torch = pytest.importorskip("torch")
TOKENS = np.random.default_rng(0).integers(3, 131, (2, 40))


def test_an_early_gemma_2_file_has_the_familys_window_and_soft_caps(tmp_path):
    config = model_files.open_model(str(write_gguf("gemma2", tmp_path, early=True)[0])).config
    assert (config.sliding_window, config.attention_softcap, config.final_softcap) == (4096, 50.0, 30.0)


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_gguf_file_is_the_model(arch, tmp_path, one_device):
    """The header gives transformers' configuration, the tensors transformers' logits, export's configuration both."""
    import transformers

    path, hf = write_gguf(arch, tmp_path)
    opened = model_files.open_model(str(path))
    assert opened.config == model_config.from_hf(hf, "")
    assert opened.transformers_config().architectures[0].endswith("ForCausalLM")
    model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), one_device))
    ours = branch_logits(model, TOKENS[:1], np.array([20]), TOKENS[:1, None, 20:])[0, 0]
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=hf, attn_implementation="eager", dtype=torch.float32
    )
    np.testing.assert_allclose(ours, hf_logits(reference, TOKENS[0])[20:], atol=1e-4, rtol=0)


def test_what_a_header_cannot_say_is_refused(tmp_path):
    path, _ = write_gguf("qwen3", tmp_path, **{"rope.scaling.type": "yarn"})
    with pytest.raises(UserError, match=r"rope.scaling.type='yarn' is not implemented"):
        model_files.open_model(str(path))
    half = tmp_path / "half.gguf"
    half.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(UserError, match="half.gguf is damaged, incomplete"):
        model_files.open_model(str(half))
    finish_gguf(gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2"))
    with pytest.raises(UserError, match="architecture 'gpt2' is not implemented"):
        model_files.open_model(str(tmp_path / "other.gguf"))
