"""GGUF files of every architecture, written here as llama.cpp writes them and read by transformers for comparison."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SIZES, branch_logits, hf_logits

from roserag_jax.errors import UserError
from roserag_jax.hub import loading, model_files
from roserag_jax.hub.gguf import FAMILIES, hf_name
from roserag_jax.models import config as model_config
from roserag_jax.models import rope

torch = pytest.importorskip("torch")
TOKENS = np.random.default_rng(0).integers(3, 131, (2, 40))

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CHANGES = {
    "llama": {"rope_parameters": LLAMA3, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "gemma3": {"sliding_window": 12, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
}


def written(arch, folder, early=False, **header):
    """A small random model as a GGUF file, and its transformers configuration; `header` adds or replaces fields.

    Early files of Gemma 2 say nothing of its window and soft-caps.
    """
    import transformers

    torch.manual_seed(0)
    exact = {"rms_norm_eps": 2.0**-20, "max_position_embeddings": 16384}  # a header keeps floats of 32 bits
    hf = transformers.AutoConfig.for_model(FAMILIES[arch][0], **(SIZES | exact | CHANGES[arch]))
    model = transformers.AutoModelForCausalLM.from_config(hf)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    path = folder / f"{arch}.gguf"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(hf.max_position_embeddings)
    writer.add_embedding_length(hf.hidden_size)
    writer.add_block_count(hf.num_hidden_layers)
    writer.add_feed_forward_length(hf.intermediate_size)
    writer.add_head_count(hf.num_attention_heads)
    writer.add_head_count_kv(hf.num_key_value_heads)
    writer.add_key_length(hf.head_dim)
    writer.add_layer_norm_rms_eps(hf.rms_norm_eps)
    writer.add_vocab_size(hf.vocab_size)
    rotary = hf.rope_parameters.get("full_attention", hf.rope_parameters)
    writer.add_rope_freq_base(rotary["rope_theta"])
    if arch.startswith("gemma") and not early:
        writer.add_sliding_window(hf.sliding_window)
    if arch == "gemma2" and not early:
        writer.add_attn_logit_softcapping(hf.attn_logit_softcapping)
        writer.add_final_logit_softcapping(hf.final_logit_softcapping)
    for key, value in header.items():
        writer.add_string(f"{arch}.{key}", value)
    if arch == "llama":
        plain = rope.inverse_frequencies(hf.head_dim, 5e5)
        scaled = rope.inverse_frequencies(hf.head_dim, 5e5, tuple(LLAMA3.items()))
        writer.add_tensor("rope_freqs.weight", plain / scaled)
    names = {"token_embd": "embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = "attn_norm attn_q attn_k attn_v attn_output attn_q_norm attn_k_norm ffn_norm ffn_gate ffn_up ffn_down "
    parts = (parts + "post_attention_norm post_ffw_norm").split()
    layers = [f"blk.{i}.{part}" for i in range(hf.num_hidden_layers) for part in parts]
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    for name in [f"{stem}.{kind}" for stem in (*names, *layers) for kind in ("weight", "bias")]:
        value = state.get(hf_name(name, arch))
        if value is None or (name.startswith("output.") and hf.tie_word_embeddings):
            continue
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = hf.num_attention_heads if ".attn_q." in name else hf.num_key_value_heads
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if arch.startswith("gemma") and "norm" in name:
            value = value + 1
        writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    _finish(writer)
    return path, hf


def _finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_early_gemma_2_file_has_the_familys_window_and_soft_caps(tmp_path):
    config = model_files.open_model(str(written("gemma2", tmp_path, early=True)[0])).config
    assert (config.sliding_window, config.attention_softcap, config.final_softcap) == (4096, 50.0, 30.0)


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_gguf_file_is_the_model(arch, tmp_path, one_device):
    """The header gives transformers' configuration, the tensors transformers' logits, export's configuration both."""
    import transformers

    path, hf = written(arch, tmp_path)
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
    path, _ = written("qwen3", tmp_path, **{"rope.scaling.type": "yarn"})
    with pytest.raises(UserError, match=r"rope.scaling.type='yarn' is not implemented"):
        model_files.open_model(str(path))
    half = tmp_path / "half.gguf"
    half.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(UserError, match="half.gguf is damaged, incomplete"):
        model_files.open_model(str(half))
    _finish(gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2"))
    with pytest.raises(UserError, match="architecture 'gpt2' is not implemented"):
        model_files.open_model(str(tmp_path / "other.gguf"))
